package sandbox

import (
	"context"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/trace"
)

// checkpointTimeout bounds writing or reading one recovery point. The largest size has 16 GiB, which
// takes a disk of 30 MB/s nine minutes. A lower value fails large sandboxes on slow disks; a higher
// one delays the report of a broken machine.
const checkpointTimeout = 10 * time.Minute

// Wake returns a sandbox of either mode running, and wakes it if it is suspended. It waits for a
// suspend under way before it wakes the sandbox. Concurrent callers share one wake, which continues
// when ctx ends. Wake returns a Conflict, code "sandbox_not_running", for a sandbox that is being
// created, being destroyed or destroyed. It returns Exhausted, code "quota_exceeded", or
// Unavailable, code "no_capacity", when there is no room for the sandbox now. A sandbox whose
// recovery point cannot be restored stays suspended, with the cause in its Error, and keeps the
// recovery point.
func (s *Service) Wake(ctx context.Context, c Caller, id ID) (Sandbox, error) {
	return s.WakeFor(ctx, c, id, 0)
}

// WakeFor is like Wake, but gives an ephemeral sandbox the timeout when it wakes; 0 means the
// timeout that it had last. It does not change the timeout of a running sandbox.
func (s *Service) WakeFor(ctx context.Context, c Caller, id ID, timeout time.Duration) (Sandbox, error) {
	sbx, _, err := s.running(ctx, c, id, runOptions{timeout: timeout, reason: string(Requested)})
	return s.live.shown(sbx), err
}

// Cause says what a sandbox is used for. It is the reason in the events of a wake.
type Cause string

// The causes. There are few, since the metrics of transitions have them too.
const (
	ForCommand  Cause = "execute"  // to run a command that the call waits for
	ForProcess  Cause = "process"  // to start, list or use other processes
	ForTerminal Cause = "terminal" // to begin or join a session of a terminal
	ForFiles    Cause = "files"    // to read, write or watch files
	ForPort     Cause = "port"     // to reach a port of a program inside
)

// Connect leases a sandbox. It waits for one that is being created and wakes a suspended one.
// Errors are those of [Service.Wake]. For a running sandbox it costs one read of the row at most, and
// no write.
func (s *Service) Connect(ctx context.Context, c Caller, id ID, use Cause) (*Lease, error) {
	sbx, l, err := s.running(ctx, c, id, runOptions{pin: true, reason: string(use)})
	if err != nil {
		return nil, err
	}
	return &Lease{Sandbox: sbx, of: s.live, instance: l}, nil
}

// Attach leases a running sandbox of any organization. It wakes no sandbox, and does not wait for
// one that is not in state running: it returns a Conflict, code "sandbox_not_running".
func (s *Service) Attach(ctx context.Context, id ID) (*Lease, error) {
	for last := false; ; last = true {
		sbx, err := s.GetAny(ctx, id)
		if err == nil {
			err = s.held(sbx)
		}
		if err != nil {
			return nil, err
		}
		if sbx.State == Running {
			if l := s.live.use(sbx, true); l != nil {
				return &Lease{Sandbox: sbx, of: s.live, instance: l}, nil
			}
		}
		// A row may be briefly ahead of the operation on its sandbox: wait for the operation's result.
		op := s.ops.on(id)
		if last || op == nil || sbx.State != Running {
			return nil, notRunning(sbx)
		}
		if err := op.ended(ctx); err != nil {
			return nil, err
		}
	}
}

// runOptions holds what a caller needs of a running sandbox.
type runOptions struct {
	pin     bool          // take a lease, and wait for a sandbox being created
	timeout time.Duration // of an ephemeral one, from its wake; 0 means its own
	reason  string        // of the events of its wake
}

// running brings the sandbox to running after any operation on it, and records the activity.
func (s *Service) running(ctx context.Context, c Caller, id ID, u runOptions) (Sandbox, *instance, error) {
	for {
		end := trace.Start(ctx, "find")
		sbx, err := s.getHeld(ctx, c.OrgID, id)
		end()
		if err != nil {
			return Sandbox{}, nil, err
		}
		switch {
		case sbx.State == Running:
			if l := s.live.use(sbx, u.pin); l != nil {
				return sbx, l, nil
			}
		case sbx.State == Creating && !u.pin:
			return Sandbox{}, nil, notRunning(sbx)
		}
		if err := rules[opWake].refuse(sbx); err != nil {
			return Sandbox{}, nil, err
		}
		// The sandbox cannot be used as it was read: wait for the operation on it, or wake it, and read it
		// again.
		_, _, err = attempt(ctx, s, id, opWake, func(ctx context.Context, sbx Sandbox) (Sandbox, error) {
			return s.wake(ctx, c, sbx, u)
		})
		if err != nil {
			return Sandbox{}, nil, err
		}
	}
}

// wake takes a suspended sandbox to running; the caller holds the operation.
func (s *Service) wake(ctx context.Context, c Caller, sbx Sandbox, u runOptions) (Sandbox, error) {
	if sbx.State == Running {
		return sbx, nil
	}
	claimed, room, err := s.claimWake(ctx, c, sbx, u)
	if err != nil {
		return Sandbox{}, err
	}
	defer room.release()
	woken, err := s.restore(ctx, claimed, u.reason)
	if err != nil {
		return Sandbox{}, s.wakeFailed(ctx, claimed, err)
	}
	return woken, nil
}

// claimWake takes a suspended sandbox to waking, with a new run, if there is room for it; the caller
// holds the operation, and releases the room after it has called the machine.
func (s *Service) claimWake(ctx context.Context, c Caller, sbx Sandbox, u runOptions) (Sandbox, *room, error) {
	// Errors that concern only this caller leave the row unchanged.
	room, err := s.pool.reserve(ctx, sbx)
	if err != nil {
		return Sandbox{}, nil, err
	}
	run, token := newSecret(10), newSecret(32)
	claim := Change{ID: sbx.ID, From: []State{Suspended}, Run: sbx.Run, To: Waking, At: time.Now().UTC(),
		Reason: u.reason, Quota: &c.Quota, OrgID: sbx.OrgID, NewRun: &run, Token: &token}
	if sbx.Mode == Ephemeral && u.timeout > 0 {
		claim.Timeout = &u.timeout
	}
	claimed, err := s.transition(ctx, claim)
	if err != nil {
		room.release()
		return Sandbox{}, nil, err
	}
	room.settle()
	return claimed, room, nil
}

func (s *Service) wakeOnMachine(ctx context.Context, sbx Sandbox) error {
	ctx, cancel := context.WithTimeout(ctx, checkpointTimeout)
	defer cancel()
	return s.node.Wake(ctx, sbx.restored(sbx.Kept))
}

// restore wakes a claimed sandbox and makes it usable.
func (s *Service) restore(ctx context.Context, sbx Sandbox, reason string) (Sandbox, error) {
	if err := s.wakeOnMachine(ctx, sbx); err != nil {
		return Sandbox{}, err
	}
	now := time.Now().UTC()
	done := Change{ID: sbx.ID, From: []State{Waking}, Run: sbx.Run, To: Running, At: now, Reason: reason,
		SuspendedAt: new(time.Time), Error: new(string)}
	if sbx.Mode == Ephemeral {
		done.ExpiresAt = new(now.Add(sbx.Timeout))
	} else {
		done.LastActivityAt = &now
	}
	woken, err := s.transition(ctx, done)
	if err != nil {
		return Sandbox{}, err
	}
	l := newInstance(woken)
	l.looked, l.changed = now, false // it equals its checkpoint
	s.live.track(l)
	return woken, nil
}

// wakeFailed takes the sandbox back to suspended, unless a destroy interrupted, and returns the
// error for the callers.
func (s *Service) wakeFailed(ctx context.Context, sbx Sandbox, cause error) error {
	if context.Cause(ctx) == errInterrupted {
		return fault.New(fault.Conflict, fault.CodeSandboxNotRunning,
			"sandbox %s was destroyed while it was being woken", sbx.ID)
	}
	s.log.ErrorContext(ctx, "sandbox did not wake", "sandbox", sbx.ID, "error", cause)
	why := note{reason: reasonWakeFailed, detail: publicText(cause,
		"the sandbox did not wake; the server's log has the cause")}
	if !fault.Is(cause, fault.Unavailable) && !fault.Is(cause, fault.Exhausted) {
		why.hinders = &why.detail
	}
	if err := s.settle(ctx, sbx.ID, why); err != nil {
		// The row stays a claim; Reconcile settles it.
		s.log.ErrorContext(ctx, "cleaning up a failed wake", "sandbox", sbx.ID, "error", err)
	}
	if fault.As(cause) != nil {
		return cause
	}
	return fault.New(fault.Internal, fault.CodeWakeFailed, "sandbox %s did not wake", sbx.ID).Because(cause)
}
