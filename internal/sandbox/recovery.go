package sandbox

import (
	"context"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// firstPoint is how long after its start a sandbox's first recovery point is due. Until
	// then it would be lost with the machine, so not long; but whoever made it is setting
	// it up now, and it stands still for about a tenth of a second.
	firstPoint = 5 * time.Second
	// recoveriesAtOnce is how many recovery points are taken at a time without being
	// asked for. After a restart many are due together, and they share one disk with
	// the calls; one alone would let a slow one hold up all others.
	recoveriesAtOnce = 2
	// busyTimeout bounds asking a sandbox whether anything runs in it, which is one
	// call to its agent.
	busyTimeout = 10 * time.Second
)

// Checkpoint takes a recovery point of a running persistent sandbox, which runs on and
// may be used meanwhile. It shares the result of one under way, and goes on when ctx
// ends. Conflicts are as [Service.Suspend]'s, without "sandbox_in_use". The error is the
// machine's (NoSpace, code "disk_full", …) or Internal, code "checkpoint_failed"; the point
// before is then still there. It is no transition and leaves no event.
func (s *Service) Checkpoint(ctx context.Context, orgID string, id ID) (Point, error) {
	for {
		box, err := s.Get(ctx, orgID, id)
		if err != nil {
			return Point{}, err
		}
		if err := suspendable(box); err != nil {
			return Point{}, err
		}
		op, mine := s.begin(id, opCheckpoint)
		if op == nil {
			return Point{}, errClosing
		}
		if mine {
			go s.checkpoint(id, op)
		}
		if err := op.ended(ctx); err != nil {
			return Point{}, err
		}
		if op.kind == opCheckpoint {
			return op.point, op.err
		}
	}
}

// checkpoint takes a recovery point and finishes the operation.
func (s *Service) checkpoint(id ID, op *operation) {
	box, err := s.present(op.ctx, id)
	if err == nil {
		err = suspendable(box)
	}
	if err == nil {
		op.point, err = s.takePoint(op.ctx, id)
	}
	s.finish(id, op, box, err)
}

// takePoint takes a recovery point of a sandbox that runs.
func (s *Service) takePoint(ctx context.Context, id ID) (Point, error) {
	s.markChanged(id, false)
	point, err := s.writePoint(ctx, id, s.node.Checkpoint)
	if err == nil {
		return point, nil
	}
	s.markChanged(id, true)
	if context.Cause(ctx) == errInterrupted {
		return Point{}, fault.New(fault.Conflict, codeNotRunning, "sandbox %s was destroyed while a recovery point was taken", id)
	}
	s.log.ErrorContext(ctx, "taking a recovery point", "sandbox", id, "error", err)
	if err := s.settle(ctx, id, note{reason: reasonInterrupted}); err != nil { // it may have died of it
		s.log.ErrorContext(ctx, "looking after a sandbox without its recovery point", "sandbox", id, "error", err)
	}
	if fault.As(err) != nil {
		return Point{}, err
	}
	return Point{}, fault.New(fault.Internal, "checkpoint_failed", "no recovery point of sandbox %s was taken", id).Because(err)
}

// markChanged notes whether a sandbox may differ from its latest point. One that is
// in use while the point is taken always may.
func (s *Service) markChanged(id ID, changed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.lives[id]; l != nil {
		l.changed, l.looked = changed || l.leases > 0, time.Now()
	}
}

// recoveryDue takes a recovery point of a sandbox whose recovery timer fired, if it may
// have changed, and sets the timer for the next.
func (s *Service) recoveryDue(l *life) {
	s.recoveries <- struct{}{}
	defer func() { <-s.recoveries }()
	looked := true
	if s.needsPoint(l) {
		op, mine := s.begin(l.id, opCheckpoint)
		if op == nil {
			return
		}
		if mine {
			s.checkpoint(l.id, op) // logs what goes wrong; the next interval tries again
		} else {
			<-op.done
			looked = false // unless that was a checkpoint, which has noted it
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lives[l.id] != l || s.closed {
		return
	}
	if looked {
		l.looked = time.Now()
	}
	l.recovery.Reset(time.Until(l.looked.Add(l.interval)))
}

// needsPoint reports whether a sandbox that runs may differ from its latest point.
func (s *Service) needsPoint(l *life) bool {
	s.mu.Lock()
	gone, changed := s.lives[l.id] != l, l.changed
	s.mu.Unlock()
	if gone || changed {
		return !gone
	}
	ctx, cancel := context.WithTimeout(context.Background(), busyTimeout)
	defer cancel()
	busy, err := s.node.Busy(ctx, l.id)
	if err != nil {
		s.log.WarnContext(ctx, "asking whether a sandbox is busy; taking it as so", "sandbox", l.id, "error", err)
		return true
	}
	return busy
}
