package caytest

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Node implements sandbox.Node and keeps its sandboxes in memory. Use it to test the order
// of calls and faults, never as the proof that a sandbox works.
type Node struct {
	// The hooks, if set, are called before the node does anything; an error fails
	// the call. They may block until ctx ends. Set them while nothing is under way.
	OnCreate     func(ctx context.Context, spec sandbox.Spec) error
	OnDestroy    func(ctx context.Context, id sandbox.ID) error
	OnSuspend    func(ctx context.Context, id sandbox.ID) error
	OnCheckpoint func(ctx context.Context, id sandbox.ID) error
	OnPrepare    func(ctx context.Context, spec sandbox.Spec) error
	OnClaim      func(ctx context.Context, spec sandbox.Spec) error // an error ends the pooled sandbox
	OnCheck      func(ctx context.Context, id sandbox.ID) error
	OnWake       func(ctx context.Context, spec sandbox.Spec) error
	OnRest       func(ctx context.Context, id sandbox.ID) error
	OnInspect    func(ctx context.Context, id sandbox.ID) error
	OnSetEgress  func(ctx context.Context, id sandbox.ID) error
	OnSnapshot   func(ctx context.Context, id sandbox.ID) error // of SnapshotPoint too
	OnDrop       func(ctx context.Context, id sandbox.SnapshotID) error
	OnBusy       func(ctx context.Context, id sandbox.ID) (bool, error) // unset: not busy
	// OnDial, if set, answers Dial for a sandbox that exists.
	OnDial func(ctx context.Context, id sandbox.ID) (net.Conn, error)

	lost   chan sandbox.Observed
	denied chan sandbox.Denial

	mu sync.Mutex
	// +checklocks:mu
	full bool // Room says no; guarded by mu
	// +checklocks:mu
	most int // sandboxes there may be; 0 is any number; guarded by mu
	// +checklocks:mu
	sandboxes map[sandbox.ID]sandbox.Observed // guarded by mu
	// +checklocks:mu
	snapshots map[sandbox.SnapshotID]bool // guarded by mu
	// +checklocks:mu
	calls []string // "create sbx_…", in order; guarded by mu
}

// NewNode makes an empty node.
func NewNode() *Node {
	return &Node{lost: make(chan sandbox.Observed), denied: make(chan sandbox.Denial),
		sandboxes: map[sandbox.ID]sandbox.Observed{},
		snapshots: map[sandbox.SnapshotID]bool{}}
}

// SetFull makes Room refuse, or not any more.
func (n *Node) SetFull(full bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.full = full
}

// Room implements sandbox.Node.
func (n *Node) Room(context.Context, sandbox.Size) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.full || n.most > 0 && len(n.sandboxes) >= n.most {
		return fault.New(fault.Unavailable, fault.CodeNoCapacity, "full").After(5e9)
	}
	return nil
}

// SetMost sets the number of sandboxes that Room and Spare allow.
func (n *Node) SetMost(most int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.most = most
}

// Spare implements sandbox.Node.
func (n *Node) Spare(context.Context) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.full:
		return 0, nil
	case n.most > 0:
		return max(0, n.most-len(n.sandboxes)), nil
	}
	return 1000, nil
}

// Prepare implements sandbox.Node.
func (n *Node) Prepare(ctx context.Context, spec sandbox.Spec) error {
	if err := called(ctx, n, "prepare", spec.ID, spec, n.OnPrepare); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, there := n.sandboxes[spec.ID]; there {
		return errors.New("prepared twice")
	}
	n.sandboxes[spec.ID] = sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Warm: true}
	return nil
}

// Claim implements sandbox.Node.
func (n *Node) Claim(ctx context.Context, spec sandbox.Spec) error {
	n.mu.Lock()
	observed := n.sandboxes[spec.ID]
	if !observed.Warm || observed.Run != spec.Run {
		n.mu.Unlock()
		return fault.New(fault.Conflict, fault.CodeNoMember, "there is no member %s", spec.ID)
	}
	observed.Warm = false
	n.sandboxes[spec.ID] = observed
	n.mu.Unlock()
	err := called(ctx, n, "claim", spec.ID, spec, n.OnClaim)
	n.mu.Lock()
	defer n.mu.Unlock()
	if err == nil && !n.sandboxes[spec.ID].Alive {
		err = errors.New("the member is dead")
	}
	if err != nil {
		if ctx.Err() == nil { // else there was no time to, or nobody is left to
			delete(n.sandboxes, spec.ID)
		}
		return err
	}
	observed.Egress = spec.Egress
	n.sandboxes[spec.ID] = observed
	return nil
}

// Check implements sandbox.Node.
func (n *Node) Check(ctx context.Context, id sandbox.ID) error {
	if n.OnCheck == nil {
		return nil
	}
	return n.OnCheck(ctx, id)
}

// Create implements sandbox.Node.
func (n *Node) Create(ctx context.Context, spec sandbox.Spec) error {
	if err := called(ctx, n, "create", spec.ID, spec, n.OnCreate); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, there := n.sandboxes[spec.ID]; there {
		return errors.New("created twice")
	}
	if spec.From != "" && !n.snapshots[spec.From] {
		return fault.New(fault.Internal, fault.CodeRestoreFailed, "there is no snapshot %s", spec.From)
	}
	n.sandboxes[spec.ID] = sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Egress: spec.Egress}
	return nil
}

// Suspend implements sandbox.Node.
func (n *Node) Suspend(ctx context.Context, id sandbox.ID) (sandbox.Checkpoint, error) {
	if err := called(ctx, n, "suspend", id, id, n.OnSuspend); err != nil {
		return sandbox.Checkpoint{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	checkpoint, err := n.write(id)
	if err == nil {
		n.sandboxes[id] = sandbox.Observed{ID: id, Checkpoint: &checkpoint}
	}
	return checkpoint, err
}

// Checkpoint implements sandbox.Node.
func (n *Node) Checkpoint(ctx context.Context, id sandbox.ID) (sandbox.Checkpoint, error) {
	if err := called(ctx, n, "checkpoint", id, id, n.OnCheckpoint); err != nil {
		return sandbox.Checkpoint{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.write(id)
}

// write gives a sandbox that is alive a new recovery point.
//
// +checklocks:n.mu
func (n *Node) write(id sandbox.ID) (sandbox.Checkpoint, error) {
	observed := n.sandboxes[id]
	if !observed.Alive {
		return sandbox.Checkpoint{}, errors.New("a recovery point of a sandbox that is not alive")
	}
	observed.Checkpoint = &sandbox.Checkpoint{At: time.Now().UTC(), Size: 1 << 20, Run: observed.Run}
	n.sandboxes[id] = observed
	return *observed.Checkpoint, nil
}

// Wake implements sandbox.Node.
func (n *Node) Wake(ctx context.Context, spec sandbox.Spec) error {
	if err := called(ctx, n, "wake", spec.ID, spec, n.OnWake); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	observed := n.sandboxes[spec.ID]
	switch {
	case observed.Remains:
		return errors.New("woken over what remains of another life")
	case observed.Checkpoint == nil:
		return fault.New(fault.Internal, fault.CodeWakeFailed, "the sandbox has no recovery point")
	}
	n.sandboxes[spec.ID] = sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true,
		Egress: spec.Egress, Checkpoint: observed.Checkpoint}
	return nil
}

// Rest implements sandbox.Node.
func (n *Node) Rest(ctx context.Context, id sandbox.ID) error {
	if err := called(ctx, n, "rest", id, id, n.OnRest); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if checkpoint := n.sandboxes[id].Checkpoint; checkpoint != nil {
		n.sandboxes[id] = sandbox.Observed{ID: id, Checkpoint: checkpoint}
	} else {
		delete(n.sandboxes, id)
	}
	return nil
}

// Busy implements sandbox.Node.
func (n *Node) Busy(ctx context.Context, id sandbox.ID) (bool, error) {
	if n.OnBusy == nil {
		return false, nil
	}
	return n.OnBusy(ctx, id)
}

// SetEgress implements sandbox.Node.
func (n *Node) SetEgress(ctx context.Context, id sandbox.ID, e sandbox.Egress) error {
	if err := called(ctx, n, "egress", id, id, n.OnSetEgress); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	observed := n.sandboxes[id]
	if !observed.Alive {
		return fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s is not here", id)
	}
	observed.Egress = e
	n.sandboxes[id] = observed
	return nil
}

// Traffic implements sandbox.Node.
func (n *Node) Traffic(_ context.Context, id sandbox.ID) (sandbox.Traffic, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.sandboxes[id].Alive {
		return sandbox.Traffic{}, fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s is not here", id)
	}
	return sandbox.Traffic{PacketsAllowed: 4, BytesAllowed: 4096, PacketsDenied: 1, BytesDenied: 60}, nil
}

// Denied implements sandbox.Node.
func (n *Node) Denied() <-chan sandbox.Denial { return n.denied }

// Deny reports a connection that a policy refused, and returns when the report was taken.
func (n *Node) Deny(d sandbox.Denial) { n.denied <- d }

// Inspect implements sandbox.Node.
func (n *Node) Inspect(ctx context.Context, id sandbox.ID) (*sandbox.Observed, error) {
	if n.OnInspect != nil {
		if err := n.OnInspect(ctx, id); err != nil {
			return nil, err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if observed, there := n.sandboxes[id]; there {
		return &observed, nil
	}
	return nil, nil
}

// Destroy implements sandbox.Node.
func (n *Node) Destroy(ctx context.Context, id sandbox.ID) error {
	if err := called(ctx, n, "destroy", id, id, n.OnDestroy); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.sandboxes, id)
	return nil
}

// Dial implements sandbox.Node.
func (n *Node) Dial(ctx context.Context, id sandbox.ID) (net.Conn, error) {
	n.mu.Lock()
	observed, there := n.sandboxes[id]
	n.mu.Unlock()
	if !there || !observed.Alive || n.OnDial == nil {
		return nil, fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s is not here", id)
	}
	return n.OnDial(ctx, id)
}

// List implements sandbox.Node.
func (n *Node) List(context.Context) ([]sandbox.Observed, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var found []sandbox.Observed
	for _, observed := range n.sandboxes {
		found = append(found, observed)
	}
	return found, nil
}

// Lost implements sandbox.Node.
func (n *Node) Lost() <-chan sandbox.Observed { return n.lost }

// Put gives the node a sandbox without a create.
func (n *Node) Put(observed sandbox.Observed) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sandboxes[observed.ID] = observed
}

// Kill ends a sandbox's processes, if it has any, without a report, as when the
// machine restarts. Its recovery point stays.
func (n *Node) Kill(id sandbox.ID) (observed sandbox.Observed, killed bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	observed = n.sandboxes[id]
	if !observed.Alive {
		return observed, false
	}
	observed.Alive = false
	n.sandboxes[id] = observed
	return observed, true
}

// Die ends a sandbox's processes and reports it lost, as the real node does.
func (n *Node) Die(id sandbox.ID) {
	if observed, killed := n.Kill(id); killed {
		n.lost <- observed
	}
}

// Calls returns the calls in their order.
func (n *Node) Calls() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]string(nil), n.calls...)
}

// called records a call and runs its hook.
func called[T any](ctx context.Context, n *Node, what string, id sandbox.ID, arg T,
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
