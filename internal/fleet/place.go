package fleet

import (
	"cmp"
	"context"
	"math/rand/v2"
	"slices"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// choices is the number of nodes of which the best is taken. What nodes say is up to LeaseTime/6 old, and replicas
	// that all took the best of all would send everything to one node until it says more. With fewer choices full nodes
	// are taken more often.
	choices = 3
	// newMemoryMB is the memory in MiB that a sandbox counts for which has come since its node spoke last. One has some
	// 20 when its agent answers, and grows with its use. With less, one node gets all sandboxes until it speaks again;
	// with more, it gets too few.
	newMemoryMB = 64
)

// Needs says which machines may take a new sandbox.
type Needs struct {
	MemoryMB int               // of the sandbox's size in MiB, 0 if it is not known
	Labels   map[string]string // that the node must have
}

// Place returns the nodes that take sandboxes, in the order in which a new one should be offered to them: the best of
// three random ones that have the labels and room for the memory, again and again, and then those that seem to have
// none. What the rows say may be seconds old, so a node may refuse, and one that seems full may not. It returns an
// error if no machine of the fleet, whatever its status, has the labels, Invalid in field "placement.require", or if
// none of those that have them is large enough for the memory, Invalid in field "size".
func (s *Service) Place(ctx context.Context, needs Needs) ([]ID, error) {
	all, err := s.labelled(ctx, needs.Labels)
	if err != nil {
		return nil, err
	}
	if err := neverFits(all, needs.MemoryMB); err != nil {
		return nil, err
	}
	return order(all, s.cfg.Self, needs.MemoryMB), nil
}

// Takes returns an error if this process's node does not have labels that a new sandbox needs: Invalid in field
// "placement.require" if no other node has them either, and otherwise Unavailable, code "no_capacity".
func (s *Service) Takes(ctx context.Context, labels map[string]string) error {
	if len(labels) == 0 {
		return nil
	}
	all, err := s.labelled(ctx, labels)
	if err == nil && !slices.ContainsFunc(all, func(n Node) bool { return n.ID == s.cfg.Self }) {
		err = fault.New(fault.Unavailable, fault.CodeNoCapacity, "this machine lacks labels that the sandbox needs")
	}
	return err
}

// labelled returns the nodes that have labels. It returns an error if there are nodes and none has them.
func (s *Service) labelled(ctx context.Context, labels map[string]string) ([]Node, error) {
	if err := checkLabels(labels); err != nil {
		return nil, fault.InvalidField("placement.require", "%s", err)
	}
	all, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	have := slices.DeleteFunc(all, func(n Node) bool {
		for name, value := range labels {
			if has, ok := n.Labels[name]; !ok || has != value {
				return true
			}
		}
		return false
	})
	if len(have) == 0 && len(labels) > 0 {
		return nil, fault.InvalidField("placement.require", "no machine has these labels")
	}
	return have, nil
}

// neverFits returns an error if no machine has so much memory, also one that takes no sandboxes now.
func neverFits(all []Node, memoryMB int) error {
	most := 0
	for _, n := range all {
		if n.mayFit(memoryMB) {
			return nil
		}
		most = max(most, n.MemoryMB)
	}
	if len(all) == 0 {
		return nil
	}
	return fault.InvalidField("size", "needs %d MiB of memory, and no machine that may take it has more than %d MiB",
		memoryMB, most)
}

// mayFit reports whether the machine has so much memory at all.
func (n Node) mayFit(memoryMB int) bool { return n.MemoryMB == 0 || memoryMB <= n.MemoryMB }

// order returns the ready nodes that other servers can reach, as Place does. The node of this process, self, is reached
// without a lease, which runs out while the records are away.
func order(all []Node, self ID, memoryMB int) []ID {
	takes := func(n Node) bool {
		if n.ID == self {
			return n.CordonedAt.IsZero()
		}
		return n.Status == Ready && n.Address != ""
	}
	var fit, rest []Node
	for _, n := range all {
		switch {
		case !takes(n) || !n.mayFit(memoryMB):
		case n.fits(memoryMB):
			fit = append(fit, n)
		default:
			rest = append(rest, n)
		}
	}
	ids := make([]ID, 0, len(fit)+len(rest))
	for _, some := range [][]Node{fit, rest} {
		for len(some) > 0 {
			rand.Shuffle(len(some), func(i, j int) { some[i], some[j] = some[j], some[i] })
			best := slices.MinFunc(some[:min(choices, len(some))], lessUsed)
			ids = append(ids, best.ID)
			some = slices.DeleteFunc(some, func(n Node) bool { return n.ID == best.ID })
		}
	}
	return ids
}

// fits reports whether the node seems to have room for a sandbox of so much memory. It needs not have it: a sandbox
// begins with little.
func (n Node) fits(memoryMB int) bool {
	return n.Active < n.MaxSandboxes && n.freeMB() >= max(memoryMB, newMemoryMB)
}

// freeMB returns the free memory in MiB, without what sandboxes take that have come since the node spoke.
func (n Node) freeMB() int {
	return max(0, n.Load.MemoryFreeMB-newMemoryMB*max(0, n.Active-n.Load.Sandboxes))
}

// lessUsed compares nodes by the part of their number of sandboxes or of their memory that is used, whichever is
// larger, and then by the starts that a new one waits for.
func lessUsed(a, b Node) int {
	return cmp.Or(cmp.Compare(a.used(), b.used()), cmp.Compare(a.Load.Starting, b.Load.Starting),
		cmp.Compare(a.Active, b.Active))
}

// used returns the part of the machine that is used, from 0 to 1 and more.
func (n Node) used() float64 {
	memory := 1 - float64(n.freeMB())/float64(max(1, n.MemoryMB))
	return max(float64(n.Active)/float64(max(1, n.MaxSandboxes)), memory)
}
