package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/webhook"
)

// surplusMade selects the newest made delivery beyond the number that is kept of a webhook.
const surplusMade = `SELECT seq FROM webhook_deliveries WHERE webhook_id = $1 AND made_at IS NOT NULL
	ORDER BY seq DESC LIMIT 1 OFFSET $2`

// TrimDeliveries implements [webhook.Store].
func (db *DB) TrimDeliveries(ctx context.Context, before time.Time, most int) (int, error) {
	defer db.took("trim_deliveries", time.Now())
	ids, err := db.texts(ctx, "listing webhooks", "SELECT id FROM webhooks")
	if err != nil {
		return 0, err
	}
	dropped := 0
	for _, id := range ids {
		n, err := db.trimWebhook(ctx, id, before, most)
		if dropped += n; err != nil {
			return dropped, fmt.Errorf("dropping deliveries of webhook %s: %w", id, err)
		}
	}
	return dropped, nil
}

// trimWebhook drops deliveries of one webhook, and its row if it is deleted and has none left.
func (db *DB) trimWebhook(ctx context.Context, id string, before time.Time, most int) (int, error) {
	above, found, err := place(ctx, db.reader, surplusMade, id, most)
	if err != nil {
		return 0, err
	}
	if !found {
		above = event.Oldest
	}
	dropped := 0
	for {
		which, deleted, err := oldDeliveries(ctx, db.reader, id, before, "")
		if err != nil || which == "" {
			return dropped, err
		}
		var one event.Seq
		args := []any{id, at(before), above}
		err = db.reader.QueryRowContext(ctx, "SELECT seq FROM webhook_deliveries WHERE "+which+" LIMIT 1", args...).Scan(&one)
		if !deleted && errors.Is(err, sql.ErrNoRows) {
			return dropped, nil // without a transaction that writes nothing
		}
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return dropped, err
		}
		n, err := db.dropDeliveries(ctx, id, before, args)
		if dropped += n; err != nil || n < dropBatch {
			return dropped, err
		}
	}
}

// oldDeliveries returns the condition of those deliveries of a webhook that are to be dropped, with the parameters of
// its id, the time and the last seq that is beyond the number, and whether the webhook is deleted. It returns "" if
// there is no such webhook.
func oldDeliveries(ctx context.Context, q querier, id string, before time.Time,
	lock string) (which string, deleted bool, err error) {
	var enabled bool
	var disabledAt, deletedAt time.Time
	err = q.QueryRowContext(ctx, "SELECT enabled, disabled_at, deleted_at FROM webhooks WHERE id = $1"+lock, id).
		Scan(&enabled, timeColumn{&disabledAt}, timeColumn{&deletedAt})
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return "", false, nil
	case err != nil:
		return "", false, fmt.Errorf("reading webhook: %w", err)
	}
	old := "(made_at < $2 OR seq <= $3)"
	switch deleted = !deletedAt.IsZero(); {
	case deleted:
		which = "(" + old + " OR TRUE)" // the parameters must be in it
	case !enabled && disabledAt.Before(before):
		which = "(made_at IS NULL OR " + old + ")"
	default: // an index has these, and not what is pending
		which = "made_at IS NOT NULL AND " + old
	}
	return "webhook_id = $1 AND " + which, deleted, nil
}

// dropDeliveries drops a batch of old deliveries in one transaction, and the row of a deleted webhook with the last of
// them. The newest go first, so that a lane that is left has its head.
func (db *DB) dropDeliveries(ctx context.Context, id string, before time.Time, args []any) (n int, err error) {
	err = db.write(ctx, func(tx *sql.Tx) error {
		n = 0
		which, deleted, err := oldDeliveries(ctx, tx, id, before, db.forUpdate())
		if err != nil || which == "" {
			return err
		}
		rows, err := tx.QueryContext(ctx, `DELETE FROM webhook_deliveries WHERE webhook_id = $1 AND seq IN
			(SELECT seq FROM webhook_deliveries WHERE `+which+` ORDER BY seq DESC LIMIT $4)
			RETURNING made_at IS NULL, OCTET_LENGTH(body)`,
			append(args[:len(args):len(args)], dropBatch)...)
		if err != nil {
			return err
		}
		defer rows.Close()
		var w webhook.Webhook // with what was pending of it
		for ; rows.Next(); n++ {
			var pending bool
			var bytes int64
			if err := rows.Scan(&pending, &bytes); err != nil {
				return err
			}
			if pending {
				w.Pending, w.Bytes = w.Pending+1, w.Bytes+bytes
			}
		}
		if err := errors.Join(rows.Err(), rows.Close()); err != nil {
			return err
		}
		if deleted && n < dropBatch {
			_, err = tx.ExecContext(ctx, "DELETE FROM webhooks WHERE id = $1", id)
		} else if w.Pending > 0 {
			_, err = tx.ExecContext(ctx, `UPDATE webhooks SET pending = pending - $1, pending_bytes = pending_bytes - $2
				WHERE id = $3`, w.Pending, w.Bytes, id)
		}
		return err
	})
	return n, err
}
