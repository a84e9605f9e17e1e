package webhook

import (
	"slices"
	"sync"
	"time"
)

const (
	// perWebhook limits the attempts at once of a webhook whose last attempt succeeded; others have one. More would press
	// on a receiver; fewer delay the deliveries of organizations with many sandboxes.
	perWebhook = 4
	// slowAttempt is the time from which on an attempt counts as slow. Slow and failing webhooks together have half of the
	// attempts, so that the other half is for receivers that answer at once.
	slowAttempt = 2 * time.Second
	// slowTime is the time for which a webhook counts as slow after a slow attempt. A receiver that is slow on purpose may
	// answer at once in between; after a longer time one that was slow once waits for no reason.
	slowTime = 10 * time.Minute
	// orgShare is the part of all attempts that one organization may have, as a divisor.
	orgShare = 4
)

// queue holds what the dispatcher knows of one webhook.
type queue struct {
	id, org string
	next    time.Time // when an attempt may be due; zero if no time is known
	rest    time.Time // no attempt before, since the store is in trouble
	busy    []string  // lanes with an attempt under way
	proven  bool      // its last attempt succeeded
	failing bool      // its last attempt failed
	slow    time.Time // the webhook counts as slow until then
	started int64     // when its last attempt began, in the count of all
}

// restrained reports whether attempts of the queue may take long.
func (q *queue) restrained(now time.Time) bool { return q.failing || q.slow.After(now) }

// idle reports whether nothing is under way, and nothing known to be due.
func (q *queue) idle() bool { return q.next.IsZero() && len(q.busy) == 0 }

// mayStart reports whether the webhook may have one more attempt, if one is due at now.
func (q *queue) mayStart(now time.Time) bool {
	most := 1
	if q.proven {
		most = perWebhook
	}
	return !q.next.IsZero() && !q.next.After(now) && !q.rest.After(now) && len(q.busy) < most
}

// queues decides which webhook is next. It holds some hundred bytes for each webhook that has something pending, and
// nothing of the deliveries.
type queues struct {
	most int           // attempts at once
	wake chan struct{} // has room for one: a queue may be due

	mu sync.Mutex
	// +checklocks:mu
	all map[string]*queue
	// +checklocks:mu
	running, restrained int // attempts under way, and those of restrained queues
	// +checklocks:mu
	orgs map[string]*orgUse
	// +checklocks:mu
	starts int64
}

// orgUse counts the attempts of an organization.
type orgUse struct {
	running int
	started int64 // when its last attempt began, in the count of all
}

func newQueues(most int) *queues {
	return &queues{most: most, wake: make(chan struct{}, 1), all: map[string]*queue{}, orgs: map[string]*orgUse{}}
}

// due notes that a webhook may have a delivery that is due at a time.
func (q *queues) due(id, org string, at time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	one := q.all[id]
	if one == nil {
		one = &queue{id: id, org: org}
		q.all[id] = one
	}
	if one.next.IsZero() || at.Before(one.next) {
		one.next = at
	}
	q.signal()
}

func (q *queues) signal() {
	select {
	case q.wake <- struct{}{}:
	default: // the dispatcher has not looked since the last signal
	}
}

// claim is the permission for one attempt of a webhook.
type claim struct {
	id, org    string
	busy       []string // the lanes in which no attempt may begin
	restrained bool
}

// pick returns a claim for the webhook that is next, or false with the time at which one is due, zero if none is known.
// The caller ends the claim with none or done. The organization with the fewest attempts is next, then the one whose
// last attempt is the longest ago, and of its webhooks the one of which that is true.
func (q *queues) pick(now time.Time) (c claim, ok bool, next time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.running >= q.most {
		return claim{}, false, time.Time{}
	}
	var best *queue
	for id, one := range q.all {
		if one.idle() && !one.restrained(now) {
			delete(q.all, id)
			continue
		}
		if at := later(one.next, one.rest); !one.next.IsZero() && at.After(now) && (next.IsZero() || at.Before(next)) {
			next = at
		}
		if one.mayStart(now) && q.fitsLocked(one, now) && (best == nil || q.beforeLocked(one, best)) {
			best = one
		}
	}
	if best == nil {
		return claim{}, false, next
	}
	q.starts++
	use := q.orgs[best.org]
	if use == nil {
		use = &orgUse{}
		q.orgs[best.org] = use
	}
	use.running++
	use.started, best.started = q.starts, q.starts
	best.next = time.Time{} // until the store says when the next one is due
	q.running++
	restrained := best.restrained(now)
	if restrained {
		q.restrained++
	}
	return claim{best.id, best.org, slices.Clone(best.busy), restrained}, true, time.Time{}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// useLocked returns the use of an organization.
// +checklocks:q.mu
func (q *queues) useLocked(org string) orgUse {
	if use := q.orgs[org]; use != nil {
		return *use
	}
	return orgUse{}
}

// fitsLocked reports whether the shares of all leave room for an attempt of one.
// +checklocks:q.mu
func (q *queues) fitsLocked(one *queue, now time.Time) bool {
	if q.useLocked(one.org).running >= max(q.most/orgShare, 1) {
		return false
	}
	return !one.restrained(now) || q.restrained < max(q.most/2, 1)
}

// beforeLocked reports whether a is before b.
// +checklocks:q.mu
func (q *queues) beforeLocked(a, b *queue) bool {
	if a.org == b.org {
		return a.started < b.started
	}
	x, y := q.useLocked(a.org), q.useLocked(b.org)
	if x.running != y.running {
		return x.running < y.running
	}
	return x.started < y.started
}

// hold marks the lane of a claim as busy, and lets another attempt of the webhook be picked.
func (q *queues) hold(c claim, lane string, now time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	one := q.all[c.id]
	one.busy = append(one.busy, lane)
	one.next = now
	q.signal()
}

// suspect learns that the delivery of a claim has failed before. If nothing is known of the webhook, as after a start,
// suspect restrains it, ends the claim, and returns true.
func (q *queues) suspect(c claim, now time.Time) bool {
	q.mu.Lock()
	one := q.all[c.id]
	known := one.proven || one.failing
	one.failing = one.failing || !known
	q.mu.Unlock()
	if !known {
		q.none(c, now, false)
	}
	return !known
}

// none ends a claim without an attempt. The next one is due at a time, zero if none is known; gone means that the
// webhook is disabled or deleted.
func (q *queues) none(c claim, at time.Time, gone bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.releaseLocked(c)
	one := q.all[c.id]
	if !at.IsZero() && (one.next.IsZero() || at.Before(one.next)) { // it may have become due meanwhile
		one.next = at
	}
	if gone && one.idle() {
		delete(q.all, c.id)
	}
}

// releaseLocked gives back what pick has counted.
// +checklocks:q.mu
func (q *queues) releaseLocked(c claim) {
	q.running--
	if c.restrained {
		q.restrained--
	}
	use := q.orgs[c.org]
	if use.running--; use.running == 0 {
		delete(q.orgs, c.org) // its turn is as good as that of one that had none
	}
}

// done ends the attempt of a claim. The store is asked again at a time.
func (q *queues) done(c claim, lane string, ok, slow bool, again time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.releaseLocked(c)
	one := q.all[c.id]
	if i := slices.Index(one.busy, lane); i >= 0 {
		one.busy = slices.Delete(one.busy, i, i+1)
	}
	one.proven, one.failing = ok, !ok
	if slow {
		one.slow = again.Add(slowTime)
	}
	if one.next.IsZero() || again.Before(one.next) {
		one.next = again
	}
	q.signal()
}

// keepBack lets no attempt of a webhook begin before a time.
func (q *queues) keepBack(id string, until time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if one := q.all[id]; one != nil {
		one.rest = until
	}
}
