package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// eventID is "evt_" and the event's number in its sandbox, with so many digits
// that a sandbox suspended and woken every second for a century stays sortable.
func eventID(seq int64) string { return fmt.Sprintf("evt_%010d", seq) }

// insertEvent gives the event the sandbox's next number. The transaction has
// written the sandbox's row, so nobody else can be numbering its events.
func insertEvent(ctx context.Context, tx *sql.Tx, e sandbox.Event) error {
	var seq int64
	err := tx.QueryRowContext(ctx, `INSERT INTO sandbox_events (sandbox_id, seq, at, from_state, to_state, reason, detail)
		VALUES ($1, (SELECT COALESCE(MAX(seq), 0) + 1 FROM sandbox_events WHERE sandbox_id = $1), $2, $3, $4, $5, $6) RETURNING seq`,
		e.SandboxID, at(e.At), e.From, e.To, e.Reason, e.Detail).Scan(&seq)
	if err != nil {
		return fmt.Errorf("writing event: %w", err)
	}
	if seq > eventsKept {
		return dropEvents(ctx, tx, e.SandboxID, eventsKept)
	}
	return nil
}

// A sandbox keeps its newest events: while it lives those of some hundred suspends and wakes, about
// 100 KiB; when it is over those that led to its end. Without a bound a sandbox that is suspended
// and woken all day fills the disk.
const (
	eventsKept     = 1000
	eventsKeptOver = 100
)

// dropEvents drops all events of a sandbox but the newest.
func dropEvents(ctx context.Context, tx *sql.Tx, id sandbox.ID, keep int) error {
	_, err := tx.ExecContext(ctx, `DELETE FROM sandbox_events WHERE sandbox_id = $1 AND seq <=
		(SELECT MAX(seq) FROM sandbox_events WHERE sandbox_id = $1) - $2`, id, keep)
	if err != nil {
		return fmt.Errorf("dropping old events: %w", err)
	}
	return nil
}

// notesKept is how many notes of one reason a sandbox keeps: some hours of the most that
// one which scans its network makes, some tens of KiB.
const notesKept = 100

// Note implements [sandbox.Store].
func (db *DB) Note(ctx context.Context, events []sandbox.Event) error {
	err := db.write(ctx, func(tx *sql.Tx) error {
		for _, e := range events {
			if err := insertNote(ctx, tx, e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("noting %d events: %w", len(events), err)
	}
	return nil
}

func insertNote(ctx context.Context, tx *sql.Tx, e sandbox.Event) error {
	// Taking the state by an update makes this transaction a writer from its beginning.
	err := tx.QueryRowContext(ctx, "UPDATE sandboxes SET state = state WHERE id = $1 AND ended_at IS NULL RETURNING state", e.SandboxID).Scan(&e.To)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the state of %s: %w", e.SandboxID, err)
	}
	e.From = e.To
	if err := insertEvent(ctx, tx, e); err != nil {
		return err
	}
	_, err = tx.ExecContext(ctx, `DELETE FROM sandbox_events WHERE sandbox_id = $1 AND reason = $2 AND from_state = to_state AND seq <=
		(SELECT seq FROM sandbox_events WHERE sandbox_id = $1 AND reason = $2 AND from_state = to_state ORDER BY seq DESC LIMIT 1 OFFSET $3)`,
		e.SandboxID, e.Reason, notesKept)
	if err != nil {
		return fmt.Errorf("dropping old notes: %w", err)
	}
	return nil
}

// Events implements [sandbox.Store]. Events of one sandbox are ordered by their
// number, not by their time, which a clock set back would upset.
func (db *DB) Events(ctx context.Context, id sandbox.ID, limit int, after string) ([]sandbox.Event, string, error) {
	if limit < 1 {
		return nil, "", fmt.Errorf("listing events with limit %d", limit)
	}
	var p params
	q := "SELECT seq, at, from_state, to_state, reason, detail FROM sandbox_events WHERE sandbox_id = " + p.add(id)
	if after != "" {
		c, err := parseCursor(listEvents, after)
		if err != nil {
			return nil, "", err
		}
		if c.id != string(id) {
			return nil, "", fault.InField("invalid_cursor", "cursor", "is of another sandbox's events")
		}
		q += " AND seq < " + p.add(c.at)
	}
	rows, err := db.reader.QueryContext(ctx, q+" ORDER BY seq DESC LIMIT "+p.add(limit+1), p...)
	if err != nil {
		return nil, "", fmt.Errorf("listing events of %s: %w", id, err)
	}
	defer rows.Close()
	var all []sandbox.Event
	var last int64
	for rows.Next() {
		e := sandbox.Event{SandboxID: id}
		var seq int64
		if err := rows.Scan(&seq, timeColumn{&e.At}, &e.From, &e.To, &e.Reason, &e.Detail); err != nil {
			return nil, "", fmt.Errorf("listing events of %s: %w", id, err)
		}
		if len(all) == limit {
			return all, cursor{listEvents, last, string(id)}.String(), rows.Close()
		}
		e.ID, last = eventID(seq), seq
		all = append(all, e)
	}
	if err := rows.Err(); err != nil {
		return nil, "", fmt.Errorf("listing events of %s: %w", id, err)
	}
	return all, "", nil
}
