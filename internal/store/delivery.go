package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/webhook"
)

const (
	// insertBatch limits the deliveries that one statement adds: the parameters of a statement are limited.
	insertBatch = 200
	// dropBatch limits the deliveries that one transaction drops: some milliseconds of work, as trimBatch.
	dropBatch = 500
)

// deliveryColumns lists the columns of deliveryFields, in the same order. The body comes last, so that a listing can
// have another value there.
const deliveryColumns = `webhook_id, seq, lane, type, queued_at, made_at, attempts, failed_at, next_at, tried_at,
	took, status_code, error, answer`

func deliveryFields(d *webhook.Delivery) []any {
	return []any{&d.WebhookID, &d.Seq, &d.Lane, &d.Type, timeColumn{&d.QueuedAt}, timeColumn{&d.MadeAt}, &d.Attempts,
		timeColumn{&d.FailedAt}, timeColumn{&d.NextAt}, timeColumn{&d.Last.At}, durationColumn{&d.Last.Took},
		&d.Last.Status, &d.Last.Error, &d.Last.Answer, &d.Body}
}

// Enqueue implements [webhook.Store].
func (db *DB) Enqueue(ctx context.Context, id string, all []webhook.Delivery, most webhook.Bounds,
	now time.Time) (int, error) {
	defer db.took("enqueue", time.Now())
	return db.enqueue(ctx, id, all, now, " ON CONFLICT (webhook_id, seq) DO NOTHING",
		func(w *webhook.Webhook, err error) (bool, error) {
			if fault.Is(err, fault.NotFound) {
				return false, nil
			}
			return w.Enabled, err
		}, func(w *webhook.Webhook) {
			if w.Pending > most.Deliveries || w.Bytes > most.Bytes {
				w.Disable(webhook.Backlog, now)
			}
		})
}

// Requeue implements [webhook.Store].
func (db *DB) Requeue(ctx context.Context, id string, all []webhook.Delivery, most webhook.Bounds,
	now time.Time) (n int, err error) {
	defer db.took("requeue", time.Now())
	var org string
	err = db.reader.QueryRowContext(ctx, "SELECT org_id FROM webhooks WHERE id = $1", id).Scan(&org)
	if err != nil && !errors.Is(err, sql.ErrNoRows) { // without a row the transaction has the error
		return 0, fmt.Errorf("finding the organization of webhook %s: %w", id, err)
	}
	err = db.inTurn(ctx, org, func() error {
		n, err = db.requeue(ctx, id, all, most, now)
		return err
	})
	return n, err
}

func (db *DB) requeue(ctx context.Context, id string, all []webhook.Delivery, most webhook.Bounds,
	now time.Time) (int, error) {
	return db.enqueue(ctx, id, all, now, ` ON CONFLICT (webhook_id, seq) DO UPDATE SET made_at = NULL,
		body = excluded.body, queued_at = excluded.queued_at, attempts = 0, failed_at = NULL, tried_at = NULL, took = 0,
		status_code = 0, error = '', answer = ''
		WHERE webhook_deliveries.made_at IS NOT NULL`,
		func(w *webhook.Webhook, err error) (bool, error) {
			size := w.Bytes
			for _, d := range all {
				size += int64(len(d.Body))
			}
			switch {
			case err != nil:
				return false, err
			case !w.Enabled:
				return false, fault.New(fault.Conflict, fault.CodeWebhookDisabled, "webhook %s is disabled: enable it first", id)
			case w.Pending+len(all) > most.Deliveries || size > most.Bytes:
				return false, fault.New(fault.Exhausted, fault.CodeQuotaExceeded,
					"webhook %s has %d deliveries pending: wait until they are made", id, w.Pending)
			}
			return true, nil
		}, func(*webhook.Webhook) {})
}

// enqueue adds deliveries to a webhook if admit returns true, and then calls added with the webhook, which may disable
// it. admit gets the error of reading the webhook. conflict says what happens to a delivery that exists.
func (db *DB) enqueue(ctx context.Context, id string, all []webhook.Delivery, now time.Time, conflict string,
	admit func(*webhook.Webhook, error) (bool, error), added func(*webhook.Webhook)) (n int, err error) {
	err = db.record(ctx, func(tx *sql.Tx, out *outbox) error {
		n = 0
		w, err := db.lockWebhook(ctx, tx, id)
		if ok, err := admit(&w, err); err != nil || !ok {
			return err
		}
		lanes := map[string]bool{}
		for rest := all; len(rest) > 0; rest = rest[min(len(rest), insertBatch):] {
			some, bytes, err := insertDeliveries(ctx, tx, rest[:min(len(rest), insertBatch)], now, conflict)
			if err != nil {
				return err
			}
			n, w.Bytes = n+len(some), w.Bytes+bytes
			for _, lane := range some {
				lanes[lane] = true
			}
		}
		if n == 0 {
			return nil
		}
		var heads []statement
		for lane := range lanes {
			heads = append(heads, behead(id, lane), head(id, lane, now))
		}
		if err := db.execute(ctx, tx, heads); err != nil {
			return fmt.Errorf("finding the heads of lanes: %w", err)
		}
		w.Pending += n
		added(&w)
		return out.writeWebhook(ctx, &w, true, now)
	})
	if err != nil {
		return 0, fmt.Errorf("queueing deliveries of webhook %s: %w", id, err)
	}
	return n, nil
}

// lockWebhook reads a webhook that is not deleted. Nothing of it and of its deliveries changes until the transaction
// has ended, except by the transaction.
func (db *DB) lockWebhook(ctx context.Context, tx *sql.Tx, id string) (webhook.Webhook, error) {
	return scanWebhook(tx.QueryRowContext(ctx, "SELECT "+webhookColumns+
		" FROM webhooks WHERE id = $1 AND deleted_at IS NULL"+db.forUpdate(), id), id)
}

// writeWebhook writes a webhook that the transaction has locked, and the event if it is disabled now and was enabled.
func (o *outbox) writeWebhook(ctx context.Context, w *webhook.Webhook, wasEnabled bool, now time.Time) error {
	if err := updateWebhook(ctx, o.tx, w); err != nil || w.Enabled || !wasEnabled {
		return err
	}
	return o.webhook(ctx, event.WebhookDisabled, *w, now)
}

// insertDeliveries adds deliveries and returns the lane of each that it added, and the bytes of their bodies.
func insertDeliveries(ctx context.Context, tx *sql.Tx, all []webhook.Delivery, now time.Time,
	conflict string) (lanes []string, bytes int64, err error) {
	var p params
	var rows []string
	size := map[event.Seq]int64{}
	queued := p.add(at(now))
	for _, d := range all {
		size[d.Seq] = int64(len(d.Body))
		rows = append(rows, "("+strings.Join([]string{p.add(d.WebhookID), p.add(d.Seq), p.add(d.Lane), p.add(d.Type),
			p.add(d.Body), queued}, ", ")+", 0, 0, 0, '', '')")
	}
	added, err := tx.QueryContext(ctx, `INSERT INTO webhook_deliveries (webhook_id, seq, lane, type, body, queued_at,
		attempts, took, status_code, error, answer) VALUES `+strings.Join(rows, ", ")+conflict+" RETURNING seq, lane", p...)
	if err != nil {
		return nil, 0, fmt.Errorf("writing deliveries: %w", err)
	}
	defer added.Close()
	for added.Next() {
		var seq event.Seq
		var lane string
		if err := added.Scan(&seq, &lane); err != nil {
			return nil, 0, fmt.Errorf("writing deliveries: %w", err)
		}
		lanes, bytes = append(lanes, lane), bytes+size[seq]
	}
	if err := added.Err(); err != nil {
		return nil, 0, fmt.Errorf("writing deliveries: %w", err)
	}
	return lanes, bytes, nil
}

const (
	// firstOfLane selects the seq of the head of a lane.
	firstOfLane = `(SELECT MIN(seq) FROM webhook_deliveries WHERE webhook_id = $1 AND lane = $2 AND made_at IS NULL)`
	setHead     = `UPDATE webhook_deliveries SET next_at = $3 WHERE webhook_id = $1 AND next_at IS NULL AND seq = ` +
		firstOfLane
	dropHead = `UPDATE webhook_deliveries SET next_at = NULL WHERE webhook_id = $1 AND lane = $2 AND next_at IS NOT NULL
		AND seq > ` + firstOfLane
)

// head returns the statement that makes the first pending delivery of a lane its head, due at a time, unless it is that
// already.
func head(id, lane string, now time.Time) statement {
	return statement{setHead, []any{id, lane, at(now)}}
}

// behead returns the statement by which a head that is not the first any more is none. It comes before head.
func behead(id, lane string) statement { return statement{dropHead, []any{id, lane}} }

const dueWebhooks = `SELECT w.id, w.org_id, (SELECT MIN(d.next_at) FROM webhook_deliveries d
	WHERE d.webhook_id = w.id AND d.next_at IS NOT NULL) FROM webhooks w WHERE w.enabled AND w.pending > 0`

// DueWebhooks implements [webhook.Store].
func (db *DB) DueWebhooks(ctx context.Context) ([]webhook.Due, error) {
	defer db.took("due_webhooks", time.Now())
	all, err := collect(ctx, db.reader, func(d *webhook.Due) []any {
		return []any{&d.WebhookID, &d.OrgID, timeColumn{&d.At}}
	}, dueWebhooks)
	if err != nil {
		return nil, fmt.Errorf("finding webhooks that are due: %w", err)
	}
	return all, nil
}

// nextDelivery returns the query for the head that is due first.
func nextDelivery(id string, busy []string) (string, params) {
	p := params{id}
	q := "SELECT " + deliveryColumns + ", body FROM webhook_deliveries WHERE webhook_id = $1 AND next_at IS NOT NULL"
	if len(busy) > 0 {
		var marks []string
		for _, lane := range busy {
			marks = append(marks, p.add(lane))
		}
		q += " AND lane NOT IN (" + strings.Join(marks, ", ") + ")"
	}
	return q + " ORDER BY next_at LIMIT 1", p
}

// NextDelivery implements [webhook.Store].
func (db *DB) NextDelivery(ctx context.Context, id string, busy []string) (w webhook.Webhook, d webhook.Delivery,
	err error) {
	defer db.took("next_delivery", time.Now())
	w, err = scanWebhook(db.reader.QueryRowContext(ctx,
		"SELECT "+webhookColumns+" FROM webhooks WHERE id = $1 AND enabled", id), id)
	if err != nil {
		return w, d, err
	}
	query, args := nextDelivery(id, busy)
	err = db.reader.QueryRowContext(ctx, query, args...).Scan(deliveryFields(&d)...)
	if errors.Is(err, sql.ErrNoRows) {
		return w, webhook.Delivery{}, nil
	}
	if err != nil {
		return w, d, fmt.Errorf("reading a delivery of webhook %s: %w", id, err)
	}
	return w, d, nil
}

// EndAttempt implements [webhook.Store].
func (db *DB) EndAttempt(ctx context.Context, r webhook.Result) error {
	defer db.took("end_attempt", time.Now())
	err := db.record(ctx, func(tx *sql.Tx, out *outbox) error {
		w, err := db.lockWebhook(ctx, tx, r.WebhookID)
		if fault.Is(err, fault.NotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if !r.Made && (w.URL != r.URL || !w.EnabledAt.Equal(r.EnabledAt)) {
			return nil // the webhook has changed meanwhile, and the failure says nothing about it
		}
		var lane string
		var bytes int64
		err = tx.QueryRowContext(ctx, `SELECT lane, OCTET_LENGTH(body) FROM webhook_deliveries
			WHERE webhook_id = $1 AND seq = $2 AND made_at IS NULL`, r.WebhookID, r.Seq).Scan(&lane, &bytes)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the delivery: %w", err)
		}
		p := params{r.WebhookID, r.Seq}
		// One that another has replaced as the head of the lane stays behind it.
		set := "next_at = CASE WHEN next_at IS NULL THEN NULL ELSE CAST(" + p.add(at(r.NextAt)) +
			" AS BIGINT) END, failed_at = COALESCE(failed_at, " + p.add(at(r.Attempt.At)) + ")"
		if r.Made {
			p = p[:2]
			set = "next_at = NULL, body = '', made_at = " + p.add(at(r.Attempt.At))
		}
		a := r.Attempt
		_, err = tx.ExecContext(ctx, "UPDATE webhook_deliveries SET "+set+", attempts = attempts + 1, tried_at = "+
			p.add(at(a.At))+", took = "+p.add(durationColumn{&a.Took})+", status_code = "+p.add(a.Status)+", error = "+
			p.add(a.Error)+", answer = "+p.add(a.Answer)+" WHERE webhook_id = $1 AND seq = $2", p...)
		if err != nil {
			return fmt.Errorf("writing the attempt: %w", err)
		}
		if r.Made {
			if err := db.execute(ctx, tx, []statement{head(r.WebhookID, lane, a.At)}); err != nil {
				return fmt.Errorf("finding the next delivery: %w", err)
			}
			w.Pending, w.Bytes = w.Pending-1, w.Bytes-bytes
		}
		was := w.Enabled
		if r.Disable != "" {
			w.Disable(r.Disable, a.At)
		}
		return out.writeWebhook(ctx, &w, was, a.At)
	})
	if err != nil {
		return fmt.Errorf("ending an attempt of webhook %s: %w", r.WebhookID, err)
	}
	return nil
}

// ListDeliveries implements [webhook.Store].
func (db *DB) ListDeliveries(ctx context.Context, f webhook.DeliveryFilter) ([]webhook.Delivery, string, error) {
	defer db.took("list_deliveries", time.Now())
	query, args, err := listDeliveriesQuery(f)
	if err != nil {
		return nil, "", err
	}
	all, err := collect(ctx, db.reader, deliveryFields, query, args...)
	if err != nil {
		return nil, "", fmt.Errorf("listing deliveries: %w", err)
	}
	if len(all) <= f.Limit {
		return all, "", nil
	}
	all = all[:f.Limit]
	return all, cursor{listDeliveries, int64(all[f.Limit-1].Seq), f.WebhookID}.String(), nil
}

func listDeliveriesQuery(f webhook.DeliveryFilter) (string, params, error) {
	if f.Limit < 1 {
		return "", nil, fmt.Errorf("listing deliveries with limit %d", f.Limit)
	}
	p := params{f.WebhookID}
	q := "SELECT " + deliveryColumns + ", '' FROM webhook_deliveries WHERE webhook_id = $1"
	if f.Made != nil && *f.Made {
		q += " AND made_at IS NOT NULL"
	} else if f.Made != nil {
		q += " AND made_at IS NULL"
	}
	if f.Cursor != "" {
		c, err := parseCursor(listDeliveries, f.Cursor)
		if err != nil {
			return "", nil, err
		}
		if c.id != f.WebhookID {
			return "", nil, fault.InvalidField("cursor", "is of another webhook's deliveries")
		}
		q += " AND seq < " + p.add(c.at)
	}
	return q + " ORDER BY seq DESC LIMIT " + p.add(f.Limit+1), p, nil
}

const oldestPending = `SELECT CAST(COALESCE(SUM(w.pending), 0) AS BIGINT), MIN((SELECT d.queued_at
	FROM webhook_deliveries d WHERE d.webhook_id = w.id AND d.made_at IS NULL ORDER BY d.seq LIMIT 1))
	FROM webhooks w WHERE w.enabled`

// PendingDeliveries implements [webhook.Store].
func (db *DB) PendingDeliveries(ctx context.Context) (n int, oldest time.Time, err error) {
	defer db.took("pending_deliveries", time.Now())
	if err := db.reader.QueryRowContext(ctx, oldestPending).Scan(&n, timeColumn{&oldest}); err != nil {
		return 0, oldest, fmt.Errorf("counting pending deliveries: %w", err)
	}
	return n, oldest, nil
}
