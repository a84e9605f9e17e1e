package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// retryRoom is the time after which a caller that found no room should try again. Sandboxes end all
// the time, so it is short; a retry at once would find the machine as full.
const retryRoom = 5 * time.Second

// Reserve implements sandbox.Node. No other sandbox is admitted between the look for room and the reservation.
func (n *Node) Reserve(_ context.Context, id sandbox.ID, size sandbox.Size) (release func(), err error) {
	n.admitting.Lock()
	defer n.admitting.Unlock()
	if err := n.room(size); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.reserved[id] != 0 {
		return nil, fmt.Errorf("room for sandbox %s is reserved already", id)
	}
	n.reservations++
	number := n.reservations
	n.reserved[id] = number
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.reserved[id] == number { // else it was taken over, and a later one may hold
			delete(n.reserved, id)
		}
	}, nil
}

// FindImage implements sandbox.Node.
func (n *Node) FindImage(ctx context.Context, image string) error { return n.images.Find(ctx, image) }

// room returns an error if the machine cannot take one more sandbox of the size now.
//
// +checklocks:n.admitting
func (n *Node) room(size sandbox.Size) error {
	n.mu.Lock()
	err := n.roomLocked(true)
	n.mu.Unlock()
	if err != nil {
		return err
	}
	if err := n.memoryRoom(size); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(n.cfg.Dir, &st); err != nil {
		return fmt.Errorf("looking at the free space below %s: %w", n.cfg.Dir, err)
	}
	if int64(st.Bavail)*st.Bsize < n.cfg.MinDisk {
		return fault.New(fault.Unavailable, fault.CodeNoCapacity, "this machine's disk is full").After(retryRoom)
	}
	return nil
}

// admit registers an instance as one that is being made: in the place of its reservation, or if the machine has room
// for it. No other is admitted between the look at the memory and the registration.
func (n *Node) admit(b *instance) error {
	n.admitting.Lock()
	defer n.admitting.Unlock()
	id := b.record.ID
	n.mu.Lock()
	reserved := n.reserved[id]
	n.mu.Unlock()
	if reserved == 0 {
		if err := n.memoryRoom(b.record.Shape.Size); err != nil {
			return err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.instances[id] != nil {
		return fmt.Errorf("sandbox %s is on this machine already", id)
	}
	if reserved == 0 {
		if err := n.roomLocked(b.record.Warm != ""); err != nil {
			return err
		}
	}
	delete(n.reserved, id)
	n.instances[id] = b
	n.booting++
	return nil
}

// memoryRoom returns an error if the machine has no memory for another sandbox beside those that are being
// made or have a reservation. A new sandbox takes about 20 MB and grows to its size only if it uses that much, so
// this checks that it can start without harm to the machine.
func (n *Node) memoryRoom(size sandbox.Size) error {
	n.mu.Lock()
	// Counted before the look at the memory: one that ends now has taken what it takes.
	coming := n.booting + len(n.reserved)
	n.mu.Unlock()
	free, err := n.freeMemory()
	if err != nil {
		return err
	}
	if free < n.cfg.MinHostMemory+bootMemory+int64(coming)*madeMemory {
		return fault.New(fault.Unavailable, fault.CodeNoCapacity, "this machine has no memory for a sandbox of size %s",
			size.Name).After(retryRoom)
	}
	return nil
}

// roomLocked returns an error if the machine has as many sandboxes as it may have. Pooled sandboxes
// count only if pooled is set.
//
// +checklocks:n.mu
func (n *Node) roomLocked(pooled bool) error {
	count := len(n.reserved)
	for _, b := range n.instances {
		if pooled || b.record.Warm == "" {
			count++
		}
	}
	if count < n.cfg.MaxSandboxes {
		return nil
	}
	return fault.New(fault.Unavailable, fault.CodeNoCapacity, "this machine has its %d sandboxes",
		n.cfg.MaxSandboxes).After(retryRoom)
}

// Spare implements sandbox.Node.
func (n *Node) Spare(context.Context) (int, error) {
	free, err := n.freeMemory()
	if err != nil {
		return 0, errors.Join(errors.New("looking how many sandboxes the machine could take"), err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	byNumber := n.cfg.MaxSandboxes - len(n.instances) - len(n.reserved)
	return max(0, min(byNumber, int((free-n.cfg.MinHostMemory)/bootMemory))), nil
}

// Load describes the machine for others that have sandboxes to place.
type Load struct {
	MemoryFree int64 // bytes beyond Config.MinHostMemory, at least 0
	Sandboxes  int   // with those that have a reservation only, and without pooled ones
	Starting   int   // with a reservation or being made, pooled ones too
}

// Load returns what the machine has now.
func (n *Node) Load() (Load, error) {
	free, err := n.freeMemory()
	if err != nil {
		return Load{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	l := Load{MemoryFree: max(0, free-n.cfg.MinHostMemory), Sandboxes: len(n.reserved),
		Starting: n.booting + len(n.reserved)}
	for _, b := range n.instances {
		if b.record.Warm == "" {
			l.Sandboxes++
		}
	}
	return l, nil
}
