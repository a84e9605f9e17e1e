package sandbox

import (
	"context"
	"crypto/rand"
	"regexp"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// SnapshotID names a snapshot: "snap_" and 20 lower-case base32 characters.
type SnapshotID string

var (
	snapshotIDPattern = regexp.MustCompile(`^snap_[a-z2-7]{20}$`)
	// snapshotName limits a name to one element of a path, without characters that a shell interprets.
	snapshotName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
)

const snapshotPrefix = "snap_"

// NewSnapshotID returns a new SnapshotID from the system's random source.
func NewSnapshotID() SnapshotID {
	var b [13]byte
	rand.Read(b[:])
	return SnapshotID(snapshotPrefix + strings.ToLower(idEncoding.EncodeToString(b[:]))[:20])
}

// Valid reports whether the ID has the form of a snapshot's ID.
func (id SnapshotID) Valid() bool { return snapshotIDPattern.MatchString(string(id)) }

// SnapshotState is the state of a snapshot, stored as this string. Users see only ready snapshots.
// The other states are claims, which Reconcile ends by dropping the snapshot.
type SnapshotState string

// The states of snapshots, in their order.
const (
	SnapshotCreating SnapshotState = "creating"
	SnapshotReady    SnapshotState = "ready"
	SnapshotDeleting SnapshotState = "deleting"
)

// Snapshot describes the saved state of a sandbox at a time, from which new sandboxes can be
// created until it is deleted. It does not depend on its sandbox.
type Snapshot struct {
	ID        SnapshotID
	OrgID     string
	Name      string // unique among the organization's snapshots; "" means none
	State     SnapshotState
	SandboxID ID // its sandbox, which may be gone

	// These fields are the sandbox's. A restore needs the same image, size and disk, and uses the
	// rest as defaults.
	Template        string
	TemplateID      string
	TemplateVersion int
	Shape

	Bytes     int64     // on disk; 0 until the snapshot is ready
	CreatedAt time.Time // time of the state that it holds
	Kept      Kept      // what it holds
	Holder    Holder    // set by the store
}

// SnapshotFilter selects and pages snapshots, newest first.
type SnapshotFilter struct {
	OrgID     string
	SandboxID ID     // "" means any
	Name      string // "" means any
	Limit     int
	Cursor    string
}

func snapshotOf(sbx Sandbox, name string) Snapshot {
	kept := KeepAll
	if sbx.State == Suspended {
		kept = sbx.Kept
	}
	return Snapshot{ID: NewSnapshotID(), OrgID: sbx.OrgID, Name: name, State: SnapshotCreating, SandboxID: sbx.ID,
		Template: sbx.Template, TemplateID: sbx.TemplateID, TemplateVersion: sbx.TemplateVersion, Shape: sbx.Shape.Clone(),
		CreatedAt: time.Now().UTC().Truncate(time.Microsecond), Kept: kept}
}

func noSnapshot(nameOrID string) error {
	return fault.New(fault.NotFound, fault.CodeSnapshotNotFound, "there is no snapshot %.100q", nameOrID)
}

// SaveSnapshot makes a snapshot of a sandbox of either mode. A running sandbox is saved in its
// present state, keeps running and may be used meanwhile. A suspended one is saved in the state in
// which it would wake. SaveSnapshot counts as no activity and wakes no sandbox. It waits for any
// operation on the sandbox, and continues when ctx ends. Errors are Invalid in field "name";
// Conflict, code "snapshot_exists", for a name that is taken; Conflict, code "sandbox_not_running",
// for a sandbox in another state; Exhausted, code "quota_exceeded"; the machine's own (NoSpace,
// code "disk_full", …); or Internal, code "snapshot_failed". After an error there is no snapshot.
func (s *Service) SaveSnapshot(ctx context.Context, orgID string, id ID, name string) (Snapshot, error) {
	if name != "" && (!snapshotName.MatchString(name) || strings.HasPrefix(name, snapshotPrefix)) {
		return Snapshot{}, invalid("name",
			"must be 1 to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit and not with %s",
			snapshotPrefix)
	}
	return operate(ctx, s, orgID, id, opSnapshot, nil, func(ctx context.Context, sbx Sandbox) (Snapshot, error) {
		return s.saveSnapshot(ctx, sbx, name)
	})
}

// saveSnapshot makes the snapshot; the caller holds the operation.
func (s *Service) saveSnapshot(ctx context.Context, sbx Sandbox, name string) (Snapshot, error) {
	snap := snapshotOf(sbx, name)
	defer s.snapshots.hold(snap.ID)()
	if err := s.store.AddSnapshot(ctx, snap, s.cfg.MaxSnapshots); err != nil {
		return Snapshot{}, err
	}
	checkpoint, err := s.snapshots.write(ctx, sbx, snap.ID)
	saved := Event{SandboxID: sbx.ID, At: time.Now().UTC(), Reason: ReasonSnapshot,
		Detail: strings.TrimSpace(string(snap.ID) + " " + snap.Name)}
	var made Snapshot
	if err == nil {
		made, err = s.store.ReadySnapshot(ctx, snap.ID, checkpoint.At, checkpoint.Size, saved)
	}
	if err != nil {
		s.snapshots.abandon(ctx, snap.ID, true) // made may be empty
		return Snapshot{}, s.snapshotFailed(ctx, sbx, err)
	}
	s.logNote(ctx, saved)
	return made, nil
}

// logNote logs an event that is no transition.
func (s *Service) logNote(ctx context.Context, e Event) {
	s.log.InfoContext(ctx, "sandbox "+e.Reason, "sandbox", e.SandboxID, "detail", e.Detail)
}

// snapshotFailed settles the sandbox that could not be saved, unless a destroy interrupted, and
// returns the error for the callers.
func (s *Service) snapshotFailed(ctx context.Context, sbx Sandbox, cause error) error {
	if context.Cause(ctx) == errInterrupted {
		return fault.New(fault.Conflict, fault.CodeSandboxNotRunning,
			"sandbox %s was destroyed while a snapshot was made", sbx.ID)
	}
	s.log.ErrorContext(ctx, "making a snapshot", "sandbox", sbx.ID, "error", cause)
	if sbx.State == Running {
		if err := s.settle(ctx, sbx.ID, note{reason: reasonInterrupted}); err != nil { // the failure may have killed it
			s.log.ErrorContext(ctx, "settling a sandbox after a failed snapshot", "sandbox", sbx.ID, "error", err)
		}
	}
	if fault.As(cause) != nil {
		return cause
	}
	return fault.New(fault.Internal, fault.CodeSnapshotFailed, "no snapshot of sandbox %s was made", sbx.ID).Because(cause)
}

// DeleteSnapshot deletes a snapshot by name or ID. Sandboxes made from it continue. Sandboxes being
// made from it are completed before its files are removed. Errors are those of GetSnapshot.
func (s *Service) DeleteSnapshot(ctx context.Context, orgID, nameOrID string) error {
	return s.snapshots.remove(ctx, orgID, nameOrID)
}
