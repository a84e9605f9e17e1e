package sandbox

import (
	"context"
	"errors"
	"time"
)

const (
	// flushEvery is how often last activities go to the rows. A server that is
	// killed forgets at most so much of them (5 s are promised); each time is one
	// transaction, and none when nothing changed.
	flushEvery = 2 * time.Second
	// flushTimeout bounds the last flush of a server that shuts down: one
	// transaction, milliseconds on a disk that works.
	flushTimeout = 5 * time.Second
	// retryAfter is how long a sandbox is left alone by its own timers after what
	// they wanted failed: a full disk is not empty a second later, and each try may
	// stop the sandbox for a moment.
	retryAfter = time.Minute
)

// life is what is kept in memory of one life of a running sandbox: who uses it, when
// it was used last, and its timers.
//
// It is in Service.lives exactly while the sandbox may be used. Leases are given
// under Service.mu and only from there, so whoever takes it out under the same
// lock while no lease is held (suspend) can be sure that nobody uses the sandbox
// and that nobody will before it is put back. Service.mu guards what can change.
type life struct {
	id       ID
	run      string
	mode     Mode
	expires  time.Time     // ephemeral: when it was to end as its row was read; keepalive moves the timer
	idle     time.Duration // persistent: 0 is never
	interval time.Duration // persistent: between recovery points; 0 is off

	leases  int
	free    chan struct{} // if somebody waits for the last lease to end: closed then
	last    time.Time     // activity
	saved   time.Time     // the last activity that the row has
	after   time.Time     // if not zero, its own timers suspend it not before
	looked  time.Time     // when a recovery point was last taken, or found needless or impossible
	changed bool          // it may have changed since its latest recovery point

	end      *time.Timer // its expiry, or the end of its idle time; nil if there is none
	recovery *time.Timer // nil if off
}

// newLife is the life of a sandbox as its row is. It is taken as changed: it has no
// recovery point yet, which is then soon due, or nobody knows what happened since.
func newLife(box Sandbox) *life {
	return &life{id: box.ID, run: box.Run, mode: box.Mode, expires: box.ExpiresAt, idle: box.IdleTimeout, interval: box.RecoveryInterval,
		last: box.LastActivityAt, saved: box.LastActivityAt, looked: box.StartedAt.Add(firstPoint - box.RecoveryInterval), changed: true}
}

// activity is the last one: now while somebody uses it.
func (l *life) activity() time.Time {
	if l.leases > 0 {
		return time.Now().UTC()
	}
	return l.last
}

// due is when its idle time is over, if nothing happens before.
func (l *life) due() time.Time {
	due := l.last.Add(l.idle)
	if due.Before(l.after) {
		return l.after
	}
	return due
}

// isIdle reports whether nobody uses it and its idle time is over.
func (l *life) isIdle() bool {
	return l.leases == 0 && l.idle > 0 && !time.Now().Before(l.due())
}

// stop ends its timers.
func (l *life) stop() {
	for _, t := range []*time.Timer{l.end, l.recovery} {
		if t != nil {
			t.Stop()
		}
	}
}

// track makes a running sandbox usable and sets its timers. An earlier life of it
// is forgotten.
func (s *Service) track(l *life) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.lives[l.id]; old != nil {
		old.stop()
	}
	s.lives[l.id] = l
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

// tracked reports whether the sandbox can be used in the life its row is in.
func (s *Service) tracked(box Sandbox) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.lives[box.ID]
	return l != nil && l.run == box.Run
}

// untrack ends the use of a sandbox that is going, used or not. It returns its last
// activity if it is persistent, for the row; nil if that is not known.
func (s *Service) untrack(id ID) *time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.lives[id]
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
func (s *Service) remove(l *life) {
	l.stop()
	delete(s.lives, l.id)
}

// wind sets the timer of the end of its idle time to what it is now.
//
// +checklocks:s.mu
func (s *Service) wind(l *life) {
	if l.mode == Persistent && l.end != nil && s.lives[l.id] == l && !s.closed {
		l.end.Reset(time.Until(l.due()))
	}
}

// Lease is the right to talk to a running sandbox's agent. While it is held the
// sandbox counts as in use and is not suspended. Release it exactly once.
type Lease struct {
	Sandbox Sandbox // with its Token
	service *Service
	life    *life
}

// Release ends the lease: from now on the sandbox is idle, if it was the last.
func (l *Lease) Release() { l.service.release(l.life) }

// InUse is the number of leases held now.
func (s *Service) InUse() int64 { return s.leases.Load() }

// use notes an activity of a sandbox that can be used in the life its row is in, and
// with pin leases it. It returns nil when it cannot be used (any more).
func (s *Service) use(box Sandbox, pin bool) *life {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.lives[box.ID]
	if l == nil || l.run != box.Run {
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

func (s *Service) release(l *life) {
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

// errNotIdle says that a sandbox whose idle timer fired has been used meanwhile.
var errNotIdle = errors.New("not idle any more")

// partIfIdle ends the use of a sandbox whose idle time is over.
func (s *Service) partIfIdle(_ context.Context, id ID) (*life, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.lives[id]
	if l == nil || !l.isIdle() {
		return nil, errNotIdle
	}
	s.remove(l)
	return l, nil
}

// idled suspends a sandbox whose idle timer fired. If it was used meanwhile, whoever
// used it has wound the timer, or will at the end of the last lease.
func (s *Service) idled(l *life) {
	s.mu.Lock()
	idle := s.lives[l.id] == l && l.isIdle()
	s.mu.Unlock()
	if !idle {
		return
	}
	op, mine := s.begin(l.id, opSuspend)
	if op == nil {
		return
	}
	var failed bool
	if mine {
		box, err := s.suspend(op.ctx, l.id, reasonIdle, s.partIfIdle)
		failed = err != nil && !errors.Is(err, errNotIdle) // suspend has logged it
		s.finish(l.id, op, box, err)
	} else {
		<-op.done
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if failed {
		l.after = time.Now().Add(retryAfter)
	}
	if l.leases == 0 {
		s.wind(l)
	}
}

// shown is a row with the last activity that it does not have yet.
func (s *Service) shown(box Sandbox) Sandbox {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.lives[box.ID]; l != nil && l.mode == Persistent && l.run == box.Run {
		box.LastActivityAt = l.activity()
	}
	return box
}

// flush writes the last activities that changed to the rows.
func (s *Service) flush(ctx context.Context) error {
	last := map[ID]time.Time{}
	s.mu.Lock()
	for id, l := range s.lives {
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
		if l := s.lives[id]; l != nil && l.saved.Before(at) {
			l.saved = at
		}
	}
	return nil
}

// flushing writes last activities and denials down until ctx ends.
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
				s.log.ErrorContext(ctx, "writing what policies denied", "error", err)
			}
		}
	}
}
