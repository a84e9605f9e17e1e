package sandbox

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"
)

// Pooled describes a sandbox in the warm pool: booted, without an owner, waiting to be claimed. The
// sandbox that claims it takes its ID, Run and Token. It has a row only once it is ready, so a server
// that dies while it prepares one leaves a sandbox without a row.
type Pooled struct {
	ID              ID
	Run             string
	Token           string // secret, like Sandbox.Token
	OrgID           string // an organization that may use the template
	Template        string // name, for display
	TemplateID      string
	TemplateVersion int
	Shape
	CreatedAt time.Time
}

// PoolConfig holds the operator's settings for the pool.
type PoolConfig struct {
	Enabled    bool
	Target     int // pooled sandboxes for each template in use, at its default size
	MaxMembers int // of all templates together
	// Templates sets targets for single templates. Others have Target while they are in use.
	Templates []PoolTemplate
	// Prepared, if not nil, is called with the duration and error of each preparation of a pooled sandbox. It
	// must not block.
	Prepared func(took time.Duration, err error)
}

// PoolTemplate sets the target of one template at one size. Target 0 turns it off.
type PoolTemplate struct {
	Template string // name or ID
	OrgID    string // its owner; "" means that it is built in
	Size     string // "" means the template's default
	Target   int
}

const (
	// inUseFor sets how long a template counts as in use after its last create. A longer time keeps
	// memory for unused templates; a shorter one makes the first create after a break a cold one.
	inUseFor = 4 * time.Hour
	// demandOver and demandAhead set how the target follows creates: it is the number of creates
	// expected within demandAhead, at the average rate of the last demandOver. A longer demandOver
	// reacts later; a longer demandAhead keeps more pooled sandboxes.
	demandOver  = time.Minute
	demandAhead = 10 * time.Second
)

// demand holds the requests for a template at one size, and the number of pooled sandboxes that they
// justify.
type demand struct {
	orgID   string
	version TemplateVersion // newest known version
	kind    Kind
	fixed   bool // the target is the operator's; it remains without use
	target  int
	used    time.Time
	taken   [6]int    // creates in each sixth of demandOver, as a ring
	slot    int64     // the sixth that was counted last
	claimed int       // creates from the pool since the server's start
	paused  time.Time // end of the pause after a failed preparation
	share   int       // its part of the allowed pooled sandboxes; see share
}

const sixth = demandOver / 6

// roll forgets creates older than demandOver.
func (d *demand) roll(now time.Time) {
	slot := now.UnixNano() / int64(sixth)
	for i := max(d.slot+1, slot-int64(len(d.taken))+1); i <= slot; i++ {
		d.taken[i%int64(len(d.taken))] = 0
	}
	d.slot = slot
}

func (d *demand) use(now time.Time) {
	d.roll(now)
	d.taken[d.slot%int64(len(d.taken))]++
	d.used = now
}

// wants returns its target at the time.
func (d *demand) wants(now time.Time) int {
	d.roll(now)
	if d.target == 0 || d.kind.TemplateID == "" || !d.fixed && now.Sub(d.used) > inUseFor {
		return 0
	}
	sum := 0
	for _, n := range d.taken {
		sum += n
	}
	share := int(demandOver / demandAhead)
	return max(d.target, (sum+share-1)/share)
}

// demandKey identifies a demand.
type demandKey struct{ templateID, size string }

// share divides the allowed number of pooled sandboxes, most, among the demands. In each round every demand
// gets one until it has its target. Demands with a target of the operator come first, then those
// used last.
func share(demands map[demandKey]*demand, most int, now time.Time) []*demand {
	order := slices.SortedFunc(maps.Values(demands), func(a, b *demand) int {
		if a.fixed != b.fixed {
			if a.fixed {
				return -1
			}
			return 1
		}
		return cmp.Or(b.used.Compare(a.used), cmp.Compare(a.kind.TemplateID, b.kind.TemplateID),
			cmp.Compare(a.kind.Size, b.kind.Size))
	})
	for _, d := range order {
		d.share = 0
	}
	for given := true; given; {
		given = false
		for _, d := range order {
			if most > 0 && d.share < d.wants(now) {
				d.share++
				most--
				given = true
			}
		}
	}
	return order
}

// ready is a pooled sandbox that can be claimed, with its kind.
type ready struct {
	Pooled
	kind Kind
}

// pool holds in memory the pooled sandboxes that can be claimed, and the demands for them.
type pool struct {
	cfg  PoolConfig
	work chan struct{} // holds a token when there may be work

	mu sync.Mutex
	// +checklocks:mu
	ready map[ID]ready // guarded by mu
	// +checklocks:mu
	demands map[demandKey]*demand // guarded by mu
	// +checklocks:mu
	counts PoolCounts // guarded by mu
}

// PoolCounts counts creates while the pool was on.
type PoolCounts struct {
	Ready int   // present pooled sandboxes
	Warm  int64 // creates served by the pool
	Cold  int64 // creates that the pool could not serve
}

func newPool(cfg PoolConfig) *pool {
	return &pool{cfg: cfg, work: make(chan struct{}, 1), ready: map[ID]ready{}, demands: map[demandKey]*demand{}}
}

// nudge wakes keepPool, since there may be work.
func (p *pool) nudge() {
	select {
	case p.work <- struct{}{}:
	default:
	}
}

func (p *pool) has(id ID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ready := p.ready[id]
	return ready
}

func (p *pool) add(m Pooled) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.addLocked(m)
}

// +checklocks:p.mu
func (p *pool) addLocked(m Pooled) Kind {
	kind := m.kind()
	p.ready[m.ID] = ready{m, kind}
	return kind
}

// remove takes a pooled sandbox out of the pool and reports whether it was there. After that no other
// operation claims it.
func (p *pool) remove(id ID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ready := p.ready[id]
	delete(p.ready, id)
	return ready
}

// take removes and returns the oldest pooled sandbox for which of, and then begin, return true. Only the
// holder of a pooled sandbox's operation puts it in, so after begin no other operation holds the pooled sandbox.
func (p *pool) take(of func(ready) bool, begin func(ID) bool) (Pooled, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.pooledLocked() {
		if of(m) && begin(m.ID) {
			delete(p.ready, m.ID)
			return m.Pooled, true
		}
	}
	return Pooled{}, false
}

// pooled sandboxes returns the pooled sandboxes that can be claimed, oldest first.
func (p *pool) pooled() []ready {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pooledLocked()
}

// +checklocks:p.mu
func (p *pool) pooledLocked() []ready {
	return slices.SortedFunc(maps.Values(p.ready), func(a, b ready) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
}

// demandLocked returns the demand for a template at one size. It adds one if there is none.
//
// +checklocks:p.mu
func (p *pool) demandLocked(key demandKey, orgID string) *demand {
	d := p.demands[key]
	if d == nil {
		d = &demand{orgID: orgID, target: p.cfg.Target}
		p.demands[key] = d
	}
	return d
}

// refresh calls change on a demand. It adds one if there is none.
func (p *pool) refresh(key demandKey, orgID string, change func(*demand)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(p.demandLocked(key, orgID))
}

// forget drops a demand, so that its pooled sandboxes are removed.
func (p *pool) forget(key demandKey) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.demands, key)
}

// claimed counts a create as warm or cold.
func (p *pool) claimed(key demandKey, warm bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !warm {
		p.counts.Cold++
		return
	}
	p.counts.Warm++
	if d := p.demands[key]; d != nil {
		d.claimed++
	}
}

func (p *pool) count() PoolCounts {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.counts
	c.Ready = len(p.ready)
	return c
}
