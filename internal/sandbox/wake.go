package sandbox

import (
	"context"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/trace"
)

// pointTimeout bounds writing or reading one recovery point. The largest size has
// 16 GiB, which a disk of 30 MB/s takes nine minutes for; a machine that needs
// longer is broken, and a sandbox that waits for it must be told.
const pointTimeout = 10 * time.Minute

// Wake returns the sandbox running: as it is if it runs already, of either mode, else
// woken. It waits for a suspend under way and wakes then; many callers share one
// wake, which goes on when ctx ends. A sandbox being created, and one that is
// destroyed or being destroyed, is Conflict, code "sandbox_not_running"; Exhausted,
// code "quota_exceeded", and Unavailable, code "no_capacity", when there is no room for it
// now. A sandbox whose recovery point cannot be restored stays suspended with an Error
// that says why, and the point is kept.
func (s *Service) Wake(ctx context.Context, c Caller, id ID) (Sandbox, error) {
	return s.WakeFor(ctx, c, id, 0)
}

// WakeFor is Wake for an ephemeral sandbox that has that long to live when it is woken; 0
// is the timeout that it had last. To one that runs it gives no time.
func (s *Service) WakeFor(ctx context.Context, c Caller, id ID, timeout time.Duration) (Sandbox, error) {
	box, _, err := s.running(ctx, c, id, wish{timeout: timeout})
	return s.shown(box), err
}

// Connect leases a sandbox. It waits until one being created runs, and wakes a
// suspended one; errors are as [Service.Wake]'s. A sandbox that runs costs one read
// of its row and no write.
func (s *Service) Connect(ctx context.Context, c Caller, id ID) (*Lease, error) {
	box, l, err := s.running(ctx, c, id, wish{pin: true})
	if err != nil {
		return nil, err
	}
	return &Lease{Sandbox: box, service: s, life: l}, nil
}

// Attach leases a sandbox that runs, whoever asks. It wakes none, and waits for none that
// does not run as its row says: Conflict, code "sandbox_not_running".
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
		// A row is ahead of those at work on it for a moment: what comes of them counts.
		op := s.working(id)
		if last || op == nil || box.State != Running {
			return nil, notRunning(box)
		}
		if err := op.ended(ctx); err != nil {
			return nil, err
		}
	}
}

// wish is what somebody wants of a running sandbox.
type wish struct {
	pin     bool          // a lease; one being created is then waited for
	timeout time.Duration // of an ephemeral one, from when it is woken; 0 is its own
}

// running brings the sandbox to running, whatever is being done to it, and notes
// the activity.
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
		// Nobody can use it as it was read: wait for whoever is at work on it, or
		// be the one, and look again.
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
	// What only this caller need hear of leaves the row as it is.
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
	if err := s.node.Wake(ctx, box.spec()); err != nil {
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
	l.looked, l.changed = now, false // it is as its point is
	s.track(l)
	return woken, nil
}

// wakeFailed takes the sandbox back to suspended, unless destroy took over, and
// returns what the callers are told.
func (s *Service) wakeFailed(ctx context.Context, box Sandbox, cause error) error {
	if context.Cause(ctx) == errInterrupted {
		return fault.New(fault.Conflict, codeNotRunning, "sandbox %s was destroyed while it was being woken", box.ID)
	}
	s.log.ErrorContext(ctx, "sandbox did not wake", "sandbox", box.ID, "error", cause)
	why := note{reason: reasonWakeFailed, detail: publicText(cause, "the sandbox did not wake; the server's log has the cause")}
	if !fault.Is(cause, fault.Unavailable) && !fault.Is(cause, fault.Exhausted) {
		why.hinders = &why.detail
	}
	if err := s.settle(ctx, box.ID, why); err != nil {
		// The row stays a claim; reconcile comes back for it.
		s.log.ErrorContext(ctx, "cleaning up a failed wake", "sandbox", box.ID, "error", err)
	}
	if fault.As(cause) != nil {
		return cause
	}
	return fault.New(fault.Internal, reasonWakeFailed, "sandbox %s did not wake", box.ID).Because(cause)
}
