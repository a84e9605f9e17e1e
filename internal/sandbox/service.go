package sandbox

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// Config is what the operator decides about sandboxes.
type Config struct {
	Sizes       []Size
	DefaultSize string // name of one of Sizes
	DefaultDisk int    // MiB
	MaxDisk     int    // MiB
	// KeepDestroyed is how long a destroyed sandbox stays readable.
	KeepDestroyed time.Duration
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

	mu sync.Mutex
	// +checklocks:mu
	work map[ID]*operation // what is being done, at most one per sandbox; guarded by mu
	// +checklocks:mu
	timers map[ID]*time.Timer // ends of ephemeral lives; guarded by mu
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
	return &Service{cfg: cfg, store: store, node: node, templates: templates, log: log, observe: observe,
		work: map[ID]*operation{}, timers: map[ID]*time.Timer{}}
}

// Lease is the right to talk to a running sandbox's agent. While it is held the
// sandbox counts as in use. Release it exactly once.
type Lease struct {
	Sandbox Sandbox // with its Token
	leases  *atomic.Int64
}

// Release ends the lease.
func (l *Lease) Release() { l.leases.Add(-1) }

// InUse is the number of leases held now.
func (s *Service) InUse() int64 { return s.leases.Load() }

// Create makes a sandbox for an organization and returns it running; with
// wait false it returns at once, creating. See [Request] for what is refused:
// Invalid naming the field, NotFound or Conflict for the template, Exhausted
// over quota, Unavailable when no machine has room, Unsupported for what this
// version does not enforce yet. The sandbox goes on being made when ctx ends.
func (s *Service) Create(ctx context.Context, orgID string, q Quota, r Request, once Once, wait bool) (Sandbox, error) {
	if err := r.check(s.cfg); err != nil {
		return Sandbox{}, err
	}
	version, err := s.templates.Ready(ctx, orgID, r.Template)
	if err != nil {
		return Sandbox{}, err
	}
	box, err := r.resolve(s.cfg, orgID, version, time.Now())
	if err != nil {
		return Sandbox{}, err
	}
	if err := s.node.Room(ctx, box.Size); err != nil {
		return Sandbox{}, err
	}
	// The claim is taken before the row exists, so that nobody who finds the row
	// can come between.
	op := s.begin(box.ID, opCreate)
	if op == nil {
		return Sandbox{}, errClosing
	}
	prior, found, err := s.store.Insert(ctx, box, q, once)
	if err != nil || found {
		s.finish(box.ID, op, Sandbox{}, err)
		if err != nil {
			return Sandbox{}, err
		}
		return s.repeated(ctx, prior, wait)
	}
	s.observe(Event{SandboxID: box.ID, At: box.CreatedAt, To: Creating})
	go func() {
		made, err := s.boot(op.ctx, box)
		s.finish(box.ID, op, made, err)
	}()
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

// bootTimeout bounds one start. A cold start takes a third of a second on a quiet
// machine; when fifty share it, some take seconds. Too low fails creates under load,
// too high only delays the report of a machine that is broken.
const bootTimeout = 60 * time.Second

// boot takes a claimed row to running, or to failed.
func (s *Service) boot(ctx context.Context, box Sandbox) (Sandbox, error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	err := s.node.Create(ctx, box.spec())
	if err == nil {
		now := time.Now().UTC()
		change := Change{ID: box.ID, From: []State{Creating}, Run: box.Run, To: Running, At: now, StartedAt: &now}
		if box.Mode == Ephemeral {
			end := now.Add(box.Timeout)
			change.ExpiresAt = &end
		}
		running, err := s.transition(ctx, change)
		if err == nil {
			s.arm(running)
			return running, nil
		}
		return Sandbox{}, s.bootFailed(ctx, box, err)
	}
	return Sandbox{}, s.bootFailed(ctx, box, err)
}

// bootFailed cleans up and writes down why, unless destroy took over.
func (s *Service) bootFailed(ctx context.Context, box Sandbox, cause error) error {
	if context.Cause(ctx) == errInterrupted {
		return fault.New(fault.Conflict, "sandbox_not_running", "sandbox %s was destroyed while it was being created", box.ID)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	s.log.ErrorContext(ctx, "sandbox did not start", "sandbox", box.ID, "error", cause)
	if err := s.node.Destroy(ctx, box.ID); err != nil {
		// The row stays a claim; reconcile comes back for it.
		s.log.ErrorContext(ctx, "cleaning up a failed start", "sandbox", box.ID, "error", err)
		return startError(box.ID, cause)
	}
	if err := s.fail(ctx, box, BootFailed, publicText(cause)); err != nil {
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

func publicText(err error) string {
	if e := fault.As(err); e != nil {
		return e.Detail
	}
	return "the sandbox did not start; the server's log has the cause"
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
// (code "not_your_sandbox") if it is another's.
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
	return box, nil
}

func notFound(id ID) error {
	return fault.New(fault.NotFound, "sandbox_not_found", "there is no sandbox %q", string(id))
}

// notRunning is the answer to a call that needs a running sandbox.
func notRunning(box Sandbox) error {
	return fault.New(fault.Conflict, "sandbox_not_running", "sandbox %s is %s", box.ID, box.State)
}

// List returns a page of the organization's sandboxes.
func (s *Service) List(ctx context.Context, f Filter) ([]Sandbox, string, error) {
	return s.store.List(ctx, f)
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
		return Sandbox{}, fault.New(fault.Conflict, "sandbox_not_ephemeral", "sandbox %s is %s and has no timeout to extend", id, box.Mode)
	}
	if box, err = s.store.SetExpiry(ctx, id, time.Now().UTC().Add(life), life); err != nil {
		return Sandbox{}, err
	}
	s.arm(box)
	return box, nil
}

// Connect waits until a sandbox being created runs and leases it. A state that
// cannot become running is Conflict, code "sandbox_not_running".
func (s *Service) Connect(ctx context.Context, orgID string, id ID) (*Lease, error) {
	box, err := s.Wake(ctx, orgID, id)
	if err != nil {
		return nil, err
	}
	s.leases.Add(1)
	return &Lease{Sandbox: box, leases: &s.leases}, nil
}

// Wake answers with a running sandbox as it is. Creating and destroyed ones are
// Conflict, code "sandbox_not_running".
func (s *Service) Wake(ctx context.Context, orgID string, id ID) (Sandbox, error) {
	box, err := s.Get(ctx, orgID, id)
	if err != nil {
		return Sandbox{}, err
	}
	if box.State != Running {
		return Sandbox{}, notRunning(box)
	}
	return box, nil
}

// Suspend is Conflict for every sandbox of this version: none is persistent.
func (s *Service) Suspend(ctx context.Context, orgID string, id ID) (Sandbox, error) {
	return s.persistentOnly(ctx, orgID, id)
}

// Checkpoint is Conflict for every sandbox of this version: none is persistent.
func (s *Service) Checkpoint(ctx context.Context, orgID string, id ID) (Sandbox, error) {
	return s.persistentOnly(ctx, orgID, id)
}

func (s *Service) persistentOnly(ctx context.Context, orgID string, id ID) (Sandbox, error) {
	box, err := s.Get(ctx, orgID, id)
	if err != nil {
		return Sandbox{}, err
	}
	if box.State != Running {
		return Sandbox{}, notRunning(box)
	}
	return Sandbox{}, fault.New(fault.Conflict, "sandbox_not_persistent", "sandbox %s is %s: only persistent ones are suspended", id, box.Mode)
}

// SetEgress replaces the policy of a running sandbox. Until deny_all is enforced
// it is refused as Unsupported, and allow_all is what every sandbox has.
func (s *Service) SetEgress(ctx context.Context, orgID string, id ID, e Egress) (Sandbox, error) {
	box, err := s.Wake(ctx, orgID, id)
	if err != nil {
		return Sandbox{}, err
	}
	return box, enforceable(e)
}

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
	before, err := s.store.Transition(ctx, c)
	if err != nil {
		return before, err
	}
	s.log.InfoContext(ctx, "sandbox "+string(c.To), "sandbox", c.ID, "state", c.To, "reason", c.Reason)
	s.observe(Event{SandboxID: c.ID, At: c.At, To: c.To, Reason: c.Reason})
	return before, nil
}
