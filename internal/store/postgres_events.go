package store

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"time"

	"github.com/cayhq/cay/internal/event"
)

// PostgreSQL's transactions write events without a seq. Their seqs are given after the commit, under a lock that one
// transaction of all servers holds at a time, so that a reader never meets a seq below one that it has read:
// docs/decisions/0015 has the measurements.

const (
	// numberBatch limits the events that one transaction numbers: some milliseconds of work. With a lower limit,
	// a burst takes more commits; with a higher one, the first events of a burst wait longer.
	numberBatch = 1000
	// numberInterval is the time between looks for events that no process of its own has announced: those of a
	// server that died after a commit. A shorter one costs a statement each time; a longer one delays these events.
	numberInterval = time.Second

	// numberEvents gives events the next seqs in the order in which they were written. A seq is the present time of
	// the database, or one more than the last seq if the time is not past it. The time is read once: the rows are
	// updated in any order, and a time of its own for each could give two of them one seq.
	numberEvents = `WITH last AS MATERIALIZED (SELECT GREATEST(COALESCE(MAX(seq), 0),
			` + databaseNow + ` - $1) AS seq FROM events),
		fresh AS (SELECT written, ROW_NUMBER() OVER (ORDER BY written) AS n FROM
			(SELECT written FROM events WHERE seq IS NULL ORDER BY written LIMIT $1) AS waiting)
		UPDATE events SET seq = fresh.n + last.seq
		FROM fresh, last WHERE events.written = fresh.written RETURNING org_id, events.seq`
)

var (
	postgresInsertEvent  = fmt.Sprintf(insertUnlisted, "", "")
	postgresInsertListed = fmt.Sprintf(insertListed, "", "")
)

func (d *postgresDialect) plainEvent(args []any) statement {
	return statement{postgresInsertEvent, args}
}

func (d *postgresDialect) listedEvent(args []any) statement {
	return statement{postgresInsertListed, args}
}

func (d *postgresDialect) written([]string) {
	select {
	case d.fresh <- struct{}{}:
	default: // the goroutine has not yet begun with what was announced before
	}
}

// startNumbering starts the goroutine that numbers events until close.
func (d *postgresDialect) startNumbering() {
	ctx, cancel := context.WithCancel(context.Background())
	d.fresh, d.stop, d.stopped = make(chan struct{}, 1), cancel, make(chan struct{})
	go func() {
		defer close(d.stopped)
		tick := time.NewTicker(numberInterval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-d.fresh:
			case <-tick.C:
				// Without the mark on the disk a restore may go unnoticed by the next process; this one knows it.
				_ = d.mark.save()
				if !d.owes() && !d.waiting(ctx) {
					continue
				}
			}
			// An error means that the database is away, of which callers learn by themselves. The next tick
			// finds the events that are left.
			_ = d.number(ctx)
		}
	}()
}

func (d *postgresDialect) settleEvents(ctx context.Context) {
	if d.waiting(ctx) {
		_ = d.number(ctx) // the goroutine tries again
	}
}

// waiting reports whether events wait for their numbers. It writes nothing, so that an idle server lets the database's
// log rest.
func (d *postgresDialect) waiting(ctx context.Context) (wait bool) {
	// An error leaves wait false; see startNumbering.
	_ = d.db.reader.QueryRowContext(ctx, "SELECT EXISTS (SELECT 1 FROM events WHERE seq IS NULL)").Scan(&wait)
	return wait
}

// owes reports whether events may have got their seqs unannounced.
func (d *postgresDialect) owes() bool {
	d.numbering.Lock()
	defer d.numbering.Unlock()
	return d.unannounced != nil
}

// announce wakes the followers of events that may have got their seqs unannounced. A transaction that failed may have
// been committed: its outcome stays unknown while the database is away.
//
// +checklocks:d.numbering
func (d *postgresDialect) announce(ctx context.Context) error {
	orgs, last, err := numbered(d.db.reader.QueryContext(ctx,
		"SELECT org_id, MAX(seq) FROM events WHERE seq > $1 GROUP BY org_id", int64(*d.unannounced)))
	if err != nil {
		return err
	}
	d.mark.raise(last)
	d.db.woken(orgs)
	d.unannounced = nil
	return nil
}

// number gives all committed events their seqs and wakes their followers.
func (d *postgresDialect) number(ctx context.Context) error {
	d.numbering.Lock()
	defer d.numbering.Unlock()
	for {
		before := d.mark.value().last
		orgs, err := d.numberBatch(ctx)
		if err != nil && d.unannounced == nil {
			d.unannounced = &before
		} else if err == nil && d.unannounced != nil {
			err = d.announce(ctx)
		}
		if err != nil {
			return fmt.Errorf("numbering events: %w", err)
		}
		if len(orgs) > 0 {
			full := len(orgs) == numberBatch
			slices.Sort(orgs)
			d.db.woken(slices.Compact(orgs))
			if full {
				continue
			}
		}
		return nil
	}
}

// numberBatch numbers some events and returns their organizations.
func (d *postgresDialect) numberBatch(ctx context.Context) (orgs []string, err error) {
	var last event.Seq
	// The lock has a statement of its own, since a statement sees what was committed before it began.
	lock := statement{"SELECT pg_advisory_xact_lock($1::int, 0)", []any{lockClassNumbering}}
	err = d.transact(ctx, []statement{lock}, func(tx *sql.Tx) error {
		if err := d.currentIn(ctx, tx); err != nil {
			return err
		}
		orgs, last, err = numbered(tx.QueryContext(ctx, numberEvents, numberBatch))
		return err
	})
	if err == nil {
		d.mark.raise(last)
	}
	return orgs, err
}

// numbered reads the organizations of the events that were numbered, and the last seq.
func numbered(rows *sql.Rows, err error) (orgs []string, last event.Seq, _ error) {
	if err != nil {
		return nil, 0, err
	}
	defer rows.Close()
	for rows.Next() {
		var org string
		var s event.Seq
		if err := rows.Scan(&org, &s); err != nil {
			return nil, 0, err
		}
		orgs, last = append(orgs, org), max(last, s)
	}
	return orgs, last, rows.Err()
}
