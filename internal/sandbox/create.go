package sandbox

import (
	"context"
	"errors"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/trace"
)

// Caller names the organization that asks for a running sandbox, with its quota.
type Caller struct {
	OrgID string
	Quota Quota
}

// rootUser runs commands when neither the request nor the template names a user.
const rootUser = "root"

// Create makes a sandbox for an organization and returns it running; with wait false it returns the
// sandbox at once, in state creating. Errors are Invalid, which names the field of [Request];
// NotFound or Conflict for the template or the snapshot; Exhausted over quota; Unavailable when no
// machine has room; and Conflict with code "start_failed" when the template's start command is not
// ready in time. The creation continues when ctx ends.
func (s *Service) Create(ctx context.Context, c Caller, r Request, once Once, wait bool) (Sandbox, error) {
	if err := r.check(s.cfg); err != nil {
		return Sandbox{}, err
	}
	if r.Snapshot != "" {
		return s.createFrom(ctx, c, r, once, wait)
	}
	end := trace.Start(ctx, "template")
	version, err := s.templates.Ready(ctx, c.OrgID, r.Template)
	end()
	if err != nil {
		return Sandbox{}, err
	}
	sbx, err := r.resolve(s.cfg, c.OrgID, version, time.Now())
	if err != nil {
		return Sandbox{}, err
	}
	if warm, done, err := s.createWarm(ctx, c, sbx, version, once, wait); done {
		return warm, err
	}
	return s.makeNew(ctx, c, sbx, making{spec: sbx.spec(), patience: bootTimeout + sbx.Start.Patience(), once: once,
		wait: wait, release: func() {}})
}

// createWarm serves a create from the pool if the pool has a pooled sandbox of its kind. It returns
// done when the create is answered.
func (s *Service) createWarm(ctx context.Context, c Caller, sbx Sandbox, v TemplateVersion, once Once,
	wait bool) (_ Sandbox, done bool, err error) {
	if !s.cfg.Pool.Enabled {
		return Sandbox{}, false, nil
	}
	warm, found, err := s.pool.claim(ctx, c, sbx, v, once)
	switch {
	case errors.Is(err, errNotWarm):
		return Sandbox{}, false, nil
	case err == nil && found:
		warm, err = s.repeated(ctx, warm, wait)
	}
	return warm, true, err
}

// handedOver announces a sandbox that was taken from the pool, and makes it usable.
func (s *Service) handedOver(ctx context.Context, sbx Sandbox) {
	s.announce(ctx, Event{SandboxID: sbx.ID, At: sbx.CreatedAt, To: Creating})
	s.announce(ctx, Event{SandboxID: sbx.ID, At: sbx.StartedAt, From: Creating, To: Running})
	s.live.track(newInstance(sbx))
}

// making says how makeNew makes a sandbox.
type making struct {
	spec     Spec
	patience time.Duration // limits the work on the node
	once     Once
	wait     bool   // return the sandbox when it runs, not at once
	release  func() // called after the sandbox is made or has failed
}

// makeNew makes a new sandbox.
func (s *Service) makeNew(ctx context.Context, c Caller, sbx Sandbox, m making) (Sandbox, error) {
	// begin runs before the row exists, so that no other operation can start on a row that is found, and
	// before reserve, so that the pool takes no room while the create waits for it.
	op, _ := s.ops.begin(sbx.ID, opCreate)
	if op == nil {
		m.release()
		return Sandbox{}, errClosing
	}
	room, err := s.pool.reserve(ctx, sbx)
	if err != nil {
		m.release()
		s.ops.finish(sbx.ID, op, nil, err)
		return s.repeatedWithoutRoom(ctx, c, sbx, m, err)
	}
	end := trace.Start(ctx, "insert")
	prior, found, err := s.store.Insert(ctx, sbx, c.Quota, m.once)
	end()
	if err != nil || found {
		room.release()
		m.release()
		s.ops.finish(sbx.ID, op, nil, err)
		if err != nil {
			return Sandbox{}, err
		}
		return s.repeated(ctx, prior, m.wait)
	}
	room.settle()
	s.observe(Event{SandboxID: sbx.ID, At: sbx.CreatedAt, To: Creating})
	s.ops.do(ctx, sbx.ID, op, func(ctx context.Context) (any, error) {
		defer m.release()
		defer room.release()
		return s.boot(ctx, sbx, m.spec, m.patience)
	})
	if !m.wait {
		return sbx, nil
	}
	return await[Sandbox](ctx, op)
}

// repeated answers a create that repeats an earlier one with the same key.
func (s *Service) repeated(ctx context.Context, prior Sandbox, wait bool) (Sandbox, error) {
	if err := s.held(prior); err != nil {
		return Sandbox{}, err // its node knows whether it is still being made
	}
	if op := s.ops.on(prior.ID); wait && op != nil && op.kind == opCreate {
		return await[Sandbox](ctx, op)
	}
	return s.store.Get(ctx, prior.ID)
}

// repeatedWithoutRoom answers a create for which there is no room: with the sandbox of an earlier create with the same
// key, or with why.
func (s *Service) repeatedWithoutRoom(ctx context.Context, c Caller, sbx Sandbox, m making,
	why error) (Sandbox, error) {
	if m.once.Key == "" {
		return Sandbox{}, why
	}
	prior, found, err := s.store.Admit(ctx, sbx, c.Quota, m.once)
	switch {
	case err != nil:
		return Sandbox{}, err
	case !found:
		return Sandbox{}, why
	}
	return s.repeated(ctx, prior, m.wait)
}

// bootTimeout bounds one start, without the time that its start command may take to be ready. A
// cold start takes a third of a second on a quiet machine; when fifty share it, some take seconds.
// A lower value fails creates under load; a higher one only delays the report of a broken machine.
const bootTimeout = 60 * time.Second

// boot takes a claimed row to running, or to failed.
func (s *Service) boot(ctx context.Context, sbx Sandbox, spec Spec, patience time.Duration) (Sandbox, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := s.node.Create(ctx, spec)
	if err == nil {
		now := time.Now().UTC()
		change := Change{ID: sbx.ID, From: []State{Creating}, Run: sbx.Run, To: Running, At: now, StartedAt: &now}
		if sbx.Mode == Ephemeral {
			end := now.Add(sbx.Timeout)
			change.ExpiresAt = &end
		} else {
			change.LastActivityAt = &now
		}
		running, err := s.transition(ctx, change)
		if err == nil {
			s.live.track(newInstance(running))
			return running, nil
		}
		return Sandbox{}, s.bootFailed(ctx, sbx, err)
	}
	return Sandbox{}, s.bootFailed(ctx, sbx, err)
}

// bootFailed cleans up after a failed start and records the cause, unless a destroy interrupted the
// start.
func (s *Service) bootFailed(ctx context.Context, sbx Sandbox, cause error) error {
	if context.Cause(ctx) == errInterrupted {
		return fault.New(fault.Conflict, fault.CodeSandboxNotRunning,
			"sandbox %s was destroyed while it was being created", sbx.ID)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	s.log.ErrorContext(ctx, "sandbox did not start", "sandbox", sbx.ID, "error", cause)
	if err := s.node.Destroy(ctx, sbx.ID); err != nil {
		// The row stays a claim; Reconcile settles it.
		s.log.ErrorContext(ctx, "cleaning up a failed start", "sandbox", sbx.ID, "error", err)
		return startError(sbx.ID, cause)
	}
	if err := s.fail(ctx, sbx, BootFailed, publicText(cause,
		"the sandbox did not start; the server's log has the cause")); err != nil {
		s.log.ErrorContext(ctx, "recording a failed start", "sandbox", sbx.ID, "error", err)
	}
	return startError(sbx.ID, cause)
}

// startError returns the error for the caller of a failed create. It passes an error of the node
// with a kind (no room, …) on and makes every other error internal.
func startError(id ID, cause error) error {
	if e := fault.As(cause); e != nil {
		return cause
	}
	return fault.New(fault.Internal, fault.CodeBootFailed, "sandbox %s did not start", id).Because(cause)
}

// publicText returns the detail of an error that a user may read, or otherwise if it has none.
func publicText(err error, otherwise string) string {
	if e := fault.As(err); e != nil && e.Detail != "" {
		return e.Detail
	}
	return otherwise
}

// fail ends a sandbox that never ran, or whose start was interrupted by a crash.
func (s *Service) fail(ctx context.Context, sbx Sandbox, why Reason, text string) error {
	now := time.Now().UTC()
	_, err := s.transition(ctx, Change{ID: sbx.ID, From: []State{Creating}, Run: sbx.Run, To: Failed, At: now,
		Reason: string(why), DestroyedAt: &now, DestroyReason: &why, Error: &text})
	if err != nil {
		return err
	}
	return s.store.Forget(ctx, sbx.ID)
}
