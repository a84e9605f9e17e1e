package sandbox

import (
	"context"
	"net"
	"time"
)

// Spec describes a sandbox to a Node.
type Spec struct {
	ID    ID
	OrgID string // owner, whose start slots and limits the sandbox shares; "" for a pooled one
	Run   string
	Token string
	Shape
	// From names the snapshot from which a create or a pooled sandbox is restored instead of
	// booted; "" means none. Image, Size and DiskMB must then be those of the snapshot's sandbox. Start is
	// ignored, unless the snapshot holds files alone.
	From SnapshotID
}

// Checkpoint describes a recovery point: a complete checkpoint on the machine's disk, from which a
// sandbox can be woken in its state of that time, or with its files of that time.
type Checkpoint struct {
	At   time.Time
	Size int64  // bytes on disk
	Run  string // run in which it was taken
	Kept Kept   // what it holds
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
	// Checkpoint holds the latest recovery point, or nil if there is none. At most one exists beside the
	// one being written.
	Checkpoint *Checkpoint
}

// Node makes and removes sandboxes on a machine. nodetest.Contract runs what the comments of its
// methods promise on every implementation. A call for a sandbox that does not run, and that needs one
// which does, is Conflict, code "sandbox_not_running".
type Node interface {
	NodeCapacity
	NodeInstances
	NodePool
	NodeCheckpoints
	NodeSnapshots
	NodePolicies
	NodeObserver
}

// NodeCapacity decides how many sandboxes a machine takes.
type NodeCapacity interface {
	// Reserve keeps room for a sandbox of the size, which counts like an instance until Create or Wake of that ID
	// takes the room over, or release gives it back. The caller calls release in any case, after an error of Create
	// or Wake too; it does nothing once the room was taken over or given back. Pooled sandboxes count. No room on
	// the machine is Unavailable, code "no_capacity", with RetryAfter. A second reservation of the same ID is an
	// error while the first one holds.
	Reserve(ctx context.Context, id ID, size Size) (release func(), err error)
	// FindImage returns nil if the image is on the machine, or may be fetched when a sandbox is made. It fetches
	// nothing, and waits for 5 seconds at most to learn it. Otherwise it returns Unavailable, code
	// "image_unavailable", with RetryAfter.
	FindImage(ctx context.Context, image string) error
	// Spare returns how many more sandboxes the machine's limit on their number and its memory allow,
	// at least 0.
	Spare(ctx context.Context) (int, error)
}

// NodeInstances makes and ends the instances of sandboxes, and reaches their agents.
type NodeInstances interface {
	// Create makes the sandbox and returns when its agent answers and its start command is ready, for
	// which it waits as long as the command's Patience. The policy is in force before any process of
	// the sandbox runs, and the same holds for Wake. After an error nothing of the sandbox is left,
	// except what the error reports as not undone. A sandbox with that ID which has an instance is an
	// error, and stays as it is. Without a reservation of the ID, no room on the machine is Unavailable, code
	// "no_capacity", with RetryAfter; pooled sandboxes do not count, since they give way. So is a machine that has
	// more sandboxes to start than it can. A start command that fails is Conflict, code "start_failed", with a
	// detail for the user.
	//
	// With spec.From the sandbox is not booted. It continues from that snapshot, with its processes,
	// memory, files and listening sockets, as a sandbox of its own. Its environment (for later
	// commands), user, working directory, host name, address, token and policy are those of the spec.
	// Its kernel gives other random values than those of other sandboxes from the snapshot.
	// Connections of the snapshot's sandbox are broken. From a snapshot that holds files alone the
	// sandbox is booted with these files. The snapshot is not needed after Create returns. A snapshot
	// that cannot be restored is Internal, code "restore_failed", with a detail for the user.
	Create(ctx context.Context, spec Spec) error
	// Wake starts an instance from the sandbox's latest recovery point, as spec.Run and with
	// spec.Token, and returns when its agent answers. From one that holds files alone it boots the
	// sandbox, runs the start command and waits for it as Create does. Only ID, Run, Token and Egress of
	// the spec are new; the rest must be the same as for Create. The recovery point stays. After an error Wake has
	// undone its work and the recovery point is still there. A sandbox with something for Rest to remove is an
	// error, and stays as it is. No room on the machine, and a start command that fails, are errors as
	// for Create. A missing recovery point, or one that cannot be restored, is Internal, code "wake_failed", with
	// a detail for the user.
	Wake(ctx context.Context, spec Spec) error
	// Rest ends the sandbox's processes and removes everything of it except its recovery point. It
	// continues after errors and joins them. A missing sandbox is no error.
	Rest(ctx context.Context, id ID) error
	// Destroy removes everything of the sandbox, its recovery point too. It continues after errors and
	// joins them. A missing sandbox is no error.
	Destroy(ctx context.Context, id ID) error
	// Check returns an error if a sandbox's agent does not answer.
	Check(ctx context.Context, id ID) error
	// Busy reports whether any process besides the agent runs inside. Such a process could have
	// changed the sandbox since its latest checkpoint without a call.
	Busy(ctx context.Context, id ID) (bool, error)
	// Dial connects to the sandbox's agent.
	Dial(ctx context.Context, id ID) (net.Conn, error)
}

// NodePool makes pooled sandboxes and gives them their owners.
type NodePool interface {
	// Prepare makes a pooled sandbox. A pooled sandbox is a sandbox as Create makes it, without what Claim
	// gives it, and closed: no traffic leaves it. A pooled sandbox with a start command already has the spec's
	// policy, environment, user and working directory, because the command must run as after a create.
	// Errors are those of Create, but pooled sandboxes count.
	Prepare(ctx context.Context, spec Spec) error
	// Claim gives a pooled sandbox the environment, user, working directory and policy of the spec. The rest
	// of the spec must be the same as for Prepare. The policy is in force when Claim returns. After an
	// error it is no longer a pooled sandbox, and nothing of it is left, except what the error reports as not
	// undone. A spec that names no pooled sandbox is Conflict, code "no_member", and changes nothing.
	Claim(ctx context.Context, spec Spec) error
}

// NodeCheckpoints saves sandboxes as recovery points.
type NodeCheckpoints interface {
	// Suspend writes a checkpoint of what keep selects and then ends the instance. A sandbox that an
	// older version of cay started may not be able to keep its files alone: Conflict, code
	// "sandbox_too_old". After success only the checkpoint is left. After an error the sandbox keeps
	// running, or is dead with its previous or its new checkpoint whole; Inspect tells which. Too little
	// space on the machine is NoSpace, code "disk_full", before the sandbox is touched; files that exceed
	// the sandbox's disk are NoSpace too, after they were written.
	Suspend(ctx context.Context, id ID, keep Kept) (Checkpoint, error)
	// Checkpoint writes a recovery point while the sandbox keeps running, after a pause that grows
	// with its memory. It removes the previous recovery point once the new one is whole. Errors are those of
	// Suspend.
	Checkpoint(ctx context.Context, id ID) (Checkpoint, error)
}

// NodeSnapshots makes, lists and removes snapshots.
type NodeSnapshots interface {
	// Snapshot writes a snapshot of a running sandbox. The sandbox continues after a pause that grows
	// with its memory, and keeps its connections. The snapshot outlives the sandbox, and so do the
	// programs that the snapshot needs. Errors are those of Suspend. After an error nothing of the
	// snapshot is left but what DropSnapshot removes.
	Snapshot(ctx context.Context, id ID, to SnapshotID) (Checkpoint, error)
	// SnapshotCheckpoint makes a snapshot from the sandbox's latest recovery point, which it does not
	// change. A missing recovery point is Conflict, code "sandbox_not_running".
	SnapshotCheckpoint(ctx context.Context, id ID, to SnapshotID) (Checkpoint, error)
	// DropSnapshot removes a complete or partial snapshot. Sandboxes that were made from it continue;
	// one that is being made fails. A missing snapshot is no error.
	DropSnapshot(ctx context.Context, id SnapshotID) error
	// Snapshots returns the snapshots of which anything exists, except those being written.
	Snapshots(ctx context.Context) ([]SnapshotID, error)
}

// NodePolicies keeps the policies of sandboxes in force and counts what they let through.
type NodePolicies interface {
	// SetEgress replaces the policy of a running sandbox, for established connections too. After an
	// error the previous policy is in force.
	SetEgress(ctx context.Context, id ID, e Egress) error
	// Traffic returns the traffic that left the sandbox, or was kept from leaving it, during its present
	// run.
	Traffic(ctx context.Context, id ID) (Traffic, error)
	// Denied returns a channel of denials by policies. The node drops denials that are not received in
	// time.
	Denied() <-chan Denial
}

// NodeObserver tells what a machine has of sandboxes.
type NodeObserver interface {
	// Inspect returns what the machine has of one sandbox, or nil for nothing.
	Inspect(ctx context.Context, id ID) (*Observed, error)
	// List returns what the machine has of all sandboxes, alive, dead or partial.
	List(ctx context.Context) ([]Observed, error)
	// Lost returns a channel of the sandboxes whose processes ended unexpectedly. The node has only
	// one such channel, and does not close it before the node itself is closed.
	Lost() <-chan Observed
}
