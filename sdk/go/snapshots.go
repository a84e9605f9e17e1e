package cay

import (
	"context"
	"iter"
)

// CreateSnapshot makes a snapshot of a sandbox in its present state, with a name unless that is
// "". CreateSandboxRequest.Snapshot creates other sandboxes from it.
func (c *Client) CreateSnapshot(ctx context.Context, id, name string) (*Snapshot, error) {
	var r createSnapshotRequest
	if name != "" {
		r.Name = &name
	}
	return decode[Snapshot](c.wire.CreateSnapshot(ctx, id, r))
}

// ListSnapshotsOptions selects snapshots and a page; the zero value selects the first page of all.
type ListSnapshotsOptions struct {
	SandboxID string // "" is any
	Name      string // "" is any
	ListOptions
}

// ListSnapshots returns a page of snapshots, newest first.
func (c *Client) ListSnapshots(ctx context.Context, o ListSnapshotsOptions) (*SnapshotList, error) {
	var p listSnapshotsParams
	p.Limit, p.Cursor = o.params()
	if o.SandboxID != "" {
		p.Sandbox = &o.SandboxID
	}
	if o.Name != "" {
		p.Name = &o.Name
	}
	return decode[SnapshotList](c.wire.ListSnapshots(ctx, &p))
}

// Snapshots returns an iterator over all snapshots that o selects, which reads them page by page
// and ends after the first error.
func (c *Client) Snapshots(ctx context.Context, o ListSnapshotsOptions) iter.Seq2[Snapshot, error] {
	return all(o.ListOptions, func(page ListOptions) ([]Snapshot, *string, error) {
		o.ListOptions = page
		l, err := c.ListSnapshots(ctx, o)
		if err != nil {
			return nil, nil, err
		}
		return l.Snapshots, l.NextCursor, nil
	})
}

// GetSnapshot returns a snapshot by name or id.
func (c *Client) GetSnapshot(ctx context.Context, nameOrID string) (*Snapshot, error) {
	return decode[Snapshot](c.wire.GetSnapshot(ctx, nameOrID))
}

// DeleteSnapshot deletes a snapshot by name or id. Sandboxes that were created from it go on.
func (c *Client) DeleteSnapshot(ctx context.Context, nameOrID string) error {
	return done(c.wire.DeleteSnapshot(ctx, nameOrID))
}

// Fork creates sandboxes from the present state of a running one. It returns one child for each
// that was requested: a sandbox, or the reason why that was not created. After an error there are
// no children.
func (c *Client) Fork(ctx context.Context, id string, r ForkRequest) ([]ForkChild, error) {
	result, err := decode[forkResult](c.wire.ForkSandbox(ctx, id, r))
	if err != nil {
		return nil, err
	}
	return result.Children, nil
}
