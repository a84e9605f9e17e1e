package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/trace"
)

const (
	// lookEvery is the interval at which the pool checks templates for new versions and the machine
	// for free memory. That takes a few reads and none of a pooled sandbox. A create makes a new version known
	// at once. A longer interval keeps old versions and scarce memory for longer.
	lookEvery = 10 * time.Second
	// checkEvery is the interval at which each pooled sandbox's agent is called, which takes a few hundred
	// microseconds of its time. The death of a pooled sandbox is known at once. A longer interval keeps
	// pooled sandboxes that hang for longer.
	checkEvery = time.Minute
	// checkTimeout bounds one call to the agent of a pooled sandbox. A lower value evicts pooled sandboxes of a slow
	// machine; a higher one delays the work of the pool while a pooled sandbox hangs.
	checkTimeout = 5 * time.Second

	// quiet is the time without a create or wake that must pass before a pooled sandbox is prepared. A new
	// sandbox is used at once, and a start takes a processor. A shorter time slows those users; a
	// longer one delays refills.
	quiet = 100 * time.Millisecond
	// yieldMost limits how long a pool that is not full waits for a quiet moment. After it the pool
	// prepares pooled sandboxes beside other work, one at a time, until it is full. Without the limit, creates
	// without pause would all be cold; a shorter one disturbs them sooner.
	yieldMost = 2 * time.Second

	// spareMake sets how many sandboxes must have room on the machine before a pooled sandbox is prepared;
	// spareKeep sets the number below which a pooled sandbox is given back. Room for spareMake sandboxes
	// takes 256 MiB beyond the machine's own reserve. Lower values let the pool take room that
	// creates need; higher ones leave memory unused.
	spareMake, spareKeep = 4, 2
)

// keepPool maintains the wanted number of pooled sandboxes until ctx ends.
func (s *Service) keepPool(ctx context.Context) {
	if !s.pool.cfg.Enabled {
		return
	}
	look, check := time.NewTicker(lookEvery), time.NewTicker(checkEvery)
	defer look.Stop()
	defer check.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var lacking time.Time // when the pool began to lack pooled sandboxes; zero if it is full
	s.refreshDemands(ctx)
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			return
		case <-s.pool.work:
		case <-timer.C:
		case <-look.C:
			s.refreshDemands(ctx)
			s.giveBack(ctx)
		case <-check.C:
			s.checkPooled(ctx)
		}
		s.drain(ctx)
		d, lacks := s.lacking()
		switch {
		case !lacks:
			lacking = time.Time{}
			continue
		case lacking.IsZero():
			lacking = time.Now()
		}
		if wait := s.untilQuiet(); wait > 0 && time.Since(lacking) < yieldMost {
			timer.Reset(wait)
			continue
		}
		if spare, err := s.node.Spare(ctx); err != nil || spare < spareMake {
			continue // the next tick tries again
		}
		s.prepare(ctx, d)
		s.pool.nudge()
	}
}

// untilQuiet returns the time until no caller will have waited for a sandbox for the duration
// quiet; 0 means now. While a caller waits it returns quiet, and the end of that wait nudges the
// pool.
func (s *Service) untilQuiet() time.Duration { return max(0, quiet-s.ops.sinceServed()) }

// foreground reports whether a caller waits for a sandbox to run.
func (k opKind) foreground() bool { return k == opCreate || k == opClaim || k == opWake }

// refreshDemands looks up the present versions of the templates in demand. It forgets demands for
// templates that are gone or not wanted any more.
func (s *Service) refreshDemands(ctx context.Context) {
	fixed := map[demandKey]PoolTemplate{}
	for _, t := range s.pool.cfg.Templates {
		v, err := s.templates.Ready(ctx, t.OrgID, t.Template)
		if err != nil {
			continue // not ready, now or ever; creates report it
		}
		fixed[demandKey{v.ID, cmp.Or(t.Size, s.defaultSize(v))}] = t
	}
	s.pool.mu.Lock()
	keys := map[demandKey]string{}
	for key, d := range s.pool.demands {
		keys[key] = d.orgID
	}
	s.pool.mu.Unlock()
	for key, t := range fixed {
		keys[key] = t.OrgID
	}
	for key, orgID := range keys {
		v, err := s.templates.Ready(ctx, orgID, key.templateID)
		if err != nil && !fault.Is(err, fault.NotFound) {
			continue // keep the demand: the template may be being rebuilt
		}
		var plain Sandbox
		if err == nil {
			plain, err = s.plain(orgID, v, key.size)
		}
		t, isFixed := fixed[key]
		if err != nil || !isFixed && key.size != s.defaultSize(v) {
			s.pool.forget(key)
			continue
		}
		s.pool.refresh(key, orgID, func(d *demand) {
			d.version, d.kind, d.fixed = v, plain.kind(), isFixed
			if isFixed {
				d.target = t.Target
			}
		})
	}
}

// lacking returns the demand that lacks the largest part of its share of pooled sandboxes.
func (s *Service) lacking() (demand, bool) {
	now := time.Now()
	p := s.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	have := p.kindsLocked()
	var most *demand
	for _, d := range share(p.demands, p.cfg.MaxMembers, now) {
		if d.share > have[d.kind] && d.version.ID != "" && now.After(d.paused) &&
			(most == nil || d.lacks(have) > most.lacks(have)) {
			most = d
		}
	}
	if most == nil || len(p.ready) >= p.cfg.MaxMembers {
		return demand{}, false
	}
	return *most, true
}

// lacks returns the part of its share that a demand lacks.
func (d *demand) lacks(have map[Kind]int) float64 {
	return float64(d.share-have[d.kind]) / float64(max(d.share, 1))
}

// +checklocks:p.mu
func (p *pool) kindsLocked() map[Kind]int {
	have := map[Kind]int{}
	for _, m := range p.ready {
		have[m.kind]++
	}
	return have
}

// prepare makes a pooled sandbox and adds it to the pool.
func (s *Service) prepare(ctx context.Context, d demand) {
	sbx, err := s.plain(d.orgID, d.version, d.kind.Size)
	if err != nil {
		return // the request was valid when the demand was recorded
	}
	m := Pooled{ID: sbx.ID, Run: sbx.Run, Token: sbx.Token, OrgID: d.orgID, Template: d.version.Name,
		TemplateID: sbx.TemplateID, TemplateVersion: sbx.TemplateVersion, Shape: sbx.Shape, CreatedAt: sbx.CreatedAt}
	op, mine := s.ops.begin(m.ID, opPrepare)
	if !mine {
		return // the service is closing
	}
	defer s.ops.finish(m.ID, op, nil, nil)
	// A server that stops does not wait for the pooled sandbox.
	defer context.AfterFunc(ctx, func() { op.cancel(errClosing) })()
	work, cancel := context.WithTimeout(op.ctx, bootTimeout+sbx.Start.Patience())
	defer cancel()
	began := time.Now()
	if err = s.node.Prepare(work, sbx.spec()); err == nil {
		if err = s.store.AddPooled(work, m); err != nil {
			err = errors.Join(err, s.discard(context.WithoutCancel(work), m.ID))
		}
	}
	if p := s.pool.cfg.Prepared; p != nil {
		p(time.Since(began), err)
	}
	switch {
	case err == nil:
		s.pool.add(m)
		s.log.DebugContext(ctx, "prepared a sandbox for the pool", "sandbox", m.ID, "template", m.Template,
			"took", time.Since(began))
	case op.ctx.Err() == nil:
		s.log.WarnContext(ctx, "preparing a sandbox for the pool", "sandbox", m.ID, "template", m.Template, "error", err)
		s.pool.pause(demandKey{d.kind.TemplateID, d.kind.Size})
	}
}

// pause stops preparations for a demand for the duration retryAfter.
func (p *pool) pause(key demandKey) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := p.demands[key]; d != nil {
		d.paused = time.Now().Add(retryAfter)
	}
}

// drain removes unwanted pooled sandboxes: those of old versions, and those beyond their demand's share.
func (s *Service) drain(ctx context.Context) {
	for ctx.Err() == nil {
		p, now := s.pool, time.Now()
		p.mu.Lock()
		share(p.demands, p.cfg.MaxMembers, now)
		over := p.kindsLocked()
		for _, d := range p.demands {
			over[d.kind] -= d.share
		}
		p.mu.Unlock()
		if !s.evict(ctx, func(r ready) bool { return over[r.kind] > 0 }) {
			return
		}
	}
}

// giveBack removes a pooled sandbox when the machine has little room left.
func (s *Service) giveBack(ctx context.Context) {
	if spare, err := s.node.Spare(ctx); err == nil && spare < spareKeep {
		s.evict(ctx, func(ready) bool { return true })
	}
}

// evict removes the oldest pooled sandbox for which meant returns true, and reports whether it removed one.
func (s *Service) evict(ctx context.Context, meant func(ready) bool) bool {
	var op *operation
	m, ok := s.pool.take(meant, func(id ID) (mine bool) {
		op, mine = s.ops.begin(id, opSettle)
		return mine
	})
	if !ok {
		return false
	}
	err := s.discard(context.WithoutCancel(ctx), m.ID) // a removal that has begun is completed
	s.ops.finish(m.ID, op, nil, err)
	if err != nil { // Reconcile tries again
		s.log.ErrorContext(ctx, "removing a member of the pool", "sandbox", m.ID, "error", err)
	}
	return err == nil
}

// roomPatience bounds how long a create waits for sandboxes that are being removed, which takes
// tens of milliseconds. A higher value delays the report that there is no room; a lower one refuses
// creates that could have room.
const roomPatience = 2 * time.Second

// room makes sure that the machine can take one more sandbox. It evicts pooled sandboxes,
// cancels preparations, and waits for sandboxes that are being removed.
func (s *Service) room(ctx context.Context, size Size) error {
	defer trace.Start(ctx, "room")()
	patience, cancel := context.WithTimeout(ctx, roomPatience)
	defer cancel()
	for {
		err := s.node.Room(ctx, size)
		if err == nil || !fault.Is(err, fault.Unavailable) {
			return err
		}
		if s.evict(ctx, func(ready) bool { return true }) {
			continue
		}
		op := s.ops.of(opPrepare)
		if op != nil {
			op.cancel(errInterrupted)
		} else if op = s.ops.of(opDestroy); op == nil {
			return err
		}
		if op.ended(patience) != nil {
			return err
		}
	}
}

// checkPooled removes pooled sandboxes that do not answer, so that they are replaced.
func (s *Service) checkPooled(ctx context.Context) {
	for _, m := range s.pool.pooled() {
		try, cancel := context.WithTimeout(ctx, checkTimeout)
		err := s.node.Check(try, m.ID)
		cancel()
		if err == nil || ctx.Err() != nil {
			continue
		}
		if s.evict(ctx, func(o ready) bool { return o.ID == m.ID }) {
			s.log.WarnContext(ctx, "replacing a member of the pool that does not answer", "sandbox", m.ID, "error", err)
		}
	}
}

// discard removes a pooled sandbox from the machine and then its row; the caller holds the operation.
func (s *Service) discard(ctx context.Context, id ID) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	s.pool.remove(id)
	if err := s.node.Destroy(ctx, id); err != nil {
		return fmt.Errorf("removing the remains of %s: %w", id, err)
	}
	return s.store.DropPooled(ctx, id)
}

// keep adds a claimable pooled sandbox to the pool; the caller holds the operation. If the pool is off,
// keep discards the pooled sandbox.
func (s *Service) keep(ctx context.Context, m Pooled) error {
	if !s.pool.cfg.Enabled {
		return s.discard(ctx, m.ID)
	}
	p := s.pool
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

// pooled sandbox returns the row of a pooled sandbox, or nil if there is none.
func (s *Service) pooledRow(ctx context.Context, id ID) (*Pooled, error) {
	all, err := s.store.ListPooled(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing the pool: %w", err)
	}
	if i := slices.IndexFunc(all, func(m Pooled) bool { return m.ID == id }); i >= 0 {
		return &all[i], nil
	}
	return nil, nil
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

// Pool returns the status of the pool, by template and size.
func (s *Service) Pool() []PoolStatus {
	p := s.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	have := p.kindsLocked()
	all := []PoolStatus{}
	for _, d := range share(p.demands, p.cfg.MaxMembers, time.Now()) {
		if d.kind.TemplateID != "" {
			all = append(all, PoolStatus{d.version.Name, d.version.Version, d.kind.Size, have[d.kind], d.claimed, d.share})
		}
	}
	slices.SortFunc(all, func(a, b PoolStatus) int {
		return cmp.Or(cmp.Compare(a.Template, b.Template), cmp.Compare(a.Size, b.Size))
	})
	return all
}

// PoolCounts returns the counts of creates.
func (s *Service) PoolCounts() PoolCounts { return s.pool.count() }
