package egressproxy

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// limit says how many of something there may be at once. One owner of boxes may have three
// quarters of the total, so that there is always something left for the others.
type limit struct{ perSandbox, total int }

func (l limit) perOwner() int { return max(l.perSandbox, l.total*3/4) }

// who is a box and its owner, as the meters know them.
type who struct {
	handle any
	owner  string // "" is not known, and not counted
}

// meter counts something by box and by owner, and refuses what goes over its limit.
type meter struct {
	limit limit

	mu sync.Mutex
	// +checklocks:mu
	total int
	// +checklocks:mu
	boxes map[any]int
	// +checklocks:mu
	owners map[string]int
}

func newMeter(l limit) *meter {
	return &meter{limit: l, boxes: map[any]int{}, owners: map[string]int{}}
}

// enter counts one more of a box. False: it is one too many, and not counted.
func (m *meter) enter(w who) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.total >= m.limit.total || m.boxes[w.handle] >= m.limit.perSandbox || w.owner != "" && m.owners[w.owner] >= m.limit.perOwner() {
		return false
	}
	m.total++
	m.boxes[w.handle]++
	if w.owner != "" {
		m.owners[w.owner]++
	}
	return true
}

func (m *meter) leave(w who) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.total--
	if m.boxes[w.handle]--; m.boxes[w.handle] == 0 {
		delete(m.boxes, w.handle)
	}
	if w.owner == "" {
		return
	}
	if m.owners[w.owner]--; m.owners[w.owner] == 0 {
		delete(m.owners, w.owner)
	}
}

const (
	// DefaultQuestionsPerSecond is how many questions a box may ask a second: package
	// managers and browsers ask some hundred at once, and then few.
	DefaultQuestionsPerSecond = 100

	// questionsBurst is how many seconds' worth may come at once.
	questionsBurst = 4
	// questionsOwner and questionsAll are how many boxes' worth one owner, and all together,
	// may ask: name servers of the host's network answer so much without trouble.
	questionsOwner = 20
	questionsAll   = 40
)

// pace bounds how often something happens, by box, by owner, and in all.
type pace struct {
	perSecond int

	mu sync.Mutex
	// +checklocks:mu
	all *rate.Limiter
	// +checklocks:mu
	boxes map[any]*rate.Limiter
	// +checklocks:mu
	owners map[string]*rate.Limiter
}

func newPace(perSecond int) *pace {
	return &pace{perSecond: perSecond, all: paceOf(perSecond * questionsAll), boxes: map[any]*rate.Limiter{}, owners: map[string]*rate.Limiter{}}
}

func paceOf(perSecond int) *rate.Limiter {
	return rate.NewLimiter(rate.Limit(perSecond), questionsBurst*perSecond)
}

// step counts one more of a box. False: it comes too soon.
func (p *pace) step(w who, now time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	box, owner := p.boxes[w.handle], p.owners[w.owner]
	if box == nil {
		box = paceOf(p.perSecond)
		p.boxes[w.handle] = box
	}
	if owner == nil && w.owner != "" {
		owner = paceOf(p.perSecond * questionsOwner)
		p.owners[w.owner] = owner
	}
	// One that asks too much itself takes nothing of what it shares.
	return box.AllowN(now, 1) && (owner == nil || owner.AllowN(now, 1)) && p.all.AllowN(now, 1)
}

// expire forgets those that could ask as much again as they ever could.
func (p *pace) expire(now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	full := func(l *rate.Limiter) bool { return l.TokensAt(now) >= float64(l.Burst()) }
	maps.DeleteFunc(p.boxes, func(_ any, l *rate.Limiter) bool { return full(l) })
	maps.DeleteFunc(p.owners, func(_ string, l *rate.Limiter) bool { return full(l) })
}

// maxGiven bounds the pairs of address and name remembered for one box: about 0.5 MiB. A
// box that resolves more at once loses the ones that would end soonest.
const maxGiven = 4096

// given remembers which addresses a box was given for which names.
type given struct {
	mu sync.Mutex
	// +checklocks:mu
	boxes map[any]*givenNames
}

// givenNames has a lock of its own: looking through what one box was given takes a while.
type givenNames struct {
	mu sync.Mutex
	// +checklocks:mu
	names map[netip.Addr]map[string]time.Time // until when
	// +checklocks:mu
	count int
}

func newGiven() *given { return &given{boxes: map[any]*givenNames{}} }

func (g *given) box(handle any, add bool) *givenNames {
	g.mu.Lock()
	defer g.mu.Unlock()
	b := g.boxes[handle]
	if b == nil && add {
		b = &givenNames{names: map[netip.Addr]map[string]time.Time{}}
		g.boxes[handle] = b
	}
	return b
}

func (g *given) add(handle any, name string, addrs []netip.Addr, until time.Time) {
	b := g.box(handle, true)
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
	if b.count > maxGiven {
		b.forgetLocked()
	}
}

// forgetLocked forgets the eighth that ends soonest, so that this is not done for every name.
//
// +checklocks:b.mu
func (b *givenNames) forgetLocked() {
	var ends []time.Time
	for _, names := range b.names {
		ends = slices.AppendSeq(ends, maps.Values(names))
	}
	slices.SortFunc(ends, time.Time.Compare)
	over := b.count - maxGiven*7/8
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
func (b *givenNames) expireLocked(over func(until time.Time) bool) {
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

// names are those that the box was given the address for and that have not expired.
func (g *given) names(handle any, a netip.Addr, now time.Time) []string {
	b := g.box(handle, false)
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

func (g *given) expire(now time.Time) {
	g.mu.Lock()
	all := maps.Clone(g.boxes)
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

// forget drops a box that has nothing. What is added to it in this moment is lost, and its
// connections are refused until it asks again.
func (g *given) forget(handle any, b *givenNames) {
	g.mu.Lock()
	defer g.mu.Unlock()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.count == 0 && g.boxes[handle] == b {
		delete(g.boxes, handle)
	}
}
