package sandbox

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/trace"
)

type opKind string

const (
	opCreate     opKind = "create"
	opDestroy    opKind = "destroy"
	opSuspend    opKind = "suspend"
	opWake       opKind = "wake"
	opDropMemory opKind = "drop_memory"
	opCheckpoint opKind = "checkpoint"
	opEgress     opKind = "egress"
	opSnapshot   opKind = "snapshot"
	opFork       opKind = "fork"
	opClaim      opKind = "claim"   // a create from the pool
	opPrepare    opKind = "prepare" // a new pooled sandbox
	opSettle     opKind = "settle"  // makes row and host agree
)

// foreground reports whether a caller waits for a sandbox to run.
func (k opKind) foreground() bool {
	return k == opCreate || k == opClaim || k == opWake || k == opDropMemory
}

// rule says in which states an operation may be asked for, in which it acts, and what states it
// leads to. Operations that make a sandbox, end it or settle it have no rule: they begin with no row,
// or in any state. The runner reads asked, acts and shared. TestOperations holds claim, done and failed, and moves
// refuses a transition that is not legal.
type rule struct {
	// asked has the states of the row in which a caller may ask for the operation; a sandbox in another
	// state is refused. A caller waits for an operation under way, and asks again.
	asked []State
	// acts has the states in which the operation acts, once no other is under way and claims that a
	// crash left are settled.
	acts []State
	// claim is written before the machine is touched; "" for an operation that keeps the state.
	claim State
	// done is the state after success; "" is the state of before.
	done State
	// failed has the states that an error of the machine may lead to.
	failed []State
	// shared reports whether a caller that finds the same operation under way takes its result.
	shared bool
}

// rules has the rule of each operation that callers ask for.
var rules = map[opKind]rule{
	opSuspend: {asked: []State{Running, Suspending}, acts: []State{Running}, claim: Suspending, done: Suspended,
		failed: []State{Running, Suspended, Destroyed}, shared: true},
	opWake: {asked: []State{Creating, Running, Suspending, Suspended, Waking}, acts: []State{Running, Suspended},
		claim: Waking, done: Running, failed: []State{Suspended}, shared: true},
	opDropMemory: {asked: []State{Running, Suspending, Suspended, Waking}, acts: []State{Running, Suspended},
		claim: Waking, failed: []State{Suspended}},
	opCheckpoint: {asked: []State{Running, Suspending}, acts: []State{Running},
		failed: []State{Running, Suspended, Destroyed}, shared: true},
	opEgress: {asked: []State{Creating, Running, Suspending, Suspended, Waking}, acts: []State{Running, Suspended},
		failed: []State{Running}},
	opSnapshot: {asked: []State{Running, Suspending, Suspended, Waking}, acts: []State{Running, Suspended},
		failed: []State{Running, Suspended, Destroyed}},
	opFork: {asked: []State{Running, Suspending}, acts: []State{Running},
		failed: []State{Running, Suspended, Destroyed}},
}

// refuse returns an error for a sandbox in a state in which the operation may not be asked for.
func (r rule) refuse(sbx Sandbox) error {
	if !slices.Contains(r.asked, sbx.State) {
		return notRunning(sbx)
	}
	return nil
}

// moves has the states that each state may lead to. Every transition is one of them.
var moves = map[State][]State{
	Creating:   {Running, Failed, Destroying},
	Running:    {Suspending, Suspended, Destroying},
	Suspending: {Suspended, Running, Destroying},
	Suspended:  {Waking, Destroying},
	Waking:     {Running, Suspended, Destroying},
	Destroying: {Destroyed},
}

// operation holds the state of work on one sandbox in this process. Its context outlives the
// request that began it; only destroy cancels it early.
type operation struct {
	kind   opKind
	ctx    context.Context
	cancel context.CancelCauseFunc
	// claimed is closed when a destroy is durable. No caller waits for the rest of the destroy.
	claimed chan struct{}
	done    chan struct{} // closed by finish, after the fields below are set
	result  any           // of one type for all operations of a kind; nil if the kind has no result
	err     error
}

// await returns the operation's result, or ctx's error if that ends first. T is the type of the
// results of the operation's kind.
func await[T any](ctx context.Context, op *operation) (result T, err error) {
	if err := op.ended(ctx); err != nil {
		return result, err
	}
	result, _ = op.result.(T) // an operation that failed may have none
	return result, op.err
}

// ended waits until the operation is over, whether it failed or not, or until ctx ends.
func (op *operation) ended(ctx context.Context) error {
	select {
	case <-op.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

var (
	errInterrupted = errors.New("interrupted by destroy")
	errClosing     = fault.New(fault.Unavailable, fault.CodeShuttingDown,
		"the server is shutting down").After(2 * time.Second)
)

// operations holds the operations under way in this process, at most one for each sandbox.
type operations struct {
	over func() // called after each operation

	mu sync.Mutex
	// +checklocks:mu
	underWay map[ID]*operation
	// +checklocks:mu
	served time.Time // when a caller last waited for a sandbox
	// +checklocks:mu
	closed bool           // no more operations may begin
	wg     sync.WaitGroup // operations under way, and goroutines of spawn
}

func newOperations(over func()) *operations {
	return &operations{over: over, underWay: map[ID]*operation{}}
}

// begin registers an operation on a sandbox that has none (mine), or returns the operation under
// way. It returns nil when there is none and the service is closing.
func (o *operations) begin(id ID, kind opKind) (op *operation, mine bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if op := o.underWay[id]; op != nil || o.closed {
		return op, false
	}
	op = &operation{kind: kind, claimed: make(chan struct{}), done: make(chan struct{})}
	op.ctx, op.cancel = context.WithCancelCause(context.Background())
	o.underWay[id] = op
	o.wg.Add(1)
	return op, true
}

// spawn runs f in a goroutine that close waits for, and reports whether it does: not when the service
// is closing. f may wait for operations.
func (o *operations) spawn(f func()) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.closed {
		return false
	}
	o.wg.Go(f)
	return true
}

// do starts work for the operation that the caller has begun, and finishes the operation after it.
// It does not wait for work, and uses ctx only for measurements.
func (o *operations) do(ctx context.Context, id ID, op *operation, work func(ctx context.Context) (any, error)) {
	ctx = trace.Carry(op.ctx, ctx)
	go func() {
		result, err := work(ctx)
		if err != nil && fault.As(err) == nil && context.Cause(ctx) == errInterrupted {
			// The error follows from the destroy.
			err = fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s was destroyed meanwhile", id).Because(err)
		}
		o.finish(id, op, result, err)
	}()
}

// finish stores the result and wakes all waiters.
func (o *operations) finish(id ID, op *operation, result any, err error) {
	o.mu.Lock()
	delete(o.underWay, id)
	if op.kind.foreground() {
		o.served = time.Now()
	}
	o.mu.Unlock()
	o.over()
	op.result, op.err = result, err
	op.cancel(nil)
	close(op.done)
	o.wg.Done()
}

// run does work as an operation in the calling goroutine, and returns the operation with its result.
// If another operation is under way, it waits for that one instead and returns it with mine false. It
// returns nil when the service is closing.
func (o *operations) run(id ID, kind opKind,
	work func(ctx context.Context) (any, error)) (op *operation, mine bool) {
	op, mine = o.begin(id, kind)
	switch {
	case mine:
		result, err := work(op.ctx)
		o.finish(id, op, result, err)
	case op != nil:
		<-op.done
	}
	return op, mine
}

// on returns the operation under way on the sandbox, or nil if there is none.
func (o *operations) on(id ID) *operation {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.underWay[id]
}

// of returns an operation of the kind under way on any sandbox, or nil if there is none.
func (o *operations) of(kind opKind) *operation {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, op := range o.underWay {
		if op.kind == kind {
			return op
		}
	}
	return nil
}

// sinceServed returns the time since a caller last waited for a sandbox; 0 while one waits.
func (o *operations) sinceServed() time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, op := range o.underWay {
		if op.kind.foreground() {
			return 0
		}
	}
	return time.Since(o.served)
}

// close lets no more operations begin, and waits for those under way until ctx ends.
func (o *operations) close(ctx context.Context) error {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	done := make(chan struct{})
	go func() { o.wg.Wait(); close(done) }() // ends with the last operation
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// operate runs work as an operation of the kind on a sandbox of the organization, and returns its
// result. It waits for any other operation on the sandbox, and continues when ctx ends. It refuses a
// sandbox in a state that the kind's rule does not have, or for which may, if not nil, returns an
// error.
func operate[T any](ctx context.Context, s *Service, orgID string, id ID, kind opKind, may func(Sandbox) error,
	work func(context.Context, Sandbox) (T, error)) (result T, err error) {
	for {
		sbx, err := s.getHeld(ctx, orgID, id)
		if err == nil {
			err = rules[kind].refuse(sbx)
		}
		if err == nil && may != nil {
			err = may(sbx)
		}
		if err != nil {
			return result, err
		}
		if result, answers, err := attempt(ctx, s, id, kind, work); answers || err != nil {
			return result, err
		}
	}
}

// attempt runs work as an operation on a sandbox that has none, or waits for the operation under way.
// It reports whether the result of the operation answers a caller that asked for this kind; otherwise
// the caller reads the row again.
func attempt[T any](ctx context.Context, s *Service, id ID, kind opKind,
	work func(context.Context, Sandbox) (T, error)) (result T, answers bool, err error) {
	r := rules[kind]
	op, mine := s.ops.begin(id, kind)
	if op == nil {
		return result, false, errClosing
	}
	if mine {
		s.ops.do(ctx, id, op, func(ctx context.Context) (any, error) { return act(ctx, s, id, r, work) })
	}
	if err := op.ended(ctx); err != nil {
		return result, false, err
	}
	if !mine && !(r.shared && op.kind == kind && !errors.Is(op.err, errNotIdle)) {
		return result, false, nil
	}
	result, err = await[T](ctx, op)
	return result, true, err
}

// act runs work on the present row of the sandbox, if the row is in a state in which the operation
// acts. The caller holds the operation.
func act[T any](ctx context.Context, s *Service, id ID, r rule,
	work func(context.Context, Sandbox) (T, error)) (result T, err error) {
	sbx, err := s.present(ctx, id)
	if err != nil {
		return result, err
	}
	if !slices.Contains(r.acts, sbx.State) {
		return result, notRunning(sbx)
	}
	return work(ctx, sbx)
}
