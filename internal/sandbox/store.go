package sandbox

import (
	"context"
	"time"
)

// Quota limits what an organization may have running at once. Zero means no limit.
type Quota struct {
	Sandboxes int
	VCPUs     int
	MemoryMB  int
}

// Filter selects and pages a listing, newest first unless OldestFirst is set.
type Filter struct {
	OrgID    string
	States   []State           // any of these; empty means all
	Metadata map[string]string // every pair must match
	Template string            // name or id; "" means any
	// TemplateVersion is the version of the template; 0 means any.
	TemplateVersion int
	// CreatedFrom leaves out sandboxes created before it; zero leaves out none.
	CreatedFrom time.Time
	OldestFirst bool
	Limit       int    // 1-200, checked by the caller
	Cursor      string // from the previous page of the same order; "" means the first page
}

// Once makes a create idempotent: a repeat of Key and Hash gets the first answer.
type Once struct {
	Key  string // from the caller, scoped to the organization; "" turns it off
	Hash string // of the request's body
}

// Change describes one transition of one sandbox, with the conditions under which it applies.
type Change struct {
	ID     ID
	From   []State // the row must be in one of these
	Run    string  // if not "", the row must have this run
	To     State
	At     time.Time
	Reason string // for the event
	Detail string // for the event

	// Quota, if not nil, is checked as in Insert before the row is touched, as if the sandbox were
	// new: a wake takes the vCPUs and the memory that the suspend gave back. A change over quota is
	// Exhausted, code "quota_exceeded". OrgID must be the row's then.
	Quota *Quota
	OrgID string

	// These fields are written with the transition; nil leaves a field unchanged.
	NewRun         *string
	StartedAt      *time.Time
	Timeout        *time.Duration
	ExpiresAt      *time.Time // for this and the times below, the zero time writes "does not apply"
	SuspendedAt    *time.Time
	Kept           *Kept
	LastActivityAt *time.Time
	DestroyedAt    *time.Time
	DestroyReason  *Reason
	Error          *string
	Token          *string
}

// Store keeps the rows. Every method is atomic and durable when it returns. The contract suite of
// package store tests every implementation.
type Store interface {
	SandboxStore
	EventStore
	PortStore
	SnapshotStore
	PooledStore
}

// SandboxStore inserts, changes, finds and drops the rows of sandboxes.
type SandboxStore interface {
	// Insert adds a sandbox in state creating together with its first event. It returns Exhausted,
	// code "quota_exceeded", and writes nothing if the organization's sandboxes would exceed the
	// quota. Sandboxes that are over (see State.Over) or being destroyed do not count, and suspended
	// ones count for Sandboxes alone. If the once key is known, and younger than 24 h, Insert writes
	// nothing and returns the sandbox of the first create with found true; if its hash differs, Insert
	// returns a Conflict, code "idempotency_key_reused".
	Insert(ctx context.Context, s Sandbox, q Quota, once Once) (prior Sandbox, found bool, err error)
	// Forget drops the idempotency record of a failed create, so that the caller may retry. A missing
	// record is no error.
	Forget(ctx context.Context, id ID) error
	// Get returns the row, or NotFound with code "sandbox_not_found".
	Get(ctx context.Context, id ID) (Sandbox, error)
	// List returns a page and the cursor of the next, "" after the last. A cursor that List did not
	// return is Invalid in field "cursor".
	List(ctx context.Context, f Filter) ([]Sandbox, string, error)
	// Transition applies c and records its event in one transaction. When a row enters a state that is
	// over, it loses its environment, token and front data, and its listing of events keeps only the
	// newest 100; the listings of other rows keep 1,000. For a row that is not in a state of c.From or
	// does not have c.Run, Transition returns a Conflict, code "sandbox_state", with the row, and
	// changes nothing.
	Transition(ctx context.Context, c Change) (Sandbox, error)
	// SetExpiry moves the end of a running sandbox. It returns a Conflict, code "sandbox_not_running",
	// for a sandbox in another state. With later set it changes nothing unless the new end is after
	// the present one.
	SetExpiry(ctx context.Context, id ID, expiresAt time.Time, timeout time.Duration, later bool) (Sandbox, error)
	// SetActivity moves the last activity of sandboxes forward, never back, all in one transaction. It
	// skips sandboxes that are over or unknown.
	SetActivity(ctx context.Context, last map[ID]time.Time) error
	// SetEgress writes the policy of a sandbox, and adds note as Note does. It returns a Conflict,
	// code "sandbox_state", for a sandbox that is over.
	SetEgress(ctx context.Context, id ID, e Egress, note Event) (Sandbox, error)
	// SetFrontData writes the front's data of a sandbox. It returns a Conflict, code "sandbox_state",
	// for a sandbox that is over.
	SetFrontData(ctx context.Context, id ID, data string) (Sandbox, error)
	// Living returns the IDs of sandboxes that are not over, in no order.
	Living(ctx context.Context) ([]ID, error)
	// Unfinished returns every sandbox that is not over, oldest first.
	Unfinished(ctx context.Context) ([]Sandbox, error)
	// LostSandboxes returns the sandboxes of a lost node that end with it, oldest first: those that are being made or
	// removed, and ephemeral ones that are not suspended or waking. It returns none of a node that is not lost.
	LostSandboxes(ctx context.Context, node string) ([]ID, error)
	// EndLost writes that a sandbox is destroyed, for the reason why, or has failed if it was being made, if its node is
	// lost. It returns the sandbox as it was before, and whether the node is lost. A sandbox that is over stays as it is.
	// What the node has of the sandbox is removed when its next server starts.
	EndLost(ctx context.Context, id ID, why Reason, now time.Time) (before Sandbox, lost bool, err error)
	// Purge drops sandboxes that were over before the time over, with their listings of events, and
	// idempotency records older than 24 h at now. Of each organization's sandboxes that are over it
	// keeps the newest, at most most of them; 0 means no limit. A sandbox counts once more for each 4
	// KiB of its metadata and policy. Purge returns the number of sandboxes that it dropped.
	Purge(ctx context.Context, over, now time.Time, most int) (int, error)
	// Images lists the images that snapshots, pooled sandboxes and sandboxes that are not over
	// need.
	Images(ctx context.Context) ([]string, error)
}

// EventStore keeps the listings of the events of sandboxes. The methods of Store that change a
// sandbox add to them too.
type EventStore interface {
	// Note adds events that are not transitions, all in one transaction. It writes the present state
	// of the row as their From and To. A sandbox's listing keeps the newest 100 of these events for
	// each reason. Note skips sandboxes that are over or unknown.
	Note(ctx context.Context, events []Event) error
	// Events returns a page of a sandbox's events, newest first.
	Events(ctx context.Context, id ID, limit int, cursor string) ([]Event, string, error)
}

// PortStore keeps the public ports of sandboxes.
type PortStore interface {
	// SetPublicPort makes a port of a sandbox public or, with public false, not public. It is safe to
	// repeat. It returns a Conflict, code "too_many_public_ports", above MaxPublicPorts.
	SetPublicPort(ctx context.Context, id ID, port int, public bool) error
	// PublicPorts returns the public ports of a sandbox, lowest first.
	PublicPorts(ctx context.Context, id ID) ([]int, error)
}

// SnapshotStore keeps the rows of snapshots.
type SnapshotStore interface {
	// AddSnapshot adds a snapshot in state creating. It writes nothing if the organization has a
	// snapshot of that name in any state (Conflict, code "snapshot_exists") or already has most
	// snapshots (Exhausted, code "quota_exceeded"; 0 means no limit).
	AddSnapshot(ctx context.Context, s Snapshot, most int) error
	// ReadySnapshot makes a snapshot in state creating ready, with its time and size, and writes note
	// for its sandbox as Note does. A snapshot in another state, or a missing one, is a Conflict, code
	// "snapshot_state".
	ReadySnapshot(ctx context.Context, id SnapshotID, at time.Time, size int64, note Event) (Snapshot, error)
	// EndSnapshot marks a snapshot as being deleted, which frees its name. It is safe to repeat. A
	// missing snapshot is NotFound, code "snapshot_not_found".
	EndSnapshot(ctx context.Context, id SnapshotID) error
	// DropSnapshot drops the row of a snapshot. A missing row is no error.
	DropSnapshot(ctx context.Context, id SnapshotID) error
	// GetSnapshot returns the row, or NotFound with code "snapshot_not_found".
	GetSnapshot(ctx context.Context, id SnapshotID) (Snapshot, error)
	// FindSnapshot returns the organization's ready snapshot with the name, or NotFound with code
	// "snapshot_not_found".
	FindSnapshot(ctx context.Context, orgID, name string) (Snapshot, error)
	// ListSnapshots returns a page of ready snapshots, newest first, and the cursor of the next.
	ListSnapshots(ctx context.Context, f SnapshotFilter) ([]Snapshot, string, error)
	// UnreadySnapshots returns every snapshot that is not ready.
	UnreadySnapshots(ctx context.Context) ([]Snapshot, error)
}

// PooledStore keeps the rows of pooled sandboxes.
type PooledStore interface {
	// AddPooled adds a pooled sandbox. It returns an error if a pooled sandbox or a sandbox has the same
	// ID.
	AddPooled(ctx context.Context, m Pooled) error
	// DropPooled drops a pooled sandbox. A missing pooled sandbox is no error.
	DropPooled(ctx context.Context, id ID) error
	// ListPooled returns the pooled sandboxes, oldest first.
	ListPooled(ctx context.Context) ([]Pooled, error)
	// Admit returns what Insert would return now, and writes nothing.
	Admit(ctx context.Context, s Sandbox, q Quota, once Once) (prior Sandbox, found bool, err error)
	// Claim turns the pooled sandbox with the ID of s into the sandbox s, in state running, with the events of
	// a create. Otherwise it behaves like Insert. If there is no such pooled sandbox, it returns a Conflict,
	// code "no_member", and writes nothing.
	Claim(ctx context.Context, s Sandbox, q Quota, once Once) (prior Sandbox, found bool, err error)
}
