package sandbox

import (
	"context"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// firstRecovery is the time from a sandbox's start to its first recovery point. A longer time leaves
	// a new sandbox unprotected against a loss of the machine for longer. A shorter one disturbs the
	// user who is setting it up: taking a recovery point pauses it for about a tenth of a second.
	firstRecovery = 5 * time.Second
	// recoveriesAtOnce limits the recovery points that timers take at a time. After a restart many are
	// due together, and they share one disk with calls. A higher value slows calls; a value of one
	// would let a slow one delay all others.
	recoveriesAtOnce = 2
	// busyTimeout bounds asking a sandbox whether processes run in it, which is one call to its agent.
	// A lower value fails on a slow machine; a higher one delays the recovery points of a sandbox whose agent
	// does not answer.
	busyTimeout = 10 * time.Second
)

// Checkpoint takes a recovery point of a running persistent sandbox, which keeps running and may be
// used meanwhile. It shares the result of a checkpoint under way, and continues when ctx ends.
// Conflicts are those of [Service.Suspend], without "sandbox_in_use". Other errors are the
// machine's (NoSpace, code "disk_full", …) or Internal, code "checkpoint_failed"; the previous
// recovery point is then still there. A checkpoint is no transition and leaves no event.
func (s *Service) Checkpoint(ctx context.Context, orgID string, id ID) (Checkpoint, error) {
	return operate(ctx, s, orgID, id, opCheckpoint, persistent, s.takeCheckpoint)
}

// takeCheckpoint takes a recovery point of a running sandbox; the caller holds the operation.
func (s *Service) takeCheckpoint(ctx context.Context, sbx Sandbox) (Checkpoint, error) {
	id := sbx.ID
	s.live.markChanged(id, false)
	made, err := s.writeCheckpoint(ctx, id, s.node.Checkpoint)
	if err == nil {
		return made, nil
	}
	s.live.markChanged(id, true)
	if context.Cause(ctx) == errInterrupted {
		return Checkpoint{}, fault.New(fault.Conflict, fault.CodeSandboxNotRunning,
			"sandbox %s was destroyed while a recovery point was taken", id)
	}
	s.log.ErrorContext(ctx, "taking a recovery point", "sandbox", id, "error", err)
	if err := s.settle(ctx, id, note{reason: reasonInterrupted}); err != nil { // the failure may have killed it
		s.log.ErrorContext(ctx, "settling a sandbox after a failed recovery point", "sandbox", id, "error", err)
	}
	if fault.As(err) != nil {
		return Checkpoint{}, err
	}
	return Checkpoint{}, fault.New(fault.Internal, fault.CodeCheckpointFailed,
		"no recovery point of sandbox %s was taken", id).Because(err)
}

// recoveryDue handles a sandbox's recovery timer. It takes a recovery point if the sandbox may have
// changed, and sets the timer for the next one.
func (s *Service) recoveryDue(l *instance) {
	looked := true
	if s.needsCheckpoint(l) { // asked before there is a place: agents that do not answer must not fill the places
		s.recoveries <- struct{}{}
		defer func() { <-s.recoveries }()
		op, mine := s.ops.run(l.id, opCheckpoint, func(ctx context.Context) (any, error) {
			return act(ctx, s, l.id, rules[opCheckpoint], s.takeCheckpoint) // logs its errors; the next interval tries again
		})
		if op == nil {
			return
		}
		looked = mine // another operation has set it, if it was a checkpoint
	}
	s.live.nextRecovery(l, looked)
}

// needsCheckpoint reports whether a running sandbox may differ from its latest checkpoint.
func (s *Service) needsCheckpoint(l *instance) bool {
	if there, changed := s.live.changed(l); !there || changed {
		return there
	}
	ctx, cancel := context.WithTimeout(context.Background(), busyTimeout)
	defer cancel()
	busy, err := s.node.Busy(ctx, l.id)
	if err != nil {
		s.log.WarnContext(ctx, "asking whether a sandbox is busy; assuming that it is", "sandbox", l.id, "error", err)
		return true
	}
	return busy
}
