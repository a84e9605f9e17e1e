package node

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// startsPerCPU is the number of sandboxes that start at once for each CPU. A start keeps more than
// one CPU busy for its whole time, so more at once make none of them earlier and delay everything
// else on the machine, the server's other answers included: of 50 clients on 2 CPUs 7.5 a second
// were served with 1, 6.9 with 2 and 5.7 with 10, and a lookup beside them took 54, 142 and 815 ms
// at its 99th percentile.
const startsPerCPU = 1

const (
	// startSlotPatience limits the wait of a start for its slot. A later start fails and asks the caller to
	// retry, before the time for the whole create is over.
	startSlotPatience = 30 * time.Second
	// startSlotMost limits how long a start holds its slot. A start that takes longer, some hundred times what it
	// takes on a quiet machine, waits for something other than a CPU, and must not delay all others.
	startSlotMost = 10 * time.Second
)

// startSlots gives out the slots for starts. Of the waiting organizations, the one whose last slot is the
// longest ago is next, and the starts of one organization come in the order of their requests. So
// an organization that asks for a hundred sandboxes at once delays only its own, and one that asks
// for one now and then waits only for the starts under way. startSlots is safe for concurrent use.
type startSlots struct {
	mu sync.Mutex
	// +checklocks:mu
	free int
	// +checklocks:mu
	waiting []waitingOrg // in the order of arrival; each has at least one start
	// +checklocks:mu
	given uint64 // number of slots given so far
	// +checklocks:mu
	last map[string]uint64 // value of given at an organization's last slot; old ones are removed
}

// remembered limits the number of latest slots that are remembered. An organization that had none of
// them counts as one that never had a slot.
const remembered = 1000

// waitingOrg holds an organization and the slots that it waits for, in order.
type waitingOrg struct {
	org    string
	starts []chan struct{}
}

func newStartSlots(most int) *startSlots { return &startSlots{free: most, last: map[string]uint64{}} }

// take returns a channel that is closed when the organization gets a slot.
func (t *startSlots) take(org string) (given chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	given = make(chan struct{})
	if i := t.findLocked(org); i >= 0 {
		t.waiting[i].starts = append(t.waiting[i].starts, given)
	} else {
		t.waiting = append(t.waiting, waitingOrg{org, []chan struct{}{given}})
	}
	t.giveLocked()
	return given
}

// +checklocks:t.mu
func (t *startSlots) findLocked(org string) int {
	return slices.IndexFunc(t.waiting, func(w waitingOrg) bool { return w.org == org })
}

// giveLocked gives the free slots to waiting organizations.
//
// +checklocks:t.mu
func (t *startSlots) giveLocked() {
	for t.free > 0 && len(t.waiting) > 0 {
		first := 0
		for i, w := range t.waiting {
			if t.last[w.org] < t.last[t.waiting[first].org] {
				first = i
			}
		}
		t.free--
		t.given++
		t.last[t.waiting[first].org] = t.given
		if len(t.last) > remembered {
			now := t.given
			maps.DeleteFunc(t.last, func(_ string, at uint64) bool { return at+remembered <= now })
		}
		close(t.waiting[first].starts[0])
		t.removeLocked(first, 0)
	}
}

// +checklocks:t.mu
func (t *startSlots) removeLocked(i, start int) {
	w := &t.waiting[i]
	if w.starts = slices.Delete(w.starts, start, start+1); len(w.starts) == 0 {
		t.waiting = slices.Delete(t.waiting, i, i+1)
	}
}

// giveUp withdraws a request for a slot. A slot that was given meanwhile goes to the next request.
func (t *startSlots) giveUp(org string, given chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if i := t.findLocked(org); i >= 0 {
		if start := slices.Index(t.waiting[i].starts, given); start >= 0 {
			t.removeLocked(i, start)
			return
		}
	}
	t.free++
	t.giveLocked()
}

// over frees a slot and gives it to the next request.
func (t *startSlots) over() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.free++
	t.giveLocked()
}

// awaitStartSlot waits until the sandbox may start.
func (n *Node) awaitStartSlot(ctx context.Context, b *instance, org string) error {
	late := time.NewTimer(startSlotPatience)
	defer late.Stop()
	given := n.startSlots.take(org)
	select {
	case <-given:
	case <-late.C:
		n.startSlots.giveUp(org, given)
		return fault.New(fault.Unavailable, fault.CodeNoCapacity,
			"this machine has more sandboxes to start than it can within %s",
			startSlotPatience).After(retryRoom)
	case <-ctx.Done():
		n.startSlots.giveUp(org, given)
		return fmt.Errorf("waiting for its start slot: %w", ctx.Err())
	}
	over := sync.OnceFunc(n.startSlots.over)
	timer := time.AfterFunc(startSlotMost, over)
	b.over = func() { timer.Stop(); over() }
	return nil
}

// releaseStartSlot frees the sandbox's start slot, if it has one.
func (b *instance) releaseStartSlot() {
	if b.over != nil {
		b.over()
	}
}
