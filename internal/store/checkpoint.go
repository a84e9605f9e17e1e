package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// checkpointColumns lists the columns of checkpointFields, in the same order.
const checkpointColumns = `name, node, fence, number, made_at, bytes, cpu_class, agent, runsc, sum, uploaded_at`

// checkpointFields returns c's columns, to scan into or to write.
func checkpointFields(c *sandbox.StoredCheckpoint) []any {
	return []any{&c.Name, &c.Node, &c.Fence, &c.Number, timeColumn{&c.MadeAt}, &c.Bytes, &c.CPUClass, &c.Agent, &c.Runsc,
		&c.Sum, timeColumn{&c.UploadedAt}}
}

// needed is a condition: the sandbox of a checkpoint is not over, or its snapshot exists. %[1]s is the checkpoint's
// name.
const needed = `(EXISTS (SELECT 1 FROM sandboxes s WHERE s.id = %[1]s AND s.ended_at IS NULL)
	OR EXISTS (SELECT 1 FROM snapshots p WHERE p.id = %[1]s))`

// noCheckpoint returns the error for the row of a checkpoint that nothing needs.
func noCheckpoint(name string) error {
	return fault.New(fault.NotFound, fault.CodeSandboxNotFound, "there is no sandbox or snapshot %q to copy", name)
}

// BeginCheckpoint implements [sandbox.CheckpointStore].
func (db *DB) BeginCheckpoint(ctx context.Context, c sandbox.StoredCheckpoint) (begun sandbox.StoredCheckpoint,
	err error) {
	defer db.took("begin_checkpoint", time.Now())
	err = db.write(ctx, func(tx *sql.Tx) error {
		if err := db.holds(sandbox.Holder{Node: c.Node}); err != nil {
			return err
		}
		err := tx.QueryRowContext(ctx, "SELECT "+checkpointColumns+` FROM checkpoints
			WHERE name = $1 AND node = $2 AND fence = $3 AND made_at = $4 AND uploaded_at IS NULL AND sum = ''`,
			c.Name, c.Node, c.Fence, at(c.MadeAt)).Scan(checkpointFields(&begun)...)
		if !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		var there bool
		if err := tx.QueryRowContext(ctx, "SELECT "+fmt.Sprintf(needed, "$1"), c.Name).Scan(&there); err != nil {
			return err
		}
		if !there {
			return noCheckpoint(c.Name)
		}
		begun = c
		if err := tx.QueryRowContext(ctx, `SELECT COALESCE(MAX(number), 0) + 1 FROM checkpoints
			WHERE name = $1 AND fence = $2`, c.Name, c.Fence).Scan(&begun.Number); err != nil {
			return err
		}
		begun.Number = max(begun.Number, c.MadeAt.UnixMicro())
		// No one continues an earlier upload, and its row would keep its objects.
		if _, err := tx.ExecContext(ctx, `DELETE FROM checkpoints
			WHERE name = $1 AND (fence, number) < ($2, $3) AND uploaded_at IS NULL`,
			c.Name, c.Fence, begun.Number); err != nil {
			return err
		}
		fields := checkpointFields(&begun)
		_, err = tx.ExecContext(ctx,
			"INSERT INTO checkpoints ("+checkpointColumns+") VALUES ("+placeholders(len(fields))+")", fields...)
		return err
	})
	if err != nil {
		return begun, fmt.Errorf("recording a copy of the checkpoint of %s: %w", c.Name, err)
	}
	return begun, nil
}

// EndCheckpoint implements [sandbox.CheckpointStore].
func (db *DB) EndCheckpoint(ctx context.Context, c sandbox.StoredCheckpoint) error {
	defer db.took("end_checkpoint", time.Now())
	err := db.write(ctx, func(tx *sql.Tx) error {
		if err := db.holds(sandbox.Holder{Node: c.Node}); err != nil {
			return err
		}
		r, err := tx.ExecContext(ctx, `UPDATE checkpoints SET bytes = $1, sum = $2, uploaded_at = $3
			WHERE name = $4 AND fence = $5 AND number = $6 AND node = $7`,
			c.Bytes, c.Sum, at(c.UploadedAt), c.Name, c.Fence, c.Number, c.Node)
		if err != nil {
			return err
		}
		if n, err := r.RowsAffected(); err != nil {
			return err
		} else if n == 0 {
			return noCheckpoint(c.Name)
		}
		_, err = tx.ExecContext(ctx, "DELETE FROM checkpoints WHERE name = $1 AND (fence, number) < ($2, $3)",
			c.Name, c.Fence, c.Number)
		return err
	})
	if err != nil {
		return fmt.Errorf("recording that the checkpoint of %s was copied: %w", c.Name, err)
	}
	return nil
}

// MarkCheckpoint implements [sandbox.CheckpointStore].
func (db *DB) MarkCheckpoint(ctx context.Context, c sandbox.StoredCheckpoint) error {
	defer db.took("mark_checkpoint", time.Now())
	if err := db.change(ctx, `UPDATE checkpoints SET uploaded_at = $1
		WHERE name = $2 AND fence = $3 AND number = $4 AND sum <> ''`,
		at(c.UploadedAt), c.Name, c.Fence, c.Number); err != nil {
		return fmt.Errorf("recording whether the bucket has the checkpoint of %s: %w", c.Name, err)
	}
	return nil
}

// StoredCheckpoints implements [sandbox.CheckpointStore].
func (db *DB) StoredCheckpoints(ctx context.Context) ([]sandbox.StoredCheckpoint, error) {
	defer db.took("stored_checkpoints", time.Now())
	all, err := collect(ctx, db.reader, checkpointFields,
		"SELECT "+checkpointColumns+" FROM checkpoints ORDER BY name, fence, number")
	if err != nil {
		return nil, fmt.Errorf("listing the copies of checkpoints: %w", err)
	}
	return all, nil
}

// DropCheckpoints implements [sandbox.CheckpointStore].
func (db *DB) DropCheckpoints(ctx context.Context) error {
	defer db.took("drop_checkpoints", time.Now())
	if err := db.write(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM checkpoints WHERE NOT "+fmt.Sprintf(needed, "checkpoints.name"))
		return err
	}); err != nil {
		return fmt.Errorf("dropping the copies of checkpoints that nothing needs: %w", err)
	}
	return nil
}
