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
// and little else.
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
	// readers limits the reads that run at once. Reads from SQLite are CPU work, so more readers than
	// a small machine has cores only cost memory, about 2 MB of cache each. With fewer, one long
	// listing could delay the key lookup of every request.
	readers = 4

	// busyMillis limits how long a statement waits for a lock of another process, such as a backup or
	// a sqlite3 shell, in milliseconds. A shorter wait would fail calls during a copy that takes
	// seconds; a longer one would look like a hang.
	busyMillis = 10_000
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

// Open opens the SQLite database at path and migrates its schema to the present version. It creates
// a database that does not exist, readable by its owner alone. It refuses a database that a newer
// cay has migrated, and leaves it unchanged. Only one process may have the database open for writing
// at a time; the caller must keep others out.
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

// private creates the file with mode 0600 before SQLite creates it with the mode of the umask. The
// file holds hashes of keys and the tokens of running sandboxes. SQLite gives its log the mode of the
// database.
func private(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("opening database: %w", err)
	}
	return errors.Join(f.Chmod(0o600), f.Close())
}

// dsn returns the data source name of the database, with the settings of every connection.
func dsn(path string, more url.Values) string {
	// The busy timeout must be set before the journal mode, because changing the mode takes a lock.
	more.Set("_busy_timeout", fmt.Sprint(busyMillis))
	more.Set("_journal_mode", "WAL")
	more.Set("_foreign_keys", "true")
	// FULL writes a commit to the disk before it returns. NORMAL would lose the last commits when the
	// machine loses power, and with them sandboxes that users were promised.
	more.Set("_synchronous", "FULL")
	// secure_delete zeroes deleted and overwritten content in the file: a copy of the file must not
	// contain the environments and tokens of sandboxes that are over.
	more.Set("_pragma", "secure_delete(1)")
	// _dqs=false makes a misspelt column in double quotes an error instead of a string.
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

// violates reports whether err is the violation of a key: of a foreign key if foreign is true, else
// of a unique or primary key.
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
