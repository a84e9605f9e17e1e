package store

// This file holds what only SQLite has: how it is opened, migrated and asked for the key that an error
// is about. A second database needs the same of its own, and the rest of the package is the same for
// both.

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

	"github.com/pressly/goose/v3"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
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
