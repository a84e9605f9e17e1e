package store

// This file holds what only SQLite has. postgres.go and its neighbours hold the same for PostgreSQL, and
// the rest of the package is the same for both.

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/pressly/goose/v3"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/cayhq/cay/internal/sandbox"
)

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
	db.dialect = &sqliteDialect{db: db}
	if db.writer, err = openSQLite(dsn(path, url.Values{"_txlock": {"immediate"}})); err != nil {
		return nil, fmt.Errorf("opening database %q: %w", path, err)
	}
	db.writer.SetMaxOpenConns(1)
	if err := migrate(ctx, db.writer, goose.DialectSQLite3, "migrations"); err != nil {
		return nil, errors.Join(fmt.Errorf("opening database %q: %w", path, err), db.writer.Close())
	}
	if db.reader, err = openSQLite(dsn(path, url.Values{"_query_only": {"true"}})); err != nil {
		return nil, errors.Join(fmt.Errorf("opening database %q: %w", path, err), db.writer.Close())
	}
	db.reader.SetMaxOpenConns(readers)
	db.reader.SetMaxIdleConns(readers)
	return db, nil
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

// sqliteDialect implements dialect for SQLite, which has one writer at a time, so no row needs a lock.
type sqliteDialect struct {
	db *DB
}

const (
	// sqliteSeq selects the seq of the next event: the present time, given as $10, or one more than
	// the last seq if the present time is not past it. The transaction has the write lock, so the
	// order of these values is the order of commits.
	sqliteSeq = `(SELECT CASE WHEN last.seq < $10 THEN $10 ELSE last.seq + 1 END
		FROM (SELECT COALESCE((SELECT seq FROM events ORDER BY seq DESC LIMIT 1), 0) AS seq) AS last), `
)

var (
	sqliteInsertEvent  = fmt.Sprintf(insertUnlisted, "seq, ", sqliteSeq)
	sqliteInsertListed = fmt.Sprintf(insertListed, "seq, ", sqliteSeq)
)

// write runs f in a transaction that holds the write lock from its beginning.
func (d *sqliteDialect) write(ctx context.Context, _ string, f func(tx *sql.Tx) error) error {
	tx, err := d.db.writer.BeginTx(ctx, nil)
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

func (d *sqliteDialect) forUpdate() string { return "" }

func (d *sqliteDialect) lockOrg(context.Context, *sql.Tx, string) error { return nil }

// alone calls f: one server at a time opens the file, under the lock of its data directory.
func (d *sqliteDialect) alone(ctx context.Context, _ string, f func(ctx context.Context) error) error {
	return f(ctx)
}

// dropCommits returns nil: a commit to a file of this machine has a known outcome.
func (d *sqliteDialect) dropCommits(context.Context) error { return nil }

func (d *sqliteDialect) lockNoted(context.Context, *sql.Tx, []sandbox.Event) error { return nil }

func (d *sqliteDialect) plainEvent(args []any) statement {
	return statement{sqliteInsertEvent, append(args, time.Now().UnixMicro())}
}

func (d *sqliteDialect) listedEvent(args []any) statement {
	return statement{sqliteInsertListed, append(args, time.Now().UnixMicro())}
}

func (d *sqliteDialect) execute(ctx context.Context, tx *sql.Tx, all []statement) error {
	for _, s := range all {
		if _, err := tx.ExecContext(ctx, s.query, s.args...); err != nil {
			return err
		}
	}
	return nil
}

func (d *sqliteDialect) written(orgs []string) { d.db.woken(orgs) }

func (d *sqliteDialect) settleEvents(context.Context) {} // their transactions number them

func (d *sqliteDialect) present() time.Time { return time.Now().UTC() }

func (d *sqliteDialect) now(p *params, process time.Time) string { return p.add(at(process)) }

func (d *sqliteDialect) setActivity(ctx context.Context, tx *sql.Tx, last map[sandbox.ID]time.Time) error {
	me := d.db.holder()
	set, err := tx.PrepareContext(ctx, `UPDATE sandboxes SET last_activity_at = $1
		WHERE id = $2 AND ended_at IS NULL AND (last_activity_at IS NULL OR last_activity_at < $1)
		AND node_id = $3 AND fence <= $4`)
	if err != nil {
		return err
	}
	defer set.Close()
	for id, t := range last {
		if _, err := set.ExecContext(ctx, at(t), id, me.Node, me.Fence); err != nil {
			return err
		}
	}
	return nil
}

// begin runs f alone: the caller of [Open] keeps other processes out.
func (d *sqliteDialect) begin(ctx context.Context, _ string, f func(tx *sql.Tx) error) error {
	return d.write(ctx, "", f)
}

func (d *sqliteDialect) began(Session) {}

// current returns nil: cay cannot notice that a file of SQLite was replaced while no server ran.
func (d *sqliteDialect) current(context.Context) error { return nil }

func (d *sqliteDialect) close() error {
	// Close the writer last: the last connection writes the log back into the database file.
	return errors.Join(d.db.reader.Close(), d.db.writer.Close())
}

func (d *sqliteDialect) violates(err error, foreign bool) bool {
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return false
	}
	if foreign {
		return e.Code() == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY
	}
	return e.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE || e.Code() == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY
}
