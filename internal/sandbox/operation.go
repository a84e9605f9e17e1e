package sandbox

import (
	"context"
	"errors"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

type opKind string

const (
	opCreate  opKind = "create"
	opDestroy opKind = "destroy"
)

// operation is work on one sandbox under way in this process. Its context
// outlives the request that began it; only destroy ends it early.
type operation struct {
	kind   opKind
	ctx    context.Context
	cancel context.CancelCauseFunc
	done   chan struct{} // closed by finish, after result and err are set
	result Sandbox
	err    error
}

// wait returns the operation's result, or ctx's error if that ends first.
func (op *operation) wait(ctx context.Context) (Sandbox, error) {
	select {
	case <-op.done:
		return op.result, op.err
	case <-ctx.Done():
		return Sandbox{}, ctx.Err()
	}
}

var (
	errInterrupted = errors.New("interrupted by destroy")
	errClosing     = fault.New(fault.Unavailable, "shutting_down", "the server is shutting down").After(2 * time.Second)
)

// begin registers an operation on a sandbox nobody works on. It returns nil when
// somebody does, or when the service is closing.
func (s *Service) begin(id ID, kind opKind) *operation {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.work[id] != nil {
		return nil
	}
	op := &operation{kind: kind, done: make(chan struct{})}
	op.ctx, op.cancel = context.WithCancelCause(context.Background())
	s.work[id] = op
	s.wg.Add(1)
	return op
}

// finish hands the result to everybody who waits.
func (s *Service) finish(id ID, op *operation, result Sandbox, err error) {
	s.mu.Lock()
	delete(s.work, id)
	s.mu.Unlock()
	op.result, op.err = result, err
	op.cancel(nil)
	close(op.done)
	s.wg.Done()
}

// current is the operation of that kind under way on the sandbox, nil if none.
func (s *Service) current(id ID, kind opKind) *operation {
	s.mu.Lock()
	defer s.mu.Unlock()
	if op := s.work[id]; op != nil && op.kind == kind {
		return op
	}
	return nil
}

// busy reports whether an operation is under way on the sandbox.
func (s *Service) busy(id ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.work[id] != nil
}
