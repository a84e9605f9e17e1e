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

// Destroy removes a sandbox, whatever is being done to it. It is safe to repeat:
// one that is over already is success, and a second caller waits for the first.
// When something could not be removed the error says so, the sandbox stays
// destroying, and removal is tried again until it succeeds.
func (s *Service) Destroy(ctx context.Context, orgID string, id ID) error {
	if _, err := s.Get(ctx, orgID, id); err != nil {
		return err
	}
	return s.destroy(ctx, id, "", Requested)
}

// destroy ends the sandbox if it is still in the given life ("" is any). It goes on
// when ctx ends; ctx only bounds the wait.
func (s *Service) destroy(ctx context.Context, id ID, run string, why Reason) error {
	done := make(chan error, 1)
	go func() { done <- s.end(id, run, why) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// end interrupts what is being done to the sandbox and takes it apart.
func (s *Service) end(id ID, run string, why Reason) error {
	for {
		op, mine := s.begin(id, opDestroy)
		switch {
		case op == nil:
			return errClosing
		case mine:
			err := s.takeApart(op.ctx, id, run, why)
			s.finish(id, op, Sandbox{}, err)
			return err
		case op.kind == opDestroy:
			<-op.done
			return op.err
		default:
			op.cancel(errInterrupted)
			<-op.done
		}
	}
}

// takeApart claims destroying, clears the host and writes destroyed.
func (s *Service) takeApart(ctx context.Context, id ID, run string, why Reason) error {
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
