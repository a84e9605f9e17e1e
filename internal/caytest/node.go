package caytest

import (
	"context"
	"errors"
	"net"
	"sync"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Node is a sandbox.Node that keeps its sandboxes in memory. It is for the order
// of things and for faults, never the proof that a sandbox works.
type Node struct {
	// OnCreate and OnDestroy, if set, are called before the node does anything;
	// an error fails the call. They may block until ctx ends.
	OnCreate  func(ctx context.Context, spec sandbox.Spec) error
	OnDestroy func(ctx context.Context, id sandbox.ID) error
	// OnDial, if set, answers Dial for a sandbox that is there.
	OnDial func(ctx context.Context, id sandbox.ID) (net.Conn, error)

	lost chan sandbox.Fact

	mu sync.Mutex
	// +checklocks:mu
	full bool // Room says no; guarded by mu
	// +checklocks:mu
	boxes map[sandbox.ID]sandbox.Fact // guarded by mu
	// +checklocks:mu
	calls []string // "create sbx_…", in order; guarded by mu
}

// NewNode makes an empty node.
func NewNode() *Node {
	return &Node{lost: make(chan sandbox.Fact), boxes: map[sandbox.ID]sandbox.Fact{}}
}

// SetFull makes Room say no, or yes again.
func (n *Node) SetFull(full bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.full = full
}

// Room implements sandbox.Node.
func (n *Node) Room(context.Context, sandbox.Size) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.full {
		return fault.New(fault.Unavailable, "no_capacity", "full").After(5e9)
	}
	return nil
}

// Create implements sandbox.Node.
func (n *Node) Create(ctx context.Context, spec sandbox.Spec) error {
	n.note("create " + string(spec.ID))
	if n.OnCreate != nil {
		if err := n.OnCreate(ctx, spec); err != nil {
			return err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, there := n.boxes[spec.ID]; there {
		return errors.New("created twice")
	}
	n.boxes[spec.ID] = sandbox.Fact{ID: spec.ID, Run: spec.Run, Alive: true}
	return nil
}

// Destroy implements sandbox.Node.
func (n *Node) Destroy(ctx context.Context, id sandbox.ID) error {
	n.note("destroy " + string(id))
	if n.OnDestroy != nil {
		if err := n.OnDestroy(ctx, id); err != nil {
			return err
		}
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

// Put makes the node have a sandbox that nobody created.
func (n *Node) Put(fact sandbox.Fact) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.boxes[fact.ID] = fact
}

// Die ends a sandbox's processes and reports it lost, as the real node does.
func (n *Node) Die(id sandbox.ID) {
	n.mu.Lock()
	fact := n.boxes[id]
	fact.Alive = false
	n.boxes[id] = fact
	n.mu.Unlock()
	n.lost <- fact
}

// Calls lists what was called, in order.
func (n *Node) Calls() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]string(nil), n.calls...)
}

func (n *Node) note(call string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.calls = append(n.calls, call)
}
