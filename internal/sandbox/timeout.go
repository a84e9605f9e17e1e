package sandbox

import (
	"context"
	"errors"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// Keepalive gives an ephemeral sandbox a new lifetime from now. A nil lifetime means the sandbox's
// own; one above [MaxTimeout] is cut to it. Keepalive returns Conflict if the sandbox is not
// ephemeral or not running.
func (s *Service) Keepalive(ctx context.Context, orgID string, id ID, timeout *time.Duration) (Sandbox, error) {
	sbx, err := s.getHeld(ctx, orgID, id)
	if err != nil {
		return Sandbox{}, err
	}
	lifetime := sbx.Timeout
	if timeout != nil {
		if *timeout < MinTimeout {
			return Sandbox{}, invalid("timeout", "must be at least %s", MinTimeout)
		}
		lifetime = min(*timeout, MaxTimeout)
	}
	if sbx.Mode != Ephemeral {
		return Sandbox{}, notEphemeral(sbx)
	}
	return s.moveEnd(ctx, id, func() (Sandbox, error) {
		return s.store.SetExpiry(ctx, id, time.Now().UTC().Add(lifetime), lifetime, false)
	})
}

// SetTimeout moves the end of a running ephemeral sandbox to timeout from now, which may be later
// or earlier than its present end. A timeout of 0 or less ends the sandbox at once, as [AtEnd]
// says. With later set it moves the end only to a later time. A timeout above [MaxTimeout] is
// Invalid; conflicts are those of [Service.Keepalive].
func (s *Service) SetTimeout(ctx context.Context, orgID string, id ID, timeout time.Duration,
	later bool) (Sandbox, error) {
	if timeout > MaxTimeout {
		return Sandbox{}, invalid("timeout", "must be at most %s", MaxTimeout)
	}
	sbx, err := s.getHeld(ctx, orgID, id)
	if err != nil {
		return Sandbox{}, err
	}
	if sbx.Mode != Ephemeral {
		return Sandbox{}, notEphemeral(sbx)
	}
	own := timeout
	if timeout < MinTimeout {
		own = sbx.Timeout // a wake needs a timeout of at least MinTimeout
	}
	return s.moveEnd(ctx, id, func() (Sandbox, error) {
		return s.store.SetExpiry(ctx, id, time.Now().UTC().Add(max(timeout, 0)), own, later)
	})
}

func notEphemeral(sbx Sandbox) error {
	return fault.New(fault.Conflict, fault.CodeSandboxNotEphemeral,
		"sandbox %s is %s and has no timeout to extend", sbx.ID, sbx.Mode)
}

// SetFrontData replaces the data that a front stores with a sandbox that it created.
func (s *Service) SetFrontData(ctx context.Context, orgID string, id ID, data string) (Sandbox, error) {
	if _, err := s.getHeld(ctx, orgID, id); err != nil {
		return Sandbox{}, err
	}
	return s.store.SetFrontData(ctx, id, data)
}

// suspendExpired suspends a sandbox whose timeout is over, even while it is in use. If that fails,
// the sandbox keeps running and suspendExpired is retried later.
func (s *Service) suspendExpired(expired Sandbox) {
	op, _ := s.ops.run(expired.ID, opSuspend, func(ctx context.Context) (any, error) {
		return act(ctx, s, expired.ID, rules[opSuspend], func(ctx context.Context, sbx Sandbox) (Sandbox, error) {
			return s.suspend(ctx, sbx, expired.AtEnd.keeps(), string(Expired), s.detachExpired(expired.Run)) // logs its errors
		})
	})
	if op == nil {
		return
	}
	// The sandbox may still be in use: it was given more time, another operation on it was under way,
	// or its row could not be read.
	s.live.resetEnd(expired.ID, expired.Run, func(l *instance) time.Time {
		again := time.Now().Add(time.Second) // no sooner, whatever the cause
		if again.Before(l.after) {
			return l.after
		}
		return again
	})
}

// errNotExpired reports that a sandbox was given more time after its timeout was over.
var errNotExpired = errors.New("not expired any more")

// detachExpired ends the use of a sandbox if its row still says that its timeout is over.
func (s *Service) detachExpired(run string) detachFunc {
	return func(ctx context.Context, id ID) (*instance, error) {
		sbx, err := s.store.Get(ctx, id)
		if err != nil {
			return nil, err
		}
		if sbx.Run != run || time.Now().Before(sbx.ExpiresAt) {
			return nil, errNotExpired
		}
		return s.live.detachNow(ctx, id)
	}
}

// moveEnd moves the end of an ephemeral sandbox with write, which changes its row, and then moves its
// timer and its description to the end that the row has.
func (s *Service) moveEnd(ctx context.Context, id ID, write func() (Sandbox, error)) (Sandbox, error) {
	_, seen, _ := s.live.about(id)
	moved, err := write()
	if err != nil {
		s.live.forget(id) // the row may have changed
		return Sandbox{}, err
	}
	// A row may be ahead of the operation that makes its sandbox usable, with the end that the row had
	// before: wait for that operation.
	if op := s.ops.on(id); op != nil && (op.kind.foreground() || op.kind == opSettle) && !s.live.tracked(moved) {
		if err := op.ended(ctx); err != nil {
			return Sandbox{}, err
		}
	}
	for row := moved; !s.live.moveEnd(row, seen); {
		_, seen, _ = s.live.about(id)
		if row, err = s.store.Get(ctx, id); err != nil {
			s.live.forget(id)
			s.live.resetEnd(id, moved.Run, func(*instance) time.Time { return time.Now() }) // expire reads the row
			return Sandbox{}, err
		}
	}
	return moved, nil
}

// expire ends a sandbox whose timeout is over, unless it was extended meanwhile.
func (s *Service) expire(id ID) {
	ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	_, seen, _ := s.live.about(id)
	sbx, err := s.store.Get(ctx, id)
	if err == nil && time.Now().Before(sbx.ExpiresAt) {
		s.live.moveEnd(sbx, seen) // if it returns false, the timer is set to another end
		return
	}
	switch {
	case err != nil:
	case sbx.AtEnd.Suspends():
		s.suspendExpired(sbx)
		return
	default:
		err = s.destroy(ctx, id, sbx.Run, Expired)
	}
	if err == nil {
		return
	}
	s.log.ErrorContext(ctx, "destroying an expired sandbox", "sandbox", id, "error", err)
	again := retryAfter
	if f := fault.As(err); f != nil && f.RetryAfter > 0 {
		again = f.RetryAfter // the store is away for a while
	}
	// Once the destroy is claimed Reconcile retries it; before that only this timer does.
	s.live.resetEnd(id, "", func(*instance) time.Time { return time.Now().Add(again) })
}
