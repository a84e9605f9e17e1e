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

// createWarm serves a create from the pool if the pool has a pooled sandbox of its kind. It returns done
// when the create is answered.
//
// createWarm claims a pooled sandbox on the machine first and then in the rows, in one transaction. Until
// that transaction no caller knows the sandbox. A server that dies in between leaves a pooled sandbox that
// is no longer warm, which Reconcile removes.
func (s *Service) createWarm(ctx context.Context, c Caller, sbx Sandbox, v TemplateVersion, once Once,
	wait bool) (_ Sandbox, done bool, err error) {
	if !s.pool.cfg.Enabled {
		return Sandbox{}, false, nil
	}
	key, kind := demandKey{v.ID, sbx.Size.Name}, sbx.kind()
	defer func() {
		if !done {
			s.pool.claimed(key, false)
		}
	}()
	if !s.want(c.OrgID, v, key, kind) {
		return Sandbox{}, false, nil
	}
	var op *operation
	m, ok := s.pool.take(func(r ready) bool { return r.kind == kind }, func(id ID) (mine bool) {
		op, mine = s.ops.begin(id, opClaim)
		return mine
	})
	if !ok {
		return Sandbox{}, false, nil
	}
	// A refusal here saves the pooled sandbox. The claim's transaction makes the decision.
	end := trace.Start(ctx, "admit")
	prior, found, err := s.store.Admit(ctx, sbx, c.Quota, once)
	end()
	if err != nil || found {
		s.pool.add(m)
		s.ops.finish(m.ID, op, nil, nil)
		return s.claimAnswered(ctx, prior, err, wait)
	}
	sbx.ID, sbx.Run, sbx.Token, sbx.Source = m.ID, m.Run, m.Token, Warm
	s.ops.do(ctx, m.ID, op, func(ctx context.Context) (any, error) {
		running, first, found, err := s.claim(ctx, sbx, c.Quota, once)
		if found {
			prior, err = first, errRepeated
		}
		return running, err
	})
	running, err := await[Sandbox](ctx, op)
	switch {
	case err == nil:
		return running, true, nil
	case errors.Is(err, errRepeated):
		return s.claimAnswered(ctx, prior, nil, wait)
	case errors.Is(err, errNotWarm):
		s.log.WarnContext(ctx, "creating a sandbox without the pool", "sandbox", m.ID, "error", err)
		return Sandbox{}, false, nil
	}
	return Sandbox{}, true, err
}

// errRepeated reports that an earlier create used the same key.
var errRepeated = errors.New("already made with the same key")

// claimAnswered returns the answer to a create that is refused, or repeats an earlier one.
func (s *Service) claimAnswered(ctx context.Context, prior Sandbox, err error, wait bool) (Sandbox, bool, error) {
	if err == nil {
		prior, err = s.repeated(ctx, prior, wait)
	}
	return prior, true, err
}

// claim turns a pooled sandbox into a running sandbox; the caller holds the pooled sandbox's operation. An error
// removes the pooled sandbox.
func (s *Service) claim(ctx context.Context, sbx Sandbox, q Quota,
	once Once) (running, prior Sandbox, found bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	defer func() {
		if err == nil && !found {
			return
		}
		if err := s.discard(context.WithoutCancel(ctx), sbx.ID); err != nil { // Reconcile tries again
			s.log.ErrorContext(ctx, "removing a member that could not be claimed", "sandbox", sbx.ID, "error", err)
		}
	}()
	if err := s.node.Claim(ctx, sbx.spec()); err != nil {
		return running, prior, false, fmt.Errorf("%w: %w", errNotWarm, err)
	}
	sbx.State, sbx.StartedAt = Running, time.Now().UTC()
	if sbx.Mode == Ephemeral {
		sbx.ExpiresAt = sbx.StartedAt.Add(sbx.Timeout)
	} else {
		sbx.LastActivityAt = sbx.StartedAt
	}
	end := trace.Start(ctx, "commit")
	prior, found, err = s.store.Claim(ctx, sbx, q, once)
	end()
	switch {
	case err == nil && found:
		return running, prior, true, nil
	case err == nil:
		s.announce(ctx, Event{SandboxID: sbx.ID, At: sbx.CreatedAt, To: Creating})
		s.announce(ctx, Event{SandboxID: sbx.ID, At: sbx.StartedAt, From: Creating, To: Running})
		s.live.track(newInstance(sbx))
		s.pool.claimed(demandKey{sbx.TemplateID, sbx.Size.Name}, true)
		return sbx, prior, false, nil
	case fault.As(err) != nil && fault.As(err).Code != fault.CodeNoMember:
		return running, prior, false, err // a cold start would fail in the same way
	}
	return running, prior, false, fmt.Errorf("%w: %w", errNotWarm, err)
}

// want records the demand of a create, and reports whether a pooled sandbox can serve it. The pool holds
// pooled sandboxes for plain requests only, for each template in use.
func (s *Service) want(orgID string, v TemplateVersion, key demandKey, kind Kind) bool {
	plain, err := s.plain(orgID, v, key.size)
	if err != nil || plain.kind() != kind {
		return false
	}
	now := time.Now()
	s.pool.mu.Lock()
	defer s.pool.mu.Unlock()
	if s.pool.demands[key] == nil && key.size != s.defaultSize(v) {
		return false
	}
	d := s.pool.demandLocked(key, orgID)
	if d.version.Version <= v.Version {
		d.version, d.kind = v, kind
	}
	d.use(now)
	return d.target > 0
}

// plain returns the sandbox of a request that gives only a template and a size.
func (s *Service) plain(orgID string, v TemplateVersion, size string) (Sandbox, error) {
	return Request{Size: size}.resolve(s.cfg, orgID, v, time.Now())
}

func (s *Service) defaultSize(v TemplateVersion) string {
	sbx, err := s.plain("", v, "")
	if err != nil {
		return ""
	}
	return sbx.Size.Name
}
