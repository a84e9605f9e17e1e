package caytest

import (
	"context"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Snapshot implements sandbox.Node.
func (n *Node) Snapshot(ctx context.Context, id sandbox.ID, to sandbox.SnapshotID) (sandbox.Checkpoint, error) {
	return n.snapshot(ctx, id, to, func(f sandbox.Observed) bool { return f.Alive })
}

// SnapshotPoint implements sandbox.Node.
func (n *Node) SnapshotCheckpoint(ctx context.Context, id sandbox.ID, to sandbox.SnapshotID,
) (sandbox.Checkpoint, error) {
	return n.snapshot(ctx, id, to, func(f sandbox.Observed) bool { return f.Checkpoint != nil })
}

func (n *Node) snapshot(ctx context.Context, id sandbox.ID, to sandbox.SnapshotID,
	can func(sandbox.Observed) bool,
) (sandbox.Checkpoint, error) {
	err := called(ctx, n, "snapshot", id, id, n.OnSnapshot)
	n.mu.Lock()
	defer n.mu.Unlock()
	observed := n.sandboxes[id]
	if !can(observed) {
		return sandbox.Checkpoint{}, fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s is not here", id)
	}
	n.snapshots[to] = true // also when it fails: in part
	if err != nil {
		return sandbox.Checkpoint{}, err
	}
	return sandbox.Checkpoint{At: time.Now().UTC(), Size: 1 << 20, Run: observed.Run}, nil
}

// DropSnapshot implements sandbox.Node.
func (n *Node) DropSnapshot(ctx context.Context, id sandbox.SnapshotID) error {
	if err := called(ctx, n, "drop", sandbox.ID(id), id, n.OnDrop); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.snapshots, id)
	return nil
}

// Snapshots implements sandbox.Node.
func (n *Node) Snapshots(context.Context) ([]sandbox.SnapshotID, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []sandbox.SnapshotID
	for id := range n.snapshots {
		all = append(all, id)
	}
	return all, nil
}
