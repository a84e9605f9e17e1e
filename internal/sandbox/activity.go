package sandbox

import (
	"context"
	"errors"
	"time"
)

const (
	// flushEvery is the interval between saves of last activities. A killed server loses at most this
	// much of them (the promise is 5 s). A save is one transaction, and none when nothing changed; a
	// shorter interval writes more often.
	flushEvery = 2 * time.Second
	// flushTimeout bounds the last flush of a server that shuts down: one transaction, which takes
	// milliseconds on a working disk.
	flushTimeout = 5 * time.Second
	// retryAfter is the delay before a sandbox's timer retries after a failure. A full disk is not
	// empty a second later, and each try may pause the sandbox for a moment.
	retryAfter = time.Minute
)

// Lease grants access to a running sandbox's agent. While it is held the sandbox counts as in use
// and is not suspended. Release it exactly once.
type Lease struct {
	Sandbox  Sandbox // includes its Token
	of       *instances
	instance *instance
}

// Release ends the lease. The sandbox becomes idle when its last lease ends.
func (l *Lease) Release() { l.of.release(l.instance) }

// InUse returns the number of leases held.
func (s *Service) InUse() int64 { return s.live.leases.Load() }

// idled suspends a sandbox whose idle timer fired. A use in the meantime has reset the timer, or
// will do so when the last lease ends.
func (s *Service) idled(l *instance) {
	if !s.live.idle(l) {
		return
	}
	op, mine := s.ops.run(l.id, opSuspend, func(ctx context.Context) (any, error) {
		return act(ctx, s, l.id, rules[opSuspend], func(ctx context.Context, sbx Sandbox) (Sandbox, error) {
			return s.suspend(ctx, sbx, KeepAll, reasonIdle, s.live.detachIfIdle) // logs its errors
		})
	})
	if op == nil {
		return
	}
	s.live.rewind(l, mine && op.err != nil && !errors.Is(op.err, errNotIdle))
}

// flushing saves last activities and records denials until ctx ends.
func (s *Service) flushing(ctx context.Context) {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := s.live.flush(ctx, s.store); err != nil && ctx.Err() == nil {
				s.log.ErrorContext(ctx, "writing last activities", "error", err)
			}
			if err := s.denials.flush(ctx, s.store); err != nil && ctx.Err() == nil {
				s.log.ErrorContext(ctx, "recording denials of policies", "error", err)
			}
		}
	}
}
