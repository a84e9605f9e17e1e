// Package nodetest holds what tests need of a sandbox.Node: a fake that keeps its sandboxes in
// memory, and the contract suite that the fake and the real node pass.
//
// The fake is for tests of the rooms that call a node: of the order of their calls, and of faults
// that a real machine does not have on command. It has no processes, so no test with it proves that
// a sandbox works. The suite keeps it honest: what a room may rely on is in [Contract], and holds on
// both.
package nodetest

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Fake implements sandbox.Node and keeps its sandboxes in memory. It is safe for concurrent use. Its
// methods are in the files that are named after the interfaces that sandbox.Node embeds.
type Fake struct {
	// The hooks, if set, are called before the node does anything; an error fails
	// the call. They may block until ctx ends. Set them while nothing is under way.
	OnCreate     func(ctx context.Context, spec sandbox.Spec) error
	OnDestroy    func(ctx context.Context, id sandbox.ID) error
	OnSuspend    func(ctx context.Context, id sandbox.ID) error
	OnCheckpoint func(ctx context.Context, id sandbox.ID) error
	OnFindImage  func(ctx context.Context, image string) error
	OnPrepare    func(ctx context.Context, spec sandbox.Spec) error
	OnClaim      func(ctx context.Context, spec sandbox.Spec) error // an error ends the pooled sandbox
	OnCheck      func(ctx context.Context, id sandbox.ID) error     // for a sandbox that runs
	OnWake       func(ctx context.Context, spec sandbox.Spec) error
	OnRest       func(ctx context.Context, id sandbox.ID) error
	OnInspect    func(ctx context.Context, id sandbox.ID) error
	OnSetEgress  func(ctx context.Context, id sandbox.ID) error
	OnSnapshot   func(ctx context.Context, id sandbox.ID) error // of SnapshotCheckpoint too
	OnDrop       func(ctx context.Context, id sandbox.SnapshotID) error
	// OnBusy, if set, answers Busy for a sandbox that runs.
	OnBusy func(ctx context.Context, id sandbox.ID) (bool, error)
	// OnDial, if set, answers Dial for a sandbox that runs.
	OnDial func(ctx context.Context, id sandbox.ID) (net.Conn, error)

	lost   chan sandbox.Observed
	denied chan sandbox.Denial

	mu sync.Mutex
	// +checklocks:mu
	full bool // the machine has no room; guarded by mu
	// +checklocks:mu
	diskFull bool // the disk has no room for checkpoints; guarded by mu
	// +checklocks:mu
	most int // sandboxes that the machine may have; 0 is any number; guarded by mu
	// +checklocks:mu
	sandboxes map[sandbox.ID]held // guarded by mu
	// +checklocks:mu
	reserved map[sandbox.ID]*reservation // guarded by mu
	// +checklocks:mu
	snapshots map[sandbox.SnapshotID]saved // guarded by mu
	// +checklocks:mu
	calls []string // "create sbx_…", in order; guarded by mu
}

// held holds what a Fake has of one sandbox.
type held struct {
	sandbox.Observed
	token   string // of a pooled sandbox
	now     inside // of the instance
	saved   inside // in the recovery point
	traffic sandbox.Traffic
}

// inside holds the part of a sandbox that a checkpoint saves.
type inside struct {
	text    string
	busy    bool
	env     map[string]string // of later commands
	workdir string            // of later commands
}

// saved holds a snapshot.
type saved struct {
	inside
	whole bool
	kept  sandbox.Kept
}

// NewFake makes an empty node.
func NewFake() *Fake {
	return &Fake{lost: make(chan sandbox.Observed), denied: make(chan sandbox.Denial),
		sandboxes: map[sandbox.ID]held{}, reserved: map[sandbox.ID]*reservation{},
		snapshots: map[sandbox.SnapshotID]saved{}}
}

// called records a call and runs its hook.
func called[T any](ctx context.Context, n *Fake, what string, id sandbox.ID, arg T,
	hook func(context.Context, T) error,
) error {
	n.mu.Lock()
	n.calls = append(n.calls, what+" "+string(id))
	n.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(ctx, arg)
}

// Calls returns the calls in their order.
func (n *Fake) Calls() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]string(nil), n.calls...)
}

// Put gives the node a sandbox without a create.
func (n *Fake) Put(observed sandbox.Observed) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sandboxes[observed.ID] = held{Observed: observed}
}

// Kill ends a sandbox's processes, if it has any, without a report, as when the
// machine restarts. Its recovery point stays.
func (n *Fake) Kill(id sandbox.ID) (observed sandbox.Observed, killed bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.sandboxes[id]
	if !h.Alive {
		return h.Observed, false
	}
	h.Alive, h.Remains = false, true
	n.sandboxes[id] = h
	return h.Observed, true
}

// Die ends a sandbox's processes and reports it lost. It returns when the report was taken.
func (n *Fake) Die(id sandbox.ID) {
	if observed, killed := n.Kill(id); killed {
		n.lost <- sandbox.Observed{ID: id, Run: observed.Run}
	}
}

// Write keeps a text in a running sandbox, as a program inside would in a file.
func (n *Fake) Write(id sandbox.ID, text string) {
	n.change(id, func(h *held) { h.now.text = text })
}

// Work starts a process inside a running sandbox that does not end.
func (n *Fake) Work(id sandbox.ID) {
	n.change(id, func(h *held) { h.now.busy = true })
}

// Refuse sends a packet from a sandbox, which its policy forbids, and reports that. It returns when
// the report was taken.
func (n *Fake) Refuse(d sandbox.Denial) {
	n.change(d.ID, func(h *held) {
		h.traffic.PacketsDenied++
		h.traffic.BytesDenied += 60
	})
	n.Deny(d)
}

// Contents returns what a program inside a sandbox finds: the text of the last Write, and the environment
// and working directory of a command.
func (n *Fake) Contents(id sandbox.ID) (text string, env map[string]string, workdir string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := n.sandboxes[id].now
	return now.text, now.env, now.workdir
}

// change changes a sandbox that runs.
func (n *Fake) change(id sandbox.ID, f func(h *held)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if h := n.sandboxes[id]; h.Alive {
		f(&h)
		n.sandboxes[id] = h
	}
}

// running returns a sandbox that runs, or the error of a call that needs one.
//
// +checklocks:n.mu
func (n *Fake) running(id sandbox.ID) (held, error) {
	h := n.sandboxes[id]
	if !h.Alive {
		return held{}, fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s is not here", id)
	}
	return h, nil
}

// write returns the description of a checkpoint of a run that is written now.
func write(run string) sandbox.Checkpoint {
	return sandbox.Checkpoint{At: time.Now().UTC(), Size: 1 << 20, Run: run}
}
