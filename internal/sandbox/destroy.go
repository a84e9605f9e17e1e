package sandbox

import (
	"context"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// cleanupTimeout bounds the removal of one sandbox. It takes tens of milliseconds; a machine that
// needs longer is overloaded, and Reconcile retries. A lower value fails removals under load; a
// higher one only delays the retry.
const cleanupTimeout = 60 * time.Second

// takedownsAtOnce limits how many sandboxes are removed at once. The host's kernel does that work
// on process tables, control groups and namespaces, mostly under locks of its own. More at once
// take as long and slow creates; fewer let many sandboxes that are destroyed together run on for
// longer.
const takedownsAtOnce = 4

// Destroy removes a sandbox and interrupts any operation on it. It returns when the removal is
// durable: from then on the sandbox shows as destroyed, cannot be used and counts against no quota,
// and its resources on the machine are removed in the background. It is safe to repeat. If
// something cannot be removed, the sandbox stays in state destroying and the removal is retried
// until it succeeds. A sandbox of a lost node is destroyed in the rows; its node removes the rest if it returns.
func (s *Service) Destroy(ctx context.Context, orgID string, id ID) error {
	sbx, err := s.Get(ctx, orgID, id)
	if err != nil || sbx.State.Over() {
		return err
	}
	if s.held(sbx) != nil {
		return s.destroyElsewhere(ctx, sbx)
	}
	claimed, done, left := make(chan struct{}), make(chan error), make(chan struct{})
	defer close(left)
	if !s.ops.spawn(func() {
		err := s.end(id, "", Requested, func() { close(claimed) })
		select {
		case done <- err:
		case <-left:
			if err != nil {
				s.log.Error("removing a sandbox", "sandbox", id, "error", err)
			}
		}
	}) {
		return errClosing
	}
	select {
	case <-claimed:
		return nil
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// destroy ends the sandbox if it is still in the given run ("" matches any) and returns when
// nothing of it is left. It continues when ctx ends, which only bounds the wait.
func (s *Service) destroy(ctx context.Context, id ID, run string, why Reason) error {
	done := make(chan error, 1)
	if !s.ops.spawn(func() { done <- s.end(id, run, why, func() {}) }) {
		return errClosing
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// end interrupts any operation on the sandbox and removes the sandbox. It calls claimed after the
// row says that the sandbox is being destroyed, unless an error comes first.
func (s *Service) end(id ID, run string, why Reason, claimed func()) error {
	for {
		op, mine := s.ops.begin(id, opDestroy)
		switch {
		case op == nil:
			return errClosing
		case mine:
			err := s.takeApart(op.ctx, id, run, why, func() { close(op.claimed); claimed() })
			s.ops.finish(id, op, nil, err)
			return err
		case op.kind == opDestroy:
			select {
			case <-op.claimed:
				claimed()
			case <-op.done:
			}
			<-op.done
			return op.err
		default:
			op.cancel(errInterrupted)
			<-op.done
		}
	}
}

// takeApart claims state destroying, calls claimed, clears the host and writes state destroyed.
func (s *Service) takeApart(ctx context.Context, id ID, run string, why Reason, claimed func()) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	sbx, err := s.store.Get(ctx, id)
	if err != nil {
		return err
	}
	if sbx.State.Over() || (run != "" && sbx.Run != run) {
		return nil
	}
	if sbx.State != Destroying {
		sbx, err = s.transition(ctx, Change{ID: id, From: []State{sbx.State}, Run: sbx.Run, To: Destroying,
			At: time.Now().UTC(), Reason: string(why), DestroyReason: &why})
		if err != nil {
			return fmt.Errorf("claiming %s to destroy it: %w", id, err)
		}
	}
	s.live.untrack(id)
	claimed()
	select {
	case s.takedowns <- struct{}{}:
		defer func() { <-s.takedowns }()
	case <-ctx.Done(): // Reconcile tries again
		return fmt.Errorf("waiting to remove %s: %w", id, ctx.Err())
	}
	if err := s.node.Destroy(ctx, id); err != nil {
		return fmt.Errorf("removing %s: %w", id, err)
	}
	now := time.Now().UTC()
	_, err = s.transition(ctx, Change{ID: id, From: []State{Destroying}, To: Destroyed, At: now,
		Reason: string(sbx.DestroyReason), DestroyedAt: &now})
	if fault.Is(err, fault.Conflict) {
		return nil
	}
	return err
}
