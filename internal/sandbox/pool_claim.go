package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/trace"
)

// claimTimeout bounds giving a pooled sandbox to its sandbox, which takes milliseconds. A lower value
// discards pooled sandboxes on a machine that is slow for a moment; a higher one delays the cold start that
// would serve the caller.
const claimTimeout = 5 * time.Second

// errNotWarm reports that the pool cannot serve a create, while a cold start can.
var errNotWarm = errors.New("no pooled sandbox could be claimed")

// claim serves a create from the pool, and returns the running sandbox. If an earlier create used the
// same key, it returns the sandbox of that create with found true. The error is errNotWarm if the pool
// has no pooled sandbox of the kind, and otherwise the one that a cold create would return too. The
// claim continues when ctx ends.
//
// claim takes a pooled sandbox on the machine first and then in the rows, in one transaction. Until
// that transaction no caller knows the sandbox. A server that dies in between leaves a pooled sandbox
// that is no longer warm, which Reconcile removes.
func (p *pool) claim(ctx context.Context, c Caller, sbx Sandbox, v TemplateVersion,
	once Once) (_ Sandbox, found bool, err error) {
	key, kind := demandKey{v.ID, sbx.Size.Name}, sbx.kind()
	defer func() {
		if errors.Is(err, errNotWarm) {
			p.count(key, false)
		}
	}()
	if p.cordon.on.Load() {
		return Sandbox{}, false, errNotWarm // makeNew refuses it, unless it repeats a create
	}
	if !p.want(c.OrgID, v, key, kind) {
		return Sandbox{}, false, errNotWarm
	}
	var op *operation
	m, ok := p.take(func(r ready) bool { return r.kind == kind }, func(id ID) (mine bool) {
		op, mine = p.ops.begin(id, opClaim)
		return mine
	})
	if !ok {
		return Sandbox{}, false, errNotWarm
	}
	// A refusal here saves the pooled sandbox. The claim's transaction makes the decision.
	end := trace.Start(ctx, "admit")
	prior, found, err := p.store.Admit(ctx, sbx, c.Quota, once)
	end()
	if err != nil || found {
		p.add(m)
		p.ops.finish(m.ID, op, nil, nil)
		return prior, found, err
	}
	sbx.ID, sbx.Run, sbx.Token, sbx.Source = m.ID, m.Run, m.Token, Warm
	p.ops.do(ctx, m.ID, op, func(ctx context.Context) (any, error) { return p.handOver(ctx, sbx, c.Quota, once) })
	answer, err := await[claimed](ctx, op)
	if errors.Is(err, errNotWarm) {
		p.log.WarnContext(ctx, "creating a sandbox without the pool", "sandbox", m.ID, "error", err)
	}
	return answer.sandbox, answer.found, err
}

// claimed holds the result of a claim: the running sandbox or, with found true, the one that an
// earlier create with the same key made.
type claimed struct {
	sandbox Sandbox
	found   bool
}

// handOver turns a pooled sandbox into the running sandbox sbx; the caller holds the operation. It
// removes the pooled sandbox if it returns an error or finds another sandbox.
func (p *pool) handOver(ctx context.Context, sbx Sandbox, q Quota, once Once) (answer claimed, err error) {
	ctx, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	defer func() {
		if err == nil && !answer.found {
			return
		}
		if err := p.discard(context.WithoutCancel(ctx), sbx.ID); err != nil { // Reconcile tries again
			p.log.ErrorContext(ctx, "removing a pooled sandbox that could not be claimed", "sandbox", sbx.ID, "error", err)
		}
	}()
	if err := p.node.Claim(ctx, sbx.spec()); err != nil {
		return claimed{}, fmt.Errorf("%w: %w", errNotWarm, err)
	}
	sbx.State, sbx.StartedAt = Running, time.Now().UTC()
	if sbx.Mode == Ephemeral {
		sbx.ExpiresAt = sbx.StartedAt.Add(sbx.Timeout)
	} else {
		sbx.LastActivityAt = sbx.StartedAt
	}
	end := trace.Start(ctx, "commit")
	prior, found, err := p.store.Claim(ctx, sbx, q, once)
	end()
	switch {
	case err == nil && found:
		return claimed{prior, true}, nil
	case err == nil:
		p.handedOver(ctx, sbx)
		p.count(demandKey{sbx.TemplateID, sbx.Size.Name}, true)
		return claimed{sandbox: sbx}, nil
	case fault.As(err) != nil && fault.As(err).Code != fault.CodeNoPooled:
		return claimed{}, err // a cold start would fail in the same way
	}
	return claimed{}, fmt.Errorf("%w: %w", errNotWarm, err)
}

// want records the demand of a create, and reports whether a pooled sandbox can serve it. The pool holds
// pooled sandboxes for plain requests only, for each template in use.
func (p *pool) want(orgID string, v TemplateVersion, key demandKey, kind Kind) bool {
	plain, err := p.plain(orgID, v, key.size)
	if err != nil || plain.kind() != kind {
		return false
	}
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.demands[key] == nil && key.size != p.defaultSize(v) {
		return false
	}
	d := p.demandLocked(key, orgID)
	if d.version.Version <= v.Version {
		d.version, d.kind = v, kind
	}
	d.use(now)
	return d.target > 0
}
