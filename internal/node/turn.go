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

// startsPerCPU is how many sandboxes start at once for each processor. A start keeps more
// than one busy for its whole time, so more at once make none of them earlier, and keep
// everything else on the machine, the server's other answers included, from its turn: of
// 50 clients on 2 processors 7.5 a second were served with 1, 6.9 with 2 and 5.7 with 10, and
// a lookup beside them took 54, 142 and 815 ms at its 99th percentile.
const startsPerCPU = 1

const (
	// turnPatience is how long a start waits for its turn. Who comes so late is told to
	// come again, before the time for the whole create is over.
	turnPatience = 30 * time.Second
	// turnMost is how long a turn lasts at the most. A start that takes longer, some
	// hundred times what it takes on a quiet machine, waits for something else than a
	// processor, and must not keep all others waiting.
	turnMost = 10 * time.Second
)

// turns are the turns to start. Of the organizations that wait, the one whose last turn is the longest ago is next, and the
// starts of one organization come in the order in which they were asked for. So an organization that asks for a hundred
// sandboxes at once makes its own wait, and one that asks for one now and then waits for the starts under way alone. It is
// safe for concurrent use.
type turns struct {
	mu sync.Mutex
	// +checklocks:mu
	free int
	// +checklocks:mu
	waiting []waitingOrg // in the order in which they came, without those that wait for nothing
	// +checklocks:mu
	given uint64 // turns, ever
	// +checklocks:mu
	last map[string]uint64 // what given was at an organization's last turn; without those of long ago
}

// remembered is how many turns are remembered. An organization that had none of them counts as one that never had a turn.
const remembered = 1000

// waitingOrg is an organization with the turns that it waits for, in order.
type waitingOrg struct {
	org    string
	starts []chan struct{}
}

func newTurns(most int) *turns { return &turns{free: most, last: map[string]uint64{}} }

// take returns a channel that is closed when the organization has a turn.
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

// giveLocked gives the turns that are free to those that wait.
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

// giveUp takes back a request for a turn; one that was given meanwhile goes to the next.
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

// over ends a turn and gives it to the next.
func (t *turns) over() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.free++
	t.giveLocked()
}

// turn waits until this one may start.
func (n *Node) turn(ctx context.Context, b *box, org string) error {
	late := time.NewTimer(turnPatience)
	defer late.Stop()
	given := n.turns.take(org)
	select {
	case <-given:
	case <-late.C:
		n.turns.giveUp(org, given)
		return fault.New(fault.Unavailable, codeNoCapacity, "this machine has more sandboxes to start than it can within %s", turnPatience).After(retryRoom)
	case <-ctx.Done():
		n.turns.giveUp(org, given)
		return fmt.Errorf("waiting for its turn to start: %w", ctx.Err())
	}
	over := sync.OnceFunc(n.turns.over)
	timer := time.AfterFunc(turnMost, over)
	b.over = func() { timer.Stop(); over() }
	return nil
}

// turnOver ends the sandbox's turn to start, if it has it.
func (b *box) turnOver() {
	if b.over != nil {
		b.over()
	}
}
