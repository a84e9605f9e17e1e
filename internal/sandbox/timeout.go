package sandbox

import (
	"context"
	"errors"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// SetTimeout gives an ephemeral sandbox that runs so long to live from now, longer or
// shorter than it has; 0 or less ends it at once, as [AtEnd] says. With later set it only
// ever moves the end away. Invalid above [MaxTimeout]; conflicts are as
// [Service.Keepalive]'s.
func (s *Service) SetTimeout(ctx context.Context, orgID string, id ID, timeout time.Duration, later bool) (Sandbox, error) {
	if timeout > MaxTimeout {
		return Sandbox{}, invalid("timeout", "must be at most %s", MaxTimeout)
	}
	box, err := s.Get(ctx, orgID, id)
	if err != nil {
		return Sandbox{}, err
	}
	if box.Mode != Ephemeral {
		return Sandbox{}, notEphemeral(box)
	}
	own := timeout
	if timeout < MinTimeout {
		own = box.Timeout // what it has when it is woken must be a life
	}
	box, err = s.store.SetExpiry(ctx, id, time.Now().UTC().Add(max(timeout, 0)), own, later)
	if err != nil {
		return Sandbox{}, err
	}
	s.extend(box)
	return box, nil
}

func notEphemeral(box Sandbox) error {
	return fault.New(fault.Conflict, "sandbox_not_ephemeral", "sandbox %s is %s and has no timeout to extend", box.ID, box.Mode)
}

// SetSurface replaces what the surface that a sandbox was made through keeps with it.
func (s *Service) SetSurface(ctx context.Context, orgID string, id ID, surface string) (Sandbox, error) {
	if _, err := s.Get(ctx, orgID, id); err != nil {
		return Sandbox{}, err
	}
	return s.store.SetSurface(ctx, id, surface)
}

// suspendExpired suspends a sandbox whose time is over, whoever uses it. When that fails
// it runs on, and is tried again after a while.
func (s *Service) suspendExpired(expired Sandbox) {
	op, mine := s.begin(expired.ID, opSuspend)
	if op == nil {
		return
	}
	if mine {
		// What goes wrong is logged by suspend.
		box, err := s.suspend(op.ctx, expired.ID, string(Expired), s.partExpired(expired.Run))
		s.finish(expired.ID, op, box, err)
	} else {
		<-op.done
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// It is still in use: it was given more time, somebody else worked on it, or its row
	// could not be read.
	if l := s.lives[expired.ID]; l != nil && l.run == expired.Run && !s.closed {
		again := time.Now().Add(time.Second) // no sooner, whatever hinders
		if again.Before(l.after) {
			again = l.after
		}
		l.end.Reset(time.Until(again))
	}
}

// errNotExpired says that a sandbox whose time was over was given more meanwhile.
var errNotExpired = errors.New("not expired any more")

// partExpired ends the use of a sandbox if its row still says that its time is over.
func (s *Service) partExpired(run string) parting {
	return func(ctx context.Context, id ID) (*life, error) {
		box, err := s.store.Get(ctx, id)
		if err != nil {
			return nil, err
		}
		if box.Run != run || time.Now().Before(box.ExpiresAt) {
			return nil, errNotExpired
		}
		return s.partNow(ctx, id)
	}
}
