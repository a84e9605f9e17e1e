package gate

import (
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// limit is how many of something there may be at once.
type limit struct{ perBox, total int }

// meter counts something by box, and refuses what goes over its limit.
type meter struct {
	limit limit

	mu sync.Mutex
	// +checklocks:mu
	total int
	// +checklocks:mu
	boxes map[any]int
}

func newMeter(l limit) *meter { return &meter{limit: l, boxes: map[any]int{}} }

// enter counts one more of a box. False: it is one too many, and not counted.
func (m *meter) enter(handle any) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.total >= m.limit.total || m.boxes[handle] >= m.limit.perBox {
		return false
	}
	m.total++
	m.boxes[handle]++
	return true
}

func (m *meter) leave(handle any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.total--
	if m.boxes[handle]--; m.boxes[handle] == 0 {
		delete(m.boxes, handle)
	}
}

// maxGiven bounds the pairs of address and name remembered for one box: about 0.5 MiB. A
// box that resolves more at once loses the ones that would end soonest.
const maxGiven = 4096

// given remembers which addresses a box was given for which names.
type given struct {
	mu sync.Mutex
	// +checklocks:mu
	boxes map[any]map[pair]time.Time // until when
}

type pair struct {
	addr netip.Addr
	name string
}

func newGiven() *given { return &given{boxes: map[any]map[pair]time.Time{}} }

func (g *given) add(handle any, name string, addrs []netip.Addr, until time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	box := g.boxes[handle]
	if box == nil {
		box = map[pair]time.Time{}
		g.boxes[handle] = box
	}
	for _, a := range addrs {
		p := pair{a, name}
		if old, ok := box[p]; ok && old.After(until) {
			continue
		}
		box[p] = until
	}
	if len(box) <= maxGiven {
		return
	}
	// An eighth goes at once, so that this is not done for every name.
	soonest := slices.SortedFunc(maps.Keys(box), func(a, b pair) int { return box[a].Compare(box[b]) })
	for _, p := range soonest[:len(box)-maxGiven*7/8] {
		delete(box, p)
	}
}

// names are those that the box was given the address for and that have not expired.
func (g *given) names(handle any, a netip.Addr, now time.Time) []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	var names []string
	for p, until := range g.boxes[handle] {
		if p.addr == a && now.Before(until) {
			names = append(names, p.name)
		}
	}
	slices.Sort(names)
	return names
}

func (g *given) expire(now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for handle, box := range g.boxes {
		maps.DeleteFunc(box, func(_ pair, until time.Time) bool { return !now.Before(until) })
		if len(box) == 0 {
			delete(g.boxes, handle)
		}
	}
}
