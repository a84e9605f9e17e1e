package sandbox

import (
	"context"
	"errors"
	"sync"
	"time"
)

const (
	// reconcileEvery is the interval between comparisons of rows and host while the server runs. They
	// remove the leftovers of failed cleanups; the start of the server does not wait for them. A
	// longer interval keeps leftovers for longer; a shorter one reads the host needlessly.
	reconcileEvery = 15 * time.Second
	// PurgeInterval is the interval between calls of [Service.Purge]. A purge reads an index of the
	// rows of destroyed sandboxes. A longer interval lets an organization exceed its number for longer.
	PurgeInterval = time.Minute
)

// Run does the periodic work until ctx ends. It handles sandboxes whose processes ended, records
// what policies denied, reconciles, saves last activities, maintains the pool, and drains the machine
// if it is told to.
// Call [Service.Reconcile] once before Run, so that timers are set when the first request comes.
func (s *Service) Run(ctx context.Context) {
	var background sync.WaitGroup
	defer background.Wait()
	background.Go(func() { s.flushing(ctx) })
	background.Go(func() { s.pool.run(ctx) })
	background.Go(func() { s.draining(ctx) })
	reconcile := time.NewTicker(reconcileEvery)
	defer reconcile.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case observed := <-s.node.Lost():
			background.Go(func() { s.handleLost(ctx, observed) })
		case d := <-s.node.Denied():
			s.denials.add(d)
		case <-reconcile.C:
			if err := s.Reconcile(ctx); err != nil && ctx.Err() == nil {
				s.log.ErrorContext(ctx, "reconciling", "error", err)
			}
		}
	}
}

// Purge drops old rows of sandboxes, of all nodes. Of the servers with the same rows one does it.
func (s *Service) Purge(ctx context.Context) {
	now := s.cfg.Now().UTC()
	n, err := s.store.Purge(ctx, now.Add(-s.cfg.KeepDestroyed), now, s.cfg.MaxDestroyed)
	if err != nil && ctx.Err() == nil {
		s.log.ErrorContext(ctx, "dropping old sandboxes", "error", err)
	} else if n > 0 {
		s.log.InfoContext(ctx, "dropped old sandboxes", "count", n)
	}
}

// handleLost settles a sandbox whose processes ended, after any running operation on it has finished.
func (s *Service) handleLost(ctx context.Context, observed Observed) {
	for {
		op, mine := s.ops.begin(observed.ID, opSettle)
		if op == nil {
			return
		}
		if mine {
			err := s.settle(op.ctx, observed.ID, note{reason: reasonInterrupted})
			s.ops.finish(observed.ID, op, nil, err)
			if err != nil { // the next Reconcile tries again
				s.log.ErrorContext(ctx, "settling a lost sandbox", "sandbox", observed.ID, "error", err)
			}
			return
		}
		if op.ended(ctx) != nil {
			return
		}
	}
}

// Close stops the timers, lets operations under way finish until ctx ends, and saves last
// activities. It abandons operations that have not finished by then: Reconcile finds their claims
// at the next start. Sandboxes keep running.
func (s *Service) Close(ctx context.Context) error {
	s.live.close()
	err := s.ops.close(ctx)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	return errors.Join(err, s.live.flush(ctx, s.store))
}
