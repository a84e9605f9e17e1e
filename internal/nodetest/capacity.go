package nodetest

import (
	"context"
	"errors"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// unlimited is the number that Spare returns while there is no limit.
const unlimited = 1000

// SetFull sets whether the machine has no room for another sandbox.
func (n *Fake) SetFull(full bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.full = full
}

// SetMost sets the number of sandboxes that the machine may have at once; 0 is any number.
func (n *Fake) SetMost(most int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.most = most
}

// SetDiskFull sets whether the disk has no room for a checkpoint.
func (n *Fake) SetDiskFull(full bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.diskFull = full
}

// Reserve implements sandbox.Node.
func (n *Fake) Reserve(_ context.Context, id sandbox.ID, _ sandbox.Size) (release func(), err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.reserved[id] != nil {
		return nil, errors.New("reserved twice")
	}
	if err := n.room(true); err != nil {
		return nil, err
	}
	r := &reservation{id: id}
	n.reserved[id] = r
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.reserved[id] == r {
			delete(n.reserved, id)
		}
	}, nil
}

// FindImage implements sandbox.Node.
func (n *Fake) FindImage(ctx context.Context, image string) error {
	if n.OnFindImage == nil {
		return nil
	}
	return n.OnFindImage(ctx, image)
}

// reservation holds the room for one sandbox.
type reservation struct{ id sandbox.ID }

// Reserved returns the number of reservations that no sandbox has taken over.
func (n *Fake) Reserved() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.reserved)
}

// admit returns an error if there is no room for a sandbox that has no reservation. Pooled sandboxes take no room from
// others unless pooled is set.
//
// +checklocks:n.mu
func (n *Fake) admit(id sandbox.ID, pooled bool) error {
	if n.reserved[id] != nil {
		return nil
	}
	return n.room(pooled)
}

// room returns an error if there is no room for another sandbox, as for admit.
//
// +checklocks:n.mu
func (n *Fake) room(pooled bool) error {
	if n.full || n.most > 0 && n.count(pooled) >= n.most {
		return fault.New(fault.Unavailable, fault.CodeNoCapacity, "full").After(5e9)
	}
	return nil
}

// count returns the number of reservations, and of sandboxes that have an instance, or what is left of one.
//
// +checklocks:n.mu
func (n *Fake) count(pooled bool) int {
	count := len(n.reserved)
	for _, h := range n.sandboxes {
		if (h.Alive || h.Remains) && (pooled || !h.Warm) {
			count++
		}
	}
	return count
}

// Spare implements sandbox.Node.
func (n *Fake) Spare(context.Context) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.full:
		return 0, nil
	case n.most > 0:
		return max(0, n.most-n.count(true)), nil
	}
	return unlimited, nil
}
