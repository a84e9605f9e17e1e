package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/trace"
)

// Config holds the operator's settings for sandboxes.
type Config struct {
	Sizes       []Size
	DefaultSize string // name of one of Sizes
	DefaultDisk int    // MiB
	MaxDisk     int    // MiB
	// KeepDestroyed sets how long a destroyed sandbox stays readable.
	KeepDestroyed time.Duration
	MaxDestroyed  int // readable ones of an organization; 0 means no limit
	MaxSnapshots  int // of an organization; 0 means no limit
	Pool          PoolConfig
}

// Service implements all operations on sandboxes.
type Service struct {
	cfg       Config
	store     Store
	node      Node
	templates Templates
	log       *slog.Logger
	observe   func(Event)
	pool      *pool
	ops       *operations
	live      *instances
	denials   *denialLog
	snapshots *snapshotUses

	recoveries chan struct{} // holds a token for each recovery point that a timer takes
	takedowns  chan struct{} // holds a token for each sandbox that is being removed

}

// New returns a Service. It calls observe, if not nil, after each durable transition; observe must
// not block. Call [Service.Run] to start the Service's timers.
func New(cfg Config, store Store, node Node, templates Templates, log *slog.Logger, observe func(Event)) *Service {
	if observe == nil {
		observe = func(Event) {}
	}
	s := &Service{cfg: cfg, store: store, node: node, templates: templates, log: log, observe: observe,
		denials:    &denialLog{of: map[ID]*denials{}},
		recoveries: make(chan struct{}, recoveriesAtOnce), takedowns: make(chan struct{}, takedownsAtOnce)}
	s.pool = newPool(cfg, store, node, templates, log, s.handedOver)
	s.ops = s.pool.ops
	s.live = &instances{of: map[ID]*instance{}, expired: s.expire, idled: s.idled, recoveryDue: s.recoveryDue}
	s.snapshots = &snapshotUses{of: map[SnapshotID]*snapshotUse{}, remove: func(id SnapshotID) {
		s.abandonSnapshot(context.Background(), id, true)
	}}
	return s
}

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
	return s.makeNew(ctx, c, sbx, sbx.spec(), bootTimeout+sbx.Start.Patience(), once, wait, func() {})
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

// Pool returns the status of the pool, by template and size.
func (s *Service) Pool() []PoolStatus { return s.pool.status() }

// PoolCounts returns the counts of creates.
func (s *Service) PoolCounts() PoolCounts { return s.pool.totals() }

// makeNew makes a new sandbox from spec within patience. It calls release after the sandbox is made
// or has failed.
func (s *Service) makeNew(ctx context.Context, c Caller, sbx Sandbox, spec Spec, patience time.Duration, once Once,
	wait bool, release func()) (Sandbox, error) {
	// begin runs before the row exists, so that no other operation can start on a row that is found, and
	// before room, so that the pool takes no room while the create waits for it.
	op, _ := s.ops.begin(sbx.ID, opCreate)
	if op == nil {
		release()
		return Sandbox{}, errClosing
	}
	if err := s.pool.room(ctx, sbx.Size); err != nil {
		release()
		s.ops.finish(sbx.ID, op, nil, err)
		return Sandbox{}, err
	}
	end := trace.Start(ctx, "insert")
	prior, found, err := s.store.Insert(ctx, sbx, c.Quota, once)
	end()
	if err != nil || found {
		release()
		s.ops.finish(sbx.ID, op, nil, err)
		if err != nil {
			return Sandbox{}, err
		}
		return s.repeated(ctx, prior, wait)
	}
	s.observe(Event{SandboxID: sbx.ID, At: sbx.CreatedAt, To: Creating})
	s.ops.do(ctx, sbx.ID, op, func(ctx context.Context) (any, error) {
		defer release()
		return s.boot(ctx, sbx, spec, patience)
	})
	if !wait {
		return sbx, nil
	}
	return await[Sandbox](ctx, op)
}

// repeated answers a create that repeats an earlier one with the same key.
func (s *Service) repeated(ctx context.Context, prior Sandbox, wait bool) (Sandbox, error) {
	if op := s.ops.on(prior.ID); wait && op != nil && op.kind == opCreate {
		return await[Sandbox](ctx, op)
	}
	return s.store.Get(ctx, prior.ID)
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

// Get returns a sandbox of the organization. It returns NotFound if there is none and Denied, code
// "not_your_sandbox", if it belongs to another organization. It counts as no activity and wakes no
// sandbox.
func (s *Service) Get(ctx context.Context, orgID string, id ID) (Sandbox, error) {
	if !id.Valid() {
		return Sandbox{}, notFound(id)
	}
	sbx, err := s.store.Get(ctx, id)
	if err != nil {
		return Sandbox{}, err
	}
	if sbx.OrgID != orgID {
		return Sandbox{}, fault.New(fault.Denied, fault.CodeNotYourSandbox, "sandbox %s belongs to another organization", id)
	}
	return s.live.shown(sbx), nil
}

func notFound(id ID) error {
	return fault.New(fault.NotFound, fault.CodeSandboxNotFound, "there is no sandbox %q", string(id))
}

// notRunning returns the error for a call that needs a running sandbox.
func notRunning(sbx Sandbox) error {
	return fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s is %s", sbx.ID, sbx.State)
}

// List returns a page of the organization's sandboxes.
func (s *Service) List(ctx context.Context, f Filter) ([]Sandbox, string, error) {
	sandboxes, next, err := s.store.List(ctx, f)
	for i := range sandboxes {
		sandboxes[i] = s.live.shown(sandboxes[i])
	}
	return sandboxes, next, err
}

// Keepalive gives an ephemeral sandbox a new lifetime from now. A nil lifetime means the sandbox's
// own; one above [MaxTimeout] is cut to it. Keepalive returns Conflict if the sandbox is not
// ephemeral or not running.
func (s *Service) Keepalive(ctx context.Context, orgID string, id ID, timeout *time.Duration) (Sandbox, error) {
	sbx, err := s.Get(ctx, orgID, id)
	if err != nil {
		return Sandbox{}, err
	}
	lifetime := sbx.Timeout
	if timeout != nil {
		if *timeout < MinTimeout {
			return Sandbox{}, invalid("timeout", "must be at least %s", MinTimeout)
		}
		lifetime = min(*timeout, MaxTimeout)
	}
	if sbx.Mode != Ephemeral {
		return Sandbox{}, notEphemeral(sbx)
	}
	if sbx, err = s.store.SetExpiry(ctx, id, time.Now().UTC().Add(lifetime), lifetime, false); err != nil {
		return Sandbox{}, err
	}
	s.extend(sbx)
	return sbx, nil
}

// Lookup returns a sandbox of any organization, for callers that are not identified by a key. It
// returns NotFound if there is none.
func (s *Service) Lookup(ctx context.Context, id ID) (Sandbox, error) {
	if !id.Valid() {
		return Sandbox{}, notFound(id)
	}
	return s.store.Get(ctx, id)
}

// Living returns the IDs of all organizations' sandboxes that are not over.
func (s *Service) Living(ctx context.Context) ([]ID, error) { return s.store.Living(ctx) }

// Events returns a page of a sandbox's events, newest first.
func (s *Service) Events(ctx context.Context, orgID string, id ID, limit int, cursor string) ([]Event, string, error) {
	if _, err := s.Get(ctx, orgID, id); err != nil {
		return nil, "", err
	}
	return s.store.Events(ctx, id, limit, cursor)
}

// Sizes returns the presets.
func (s *Service) Sizes() []Size { return s.cfg.Sizes }

// SizeOf returns the size and the disk, in MiB, of a sandbox whose template names these; "" and 0 are the
// configured defaults.
func (s *Service) SizeOf(name string, diskMB int) (Size, int) {
	for _, size := range s.cfg.Sizes {
		if size.Name == cmp.Or(name, s.cfg.DefaultSize) {
			return size, cmp.Or(diskMB, s.cfg.DefaultDisk)
		}
	}
	return Size{}, cmp.Or(diskMB, s.cfg.DefaultDisk)
}

// transition makes every change of state: it writes the row, then logs it and calls observe.
func (s *Service) transition(ctx context.Context, c Change) (Sandbox, error) {
	for _, from := range c.From {
		if !slices.Contains(moves[from], c.To) {
			return Sandbox{}, fmt.Errorf("a sandbox never goes from %s to %s", from, c.To)
		}
	}
	end := trace.Start(ctx, "commit")
	before, err := s.store.Transition(ctx, c)
	end()
	if err != nil {
		return before, err
	}
	s.announce(ctx, Event{SandboxID: c.ID, At: c.At, To: c.To, Reason: c.Reason, Detail: c.Detail})
	return before, nil
}

// announce logs a durable transition and passes it to observe.
func (s *Service) announce(ctx context.Context, e Event) {
	s.log.InfoContext(ctx, "sandbox "+string(e.To), "sandbox", e.SandboxID, "state", e.To, "reason", e.Reason,
		"detail", e.Detail)
	s.observe(e)
}
