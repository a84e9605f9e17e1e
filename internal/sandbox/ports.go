package sandbox

import (
	"context"
	"net"
	"time"
)

// Quota is what an organization may have running at once. Zero means no limit.
type Quota struct {
	Sandboxes int
	VCPUs     int
	MemoryMB  int
}

// Filter selects and pages a listing, newest first unless it says otherwise.
type Filter struct {
	OrgID    string
	States   []State           // any of; empty is all
	Metadata map[string]string // every pair must match
	Template string            // name or id; "" is any
	// CreatedFrom leaves out what was created before; zero is nothing.
	CreatedFrom time.Time
	OldestFirst bool
	Limit       int    // 1-200, checked by the caller
	Cursor      string // from the previous page of the same order; "" is the first
}

// Once makes a create idempotent: the same Key and Hash give the first answer.
type Once struct {
	Key  string // from the caller, scoped to the organization; "" is off
	Hash string // of the request's body
}

// Change is one transition of one sandbox, conditional on where it comes from.
type Change struct {
	ID     ID
	From   []State // the row must be in one of these
	Run    string  // if not "", the row must be in this life
	To     State
	At     time.Time
	Reason string // for the event
	Detail string // for the event

	// Quota, if not nil, is checked as in Insert before the row is touched, as if
	// the sandbox were new: waking one takes the vCPUs and the memory that a
	// suspended one gave back. Exhausted, code "quota_exceeded", when it is over.
	Quota *Quota

	// What else is written with the transition; nil leaves it as it is.
	NewRun         *string
	StartedAt      *time.Time
	Timeout        *time.Duration
	ExpiresAt      *time.Time // the zero time writes "does not apply", as of those that follow
	SuspendedAt    *time.Time
	LastActivityAt *time.Time
	DestroyedAt    *time.Time
	DestroyReason  *Reason
	Error          *string
	Source         *Source
	Token          *string
}

// Store keeps the rows. Every method is atomic and durable when it returns.
// The contract suite in the store room holds for every implementation.
type Store interface {
	// Insert adds a sandbox in state creating together with its first event,
	// unless the organization's sandboxes that are neither over (see State.Over)
	// nor being destroyed (and suspended ones count for Sandboxes alone) would exceed quota:
	// Exhausted, code "quota_exceeded", and nothing is written. With a once key that is known (and younger than 24 h)
	// nothing is written and the sandbox of the first create is returned with
	// found true; with another hash it is a Conflict, code "idempotency_key_reused".
	Insert(ctx context.Context, s Sandbox, q Quota, once Once) (prior Sandbox, found bool, err error)
	// Forget drops the idempotency record of a create that failed, so that
	// the caller may try again. No record is no error.
	Forget(ctx context.Context, id ID) error
	// Get returns the row, or NotFound with code "sandbox_not_found".
	Get(ctx context.Context, id ID) (Sandbox, error)
	// List returns a page and the cursor of the next, "" after the last.
	// A cursor that is not one of ours is Invalid in field "cursor".
	List(ctx context.Context, f Filter) ([]Sandbox, string, error)
	// Transition applies c and records its event in one transaction. A row that comes to a state
	// which is over loses its environment, token and surface, and its listing all but its newest
	// 100 events; others keep 1,000. A row that
	// is not in c.From or not in c.Run is a Conflict, code "sandbox_state", and
	// untouched; the returned sandbox is then the row as it is.
	Transition(ctx context.Context, c Change) (Sandbox, error)
	// SetExpiry moves the end of a running sandbox's life; Conflict, code
	// "sandbox_not_running", when it is not in state running. With later set it changes
	// nothing unless the new end is after the one that the row has.
	SetExpiry(ctx context.Context, id ID, expiresAt time.Time, timeout time.Duration, later bool) (Sandbox, error)
	// SetActivity moves the last activity of sandboxes forward, never back, all in
	// one transaction. Sandboxes that are over or unknown are left out.
	SetActivity(ctx context.Context, last map[ID]time.Time) error
	// SetEgress writes the policy of a sandbox that is not over, and note as Note does; Conflict,
	// code "sandbox_state", when it is.
	SetEgress(ctx context.Context, id ID, e Egress, note Event) (Sandbox, error)
	// SetSurface writes what a surface keeps with a sandbox that is not over; Conflict,
	// code "sandbox_state", when it is.
	SetSurface(ctx context.Context, id ID, surface string) (Sandbox, error)
	// Note adds events that are no transitions, all in one transaction: From and To are
	// written as the state that the row is in. Of one reason a sandbox's listing keeps its newest
	// 100. Sandboxes that are over or unknown are left out.
	Note(ctx context.Context, events []Event) error
	// Living lists the sandboxes that are not over, in no order.
	Living(ctx context.Context) ([]ID, error)
	// Unfinished returns every sandbox that is not over, oldest first.
	Unfinished(ctx context.Context) ([]Sandbox, error)
	// Events pages a sandbox's events, newest first.
	Events(ctx context.Context, id ID, limit int, cursor string) ([]Event, string, error)
	// Purge drops sandboxes that were over before the time, with their listings of events,
	// and idempotency records older than 24 h at now. Of those of one organization that are over
	// it keeps the newest, most of them, where one counts once more for each 4 KiB of its metadata
	// and policy; 0 is no limit. It says how many sandboxes went.
	Purge(ctx context.Context, over, now time.Time, most int) (int, error)
	// Images lists the images that sandboxes which are not over need, members of
	// the pool, and snapshots.
	Images(ctx context.Context) ([]string, error)

	// SetPublicPort adds a port to the public ones of a sandbox, or takes it away; either
	// is safe to repeat. Conflict, code "too_many_public_ports", above MaxPublicPorts.
	SetPublicPort(ctx context.Context, id ID, port int, public bool) error
	// PublicPorts lists them, lowest first.
	PublicPorts(ctx context.Context, id ID) ([]int, error)
	// AddSnapshot adds a snapshot in state creating, unless the organization has one of
	// that name, whatever its state (Conflict, code "snapshot_exists"), or most already (Exhausted,
	// code "quota_exceeded"; 0 is no limit): nothing is written then.
	AddSnapshot(ctx context.Context, s Snapshot, most int) error
	// ReadySnapshot makes a snapshot that is being created ready, with what is known of it
	// now, and writes note for its sandbox as Note does. One in another state, or none, is
	// Conflict, code "snapshot_state".
	ReadySnapshot(ctx context.Context, id SnapshotID, at time.Time, size int64, note Event) (Snapshot, error)
	// EndSnapshot makes a snapshot one that is being deleted; its name is free from then
	// on. It is no error if it is already. None is NotFound, code "snapshot_not_found".
	EndSnapshot(ctx context.Context, id SnapshotID) error
	// DropSnapshot drops the row of a snapshot. None is no error.
	DropSnapshot(ctx context.Context, id SnapshotID) error
	// GetSnapshot returns the row, or NotFound with code "snapshot_not_found".
	GetSnapshot(ctx context.Context, id SnapshotID) (Snapshot, error)
	// FindSnapshot returns the organization's ready snapshot of a name, or NotFound with
	// code "snapshot_not_found".
	FindSnapshot(ctx context.Context, orgID, name string) (Snapshot, error)
	// ListSnapshots returns a page of those that are ready, newest first, and the cursor of the next.
	ListSnapshots(ctx context.Context, f SnapshotFilter) ([]Snapshot, string, error)
	// UnreadySnapshots returns every snapshot that is not ready.
	UnreadySnapshots(ctx context.Context) ([]Snapshot, error)

	// AddMember adds a member of the pool. One with the ID of a member or of a sandbox
	// is an error.
	AddMember(ctx context.Context, m Member) error
	// DropMember drops a member. None is no error.
	DropMember(ctx context.Context, id ID) error
	// Members returns the members, oldest first.
	Members(ctx context.Context) ([]Member, error)
	// Admit says what Insert would say now, and writes nothing.
	Admit(ctx context.Context, s Sandbox, q Quota, once Once) (prior Sandbox, found bool, err error)
	// Claim makes the member with the sandbox's ID the sandbox s, which is in state
	// running, with the events of a create, and otherwise does and answers as Insert.
	// No such member is a Conflict, code "no_member", and nothing is written.
	Claim(ctx context.Context, s Sandbox, q Quota, once Once) (prior Sandbox, found bool, err error)
}

// Spec is everything a Node needs to make a sandbox.
type Spec struct {
	ID      ID
	OrgID   string // owns the sandbox and shares the start slots and limits of its organization; "" for a pooled one
	Run     string
	Image   string
	Size    Size
	DiskMB  int
	Env     map[string]string
	User    string
	Workdir string
	Egress  Egress
	Token   string
	Start   Start // of a create; a wake goes on with the command that runs
	// From is the snapshot that a create or a member of the pool is made from instead of
	// being booted; "" is none. Image, Size and DiskMB must then be what the sandbox was
	// created with that the snapshot is of, and Start is not looked at.
	From SnapshotID
}

// Point is a recovery point: a checkpoint on the machine's disk that is whole, from
// which a sandbox can be woken as it was at that time.
type Point struct {
	At   time.Time
	Size int64  // bytes on disk
	Run  string // the life it was taken in
}

// Fact is what a node has of one sandbox. A sandbox of which the node has nothing
// at all has no Fact.
type Fact struct {
	ID    ID
	Run   string // of the present life, running or dead; "" if the node cannot tell or there is none
	Alive bool   // its processes run and its agent can be expected to answer
	// Remains says that something of a life is there that Rest would remove:
	// processes, a control group, a network slot, files. True when Alive is.
	Remains bool
	// Warm says that it was prepared for the pool as a sandbox of this server would be
	// created now, and that nobody began to claim it.
	Warm bool
	// Egress is the policy that the machine has for it, in force if Alive.
	Egress Egress
	// Point is its latest recovery point, nil if it has none. There is at most one
	// beside the one being written.
	Point *Point
}

// Node makes sandboxes on a machine and takes them apart. The fake in caytest and
// the real one keep the same contract.
type Node interface {
	// Room says whether a sandbox of the size could be made now: Unavailable, code
	// "no_capacity", with RetryAfter when not. An answer is no reservation.
	Room(ctx context.Context, size Size) error
	// Create makes the sandbox and returns when its agent answers and its start
	// command is ready, which takes as long as that is patient. Its policy is in
	// force before anything of it runs; so it is with Wake. After an
	// error nothing of it is left, except what the error says could not be undone.
	// No room on the machine is Unavailable, code "no_capacity", with RetryAfter;
	// a start command that fails is Conflict, code "start_failed", with a detail for
	// the user.
	//
	// With spec.From the sandbox is not booted: it goes on from that snapshot, with its
	// processes, memory, files and listening sockets, as a sandbox of its own. Its
	// environment (for commands from here on), user, working directory, host name,
	// address, token and policy are the spec's, and what its kernel gives as random is not
	// what another one gets; connections that the snapshot's sandbox had are broken. The
	// snapshot is not needed any more when Create returns. One that cannot be restored
	// is Internal, code "restore_failed", with a detail for the user.
	Create(ctx context.Context, spec Spec) error
	// Spare is how many more sandboxes the machine could take by their number and its
	// memory, at the least 0.
	Spare(ctx context.Context) (int, error)
	// Prepare makes a member of the pool: a sandbox as Create makes it, but for what
	// Claim gives it, and closed: nothing leaves it. One with a start command, which
	// has to run as if it were created, has the spec's policy, environment, user and
	// working directory already. Errors are as Create's.
	Prepare(ctx context.Context, spec Spec) error
	// Claim gives a member environment, user, working directory and policy of the spec;
	// the rest of it must be what Prepare was given. The policy is in force when it
	// returns. After an error nothing of the member is left, except what the error says
	// could not be undone, and it is no member any more.
	Claim(ctx context.Context, spec Spec) error
	// Check asks a sandbox's agent whether it answers.
	Check(ctx context.Context, id ID) error
	// Suspend writes a recovery point of the whole sandbox and then ends it: when it
	// returns without an error only the point is left. After an error the sandbox
	// runs on, or is dead with its previous or its new point whole: Inspect says
	// which. Not enough space is NoSpace, code "disk_full", found out before
	// anything is done to the sandbox.
	Suspend(ctx context.Context, id ID) (Point, error)
	// Checkpoint writes a recovery point while the sandbox runs on, after a pause
	// that grows with its memory. The point before it is given up once the new
	// one is whole. Errors are as Suspend's.
	Checkpoint(ctx context.Context, id ID) (Point, error)
	// Wake makes the sandbox run from its latest recovery point, as spec.Run and with
	// spec.Token, and returns when its agent answers; only ID, Run, Token and Egress
	// of the spec are new, the rest must be what Create was given. After an error
	// what was begun is undone and the point is still there. No room on the machine is
	// Unavailable, code "no_capacity", with RetryAfter; a point that cannot be restored
	// is Internal, code "wake_failed", with a detail for the user.
	Wake(ctx context.Context, spec Spec) error
	// Snapshot writes a snapshot of a sandbox that runs, and runs on after a pause that
	// grows with its memory; its connections live. The snapshot outlives the sandbox, and
	// so do the programs that it needs. Errors are as Suspend's; after one there is
	// nothing of the snapshot but what DropSnapshot removes.
	Snapshot(ctx context.Context, id ID, to SnapshotID) (Point, error)
	// SnapshotPoint makes a snapshot of the sandbox's latest recovery point, which is
	// untouched. None is Conflict, code "sandbox_not_running".
	SnapshotPoint(ctx context.Context, id ID, to SnapshotID) (Point, error)
	// DropSnapshot removes a snapshot, whole or in part. Sandboxes that were made from it go
	// on; one that is being made fails. None is success.
	DropSnapshot(ctx context.Context, id SnapshotID) error
	// Snapshots lists those that there is anything of, but for what is still being written.
	Snapshots(ctx context.Context) ([]SnapshotID, error)
	// Rest ends what runs of the sandbox and removes everything of it but its recovery
	// point, going on after errors and joining them. Nothing there is success.
	Rest(ctx context.Context, id ID) error
	// Busy reports whether anything but the agent runs inside, which could have changed
	// the sandbox since its latest point without any call.
	Busy(ctx context.Context, id ID) (bool, error)
	// SetEgress replaces the policy of a sandbox that runs, for established connections
	// too. After an error the one before is in force. A sandbox that does not run is
	// Conflict, code "sandbox_not_running".
	SetEgress(ctx context.Context, id ID, e Egress) error
	// Traffic counts what left the sandbox in its present life. Errors are as SetEgress's.
	Traffic(ctx context.Context, id ID) (Traffic, error)
	// Inspect says what the machine has of one sandbox; nil is nothing.
	Inspect(ctx context.Context, id ID) (*Fact, error)
	// Destroy removes everything of the sandbox, its recovery point too, going on
	// after errors and joining them. No such sandbox is success.
	Destroy(ctx context.Context, id ID) error
	// Dial connects to the sandbox's agent. A sandbox that is not there is Conflict,
	// code "sandbox_not_running".
	Dial(ctx context.Context, id ID) (net.Conn, error)
	// List says what the machine has, dead or alive, whole or in part.
	List(ctx context.Context) ([]Fact, error)
	// Lost yields the sandboxes whose processes ended without being asked to.
	// One channel for the node's whole life; never closed before the node is.
	Lost() <-chan Fact
	// Denied yields what policies kept in. It is lossy: what nobody takes is dropped.
	Denied() <-chan Denial
}
