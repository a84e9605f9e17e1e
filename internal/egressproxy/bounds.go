package egressproxy

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// limit is the number of things of a kind that may exist at once. One owner may have three
// quarters of the total, so that something is always left for the others.
type limit struct{ perSandbox, total int }

func (l limit) perOwner() int { return max(l.perSandbox, l.total*3/4) }

// subject identifies a sandbox and its owner to the meters.
type subject struct {
	handle any
	owner  string // "": not known, and not counted
}

// meter counts things by sandbox and by owner, and refuses those beyond its limit.
type meter struct {
	limit limit

	mu sync.Mutex
	// +checklocks:mu
	total int
	// +checklocks:mu
	sandboxes map[any]int
	// +checklocks:mu
	owners map[string]int
}

func newMeter(l limit) *meter {
	return &meter{limit: l, sandboxes: map[any]int{}, owners: map[string]int{}}
}

// enter counts one more for a sandbox. It returns false, and does not count, beyond the limit.
func (m *meter) enter(w subject) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.total >= m.limit.total || m.sandboxes[w.handle] >= m.limit.perSandbox ||
		w.owner != "" && m.owners[w.owner] >= m.limit.perOwner() {
		return false
	}
	m.total++
	m.sandboxes[w.handle]++
	if w.owner != "" {
		m.owners[w.owner]++
	}
	return true
}

func (m *meter) leave(w subject) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.total--
	if m.sandboxes[w.handle]--; m.sandboxes[w.handle] == 0 {
		delete(m.sandboxes, w.handle)
	}
	if w.owner == "" {
		return
	}
	if m.owners[w.owner]--; m.owners[w.owner] == 0 {
		delete(m.owners, w.owner)
	}
}

const (
	// DefaultQuestionsPerSecond is the number of questions that a sandbox may ask the resolver in
	// a second. Package managers and browsers ask some hundred at once, and then few; a lower
	// limit would fail their look-ups, a higher one would load the name servers.
	DefaultQuestionsPerSecond = 100

	// questionsBurst is the number of seconds' worth of questions that may come at once.
	questionsBurst = 4
	// questionsOwner and questionsAll are the rates that one owner and all together may have, in
	// sandboxes' worth. Name servers of the host's network answer that much without trouble.
	questionsOwner = 20
	questionsAll   = 40
)

// pace limits the rate of something, by sandbox, by owner, and in all.
type pace struct {
	perSecond int

	mu sync.Mutex
	// +checklocks:mu
	all *rate.Limiter
	// +checklocks:mu
	sandboxes map[any]*rate.Limiter
	// +checklocks:mu
	owners map[string]*rate.Limiter
}

func newPace(perSecond int) *pace {
	return &pace{perSecond: perSecond, all: paceOf(perSecond * questionsAll), sandboxes: map[any]*rate.Limiter{},
		owners: map[string]*rate.Limiter{}}
}

func paceOf(perSecond int) *rate.Limiter {
	return rate.NewLimiter(rate.Limit(perSecond), questionsBurst*perSecond)
}

// step counts one more for a sandbox. It returns false if it comes too soon.
func (p *pace) step(w subject, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	sandbox, owner := p.sandboxes[w.handle], p.owners[w.owner]
	if sandbox == nil {
		sandbox = paceOf(p.perSecond)
		p.sandboxes[w.handle] = sandbox
	}
	if owner == nil && w.owner != "" {
		owner = paceOf(p.perSecond * questionsOwner)
		p.owners[w.owner] = owner
	}
	// A sandbox beyond its own rate takes nothing from the shared ones.
	return sandbox.AllowN(now, 1) && (owner == nil || owner.AllowN(now, 1)) && p.all.AllowN(now, 1)
}

// expire removes the limiters that are full, which are no different from new ones.
func (p *pace) expire(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	full := func(l *rate.Limiter) bool { return l.TokensAt(now) >= float64(l.Burst()) }
	maps.DeleteFunc(p.sandboxes, func(_ any, l *rate.Limiter) bool { return full(l) })
	maps.DeleteFunc(p.owners, func(_ string, l *rate.Limiter) bool { return full(l) })
}

// maxGrants bounds the pairs of address and name remembered for one sandbox, about 0.5 MiB.
// Beyond it the pairs that expire soonest are forgotten, and their connections are refused.
const maxGrants = 4096

// grants remembers which addresses each sandbox was given for which names.
type grants struct {
	mu sync.Mutex
	// +checklocks:mu
	sandboxes map[any]*grantedNames
}

// grantedNames holds the grants of one sandbox. It has a lock of its own, since searching it
// takes a while.
type grantedNames struct {
	mu sync.Mutex
	// +checklocks:mu
	names map[netip.Addr]map[string]time.Time // the time each name expires
	// +checklocks:mu
	count int
}

func newGrants() *grants { return &grants{sandboxes: map[any]*grantedNames{}} }

func (g *grants) of(handle any, add bool) *grantedNames {
	g.mu.Lock()
	defer g.mu.Unlock()
	b := g.sandboxes[handle]
	if b == nil && add {
		b = &grantedNames{names: map[netip.Addr]map[string]time.Time{}}
		g.sandboxes[handle] = b
	}
	return b
}

func (g *grants) add(handle any, name string, addrs []netip.Addr, until time.Time) {
	b := g.of(handle, true)
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, a := range addrs {
		if b.names[a] == nil {
			b.names[a] = map[string]time.Time{}
		}
		old, ok := b.names[a][name]
		if !ok {
			b.count++
		}
		if old.Before(until) {
			b.names[a][name] = until
		}
	}
	if b.count > maxGrants {
		b.forgetLocked()
	}
}

// forgetLocked forgets the eighth that expires soonest, so that it does not run for every name.
//
// +checklocks:b.mu
func (b *grantedNames) forgetLocked() {
	var ends []time.Time
	for _, names := range b.names {
		ends = slices.AppendSeq(ends, maps.Values(names))
	}
	slices.SortFunc(ends, time.Time.Compare)
	over := b.count - maxGrants*7/8
	last := ends[over-1]
	b.expireLocked(func(until time.Time) bool {
		if over == 0 || until.After(last) {
			return false
		}
		over--
		return true
	})
}

// +checklocks:b.mu
func (b *grantedNames) expireLocked(over func(until time.Time) bool) {
	for a, names := range b.names {
		maps.DeleteFunc(names, func(_ string, until time.Time) bool { return over(until) })
		if len(names) == 0 {
			delete(b.names, a)
		}
	}
	b.count = 0
	for _, names := range b.names {
		b.count += len(names)
	}
}

// names returns the names that the sandbox was given the address for and that have not expired.
func (g *grants) names(handle any, a netip.Addr, now time.Time) []string {
	b := g.of(handle, false)
	if b == nil {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	var names []string
	for name, until := range b.names[a] {
		if now.Before(until) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func (g *grants) expire(now time.Time) {
	g.mu.Lock()
	all := maps.Clone(g.sandboxes)
	g.mu.Unlock()
	for handle, b := range all {
		b.mu.Lock()
		b.expireLocked(func(until time.Time) bool { return !now.Before(until) })
		empty := b.count == 0
		b.mu.Unlock()
		if empty {
			g.forget(handle, b)
		}
	}
}

// forget removes the entry of a sandbox that has no names. A grant added at that moment is lost,
// and its connections are refused until the sandbox asks again.
func (g *grants) forget(handle any, b *grantedNames) {
	g.mu.Lock()
	defer g.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.count == 0 && g.sandboxes[handle] == b {
		delete(g.sandboxes, handle)
	}
}
