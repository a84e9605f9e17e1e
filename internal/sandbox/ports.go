package sandbox

import (
	"context"
	"net"
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
	// Exhausted, code "quota_exceeded".
	Quota *Quota

	// These fields are written with the transition; nil leaves a field unchanged.
	NewRun         *string
	StartedAt      *time.Time
	Timeout        *time.Duration
	ExpiresAt      *time.Time // for this and the times below, the zero time writes "does not apply"
	SuspendedAt    *time.Time
	LastActivityAt *time.Time
	DestroyedAt    *time.Time
	DestroyReason  *Reason
	Error          *string
	Token          *string
}

// Store keeps the rows. Every method is atomic and durable when it returns. The contract suite of
// package store tests every implementation.
type Store interface {
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
	// over, it loses its environment, token and surface, and its listing of events keeps only the
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
	// SetSurface writes the surface's data of a sandbox. It returns a Conflict, code "sandbox_state",
	// for a sandbox that is over.
	SetSurface(ctx context.Context, id ID, surface string) (Sandbox, error)
	// Note adds events that are not transitions, all in one transaction. It writes the present state
	// of the row as their From and To. A sandbox's listing keeps the newest 100 of these events for
	// each reason. Note skips sandboxes that are over or unknown.
	Note(ctx context.Context, events []Event) error
	// Living returns the IDs of sandboxes that are not over, in no order.
	Living(ctx context.Context) ([]ID, error)
	// Unfinished returns every sandbox that is not over, oldest first.
	Unfinished(ctx context.Context) ([]Sandbox, error)
	// Events returns a page of a sandbox's events, newest first.
	Events(ctx context.Context, id ID, limit int, cursor string) ([]Event, string, error)
	// Purge drops sandboxes that were over before the time over, with their listings of events, and
	// idempotency records older than 24 h at now. Of each organization's sandboxes that are over it
	// keeps the newest, at most most of them; 0 means no limit. A sandbox counts once more for each 4
	// KiB of its metadata and policy. Purge returns the number of sandboxes that it dropped.
	Purge(ctx context.Context, over, now time.Time, most int) (int, error)
	// Images lists the images that snapshots, pooled sandboxes and sandboxes that are not over
	// need.
	Images(ctx context.Context) ([]string, error)

	// SetPublicPort makes a port of a sandbox public or, with public false, not public. It is safe to
	// repeat. It returns a Conflict, code "too_many_public_ports", above MaxPublicPorts.
	SetPublicPort(ctx context.Context, id ID, port int, public bool) error
	// PublicPorts returns the public ports of a sandbox, lowest first.
	PublicPorts(ctx context.Context, id ID) ([]int, error)
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

// Spec describes a sandbox to a Node.
type Spec struct {
	ID    ID
	OrgID string // owner, whose start slots and limits the sandbox shares; "" for a pooled one
	Run   string
	Token string
	Shape
	// From names the snapshot from which a create or a pooled sandbox is restored instead of
	// booted; "" means none. Image, Size and DiskMB must then be those of the snapshot's sandbox, and
	// Start is ignored.
	From SnapshotID
}

// Point describes a recovery point: a complete checkpoint on the machine's disk, from which a
// sandbox can be woken in its state of that time.
type Checkpoint struct {
	At   time.Time
	Size int64  // bytes on disk
	Run  string // run in which it was taken
}

// Observed describes what a node has of one sandbox. A sandbox without anything on the node has no
// Observed.
type Observed struct {
	ID    ID
	Run   string // of the present instance, alive or dead; "" if unknown or without an instance
	Alive bool   // its processes run and its agent should answer
	// Remains reports whether an instance left something that Rest would remove: processes, a control
	// group, a network slot or files. It is true when Alive is.
	Remains bool
	// Warm reports whether the sandbox was prepared for the pool in the way that this server would
	// create it now, and no claim of it has begun.
	Warm bool
	// Egress holds the machine's policy for the sandbox, which is in force if Alive.
	Egress Egress
	// Point holds the latest recovery point, or nil if there is none. At most one exists beside the
	// one being written.
	Checkpoint *Checkpoint
}

// Node makes and removes sandboxes on a machine. The fake in caytest and the real node keep the
// same contract.
type Node interface {
	// Room returns nil if a sandbox of the size could be made now, and otherwise Unavailable, code
	// "no_capacity", with RetryAfter. It makes no reservation.
	Room(ctx context.Context, size Size) error
	// Create makes the sandbox and returns when its agent answers and its start command is ready, for
	// which it waits as long as the command's Patience. The policy is in force before any process of
	// the sandbox runs, and the same holds for Wake. After an error nothing of the sandbox is left,
	// except what the error reports as not undone. No room on the machine is Unavailable, code
	// "no_capacity", with RetryAfter. A start command that fails is Conflict, code "start_failed",
	// with a detail for the user.
	//
	// With spec.From the sandbox is not booted. It continues from that snapshot, with its processes,
	// memory, files and listening sockets, as a sandbox of its own. Its environment (for later
	// commands), user, working directory, host name, address, token and policy are those of the spec.
	// Its kernel gives other random values than those of other sandboxes from the snapshot.
	// Connections of the snapshot's sandbox are broken. The snapshot is not needed after Create
	// returns. A snapshot that cannot be restored is Internal, code "restore_failed", with a detail
	// for the user.
	Create(ctx context.Context, spec Spec) error
	// Spare returns how many more sandboxes the machine's limit on their number and its memory allow,
	// at least 0.
	Spare(ctx context.Context) (int, error)
	// Prepare makes a pooled sandbox. A pooled sandbox is a sandbox as Create makes it, without what Claim
	// gives it, and closed: no traffic leaves it. A pooled sandbox with a start command already has the spec's
	// policy, environment, user and working directory, because the command must run as after a create.
	// Errors are those of Create.
	Prepare(ctx context.Context, spec Spec) error
	// Claim gives a pooled sandbox the environment, user, working directory and policy of the spec. The rest
	// of the spec must be the same as for Prepare. The policy is in force when Claim returns. After an
	// error it is no longer a pooled sandbox, and nothing of it is left, except what the error reports as not
	// undone.
	Claim(ctx context.Context, spec Spec) error
	// Check returns an error if a sandbox's agent does not answer.
	Check(ctx context.Context, id ID) error
	// Suspend writes a recovery point of the whole sandbox and then ends the instance. After success
	// only the point is left. After an error the sandbox keeps running, or is dead with its previous
	// or its new point whole; Inspect tells which. Too little space is NoSpace, code "disk_full", and
	// is detected before the sandbox is touched.
	Suspend(ctx context.Context, id ID) (Checkpoint, error)
	// Checkpoint writes a recovery point while the sandbox keeps running, after a pause that grows
	// with its memory. It removes the previous point once the new one is whole. Errors are those of
	// Suspend.
	Checkpoint(ctx context.Context, id ID) (Checkpoint, error)
	// Wake starts an instance from the sandbox's latest recovery point, as spec.Run and with
	// spec.Token, and returns when its agent answers. Only ID, Run, Token and Egress of the spec are
	// new; the rest must be the same as for Create. After an error Wake has undone its work and the
	// point is still there. No room on the machine is Unavailable, code "no_capacity", with
	// RetryAfter. A point that cannot be restored is Internal, code "wake_failed", with a detail for
	// the user.
	Wake(ctx context.Context, spec Spec) error
	// Snapshot writes a snapshot of a running sandbox. The sandbox continues after a pause that grows
	// with its memory, and keeps its connections. The snapshot outlives the sandbox, and so do the
	// programs that the snapshot needs. Errors are those of Suspend. After an error nothing of the
	// snapshot is left but what DropSnapshot removes.
	Snapshot(ctx context.Context, id ID, to SnapshotID) (Checkpoint, error)
	// SnapshotPoint makes a snapshot from the sandbox's latest recovery point, which it does not
	// change. A missing point is Conflict, code "sandbox_not_running".
	SnapshotCheckpoint(ctx context.Context, id ID, to SnapshotID) (Checkpoint, error)
	// DropSnapshot removes a complete or partial snapshot. Sandboxes that were made from it continue;
	// one that is being made fails. A missing snapshot is no error.
	DropSnapshot(ctx context.Context, id SnapshotID) error
	// Snapshots returns the snapshots of which anything exists, except those being written.
	Snapshots(ctx context.Context) ([]SnapshotID, error)
	// Rest ends the sandbox's processes and removes everything of it except its recovery point. It
	// continues after errors and joins them. A missing sandbox is no error.
	Rest(ctx context.Context, id ID) error
	// Busy reports whether any process besides the agent runs inside. Such a process could have
	// changed the sandbox since its latest point without a call.
	Busy(ctx context.Context, id ID) (bool, error)
	// SetEgress replaces the policy of a running sandbox, for established connections too. After an
	// error the previous policy is in force. A sandbox that does not run is Conflict, code
	// "sandbox_not_running".
	SetEgress(ctx context.Context, id ID, e Egress) error
	// Traffic returns the traffic that left the sandbox during its present run. Errors are those of
	// SetEgress.
	Traffic(ctx context.Context, id ID) (Traffic, error)
	// Inspect returns what the machine has of one sandbox, or nil for nothing.
	Inspect(ctx context.Context, id ID) (*Observed, error)
	// Destroy removes everything of the sandbox, its recovery point too. It continues after errors and
	// joins them. A missing sandbox is no error.
	Destroy(ctx context.Context, id ID) error
	// Dial connects to the sandbox's agent. A missing sandbox is Conflict, code "sandbox_not_running".
	Dial(ctx context.Context, id ID) (net.Conn, error)
	// List returns what the machine has of all sandboxes, alive, dead or partial.
	List(ctx context.Context) ([]Observed, error)
	// Lost returns a channel of the sandboxes whose processes ended unexpectedly. The node has only
	// one such channel, and does not close it before the node itself is closed.
	Lost() <-chan Observed
	// Denied returns a channel of denials by policies. The node drops denials that are not received in
	// time.
	Denied() <-chan Denial
}
