package sandbox

import (
	"context"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// cleanupTimeout bounds taking one sandbox apart. It takes tens of milliseconds;
// a machine that needs longer is overloaded, and the reconciler comes back.
const cleanupTimeout = 60 * time.Second

// takedownsAtOnce is how many sandboxes are taken apart at once. It is the host's
// kernel that works then, on process tables, control groups and namespaces, mostly
// under locks of its own: more at once take as long and slow creates, fewer let
// a crowd that is destroyed together run on for longer.
const takedownsAtOnce = 4

// Destroy removes a sandbox, whatever is being done to it. It returns when that is
// durable: from then on the sandbox shows as destroyed, cannot be used and counts
// against no quota, and what it has on the machine goes in the background. It is
// safe to repeat. When something could not be removed the sandbox stays
// destroying, and removal is tried again until it succeeds.
func (s *Service) Destroy(ctx context.Context, orgID string, id ID) error {
	box, err := s.Get(ctx, orgID, id)
	if err != nil || box.State.Over() {
		return err
	}
	claimed, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- s.end(id, "", Requested, func() { close(claimed) }) }()
	select {
	case <-claimed:
	case err := <-done:
		return err
	case <-ctx.Done():
		err = ctx.Err()
	}
	go func() { // nobody is told any more
		if err := <-done; err != nil {
			s.log.Error("taking a sandbox apart", "sandbox", id, "error", err)
		}
	}()
	return err
}

// destroy ends the sandbox if it is still in the given life ("" is any), and returns
// when nothing of it is left. It goes on when ctx ends; ctx only bounds the wait.
func (s *Service) destroy(ctx context.Context, id ID, run string, why Reason) error {
	done := make(chan error, 1)
	go func() { done <- s.end(id, run, why, func() {}) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// end interrupts what is being done to the sandbox and takes it apart. It calls claimed
// once the row says that it is being destroyed, unless an error comes first.
func (s *Service) end(id ID, run string, why Reason, claimed func()) error {
	for {
		op, mine := s.begin(id, opDestroy)
		switch {
		case op == nil:
			return errClosing
		case mine:
			err := s.takeApart(op.ctx, id, run, why, func() { close(op.claimed); claimed() })
			s.finish(id, op, Sandbox{}, err)
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

// takeApart claims destroying and calls claimed, clears the host and writes destroyed.
func (s *Service) takeApart(ctx context.Context, id ID, run string, why Reason, claimed func()) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	box, err := s.store.Get(ctx, id)
	if err != nil {
		return err
	}
	if box.State.Over() || (run != "" && box.Run != run) {
		return nil
	}
	if box.State != Destroying {
		box, err = s.transition(ctx, Change{ID: id, From: []State{box.State}, Run: box.Run, To: Destroying,
			At: time.Now().UTC(), Reason: string(why), DestroyReason: &why})
		if err != nil {
			return fmt.Errorf("claiming %s to destroy it: %w", id, err)
		}
	}
	s.untrack(id)
	claimed()
	select {
	case s.takedowns <- struct{}{}:
		defer func() { <-s.takedowns }()
	case <-ctx.Done(): // reconcile comes back for it
		return fmt.Errorf("waiting to take %s apart: %w", id, ctx.Err())
	}
	if err := s.node.Destroy(ctx, id); err != nil {
		return fmt.Errorf("taking %s apart: %w", id, err)
	}
	now := time.Now().UTC()
	_, err = s.transition(ctx, Change{ID: id, From: []State{Destroying}, To: Destroyed, At: now,
		Reason: string(box.DestroyReason), DestroyedAt: &now})
	if fault.Is(err, fault.Conflict) {
		return nil
	}
	return err
}

// extend moves the end of an ephemeral sandbox's life to where its row has it.
func (s *Service) extend(box Sandbox) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.lives[box.ID]; l != nil && l.run == box.Run && l.end != nil && !s.closed {
		l.end.Reset(time.Until(box.ExpiresAt))
	}
}

// expire ends a sandbox whose time is over, unless it was given more meanwhile.
func (s *Service) expire(id ID) {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	box, err := s.store.Get(ctx, id)
	if err == nil && time.Now().Before(box.ExpiresAt) {
		s.extend(box)
		return
	}
	switch {
	case err != nil:
	case box.AtEnd == EndSuspends:
		s.suspendExpired(box)
		return
	default:
		err = s.destroy(ctx, id, box.Run, Expired)
	}
	if err == nil {
		return
	}
	s.log.ErrorContext(ctx, "destroying an expired sandbox", "sandbox", id, "error", err)
	s.mu.Lock()
	defer s.mu.Unlock()
	// Once it is claimed reconcile has it; before that nobody but this timer.
	if l := s.lives[id]; l != nil && !s.closed {
		l.end.Reset(retryAfter)
	}
}
