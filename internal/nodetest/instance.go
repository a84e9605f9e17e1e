package nodetest

import (
	"context"
	"errors"
	"net"
	"strings"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Create implements sandbox.Node.
func (n *Fake) Create(ctx context.Context, spec sandbox.Spec) error {
	if err := called(ctx, n, "create", spec.ID, spec, n.OnCreate); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	h, err := n.made(spec, false)
	if err == nil {
		h.Egress = spec.Egress
		n.sandboxes[spec.ID] = h
		delete(n.reserved, spec.ID)
	}
	return err
}

// made returns a new sandbox, as Create and Prepare make it.
//
// +checklocks:n.mu
func (n *Fake) made(spec sandbox.Spec, pooled bool) (held, error) {
	if _, there := n.sandboxes[spec.ID]; there {
		return held{}, errors.New("made twice")
	}
	if err := n.admit(spec.ID, pooled); err != nil {
		return held{}, err
	}
	h := held{Observed: sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true}}
	if spec.From != "" {
		from := n.snapshots[spec.From]
		if !from.whole {
			return held{}, fault.New(fault.Internal, fault.CodeRestoreFailed, "there is no snapshot %s", spec.From)
		}
		h.now = from.inside
	}
	if spec.From == "" || n.snapshots[spec.From].kept == sandbox.KeepFiles {
		if err := start(spec.Start); err != nil {
			return held{}, err
		}
	}
	h.now.env, h.now.workdir = spec.Env, spec.Workdir
	return h, nil
}

// start runs a start command. The only one that a Fake knows is "exit" and a code, which ends before
// it is ready; all others are ready at once.
func start(s sandbox.Start) error {
	if code, ok := strings.CutPrefix(s.Command, "exit "); ok {
		return fault.New(fault.Conflict, fault.CodeStartFailed, "the start command ended with exit code %s", code)
	}
	return nil
}

// Wake implements sandbox.Node.
func (n *Fake) Wake(ctx context.Context, spec sandbox.Spec) error {
	if err := called(ctx, n, "wake", spec.ID, spec, n.OnWake); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.sandboxes[spec.ID]
	switch {
	case h.Remains:
		return errors.New("woken over what remains of another instance")
	case h.Checkpoint == nil:
		return fault.New(fault.Internal, fault.CodeWakeFailed, "the sandbox has no recovery point")
	}
	if err := n.admit(spec.ID, false); err != nil {
		return err
	}
	if h.Checkpoint.Kept == sandbox.KeepFiles {
		if err := start(spec.Start); err != nil {
			return err
		}
	}
	delete(n.reserved, spec.ID)
	n.sandboxes[spec.ID] = held{now: h.saved, saved: h.saved, Observed: sandbox.Observed{ID: spec.ID, Run: spec.Run,
		Alive: true, Remains: true, Egress: spec.Egress, Checkpoint: h.Checkpoint}}
	return nil
}

// Rest implements sandbox.Node.
func (n *Fake) Rest(ctx context.Context, id sandbox.ID) error {
	if err := called(ctx, n, "rest", id, id, n.OnRest); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.rest(id)
	return nil
}

// rest removes everything of a sandbox except its recovery point.
//
// +checklocks:n.mu
func (n *Fake) rest(id sandbox.ID) {
	h := n.sandboxes[id]
	if h.Checkpoint == nil {
		delete(n.sandboxes, id)
		return
	}
	n.sandboxes[id] = held{saved: h.saved, Observed: sandbox.Observed{ID: id, Checkpoint: h.Checkpoint}}
}

// Destroy implements sandbox.Node.
func (n *Fake) Destroy(ctx context.Context, id sandbox.ID) error {
	if err := called(ctx, n, "destroy", id, id, n.OnDestroy); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.sandboxes, id)
	return nil
}

// Check implements sandbox.Node.
func (n *Fake) Check(ctx context.Context, id sandbox.ID) error {
	n.mu.Lock()
	_, err := n.running(id)
	n.mu.Unlock()
	if err != nil || n.OnCheck == nil {
		return err
	}
	return n.OnCheck(ctx, id)
}

// Busy implements sandbox.Node.
func (n *Fake) Busy(ctx context.Context, id sandbox.ID) (bool, error) {
	n.mu.Lock()
	h, err := n.running(id)
	n.mu.Unlock()
	if err != nil || n.OnBusy == nil {
		return h.now.busy, err
	}
	return n.OnBusy(ctx, id)
}

// Dial implements sandbox.Node. Without OnDial it connects to an agent that hangs up.
func (n *Fake) Dial(ctx context.Context, id sandbox.ID) (net.Conn, error) {
	n.mu.Lock()
	_, err := n.running(id)
	n.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if n.OnDial != nil {
		return n.OnDial(ctx, id)
	}
	conn, agent := net.Pipe()
	return conn, agent.Close()
}
