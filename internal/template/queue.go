package template

import (
	"cmp"
	"slices"
	"time"
)

// order is a requested build.
type order struct {
	template string // ID
	org      string // "" for built-in templates
	name     string
	build    string // ID of the build; "" for built-in templates, whose builds get theirs when they start
	key      string // orders with equal keys share a run
	first    bool   // a user waits for it
}

// queue holds the builds that wait. It is fair: the organization that was served the longest time
// ago comes first, and all built-in templates together count as one more organization. Within an
// organization, builds that a user waits for come first, then the oldest. It is not safe for
// concurrent use.
type queue struct {
	orders []order
	served map[string]int // by organization: the number of the turn in which it was last served
	turns  int
}

// add appends an order, unless it is there already. It takes the place of one for another build of
// the template, which has ended.
func (q *queue) add(o order) {
	for i := range q.orders {
		if q.orders[i].template == o.template {
			if q.orders[i].build != o.build {
				q.orders[i] = o
			}
			return
		}
	}
	q.orders = append(q.orders, o)
}

// prefer puts an order before the others of its organization; orders of built-in templates, which
// all organizations use, before all.
func (q *queue) prefer(template string) {
	for i := range q.orders {
		if q.orders[i].template == template {
			q.orders[i].first = true
		}
	}
}

// remove removes the order for a build of a template.
func (q *queue) remove(template, build string) {
	q.orders = slices.DeleteFunc(q.orders, func(o order) bool { return o.template == template && o.build == build })
}

// next removes and returns the next of the orders that may run, together with those that share its run, or
// nil if there is none.
func (q *queue) next(may func(order) bool) []order {
	best := -1
	for i, o := range q.orders {
		if may(o) && (best < 0 || q.before(o, q.orders[best])) {
			best = i
		}
	}
	if best < 0 {
		return nil
	}
	chosen := q.orders[best]
	var out []order
	q.orders = slices.DeleteFunc(q.orders, func(o order) bool {
		if o.key == chosen.key {
			out = append(out, o)
		}
		return o.key == chosen.key
	})
	q.turns++
	q.served[chosen.org] = q.turns
	return out
}

// before reports whether a comes before b, which was added earlier.
func (q *queue) before(a, b order) bool {
	if x, y := a.org == "" && a.first, b.org == "" && b.first; x != y {
		return x
	}
	if a.org != b.org {
		return q.served[a.org] < q.served[b.org]
	}
	return a.first && !b.first
}

// retries holds the times at which failed builds of built-in templates are tried again, with
// growing delays. It is not safe for concurrent use.
type retries struct {
	due   map[string]retry // by template
	delay map[string]time.Duration
}

type retry struct {
	order order
	at    time.Time
}

// failed records a failure and returns the delay until the retry, at least least.
func (r *retries) failed(o order, least time.Duration) time.Duration {
	delay := max(min(max(2*r.delay[o.template], retryFirst), retryMost), least)
	r.delay[o.template] = delay
	r.due[o.template] = retry{o, time.Now().Add(delay)}
	return delay
}

// over removes a template.
func (r *retries) over(template string) {
	delete(r.delay, template)
	delete(r.due, template)
}

// take removes and returns the orders that are due, the earliest first.
func (r *retries) take() []order {
	var due []retry
	for template, next := range r.due {
		if !next.at.After(time.Now()) {
			due = append(due, next)
			delete(r.due, template)
		}
	}
	slices.SortFunc(due,
		func(a, b retry) int { return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.order.name, b.order.name)) })
	var orders []order
	for _, next := range due {
		orders = append(orders, next.order)
	}
	return orders
}

// next returns the time of the first retry, or the zero time if there is none.
func (r *retries) next() (at time.Time) {
	for _, next := range r.due {
		if at.IsZero() || next.at.Before(at) {
			at = next.at
		}
	}
	return at
}
