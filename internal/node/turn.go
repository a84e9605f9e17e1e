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
	// turnPatience limits the wait of a start for its turn. A later start fails and asks the caller to
	// retry, before the time for the whole create is over.
	turnPatience = 30 * time.Second
	// turnMost limits the length of a turn. A start that takes longer, some hundred times what it
	// takes on a quiet machine, waits for something other than a CPU, and must not delay all others.
	turnMost = 10 * time.Second
)

// turns gives out the turns to start. Of the waiting organizations, the one whose last turn is the
// longest ago is next, and the starts of one organization come in the order of their requests. So
// an organization that asks for a hundred sandboxes at once delays only its own, and one that asks
// for one now and then waits only for the starts under way. turns is safe for concurrent use.
type turns struct {
	mu sync.Mutex
	// +checklocks:mu
	free int
	// +checklocks:mu
	waiting []waitingOrg // in the order of arrival; each has at least one start
	// +checklocks:mu
	given uint64 // number of turns given so far
	// +checklocks:mu
	last map[string]uint64 // value of given at an organization's last turn; old ones are removed
}

// remembered is the number of latest turns that are remembered. An organization that had none of
// them counts as one that never had a turn.
const remembered = 1000

// waitingOrg holds an organization and the turns that it waits for, in order.
type waitingOrg struct {
	org    string
	starts []chan struct{}
}

func newTurns(most int) *turns { return &turns{free: most, last: map[string]uint64{}} }

// take returns a channel that is closed when the organization gets a turn.
func (t *turns) take(org string) (given chan struct{}) {
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
func (t *turns) findLocked(org string) int {
	return slices.IndexFunc(t.waiting, func(w waitingOrg) bool { return w.org == org })
}

// giveLocked gives the free turns to waiting organizations.
//
// +checklocks:t.mu
func (t *turns) giveLocked() {
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
func (t *turns) removeLocked(i, start int) {
	w := &t.waiting[i]
	if w.starts = slices.Delete(w.starts, start, start+1); len(w.starts) == 0 {
		t.waiting = slices.Delete(t.waiting, i, i+1)
	}
}

// giveUp withdraws a request for a turn. A turn that was given meanwhile goes to the next request.
func (t *turns) giveUp(org string, given chan struct{}) {
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

// over ends a turn and gives it to the next request.
func (t *turns) over() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.free++
	t.giveLocked()
}

// turn waits until the sandbox may start.
func (n *Node) turn(ctx context.Context, b *box, org string) error {
	late := time.NewTimer(turnPatience)
	defer late.Stop()
	given := n.turns.take(org)
	select {
	case <-given:
	case <-late.C:
		n.turns.giveUp(org, given)
		return fault.New(fault.Unavailable, codeNoCapacity, "this machine has more sandboxes to start than it can within %s",
			turnPatience).After(retryRoom)
	case <-ctx.Done():
		n.turns.giveUp(org, given)
		return fmt.Errorf("waiting for its turn to start: %w", ctx.Err())
	}
	over := sync.OnceFunc(n.turns.over)
	timer := time.AfterFunc(turnMost, over)
	b.over = func() { timer.Stop(); over() }
	return nil
}

// turnOver ends the sandbox's turn to start, if it has one.
func (b *box) turnOver() {
	if b.over != nil {
		b.over()
	}
}
