package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// DropMemory makes a suspended sandbox keep only its files. Only the sandbox's own kernel can read them, so the machine
// wakes the sandbox for a moment; calls that need it to run wait meanwhile. DropMemory does not change a sandbox that
// runs or that has no memory. If the files cannot be kept without the memory, it returns the cause, and the sandbox
// keeps its memory. Other errors are those of [Service.Wake].
func (s *Service) DropMemory(ctx context.Context, c Caller, id ID) (Sandbox, error) {
	return operate(ctx, s, c.OrgID, id, opDropMemory, nil, func(ctx context.Context, sbx Sandbox) (Sandbox, error) {
		if sbx.State == Running || sbx.Kept == KeepFiles {
			return sbx, nil
		}
		claimed, room, err := s.claimWake(ctx, c, sbx, runOptions{reason: string(Requested)})
		if err != nil {
			return Sandbox{}, err
		}
		defer room.release()
		return s.dropMemory(ctx, claimed)
	})
}

// dropMemory wakes a claimed sandbox on its machine and suspends it again; the caller holds the
// operation.
func (s *Service) dropMemory(ctx context.Context, sbx Sandbox) (Sandbox, error) {
	if err := s.wakeOnMachine(ctx, sbx); err != nil {
		return Sandbox{}, s.wakeFailed(ctx, sbx, err)
	}
	checkpoint, cause := s.keep(ctx, sbx.ID, KeepFiles)
	if cause != nil && ctx.Err() == nil {
		// Its programs have run since its recovery point, so it must not continue from there.
		var err error
		if checkpoint, err = s.keep(ctx, sbx.ID, KeepAll); err != nil {
			return Sandbox{}, s.wakeFailed(ctx, sbx, errors.Join(cause, err))
		}
	} else if cause != nil {
		return Sandbox{}, s.wakeFailed(ctx, sbx, cause)
	}
	suspended, err := s.transition(ctx, Change{ID: sbx.ID, From: []State{Waking}, Run: sbx.Run, To: Suspended,
		At: time.Now().UTC(), Reason: string(Requested), Detail: detailOf(KeepFiles, checkpoint.Kept),
		SuspendedAt: &checkpoint.At, Kept: &checkpoint.Kept, ExpiresAt: new(time.Time), Error: new(string)})
	switch {
	case err != nil:
		// The row stays a claim, which the next call or Reconcile settles from the checkpoint.
		return Sandbox{}, fmt.Errorf("recording that sandbox %s is suspended: %w", sbx.ID, err)
	case cause == nil:
		return suspended, nil
	case fault.As(cause) != nil:
		return Sandbox{}, cause
	}
	s.log.ErrorContext(ctx, "cannot suspend a sandbox with its files only", "sandbox", sbx.ID, "error", cause)
	return Sandbox{}, fault.New(fault.Internal, fault.CodeSuspendFailed,
		"sandbox %s could not be suspended with its files only", sbx.ID).Because(cause)
}
