package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/hostfile"
)

// seen says how far a machine has seen the records: the seq of the last event, and the generation.
type seen struct {
	last       event.Seq
	generation int64
}

// mark keeps how far this machine has seen the records, in memory and in a file. Records that do not have the last
// event, and have not dropped it, were restored to an older state, and so were those of an older generation. Events
// that are written after the restore are not numbered, so that the mark stays.
type mark struct {
	path string

	mu sync.Mutex
	// now is the mark.
	// +checklocks:mu
	now seen
	// saved is the mark that the file has.
	// +checklocks:mu
	saved seen
	// accepting is true until a server has started with records whose restore is accepted. The file keeps the mark
	// until then, since the start may fail.
	// +checklocks:mu
	accepting bool
}

// open reads the mark of the process before, unless a restore is accepted.
func (m *mark) open(accept bool) error {
	if m.path == "" {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.accepting = accept; accept {
		return nil
	}
	text, err := os.ReadFile(m.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading how far the records were seen: %w", err)
	}
	was, err := parseSeen(string(text))
	if err != nil {
		return fmt.Errorf("reading how far the records were seen from %s: %w; if the records are as you want them, start "+
			"cay server with --accept-restore", m.path, err)
	}
	m.now, m.saved = was, was
	return nil
}

// parseSeen reads the text of a mark: a seq, and a generation, which the first servers did not write.
func parseSeen(text string) (s seen, err error) {
	fields := append(strings.Fields(text), "0")
	if len(fields) < 2 {
		return seen{}, errors.New("the file is empty")
	}
	seq, err := strconv.ParseInt(fields[0], 10, 64)
	if err == nil {
		s.generation, err = strconv.ParseInt(fields[1], 10, 64)
	}
	s.last = event.Seq(seq)
	return s, err
}

// raise notes that an event was committed.
func (m *mark) raise(seq event.Seq) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now.last = max(m.now.last, seq)
}

// enter notes the generation that a server has started with.
func (m *mark) enter(generation int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now.generation, m.accepting = generation, false
}

// reset forgets the mark, for records that were replaced.
func (m *mark) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now = seen{}
}

func (m *mark) value() seen {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now
}

// save writes the mark to its file if it has risen. After a loss of power the file has this mark or one before. It is
// not called concurrently: the goroutine that numbers events saves until it has ended, and then close does.
func (m *mark) save() error {
	m.mu.Lock()
	now, saved, accepting := m.now, m.saved, m.accepting
	m.mu.Unlock()
	if m.path == "" || now == saved || now == (seen{}) || accepting {
		return nil
	}
	if err := hostfile.ReplaceSynced(m.path, fmt.Appendln(nil, int64(now.last), now.generation), 0o600); err != nil {
		return fmt.Errorf("writing how far the records were seen: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.saved = now
	return nil
}

// isCurrent reports whether the records have the event with a seq, or had it: a horizon tells which were dropped. It
// also reports whether they have a generation.
const isCurrent = `SELECT ($1::bigint = 0 OR EXISTS (SELECT 1 FROM events WHERE seq = $1)
	OR EXISTS (SELECT 1 FROM event_horizons WHERE seq >= $1))
	AND ($2::bigint = 0 OR EXISTS (SELECT 1 FROM cluster WHERE generation >= $2))`

// begin implements dialect. Restored records are left as they are until the restore is accepted.
func (d *postgresDialect) begin(ctx context.Context, node string, f func(tx *sql.Tx) error) (err error) {
	if d.keeper, err = d.keep(ctx, node); err != nil {
		return err
	}
	if err := d.current(ctx); err != nil {
		return err
	}
	// There is no session yet by which the transaction could be refused.
	row := func(at, id int64) statement { return statement{insertCommit, []any{at, id}} }
	return d.transactWith(ctx, row, nil, f)
}

// began implements dialect.
func (d *postgresDialect) began(s Session) { d.mark.enter(s.Generation) }

// current implements dialect.
func (d *postgresDialect) current(ctx context.Context) error {
	if err := d.currentIn(ctx, d.db.reader); err != nil {
		return err
	}
	return d.keeper.check()
}

func (d *postgresDialect) currentIn(ctx context.Context, q querier) error {
	was := d.mark.value() // before the query: the mark is of events that are committed
	if was == (seen{}) {
		return nil
	}
	var has bool
	if err := q.QueryRowContext(ctx, isCurrent, int64(was.last), was.generation).Scan(&has); err != nil {
		return fmt.Errorf("looking for the last event: %w", err)
	}
	if !has {
		return fault.New(fault.Unavailable, fault.CodeNotReady, "the records in PostgreSQL are older than those that this "+
			"server has seen: the database was restored; nothing is removed from this machine until cay server is started "+
			"with --accept-restore")
	}
	return nil
}
