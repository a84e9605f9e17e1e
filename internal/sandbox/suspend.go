package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// Reasons of events other than ends. The ends have a [Reason].
const (
	reasonIdle          = "idle"
	reasonInterrupted   = "interrupted" // by a crash of the server
	reasonSuspendFailed = "suspend_failed"
	reasonWakeFailed    = "wake_failed"
	ReasonEgressChanged = "egress_changed"
	reasonEgressDenied  = "egress_denied"
	ReasonSnapshot      = "snapshot_made"
	reasonForked        = "forked"
)

// leaseGrace limits how long an explicit suspend waits for calls in flight. The caller of a command
// that has ended may ask for a suspend before the server has released the lease. The release takes
// milliseconds, or seconds while an answer of many MB is still being sent. A shorter time refuses
// such suspends; a longer one makes the caller wait for another caller's command.
const leaseGrace = 5 * time.Second

// Suspend takes a running persistent sandbox to suspended, and keeps its complete state or its files
// alone. It shares the result of a suspend under way, whatever that one keeps, waits for a checkpoint, and
// continues when ctx ends. It returns a Conflict with code "sandbox_not_persistent",
// "sandbox_not_running", or "sandbox_in_use" when calls in flight do not end within 5 seconds. Other
// errors are the machine's (NoSpace, code "disk_full", Conflict, code "sandbox_too_old", …) or Internal,
// code "suspend_failed"; the sandbox then keeps running if it is still alive.
func (s *Service) Suspend(ctx context.Context, orgID string, id ID, keep Kept) (Sandbox, error) {
	return s.suspendBy(ctx, orgID, id, keep, persistent, s.live.detachWhenFree)
}

// Pause takes a running sandbox of either mode to suspended, even while it is in use. It breaks
// calls in flight after the row says that the sandbox does not run. Otherwise it behaves like
// [Service.Suspend].
func (s *Service) Pause(ctx context.Context, orgID string, id ID, keep Kept) (Sandbox, error) {
	return s.suspendBy(ctx, orgID, id, keep, nil, s.live.detachNow)
}

// suspendBy suspends a sandbox if may, if not nil, returns nil for it. It ends the sandbox's use with
// detach.
func (s *Service) suspendBy(ctx context.Context, orgID string, id ID, keep Kept, may func(Sandbox) error,
	detach detachFunc) (Sandbox, error) {
	return operate(ctx, s, orgID, id, opSuspend, may, func(ctx context.Context, sbx Sandbox) (Sandbox, error) {
		return s.suspend(ctx, sbx, keep, string(Requested), detach)
	})
}

// persistent returns an error for a sandbox that is not persistent.
func persistent(sbx Sandbox) error {
	if sbx.Mode != Persistent {
		return fault.New(fault.Conflict, fault.CodeSandboxNotPersistent,
			"sandbox %s is %s: only persistent ones are suspended", sbx.ID, sbx.Mode)
	}
	return nil
}

// suspend takes a running sandbox to suspended; the caller holds the operation. detach ends the
// sandbox's use: later calls wait for the result of the suspend.
func (s *Service) suspend(ctx context.Context, sbx Sandbox, keep Kept, reason string,
	detach detachFunc) (Sandbox, error) {
	id := sbx.ID
	l, err := detach(ctx, id)
	if err != nil {
		return Sandbox{}, err
	}
	began := time.Now().UTC()
	claim := Change{ID: id, From: []State{Running}, Run: sbx.Run, To: Suspending, At: began, Reason: reason}
	if sbx.Mode == Persistent {
		claim.LastActivityAt = &l.last
	}
	if _, err = s.transition(ctx, claim); err != nil {
		s.log.ErrorContext(ctx, "claiming a sandbox to suspend it", "sandbox", id, "error", err)
		l.after = began.Add(retryAfter)
		l.known = false // a keepalive found no instance
		s.live.track(l) // the sandbox is unchanged
		return Sandbox{}, err
	}
	checkpoint, err := s.keep(ctx, id, keep)
	if err != nil && keep == KeepFiles && reason == string(Expired) && ctx.Err() == nil {
		// Programs inside can make files that cannot be kept alone. They must not outlive the timeout by that.
		s.log.WarnContext(ctx, "keeping the memory of an expired sandbox too", "sandbox", id, "error", err)
		first := err
		if checkpoint, err = s.keep(ctx, id, KeepAll); err != nil {
			err = errors.Join(first, err)
		}
	}
	if err != nil {
		return s.suspendFailed(ctx, id, began, err)
	}
	suspended, err := s.transition(ctx, Change{ID: id, From: []State{Suspending}, Run: sbx.Run, To: Suspended,
		At: time.Now().UTC(), Reason: reason, Detail: detailOf(keep, checkpoint.Kept), SuspendedAt: &checkpoint.At,
		Kept: &checkpoint.Kept, ExpiresAt: new(time.Time)})
	if err != nil {
		// The row stays a claim, which the next call or Reconcile settles from the checkpoint.
		s.log.ErrorContext(ctx, "recording that a sandbox is suspended", "sandbox", id, "error", err)
		return Sandbox{}, fmt.Errorf("suspending %s: %w", id, err)
	}
	return suspended, nil
}

// detailOf returns the detail of the event of a suspend that was to keep one thing and kept another.
func detailOf(keep, kept Kept) string {
	switch {
	case kept == KeepFiles:
		return "keeps its files alone"
	case keep == KeepFiles:
		return "keeps its memory too, since its files alone could not be kept"
	default:
		return ""
	}
}

// keep suspends a sandbox on its machine.
func (s *Service) keep(ctx context.Context, id ID, keep Kept) (Checkpoint, error) {
	return s.writeCheckpoint(ctx, id, func(ctx context.Context, id ID) (Checkpoint, error) {
		return s.node.Suspend(ctx, id, keep)
	})
}

func (s *Service) writeCheckpoint(ctx context.Context, id ID,
	write func(context.Context, ID) (Checkpoint, error)) (Checkpoint, error) {
	ctx, cancel := context.WithTimeout(ctx, checkpointTimeout)
	defer cancel()
	return write(ctx, id)
}

// suspendFailed makes the row agree with the host, unless a destroy interrupted, and returns the
// result for the callers.
func (s *Service) suspendFailed(ctx context.Context, id ID, began time.Time, cause error) (Sandbox, error) {
	if context.Cause(ctx) == errInterrupted {
		return Sandbox{}, fault.New(fault.Conflict, fault.CodeSandboxNotRunning,
			"sandbox %s was destroyed while it was being suspended", id)
	}
	s.log.ErrorContext(ctx, "sandbox was not suspended", "sandbox", id, "error", cause)
	why := note{reason: reasonSuspendFailed, detail: publicText(cause,
		"the sandbox was not suspended; the server's log has the cause")}
	if err := s.settle(ctx, id, why); err != nil {
		// The row stays a claim; Reconcile settles it.
		s.log.ErrorContext(ctx, "cleaning up a failed suspend", "sandbox", id, "error", err)
	} else if sbx, err := s.store.Get(ctx, id); err == nil && sbx.State == Suspended &&
		!sbx.SuspendedAt.Before(began.Truncate(time.Microsecond)) {
		return sbx, nil // its new checkpoint was whole before the failure: nothing is missing
	}
	if fault.As(cause) != nil {
		return Sandbox{}, cause
	}
	return Sandbox{}, fault.New(fault.Internal, fault.CodeSuspendFailed, "sandbox %s was not suspended", id).Because(cause)
}
