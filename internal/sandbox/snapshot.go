package sandbox

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// SnapshotID names a snapshot: "snap_" and 20 lower-case base32 characters.
type SnapshotID string

var (
	snapshotIDPattern = regexp.MustCompile(`^snap_[a-z2-7]{20}$`)
	// snapshotName keeps a name in one element of a path, and out of a shell's way.
	snapshotName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
)

const snapshotPrefix = "snap_"

// NewSnapshotID makes a SnapshotID from the system's random source.
func NewSnapshotID() SnapshotID {
	var b [13]byte
	rand.Read(b[:])
	return SnapshotID(snapshotPrefix + strings.ToLower(idEncoding.EncodeToString(b[:]))[:20])
}

// Valid reports whether the ID has the form of one.
func (id SnapshotID) Valid() bool { return snapshotIDPattern.MatchString(string(id)) }

// SnapshotState is where a snapshot stands, stored as this string. Only one that is ready
// is seen by users; the others are claims, which reconcile ends by dropping it.
type SnapshotState string

// The states, in their order.
const (
	SnapshotCreating SnapshotState = "creating"
	SnapshotReady    SnapshotState = "ready"
	SnapshotDeleting SnapshotState = "deleting"
)

// Snapshot is a sandbox as it was at a time, kept until it is deleted, from which new
// sandboxes start. It depends on nothing of the sandbox it is of.
type Snapshot struct {
	ID        SnapshotID
	OrgID     string
	Name      string // unique among the organization's snapshots; "" is none
	State     SnapshotState
	SandboxID ID // that it is of, which may be gone

	// As the sandbox had them, since a restore needs the same or a create begins with them.
	Template        string
	TemplateID      string
	TemplateVersion int
	Image           string
	Size            Size
	DiskMB          int
	Env             map[string]string
	Egress          Egress
	User            string
	Workdir         string

	Bytes     int64     // on disk; 0 until it is ready
	CreatedAt time.Time // the moment that it holds
}

// SnapshotFilter selects and pages snapshots, newest first.
type SnapshotFilter struct {
	OrgID     string
	SandboxID ID     // "" is any
	Name      string // "" is any
	Limit     int
	Cursor    string
}

func snapshotOf(box Sandbox, name string) Snapshot {
	return Snapshot{ID: NewSnapshotID(), OrgID: box.OrgID, Name: name, State: SnapshotCreating, SandboxID: box.ID,
		Template: box.Template, TemplateID: box.TemplateID, TemplateVersion: box.TemplateVersion, Image: box.Image,
		Size: box.Size, DiskMB: box.DiskMB, Env: maps.Clone(box.Env), Egress: box.Egress, User: box.User, Workdir: box.Workdir,
		CreatedAt: time.Now().UTC().Truncate(time.Microsecond)}
}

const codeNoSnapshot = "snapshot_not_found"

func noSnapshot(nameOrID string) error {
	return fault.New(fault.NotFound, codeNoSnapshot, "there is no snapshot %.100q", nameOrID)
}

// SaveSnapshot makes a snapshot of a sandbox of either mode: of one that runs as it is
// now, which runs on and may be used meanwhile, or of a suspended one as it would wake. It is
// no activity and wakes nobody. It waits for what is being done to the sandbox, and goes on
// when ctx ends. Invalid in field "name"; Conflict, code "snapshot_exists" for a name that is
// taken and "sandbox_not_running" for a sandbox in any other state; Exhausted, code
// "quota_exceeded". Else the error is the machine's (NoSpace, code "disk_full", …) or
// Internal, code "snapshot_failed". After an error there is no snapshot.
func (s *Service) SaveSnapshot(ctx context.Context, orgID string, id ID, name string) (Snapshot, error) {
	if name != "" && (!snapshotName.MatchString(name) || strings.HasPrefix(name, snapshotPrefix)) {
		return Snapshot{}, invalid("name", "must be 1 to 63 letters, digits, '.', '_' and '-', beginning with a letter or digit and not with %s", snapshotPrefix)
	}
	var snap Snapshot
	_, err := s.exclusive(ctx, orgID, id, opSnapshot, savable, func(ctx context.Context) (box Sandbox, err error) {
		box, snap, err = s.saveSnapshot(ctx, id, name)
		return box, err
	})
	if err != nil {
		return Snapshot{}, err
	}
	return snap, nil
}

// exclusive does work on a sandbox in its turn, unless refuse has something against the
// sandbox's state. It waits for what is being done to it, and goes on when ctx ends.
func (s *Service) exclusive(ctx context.Context, orgID string, id ID, kind opKind, refuse func(Sandbox) error, work func(context.Context) (Sandbox, error)) (Sandbox, error) {
	for {
		box, err := s.Get(ctx, orgID, id)
		if err != nil {
			return Sandbox{}, err
		}
		if err := refuse(box); err != nil {
			return Sandbox{}, err
		}
		op, mine := s.begin(id, kind)
		if op == nil {
			return Sandbox{}, errClosing
		}
		if mine {
			s.do(ctx, id, op, work)
			return op.wait(ctx)
		}
		if err := op.ended(ctx); err != nil {
			return Sandbox{}, err
		}
	}
}

// savable refuses a sandbox that a snapshot cannot be made of, nor soon.
func savable(box Sandbox) error {
	if box.State == Creating || box.State == Destroying || box.State.Over() {
		return notRunning(box)
	}
	return nil
}

// saveSnapshot makes the snapshot; the caller holds the operation.
func (s *Service) saveSnapshot(ctx context.Context, id ID, name string) (Sandbox, Snapshot, error) {
	box, err := s.present(ctx, id)
	if err != nil {
		return Sandbox{}, Snapshot{}, err
	}
	if box.State != Running && box.State != Suspended {
		return Sandbox{}, Snapshot{}, notRunning(box)
	}
	snap := snapshotOf(box, name)
	defer s.holdSnapshot(snap.ID)()
	if err := s.store.AddSnapshot(ctx, snap, s.cfg.MaxSnapshots); err != nil {
		return Sandbox{}, Snapshot{}, err
	}
	point, err := s.writeSnapshot(ctx, box, snap.ID)
	saved := Event{SandboxID: box.ID, At: time.Now().UTC(), Reason: reasonSnapshot,
		Detail: strings.TrimSpace(string(snap.ID) + " " + snap.Name)}
	if err == nil {
		snap, err = s.store.ReadySnapshot(ctx, snap.ID, point.At, point.Size, saved)
	}
	if err != nil {
		s.abandonSnapshot(ctx, snap.ID, true)
		return Sandbox{}, Snapshot{}, s.snapshotFailed(ctx, box, err)
	}
	s.logNote(ctx, saved)
	return box, snap, nil
}

// logNote logs an event that is no transition.
func (s *Service) logNote(ctx context.Context, e Event) {
	s.log.InfoContext(ctx, "sandbox "+e.Reason, "sandbox", e.SandboxID, "detail", e.Detail)
}

// writeSnapshot has the machine write it.
func (s *Service) writeSnapshot(ctx context.Context, box Sandbox, to SnapshotID) (Point, error) {
	ctx, cancel := context.WithTimeout(ctx, pointTimeout)
	defer cancel()
	if box.State == Suspended {
		return s.node.SnapshotPoint(ctx, box.ID, to)
	}
	return s.node.Snapshot(ctx, box.ID, to)
}

// abandonSnapshot removes what is there of a snapshot that is not to be. What fails,
// reconcile tries again.
func (s *Service) abandonSnapshot(ctx context.Context, id SnapshotID, row bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	err := s.node.DropSnapshot(ctx, id)
	if err == nil && row {
		err = s.store.DropSnapshot(ctx, id)
	}
	if err != nil {
		s.log.ErrorContext(ctx, "removing a snapshot", "snapshot", id, "error", err)
	}
}

// snapshotFailed looks after the sandbox that could not be saved, unless destroy took
// over, and returns what the callers are told.
func (s *Service) snapshotFailed(ctx context.Context, box Sandbox, cause error) error {
	if context.Cause(ctx) == errInterrupted {
		return fault.New(fault.Conflict, codeNotRunning, "sandbox %s was destroyed while a snapshot was made", box.ID)
	}
	s.log.ErrorContext(ctx, "making a snapshot", "sandbox", box.ID, "error", cause)
	if box.State == Running {
		if err := s.settle(ctx, box.ID, note{reason: reasonInterrupted}); err != nil { // it may have died of it
			s.log.ErrorContext(ctx, "looking after a sandbox without its snapshot", "sandbox", box.ID, "error", err)
		}
	}
	if fault.As(cause) != nil {
		return cause
	}
	return fault.New(fault.Internal, "snapshot_failed", "no snapshot of sandbox %s was made", box.ID).Because(cause)
}

// snapshotUse is who needs the files of a snapshot now, makers included.
type snapshotUse struct {
	count  int
	doomed bool // it was deleted meanwhile: the last one removes it
}

// holdSnapshot keeps a snapshot from being removed until the returned function is called.
// Whether it is there is to be looked at afterwards: who deletes it writes that down before
// looking for those who hold it.
func (s *Service) holdSnapshot(id SnapshotID) (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.snapshots[id]
	if u == nil {
		u = &snapshotUse{}
		s.snapshots[id] = u
	}
	u.count++
	return func() { s.releaseSnapshot(id) }
}

// holdAlone is holdSnapshot for a snapshot that nobody holds; nil if somebody does.
func (s *Service) holdAlone(id SnapshotID) (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.snapshots[id] != nil {
		return nil
	}
	s.snapshots[id] = &snapshotUse{count: 1}
	return func() { s.releaseSnapshot(id) }
}

func (s *Service) releaseSnapshot(id SnapshotID) {
	s.mu.Lock()
	u := s.snapshots[id]
	u.count--
	over := u.count == 0
	if over {
		delete(s.snapshots, id)
	}
	s.mu.Unlock()
	if over && u.doomed {
		s.abandonSnapshot(context.Background(), id, true)
	}
}

// findSnapshot returns a ready snapshot of the organization by name or ID.
func (s *Service) findSnapshot(ctx context.Context, orgID, nameOrID string) (Snapshot, error) {
	if !strings.HasPrefix(nameOrID, snapshotPrefix) {
		if !snapshotName.MatchString(nameOrID) {
			return Snapshot{}, noSnapshot(nameOrID)
		}
		return s.store.FindSnapshot(ctx, orgID, nameOrID)
	}
	if !SnapshotID(nameOrID).Valid() {
		return Snapshot{}, noSnapshot(nameOrID)
	}
	snap, err := s.store.GetSnapshot(ctx, SnapshotID(nameOrID))
	if err == nil && (snap.OrgID != orgID || snap.State != SnapshotReady) {
		err = noSnapshot(nameOrID)
	}
	return snap, err
}

// useSnapshot finds a snapshot and holds it.
func (s *Service) useSnapshot(ctx context.Context, orgID, nameOrID string) (Snapshot, func(), error) {
	snap, err := s.findSnapshot(ctx, orgID, nameOrID)
	if err != nil {
		return Snapshot{}, nil, err
	}
	release := s.holdSnapshot(snap.ID)
	if snap, err = s.findSnapshot(ctx, orgID, string(snap.ID)); err != nil { // deleted in between
		release()
		return Snapshot{}, nil, err
	}
	return snap, release, nil
}

// GetSnapshot returns a snapshot of the organization by name or ID: NotFound, code
// "snapshot_not_found", if there is none, or it is another's.
func (s *Service) GetSnapshot(ctx context.Context, orgID, nameOrID string) (Snapshot, error) {
	return s.findSnapshot(ctx, orgID, nameOrID)
}

// ListSnapshots returns a page of the organization's snapshots.
func (s *Service) ListSnapshots(ctx context.Context, f SnapshotFilter) ([]Snapshot, string, error) {
	return s.store.ListSnapshots(ctx, f)
}

// DeleteSnapshot deletes a snapshot by name or ID. Sandboxes made from it go on; those
// being made from it are still made, and then its files go. Errors are as GetSnapshot's.
func (s *Service) DeleteSnapshot(ctx context.Context, orgID, nameOrID string) error {
	snap, err := s.findSnapshot(ctx, orgID, nameOrID)
	if err != nil {
		return err
	}
	if err := s.store.EndSnapshot(ctx, snap.ID); err != nil {
		return err
	}
	s.log.InfoContext(ctx, "snapshot deleted", "snapshot", snap.ID, "name", snap.Name)
	s.mu.Lock()
	u := s.snapshots[snap.ID]
	if u != nil {
		u.doomed = true
	}
	s.mu.Unlock()
	if u == nil {
		s.abandonSnapshot(ctx, snap.ID, true)
	}
	return nil
}

// DropsSnapshot is the whole of what is made of a snapshot after a crash: a function of its
// row (nil if there is none) when nobody works with it. A snapshot of which nobody was told
// goes; one that is ready stays, also without its files: to use it says so, to delete it is up
// to the user.
func DropsSnapshot(row *Snapshot) bool { return row == nil || row.State != SnapshotReady }

// reconcileSnapshots drops what a crash left of snapshots and forks.
func (s *Service) reconcileSnapshots(ctx context.Context) error {
	there, err := s.node.Snapshots(ctx)
	if err != nil {
		return fmt.Errorf("listing the machine's snapshots: %w", err)
	}
	unready, err := s.store.UnreadySnapshots(ctx)
	if err != nil {
		return fmt.Errorf("listing snapshots that are not ready: %w", err)
	}
	ids := map[SnapshotID]bool{}
	for _, id := range there {
		ids[id] = true
	}
	for _, snap := range unready {
		ids[snap.ID] = true
	}
	var errs []error
	for id := range ids {
		errs = append(errs, s.settleSnapshot(ctx, id))
	}
	return errors.Join(errs...)
}

// settleSnapshot drops a snapshot if it is not to be, unless somebody works with it.
func (s *Service) settleSnapshot(ctx context.Context, id SnapshotID) error {
	release := s.holdAlone(id)
	if release == nil {
		return nil
	}
	defer release()
	var row *Snapshot
	snap, err := s.store.GetSnapshot(ctx, id)
	switch {
	case err == nil:
		row = &snap
	case !fault.Is(err, fault.NotFound):
		return err
	}
	if !DropsSnapshot(row) {
		return nil
	}
	s.log.WarnContext(ctx, "dropping what is left of a snapshot", "snapshot", id)
	if err := s.node.DropSnapshot(ctx, id); err != nil {
		return fmt.Errorf("dropping snapshot %s: %w", id, err)
	}
	return s.store.DropSnapshot(ctx, id)
}
