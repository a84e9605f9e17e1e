package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/webhook"
)

// webhookColumns lists the columns of webhookFields, in the same order.
const webhookColumns = `id, org_id, name, url, format, types, secret, created_at, enabled, enabled_at, reason,
	disabled_at, after_seq, pending, pending_bytes`

// webhookFields returns w's columns, to scan into or to write.
func webhookFields(w *webhook.Webhook) []any {
	return []any{&w.ID, &w.OrgID, &w.Name, &w.URL, &w.Format, jsonColumn{&w.Types}, &w.Secret, timeColumn{&w.CreatedAt},
		&w.Enabled, timeColumn{&w.EnabledAt}, &w.Reason, timeColumn{&w.DisabledAt}, &w.After, &w.Pending, &w.Bytes}
}

func scanWebhook(row scanner, id string) (webhook.Webhook, error) {
	var w webhook.Webhook
	err := row.Scan(webhookFields(&w)...)
	if errors.Is(err, sql.ErrNoRows) {
		return webhook.Webhook{}, webhook.NotFound(id)
	}
	if err != nil {
		return webhook.Webhook{}, fmt.Errorf("reading webhook %s: %w", id, err)
	}
	return w, nil
}

func (db *DB) webhooks(ctx context.Context, query string, args ...any) ([]webhook.Webhook, error) {
	all, err := collect(ctx, db.reader, webhookFields, query, args...)
	if err != nil {
		return nil, fmt.Errorf("listing webhooks: %w", err)
	}
	return all, nil
}

// webhook writes an event about a webhook.
func (o *outbox) webhook(ctx context.Context, t event.Type, w webhook.Webhook, when time.Time) error {
	return o.add(ctx, event.Event{OrgID: w.OrgID, At: when, Type: t, Reason: string(w.Reason),
		About: event.About{WebhookID: w.ID, Name: w.Name}})
}

// beginWebhook makes an enabled webhook receive the events that are written from now on.
func beginWebhook(ctx context.Context, tx *sql.Tx, w *webhook.Webhook) error {
	if err := tx.QueryRowContext(ctx, "SELECT COALESCE(MAX(seq), 0) FROM events").Scan(&w.After); err != nil {
		return fmt.Errorf("finding the last event: %w", err)
	}
	_, err := tx.ExecContext(ctx, "INSERT INTO event_consumers (name, seq) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING",
		webhook.Consumer, w.After)
	if err != nil {
		return fmt.Errorf("beginning the consumer of events: %w", err)
	}
	return nil
}

// AddWebhook implements [webhook.Store].
func (db *DB) AddWebhook(ctx context.Context, w webhook.Webhook, most int) error {
	defer db.took("add_webhook", time.Now())
	err := db.recordCounted(ctx, w.OrgID, func(tx *sql.Tx, out *outbox) error {
		var have int
		// A deleted one counts until the bodies that were pending of it are gone.
		if err := tx.QueryRowContext(ctx, `SELECT COUNT(*) FROM webhooks WHERE org_id = $1
			AND (deleted_at IS NULL OR pending > 0)`, w.OrgID).
			Scan(&have); err != nil {
			return fmt.Errorf("counting the organization's webhooks: %w", err)
		}
		if most > 0 && have >= most {
			return fault.New(fault.Exhausted, fault.CodeQuotaExceeded,
				"the organization may have %d webhooks and has %d", most, have)
		}
		if w.Enabled {
			if err := beginWebhook(ctx, tx, &w); err != nil {
				return err
			}
		}
		fields := webhookFields(&w)
		if _, err := tx.ExecContext(ctx, "INSERT INTO webhooks ("+webhookColumns+") VALUES ("+placeholders(len(fields))+")",
			fields...); err != nil {
			return fmt.Errorf("writing row: %w", err)
		}
		made := w
		made.Reason = "" // of the event: it is not about the state
		return out.webhook(ctx, event.WebhookCreated, made, w.CreatedAt)
	})
	if err != nil {
		return fmt.Errorf("adding webhook %s: %w", w.ID, err)
	}
	return nil
}

const getWebhook = "SELECT " + webhookColumns + " FROM webhooks WHERE id = $1 AND org_id = $2 AND deleted_at IS NULL"

// GetWebhook implements [webhook.Store].
func (db *DB) GetWebhook(ctx context.Context, orgID, id string) (webhook.Webhook, error) {
	defer db.took("get_webhook", time.Now())
	return scanWebhook(db.reader.QueryRowContext(ctx, getWebhook, id, orgID), id)
}

// ListWebhooks implements [webhook.Store].
func (db *DB) ListWebhooks(ctx context.Context, f webhook.Filter) ([]webhook.Webhook, string, error) {
	defer db.took("list_webhooks", time.Now())
	query, args, err := listWebhooksQuery(f)
	if err != nil {
		return nil, "", err
	}
	all, err := db.webhooks(ctx, query, args...)
	if err != nil {
		return nil, "", err
	}
	all, next := cut(listWebhooks, all, f.Limit, func(w webhook.Webhook) (time.Time, string) { return w.CreatedAt, w.ID })
	return all, next, nil
}

func listWebhooksQuery(f webhook.Filter) (string, params, error) {
	var p params
	q := "SELECT " + webhookColumns + " FROM webhooks WHERE org_id = " + p.add(f.OrgID) + " AND deleted_at IS NULL"
	if f.Format != "" {
		q += " AND format = " + p.add(f.Format)
	}
	end, err := page(listWebhooks, f.Limit, f.Cursor, &p)
	return q + end, p, err
}

// ChangeWebhook implements [webhook.Store].
func (db *DB) ChangeWebhook(ctx context.Context, orgID, id string, now time.Time,
	change func(*webhook.Webhook) error) (webhook.Webhook, error) {
	defer db.took("change_webhook", time.Now())
	var w webhook.Webhook
	var refused error
	renewed := false
	apply := func(tx *sql.Tx, out *outbox) (err error) {
		if w, err = scanWebhook(tx.QueryRowContext(ctx, getWebhook+db.forUpdate(), id, orgID), id); err != nil {
			return err
		}
		before := w
		if refused = change(&w); refused != nil {
			return refused
		}
		if w.Enabled && !before.Enabled {
			if err := beginWebhook(ctx, tx, &w); err != nil {
				return err
			}
		}
		renewed = w.Enabled && (!before.Enabled || w.URL != before.URL)
		return out.writeWebhook(ctx, &w, before.Enabled, now)
	}
	err := db.inTurn(ctx, orgID, func() error {
		if err := db.record(ctx, apply); err != nil || !renewed {
			return err
		}
		return db.renewHeads(ctx, id, now)
	})
	if refused != nil {
		return webhook.Webhook{}, refused
	}
	if err != nil {
		return webhook.Webhook{}, fmt.Errorf("changing webhook %s: %w", id, err)
	}
	return w, nil
}

// renewHeads makes the heads of all lanes due, since what failed before a webhook was changed says nothing any more. It
// works in short transactions; after a crash between them some heads keep their times.
func (db *DB) renewHeads(ctx context.Context, id string, now time.Time) error {
	for {
		var n int64
		err := db.write(ctx, func(tx *sql.Tx) error {
			r, err := tx.ExecContext(ctx, `UPDATE webhook_deliveries SET next_at = $1, attempts = 0, failed_at = NULL
				WHERE webhook_id = $2 AND seq IN (SELECT seq FROM webhook_deliveries WHERE webhook_id = $2
				AND next_at IS NOT NULL AND (next_at > $1 OR attempts > 0) LIMIT $3)`, at(now), id, dropBatch)
			if err == nil {
				n, err = r.RowsAffected()
			}
			return err
		})
		if err != nil || n < dropBatch {
			return err
		}
	}
}

// updateWebhook writes a webhook whose row the transaction has locked.
func updateWebhook(ctx context.Context, tx *sql.Tx, w *webhook.Webhook) error {
	_, err := tx.ExecContext(ctx, `UPDATE webhooks SET name = $1, url = $2, types = $3, secret = $4, enabled = $5,
		enabled_at = $6, reason = $7, disabled_at = $8, after_seq = $9, pending = $10, pending_bytes = $11 WHERE id = $12`,
		w.Name, w.URL, jsonColumn{&w.Types}, w.Secret, w.Enabled, at(w.EnabledAt), w.Reason, at(w.DisabledAt), w.After,
		w.Pending, w.Bytes, w.ID)
	if err != nil {
		return fmt.Errorf("writing webhook %s: %w", w.ID, err)
	}
	return nil
}

// DeleteWebhook implements [webhook.Store].
func (db *DB) DeleteWebhook(ctx context.Context, orgID, id string, now time.Time) error {
	defer db.took("delete_webhook", time.Now())
	err := db.record(ctx, func(tx *sql.Tx, out *outbox) error {
		w := webhook.Webhook{ID: id, OrgID: orgID}
		err := tx.QueryRowContext(ctx, `UPDATE webhooks SET deleted_at = $1, enabled = FALSE, secret = ''
			WHERE id = $2 AND org_id = $3 AND deleted_at IS NULL RETURNING name`, at(now), id, orgID).Scan(&w.Name)
		if errors.Is(err, sql.ErrNoRows) {
			return webhook.NotFound(id)
		}
		if err != nil {
			return err
		}
		return out.webhook(ctx, event.WebhookDeleted, w, now)
	})
	if err != nil {
		return fmt.Errorf("deleting webhook %s: %w", id, err)
	}
	return nil
}

const enabledWebhooks = "SELECT " + webhookColumns + " FROM webhooks WHERE org_id = $1 AND enabled ORDER BY id"

// EnabledWebhooks implements [webhook.Store].
func (db *DB) EnabledWebhooks(ctx context.Context, orgID string) ([]webhook.Webhook, error) {
	defer db.took("enabled_webhooks", time.Now())
	return db.webhooks(ctx, enabledWebhooks, orgID)
}

// EndIdle implements [webhook.Store].
func (db *DB) EndIdle(ctx context.Context) (idle bool, err error) {
	defer db.took("end_idle", time.Now())
	const anyEnabled = "EXISTS (SELECT 1 FROM webhooks WHERE enabled)"
	var enabled, consumes bool
	if err := db.reader.QueryRowContext(ctx, "SELECT "+anyEnabled+
		", EXISTS (SELECT 1 FROM event_consumers WHERE name = $1)", webhook.Consumer).Scan(&enabled, &consumes); err != nil {
		return false, fmt.Errorf("looking for enabled webhooks: %w", err)
	}
	if enabled || !consumes { // a write would be repeated at each look of an idle server
		return !enabled, nil
	}
	err = db.change(ctx, "DELETE FROM event_consumers WHERE name = $1 AND NOT "+anyEnabled, webhook.Consumer)
	if err != nil {
		return false, fmt.Errorf("ending the consumer of events: %w", err)
	}
	return true, nil
}
