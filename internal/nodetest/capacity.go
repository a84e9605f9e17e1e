package nodetest

import (
	"context"

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

// Room implements sandbox.Node.
func (n *Fake) Room(context.Context, sandbox.Size) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.room(true)
}

// room returns an error if there is no room for another sandbox. Pooled sandboxes take no room from
// others unless pooled is set.
//
// +checklocks:n.mu
func (n *Fake) room(pooled bool) error {
	if n.full || n.most > 0 && n.count(pooled) >= n.most {
		return fault.New(fault.Unavailable, fault.CodeNoCapacity, "full").After(5e9)
	}
	return nil
}

// count returns the number of sandboxes that have an instance, or what is left of one.
//
// +checklocks:n.mu
func (n *Fake) count(pooled bool) int {
	count := 0
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
