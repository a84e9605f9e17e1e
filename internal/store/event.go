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

// outbox writes the events of one transaction. All events are written through an outbox, so that
// followers learn of each.
type outbox struct {
	db   *DB
	tx   *sql.Tx
	orgs []string // the organizations of the events written so far
	err  error    // of an event that may not be written; the transaction fails with it
}

// record runs f in a transaction, as write does, with an outbox for its events. If f wrote events,
// record calls the function set by OnEvents after the transaction.
func (db *DB) record(ctx context.Context, f func(tx *sql.Tx, out *outbox) error) error {
	return db.recordLocked(ctx, "", f)
}

func (db *DB) recordLocked(ctx context.Context, org string, f func(tx *sql.Tx, out *outbox) error) error {
	var out *outbox
	err := db.writeLocked(ctx, org, func(tx *sql.Tx) error {
		out = &outbox{db: db, tx: tx} // of this try alone
		if err := f(tx, out); err != nil {
			return err
		}
		return out.err
	})
	if out != nil && len(out.orgs) > 0 {
		db.written(out.orgs)
	}
	return err
}

// recordCounted runs f as record does, in the turn of an organization whose rows f counts; "" is none. The organization
// is locked before f, so that what f counts stays true.
func (db *DB) recordCounted(ctx context.Context, org string, f func(tx *sql.Tx, out *outbox) error) error {
	return db.inTurn(ctx, org, func() error { return db.recordLocked(ctx, org, f) })
}

// woken calls the function set by OnEvents.
func (db *DB) woken(orgs []string) {
	if wake := db.wake.Load(); wake != nil {
		(*wake)(orgs)
	}
}

// OnEvents sets the function that is called after each transaction that wrote events, with the
// organizations that the events belong to. wake must not block.
func (db *DB) OnEvents(wake func(orgs []string)) { db.wake.Store(&wake) }

const (
	// nextNumber selects the number of the next event in the listing of a sandbox, given as $4.
	nextNumber = `(SELECT COALESCE(MAX(number), 0) + 1 FROM events WHERE sandbox_id = $4 AND number IS NOT NULL)`

	// An insert of an event has the column seq and its value at the two places, or nothing there.
	insertUnlisted = `INSERT INTO events
		(%sorg_id, at, type, sandbox_id, number, from_state, to_state, reason, detail, about)
		VALUES (%s$1, $2, $3, $4, NULL, $5, $6, $7, $8, $9)`
	insertListed = `INSERT INTO events
		(%sorg_id, at, type, sandbox_id, number, from_state, to_state, reason, detail, about)
		VALUES (%s$1, $2, $3, $4, ` + nextNumber + `, $5, $6, $7, $8, $9) RETURNING number`
)

// eventArgs returns the parameters of an insert of e, with room for one more, and adds e's organization to the outbox.
// A type that is not among [event.Types] fails the transaction: keys without the scope admin would never see the event.
func (o *outbox) eventArgs(e *event.Event) []any {
	if !e.Type.Known() {
		o.err = fmt.Errorf("there is no type of events %q", e.Type)
	}
	o.orgs = append(o.orgs, e.OrgID)
	return append(make([]any, 0, 10), e.OrgID, at(e.At), e.Type, e.SandboxID, e.From, e.To, e.Reason, e.Detail,
		jsonColumn{&e.About})
}

// add writes an event that appears in no sandbox's listing.
func (o *outbox) add(ctx context.Context, e event.Event) error {
	if err := o.db.execute(ctx, o.tx, []statement{o.db.plainEvent(o.eventArgs(&e))}); err != nil {
		return fmt.Errorf("writing event: %w", err)
	}
	return nil
}

// list writes an event of a sandbox, adds it to the sandbox's listing and returns its number there.
// The transaction must have written the sandbox's row already, so that no other transaction numbers
// events of the sandbox at the same time.
func (o *outbox) list(ctx context.Context, e event.Event) (number int64, err error) {
	row := o.db.listedEvent(o.eventArgs(&e))
	if err := o.tx.QueryRowContext(ctx, row.query, row.args...).Scan(&number); err != nil {
		return 0, fmt.Errorf("writing event: %w", err)
	}
	if number > eventsKept {
		err = o.unlist(ctx, "sandbox_id = $1 AND number <= $2", e.SandboxID, number-eventsKept)
	}
	return number, err
}

func transitionEvent(orgID string, e sandbox.Event) event.Event {
	return event.Event{OrgID: orgID, At: e.At, Type: event.Transition(string(e.To)),
		SandboxID: string(e.SandboxID), From: string(e.From), To: string(e.To), Reason: e.Reason, Detail: e.Detail}
}

// first returns the statement that writes the event of one of the first transitions of a sandbox, whose listing has
// room.
func (o *outbox) first(orgID string, e sandbox.Event) statement {
	of := transitionEvent(orgID, e)
	return o.db.listedEvent(o.eventArgs(&of))
}

// transition writes the event of a sandbox's transition.
func (o *outbox) transition(ctx context.Context, orgID string, e sandbox.Event) error {
	number, err := o.list(ctx, transitionEvent(orgID, e))
	if err == nil && e.To.Over() && number > eventsKeptOver {
		err = o.unlist(ctx, "sandbox_id = $1 AND number <= $2", e.SandboxID, number-eventsKeptOver)
	}
	return err
}

const (
	// eventsKept limits the events in the listing of a sandbox, which keeps the newest. 1000 are the
	// events of some hundred suspends and wakes, about 100 KiB; fewer hide events that users look for,
	// more take space for every sandbox. The feed keeps older events until they are dropped from it.
	eventsKept = 1000
	// eventsKeptOver limits the events in the listing of a sandbox that is over. 100 show what led to
	// its end.
	eventsKeptOver = 100
)

// unlist removes events from the listing of their sandbox. It deletes the events that the feed no
// longer has.
func (o *outbox) unlist(ctx context.Context, where string, args ...any) error {
	where = " WHERE number IS NOT NULL AND " + where
	if _, err := o.tx.ExecContext(ctx, "DELETE FROM events"+where+isBeyond, args...); err != nil {
		return fmt.Errorf("dropping old events: %w", err)
	}
	if _, err := o.tx.ExecContext(ctx, "UPDATE events SET number = NULL"+where, args...); err != nil {
		return fmt.Errorf("dropping old events: %w", err)
	}
	return nil
}

// isBeyond selects events that were dropped from the feed.
const isBeyond = " AND seq <= (SELECT h.seq FROM event_horizons h WHERE h.org_id = events.org_id)"

// notesKept limits the notes of one reason in a sandbox's listing. A sandbox that scans its network
// makes the most notes: 100 of them cover some hours and take some tens of KiB. With a higher limit,
// notes would displace transitions from the listing.
const notesKept = 100

// Note implements [sandbox.Store].
func (db *DB) Note(ctx context.Context, events []sandbox.Event) error {
	defer db.took("note", time.Now())
	err := db.record(ctx, func(tx *sql.Tx, out *outbox) error {
		if err := db.lockNoted(ctx, tx, events); err != nil {
			return err
		}
		for _, e := range events {
			if _, err := out.note(ctx, event.Transition(e.Reason), e, event.About{}); err != nil {
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

// note writes an event of a sandbox that is not a transition. If the sandbox is over or does not
// exist, or belongs to another node, note writes nothing and returns false.
func (o *outbox) note(ctx context.Context, t event.Type, e sandbox.Event, about event.About) (noted bool, err error) {
	var org, state string
	// Reading the state with an UPDATE makes this transaction a writer from its first statement.
	p := params{e.SandboxID}
	err = o.tx.QueryRowContext(ctx, "UPDATE sandboxes SET state = state WHERE id = $1 AND ended_at IS NULL"+
		o.db.mine(&p)+" RETURNING org_id, state", p...).Scan(&org, &state)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading the state of %s: %w", e.SandboxID, err)
	}
	number, err := o.list(ctx, event.Event{OrgID: org, At: e.At, Type: t, SandboxID: string(e.SandboxID),
		From: state, To: state, Reason: e.Reason, Detail: e.Detail, About: about})
	if err != nil || number <= notesKept {
		return true, err
	}
	var oldest int64
	err = o.tx.QueryRowContext(ctx, `SELECT number FROM events
		WHERE sandbox_id = $1 AND number IS NOT NULL AND reason = $2 AND from_state = to_state
		ORDER BY number DESC LIMIT 1 OFFSET $3`, e.SandboxID, e.Reason, notesKept).Scan(&oldest)
	if errors.Is(err, sql.ErrNoRows) {
		return true, nil
	}
	if err == nil {
		err = o.unlist(ctx, "sandbox_id = $1 AND number <= $2 AND reason = $3 AND from_state = to_state", e.SandboxID,
			oldest, e.Reason)
	}
	if err != nil {
		return true, fmt.Errorf("dropping old notes: %w", err)
	}
	return true, nil
}

// listedID returns the id of an event in the listing of its sandbox: "evt_" and its number there.
// With ten digits, ids stay sortable for a sandbox that is suspended and woken every second for a
// century.
func listedID(number int64) string { return fmt.Sprintf("evt_%010d", number) }

// Events implements [sandbox.Store]. It orders the events of a sandbox by number and not by time,
// because a clock that is set back puts times out of order.
func (db *DB) Events(ctx context.Context, id sandbox.ID, limit int, after string) ([]sandbox.Event, string, error) {
	defer db.took("events", time.Now())
	query, args, err := listingQuery(id, limit, after)
	if err != nil {
		return nil, "", err
	}
	rows, err := db.reader.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, "", fmt.Errorf("listing events of %s: %w", id, err)
	}
	defer rows.Close()
	var all []sandbox.Event
	var last int64
	for rows.Next() {
		e := sandbox.Event{SandboxID: id}
		var number int64
		if err := rows.Scan(&number, timeColumn{&e.At}, &e.From, &e.To, &e.Reason, &e.Detail); err != nil {
			return nil, "", fmt.Errorf("listing events of %s: %w", id, err)
		}
		if len(all) == limit {
			return all, cursor{listEvents, last, string(id)}.String(), rows.Close()
		}
		e.ID, last = listedID(number), number
		all = append(all, e)
	}
	if err := rows.Err(); err != nil {
		return nil, "", fmt.Errorf("listing events of %s: %w", id, err)
	}
	return all, "", nil
}

// listingQuery returns the query that lists the events of a sandbox. The query finds no events if
// the row of the sandbox is gone.
func listingQuery(id sandbox.ID, limit int, after string) (string, params, error) {
	if limit < 1 {
		return "", nil, fmt.Errorf("listing events with limit %d", limit)
	}
	var p params
	q := "SELECT number, at, from_state, to_state, reason, detail FROM events WHERE sandbox_id = " + p.add(id) +
		" AND number IS NOT NULL AND EXISTS (SELECT 1 FROM sandboxes WHERE id = " + p.add(id) + ")"
	if after != "" {
		c, err := parseCursor(listEvents, after)
		if err != nil {
			return "", nil, err
		}
		if c.id != string(id) {
			return "", nil, fault.InvalidField("cursor", "is of another sandbox's events")
		}
		q += " AND number < " + p.add(c.at)
	}
	return q + " ORDER BY number DESC LIMIT " + p.add(limit+1), p, nil
}
