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
	// lookEvery is how often the pool looks whether templates have new versions and
	// whether the machine has memory: a few reads, none of a member. New versions that
	// are created from are known at once.
	lookEvery = 10 * time.Second
	// checkEvery is how often each member is asked whether it answers, which is a few
	// hundred microseconds of its time. One that died is known at once.
	checkEvery   = time.Minute
	checkTimeout = 5 * time.Second

	// quiet is how long no create or wake must have been under way before a member is
	// prepared: who got a sandbox uses it at once, and a start takes a processor.
	quiet = 100 * time.Millisecond
	// yieldMost is how long the pool waits for that while it is not full. Then it goes on
	// beside whatever is done, one start at a time, until it is: without it creates that
	// never pause would all be cold ones.
	yieldMost = 2 * time.Second

	// spareMake is for how many sandboxes there must be room on the machine for a member
	// to be prepared, spareKeep for none to be given back. With less than spareMake 256 MiB
	// are free beyond what the machine itself is left.
	spareMake, spareKeep = 4, 2
)

// keepPool keeps as many members as are wanted until ctx ends.
func (s *Service) keepPool(ctx context.Context) {
	if !s.pool.cfg.Enabled {
		return
	}
	look, check := time.NewTicker(lookEvery), time.NewTicker(checkEvery)
	defer look.Stop()
	defer check.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var lacking time.Time // since when the pool is not full
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
			s.checkMembers(ctx)
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
			continue // look again with the next tick
		}
		s.prepare(ctx, d)
		s.pool.nudge()
	}
}

// untilQuiet is how long it is until nobody has been waiting for a sandbox for a while;
// 0 is now. While somebody waits that is not known, and the end of it is a nudge.
func (s *Service) untilQuiet() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, op := range s.work {
		if op.kind.foreground() {
			return quiet
		}
	}
	return max(0, quiet-time.Since(s.served))
}

// foreground reports whether somebody waits for a sandbox to run.
func (k opKind) foreground() bool { return k == opCreate || k == opClaim || k == opWake }

// refreshDemands looks up the present versions of the templates that are wanted. Those
// that are gone, or that nobody wants any more, are forgotten.
func (s *Service) refreshDemands(ctx context.Context) {
	fixed := map[demandKey]PoolTemplate{}
	for _, t := range s.pool.cfg.Templates {
		v, err := s.templates.Ready(ctx, t.OrgID, t.Template)
		if err != nil {
			continue // it is not ready yet, or will never be; creates are told
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
			continue // as it was: it may be being built anew
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
			d.version, d.kind, d.fixed = v, plain.kind(v.Start), isFixed
			if isFixed {
				d.target = t.Target
			}
		})
	}
}

// lacking finds the demand that lacks the most of its share of members.
func (s *Service) lacking() (demand, bool) {
	now := time.Now()
	p := s.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	have := p.kindsLocked()
	var most *demand
	for _, d := range share(p.demands, p.cfg.MaxMembers, now) {
		if d.share > have[d.kind] && d.version.ID != "" && now.After(d.paused) && (most == nil || d.lacks(have) > most.lacks(have)) {
			most = d
		}
	}
	if most == nil || len(p.ready) >= p.cfg.MaxMembers {
		return demand{}, false
	}
	return *most, true
}

// lacks is the part of its share that a demand lacks.
func (d *demand) lacks(have map[Kind]int) float64 {
	return float64(d.share-have[d.kind]) / float64(max(d.share, 1))
}

// +checklocks:p.mu
func (p *pool) kindsLocked() map[Kind]int {
	have := map[Kind]int{}
	for _, m := range p.ready {
		have[m.Kind]++
	}
	return have
}

// prepare makes a member and puts it into the pool.
func (s *Service) prepare(ctx context.Context, d demand) {
	box, err := s.plain(d.orgID, d.version, d.kind.Size.Name)
	if err != nil {
		return // it was one when the demand was noted
	}
	m := Member{ID: box.ID, Run: box.Run, Token: box.Token, OrgID: d.orgID, Template: d.version.Name, Kind: d.kind, CreatedAt: box.CreatedAt}
	op, mine := s.begin(m.ID, opPrepare)
	if !mine {
		return // closing
	}
	defer s.finish(m.ID, op, Sandbox{}, nil)
	// A server that stops does not wait for it.
	defer context.AfterFunc(ctx, func() { op.cancel(errClosing) })()
	work, cancel := context.WithTimeout(op.ctx, bootTimeout+d.version.Start.Patience())
	defer cancel()
	spec := box.spec()
	spec.Start = d.version.Start
	began := time.Now()
	if err = s.node.Prepare(work, spec); err == nil {
		if err = s.store.AddMember(work, m); err != nil {
			err = errors.Join(err, s.discard(context.WithoutCancel(work), m.ID))
		}
	}
	if p := s.pool.cfg.Prepared; p != nil {
		p(time.Since(began), err)
	}
	switch {
	case err == nil:
		s.pool.add(m)
		s.log.DebugContext(ctx, "prepared a sandbox for the pool", "member", m.ID, "template", m.Template, "took", time.Since(began))
	case op.ctx.Err() == nil:
		s.log.WarnContext(ctx, "preparing a sandbox for the pool", "member", m.ID, "template", m.Template, "error", err)
		s.pool.pause(demandKey{d.kind.TemplateID, d.kind.Size.Name})
	}
}

// pause leaves a demand alone for a while.
func (p *pool) pause(key demandKey) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := p.demands[key]; d != nil {
		d.paused = time.Now().Add(retryAfter)
	}
}

// drain removes the members that nobody wants: of old versions, and those beyond their
// demand's share.
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
		if !s.evict(ctx, func(m Member) bool { return over[m.Kind] > 0 }) {
			return
		}
	}
}

// giveBack removes a member when the machine has hardly room for anything else.
func (s *Service) giveBack(ctx context.Context) {
	if spare, err := s.node.Spare(ctx); err == nil && spare < spareKeep {
		s.evict(ctx, func(Member) bool { return true })
	}
}

// evict removes the oldest member that is meant, and says whether there was one that
// could be removed.
func (s *Service) evict(ctx context.Context, meant func(Member) bool) bool {
	var op *operation
	m, ok := s.pool.take(meant, func(id ID) (mine bool) {
		op, mine = s.begin(id, opSettle)
		return mine
	})
	if !ok {
		return false
	}
	err := s.discard(context.WithoutCancel(ctx), m.ID) // begun, it goes on to its end
	s.finish(m.ID, op, Sandbox{}, err)
	if err != nil { // reconcile comes back for it
		s.log.ErrorContext(ctx, "removing a member of the pool", "member", m.ID, "error", err)
	}
	return err == nil
}

// roomPatience is how long a create waits for what is on its way out, which takes tens of
// milliseconds. Longer keeps a caller from being told that there is no room.
const roomPatience = 2 * time.Second

// room makes sure that the machine can take one more sandbox. Members of the pool give
// way, those that are being prepared too, and sandboxes that are going are waited for.
func (s *Service) room(ctx context.Context, size Size) error {
	defer trace.Start(ctx, "room")()
	patience, cancel := context.WithTimeout(ctx, roomPatience)
	defer cancel()
	for {
		err := s.node.Room(ctx, size)
		if err == nil || !fault.Is(err, fault.Unavailable) {
			return err
		}
		if s.evict(ctx, func(Member) bool { return true }) {
			continue
		}
		op := s.doing(opPrepare)
		if op != nil {
			op.cancel(errInterrupted)
		} else if op = s.doing(opDestroy); op == nil {
			return err
		}
		if op.ended(patience) != nil {
			return err
		}
	}
}

// doing is an operation of that kind under way, nil if none.
func (s *Service) doing(kind opKind) *operation {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, op := range s.work {
		if op.kind == kind {
			return op
		}
	}
	return nil
}

// checkMembers replaces the members that do not answer.
func (s *Service) checkMembers(ctx context.Context) {
	for _, m := range s.pool.members() {
		try, cancel := context.WithTimeout(ctx, checkTimeout)
		err := s.node.Check(try, m.ID)
		cancel()
		if err == nil || ctx.Err() != nil {
			continue
		}
		if s.evict(ctx, func(o Member) bool { return o.ID == m.ID }) {
			s.log.WarnContext(ctx, "replacing a member of the pool that does not answer", "member", m.ID, "error", err)
		}
	}
}

// discard removes a member from the machine and then its row; the caller works on it.
func (s *Service) discard(ctx context.Context, id ID) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	s.pool.remove(id)
	if err := s.node.Destroy(ctx, id); err != nil {
		return fmt.Errorf("clearing what is left of %s: %w", id, err)
	}
	return s.store.DropMember(ctx, id)
}

// keep makes a member that can be claimed known; the caller works on it. Of a pool that
// is off none is kept.
func (s *Service) keep(ctx context.Context, m Member) error {
	if !s.pool.cfg.Enabled {
		return s.discard(ctx, m.ID)
	}
	p := s.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ready[m.ID] = m
	// Before the last server stopped it was in use; refreshDemands fills it in.
	key := demandKey{m.Kind.TemplateID, m.Kind.Size.Name}
	if p.demands[key] == nil {
		d := p.demandLocked(key, m.OrgID)
		d.kind, d.used = m.Kind, time.Now()
	}
	return nil
}

// member is a member's row, nil if there is none.
func (s *Service) member(ctx context.Context, id ID) (*Member, error) {
	all, err := s.store.Members(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing the pool: %w", err)
	}
	if i := slices.IndexFunc(all, func(m Member) bool { return m.ID == id }); i >= 0 {
		return &all[i], nil
	}
	return nil, nil
}

// PoolStatus is what the pool has of one template at one size.
type PoolStatus struct {
	Template string
	Version  int
	Size     string
	Ready    int // can be claimed now
	Claimed  int // creates served since the server started
	Target   int
}

// Pool lists what the pool has, by template and size.
func (s *Service) Pool() []PoolStatus {
	p := s.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	have := p.kindsLocked()
	all := []PoolStatus{}
	for _, d := range share(p.demands, p.cfg.MaxMembers, time.Now()) {
		if d.kind.TemplateID != "" {
			all = append(all, PoolStatus{d.version.Name, d.version.Version, d.kind.Size.Name, have[d.kind], d.claimed, d.share})
		}
	}
	slices.SortFunc(all, func(a, b PoolStatus) int {
		return cmp.Or(cmp.Compare(a.Template, b.Template), cmp.Compare(a.Size, b.Size))
	})
	return all
}

// PoolCounts says how creates went.
func (s *Service) PoolCounts() PoolCounts { return s.pool.count() }
