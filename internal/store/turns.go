package store

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/semaphore"
)

// turns lets only one call of each organization at a time wait for the database. Transactions that count an
// organization's rows run one after the other anyway. Without turns, those of an organization that makes many calls
// would go before all others in SQLite's only queue, or hold all connections to PostgreSQL while they wait for the
// organization's lock.
type turns struct {
	mu sync.Mutex
	// +checklocks:mu
	orgs map[string]*turn // of the organizations that have calls
}

type turn struct {
	free  *semaphore.Weighted // of 1; its waiters are served in order
	calls int                 // that have the turn or wait for it; guarded by turns.mu
}

// inTurn calls f when it is the organization's turn, or at once if org is "". f must begin its
// transactions itself: a call that has one must not wait for a turn.
func (t *turns) inTurn(ctx context.Context, org string, f func() error) error {
	if org == "" {
		return f()
	}
	mine := t.join(org)
	defer t.leave(org, mine)
	if err := mine.free.Acquire(ctx, 1); err != nil {
		return fmt.Errorf("waiting for the organization's turn: %w", err)
	}
	defer mine.free.Release(1)
	return f()
}

func (t *turns) join(org string) *turn {
	t.mu.Lock()
	defer t.mu.Unlock()
	mine := t.orgs[org]
	if mine == nil {
		mine = &turn{free: semaphore.NewWeighted(1)}
		if t.orgs == nil {
			t.orgs = map[string]*turn{}
		}
		t.orgs[org] = mine
	}
	mine.calls++
	return mine
}

func (t *turns) leave(org string, mine *turn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if mine.calls--; mine.calls == 0 {
		delete(t.orgs, org)
	}
}
