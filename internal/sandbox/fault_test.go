package sandbox_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/nodetest"
	"github.com/cayhq/cay/internal/sandbox"
)

var (
	errDead   = errors.New("this server is dead")
	errBroken = errors.New("injected: the database is broken")
)

// order is locked for a moment before time passes and at the beginning of each call to a node, so
// that a timer's goroutine sees the hooks as the test has set them.
var order sync.Mutex

func barrier() {
	order.Lock()
	defer order.Unlock()
}

// gate controls the calls of one server to its store and its node. When shut, it cancels calls in
// flight and fails all others, as the death of the server does.
type gate struct {
	ctx  context.Context
	shut context.CancelFunc

	writes atomic.Int64 // to the store
	away   atomic.Bool  // whether reads and transitions fail as if the database were away

	mu     sync.Mutex
	broken func(to sandbox.State) bool // reports the transitions that fail; guarded by mu
	locked bool                        // whether SetEgress of the store fails; guarded by mu
	lost   bool                        // whether the answers of SetExpiry are lost; guarded by mu
	before func()                      // called once before Unfinished; guarded by mu
	after  func()                      // called once after Get; guarded by mu
	wrote  func()                      // called once after SetExpiry or Transition; guarded by mu
}

func newGate() *gate {
	g := &gate{}
	g.ctx, g.shut = context.WithCancel(context.Background())
	return g
}

// breakTransitions makes transitions to states for which broken returns true fail. A nil broken
// stops that.
func (g *gate) breakTransitions(broken func(to sandbox.State) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.broken = broken
}

// breakPolicies makes writes of policies to the rows fail, or stops that.
func (g *gate) breakPolicies(broken bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.locked = broken
}

// onUnfinished sets a function to call just before the rows are read the next time.
func (g *gate) onUnfinished(f func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.before = f
}

// afterGet sets a function to call once after a row has been read, before it is used.
func (g *gate) afterGet(f func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.after = f
}

// afterWrite sets a function to call once after an end or a state was written, before its caller goes on.
func (g *gate) afterWrite(f func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.wrote = f
}

// loseAnswer makes SetExpiry fail after the end was written, or stops that.
func (g *gate) loseAnswer(lost bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.lost = lost
}

// written calls the function of afterWrite.
func (g *gate) written() {
	g.mu.Lock()
	wrote := g.wrote
	g.wrote = nil
	g.mu.Unlock()
	if wrote != nil {
		wrote()
	}
}

// pass returns the context for a call that begins, or an error if the gate is shut.
func (g *gate) pass(ctx context.Context) (context.Context, context.CancelFunc, error) {
	barrier()
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(g.ctx, func() { cancel(errDead) })
	var err error
	if g.ctx.Err() != nil {
		err = errDead
	}
	return ctx, func() { stop(); cancel(nil) }, err
}

// through makes a call through the gate.
func through[T any](ctx context.Context, g *gate, call func(ctx context.Context) (T, error)) (T, error) {
	ctx, done, err := g.pass(ctx)
	defer done()
	if err != nil {
		var none T
		return none, err
	}
	return call(ctx)
}

// errAway is the error of a store whose database is away.
var errAway = fault.New(fault.Unavailable, "not_ready", "away").After(2 * time.Second)

type gatedStore struct {
	sandbox.Store
	*gate
}

func (s gatedStore) Insert(ctx context.Context, b sandbox.Sandbox, q sandbox.Quota,
	once sandbox.Once) (prior sandbox.Sandbox, found bool, err error) {
	s.writes.Add(1)
	ctx, done, err := s.pass(ctx)
	defer done()
	if err != nil {
		return prior, false, err
	}
	return s.Store.Insert(ctx, b, q, once)
}

func (s gatedStore) AddPooled(ctx context.Context, m sandbox.Pooled) error {
	s.writes.Add(1)
	_, err := through(ctx, s.gate, func(ctx context.Context) (any, error) { return nil, s.Store.AddPooled(ctx, m) })
	return err
}

func (s gatedStore) DropPooled(ctx context.Context, id sandbox.ID) error {
	s.writes.Add(1)
	_, err := through(ctx, s.gate, func(ctx context.Context) (any, error) { return nil, s.Store.DropPooled(ctx, id) })
	return err
}

func (s gatedStore) Claim(ctx context.Context, b sandbox.Sandbox, q sandbox.Quota,
	once sandbox.Once) (prior sandbox.Sandbox, found bool, err error) {
	s.writes.Add(1)
	s.mu.Lock()
	broken := s.broken
	s.mu.Unlock()
	if broken != nil && broken(b.State) {
		return prior, false, errBroken
	}
	ctx, done, err := s.pass(ctx)
	defer done()
	if err != nil {
		return prior, false, err
	}
	return s.Store.Claim(ctx, b, q, once)
}

func (s gatedStore) Forget(ctx context.Context, id sandbox.ID) error {
	s.writes.Add(1)
	_, err := through(ctx, s.gate, func(ctx context.Context) (any, error) { return nil, s.Store.Forget(ctx, id) })
	return err
}

func (s gatedStore) Get(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error) {
	if s.away.Load() {
		return sandbox.Sandbox{}, errAway
	}
	sbx, err := through(ctx, s.gate, func(ctx context.Context) (sandbox.Sandbox, error) { return s.Store.Get(ctx, id) })
	s.mu.Lock()
	after := s.after
	s.after = nil
	s.mu.Unlock()
	if after != nil {
		after()
	}
	return sbx, err
}

func (s gatedStore) Transition(ctx context.Context, c sandbox.Change) (sandbox.Sandbox, error) {
	s.writes.Add(1)
	if s.away.Load() {
		return sandbox.Sandbox{}, errAway
	}
	s.mu.Lock()
	broken := s.broken
	s.mu.Unlock()
	if broken != nil && broken(c.To) {
		return sandbox.Sandbox{}, errBroken
	}
	defer s.written()
	return through(ctx, s.gate, func(ctx context.Context) (sandbox.Sandbox, error) { return s.Store.Transition(ctx, c) })
}

func (s gatedStore) SetExpiry(ctx context.Context, id sandbox.ID, at time.Time, timeout time.Duration,
	later bool) (sandbox.Sandbox, error) {
	s.writes.Add(1)
	defer s.written()
	sbx, err := through(ctx, s.gate, func(ctx context.Context) (sandbox.Sandbox, error) {
		return s.Store.SetExpiry(ctx, id, at, timeout, later)
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lost {
		return sandbox.Sandbox{}, errBroken
	}
	return sbx, err
}

func (s gatedStore) SetEgress(ctx context.Context, id sandbox.ID, e sandbox.Egress,
	note sandbox.Event) (sandbox.Sandbox, error) {
	s.writes.Add(1)
	s.mu.Lock()
	locked := s.locked
	s.mu.Unlock()
	if locked {
		return sandbox.Sandbox{}, errBroken
	}
	return through(ctx, s.gate, func(ctx context.Context) (sandbox.Sandbox, error) {
		return s.Store.SetEgress(ctx, id, e, note)
	})
}

func (s gatedStore) Note(ctx context.Context, events []sandbox.Event) error {
	s.writes.Add(1)
	_, err := through(ctx, s.gate, func(ctx context.Context) (any, error) { return nil, s.Store.Note(ctx, events) })
	return err
}

func (s gatedStore) SetActivity(ctx context.Context, last map[sandbox.ID]time.Time) error {
	s.writes.Add(1)
	_, err := through(ctx, s.gate, func(ctx context.Context) (any, error) { return nil, s.Store.SetActivity(ctx, last) })
	return err
}

func (s gatedStore) AddSnapshot(ctx context.Context, snap sandbox.Snapshot, most int) error {
	s.writes.Add(1)
	_, err := through(ctx, s.gate, func(ctx context.Context) (any, error) {
		return nil, s.Store.AddSnapshot(ctx, snap, most)
	})
	return err
}

func (s gatedStore) ReadySnapshot(ctx context.Context, id sandbox.SnapshotID, at time.Time, size int64,
	note sandbox.Event) (sandbox.Snapshot, error) {
	s.writes.Add(1)
	return through(ctx, s.gate, func(ctx context.Context) (sandbox.Snapshot, error) {
		return s.Store.ReadySnapshot(ctx, id, at, size, note)
	})
}

func (s gatedStore) EndSnapshot(ctx context.Context, id sandbox.SnapshotID) error {
	s.writes.Add(1)
	_, err := through(ctx, s.gate, func(ctx context.Context) (any, error) { return nil, s.Store.EndSnapshot(ctx, id) })
	return err
}

func (s gatedStore) DropSnapshot(ctx context.Context, id sandbox.SnapshotID) error {
	s.writes.Add(1)
	_, err := through(ctx, s.gate, func(ctx context.Context) (any, error) { return nil, s.Store.DropSnapshot(ctx, id) })
	return err
}

func (s gatedStore) Unfinished(ctx context.Context) ([]sandbox.Sandbox, error) {
	s.mu.Lock()
	before := s.before
	s.before = nil
	s.mu.Unlock()
	if before != nil {
		before()
	}
	return through(ctx, s.gate, s.Store.Unfinished)
}

type gatedNode struct {
	*nodetest.Fake
	*gate
}

func (n gatedNode) Create(ctx context.Context, spec sandbox.Spec) error {
	_, err := through(ctx, n.gate, func(ctx context.Context) (any, error) { return nil, n.Fake.Create(ctx, spec) })
	return err
}

func (n gatedNode) Prepare(ctx context.Context, spec sandbox.Spec) error {
	_, err := through(ctx, n.gate, func(ctx context.Context) (any, error) { return nil, n.Fake.Prepare(ctx, spec) })
	return err
}

func (n gatedNode) Claim(ctx context.Context, spec sandbox.Spec) error {
	_, err := through(ctx, n.gate, func(ctx context.Context) (any, error) { return nil, n.Fake.Claim(ctx, spec) })
	return err
}

func (n gatedNode) Suspend(ctx context.Context, id sandbox.ID, keep sandbox.Kept) (sandbox.Checkpoint, error) {
	return through(ctx, n.gate, func(ctx context.Context) (sandbox.Checkpoint, error) {
		return n.Fake.Suspend(ctx, id, keep)
	})
}

func (n gatedNode) Checkpoint(ctx context.Context, id sandbox.ID) (sandbox.Checkpoint, error) {
	return through(ctx, n.gate, func(ctx context.Context) (sandbox.Checkpoint, error) {
		return n.Fake.Checkpoint(ctx, id)
	})
}

func (n gatedNode) Wake(ctx context.Context, spec sandbox.Spec) error {
	_, err := through(ctx, n.gate, func(ctx context.Context) (any, error) { return nil, n.Fake.Wake(ctx, spec) })
	return err
}

func (n gatedNode) Rest(ctx context.Context, id sandbox.ID) error {
	_, err := through(ctx, n.gate, func(ctx context.Context) (any, error) { return nil, n.Fake.Rest(ctx, id) })
	return err
}

func (n gatedNode) Destroy(ctx context.Context, id sandbox.ID) error {
	_, err := through(ctx, n.gate, func(ctx context.Context) (any, error) { return nil, n.Fake.Destroy(ctx, id) })
	return err
}

func (n gatedNode) Snapshot(ctx context.Context, id sandbox.ID, to sandbox.SnapshotID) (sandbox.Checkpoint, error) {
	return through(ctx, n.gate, func(ctx context.Context) (sandbox.Checkpoint, error) {
		return n.Fake.Snapshot(ctx, id, to)
	})
}

func (n gatedNode) SnapshotCheckpoint(ctx context.Context, id sandbox.ID, to sandbox.SnapshotID,
) (sandbox.Checkpoint, error) {
	return through(ctx, n.gate, func(ctx context.Context) (sandbox.Checkpoint, error) {
		return n.Fake.SnapshotCheckpoint(ctx, id, to)
	})
}

func (n gatedNode) DropSnapshot(ctx context.Context, id sandbox.SnapshotID) error {
	_, err := through(ctx, n.gate, func(ctx context.Context) (any, error) { return nil, n.Fake.DropSnapshot(ctx, id) })
	return err
}

func (n gatedNode) Busy(ctx context.Context, id sandbox.ID) (bool, error) {
	return through(ctx, n.gate, func(ctx context.Context) (bool, error) { return n.Fake.Busy(ctx, id) })
}

func (n gatedNode) SetEgress(ctx context.Context, id sandbox.ID, e sandbox.Egress) error {
	_, err := through(ctx, n.gate, func(ctx context.Context) (any, error) { return nil, n.Fake.SetEgress(ctx, id, e) })
	return err
}

func (n gatedNode) Inspect(ctx context.Context, id sandbox.ID) (*sandbox.Observed, error) {
	return through(ctx, n.gate, func(ctx context.Context) (*sandbox.Observed, error) { return n.Fake.Inspect(ctx, id) })
}
