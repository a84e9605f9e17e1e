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

// instance holds in memory the use, the last activity and the timers of a running sandbox.
//
// An instance is in Service.instances exactly while its sandbox may be used. Leases are granted only from
// there, under Service.mu. When suspend removes an instance under the same lock while no lease is held,
// the sandbox is unused and stays unused until the instance is put back. Service.mu guards the mutable
// fields.
type instance struct {
	id       ID
	run      string
	mode     Mode
	expires  time.Time     // ephemeral: its end when its row was read; keepalive moves the timer
	idle     time.Duration // persistent: 0 means never
	interval time.Duration // persistent: between recovery points; 0 means off

	leases  int
	free    chan struct{} // closed when the last lease ends; nil if no caller waits
	last    time.Time     // last activity
	saved   time.Time     // last activity in the row
	after   time.Time     // earliest time for its own timers to suspend it; zero means any
	looked  time.Time     // when a recovery point was last taken, or found needless or impossible
	changed bool          // whether it may have changed since its latest recovery point

	end      *time.Timer // for its expiry or the end of its idle time; nil if there is none
	recovery *time.Timer // nil if off
}

// newInstance returns the instance of a sandbox as read from its row. The sandbox counts as changed: either
// it has no recovery point yet and soon needs one, or its changes are unknown.
func newInstance(sbx Sandbox) *instance {
	return &instance{id: sbx.ID, run: sbx.Run, mode: sbx.Mode, expires: sbx.ExpiresAt, idle: sbx.IdleTimeout,
		interval: sbx.RecoveryInterval, last: sbx.LastActivityAt, saved: sbx.LastActivityAt,
		looked: sbx.StartedAt.Add(firstPoint - sbx.RecoveryInterval), changed: true}
}

// activity returns the time of the last activity, which is now while a lease is held.
func (l *instance) activity() time.Time {
	if l.leases > 0 {
		return time.Now().UTC()
	}
	return l.last
}

// due returns the end of the idle time if no activity comes before.
func (l *instance) due() time.Time {
	due := l.last.Add(l.idle)
	if due.Before(l.after) {
		return l.after
	}
	return due
}

// isIdle reports whether no lease is held and the idle time is over.
func (l *instance) isIdle() bool {
	return l.leases == 0 && l.idle > 0 && !time.Now().Before(l.due())
}

// stop ends the timers.
func (l *instance) stop() {
	for _, t := range []*time.Timer{l.end, l.recovery} {
		if t != nil {
			t.Stop()
		}
	}
}

// track makes a running sandbox usable and sets its timers. It replaces an earlier instance of the
// sandbox.
func (s *Service) track(l *instance) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.instances[l.id]; old != nil {
		old.stop()
	}
	s.instances[l.id] = l
	if s.closed {
		return
	}
	switch {
	case l.mode == Ephemeral:
		end := l.expires
		if end.Before(l.after) {
			end = l.after
		}
		l.end = time.AfterFunc(time.Until(end), func() { s.expire(l.id) })
	case l.idle > 0:
		l.end = time.AfterFunc(time.Until(l.due()), func() { s.idled(l) })
	}
	if l.mode == Persistent && l.interval > 0 {
		l.recovery = time.AfterFunc(time.Until(l.looked.Add(l.interval)), func() { s.recoveryDue(l) })
	}
}

// tracked reports whether the sandbox can be used in the run of its row.
func (s *Service) tracked(sbx Sandbox) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.instances[sbx.ID]
	return l != nil && l.run == sbx.Run
}

// untrack ends the use of a sandbox that is being removed, even if leases are held. It returns the
// last activity of a persistent sandbox for the row, or nil if it is unknown.
func (s *Service) untrack(id ID) *time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.instances[id]
	if l == nil {
		return nil
	}
	s.remove(l)
	if l.mode != Persistent {
		return nil
	}
	last := l.activity()
	return &last
}

// +checklocks:s.mu
func (s *Service) remove(l *instance) {
	l.stop()
	delete(s.instances, l.id)
}

// wind resets the timer for the end of the idle time.
//
// +checklocks:s.mu
func (s *Service) wind(l *instance) {
	if l.mode == Persistent && l.end != nil && s.instances[l.id] == l && !s.closed {
		l.end.Reset(time.Until(l.due()))
	}
}

// Lease grants access to a running sandbox's agent. While it is held the sandbox counts as in use
// and is not suspended. Release it exactly once.
type Lease struct {
	Sandbox  Sandbox // includes its Token
	service  *Service
	instance *instance
}

// Release ends the lease. The sandbox becomes idle when its last lease ends.
func (l *Lease) Release() { l.service.release(l.instance) }

// InUse returns the number of leases held.
func (s *Service) InUse() int64 { return s.leases.Load() }

// use records an activity of a sandbox that can be used in the run of its row. With pin it also
// leases the sandbox. It returns nil when the sandbox cannot be used.
func (s *Service) use(sbx Sandbox, pin bool) *instance {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.instances[sbx.ID]
	if l == nil || l.run != sbx.Run {
		return nil
	}
	l.last = time.Now().UTC()
	if pin {
		s.leases.Add(1)
		l.leases++
		l.changed = true
	} else {
		s.wind(l)
	}
	return l
}

func (s *Service) release(l *instance) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leases.Add(-1)
	l.leases--
	l.last = time.Now().UTC()
	if l.leases > 0 {
		return
	}
	if l.free != nil {
		close(l.free)
		l.free = nil
	}
	s.wind(l)
}

// errNotIdle reports that a sandbox was used after its idle timer fired.
var errNotIdle = errors.New("not idle any more")

// detachIfIdle ends the use of a sandbox whose idle time is over.
func (s *Service) detachIfIdle(_ context.Context, id ID) (*instance, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.instances[id]
	if l == nil || !l.isIdle() {
		return nil, errNotIdle
	}
	s.remove(l)
	return l, nil
}

// idled suspends a sandbox whose idle timer fired. A use in the meantime has reset the timer, or
// will do so when the last lease ends.
func (s *Service) idled(l *instance) {
	s.mu.Lock()
	idle := s.instances[l.id] == l && l.isIdle()
	s.mu.Unlock()
	if !idle {
		return
	}
	op, mine := s.ops.run(l.id, opSuspend, func(ctx context.Context) (Sandbox, error) {
		return s.act(ctx, l.id, rules[opSuspend], func(ctx context.Context, sbx Sandbox) (Sandbox, error) {
			return s.suspend(ctx, sbx, reasonIdle, s.detachIfIdle) // logs its errors
		})
	})
	if op == nil {
		return
	}
	failed := mine && op.err != nil && !errors.Is(op.err, errNotIdle)
	s.mu.Lock()
	defer s.mu.Unlock()
	if failed {
		l.after = time.Now().Add(retryAfter)
	}
	if l.leases == 0 {
		s.wind(l)
	}
}

// shown returns the row with its last activity, which may not have been saved yet.
func (s *Service) shown(sbx Sandbox) Sandbox {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.instances[sbx.ID]; l != nil && l.mode == Persistent && l.run == sbx.Run {
		sbx.LastActivityAt = l.activity()
	}
	return sbx
}

// flush saves the last activities that changed.
func (s *Service) flush(ctx context.Context) error {
	last := map[ID]time.Time{}
	s.mu.Lock()
	for id, l := range s.instances {
		if at := l.activity(); l.mode == Persistent && at.After(l.saved) {
			last[id] = at
		}
	}
	s.mu.Unlock()
	if len(last) == 0 {
		return nil
	}
	if err := s.store.SetActivity(ctx, last); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, at := range last {
		if l := s.instances[id]; l != nil && l.saved.Before(at) {
			l.saved = at
		}
	}
	return nil
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
			if err := s.flush(ctx); err != nil && ctx.Err() == nil {
				s.log.ErrorContext(ctx, "writing last activities", "error", err)
			}
			if err := s.noteDenials(ctx); err != nil && ctx.Err() == nil {
				s.log.ErrorContext(ctx, "recording denials of policies", "error", err)
			}
		}
	}
}
