package sandbox

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"github.com/cayhq/cay/internal/fault"
)

// RowStore has the part of [Store] that is read in any process, and the rows that no machine needs to know of.
type RowStore interface {
	Get(ctx context.Context, id ID) (Sandbox, error)
	List(ctx context.Context, f Filter) ([]Sandbox, string, error)
	Living(ctx context.Context) ([]ID, error)
	Events(ctx context.Context, id ID, limit int, cursor string) ([]Event, string, error)
	GetSnapshot(ctx context.Context, id SnapshotID) (Snapshot, error)
	FindSnapshot(ctx context.Context, orgID, name string) (Snapshot, error)
	ListSnapshots(ctx context.Context, f SnapshotFilter) ([]Snapshot, string, error)
	PortStore
}

// Rows answers what the rows alone can answer, in any process of the cluster. A [Service] is one too, which knows the
// last activities of its own sandboxes sooner than the rows. Rows is safe for concurrent use.
type Rows struct {
	sizes       []Size
	defaultSize string
	defaultDisk int
	rows        RowStore
	shown       func(Sandbox) Sandbox
}

// NewRows returns Rows without a machine. Of cfg it uses the sizes and the defaults.
func NewRows(cfg Config, store RowStore) *Rows {
	return &Rows{sizes: cfg.Sizes, defaultSize: cfg.DefaultSize, defaultDisk: cfg.DefaultDisk, rows: store,
		shown: func(sbx Sandbox) Sandbox { return sbx }}
}

// Get returns a sandbox of the organization. It returns NotFound if there is none and Denied, code
// "not_your_sandbox", if it belongs to another organization. It counts as no activity and wakes no
// sandbox.
func (r *Rows) Get(ctx context.Context, orgID string, id ID) (Sandbox, error) {
	if !id.Valid() {
		return Sandbox{}, notFound(id)
	}
	sbx, err := r.rows.Get(ctx, id)
	if err != nil {
		return Sandbox{}, err
	}
	if sbx.OrgID != orgID {
		return Sandbox{}, fault.New(fault.Denied, fault.CodeNotYourSandbox, "sandbox %s belongs to another organization", id)
	}
	return r.shown(sbx), nil
}

func notFound(id ID) error {
	return fault.New(fault.NotFound, fault.CodeSandboxNotFound, "there is no sandbox %q", string(id))
}

// List returns a page of the organization's sandboxes.
func (r *Rows) List(ctx context.Context, f Filter) ([]Sandbox, string, error) {
	sandboxes, next, err := r.rows.List(ctx, f)
	for i := range sandboxes {
		sandboxes[i] = r.shown(sandboxes[i])
	}
	return sandboxes, next, err
}

// GetAny returns a sandbox of any organization, for callers that are not identified by a key. It
// returns NotFound if there is none.
func (r *Rows) GetAny(ctx context.Context, id ID) (Sandbox, error) {
	if !id.Valid() {
		return Sandbox{}, notFound(id)
	}
	return r.rows.Get(ctx, id)
}

// Living returns the IDs of all organizations' sandboxes that are not over.
func (r *Rows) Living(ctx context.Context) ([]ID, error) { return r.rows.Living(ctx) }

// Events returns a page of a sandbox's events, newest first.
func (r *Rows) Events(ctx context.Context, orgID string, id ID, limit int, cursor string) ([]Event, string, error) {
	if _, err := r.Get(ctx, orgID, id); err != nil {
		return nil, "", err
	}
	return r.rows.Events(ctx, id, limit, cursor)
}

// GetSnapshot returns a ready snapshot of the organization by name or ID. It returns NotFound, code
// "snapshot_not_found", if there is none or it belongs to another organization.
func (r *Rows) GetSnapshot(ctx context.Context, orgID, nameOrID string) (Snapshot, error) {
	if !strings.HasPrefix(nameOrID, snapshotPrefix) {
		if !snapshotName.MatchString(nameOrID) {
			return Snapshot{}, noSnapshot(nameOrID)
		}
		return r.rows.FindSnapshot(ctx, orgID, nameOrID)
	}
	if !SnapshotID(nameOrID).Valid() {
		return Snapshot{}, noSnapshot(nameOrID)
	}
	snap, err := r.rows.GetSnapshot(ctx, SnapshotID(nameOrID))
	if err == nil && (snap.OrgID != orgID || snap.State != SnapshotReady) {
		err = noSnapshot(nameOrID)
	}
	return snap, err
}

// ListSnapshots returns a page of the organization's snapshots.
func (r *Rows) ListSnapshots(ctx context.Context, f SnapshotFilter) ([]Snapshot, string, error) {
	return r.rows.ListSnapshots(ctx, f)
}

// MaxPublicPorts limits the public ports of a sandbox. It exceeds what a user serves and is low
// enough to read all ports at once. A higher value makes that read larger.
const MaxPublicPorts = 100

// SetPublicPort makes a port of a sandbox public, so that it can be reached without a key or a
// signature, or takes that back. It counts as no activity and wakes no sandbox. It returns a
// Conflict with code "sandbox_not_running" for a destroyed sandbox, and with code
// "too_many_public_ports" above [MaxPublicPorts].
func (r *Rows) SetPublicPort(ctx context.Context, orgID string, id ID, port int, public bool) error {
	sbx, err := r.Get(ctx, orgID, id)
	if err != nil {
		return err
	}
	if sbx.State.Status() == StatusDestroyed {
		return notRunning(sbx)
	}
	return r.rows.SetPublicPort(ctx, id, port, public)
}

// PublicPorts returns the public ports of a sandbox, lowest first.
func (r *Rows) PublicPorts(ctx context.Context, orgID string, id ID) ([]int, error) {
	if _, err := r.Get(ctx, orgID, id); err != nil {
		return nil, err
	}
	return r.rows.PublicPorts(ctx, id)
}

// GetPort returns the owner of a sandbox and reports whether the port is public, for a request
// without a key. The caller decides what that allows. GetPort returns NotFound if there is no such
// sandbox.
func (r *Rows) GetPort(ctx context.Context, id ID, port int) (orgID string, public bool, err error) {
	sbx, err := r.GetAny(ctx, id)
	if err != nil {
		return "", false, err
	}
	ports, err := r.rows.PublicPorts(ctx, id)
	return sbx.OrgID, slices.Contains(ports, port), err
}

// Sizes returns the sizes that a sandbox may have.
func (r *Rows) Sizes() []Size { return r.sizes }

// SizeOf returns the size and the disk, in MiB, of a sandbox whose template names these; "" and 0 are the
// configured defaults.
func (r *Rows) SizeOf(name string, diskMB int) (Size, int) {
	for _, size := range r.sizes {
		if size.Name == cmp.Or(name, r.defaultSize) {
			return size, cmp.Or(diskMB, r.defaultDisk)
		}
	}
	return Size{}, cmp.Or(diskMB, r.defaultDisk)
}
