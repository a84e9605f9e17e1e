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
	OnClaim      func(ctx context.Context, spec sandbox.Spec) error // an error ends the member
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

	lost   chan sandbox.Fact
	denied chan sandbox.Denial

	mu sync.Mutex
	// +checklocks:mu
	full bool // Room says no; guarded by mu
	// +checklocks:mu
	most int // sandboxes there may be; 0 is any number; guarded by mu
	// +checklocks:mu
	boxes map[sandbox.ID]sandbox.Fact // guarded by mu
	// +checklocks:mu
	snapshots map[sandbox.SnapshotID]bool // guarded by mu
	// +checklocks:mu
	calls []string // "create sbx_…", in order; guarded by mu
}

// NewNode makes an empty node.
func NewNode() *Node {
	return &Node{lost: make(chan sandbox.Fact), denied: make(chan sandbox.Denial), boxes: map[sandbox.ID]sandbox.Fact{},
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
	if n.full || n.most > 0 && len(n.boxes) >= n.most {
		return fault.New(fault.Unavailable, "no_capacity", "full").After(5e9)
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
		return max(0, n.most-len(n.boxes)), nil
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
	if _, there := n.boxes[spec.ID]; there {
		return errors.New("prepared twice")
	}
	n.boxes[spec.ID] = sandbox.Fact{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Warm: true}
	return nil
}

// Claim implements sandbox.Node.
func (n *Node) Claim(ctx context.Context, spec sandbox.Spec) error {
	n.mu.Lock()
	fact := n.boxes[spec.ID]
	if !fact.Warm || fact.Run != spec.Run {
		n.mu.Unlock()
		return fault.New(fault.Conflict, "no_member", "there is no member %s", spec.ID)
	}
	fact.Warm = false
	n.boxes[spec.ID] = fact
	n.mu.Unlock()
	err := called(ctx, n, "claim", spec.ID, spec, n.OnClaim)
	n.mu.Lock()
	defer n.mu.Unlock()
	if err == nil && !n.boxes[spec.ID].Alive {
		err = errors.New("the member is dead")
	}
	if err != nil {
		if ctx.Err() == nil { // else there was no time to, or nobody is left to
			delete(n.boxes, spec.ID)
		}
		return err
	}
	fact.Egress = spec.Egress
	n.boxes[spec.ID] = fact
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
	if _, there := n.boxes[spec.ID]; there {
		return errors.New("created twice")
	}
	if spec.From != "" && !n.snapshots[spec.From] {
		return fault.New(fault.Internal, "restore_failed", "there is no snapshot %s", spec.From)
	}
	n.boxes[spec.ID] = sandbox.Fact{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Egress: spec.Egress}
	return nil
}

// Suspend implements sandbox.Node.
func (n *Node) Suspend(ctx context.Context, id sandbox.ID) (sandbox.Point, error) {
	if err := called(ctx, n, "suspend", id, id, n.OnSuspend); err != nil {
		return sandbox.Point{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	point, err := n.write(id)
	if err == nil {
		n.boxes[id] = sandbox.Fact{ID: id, Point: &point}
	}
	return point, err
}

// Checkpoint implements sandbox.Node.
func (n *Node) Checkpoint(ctx context.Context, id sandbox.ID) (sandbox.Point, error) {
	if err := called(ctx, n, "checkpoint", id, id, n.OnCheckpoint); err != nil {
		return sandbox.Point{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.write(id)
}

// write gives a sandbox that is alive a new recovery point.
//
// +checklocks:n.mu
func (n *Node) write(id sandbox.ID) (sandbox.Point, error) {
	fact := n.boxes[id]
	if !fact.Alive {
		return sandbox.Point{}, errors.New("a recovery point of a sandbox that is not alive")
	}
	fact.Point = &sandbox.Point{At: time.Now().UTC(), Size: 1 << 20, Run: fact.Run}
	n.boxes[id] = fact
	return *fact.Point, nil
}

// Wake implements sandbox.Node.
func (n *Node) Wake(ctx context.Context, spec sandbox.Spec) error {
	if err := called(ctx, n, "wake", spec.ID, spec, n.OnWake); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	fact := n.boxes[spec.ID]
	switch {
	case fact.Remains:
		return errors.New("woken over what remains of another life")
	case fact.Point == nil:
		return fault.New(fault.Internal, "wake_failed", "the sandbox has no recovery point")
	}
	n.boxes[spec.ID] = sandbox.Fact{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true,
		Egress: spec.Egress, Point: fact.Point}
	return nil
}

// Rest implements sandbox.Node.
func (n *Node) Rest(ctx context.Context, id sandbox.ID) error {
	if err := called(ctx, n, "rest", id, id, n.OnRest); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if point := n.boxes[id].Point; point != nil {
		n.boxes[id] = sandbox.Fact{ID: id, Point: point}
	} else {
		delete(n.boxes, id)
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
	fact := n.boxes[id]
	if !fact.Alive {
		return fault.New(fault.Conflict, "sandbox_not_running", "sandbox %s is not here", id)
	}
	fact.Egress = e
	n.boxes[id] = fact
	return nil
}

// Traffic implements sandbox.Node.
func (n *Node) Traffic(_ context.Context, id sandbox.ID) (sandbox.Traffic, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if !n.boxes[id].Alive {
		return sandbox.Traffic{}, fault.New(fault.Conflict, "sandbox_not_running", "sandbox %s is not here", id)
	}
	return sandbox.Traffic{PacketsAllowed: 4, BytesAllowed: 4096, PacketsDenied: 1, BytesDenied: 60}, nil
}

// Denied implements sandbox.Node.
func (n *Node) Denied() <-chan sandbox.Denial { return n.denied }

// Deny reports a connection that a policy refused, and returns when the report was taken.
func (n *Node) Deny(d sandbox.Denial) { n.denied <- d }

// Inspect implements sandbox.Node.
func (n *Node) Inspect(ctx context.Context, id sandbox.ID) (*sandbox.Fact, error) {
	if n.OnInspect != nil {
		if err := n.OnInspect(ctx, id); err != nil {
			return nil, err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if fact, there := n.boxes[id]; there {
		return &fact, nil
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
	delete(n.boxes, id)
	return nil
}

// Dial implements sandbox.Node.
func (n *Node) Dial(ctx context.Context, id sandbox.ID) (net.Conn, error) {
	n.mu.Lock()
	fact, there := n.boxes[id]
	n.mu.Unlock()
	if !there || !fact.Alive || n.OnDial == nil {
		return nil, fault.New(fault.Conflict, "sandbox_not_running", "sandbox %s is not here", id)
	}
	return n.OnDial(ctx, id)
}

// List implements sandbox.Node.
func (n *Node) List(context.Context) ([]sandbox.Fact, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var facts []sandbox.Fact
	for _, fact := range n.boxes {
		facts = append(facts, fact)
	}
	return facts, nil
}

// Lost implements sandbox.Node.
func (n *Node) Lost() <-chan sandbox.Fact { return n.lost }

// Put gives the node a sandbox without a create.
func (n *Node) Put(fact sandbox.Fact) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.boxes[fact.ID] = fact
}

// Kill ends a sandbox's processes, if it has any, without a report, as when the
// machine restarts. Its recovery point stays.
func (n *Node) Kill(id sandbox.ID) (fact sandbox.Fact, killed bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	fact = n.boxes[id]
	if !fact.Alive {
		return fact, false
	}
	fact.Alive = false
	n.boxes[id] = fact
	return fact, true
}

// Die ends a sandbox's processes and reports it lost, as the real node does.
func (n *Node) Die(id sandbox.ID) {
	if fact, killed := n.Kill(id); killed {
		n.lost <- fact
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
