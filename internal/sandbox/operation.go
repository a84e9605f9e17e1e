package sandbox

import (
	"context"
	"errors"
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
	opCheckpoint opKind = "checkpoint"
	opEgress     opKind = "egress"
	opSnapshot   opKind = "snapshot"
	opFork       opKind = "fork"
	opClaim      opKind = "claim"   // a create from the pool
	opPrepare    opKind = "prepare" // a new pooled sandbox
	opSettle     opKind = "settle"  // makes row and host agree
)

// operation holds the state of work on one sandbox in this process. Its context outlives the
// request that began it; only destroy cancels it early.
type operation struct {
	kind   opKind
	ctx    context.Context
	cancel context.CancelCauseFunc
	// claimed is closed when a destroy is durable. No caller waits for the rest of the destroy.
	claimed    chan struct{}
	done       chan struct{} // closed by finish, after the fields below are set
	result     Sandbox
	checkpoint Checkpoint // of a checkpoint
	err        error
}

// wait returns the operation's result, or ctx's error if that ends first.
func (op *operation) wait(ctx context.Context) (Sandbox, error) {
	if err := op.ended(ctx); err != nil {
		return Sandbox{}, err
	}
	return op.result, op.err
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
	errClosing     = fault.New(fault.Unavailable, "shutting_down", "the server is shutting down").After(2 * time.Second)
)

// begin registers an operation on a sandbox that has none (mine), or returns the operation under
// way. It returns nil when there is none and the service is closing.
func (s *Service) begin(id ID, kind opKind) (op *operation, mine bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if op := s.work[id]; op != nil || s.closed {
		return op, false
	}
	op = &operation{kind: kind, claimed: make(chan struct{}), done: make(chan struct{})}
	op.ctx, op.cancel = context.WithCancelCause(context.Background())
	s.work[id] = op
	s.wg.Add(1)
	return op, true
}

// do starts work for the operation that the caller has begun, and finishes the operation after it.
// It does not wait for work, and uses ctx only for measurements.
func (s *Service) do(ctx context.Context, id ID, op *operation, work func(ctx context.Context) (Sandbox, error)) {
	ctx = trace.Carry(op.ctx, ctx)
	go func() {
		result, err := work(ctx)
		if err != nil && fault.As(err) == nil && context.Cause(ctx) == errInterrupted {
			// The error follows from the destroy.
			err = fault.New(fault.Conflict, codeNotRunning, "sandbox %s was destroyed meanwhile", id).Because(err)
		}
		s.finish(id, op, result, err)
	}()
}

// finish stores the result and wakes all waiters.
func (s *Service) finish(id ID, op *operation, result Sandbox, err error) {
	s.mu.Lock()
	delete(s.work, id)
	if op.kind.foreground() {
		s.served = time.Now()
	}
	s.mu.Unlock()
	s.pool.nudge()
	op.result, op.err = result, err
	op.cancel(nil)
	close(op.done)
	s.wg.Done()
}

// working returns the operation under way on the sandbox, or nil if there is none.
func (s *Service) working(id ID) *operation {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.work[id]
}

// current returns the operation of the given kind under way on the sandbox, or nil if there is
// none.
func (s *Service) current(id ID, kind opKind) *operation {
	s.mu.Lock()
	defer s.mu.Unlock()
	if op := s.work[id]; op != nil && op.kind == kind {
		return op
	}
	return nil
}
