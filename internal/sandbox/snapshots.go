package sandbox

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/cayhq/cay/internal/fault"
)

// snapshots gets, keeps and removes snapshots, as rows and on the machine. It counts the users of
// their files, makers included, so that none is removed while it is used.
type snapshots struct {
	holder string // the id of the node
	rows   *Rows
	store  SnapshotStore
	node   NodeSnapshots
	log    *slog.Logger

	mu sync.Mutex
	// +checklocks:mu
	uses map[SnapshotID]*snapshotUse
}

// get returns a ready snapshot of the organization by name or ID. It returns Unavailable, code "elsewhere", if another
// node holds it.
func (s *snapshots) get(ctx context.Context, orgID, nameOrID string) (Snapshot, error) {
	snap, err := s.rows.GetSnapshot(ctx, orgID, nameOrID)
	if err == nil && snap.Holder.Node != s.holder {
		err = elsewhere("snapshot "+string(snap.ID), snap.Holder)
	}
	return snap, err
}

// use gets a snapshot and holds it.
func (s *snapshots) use(ctx context.Context, orgID, nameOrID string) (Snapshot, func(), error) {
	snap, err := s.get(ctx, orgID, nameOrID)
	if err != nil {
		return Snapshot{}, nil, err
	}
	release := s.hold(snap.ID)
	if snap, err = s.get(ctx, orgID, string(snap.ID)); err != nil { // deleted in between
		release()
		return Snapshot{}, nil, err
	}
	return snap, release, nil
}

// write makes the machine write the snapshot.
func (s *snapshots) write(ctx context.Context, sbx Sandbox, to SnapshotID) (Checkpoint, error) {
	ctx, cancel := context.WithTimeout(ctx, checkpointTimeout)
	defer cancel()
	if sbx.State == Suspended {
		return s.node.SnapshotCheckpoint(ctx, sbx.ID, to)
	}
	return s.node.Snapshot(ctx, sbx.ID, to)
}

// abandon removes a failed or unwanted snapshot from the machine and then, with row, its
// row. Reconcile retries what fails.
func (s *snapshots) abandon(ctx context.Context, id SnapshotID, row bool) {
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

// remove deletes a snapshot by name or ID. Sandboxes made from it continue. Sandboxes being
// made from it are completed before its files are removed. Errors are those of get.
func (s *snapshots) remove(ctx context.Context, orgID, nameOrID string) error {
	snap, err := s.get(ctx, orgID, nameOrID)
	if err != nil {
		return err
	}
	if err := s.store.EndSnapshot(ctx, snap.ID); err != nil {
		return err
	}
	s.log.InfoContext(ctx, "snapshot deleted", "snapshot", snap.ID, "name", snap.Name)
	if !s.doom(snap.ID) {
		s.abandon(ctx, snap.ID, true)
	}
	return nil
}

// DropsSnapshot reports whether recovery from a crash drops a snapshot, from its row (nil if there
// is none), when it has no users. A snapshot that was not reported to a caller is dropped. A ready
// snapshot stays even without its files: its use reports that they are missing, and the user may
// delete it.
func DropsSnapshot(row *Snapshot) bool { return row == nil || row.State != SnapshotReady }

// reconcile drops the leftovers of snapshots and forks after a crash.
func (s *snapshots) reconcile(ctx context.Context) error {
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
		errs = append(errs, s.settle(ctx, id))
	}
	return errors.Join(errs...)
}

// settle drops a snapshot if DropsSnapshot says so, unless it has users.
func (s *snapshots) settle(ctx context.Context, id SnapshotID) error {
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
	if row != nil && row.Holder.Node != s.holder || !DropsSnapshot(row) {
		return nil // another node's files are not this one's to judge
	}
	s.log.WarnContext(ctx, "dropping what is left of a snapshot", "snapshot", id)
	if err := s.node.DropSnapshot(ctx, id); err != nil {
		return fmt.Errorf("dropping snapshot %s: %w", id, err)
	}
	return s.store.DropSnapshot(ctx, id)
}

// snapshotUse counts the users of one snapshot.
type snapshotUse struct {
	count  int
	doomed bool // deleted meanwhile: its last user removes it
}

// hold prevents the removal of a snapshot until the returned function is called. Check afterwards
// whether the snapshot still exists: a deletion changes the row before it looks for users.
func (s *snapshots) hold(id SnapshotID) (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.uses[id]
	if u == nil {
		u = &snapshotUse{}
		s.uses[id] = u
	}
	u.count++
	return func() { s.release(id) }
}

// holdAlone holds a snapshot like hold if it has no other user, and otherwise returns nil.
func (s *snapshots) holdAlone(id SnapshotID) (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.uses[id] != nil {
		return nil
	}
	s.uses[id] = &snapshotUse{count: 1}
	return func() { s.release(id) }
}

func (s *snapshots) release(id SnapshotID) {
	s.mu.Lock()
	u := s.uses[id]
	u.count--
	over := u.count == 0
	if over {
		delete(s.uses, id)
	}
	s.mu.Unlock()
	if over && u.doomed {
		s.abandon(context.Background(), id, true)
	}
}

// doom marks a snapshot that is in use, so that its last user removes it. It returns false if it has no user.
func (s *snapshots) doom(id SnapshotID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.uses[id]
	if u != nil {
		u.doomed = true
	}
	return u != nil
}
