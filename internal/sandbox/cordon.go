package sandbox

import (
	"context"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// drainAtOnce limits how many sandboxes a drain suspends at a time. Each writes its memory to the disk, which is busy
	// with one; more at once end each of them later, and fewer leave CPUs idle.
	drainAtOnce = 4
	// drainEvery is the interval between two looks of a drain for persistent sandboxes that it could not suspend, since
	// they were in use. A longer one leaves a sandbox running for longer after its use; a shorter one reads rows
	// needlessly.
	drainEvery = 5 * time.Second
	// retryCordoned is the time after which a caller that a cordoned machine refused should try again. An operator ends a
	// cordon after minutes; a shorter time makes callers ask in vain.
	retryCordoned = 30 * time.Second
)

// errCordoned refuses another sandbox on a machine that its operator empties.
var errCordoned = fault.New(fault.Unavailable, fault.CodeNoCapacity, "this machine is cordoned").After(retryCordoned)

// cordon holds what the operator has decided about new sandboxes on this machine.
type cordon struct {
	on      atomic.Bool
	changed chan struct{} // has room for one: drain has changed

	mu sync.Mutex
	// +checklocks:mu
	drain time.Time // persistent sandboxes are suspended until then; zero means never
}

// left returns the time for which persistent sandboxes are still suspended, 0 if they are not.
func (c *cordon) left() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.drain.IsZero() {
		return 0
	}
	return max(0, time.Until(c.drain))
}

// SetCordon decides whether this machine takes more sandboxes. While on is true, creates, forks and wakes are refused:
// Unavailable, code "no_capacity". Sandboxes that are on the machine run on, and those that are being made when
// SetCordon is called are made; the warm pool gives its sandboxes back. If drain is positive, [Service.Run] also
// suspends the persistent sandboxes for that time, with their complete state, each when no call uses it. SetCordon
// replaces what earlier calls have decided.
func (s *Service) SetCordon(on bool, drain time.Duration) {
	c := s.pool.cordon
	c.on.Store(on)
	c.mu.Lock()
	c.drain = time.Time{}
	if on && drain > 0 {
		c.drain = time.Now().Add(drain)
	}
	c.mu.Unlock()
	select {
	case c.changed <- struct{}{}:
	default:
	}
	s.pool.nudge()
}

// draining suspends persistent sandboxes while the machine is drained, until ctx ends.
func (s *Service) draining(ctx context.Context) {
	failed := &failures{at: map[ID]time.Time{}}
	for ctx.Err() == nil {
		var again <-chan time.Time
		if left := s.pool.cordon.left(); left > 0 {
			s.drain(ctx, failed)
			again = time.After(min(drainEvery, left))
		}
		select {
		case <-ctx.Done():
		case <-s.pool.cordon.changed:
		case <-again:
		}
	}
}

// failures remembers which sandboxes could not be suspended lately.
type failures struct {
	mu sync.Mutex
	// +checklocks:mu
	at map[ID]time.Time
}

// add remembers a sandbox.
func (f *failures) add(id ID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.at[id] = time.Now()
}

// recent returns whether a sandbox could not be suspended within the last retryAfter, and forgets older failures.
func (f *failures) recent(id ID) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	maps.DeleteFunc(f.at, func(_ ID, at time.Time) bool { return time.Since(at) >= retryAfter })
	_, ok := f.at[id]
	return ok
}

// drain suspends the persistent sandboxes that run now. It leaves out those that calls use for longer than a suspend
// waits, and those that have failed lately, since each try may pause the sandbox. It stops when the drain is over.
func (s *Service) drain(ctx context.Context, failed *failures) {
	all, err := s.store.Unfinished(ctx)
	if err != nil {
		if ctx.Err() == nil {
			s.log.ErrorContext(ctx, "looking for sandboxes to suspend", "error", err)
		}
		return
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, drainAtOnce)
	for _, sbx := range all {
		if sbx.Mode != Persistent || sbx.State != Running || failed.recent(sbx.ID) {
			continue
		}
		slots <- struct{}{}
		if ctx.Err() != nil || s.pool.cordon.left() == 0 {
			return
		}
		wg.Go(func() {
			defer func() { <-slots }()
			_, err := s.Suspend(ctx, sbx.OrgID, sbx.ID, KeepAll)
			if err != nil && ctx.Err() == nil && !fault.Is(err, fault.Conflict) { // in use, or it has ended
				failed.add(sbx.ID)
				s.log.WarnContext(ctx, "suspending a sandbox to drain the machine", "sandbox", sbx.ID, "error", err)
			}
		})
	}
}
