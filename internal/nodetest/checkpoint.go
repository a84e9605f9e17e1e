package nodetest

import (
	"context"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Suspend implements sandbox.Node.
func (n *Fake) Suspend(ctx context.Context, id sandbox.ID, keep sandbox.Kept) (sandbox.Checkpoint, error) {
	if err := called(ctx, n, "suspend", id, id, n.OnSuspend); err != nil {
		return sandbox.Checkpoint{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	checkpoint, err := n.save(id, keep)
	if err == nil {
		n.rest(id)
	}
	return checkpoint, err
}

// Checkpoint implements sandbox.Node.
func (n *Fake) Checkpoint(ctx context.Context, id sandbox.ID) (sandbox.Checkpoint, error) {
	if err := called(ctx, n, "checkpoint", id, id, n.OnCheckpoint); err != nil {
		return sandbox.Checkpoint{}, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.save(id, sandbox.KeepAll)
}

// save gives a sandbox that runs a new recovery point.
//
// +checklocks:n.mu
func (n *Fake) save(id sandbox.ID, keep sandbox.Kept) (sandbox.Checkpoint, error) {
	h, err := n.savable(id)
	if err != nil {
		return sandbox.Checkpoint{}, err
	}
	checkpoint := write(h.Run)
	checkpoint.Kept = keep
	h.Checkpoint, h.saved = &checkpoint, h.now
	if keep == sandbox.KeepFiles {
		h.saved.busy = false
	}
	n.sandboxes[id] = h
	return checkpoint, nil
}

// savable returns a sandbox that a checkpoint can be written of.
//
// +checklocks:n.mu
func (n *Fake) savable(id sandbox.ID) (held, error) {
	h, err := n.running(id)
	if err == nil && n.diskFull {
		err = fault.New(fault.NoSpace, fault.CodeDiskFull, "this machine's disk is full")
	}
	return h, err
}
