package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
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
	Holder    Holder // set by the store
}

// PoolConfig holds the operator's settings for the pool.
type PoolConfig struct {
	Enabled   bool
	Target    int // pooled sandboxes for each template in use, at its default size
	MaxPooled int // of all templates together
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

// PoolStatus reports the pool's sandboxes of one template at one size.
type PoolStatus struct {
	Template string
	Version  int
	Size     string
	Ready    int // can be claimed now
	Claimed  int // creates served since the server's start
	Target   int
}

// PoolCounts counts creates while the pool was on.
type PoolCounts struct {
	Ready int   // present pooled sandboxes
	Warm  int64 // creates served by the pool
	Cold  int64 // creates that the pool could not serve
}

// pool keeps the warm pool: it prepares and removes pooled sandboxes in the background, and gives
// them to creates. Only the operation that works on a pooled sandbox puts it into ready, so that
// taking it from there and beginning to work on it are one step.
type pool struct {
	cfg       Config
	store     PooledStore
	node      poolNode
	templates Templates
	log       *slog.Logger
	ops       *operations
	// handedOver is called for each sandbox that a create took from the pool, before another operation
	// on it can begin.
	handedOver func(context.Context, Sandbox)
	work       chan struct{} // holds a token when there may be work
	cordon     *cordon

	mu sync.Mutex
	// +checklocks:mu
	ready map[ID]ready // the pooled sandboxes that can be claimed
	// +checklocks:mu
	demands map[demandKey]*demand
	// +checklocks:mu
	counts PoolCounts

	reserving sync.Mutex // held while room is reserved, so that who finds none knows of all that may be given back
	// +checklocks:reserving
	unsettled map[*room]struct{} // rooms of sandboxes that have no row yet
}

// poolNode has the calls that the pool makes to a machine.
type poolNode interface {
	NodeCapacity
	NodePool
	Check(ctx context.Context, id ID) error
	Destroy(ctx context.Context, id ID) error
}

// ready is a pooled sandbox that can be claimed, with its kind.
type ready struct {
	Pooled
	kind Kind
}

// newPool returns the pool of a Service, with the operations of the Service: the end of each of them
// may leave work for the pool.
func newPool(cfg Config, store PooledStore, node poolNode, templates Templates, log *slog.Logger,
	handedOver func(context.Context, Sandbox)) *pool {
	p := &pool{cfg: cfg, store: store, node: node, templates: templates, log: log,
		handedOver: handedOver, work: make(chan struct{}, 1), cordon: &cordon{changed: make(chan struct{}, 1)},
		ready: map[ID]ready{}, demands: map[demandKey]*demand{}, unsettled: map[*room]struct{}{}}
	p.ops = newOperations(p.nudge)
	return p
}

// nudge wakes run, since there may be work.
func (p *pool) nudge() {
	select {
	case p.work <- struct{}{}:
	default:
	}
}

// has reports whether a pooled sandbox can be claimed.
func (p *pool) has(id ID) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ready := p.ready[id]
	return ready
}

// add puts a pooled sandbox into the pool; the caller holds the operation.
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

// pooled returns the pooled sandboxes that can be claimed, oldest first.
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
		d = &demand{orgID: orgID, target: p.cfg.Pool.Target}
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

// count counts a create as warm or cold.
func (p *pool) count(key demandKey, warm bool) {
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

// totals returns the counts of creates.
func (p *pool) totals() PoolCounts {
	p.mu.Lock()
	defer p.mu.Unlock()
	c := p.counts
	c.Ready = len(p.ready)
	return c
}

// +checklocks:p.mu
func (p *pool) kindsLocked() map[Kind]int {
	have := map[Kind]int{}
	for _, m := range p.ready {
		have[m.kind]++
	}
	return have
}

// discard removes a pooled sandbox from the machine and then its row; the caller holds the operation.
func (p *pool) discard(ctx context.Context, id ID) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	p.remove(id)
	if err := p.node.Destroy(ctx, id); err != nil {
		return fmt.Errorf("removing the remains of %s: %w", id, err)
	}
	return p.store.DropPooled(ctx, id)
}

// keep adds a claimable pooled sandbox to the pool; the caller holds the operation. If the pool is off,
// keep discards the pooled sandbox.
func (p *pool) keep(ctx context.Context, m Pooled) error {
	if !p.cfg.Pool.Enabled {
		return p.discard(ctx, m.ID)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	kind := p.addLocked(m)
	// The pooled sandbox was in demand before the last server stopped; refreshDemands fills in its demand.
	key := demandKey{m.TemplateID, m.Size.Name}
	if p.demands[key] == nil {
		d := p.demandLocked(key, m.OrgID)
		d.kind, d.used = kind, time.Now()
	}
	return nil
}

// row returns the row of a pooled sandbox, or nil if there is none.
func (p *pool) row(ctx context.Context, id ID) (*Pooled, error) {
	all, err := p.store.ListPooled(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing the pool: %w", err)
	}
	if i := slices.IndexFunc(all, func(m Pooled) bool { return m.ID == id }); i >= 0 {
		return &all[i], nil
	}
	return nil, nil
}

// status returns the status of the pool, by template and size.
func (p *pool) status() []PoolStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	have := p.kindsLocked()
	all := []PoolStatus{}
	for _, d := range share(p.demands, p.cfg.Pool.MaxPooled, time.Now()) {
		if d.kind.TemplateID != "" {
			all = append(all, PoolStatus{d.version.Name, d.version.Version, d.kind.Size, have[d.kind], d.claimed, d.share})
		}
	}
	slices.SortFunc(all, func(a, b PoolStatus) int {
		return cmp.Or(cmp.Compare(a.Template, b.Template), cmp.Compare(a.Size, b.Size))
	})
	return all
}
