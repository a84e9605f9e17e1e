package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/event"
)

const (
	// feedScan limits the events that one call searches for those that match a filter: some
	// milliseconds of work. With a lower limit, a filter that matches little takes more calls; with
	// a higher one, a call holds one of the few connections for reading longer.
	feedScan = 5000
	// trimBatch limits the events that one transaction drops: some milliseconds of work. A higher
	// limit would delay creates; a lower one would sync the database more often.
	trimBatch = 500
)

const eventColumns = "seq, org_id, at, type, sandbox_id, from_state, to_state, reason, detail, about"

func eventFields(e *event.Event) []any {
	return []any{&e.Seq, &e.OrgID, timeColumn{&e.At}, &e.Type, &e.SandboxID, &e.From, &e.To, &e.Reason, &e.Detail,
		jsonColumn{&e.About}}
}

func scanEvents(rows *sql.Rows) ([]event.Event, error) {
	defer rows.Close()
	var all []event.Event
	for rows.Next() {
		var e event.Event
		if err := rows.Scan(eventFields(&e)...); err != nil {
			return nil, err
		}
		all = append(all, e)
	}
	return all, rows.Err()
}

// feedQuery returns the query for the events that match q, up to and including through, or down to it. It
// selects one more than the limit, which shows whether there are further events.
func feedQuery(q event.Query, through event.Seq) (string, params) {
	var p params
	order, after, before := "", q.After, through
	if q.Before > 0 {
		order, after, before = " DESC", through-1, q.Before-1
	}
	text := "SELECT " + eventColumns + " FROM events WHERE org_id = " + p.add(q.OrgID) +
		" AND seq > " + p.add(after) + " AND seq <= " + p.add(before)
	if q.SandboxID != "" {
		text += " AND sandbox_id = " + p.add(q.SandboxID)
	}
	if len(q.Types) > 0 {
		var marks []string
		for _, t := range q.Types {
			marks = append(marks, p.add(t))
		}
		text += " AND type IN (" + strings.Join(marks, ", ") + ")"
	}
	return text + " ORDER BY seq" + order + " LIMIT " + p.add(q.Limit+1), p
}

const (
	lastEvent = "SELECT seq FROM events WHERE org_id = $1 AND seq > 0 ORDER BY seq DESC LIMIT 1"
	// scanEnd selects the last event that one call searches.
	scanEnd = "SELECT seq FROM events WHERE org_id = $1 AND seq > $2 AND seq < $3 ORDER BY seq LIMIT 1 OFFSET $4"
	// scanBegin selects the first event that one call searches from the end.
	scanBegin = "SELECT seq FROM events WHERE org_id = $1 AND seq > $2 AND seq < $3 ORDER BY seq DESC LIMIT 1 OFFSET $4"
)

// place runs a query for one seq. It returns found false if the query has no row.
func place(ctx context.Context, q querier, query string, args ...any) (s event.Seq, found bool, err error) {
	err = q.QueryRowContext(ctx, query, args...).Scan(&s)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, false, nil
	}
	return s, err == nil, err
}

// horizon returns the seq of the last event that was dropped from an organization's feed, or 0 if
// none was dropped.
func (db *DB) horizon(ctx context.Context, org string) (event.Seq, error) {
	s, _, err := place(ctx, db.reader, "SELECT seq FROM event_horizons WHERE org_id = $1", org)
	if err != nil {
		return 0, fmt.Errorf("reading how far events were dropped: %w", err)
	}
	return s, nil
}

// SettleEvents implements [event.Store].
func (db *DB) SettleEvents(ctx context.Context) {
	defer db.took("settle_events", time.Now())
	db.dialect.settleEvents(ctx)
}

// ReadEvents implements [event.Store].
func (db *DB) ReadEvents(ctx context.Context, q event.Query) (event.Page, error) {
	defer db.took("read_events", time.Now())
	horizon, err := db.horizon(ctx, q.OrgID)
	if err != nil {
		return event.Page{}, err
	}
	if q.After == event.Oldest {
		// Rows up to the horizon exist only for the listings of sandboxes.
		q.After = horizon
	}
	page, err := db.readEvents(ctx, q)
	if err != nil {
		return event.Page{}, fmt.Errorf("reading events: %w", err)
	}
	if q.Before > 0 {
		return page, nil // what was dropped meanwhile is at the end of the last page
	}
	// Read the horizon again: events may have been dropped before the page was read.
	if horizon, err = db.horizon(ctx, q.OrgID); err == nil && q.After < horizon {
		err = event.Gone()
	}
	return page, err
}

func (db *DB) readEvents(ctx context.Context, q event.Query) (event.Page, error) {
	page := event.Page{Through: q.After}
	if q.Limit < 1 {
		return page, fmt.Errorf("with limit %d", q.Limit)
	}
	scan, before := scanBegin, q.Before
	if q.Before == 0 {
		// No event will be added before the last one: the sequence grows only at its end.
		last, _, err := place(ctx, db.reader, lastEvent, q.OrgID)
		if err != nil || last <= q.After {
			return page, err
		}
		scan, before, page.Through = scanEnd, last, last
	} else {
		page.Through++
	}
	if len(q.Types) > 0 || q.SandboxID != "" {
		end, found, err := place(ctx, db.reader, scan, q.OrgID, q.After, before, feedScan-1)
		if err != nil {
			return page, err
		}
		if found {
			page.Through, page.More = end, true
		}
	}
	text, args := feedQuery(q, page.Through)
	rows, err := db.reader.QueryContext(ctx, text, args...)
	if err != nil {
		return page, err
	}
	if page.Events, err = scanEvents(rows); err != nil {
		return page, err
	}
	if len(page.Events) > q.Limit {
		page.Events = page.Events[:q.Limit]
		page.Through, page.More = page.Events[q.Limit-1].Seq, true
	}
	return page, nil
}

// LastEvent implements [event.Store].
func (db *DB) LastEvent(ctx context.Context, org string) (event.Seq, error) {
	defer db.took("last_event", time.Now())
	last, _, err := place(ctx, db.reader, lastEvent, org)
	if err != nil {
		return 0, fmt.Errorf("finding the last event: %w", err)
	}
	horizon, err := db.horizon(ctx, org)
	return max(last, horizon), err
}

// ReadAllEvents implements [event.Store].
func (db *DB) ReadAllEvents(ctx context.Context, after event.Seq, limit int) ([]event.Event, error) {
	defer db.took("read_all_events", time.Now())
	rows, err := db.reader.QueryContext(ctx,
		"SELECT "+eventColumns+" FROM events WHERE seq > $1 ORDER BY seq LIMIT $2", after, limit)
	if err != nil {
		return nil, fmt.Errorf("reading events: %w", err)
	}
	all, err := scanEvents(rows)
	if err != nil {
		return nil, fmt.Errorf("reading events: %w", err)
	}
	return all, nil
}

const (
	// lastOfAll selects the last event of all organizations.
	lastOfAll = "SELECT seq FROM events WHERE seq > 0 ORDER BY seq DESC LIMIT 1"
	// newEvents selects events after a place. Its order and its limit make PostgreSQL read the index of seq, whatever
	// it believes about the table.
	newEvents = "SELECT org_id, seq FROM events WHERE seq > $1 ORDER BY seq LIMIT $2"
	// newEventsBatch limits the events that one query of [DB.NewEvents] reads.
	newEventsBatch = 1000
)

// NewEvents implements [event.Store].
func (db *DB) NewEvents(ctx context.Context, after event.Seq) (orgs []string, last event.Seq, err error) {
	defer db.took("new_events", time.Now())
	if after == event.Newest {
		if last, _, err = place(ctx, db.reader, lastOfAll); err != nil {
			return nil, 0, fmt.Errorf("finding the last event: %w", err)
		}
		return nil, last, nil
	}
	for last = after; ; {
		found, to, err := numbered(db.reader.QueryContext(ctx, newEvents, last, newEventsBatch))
		if err != nil {
			return nil, after, fmt.Errorf("looking for new events: %w", err)
		}
		if len(found) == 0 {
			return orgs, last, nil
		}
		last = to
		full := len(found) == newEventsBatch
		orgs = append(orgs, found...)
		slices.Sort(orgs)
		if orgs = slices.Compact(orgs); !full {
			return orgs, last, nil
		}
	}
}

// Consumed implements [event.Store].
func (db *DB) Consumed(ctx context.Context, consumer string) (event.Seq, bool, error) {
	defer db.took("consumed", time.Now())
	s, found, err := place(ctx, db.reader, "SELECT seq FROM event_consumers WHERE name = $1", consumer)
	if err != nil {
		return 0, false, fmt.Errorf("reading the place of consumer %s: %w", consumer, err)
	}
	return s, found, nil
}

// SetConsumed implements [event.Store].
func (db *DB) SetConsumed(ctx context.Context, consumer string, through event.Seq) error {
	defer db.took("set_consumed", time.Now())
	err := db.change(ctx, `INSERT INTO event_consumers (name, seq) VALUES ($1, $2)
		ON CONFLICT (name) DO UPDATE SET seq = excluded.seq`, consumer, through)
	if err != nil {
		return fmt.Errorf("writing the place of consumer %s: %w", consumer, err)
	}
	return nil
}

// EndConsumer implements [event.Store].
func (db *DB) EndConsumer(ctx context.Context, consumer string) error {
	defer db.took("end_consumer", time.Now())
	if err := db.change(ctx, "DELETE FROM event_consumers WHERE name = $1", consumer); err != nil {
		return fmt.Errorf("ending consumer %s: %w", consumer, err)
	}
	return nil
}

const (
	// trimmable selects the last seq that may be dropped: every consumer has read up to it, and it
	// is below the seq of the last event, which must stay.
	trimmable = `SELECT COALESCE(MIN(seq), 0) FROM (SELECT seq FROM event_consumers
		UNION ALL SELECT seq - 1 FROM (SELECT seq FROM events WHERE seq > 0 ORDER BY seq DESC LIMIT 1) AS last) AS bounds`
	// surplus selects the newest event beyond the number that an organization may have.
	surplus = "SELECT seq FROM events WHERE org_id = $1 AND seq > $2 ORDER BY seq DESC LIMIT 1 OFFSET $3"
	oldest  = "SELECT seq, at FROM events WHERE org_id = $1 AND seq > $2 AND seq <= $3 ORDER BY seq LIMIT $4"
	// trim deletes events, except those in the listing of a sandbox whose row exists.
	trim = `DELETE FROM events WHERE org_id = $1 AND seq > $2 AND seq <= $3
		AND (number IS NULL OR NOT EXISTS (SELECT 1 FROM sandboxes WHERE id = events.sandbox_id))`
)

// TrimEvents implements [event.Store].
func (db *DB) TrimEvents(ctx context.Context, before time.Time, most int) (int, error) {
	defer db.took("trim_events", time.Now())
	bound, _, err := place(ctx, db.reader, trimmable)
	if err != nil {
		return 0, fmt.Errorf("finding the last event that may be dropped: %w", err)
	}
	orgs, err := db.texts(ctx, "listing organizations", "SELECT id FROM orgs UNION ALL SELECT ''")
	if err != nil {
		return 0, err
	}
	dropped := 0
	for _, org := range orgs {
		n, err := db.trimOrg(ctx, org, before, most, bound)
		if dropped += n; err != nil {
			return dropped, fmt.Errorf("dropping old events: %w", err)
		}
	}
	return dropped, nil
}

func (db *DB) trimOrg(ctx context.Context, org string, before time.Time, most int, bound event.Seq) (int, error) {
	from, err := db.horizon(ctx, org)
	if err != nil {
		return 0, err
	}
	var above event.Seq
	if most > 0 {
		if above, _, err = place(ctx, db.reader, surplus, org, from, most); err != nil {
			return 0, err
		}
	}
	dropped := 0
	for {
		to, full, err := db.oldEvents(ctx, org, from, bound,
			func(s event.Seq, when time.Time) bool { return s <= above || when.Before(before) })
		if err != nil || to == from {
			return dropped, err
		}
		n, err := db.trimBatch(ctx, org, from, to)
		if dropped += n; err != nil || !full {
			return dropped, err
		}
		from = to
	}
}

// oldEvents returns the end of the unbroken run of old events that follows from in an organization's
// feed, or from if the first event after it is not old. It reads at most trimBatch events, and
// returns full true if all of them are old, so that more may follow.
func (db *DB) oldEvents(ctx context.Context, org string, from, bound event.Seq,
	old func(event.Seq, time.Time) bool) (to event.Seq, full bool, err error) {
	rows, err := db.reader.QueryContext(ctx, oldest, org, from, bound, trimBatch)
	if err != nil {
		return from, false, err
	}
	defer rows.Close()
	to = from
	n := 0
	for ; rows.Next(); n++ {
		var s event.Seq
		var when time.Time
		if err := rows.Scan(&s, timeColumn{&when}); err != nil {
			return from, false, err
		}
		if !old(s, when) {
			return to, false, rows.Close()
		}
		to = s
	}
	return to, n == trimBatch, rows.Err()
}

// trimBatch drops events from an organization's feed and moves the organization's horizon in the
// same transaction.
func (db *DB) trimBatch(ctx context.Context, org string, from, to event.Seq) (int, error) {
	var n int64
	err := db.write(ctx, func(tx *sql.Tx) error {
		r, err := tx.ExecContext(ctx, trim, org, from, to)
		if err != nil {
			return err
		}
		if n, err = r.RowsAffected(); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO event_horizons (org_id, seq) VALUES ($1, $2)
			ON CONFLICT (org_id) DO UPDATE SET seq = excluded.seq`, org, to)
		return err
	})
	return int(n), err
}

// dropListed deletes the events of sandboxes whose rows are gone. It leaves the events that the feed
// still has.
func dropListed(ctx context.Context, tx *sql.Tx, gone []string) error {
	var p params
	var marks []string
	for _, id := range gone {
		marks = append(marks, p.add(id))
	}
	query := "DELETE FROM events WHERE number IS NOT NULL AND sandbox_id IN (" + strings.Join(marks, ", ") + ")" + isBeyond
	if _, err := tx.ExecContext(ctx, query, p...); err != nil {
		return fmt.Errorf("dropping their events: %w", err)
	}
	return nil
}
