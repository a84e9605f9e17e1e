package sandbox

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// instance holds in memory the use, the last activity and the timers of a running sandbox.
//
// An instance is in [instances] exactly while its sandbox may be used. Leases are granted only from
// there, under its lock. When suspend removes an instance under the same lock while no lease is held,
// the sandbox is unused and stays unused until the instance is put back. The lock guards the mutable
// fields.
type instance struct {
	id       ID
	run      string
	mode     Mode
	idle     time.Duration // persistent: 0 means never
	interval time.Duration // persistent: between recovery points; 0 means off

	leases  int
	free    chan struct{} // closed when the last lease ends; nil if no caller waits
	last    time.Time     // last activity
	saved   time.Time     // last activity in the row
	after   time.Time     // earliest time for its own timers to suspend it; zero means any
	looked  time.Time     // when a recovery point was last taken, or found needless or impossible
	changed bool          // whether it may have changed since its latest recovery point

	about About // as in the row; ExpiresAt may be old unless known
	known bool  // whether about is as in the row
	moves int   // changes of about.ExpiresAt

	end      *time.Timer // for its expiry or the end of its idle time; nil if there is none
	recovery *time.Timer // nil if off
}

// newInstance returns the instance of a sandbox as read from its row. The sandbox counts as changed: either
// it has no recovery point yet and soon needs one, or its changes are unknown.
func newInstance(sbx Sandbox) *instance {
	return &instance{id: sbx.ID, run: sbx.Run, mode: sbx.Mode, idle: sbx.IdleTimeout,
		interval: sbx.RecoveryInterval, last: sbx.LastActivityAt, saved: sbx.LastActivityAt,
		looked: sbx.StartedAt.Add(firstRecovery - sbx.RecoveryInterval), changed: true,
		about: sbx.about(), known: true}
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

// instances holds the instances of running sandboxes while they may be used, and sets their timers.
type instances struct {
	// The timers call these: expired at the end of an ephemeral sandbox, idled at the end of the idle
	// time, and recoveryDue when a recovery point is due.
	expired     func(ID)
	idled       func(*instance)
	recoveryDue func(*instance)

	leases atomic.Int64

	mu sync.Mutex
	// +checklocks:mu
	of map[ID]*instance
	// +checklocks:mu
	closed bool // no more timers may start
}

// track makes a running sandbox usable and sets its timers. It replaces an earlier instance of the
// sandbox.
func (u *instances) track(l *instance) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if old := u.of[l.id]; old != nil {
		old.stop()
	}
	u.of[l.id] = l
	if u.closed {
		return
	}
	switch {
	case l.mode == Ephemeral:
		end := l.about.ExpiresAt
		if end.Before(l.after) {
			end = l.after
		}
		l.end = time.AfterFunc(time.Until(end), func() { u.expired(l.id) })
	case l.idle > 0:
		l.end = time.AfterFunc(time.Until(l.due()), func() { u.idled(l) })
	}
	if l.mode == Persistent && l.interval > 0 {
		l.recovery = time.AfterFunc(time.Until(l.looked.Add(l.interval)), func() { u.recoveryDue(l) })
	}
}

// tracked reports whether the sandbox can be used in the run of its row.
func (u *instances) tracked(sbx Sandbox) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	l := u.of[sbx.ID]
	return l != nil && l.run == sbx.Run
}

// untrack ends the use of a sandbox that is being removed, even if leases are held. It returns the
// last activity of a persistent sandbox for the row, or nil if it is unknown.
func (u *instances) untrack(id ID) *time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	l := u.of[id]
	if l == nil {
		return nil
	}
	u.removeLocked(l)
	if l.mode != Persistent {
		return nil
	}
	last := l.activity()
	return &last
}

// +checklocks:u.mu
func (u *instances) removeLocked(l *instance) {
	l.stop()
	delete(u.of, l.id)
}

// windLocked resets the timer for the end of the idle time.
//
// +checklocks:u.mu
func (u *instances) windLocked(l *instance) {
	if l.mode == Persistent && l.end != nil && u.of[l.id] == l && !u.closed {
		l.end.Reset(time.Until(l.due()))
	}
}

// resetEnd sets the timer of a sandbox's end to fire at the time that when returns, unless the sandbox
// is used in another run; "" means any.
func (u *instances) resetEnd(id ID, run string, when func(*instance) time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if l := u.of[id]; l != nil && (run == "" || l.run == run) && l.end != nil && !u.closed {
		l.end.Reset(time.Until(when(l)))
	}
}

// The row of a sandbox is changed before its instance, and not under the lock of the instances. So a
// row that was read or written may be old by the time it reaches the instance. The count of moves
// detects that: a row that was read or written is used only if the count has not changed since.

// about returns the description of a sandbox and the number of moves, and reports whether the row
// has the same description. The number is -1 for a sandbox that cannot be used.
func (u *instances) about(id ID) (about About, moves int, known bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	l := u.of[id]
	if l == nil {
		return About{}, -1, false
	}
	return l.about, l.moves, l.known
}

// learn takes the description of a sandbox from a row that was read after seen was the number of
// moves.
func (u *instances) learn(sbx Sandbox, seen int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if l := u.of[sbx.ID]; l != nil && l.run == sbx.Run && l.moves == seen {
		l.about, l.known = sbx.about(), true
	}
}

// forget makes the description of a sandbox unknown, since its row may have changed.
func (u *instances) forget(id ID) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if l := u.of[id]; l != nil {
		l.known = false
		l.moves++
	}
}

// moveEnd takes the end of an ephemeral sandbox from a row that was read or written after seen was
// the number of moves, and sets the timer. It returns false and changes nothing if the end was moved
// in between.
func (u *instances) moveEnd(sbx Sandbox, seen int) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	l := u.of[sbx.ID]
	if l == nil || l.run != sbx.Run {
		return true
	}
	if l.moves != seen {
		return false
	}
	l.about, l.known = sbx.about(), true
	l.moves++
	if l.end != nil && !u.closed {
		l.end.Reset(time.Until(sbx.ExpiresAt))
	}
	return true
}

// use records an activity of a sandbox that can be used in the run of its row. With pin it also
// leases the sandbox. It returns nil when the sandbox cannot be used.
func (u *instances) use(sbx Sandbox, pin bool) *instance {
	u.mu.Lock()
	defer u.mu.Unlock()
	l := u.of[sbx.ID]
	if l == nil || l.run != sbx.Run {
		return nil
	}
	l.last = time.Now().UTC()
	if pin {
		u.leases.Add(1)
		l.leases++
		l.changed = true
	} else {
		u.windLocked(l)
	}
	return l
}

func (u *instances) release(l *instance) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.leases.Add(-1)
	l.leases--
	l.last = time.Now().UTC()
	if l.leases > 0 {
		return
	}
	if l.free != nil {
		close(l.free)
		l.free = nil
	}
	u.windLocked(l)
}

// detachFunc ends the use of a sandbox; its caller holds the operation.
type detachFunc func(context.Context, ID) (*instance, error)

// errNotIdle reports that a sandbox was used after its idle timer fired.
var errNotIdle = errors.New("not idle any more")

// detachIfIdle ends the use of a sandbox whose idle time is over.
func (u *instances) detachIfIdle(_ context.Context, id ID) (*instance, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	l := u.of[id]
	if l == nil || !l.isIdle() {
		return nil, errNotIdle
	}
	u.removeLocked(l)
	return l, nil
}

// errGone reports that an operation on a sandbox found no instance to end the use of.
func errGone(id ID) error {
	return fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s does not run any more", id)
}

// detachWhenFree ends the use of a sandbox as soon as no call is in flight.
func (u *instances) detachWhenFree(ctx context.Context, id ID) (*instance, error) {
	patience := time.NewTimer(leaseGrace)
	defer patience.Stop()
	for {
		l, free, calls := u.detachIfFree(id)
		switch {
		case l != nil:
			return l, nil
		case free == nil:
			return nil, errGone(id)
		}
		select {
		case <-free:
		case <-patience.C:
			return nil, fault.New(fault.Conflict, fault.CodeSandboxInUse,
				"sandbox %s is in use, calls in flight: %d; suspend it when they have ended", id, calls)
		case <-ctx.Done():
			return nil, fault.New(fault.Conflict, fault.CodeSandboxNotRunning,
				"sandbox %s was destroyed before it was suspended", id)
		}
	}
}

// detachIfFree ends the use of a sandbox without leases. Otherwise it returns their number and a
// channel that is closed when the last one ends.
func (u *instances) detachIfFree(id ID) (_ *instance, free chan struct{}, leases int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	l := u.of[id]
	if l == nil {
		return nil, nil, 0
	}
	if l.leases == 0 {
		u.removeLocked(l)
		return l, nil, 0
	}
	if l.free == nil {
		l.free = make(chan struct{})
	}
	return nil, l.free, l.leases
}

// detachNow ends the use of a sandbox even while leases are held. The machine breaks their
// connections when it suspends the sandbox.
func (u *instances) detachNow(_ context.Context, id ID) (*instance, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	l := u.of[id]
	if l == nil {
		return nil, errGone(id)
	}
	u.removeLocked(l)
	return l, nil
}

// idle reports whether the instance may be used and its idle time is over.
func (u *instances) idle(l *instance) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.of[l.id] == l && l.isIdle()
}

// rewind sets the idle timer anew after a suspend that was tried. After one that failed, the timer
// waits for the duration retryAfter.
func (u *instances) rewind(l *instance, failed bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if failed {
		l.after = time.Now().Add(retryAfter)
	}
	if l.leases == 0 {
		u.windLocked(l)
	}
}

// markChanged records whether a sandbox may differ from its latest recovery point. A sandbox with
// leases while the recovery point is taken always may.
func (u *instances) markChanged(id ID, changed bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if l := u.of[id]; l != nil {
		l.changed, l.looked = changed || l.leases > 0, time.Now()
	}
}

// changed reports whether the instance may be used, and whether the sandbox may differ from its
// latest recovery point.
func (u *instances) changed(l *instance) (there, changed bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.of[l.id] == l, l.changed
}

// nextRecovery sets the timer for the next recovery point. looked says that the sandbox was looked at
// now.
func (u *instances) nextRecovery(l *instance, looked bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.of[l.id] != l || u.closed {
		return
	}
	if looked {
		l.looked = time.Now()
	}
	l.recovery.Reset(time.Until(l.looked.Add(l.interval)))
}

// shown returns the row with its last activity, which may not have been saved yet.
func (u *instances) shown(sbx Sandbox) Sandbox {
	u.mu.Lock()
	defer u.mu.Unlock()
	if l := u.of[sbx.ID]; l != nil && l.mode == Persistent && l.run == sbx.Run {
		sbx.LastActivityAt = l.activity()
	}
	return sbx
}

// flush saves the last activities that changed.
func (u *instances) flush(ctx context.Context, store SandboxStore) error {
	last := u.unsaved()
	if len(last) == 0 {
		return nil
	}
	if err := store.SetActivity(ctx, last); err != nil {
		return err
	}
	u.saved(last)
	return nil
}

// unsaved returns the last activities that the rows do not have.
func (u *instances) unsaved() map[ID]time.Time {
	u.mu.Lock()
	defer u.mu.Unlock()
	last := map[ID]time.Time{}
	for id, l := range u.of {
		if at := l.activity(); l.mode == Persistent && at.After(l.saved) {
			last[id] = at
		}
	}
	return last
}

// saved records that the rows have these last activities.
func (u *instances) saved(last map[ID]time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for id, at := range last {
		if l := u.of[id]; l != nil && l.saved.Before(at) {
			l.saved = at
		}
	}
}

// close stops the timers. No more start after it.
func (u *instances) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	for _, l := range u.of {
		l.stop()
	}
}
