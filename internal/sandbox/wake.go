package sandbox

import (
	"context"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/trace"
)

// pointTimeout bounds writing or reading one recovery point. The largest size has 16 GiB, which
// takes a disk of 30 MB/s nine minutes. A lower value fails large sandboxes on slow disks; a higher
// one delays the report of a broken machine.
const pointTimeout = 10 * time.Minute

// Wake returns a sandbox of either mode running, and wakes it if it is suspended. It waits for a
// suspend under way before it wakes the sandbox. Concurrent callers share one wake, which continues
// when ctx ends. Wake returns a Conflict, code "sandbox_not_running", for a sandbox that is being
// created, being destroyed or destroyed. It returns Exhausted, code "quota_exceeded", or
// Unavailable, code "no_capacity", when there is no room for the sandbox now. A sandbox whose
// recovery point cannot be restored stays suspended, with the cause in its Error, and keeps the
// point.
func (s *Service) Wake(ctx context.Context, c Caller, id ID) (Sandbox, error) {
	return s.WakeFor(ctx, c, id, 0)
}

// WakeFor is like Wake, but gives an ephemeral sandbox the timeout when it wakes; 0 means the
// timeout that it had last. It does not change the timeout of a running sandbox.
func (s *Service) WakeFor(ctx context.Context, c Caller, id ID, timeout time.Duration) (Sandbox, error) {
	box, _, err := s.running(ctx, c, id, wish{timeout: timeout})
	return s.shown(box), err
}

// Connect leases a sandbox. It waits for one that is being created and wakes a suspended one.
// Errors are those of [Service.Wake]. For a running sandbox it costs one read of the row and no
// write.
func (s *Service) Connect(ctx context.Context, c Caller, id ID) (*Lease, error) {
	box, l, err := s.running(ctx, c, id, wish{pin: true})
	if err != nil {
		return nil, err
	}
	return &Lease{Sandbox: box, service: s, life: l}, nil
}

// Attach leases a running sandbox of any organization. It wakes no sandbox, and does not wait for
// one that is not in state running: it returns a Conflict, code "sandbox_not_running".
func (s *Service) Attach(ctx context.Context, id ID) (*Lease, error) {
	for last := false; ; last = true {
		box, err := s.Lookup(ctx, id)
		if err != nil {
			return nil, err
		}
		if box.State == Running {
			if l := s.use(box, true); l != nil {
				return &Lease{Sandbox: box, service: s, life: l}, nil
			}
		}
		// A row may be briefly ahead of the operation on its sandbox: wait for the operation's result.
		op := s.working(id)
		if last || op == nil || box.State != Running {
			return nil, notRunning(box)
		}
		if err := op.ended(ctx); err != nil {
			return nil, err
		}
	}
}

// wish holds what a caller needs of a running sandbox.
type wish struct {
	pin     bool          // take a lease, and wait for a sandbox being created
	timeout time.Duration // of an ephemeral one, from its wake; 0 means its own
}

// running brings the sandbox to running after any operation on it, and records the activity.
func (s *Service) running(ctx context.Context, c Caller, id ID, u wish) (Sandbox, *life, error) {
	for {
		end := trace.Start(ctx, "find")
		box, err := s.Get(ctx, c.OrgID, id)
		end()
		if err != nil {
			return Sandbox{}, nil, err
		}
		switch {
		case box.State == Running:
			if l := s.use(box, u.pin); l != nil {
				return box, l, nil
			}
		case box.State == Creating && !u.pin, box.State == Destroying, box.State.Over():
			return Sandbox{}, nil, notRunning(box)
		}
		// The sandbox cannot be used as it was read: wait for the operation on it, or begin a wake, and
		// read it again.
		op, mine := s.begin(id, opWake)
		if op == nil {
			return Sandbox{}, nil, errClosing
		}
		if mine {
			s.do(ctx, id, op, func(ctx context.Context) (Sandbox, error) { return s.wake(ctx, c, id, u.timeout) })
		}
		if err := op.ended(ctx); err != nil {
			return Sandbox{}, nil, err
		}
		if op.kind == opWake && op.err != nil {
			return Sandbox{}, nil, op.err
		}
	}
}

// wake takes a suspended sandbox to running; the caller holds the operation.
func (s *Service) wake(ctx context.Context, c Caller, id ID, timeout time.Duration) (Sandbox, error) {
	box, err := s.present(ctx, id)
	switch {
	case err != nil:
		return Sandbox{}, err
	case box.State == Running:
		return box, nil
	case box.State != Suspended:
		return Sandbox{}, notRunning(box)
	}
	// Errors that concern only this caller leave the row unchanged.
	if err := s.room(ctx, box.Size); err != nil {
		return Sandbox{}, err
	}
	run, token := newSecret(10), newSecret(32)
	claim := Change{ID: id, From: []State{Suspended}, Run: box.Run, To: Waking, At: time.Now().UTC(),
		Quota: &c.Quota, NewRun: &run, Token: &token}
	if box.Mode == Ephemeral && timeout > 0 {
		claim.Timeout = &timeout
	}
	claimed, err := s.transition(ctx, claim)
	if err != nil {
		return Sandbox{}, err
	}
	woken, err := s.restore(ctx, claimed)
	if err != nil {
		return Sandbox{}, s.wakeFailed(ctx, claimed, err)
	}
	return woken, nil
}

// restore wakes a claimed sandbox and makes it usable.
func (s *Service) restore(ctx context.Context, box Sandbox) (Sandbox, error) {
	ctx, cancel := context.WithTimeout(ctx, pointTimeout)
	defer cancel()
	if err := s.node.Wake(ctx, box.restored()); err != nil {
		return Sandbox{}, err
	}
	now := time.Now().UTC()
	done := Change{ID: box.ID, From: []State{Waking}, Run: box.Run, To: Running, At: now,
		SuspendedAt: new(time.Time), Error: new(string)}
	if box.Mode == Ephemeral {
		done.ExpiresAt = new(now.Add(box.Timeout))
	} else {
		done.LastActivityAt = &now
	}
	woken, err := s.transition(ctx, done)
	if err != nil {
		return Sandbox{}, err
	}
	l := newLife(woken)
	l.looked, l.changed = now, false // it equals its point
	s.track(l)
	return woken, nil
}

// wakeFailed takes the sandbox back to suspended, unless a destroy interrupted, and returns the
// error for the callers.
func (s *Service) wakeFailed(ctx context.Context, box Sandbox, cause error) error {
	if context.Cause(ctx) == errInterrupted {
		return fault.New(fault.Conflict, codeNotRunning, "sandbox %s was destroyed while it was being woken", box.ID)
	}
	s.log.ErrorContext(ctx, "sandbox did not wake", "sandbox", box.ID, "error", cause)
	why := note{reason: reasonWakeFailed, detail: publicText(cause,
		"the sandbox did not wake; the server's log has the cause")}
	if !fault.Is(cause, fault.Unavailable) && !fault.Is(cause, fault.Exhausted) {
		why.hinders = &why.detail
	}
	if err := s.settle(ctx, box.ID, why); err != nil {
		// The row stays a claim; Reconcile settles it.
		s.log.ErrorContext(ctx, "cleaning up a failed wake", "sandbox", box.ID, "error", err)
	}
	if fault.As(cause) != nil {
		return cause
	}
	return fault.New(fault.Internal, reasonWakeFailed, "sandbox %s did not wake", box.ID).Because(cause)
}
