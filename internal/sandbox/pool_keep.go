package sandbox

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/cayhq/cay/internal/fault"
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

// run maintains the wanted number of pooled sandboxes until ctx ends.
func (p *pool) run(ctx context.Context) {
	if !p.cfg.Pool.Enabled {
		return
	}
	look, check := time.NewTicker(lookEvery), time.NewTicker(checkEvery)
	defer look.Stop()
	defer check.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var lacking time.Time // when the pool began to lack pooled sandboxes; zero if it is full
	p.refreshDemands(ctx)
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
			return
		case <-p.work:
		case <-timer.C:
		case <-look.C:
			p.refreshDemands(ctx)
			p.giveBack(ctx)
		case <-check.C:
			p.checkPooled(ctx)
		}
		if p.cordon.on.Load() {
			for p.evict(ctx, func(ready) bool { return true }) {
			}
			continue
		}
		p.drain(ctx)
		d, lacks := p.lacking()
		switch {
		case !lacks:
			lacking = time.Time{}
			continue
		case lacking.IsZero():
			lacking = time.Now()
		}
		if wait := p.untilQuiet(); wait > 0 && time.Since(lacking) < yieldMost {
			timer.Reset(wait)
			continue
		}
		if spare, err := p.node.Spare(ctx); err != nil || spare < spareMake {
			continue // the next tick tries again
		}
		p.prepare(ctx, d)
		p.nudge()
	}
}

// untilQuiet returns the time until no caller will have waited for a sandbox for the duration
// quiet; 0 means now. While a caller waits it returns quiet, and the end of that wait nudges the
// pool.
func (p *pool) untilQuiet() time.Duration { return max(0, quiet-p.ops.sinceServed()) }

// refreshDemands looks up the present versions of the templates in demand. It forgets demands for
// templates that are gone or not wanted any more.
func (p *pool) refreshDemands(ctx context.Context) {
	fixed := map[demandKey]PoolTemplate{}
	for _, t := range p.cfg.Pool.Templates {
		v, err := p.templates.Ready(ctx, t.OrgID, t.Template)
		if err != nil {
			continue // not ready, now or ever; creates report it
		}
		fixed[demandKey{v.ID, cmp.Or(t.Size, p.defaultSize(v))}] = t
	}
	p.mu.Lock()
	keys := map[demandKey]string{}
	for key, d := range p.demands {
		keys[key] = d.orgID
	}
	p.mu.Unlock()
	for key, t := range fixed {
		keys[key] = t.OrgID
	}
	for key, orgID := range keys {
		v, err := p.templates.Ready(ctx, orgID, key.templateID)
		if err != nil && !fault.Is(err, fault.NotFound) {
			continue // keep the demand: the template may be being rebuilt
		}
		var plain Sandbox
		if err == nil {
			plain, err = p.plain(orgID, v, key.size)
		}
		t, isFixed := fixed[key]
		if err != nil || !isFixed && key.size != p.defaultSize(v) {
			p.forget(key)
			continue
		}
		p.refresh(key, orgID, func(d *demand) {
			d.version, d.kind, d.fixed = v, plain.kind(), isFixed
			if isFixed {
				d.target = t.Target
			}
		})
	}
}

// lacking returns the demand that lacks the largest part of its share of pooled sandboxes.
func (p *pool) lacking() (demand, bool) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	have := p.kindsLocked()
	var most *demand
	for _, d := range share(p.demands, p.cfg.Pool.MaxPooled, now) {
		if d.share > have[d.kind] && d.version.ID != "" && now.After(d.paused) &&
			(most == nil || d.lacks(have) > most.lacks(have)) {
			most = d
		}
	}
	if most == nil || len(p.ready) >= p.cfg.Pool.MaxPooled {
		return demand{}, false
	}
	return *most, true
}

// lacks returns the part of its share that a demand lacks.
func (d *demand) lacks(have map[Kind]int) float64 {
	return float64(d.share-have[d.kind]) / float64(max(d.share, 1))
}

// prepare makes a pooled sandbox and adds it to the pool.
func (p *pool) prepare(ctx context.Context, d demand) {
	sbx, err := p.plain(d.orgID, d.version, d.kind.Size)
	if err != nil {
		return // the request was valid when the demand was recorded
	}
	m := Pooled{ID: sbx.ID, Run: sbx.Run, Token: sbx.Token, OrgID: d.orgID, Template: d.version.Name,
		TemplateID: sbx.TemplateID, TemplateVersion: sbx.TemplateVersion, Shape: sbx.Shape, CreatedAt: sbx.CreatedAt}
	op, mine := p.ops.begin(m.ID, opPrepare)
	if !mine {
		return // the service is closing
	}
	defer p.ops.finish(m.ID, op, nil, nil)
	// A server that stops does not wait for the pooled sandbox.
	defer context.AfterFunc(ctx, func() { op.cancel(errClosing) })()
	work, cancel := context.WithTimeout(op.ctx, bootTimeout+sbx.Start.Patience())
	defer cancel()
	began := time.Now()
	if err = p.node.Prepare(work, sbx.spec()); err == nil {
		if err = p.store.AddPooled(work, m); err != nil {
			err = errors.Join(err, p.discard(context.WithoutCancel(work), m.ID))
		}
	}
	if prepared := p.cfg.Pool.Prepared; prepared != nil {
		prepared(time.Since(began), err)
	}
	switch {
	case err == nil:
		p.add(m)
		p.log.DebugContext(ctx, "prepared a sandbox for the pool", "sandbox", m.ID, "template", m.Template,
			"took", time.Since(began))
	case op.ctx.Err() == nil:
		p.log.WarnContext(ctx, "preparing a sandbox for the pool", "sandbox", m.ID, "template", m.Template, "error", err)
		p.pause(demandKey{d.kind.TemplateID, d.kind.Size})
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
func (p *pool) drain(ctx context.Context) {
	for ctx.Err() == nil {
		now := time.Now()
		p.mu.Lock()
		share(p.demands, p.cfg.Pool.MaxPooled, now)
		over := p.kindsLocked()
		for _, d := range p.demands {
			over[d.kind] -= d.share
		}
		p.mu.Unlock()
		if !p.evict(ctx, func(r ready) bool { return over[r.kind] > 0 }) {
			return
		}
	}
}

// giveBack removes a pooled sandbox when the machine has little room left.
func (p *pool) giveBack(ctx context.Context) {
	if spare, err := p.node.Spare(ctx); err == nil && spare < spareKeep {
		p.evict(ctx, func(ready) bool { return true })
	}
}

// evict removes the oldest pooled sandbox for which meant returns true, and reports whether it removed one.
func (p *pool) evict(ctx context.Context, meant func(ready) bool) bool {
	var op *operation
	m, ok := p.take(meant, func(id ID) (mine bool) {
		op, mine = p.ops.begin(id, opSettle)
		return mine
	})
	if !ok {
		return false
	}
	err := p.discard(context.WithoutCancel(ctx), m.ID) // a removal that has begun is completed
	p.ops.finish(m.ID, op, nil, err)
	if err != nil { // Reconcile tries again
		p.log.ErrorContext(ctx, "removing a pooled sandbox", "sandbox", m.ID, "error", err)
	}
	return err == nil
}

// checkPooled removes pooled sandboxes that do not answer, so that they are replaced.
func (p *pool) checkPooled(ctx context.Context) {
	for _, m := range p.pooled() {
		try, cancel := context.WithTimeout(ctx, checkTimeout)
		err := p.node.Check(try, m.ID)
		cancel()
		if err == nil || ctx.Err() != nil {
			continue
		}
		if p.evict(ctx, func(o ready) bool { return o.ID == m.ID }) {
			p.log.WarnContext(ctx, "replacing a pooled sandbox that does not answer", "sandbox", m.ID, "error", err)
		}
	}
}
