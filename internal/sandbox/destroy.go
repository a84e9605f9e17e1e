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
	for {
		if op := s.begin(id, opDestroy); op != nil {
			go func() {
				s.finish(id, op, Sandbox{}, s.takeApart(op.ctx, id, run, why))
			}()
			_, err := op.wait(ctx)
			return err
		}
		s.mu.Lock()
		op, closed := s.work[id], s.closed
		s.mu.Unlock()
		switch {
		case op == nil && closed:
			return errClosing
		case op == nil: // it ended in between
		case op.kind == opDestroy:
			_, err := op.wait(ctx)
			return err
		default:
			op.cancel(errInterrupted)
			select {
			case <-op.done:
			case <-ctx.Done():
				return ctx.Err()
			}
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
	s.disarm(id)
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

// arm sets the timer of an ephemeral sandbox's end, replacing an earlier one.
func (s *Service) arm(box Sandbox) {
	if box.Mode != Ephemeral || box.ExpiresAt.IsZero() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	if t := s.timers[box.ID]; t != nil {
		t.Stop()
	}
	s.timers[box.ID] = time.AfterFunc(time.Until(box.ExpiresAt), func() { s.expire(box.ID) })
}

func (s *Service) disarm(id ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := s.timers[id]; t != nil {
		t.Stop()
		delete(s.timers, id)
	}
}

// expire ends a sandbox whose time is over, unless it was given more meanwhile.
func (s *Service) expire(id ID) {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	box, err := s.store.Get(ctx, id)
	if err != nil {
		s.log.ErrorContext(ctx, "reading an expired sandbox", "sandbox", id, "error", err)
		return
	}
	if time.Now().Before(box.ExpiresAt) {
		s.arm(box)
		return
	}
	if err := s.destroy(ctx, id, box.Run, Expired); err != nil {
		s.log.ErrorContext(ctx, "destroying an expired sandbox", "sandbox", id, "error", err)
	}
}
