// Package store keeps cay's records: sandboxes, templates and their build logs,
// organizations and their keys, the events of all of these, and the server's own
// settings. All SQL of cay is here.
//
// It implements the Store ports of the rooms sandbox, template, auth and event, and
// knows of their rules only what concurrent writers could break: who wins a
// transition, whether a quota still has room, whether a name is taken. Errors of
// the database never leave it as such: what a caller decides by is a fault, the
// rest is wrapped and internal.
//
// Promises. Every method is one transaction ([DB.Purge] and [DB.TrimEvents] several): after an error
// nothing of it is written, after success it survives a crash of the process and
// of the machine (write-ahead log, synced at every commit). A read that begins
// after a write has returned sees it. Times keep microseconds and come back as
// UTC. A DB is safe for concurrent use; writers go one at a time, readers wait
// for nobody.
//
// The SQL keeps to what SQLite and PostgreSQL share (numbered parameters,
// RETURNING, ON CONFLICT, row values, partial indexes), so that the second
// database needs its own Open and little else.
package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/pressly/goose/v3"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

//go:embed migrations/*.sql
var migrations embed.FS

const (
	// readers is how many reads go on at once. SQLite reads are CPU work, so more
	// than the cores of a small machine only costs memory (about 2 MB of cache
	// each); fewer would let one long listing hold up every request's key lookup.
	readers = 4

	// busyMillis is how long a statement waits for another process's lock, in
	// milliseconds: a backup or a curious sqlite3 shell. Shorter would fail calls
	// for a copy that takes seconds; longer would look like a hang.
	busyMillis = 10_000
)

// DB is an open database.
type DB struct {
	writer *sql.DB // one connection: SQLite has one writer, so the queue is here, where it is fair and ends with the context
	reader *sql.DB
	wake   atomic.Pointer[func(orgs []string)] // see OnEvents

	// The statements that every create and transition runs, prepared once: parsing them costs a
	// twentieth of a millisecond each.
	insertEvent, insertListed *sql.Stmt
}

var (
	_ sandbox.Store  = (*DB)(nil)
	_ template.Store = (*DB)(nil)
	_ auth.Store     = (*DB)(nil)
	_ event.Store    = (*DB)(nil)
)

// Open opens the SQLite database at path, makes it (readable by its owner alone)
// if it is not there, and brings its schema up to date. A database that a newer
// cay has migrated is refused and left as it is. Only one process may have it
// open for writing at a time; keeping others out is the caller's business.
func Open(ctx context.Context, path string) (*DB, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("finding database %q: %w", path, err)
	}
	if err := private(path); err != nil {
		return nil, err
	}
	db := &DB{}
	if db.writer, err = sql.Open("sqlite", dsn(path, url.Values{"_txlock": {"immediate"}})); err != nil {
		return nil, fmt.Errorf("opening database %q: %w", path, err)
	}
	db.writer.SetMaxOpenConns(1)
	if err := migrate(ctx, db.writer); err != nil {
		return nil, errors.Join(fmt.Errorf("opening database %q: %w", path, err), db.writer.Close())
	}
	if err := db.prepare(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("opening database %q: %w", path, err), db.writer.Close())
	}
	if db.reader, err = sql.Open("sqlite", dsn(path, url.Values{"_query_only": {"true"}})); err != nil {
		return nil, errors.Join(fmt.Errorf("opening database %q: %w", path, err), db.writer.Close())
	}
	db.reader.SetMaxOpenConns(readers)
	db.reader.SetMaxIdleConns(readers)
	return db, nil
}

// prepare prepares the statements that are used all the time. They are closed with the writer.
func (db *DB) prepare(ctx context.Context) (err error) {
	if db.insertEvent, err = db.writer.PrepareContext(ctx, insertEvent); err != nil {
		return fmt.Errorf("preparing a statement: %w", err)
	}
	if db.insertListed, err = db.writer.PrepareContext(ctx, insertListed); err != nil {
		return fmt.Errorf("preparing a statement: %w", err)
	}
	return nil
}

// private makes the file before SQLite would with the umask's mode: it holds
// hashes of keys and the tokens of running sandboxes. SQLite gives its log the
// same mode as the database.
func private(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("opening database: %w", err)
	}
	return errors.Join(f.Chmod(0o600), f.Close())
}

// dsn names the database with the settings every connection has.
func dsn(path string, more url.Values) string {
	// Set before the journal mode, because changing that takes a lock.
	more.Set("_busy_timeout", fmt.Sprint(busyMillis))
	more.Set("_journal_mode", "WAL")
	more.Set("_foreign_keys", "true")
	// A commit is on disk when it returns. NORMAL would lose the last ones when
	// the machine loses power, and with them sandboxes that were promised.
	more.Set("_synchronous", "FULL")
	// Deleted and overwritten content is zeroed in the file: a copy of the file must not hold the
	// environments and tokens of sandboxes that are over.
	more.Set("_pragma", "secure_delete(1)")
	// A misspelt column in double quotes must be an error, not a string.
	more.Set("_dqs", "false")
	u := url.URL{Scheme: "file", Path: path, RawQuery: more.Encode()}
	return u.String()
}

func migrate(ctx context.Context, db *sql.DB) error {
	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return fmt.Errorf("reading migrations: %w", err)
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, db, dir)
	if err != nil {
		return fmt.Errorf("reading migrations: %w", err)
	}
	have, want, err := p.GetVersions(ctx)
	if err != nil {
		return fmt.Errorf("reading schema version: %w", err)
	}
	if have > want {
		return fmt.Errorf("its schema is version %d, this cay knows %d: it was last used by a newer cay", have, want)
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("migrating: %w", err)
	}
	return nil
}

// Close waits for calls in flight and closes the database.
func (db *DB) Close() error {
	// The writer last: the last connection folds the log into the file.
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

// write runs f in a transaction that holds the write lock from its beginning, so
// that what f reads is still true when it writes.
func (db *DB) write(ctx context.Context, f func(tx *sql.Tx) error) error {
	tx, err := db.writer.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("beginning transaction: %w", err)
	}
	// After a commit this does nothing; after an error of f that is the error to
	// report, and a rollback that fails closes the connection, which rolls back.
	defer func() { _ = tx.Rollback() }()
	if err := f(tx); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("committing: %w", err)
	}
	return nil
}

// violates reports whether err is the break of a key: unique (or primary) keys,
// or foreign ones.
func violates(err error, foreign bool) bool {
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return false
	}
	if foreign {
		return e.Code() == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY
	}
	return e.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE || e.Code() == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY
}

// Setting returns a setting of the server's own, and whether there is one.
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

// SetSetting writes a setting of the server's own.
func (db *DB) SetSetting(ctx context.Context, name, value string) error {
	_, err := db.writer.ExecContext(ctx, `INSERT INTO settings (name, value) VALUES ($1, $2)
		ON CONFLICT (name) DO UPDATE SET value = excluded.value`, name, value)
	if err != nil {
		return fmt.Errorf("writing setting %s: %w", name, err)
	}
	return nil
}
