package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/trace"
)

// Config holds the operator's settings for sandboxes.
type Config struct {
	Node        string // the id of this machine's node, which holds its rows
	Sizes       []Size
	DefaultSize string // name of one of Sizes
	DefaultDisk int    // MiB
	MaxDisk     int    // MiB
	// KeepDestroyed sets how long a destroyed sandbox stays readable.
	KeepDestroyed time.Duration
	MaxDestroyed  int // readable ones of an organization; 0 means no limit
	MaxSnapshots  int // of an organization; 0 means no limit
	Pool          PoolConfig
	// Now tells the time by which rows are old, which servers with the same rows must share. A nil Now is the clock of
	// this machine.
	Now func() time.Time
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
	snapshots *snapshots

	recoveries chan struct{} // holds a token for each recovery point that a timer takes
	takedowns  chan struct{} // holds a token for each sandbox that is being removed
}

// New returns a Service. It calls observe, if not nil, after each durable transition; observe must
// not block. Call [Service.Run] to start the Service's timers.
func New(cfg Config, store Store, node Node, templates Templates, log *slog.Logger, observe func(Event)) *Service {
	if observe == nil {
		observe = func(Event) {}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	s := &Service{cfg: cfg, store: store, node: node, templates: templates, log: log, observe: observe,
		denials:    &denialLog{of: map[ID]*denials{}},
		snapshots:  &snapshots{holder: cfg.Node, store: store, node: node, log: log, uses: map[SnapshotID]*snapshotUse{}},
		recoveries: make(chan struct{}, recoveriesAtOnce), takedowns: make(chan struct{}, takedownsAtOnce)}
	s.pool = newPool(cfg, store, node, templates, log, s.handedOver)
	s.ops = s.pool.ops
	s.live = &instances{of: map[ID]*instance{}, expired: s.expire, idled: s.idled, recoveryDue: s.recoveryDue}
	return s
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

// GetAny returns a sandbox of any organization, for callers that are not identified by a key. It
// returns NotFound if there is none.
func (s *Service) GetAny(ctx context.Context, id ID) (Sandbox, error) {
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

// Pool returns the status of the pool, by template and size.
func (s *Service) Pool() []PoolStatus { return s.pool.status() }

// PoolCounts returns the counts of creates.
func (s *Service) PoolCounts() PoolCounts { return s.pool.totals() }

// Sizes returns the sizes that a sandbox may have.
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
