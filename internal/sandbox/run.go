package sandbox

import (
	"context"
	"time"
)

const (
	// reconcileEvery is how often rows and host are compared while the server
	// runs. It catches what a failed cleanup left; the start of the server does not
	// wait for it. Longer leaves leftovers longer, shorter reads the host for nothing.
	reconcileEvery = 15 * time.Second
	// purgeEvery is how often sandboxes that were destroyed long ago are dropped.
	purgeEvery = 10 * time.Minute
)

// Run does what has to be done over time until ctx ends: it notices sandboxes
// whose processes ended, reconciles, and drops old rows. Call [Service.Reconcile]
// once before, so that timers are set when the first request comes.
func (s *Service) Run(ctx context.Context) {
	reconcile, purge := time.NewTicker(reconcileEvery), time.NewTicker(purgeEvery)
	defer reconcile.Stop()
	defer purge.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case fact := <-s.node.Lost():
			go s.lost(context.WithoutCancel(ctx), fact)
		case <-reconcile.C:
			if err := s.Reconcile(ctx); err != nil && ctx.Err() == nil {
				s.log.ErrorContext(ctx, "reconciling", "error", err)
			}
		case <-purge.C:
			now := time.Now().UTC()
			if n, err := s.store.Purge(ctx, now.Add(-s.cfg.KeepDestroyed), now); err != nil && ctx.Err() == nil {
				s.log.ErrorContext(ctx, "dropping old sandboxes", "error", err)
			} else if n > 0 {
				s.log.InfoContext(ctx, "dropped old sandboxes", "count", n)
			}
		}
	}
}

func (s *Service) lost(ctx context.Context, fact Fact) {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	if s.busy(fact.ID) { // somebody is at work on it and sees for himself
		return
	}
	if err := s.destroy(ctx, fact.ID, fact.Run, Lost); err != nil {
		s.log.ErrorContext(ctx, "destroying a lost sandbox", "sandbox", fact.ID, "error", err)
	}
}

// Close stops the timers, lets operations under way finish until ctx ends, and
// interrupts the rest: reconcile finds their claims at the next start. Sandboxes
// go on running.
func (s *Service) Close(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	for id, t := range s.timers {
		t.Stop()
		delete(s.timers, id)
	}
	s.mu.Unlock()
	done := make(chan struct{})
	go func() { s.wg.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
