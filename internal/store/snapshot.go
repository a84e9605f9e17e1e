package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// snapshotColumns lists the columns of snapshotFields, in the same order.
const snapshotColumns = `id, org_id, name, state, sandbox_id, template, template_id, template_version, image,
	shape, bytes, created_at, kept, node_id, fence`

// snapshotFields returns s's columns, to scan into or to write.
func snapshotFields(s *sandbox.Snapshot) []any {
	return []any{&s.ID, &s.OrgID, &s.Name, &s.State, &s.SandboxID,
		&s.Template, &s.TemplateID, &s.TemplateVersion, &s.Image,
		jsonColumn{&s.Shape}, &s.Bytes, timeColumn{&s.CreatedAt}, &s.Kept, &s.Holder.Node, &s.Holder.Fence}
}

func scanSnapshot(row scanner, id string) (sandbox.Snapshot, error) {
	var s sandbox.Snapshot
	err := row.Scan(snapshotFields(&s)...)
	if errors.Is(err, sql.ErrNoRows) {
		return sandbox.Snapshot{}, fault.New(fault.NotFound, fault.CodeSnapshotNotFound, "there is no snapshot %q", id)
	}
	if err != nil {
		return sandbox.Snapshot{}, fmt.Errorf("reading snapshot %s: %w", id, err)
	}
	return s, nil
}

func (db *DB) snapshots(ctx context.Context, query string, args ...any) ([]sandbox.Snapshot, error) {
	all, err := collect(ctx, db.reader, snapshotFields, query, args...)
	if err != nil {
		return nil, fmt.Errorf("listing snapshots: %w", err)
	}
	return all, nil
}

// AddSnapshot implements [sandbox.Store].
func (db *DB) AddSnapshot(ctx context.Context, s sandbox.Snapshot, most int) error {
	defer db.took("add_snapshot", time.Now())
	err := db.recordCounted(ctx, s.OrgID, func(tx *sql.Tx, _ *outbox) error {
		var have int
		if err := tx.QueryRowContext(ctx, "SELECT COUNT(*) FROM snapshots WHERE org_id = $1", s.OrgID).
			Scan(&have); err != nil {
			return fmt.Errorf("counting the organization's snapshots: %w", err)
		}
		if most > 0 && have >= most {
			return fault.New(fault.Exhausted, fault.CodeQuotaExceeded,
				"the organization may have %d snapshots and has %d", most, have)
		}
		s.Holder = db.holder()
		if err := db.holds(s.Holder); err != nil {
			return err
		}
		fields := snapshotFields(&s)
		_, err := tx.ExecContext(ctx,
			"INSERT INTO snapshots ("+snapshotColumns+") VALUES ("+placeholders(len(fields))+")", fields...)
		if db.violates(err, false) {
			return fault.New(fault.Conflict, fault.CodeSnapshotExists, "the organization already has a snapshot %q", s.Name)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("adding snapshot %s: %w", s.ID, err)
	}
	return nil
}

// ReadySnapshot implements [sandbox.Store].
func (db *DB) ReadySnapshot(ctx context.Context, id sandbox.SnapshotID, made time.Time, size int64,
	note sandbox.Event) (s sandbox.Snapshot, err error) {
	defer db.took("ready_snapshot", time.Now())
	err = db.record(ctx, func(tx *sql.Tx, out *outbox) error {
		p := params{sandbox.SnapshotReady, at(made), size, id, sandbox.SnapshotCreating}
		s, err = scanSnapshot(tx.QueryRowContext(ctx, `UPDATE snapshots SET state = $1, created_at = $2, bytes = $3
			WHERE id = $4 AND state = $5`+db.mine(&p)+" RETURNING "+snapshotColumns, p...), string(id))
		if fault.Is(err, fault.NotFound) {
			return fault.New(fault.Conflict, fault.CodeSnapshotState, "snapshot %s is not being created", id)
		}
		if err != nil {
			return err
		}
		note.SandboxID = s.SandboxID
		about := event.About{SnapshotID: string(s.ID), Name: s.Name}
		noted, err := out.note(ctx, event.SnapshotCreated, note, about)
		if err != nil || noted {
			return err
		}
		return out.add(ctx, event.Event{OrgID: s.OrgID, At: note.At, Type: event.SnapshotCreated,
			SandboxID: string(s.SandboxID), Reason: note.Reason, Detail: note.Detail, About: about})
	})
	return s, err
}

// EndSnapshot implements [sandbox.Store].
func (db *DB) EndSnapshot(ctx context.Context, id sandbox.SnapshotID) error {
	defer db.took("end_snapshot", time.Now())
	return db.record(ctx, func(tx *sql.Tx, out *outbox) error {
		s, err := getSnapshot(ctx, tx, id, db.forUpdate())
		if err != nil {
			return err
		}
		if err := db.holds(s.Holder); err != nil {
			return err
		}
		public := s.Shape.Public()
		if _, err := tx.ExecContext(ctx, "UPDATE snapshots SET state = $1, shape = $2 WHERE id = $3",
			sandbox.SnapshotDeleting, jsonColumn{&public}, id); err != nil {
			return fmt.Errorf("ending snapshot %s: %w", id, err)
		}
		if s.State != sandbox.SnapshotReady {
			return nil // it was never ready, or is being deleted already
		}
		return out.add(ctx, event.Event{OrgID: s.OrgID, At: time.Now(), Type: event.SnapshotDeleted,
			SandboxID: string(s.SandboxID), About: event.About{SnapshotID: string(s.ID), Name: s.Name}})
	})
}

// DropSnapshot implements [sandbox.Store].
func (db *DB) DropSnapshot(ctx context.Context, id sandbox.SnapshotID) error {
	defer db.took("drop_snapshot", time.Now())
	p := params{id}
	if err := db.change(ctx, "DELETE FROM snapshots WHERE id = $1"+db.mine(&p), p...); err != nil {
		return fmt.Errorf("dropping snapshot %s: %w", id, err)
	}
	return nil
}

// GetSnapshot implements [sandbox.Store].
func (db *DB) GetSnapshot(ctx context.Context, id sandbox.SnapshotID) (sandbox.Snapshot, error) {
	defer db.took("get_snapshot", time.Now())
	s, err := getSnapshot(ctx, db.reader, id, "")
	return s, db.gone(ctx, err)
}

// getSnapshot reads a snapshot; lock is the end of the query.
func getSnapshot(ctx context.Context, q querier, id sandbox.SnapshotID, lock string) (sandbox.Snapshot, error) {
	return scanSnapshot(
		q.QueryRowContext(ctx, "SELECT "+snapshotColumns+" FROM snapshots WHERE id = $1"+lock, id), string(id))
}

// findSnapshot selects a snapshot by name and state. Its last two conditions let SQLite use the index
// of names, and are true of every snapshot that FindSnapshot looks for.
const findSnapshot = "SELECT " + snapshotColumns +
	" FROM snapshots WHERE org_id = $1 AND name = $2 AND state = $3 AND name <> '' AND state <> 'deleting'"

// FindSnapshot implements [sandbox.Store].
func (db *DB) FindSnapshot(ctx context.Context, orgID, name string) (sandbox.Snapshot, error) {
	defer db.took("find_snapshot", time.Now())
	return scanSnapshot(db.reader.QueryRowContext(ctx, findSnapshot, orgID, name, sandbox.SnapshotReady), name)
}

// ListSnapshots implements [sandbox.Store].
func (db *DB) ListSnapshots(ctx context.Context, f sandbox.SnapshotFilter) ([]sandbox.Snapshot, string, error) {
	defer db.took("list_snapshots", time.Now())
	query, args, err := listSnapshotsQuery(f)
	if err != nil {
		return nil, "", err
	}
	all, err := db.snapshots(ctx, query, args...)
	if err != nil {
		return nil, "", err
	}
	all, next := cut(listSnapshots, all, f.Limit,
		func(s sandbox.Snapshot) (time.Time, string) { return s.CreatedAt, string(s.ID) })
	return all, next, nil
}

func listSnapshotsQuery(f sandbox.SnapshotFilter) (string, params, error) {
	var p params
	q := "SELECT " + snapshotColumns + " FROM snapshots WHERE org_id = " + p.add(f.OrgID) +
		" AND state = " + p.add(sandbox.SnapshotReady)
	if f.SandboxID != "" {
		q += " AND sandbox_id = " + p.add(f.SandboxID)
	}
	if f.Name != "" {
		q += " AND name = " + p.add(f.Name)
	}
	end, err := page(listSnapshots, f.Limit, f.Cursor, &p)
	return q + end, p, err
}

// UnreadySnapshots implements [sandbox.Store].
func (db *DB) UnreadySnapshots(ctx context.Context) ([]sandbox.Snapshot, error) {
	defer db.took("unready_snapshots", time.Now())
	return db.snapshots(ctx, "SELECT "+snapshotColumns+
		" FROM snapshots WHERE node_id = $1 AND state <> 'ready' ORDER BY created_at, id", db.holder().Node)
}
