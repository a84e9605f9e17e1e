package sandbox

import (
	"cmp"
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/trace"
)

// Config is what the operator decides about sandboxes.
type Config struct {
	Sizes       []Size
	DefaultSize string // name of one of Sizes
	DefaultDisk int    // MiB
	MaxDisk     int    // MiB
	// KeepDestroyed is how long a destroyed sandbox stays readable.
	KeepDestroyed time.Duration
	MaxDestroyed  int // of one organization that stay readable; 0 is no limit
	MaxSnapshots  int // of one organization; 0 is no limit
	Pool          PoolConfig
}

// Service is the core of cay: all operations on sandboxes.
type Service struct {
	cfg       Config
	store     Store
	node      Node
	templates Templates
	log       *slog.Logger
	observe   func(Event)
	leases    atomic.Int64
	pool      *pool

	recoveries chan struct{} // one in it for each recovery point being taken by timer
	takedowns  chan struct{} // one in it for each sandbox being taken apart

	mu sync.Mutex
	// +checklocks:mu
	work map[ID]*operation // what is being done, at most one per sandbox; guarded by mu
	// +checklocks:mu
	lives map[ID]*life // of running sandboxes, while they may be used; guarded by mu
	// +checklocks:mu
	denials map[ID]*denials // not yet events; guarded by mu
	// +checklocks:mu
	snapshots map[SnapshotID]*snapshotUse // that somebody works with; guarded by mu
	// +checklocks:mu
	served time.Time // when somebody last waited for a sandbox; guarded by mu
	// +checklocks:mu
	closed bool           // no timers and no operations start any more; guarded by mu
	wg     sync.WaitGroup // operations under way
}

// New makes a Service. observe, if not nil, is told of every transition after it
// is durable; it must not block. Call [Service.Run] to start its timers.
func New(cfg Config, store Store, node Node, templates Templates, log *slog.Logger, observe func(Event)) *Service {
	if observe == nil {
		observe = func(Event) {}
	}
	return &Service{cfg: cfg, store: store, node: node, templates: templates, log: log, observe: observe, pool: newPool(cfg.Pool),
		recoveries: make(chan struct{}, recoveriesAtOnce), takedowns: make(chan struct{}, takedownsAtOnce), work: map[ID]*operation{}, lives: map[ID]*life{},
		denials: map[ID]*denials{}, snapshots: map[SnapshotID]*snapshotUse{}}
}

// Caller is the organization that asks for a sandbox to run, and what it may have.
type Caller struct {
	OrgID string
	Quota Quota
}

// rootUser is whom commands run as where nobody says.
const rootUser = "root"

// Create makes a sandbox for an organization and returns it running; with
// wait false it returns at once, creating. See [Request] for what is refused:
// Invalid naming the field, NotFound or Conflict for the template or the snapshot, Exhausted
// over quota, Unavailable when no machine has room, Conflict with code "start_failed" when
// the template's start command is not ready in time. The sandbox goes on being made when
// ctx ends.
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
	box, err := r.resolve(s.cfg, c.OrgID, version, time.Now())
	if err != nil {
		return Sandbox{}, err
	}
	if box.User != version.User {
		version.Start.User = cmp.Or(version.User, rootUser) // the template's command is the template's
	}
	if warm, done, err := s.createWarm(ctx, c, box, version, once, wait); done {
		return warm, err
	}
	spec := box.spec()
	spec.Start = version.Start // not in the row: a create that is interrupted is not taken up again
	return s.makeNew(ctx, c, box, spec, bootTimeout+version.Start.Patience(), once, wait, func() {})
}

// makeNew makes a new sandbox as spec says, within patience, and calls release once it is
// made or cannot be.
func (s *Service) makeNew(ctx context.Context, c Caller, box Sandbox, spec Spec, patience time.Duration, once Once, wait bool, release func()) (Sandbox, error) {
	if err := s.room(ctx, box.Size); err != nil {
		release()
		return Sandbox{}, err
	}
	// The claim is taken before the row exists, so that nobody who finds the row
	// can come between.
	op, _ := s.begin(box.ID, opCreate)
	if op == nil {
		release()
		return Sandbox{}, errClosing
	}
	end := trace.Start(ctx, "insert")
	prior, found, err := s.store.Insert(ctx, box, c.Quota, once)
	end()
	if err != nil || found {
		release()
		s.finish(box.ID, op, Sandbox{}, err)
		if err != nil {
			return Sandbox{}, err
		}
		return s.repeated(ctx, prior, wait)
	}
	s.observe(Event{SandboxID: box.ID, At: box.CreatedAt, To: Creating})
	s.do(ctx, box.ID, op, func(ctx context.Context) (Sandbox, error) {
		defer release()
		return s.boot(ctx, box, spec, patience)
	})
	if !wait {
		return box, nil
	}
	return op.wait(ctx)
}

// repeated answers a create that was made before under the same key.
func (s *Service) repeated(ctx context.Context, prior Sandbox, wait bool) (Sandbox, error) {
	if op := s.current(prior.ID, opCreate); wait && op != nil {
		return op.wait(ctx)
	}
	return s.store.Get(ctx, prior.ID)
}

// bootTimeout bounds one start, but for what its start command may take to be ready. A cold start takes a third of a second on a quiet
// machine; when fifty share it, some take seconds. Too low fails creates under load,
// too high only delays the report of a machine that is broken.
const bootTimeout = 60 * time.Second

// boot takes a claimed row to running, or to failed.
func (s *Service) boot(ctx context.Context, box Sandbox, spec Spec, patience time.Duration) (Sandbox, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := s.node.Create(ctx, spec)
	if err == nil {
		now := time.Now().UTC()
		change := Change{ID: box.ID, From: []State{Creating}, Run: box.Run, To: Running, At: now, StartedAt: &now}
		if box.Mode == Ephemeral {
			end := now.Add(box.Timeout)
			change.ExpiresAt = &end
		} else {
			change.LastActivityAt = &now
		}
		running, err := s.transition(ctx, change)
		if err == nil {
			s.track(newLife(running))
			return running, nil
		}
		return Sandbox{}, s.bootFailed(ctx, box, err)
	}
	return Sandbox{}, s.bootFailed(ctx, box, err)
}

// bootFailed cleans up and writes down why, unless destroy took over.
func (s *Service) bootFailed(ctx context.Context, box Sandbox, cause error) error {
	if context.Cause(ctx) == errInterrupted {
		return fault.New(fault.Conflict, codeNotRunning, "sandbox %s was destroyed while it was being created", box.ID)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	s.log.ErrorContext(ctx, "sandbox did not start", "sandbox", box.ID, "error", cause)
	if err := s.node.Destroy(ctx, box.ID); err != nil {
		// The row stays a claim; reconcile comes back for it.
		s.log.ErrorContext(ctx, "cleaning up a failed start", "sandbox", box.ID, "error", err)
		return startError(box.ID, cause)
	}
	if err := s.fail(ctx, box, BootFailed, publicText(cause, "the sandbox did not start; the server's log has the cause")); err != nil {
		s.log.ErrorContext(ctx, "writing down a failed start", "sandbox", box.ID, "error", err)
	}
	return startError(box.ID, cause)
}

// startError is what the caller of a create that failed is told. A kind the node
// gave (no room, …) goes through; anything else is internal.
func startError(id ID, cause error) error {
	if e := fault.As(cause); e != nil {
		return cause
	}
	return fault.New(fault.Internal, "boot_failed", "sandbox %s did not start", id).Because(cause)
}

// publicText is what a user may read of an error: its detail, else what stands in.
func publicText(err error, otherwise string) string {
	if e := fault.As(err); e != nil && e.Detail != "" {
		return e.Detail
	}
	return otherwise
}

// fail ends a sandbox that never ran, or whose start a crash interrupted.
func (s *Service) fail(ctx context.Context, box Sandbox, why Reason, text string) error {
	now := time.Now().UTC()
	_, err := s.transition(ctx, Change{ID: box.ID, From: []State{Creating}, Run: box.Run, To: Failed, At: now,
		Reason: string(why), DestroyedAt: &now, DestroyReason: &why, Error: &text})
	if err != nil {
		return err
	}
	return s.store.Forget(ctx, box.ID)
}

// Get returns a sandbox of the organization: NotFound if there is none, Denied
// (code "not_your_sandbox") if it is another's. It is no activity and wakes nobody.
func (s *Service) Get(ctx context.Context, orgID string, id ID) (Sandbox, error) {
	if !id.Valid() {
		return Sandbox{}, notFound(id)
	}
	box, err := s.store.Get(ctx, id)
	if err != nil {
		return Sandbox{}, err
	}
	if box.OrgID != orgID {
		return Sandbox{}, fault.New(fault.Denied, "not_your_sandbox", "sandbox %s belongs to another organization", id)
	}
	return s.shown(box), nil
}

func notFound(id ID) error {
	return fault.New(fault.NotFound, "sandbox_not_found", "there is no sandbox %q", string(id))
}

const codeNotRunning = "sandbox_not_running"

// notRunning is the answer to a call that needs a running sandbox.
func notRunning(box Sandbox) error {
	return fault.New(fault.Conflict, codeNotRunning, "sandbox %s is %s", box.ID, box.State)
}

// List returns a page of the organization's sandboxes.
func (s *Service) List(ctx context.Context, f Filter) ([]Sandbox, string, error) {
	boxes, next, err := s.store.List(ctx, f)
	for i := range boxes {
		boxes[i] = s.shown(boxes[i])
	}
	return boxes, next, err
}

// Keepalive gives an ephemeral sandbox a new lifetime from now; nil is its own,
// and more than [MaxTimeout] is taken as that. Conflict when it is not ephemeral or
// not running.
func (s *Service) Keepalive(ctx context.Context, orgID string, id ID, timeout *time.Duration) (Sandbox, error) {
	box, err := s.Get(ctx, orgID, id)
	if err != nil {
		return Sandbox{}, err
	}
	life := box.Timeout
	if timeout != nil {
		if *timeout < MinTimeout {
			return Sandbox{}, invalid("timeout", "must be at least %s", MinTimeout)
		}
		life = min(*timeout, MaxTimeout)
	}
	if box.Mode != Ephemeral {
		return Sandbox{}, notEphemeral(box)
	}
	if box, err = s.store.SetExpiry(ctx, id, time.Now().UTC().Add(life), life, false); err != nil {
		return Sandbox{}, err
	}
	s.extend(box)
	return box, nil
}

// Lookup returns a sandbox whoever's it is, for a caller who is known by something else
// than a key: NotFound if there is none.
func (s *Service) Lookup(ctx context.Context, id ID) (Sandbox, error) {
	if !id.Valid() {
		return Sandbox{}, notFound(id)
	}
	return s.store.Get(ctx, id)
}

// Living lists the sandboxes of all organizations that are not over.
func (s *Service) Living(ctx context.Context) ([]ID, error) { return s.store.Living(ctx) }

// Events pages a sandbox's events, newest first.
func (s *Service) Events(ctx context.Context, orgID string, id ID, limit int, cursor string) ([]Event, string, error) {
	if _, err := s.Get(ctx, orgID, id); err != nil {
		return nil, "", err
	}
	return s.store.Events(ctx, id, limit, cursor)
}

// Sizes lists the presets.
func (s *Service) Sizes() []Size { return s.cfg.Sizes }

// transition is the one door between states: the row, then the log line and
// whoever observes.
func (s *Service) transition(ctx context.Context, c Change) (Sandbox, error) {
	end := trace.Start(ctx, "commit")
	before, err := s.store.Transition(ctx, c)
	end()
	if err != nil {
		return before, err
	}
	s.announce(ctx, Event{SandboxID: c.ID, At: c.At, To: c.To, Reason: c.Reason, Detail: c.Detail})
	return before, nil
}

// announce tells of a transition that is durable.
func (s *Service) announce(ctx context.Context, e Event) {
	s.log.InfoContext(ctx, "sandbox "+string(e.To), "sandbox", e.SandboxID, "state", e.To, "reason", e.Reason, "detail", e.Detail)
	s.observe(e)
}
