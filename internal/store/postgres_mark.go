package store

import (
	"context"
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

// mark keeps the seq of the last event that this machine has seen, in memory and in a file. Records that do not have
// this event, and have not dropped it, were restored to an older state. Events that are written after the restore are
// not numbered, so that the mark stays.
type mark struct {
	path string

	mu sync.Mutex
	// last is the mark. +checklocks:mu
	last event.Seq
	// saved is the mark that the file has. +checklocks:mu
	saved event.Seq
}

// open reads the mark of the process before, unless a restore is accepted.
func (m *mark) open(accept bool) error {
	if m.path == "" {
		return nil
	}
	if accept {
		if err := os.Remove(m.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("accepting restored records: %w", err)
		}
		return nil
	}
	text, err := os.ReadFile(m.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading how far the records were seen: %w", err)
	}
	seen, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		return fmt.Errorf("reading how far the records were seen from %s: %w", m.path, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last, m.saved = event.Seq(seen), event.Seq(seen)
	return nil
}

// raise notes that an event was committed.
func (m *mark) raise(seq event.Seq) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last = max(m.last, seq)
}

// reset forgets the mark, for records that were replaced.
func (m *mark) reset() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last = 0
}

func (m *mark) value() event.Seq {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.last
}

// save writes the mark to its file, whole or not at all, if it has risen. It does not wait for the disk: a mark that a
// loss of power takes back is only lower.
func (m *mark) save() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.path == "" || m.last <= m.saved {
		return nil
	}
	if err := hostfile.Replace(m.path, []byte(strconv.FormatInt(int64(m.last), 10)+"\n"), 0o600); err != nil {
		return fmt.Errorf("writing how far the records were seen: %w", err)
	}
	m.saved = m.last
	return nil
}

// isCurrent reports whether the records have the event with a seq, or had it: a horizon tells which were dropped.
const isCurrent = `SELECT EXISTS (SELECT 1 FROM events WHERE seq = $1)
	OR EXISTS (SELECT 1 FROM event_horizons WHERE seq >= $1)`

// current implements dialect.
func (d *postgresDialect) current(ctx context.Context) error { return d.currentIn(ctx, d.db.reader) }

func (d *postgresDialect) currentIn(ctx context.Context, q querier) error {
	seen := d.mark.value() // before the query: the mark is of events that are committed
	if seen == 0 {
		return nil
	}
	var has bool
	if err := q.QueryRowContext(ctx, isCurrent, seen).Scan(&has); err != nil {
		return fmt.Errorf("looking for the last event: %w", err)
	}
	if !has {
		return fault.New(fault.Unavailable, fault.CodeNotReady, "the records in PostgreSQL are older than those that this "+
			"server has seen: the database was restored; nothing is removed from this machine until cay server is started "+
			"with --accept-restore")
	}
	return nil
}
