package client

import (
	"context"
	"iter"
)

// CreateSnapshot keeps a sandbox as it is now, under a name if that is not "". Make others
// from it with CreateSandboxRequest.Snapshot.
func (c *Client) CreateSnapshot(ctx context.Context, id, name string) (*Snapshot, error) {
	var r CreateSnapshotRequest
	if name != "" {
		r.Name = &name
	}
	return decode[Snapshot](c.wire.CreateSnapshot(ctx, id, r))
}

// ListSnapshotsOptions selects and pages; the zero value is the first page of all.
type ListSnapshotsOptions struct {
	SandboxID string // "" is any
	Name      string // "" is any
	ListOptions
}

// ListSnapshots returns a page of snapshots, newest first.
func (c *Client) ListSnapshots(ctx context.Context, o ListSnapshotsOptions) (*SnapshotList, error) {
	var p ListSnapshotsParams
	p.Limit, p.Cursor = o.params()
	if o.SandboxID != "" {
		p.Sandbox = &o.SandboxID
	}
	if o.Name != "" {
		p.Name = &o.Name
	}
	return decode[SnapshotList](c.wire.ListSnapshots(ctx, &p))
}

// Snapshots walks all snapshots that o selects, page by page, and ends after the first
// error.
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

// DeleteSnapshot deletes a snapshot by name or id. Sandboxes made from it go on.
func (c *Client) DeleteSnapshot(ctx context.Context, nameOrID string) error {
	return done(c.wire.DeleteSnapshot(ctx, nameOrID))
}

// Fork makes children of a running sandbox, which go on from where it is now. There is one
// for each that was asked for: a sandbox, or why it was not made. An error says that there
// is none at all.
func (c *Client) Fork(ctx context.Context, id string, r ForkRequest) ([]ForkChild, error) {
	result, err := decode[ForkResult](c.wire.ForkSandbox(ctx, id, r))
	if err != nil {
		return nil, err
	}
	return result.Children, nil
}
