package node

import (
	"context"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// A snapshot is a checkpoint under its own name, beside those of the sandboxes. It does not depend
// on the sandbox that it was taken from.

// Snapshot implements sandbox.Node.
func (n *Node) Snapshot(ctx context.Context, id sandbox.ID, to sandbox.SnapshotID) (sandbox.Checkpoint, error) {
	return n.saveLive(ctx, id, string(to))
}

// SnapshotCheckpoint implements sandbox.Node.
func (n *Node) SnapshotCheckpoint(_ context.Context, id sandbox.ID, to sandbox.SnapshotID) (sandbox.Checkpoint, error) {
	c, was, err := n.latest(string(id))
	if err == nil && c != nil {
		c, err = n.checkpoints.Copy(string(id), string(to))
	}
	switch {
	case err != nil:
		return sandbox.Checkpoint{}, err
	case c == nil:
		return sandbox.Checkpoint{}, fault.New(fault.Conflict, fault.CodeSandboxNotRunning,
			"sandbox %s has no recovery point on this machine", id)
	}
	n.saved(string(to), c.Size)
	return sandbox.Checkpoint{At: c.At, Size: c.Size, Run: was.Run, Kept: was.Kept}, n.passed("copy")
}

// DropSnapshot implements sandbox.Node.
func (n *Node) DropSnapshot(_ context.Context, id sandbox.SnapshotID) error {
	if err := n.checkpoints.Remove(string(id)); err != nil {
		return err
	}
	return n.collect()
}

// Snapshots implements sandbox.Node.
func (n *Node) Snapshots(context.Context) ([]sandbox.SnapshotID, error) {
	names, err := n.checkpoints.Names()
	if err != nil {
		return nil, err
	}
	var all []sandbox.SnapshotID
	for _, name := range names {
		if id := sandbox.SnapshotID(name); id.Valid() {
			all = append(all, id)
		}
	}
	return all, nil
}
