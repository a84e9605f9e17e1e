package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// Reasons of events that are not ends; the ends have a [Reason].
const (
	reasonIdle          = "idle"
	reasonInterrupted   = "interrupted" // by a crash of the server
	reasonSuspendFailed = "suspend_failed"
	reasonWakeFailed    = "wake_failed"
	reasonEgressChanged = "egress_changed"
	reasonEgressDenied  = "egress_denied"
	reasonSnapshot      = "snapshot_made"
	reasonForked        = "forked"
)

// leaseGrace is how long an explicit suspend waits for calls in flight. The caller
// of a command that has ended may ask for a suspend before the server has let go of
// the lease, which takes milliseconds, or seconds when an answer of many MB is still
// on its way; longer would make the caller wait for somebody else's command.
const leaseGrace = 5 * time.Second

// Suspend takes a running persistent sandbox to suspended: asleep with everything
// it has. It shares the result of a suspend under way, waits for a checkpoint, and
// goes on when ctx ends. Conflict, code "sandbox_not_persistent", "sandbox_not_running", or
// "sandbox_in_use" when calls in flight do not end within 5 seconds. When it fails the error is
// the machine's (NoSpace, code "disk_full", …) or Internal, code "suspend_failed", and
// the sandbox runs on if it still lives.
func (s *Service) Suspend(ctx context.Context, orgID string, id ID) (Sandbox, error) {
	return s.suspendBy(ctx, orgID, id, suspendable, s.partWhenFree)
}

// Pause takes a running sandbox of either mode to suspended, whoever uses it: calls in
// flight are broken, once its row says that it does not run. Otherwise it is as
// [Service.Suspend].
func (s *Service) Pause(ctx context.Context, orgID string, id ID) (Sandbox, error) {
	return s.suspendBy(ctx, orgID, id, up, s.partNow)
}

// suspendBy suspends a sandbox that may, after its use has ended as part does it.
func (s *Service) suspendBy(ctx context.Context, orgID string, id ID, may func(Sandbox) error, part parting) (Sandbox, error) {
	for {
		box, err := s.Get(ctx, orgID, id)
		if err != nil {
			return Sandbox{}, err
		}
		if err := may(box); err != nil {
			return Sandbox{}, err
		}
		op, mine := s.begin(id, opSuspend)
		if op == nil {
			return Sandbox{}, errClosing
		}
		if mine {
			s.do(ctx, id, op, func(ctx context.Context) (Sandbox, error) {
				return s.suspend(ctx, id, string(Requested), part)
			})
		}
		if err := op.ended(ctx); err != nil {
			return Sandbox{}, err
		}
		if op.kind == opSuspend && !errors.Is(op.err, errNotIdle) {
			return op.result, op.err
		}
	}
}

// suspendable refuses a sandbox that cannot be suspended or checkpointed; one that is
// being suspended is for whoever waits for that.
func suspendable(box Sandbox) error {
	if err := up(box); err != nil {
		return err
	}
	if box.Mode != Persistent {
		return fault.New(fault.Conflict, "sandbox_not_persistent", "sandbox %s is %s: only persistent ones are suspended", box.ID, box.Mode)
	}
	return nil
}

// up refuses a sandbox that does not run. One that is being suspended is for whoever
// waits for that.
func up(box Sandbox) error {
	if box.State != Running && box.State != Suspending {
		return notRunning(box)
	}
	return nil
}

// parting ends the use of a sandbox that the caller works on.
type parting func(context.Context, ID) (*life, error)

// suspend takes a running sandbox to suspended; the caller holds the operation. part
// ends its use: from then on calls wait for what comes of this.
func (s *Service) suspend(ctx context.Context, id ID, reason string, part parting) (Sandbox, error) {
	box, err := s.present(ctx, id)
	if err != nil {
		return Sandbox{}, err
	}
	if err := up(box); err != nil {
		return Sandbox{}, err
	}
	l, err := part(ctx, id)
	if err != nil {
		return Sandbox{}, err
	}
	began := time.Now().UTC()
	claim := Change{ID: id, From: []State{Running}, Run: box.Run, To: Suspending, At: began, Reason: reason}
	if box.Mode == Persistent {
		claim.LastActivityAt = &l.last
	}
	if _, err = s.transition(ctx, claim); err != nil {
		s.log.ErrorContext(ctx, "claiming a sandbox to suspend it", "sandbox", id, "error", err)
		l.after = began.Add(retryAfter)
		s.track(l) // nothing was done to it
		return Sandbox{}, err
	}
	point, err := s.writePoint(ctx, id, s.node.Suspend)
	if err != nil {
		return s.suspendFailed(ctx, id, began, err)
	}
	suspended, err := s.transition(ctx, Change{ID: id, From: []State{Suspending}, Run: box.Run, To: Suspended, At: time.Now().UTC(),
		Reason: reason, SuspendedAt: &point.At, ExpiresAt: new(time.Time)})
	if err != nil {
		// The row stays a claim, which the next call or reconcile settles by the point.
		s.log.ErrorContext(ctx, "writing down that a sandbox is suspended", "sandbox", id, "error", err)
		return Sandbox{}, fmt.Errorf("suspending %s: %w", id, err)
	}
	return suspended, nil
}

func (s *Service) writePoint(ctx context.Context, id ID, write func(context.Context, ID) (Point, error)) (Point, error) {
	ctx, cancel := context.WithTimeout(ctx, pointTimeout)
	defer cancel()
	return write(ctx, id)
}

// suspendFailed takes the sandbox to where the host says it is, unless destroy took
// over, and returns what the callers are told.
func (s *Service) suspendFailed(ctx context.Context, id ID, began time.Time, cause error) (Sandbox, error) {
	if context.Cause(ctx) == errInterrupted {
		return Sandbox{}, fault.New(fault.Conflict, codeNotRunning, "sandbox %s was destroyed while it was being suspended", id)
	}
	s.log.ErrorContext(ctx, "sandbox was not suspended", "sandbox", id, "error", cause)
	why := note{reason: reasonSuspendFailed, detail: publicText(cause, "the sandbox was not suspended; the server's log has the cause")}
	if err := s.settle(ctx, id, why); err != nil {
		// The row stays a claim; reconcile comes back for it.
		s.log.ErrorContext(ctx, "cleaning up a failed suspend", "sandbox", id, "error", err)
	} else if box, err := s.store.Get(ctx, id); err == nil && box.State == Suspended && !box.SuspendedAt.Before(began.Truncate(time.Microsecond)) {
		return box, nil // its new point was whole before it failed: nothing is missing
	}
	if fault.As(cause) != nil {
		return Sandbox{}, cause
	}
	return Sandbox{}, fault.New(fault.Internal, reasonSuspendFailed, "sandbox %s was not suspended", id).Because(cause)
}

// partWhenFree ends the use of a sandbox as soon as no call is in flight.
func (s *Service) partWhenFree(ctx context.Context, id ID) (*life, error) {
	patience := time.NewTimer(leaseGrace)
	defer patience.Stop()
	for {
		s.mu.Lock()
		l := s.lives[id]
		if l.leases == 0 {
			s.remove(l)
			s.mu.Unlock()
			return l, nil
		}
		if l.free == nil {
			l.free = make(chan struct{})
		}
		free, calls := l.free, l.leases
		s.mu.Unlock()
		select {
		case <-free:
		case <-patience.C:
			return nil, fault.New(fault.Conflict, "sandbox_in_use", "sandbox %s is in use, calls in flight: %d; suspend it when they have ended", id, calls)
		case <-ctx.Done():
			return nil, fault.New(fault.Conflict, codeNotRunning, "sandbox %s was destroyed before it was suspended", id)
		}
	}
}

// partNow ends the use of a sandbox whoever uses it. Their connections are broken by the
// machine when it suspends the sandbox.
func (s *Service) partNow(_ context.Context, id ID) (*life, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.lives[id]
	s.remove(l)
	return l, nil
}
