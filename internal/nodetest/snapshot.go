package nodetest

import (
	"context"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Snapshot implements sandbox.Node.
func (n *Fake) Snapshot(ctx context.Context, id sandbox.ID, to sandbox.SnapshotID) (sandbox.Checkpoint, error) {
	failed := called(ctx, n, "snapshot", id, id, n.OnSnapshot)
	n.mu.Lock()
	defer n.mu.Unlock()
	h, err := n.savable(id)
	if err != nil {
		return sandbox.Checkpoint{}, err
	}
	return n.keep(to, h.now, write(h.Run), failed)
}

// SnapshotCheckpoint implements sandbox.Node.
func (n *Fake) SnapshotCheckpoint(ctx context.Context, id sandbox.ID, to sandbox.SnapshotID,
) (sandbox.Checkpoint, error) {
	failed := called(ctx, n, "snapshot", id, id, n.OnSnapshot)
	n.mu.Lock()
	defer n.mu.Unlock()
	h := n.sandboxes[id]
	if h.Checkpoint == nil {
		return sandbox.Checkpoint{}, fault.New(fault.Conflict, fault.CodeSandboxNotRunning,
			"sandbox %s has no recovery point", id)
	}
	return n.keep(to, h.saved, *h.Checkpoint, failed)
}

// keep keeps a snapshot, in part if writing it failed.
//
// +checklocks:n.mu
func (n *Fake) keep(id sandbox.SnapshotID, of inside, as sandbox.Checkpoint, failed error) (sandbox.Checkpoint, error) {
	n.snapshots[id] = saved{of, failed == nil, as.Kept}
	if failed != nil {
		return sandbox.Checkpoint{}, failed
	}
	return as, nil
}

// DropSnapshot implements sandbox.Node.
func (n *Fake) DropSnapshot(ctx context.Context, id sandbox.SnapshotID) error {
	if err := called(ctx, n, "drop", sandbox.ID(id), id, n.OnDrop); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.snapshots, id)
	return nil
}

// Snapshots implements sandbox.Node.
func (n *Fake) Snapshots(context.Context) ([]sandbox.SnapshotID, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []sandbox.SnapshotID
	for id := range n.snapshots {
		all = append(all, id)
	}
	return all, nil
}
