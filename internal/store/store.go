// Package store keeps cay's records: sandboxes, templates and their build logs,
// organizations and their keys, the events of all of these, and the server's own
// settings. All SQL of cay is here.
//
// It implements the Store interfaces of the rooms sandbox, template, auth and event. It
// enforces only those of their rules that concurrent writers could break: which of
// several transitions wins, whether a quota still has room, whether a name is taken. It
// reports conditions that callers act on as faults, and wraps all other errors of the
// database as internal errors.
//
// Every method runs in one transaction; [DB.Purge] and [DB.TrimEvents] run in several.
// After an error nothing of the transaction is written. After success it survives a
// crash of the process and of the machine: the database has a write-ahead log that is
// synced at every commit. A read that begins after a write has returned sees that write.
// Times keep microseconds and are returned as UTC. A DB is safe for concurrent use:
// writers run one at a time, and readers do not wait for writers.
//
// The SQL uses only what SQLite and PostgreSQL share (numbered parameters, RETURNING, ON
// CONFLICT, row values, partial indexes), so that a second database needs its own Open
// and little else: sqlite.go holds all that only SQLite has. The tests of the Store interfaces take a
// function that opens a database, so that they run over each kind.
package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// DB is an open database. It implements the Store interfaces of the core.
type DB struct {
	// writer has one connection, because SQLite has one writer. Calls therefore queue in sql.DB, where
	// the queue is fair and waiting ends with the context.
	writer *sql.DB
	reader *sql.DB
	wake   atomic.Pointer[func(orgs []string)] // set by OnEvents

	// insertEvent and insertListed are prepared once, because every create and transition runs one of
	// them and parsing one takes a twentieth of a millisecond.
	insertEvent, insertListed *sql.Stmt
}

var (
	_ sandbox.Store  = (*DB)(nil)
	_ template.Store = (*DB)(nil)
	_ auth.Store     = (*DB)(nil)
	_ event.Store    = (*DB)(nil)
)

// prepare prepares the most frequent statements. Closing the writer closes them.
func (db *DB) prepare(ctx context.Context) (err error) {
	if db.insertEvent, err = db.writer.PrepareContext(ctx, insertEvent); err != nil {
		return fmt.Errorf("preparing a statement: %w", err)
	}
	if db.insertListed, err = db.writer.PrepareContext(ctx, insertListed); err != nil {
		return fmt.Errorf("preparing a statement: %w", err)
	}
	return nil
}

// Close waits for calls in flight and closes the database.
func (db *DB) Close() error {
	// Close the writer last: the last connection writes the log back into the database file.
	return errors.Join(db.reader.Close(), db.writer.Close())
}

// Ping reports whether the database answers reads.
func (db *DB) Ping(ctx context.Context) error {
	var one int
	if err := db.reader.QueryRowContext(ctx, "SELECT 1 FROM goose_db_version LIMIT 1").Scan(&one); err != nil {
		return fmt.Errorf("reading database: %w", err)
	}
	return nil
}

// write runs f in a transaction that holds the write lock from its beginning, so that what f reads
// is still true when f writes.
func (db *DB) write(ctx context.Context, f func(tx *sql.Tx) error) error {
	tx, err := db.writer.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("beginning transaction: %w", err)
	}
	// Rollback does nothing after a commit. After an error of f, that error is the one to report, and
	// a rollback that fails closes the connection, which rolls back.
	defer func() { _ = tx.Rollback() }()
	if err := f(tx); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("committing: %w", err)
	}
	return nil
}

// Setting returns one of the server's own settings. It returns found false if the setting does not exist.
func (db *DB) Setting(ctx context.Context, name string) (value string, found bool, err error) {
	err = db.reader.QueryRowContext(ctx, "SELECT value FROM settings WHERE name = $1", name).Scan(&value)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return "", false, nil
	case err != nil:
		return "", false, fmt.Errorf("reading setting %s: %w", name, err)
	}
	return value, true, nil
}

// SetSetting writes one of the server's own settings.
func (db *DB) SetSetting(ctx context.Context, name, value string) error {
	_, err := db.writer.ExecContext(ctx, `INSERT INTO settings (name, value) VALUES ($1, $2)
		ON CONFLICT (name) DO UPDATE SET value = excluded.value`, name, value)
	if err != nil {
		return fmt.Errorf("writing setting %s: %w", name, err)
	}
	return nil
}
