package sandbox

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"slices"
	"sync"
	"time"
)

// Member is a sandbox of the pool: booted, without an owner, waiting to be claimed. Its
// ID, Run and Token become those of the sandbox that claims it. There is a row of it only
// when it is ready, so a server that dies while it prepares one leaves what no row owns.
type Member struct {
	ID        ID
	Run       string
	Token     string // secret, as Sandbox.Token
	OrgID     string // one that may use the template
	Template  string // name, for people
	Kind      Kind
	CreatedAt time.Time
}

// Kind is what must be the same for a member to be what a create asks for.
type Kind struct {
	TemplateID string
	Version    int
	Image      string
	Size       Size
	DiskMB     int
	// Started is what its start command runs as: a hash of the command and of the
	// environment, user, working directory and policy that it began with. "" is none.
	Started string
}

// kind is the kind that the sandbox of a create is of.
func (b Sandbox) kind(start Start) Kind {
	k := Kind{b.TemplateID, b.TemplateVersion, b.Image, b.Size, b.DiskMB, ""}
	if start.None() {
		return k
	}
	user := cmp.Or(start.User, b.User, rootUser)
	start.User = ""
	text, err := json.Marshal(struct {
		Start         Start
		Env           map[string]string
		User, Workdir string
		Egress        Egress
	}{start, b.Env, user, b.Workdir, b.Egress})
	if err != nil { // texts and numbers only
		panic(err)
	}
	sum := sha256.Sum256(text)
	k.Started = hex.EncodeToString(sum[:])
	return k
}

// PoolConfig is what the operator decides about the pool.
type PoolConfig struct {
	Enabled    bool
	Target     int // members of each template in use, at its default size
	MaxMembers int // of all together
	// Templates have targets of their own; those that are not in it have Target while
	// they are in use.
	Templates []PoolTemplate
	// Prepared, if not nil, is told how long each new member took. It must not block.
	Prepared func(took time.Duration, err error)
}

// PoolTemplate is the target of one template at one size. Target 0 is off.
type PoolTemplate struct {
	Template string // name or ID
	OrgID    string // whose it is; "" is one that is built in
	Size     string // "" is the template's default
	Target   int
}

const (
	// inUseFor is how long after its last create a template counts as in use. Longer keeps
	// memory for nobody, shorter makes the first create after a break a cold one.
	inUseFor = 4 * time.Hour
	// demandOver and demandAhead are how the target follows creates: it is what was taken
	// within demandAhead on the average of the last demandOver.
	demandOver  = time.Minute
	demandAhead = 10 * time.Second
)

// demand is who asks for a template at one size, and how many members that is worth.
type demand struct {
	orgID   string
	version TemplateVersion // the newest that is known
	kind    Kind
	fixed   bool // the operator's target, which use does not end
	target  int
	used    time.Time
	taken   [6]int    // creates in each sixth of demandOver, a ring
	slot    int64     // which sixth was counted last
	claimed int       // creates from the pool since the start
	paused  time.Time // until then none is prepared, since one could not be
	share   int       // of the members there may be; see share
}

const sixth = demandOver / 6

// roll forgets what is older than demandOver.
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

// wants is its target now.
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

// demandKey finds a demand.
type demandKey struct{ templateID, size string }

// share gives each demand what it wants, one after the other in turns while there are
// members left of the most there may be: those that the operator wants first, then what
// was used last.
func share(demands map[demandKey]*demand, most int, now time.Time) []*demand {
	order := slices.SortedFunc(maps.Values(demands), func(a, b *demand) int {
		if a.fixed != b.fixed {
			if a.fixed {
				return -1
			}
			return 1
		}
		return cmp.Or(b.used.Compare(a.used), cmp.Compare(a.kind.TemplateID, b.kind.TemplateID), cmp.Compare(a.kind.Size.Name, b.kind.Size.Name))
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

// pool is what is kept in memory of the pool: the members that can be claimed, and who
// asks for them.
type pool struct {
	cfg  PoolConfig
	work chan struct{} // holds one token: there may be something to do

	mu sync.Mutex
	// +checklocks:mu
	ready map[ID]Member // guarded by mu
	// +checklocks:mu
	demands map[demandKey]*demand // guarded by mu
	// +checklocks:mu
	counts PoolCounts // guarded by mu
}

// PoolCounts is what creates came to while the pool was on.
type PoolCounts struct {
	Ready int   // members now
	Warm  int64 // creates from it
	Cold  int64 // creates that it had nothing for
}

func newPool(cfg PoolConfig) *pool {
	return &pool{cfg: cfg, work: make(chan struct{}, 1), ready: map[ID]Member{}, demands: map[demandKey]*demand{}}
}

// nudge says that there may be something to do.
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

func (p *pool) add(m Member) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ready[m.ID] = m
}

// remove takes a member out, so that nobody else claims it.
func (p *pool) remove(id ID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ready := p.ready[id]
	delete(p.ready, id)
	return ready
}

// take takes the oldest member that is of the kind, if any, and that the caller can begin
// to work on. Members are put in only by who works on them, so nobody else has it then.
func (p *pool) take(of func(Member) bool, begin func(ID) bool) (Member, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.membersLocked() {
		if of(m) && begin(m.ID) {
			delete(p.ready, m.ID)
			return m, true
		}
	}
	return Member{}, false
}

// members lists those that can be claimed, oldest first.
func (p *pool) members() []Member {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.membersLocked()
}

// +checklocks:p.mu
func (p *pool) membersLocked() []Member {
	return slices.SortedFunc(maps.Values(p.ready), func(a, b Member) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
}

// demandLocked is the demand for a template at one size, a new one if there was none.
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

// refresh changes a demand, a new one if there was none.
func (p *pool) refresh(key demandKey, orgID string, change func(*demand)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(p.demandLocked(key, orgID))
}

// forget drops a demand; its members go then.
func (p *pool) forget(key demandKey) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.demands, key)
}

// claimed counts what became of a create.
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
