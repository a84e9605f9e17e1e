package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/sandbox"
)

// LoseNode implements [fleet.Store].
func (db *DB) LoseNode(ctx context.Context, id fleet.ID, session string) (lost bool, err error) {
	defer db.took("lose_node", time.Now())
	err = db.write(ctx, func(tx *sql.Tx) error {
		lost = false
		if _, err := db.lostAt(ctx, tx, id); err != nil { // keeps the lease from being extended in between
			return err
		}
		now, err := db.nowIn(ctx, tx)
		if err != nil {
			return err
		}
		h := sandbox.Holder{Node: id}
		err = tx.QueryRowContext(ctx, `UPDATE nodes SET lost_at = $1, fence = fence + 1
			WHERE id = $2 AND lost_at IS NULL AND removed_at IS NULL AND EXISTS (SELECT 1 FROM node_leases
			WHERE node_id = $2 AND session = $3 AND until <= $1) RETURNING fence`, at(now), id, session).Scan(&h.Fence)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		lost = true
		return takeRows(ctx, tx, h)
	})
	if err != nil {
		return false, fmt.Errorf("declaring the node %s lost: %w", id, err)
	}
	return lost, nil
}

// lostAt returns the time since which a node is lost, zero if it is not, and locks the node's row. It returns
// NotFound for a node that does not exist.
func (db *DB) lostAt(ctx context.Context, tx *sql.Tx, id fleet.ID) (since time.Time, err error) {
	err = tx.QueryRowContext(ctx, "SELECT lost_at FROM nodes WHERE id = $1"+db.forUpdate(), id).Scan(timeColumn{&since})
	if errors.Is(err, sql.ErrNoRows) {
		return since, fleet.NotFound(id)
	}
	return since, err
}

// lostSandboxes selects what ends with a lost node: sandboxes that were being made or removed, and ephemeral ones whose
// state no checkpoint keeps.
const lostSandboxes = "SELECT s.id FROM sandboxes s JOIN nodes n ON n.id = s.node_id WHERE s.node_id = $1" +
	" AND n.lost_at IS NOT NULL AND s.ended_at IS NULL AND (s.state IN ('" + string(sandbox.Creating) + "', '" +
	string(sandbox.Destroying) + "') OR s.mode = '" + string(sandbox.Ephemeral) + "' AND s.state NOT IN ('" +
	string(sandbox.Suspended) + "', '" + string(sandbox.Waking) + "')) ORDER BY s.created_at, s.id"

// LostSandboxes implements [sandbox.Store].
func (db *DB) LostSandboxes(ctx context.Context, node string) ([]sandbox.ID, error) {
	defer db.took("lost_sandboxes", time.Now())
	all, err := collect(ctx, db.reader, func(id *sandbox.ID) []any { return []any{id} }, lostSandboxes, node)
	if err != nil {
		return nil, fmt.Errorf("listing the sandboxes of the lost node %s: %w", node, err)
	}
	return all, nil
}

// EndLost implements [sandbox.Store].
func (db *DB) EndLost(ctx context.Context, id sandbox.ID, why sandbox.Reason,
	now time.Time) (before sandbox.Sandbox, lost bool, err error) {
	defer db.took("end_lost", time.Now())
	err = db.record(ctx, func(tx *sql.Tx, out *outbox) error {
		lost = false
		if before, err = getSandbox(ctx, tx, id); err != nil {
			return err
		}
		// A server of the node that starts waits here, or has its rows before.
		since, err := db.lostAt(ctx, tx, before.Holder.Node)
		if err != nil || since.IsZero() {
			return err
		}
		if before, err = db.lockSandbox(ctx, tx, id); err != nil {
			return err
		}
		lost = true
		return out.endLost(ctx, before, why, now)
	})
	if err != nil {
		return sandbox.Sandbox{}, false, fmt.Errorf("ending sandbox %s of a lost node: %w", id, err)
	}
	return before, lost, nil
}

// endLost moves the row of a sandbox to the state that it has when nothing of it is left.
func (o *outbox) endLost(ctx context.Context, row sandbox.Sandbox, why sandbox.Reason, now time.Time) (err error) {
	end := sandbox.Change{ID: row.ID, To: sandbox.Destroyed, At: now, Reason: string(why), DestroyedAt: &now}
	switch row.State {
	case sandbox.Destroyed, sandbox.Failed:
		return nil
	case sandbox.Creating:
		text := "the machine was lost while the sandbox was being created"
		end.To, end.DestroyReason, end.Error = sandbox.Failed, &why, &text
		// The caller may repeat the create.
		if _, err := o.tx.ExecContext(ctx, "DELETE FROM idempotency WHERE sandbox_id = $1", row.ID); err != nil {
			return err
		}
	case sandbox.Destroying:
		end.Reason = string(row.DestroyReason)
	default:
		claim := sandbox.Change{ID: row.ID, To: sandbox.Destroying, At: now, Reason: string(why), DestroyReason: &why}
		if row, err = o.move(ctx, claim, row); err != nil {
			return err
		}
	}
	_, err = o.move(ctx, end, row)
	return err
}
