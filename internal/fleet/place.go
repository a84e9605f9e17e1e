package fleet

import (
	"cmp"
	"context"
	"math/rand/v2"
	"slices"
)

// Place returns the nodes that take sandboxes, in the order in which a new one should be offered to them. What the rows
// say may be seconds old, so a node may refuse.
func (s *Service) Place(ctx context.Context) ([]ID, error) {
	all, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	return order(all, s.cfg.Self), nil
}

// order returns the ready nodes that other servers can reach, those with the fewest active sandboxes first. Creates
// that come at once see the same rows, so equal nodes are shuffled. The node of this process, self, is reached without
// a lease, which runs out while the records are away.
func order(all []Node, self ID) []ID {
	takes := func(n Node) bool {
		if n.ID == self {
			return n.CordonedAt.IsZero()
		}
		return n.Status == Ready && n.Address != ""
	}
	ready := slices.DeleteFunc(slices.Clone(all), func(n Node) bool { return !takes(n) })
	rand.Shuffle(len(ready), func(i, j int) { ready[i], ready[j] = ready[j], ready[i] })
	slices.SortStableFunc(ready, func(a, b Node) int { return cmp.Compare(a.Active, b.Active) })
	ids := make([]ID, len(ready))
	for i, n := range ready {
		ids[i] = n.ID
	}
	return ids
}
