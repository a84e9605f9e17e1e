package sandbox

import (
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

// Service implements all operations on sandboxes. Those that need the machine return Unavailable, code "elsewhere", for
// a sandbox or a snapshot that another node holds, with that node.
type Service struct {
	*Rows
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
	s := &Service{Rows: NewRows(cfg, store), cfg: cfg, store: store, node: node, templates: templates, log: log,
		observe:    observe,
		denials:    &denialLog{of: map[ID]*denials{}},
		recoveries: make(chan struct{}, recoveriesAtOnce), takedowns: make(chan struct{}, takedownsAtOnce)}
	s.pool = newPool(cfg, store, node, templates, log, s.handedOver)
	s.ops = s.pool.ops
	s.live = &instances{of: map[ID]*instance{}, expired: s.expire, idled: s.idled, recoveryDue: s.recoveryDue}
	s.shown = s.live.shown
	s.snapshots = &snapshots{holder: cfg.Node, rows: s.Rows, store: store, node: node, log: log,
		uses: map[SnapshotID]*snapshotUse{}}
	return s
}

// notRunning returns the error for a call that needs a running sandbox.
func notRunning(sbx Sandbox) error {
	return fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s is %s", sbx.ID, sbx.State)
}

// Pool returns the status of the pool, by template and size.
func (s *Service) Pool() []PoolStatus { return s.pool.status() }

// PoolCounts returns the counts of creates.
func (s *Service) PoolCounts() PoolCounts { return s.pool.totals() }

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
