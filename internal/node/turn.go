package node

import (
	"context"
	"fmt"
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

// turns are the turns to start. The organizations that wait for one are served round robin, and the
// starts of one organization in the order in which they came: one that asks for a hundred sandboxes
// at once makes its own wait, and another's for as many turns at the most as organizations wait. It
// is safe for concurrent use.
type turns struct {
	mu sync.Mutex
	// +checklocks:mu
	free int
	// +checklocks:mu
	ring []string // the organizations that wait, the next one first; guarded by mu
	// +checklocks:mu
	waiting map[string][]chan struct{} // of each of them, in order; never empty; guarded by mu
}

func newTurns(most int) *turns { return &turns{free: most, waiting: map[string][]chan struct{}{}} }

// take gives a turn, or a channel that is closed when there is one.
func (t *turns) take(org string) (given chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	given = make(chan struct{})
	if t.free > 0 {
		t.free--
		close(given)
		return given
	}
	if len(t.waiting[org]) == 0 {
		t.ring = append(t.ring, org)
	}
	t.waiting[org] = append(t.waiting[org], given)
	return given
}

// giveUp takes back a wish for a turn; one that was given meanwhile goes to the next.
func (t *turns) giveUp(org string, given chan struct{}) {
	t.mu.Lock()
	i := slices.Index(t.waiting[org], given)
	if i >= 0 {
		t.removeLocked(org, i)
		if len(t.waiting[org]) == 0 {
			t.ring = slices.DeleteFunc(t.ring, func(o string) bool { return o == org })
			delete(t.waiting, org)
		}
	}
	t.mu.Unlock()
	if i < 0 {
		t.over()
	}
}

// +checklocks:t.mu
func (t *turns) removeLocked(org string, i int) {
	t.waiting[org] = slices.Delete(t.waiting[org], i, i+1)
}

// over ends a turn and gives it to the next.
func (t *turns) over() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.ring) == 0 {
		t.free++
		return
	}
	org := t.ring[0]
	t.ring = slices.Delete(t.ring, 0, 1)
	given := t.waiting[org][0]
	t.removeLocked(org, 0)
	if len(t.waiting[org]) > 0 {
		t.ring = append(t.ring, org)
	} else {
		delete(t.waiting, org)
	}
	close(given)
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
