// Package store keeps cay's records: sandboxes, templates and their build logs,
// organizations and their keys, the events of all of these, webhooks and their
// deliveries, nodes, and the server's own settings. All SQL of cay is here.
//
// It implements the Store interfaces of the rooms sandbox, template, auth, event, webhook and fleet. It
// enforces only those of their rules that concurrent writers could break: which of
// several transitions wins, whether a quota still has room, whether a name is taken. It
// reports conditions that callers act on as faults, and wraps all other errors of the
// database as internal errors.
//
// The records are in SQLite, a file of this machine, or in PostgreSQL. Both keep the same
// contract, which one suite of tests checks:
//
// Every method runs in one transaction; [DB.Purge], [DB.TrimEvents] and [DB.TrimDeliveries] run in several.
// After an error nothing of the transaction is written. After success it survives a
// crash of the process and of the machine: the database has a write-ahead log that is
// synced at every commit. A read that begins after a write has returned sees that write;
// the feed of events in PostgreSQL sees it some milliseconds later. Times keep
// microseconds and are returned as UTC. A DB is safe for concurrent use, and readers do
// not wait for writers. Writers to SQLite run one at a time.
//
// The SQL uses only what SQLite and PostgreSQL share (numbered parameters, RETURNING, ON
// CONFLICT, row values, partial indexes). What differs is behind the interface dialect:
// sqlite.go and postgres.go with its neighbours hold it. A transaction that counts rows of an
// organization runs in recordCounted with the organization's lock: SQLite needs neither to be right,
// PostgreSQL both.
package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"sync/atomic"
	"time"

	"github.com/pressly/goose/v3"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
	"github.com/cayhq/cay/internal/webhook"
)

// DB is an open database. It implements the Store interfaces of the core.
type DB struct {
	// writer has one connection with SQLite, which has one writer. Calls therefore queue in sql.DB,
	// where the queue is fair and waiting ends with the context. With PostgreSQL, writer and reader
	// are the same pool.
	writer *sql.DB
	reader *sql.DB
	wake   atomic.Pointer[func(orgs []string)] // set by OnEvents
	// observe is set by OnCall.
	observe atomic.Pointer[func(call string, took time.Duration)]
	// session is nil before StartSession and JoinSession. It is read without a lock, since each write reads it.
	session atomic.Pointer[Session]
	writes  atomic.Int64 // counts the transactions that write has ended; see Expect
	turns

	dialect
}

// dialect does what each kind of database does in its own way.
type dialect interface {
	// write runs f in a transaction, which first locks the organization as lockOrg does, unless org is "". A statement
	// that may write several rows needs it too, since two such transactions can wait for each other. What f reads is
	// still true when f writes, if f has locked it. After an error of the database that passes by itself, write may run
	// f again in a new transaction.
	write(ctx context.Context, org string, f func(tx *sql.Tx) error) error
	// execute runs statements one after the other, until one fails. In PostgreSQL they take one round trip.
	execute(ctx context.Context, tx *sql.Tx, all []statement) error
	// violates reports whether err is the violation of a key: of a foreign key if foreign is true,
	// else of a unique or primary key.
	violates(err error, foreign bool) bool
	// forUpdate returns the end of a SELECT that locks the rows that it reads until the transaction
	// has ended.
	forUpdate() string
	// lockOrg waits until no other transaction has locked the organization, and locks it until tx has ended. A transaction
	// that also locks the row of a sandbox locks that row first. The caller is in the organization's turn, so that at most
	// one transaction of this process waits here with its connection.
	lockOrg(ctx context.Context, tx *sql.Tx, org string) error
	// alone does what [DB.Alone] promises.
	alone(ctx context.Context, name string, f func(ctx context.Context) error) error
	// lockNoted locks the sandboxes of events in one order, so that transactions that note events of
	// several sandboxes do not wait for each other.
	lockNoted(ctx context.Context, tx *sql.Tx, events []sandbox.Event) error
	// plainEvent and listedEvent return the statements that write an event with the parameters of [outbox.eventArgs]. That
	// of listedEvent returns the event's number in the listing of its sandbox.
	plainEvent(args []any) statement
	listedEvent(args []any) statement
	// written learns of the end of a transaction that wrote events of organizations, and calls woken
	// when these can be read.
	written(orgs []string)
	// settleEvents does what [DB.SettleEvents] promises.
	settleEvents(ctx context.Context)
	// now returns an SQL expression for the present time, for times that several machines compare: the time of the
	// database if several machines can share it, and otherwise the process's time.
	now(p *params, process time.Time) string
	// present returns the time of the same clock, to some milliseconds, without asking the database.
	present() time.Time
	// dropCommits drops what is kept of transactions whose outcome no call asks for any more.
	dropCommits(ctx context.Context) error
	// setActivity writes the last activity of sandboxes that are not over, unless a later one is stored.
	setActivity(ctx context.Context, tx *sql.Tx, last map[sandbox.ID]time.Time) error
	// begin runs f in the transaction with which a session begins. It returns an error if the session may not begin, and
	// keeps other servers of the node from beginning one. A replica's session has the node "".
	begin(ctx context.Context, node string, f func(tx *sql.Tx) error) error
	// began learns of a session that has begun.
	began(s Session)
	// current returns an error if the records are older than those that the server has seen, because the
	// database was restored.
	current(ctx context.Context) error
	close() error
}

// statement is one that returns no rows that matter.
type statement struct {
	query string
	args  []any
}

var (
	_ sandbox.Store           = (*DB)(nil)
	_ sandbox.CheckpointStore = (*DB)(nil)
	_ template.Store          = (*DB)(nil)
	_ auth.Store              = (*DB)(nil)
	_ event.Store             = (*DB)(nil)
	_ fleet.Store             = (*DB)(nil)
	_ webhook.Store           = (*DB)(nil)
)

//go:embed migrations
var migrations embed.FS

// migrate brings the schema of a database to the newest version. It refuses a newer one.
func migrate(ctx context.Context, db *sql.DB, kind goose.Dialect, folder string) error {
	dir, err := fs.Sub(migrations, folder)
	if err != nil {
		return fmt.Errorf("reading migrations: %w", err)
	}
	p, err := goose.NewProvider(kind, db, dir)
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
func (db *DB) Close() error { return db.close() }

// Ping reports whether the database answers reads, and has not been restored to an older state.
func (db *DB) Ping(ctx context.Context) error {
	defer db.took("ping", time.Now())
	var one int
	if err := db.reader.QueryRowContext(ctx, "SELECT 1 FROM goose_db_version LIMIT 1").Scan(&one); err != nil {
		return fmt.Errorf("reading database: %w", err)
	}
	return db.current(ctx)
}

// Setting returns one of the server's own settings. It returns found false if the setting does not exist.
func (db *DB) Setting(ctx context.Context, name string) (value string, found bool, err error) {
	defer db.took("setting", time.Now())
	err = db.reader.QueryRowContext(ctx, "SELECT value FROM settings WHERE name = $1", name).Scan(&value)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return "", false, nil
	case err != nil:
		return "", false, fmt.Errorf("reading setting %s: %w", name, err)
	}
	return value, true, nil
}

// FirstSetting returns one of the server's own settings. If the setting does not exist, FirstSetting writes first. Of
// several calls at once, one writes, and all return what it wrote.
func (db *DB) FirstSetting(ctx context.Context, name, first string) (string, error) {
	defer db.took("first_setting", time.Now())
	if value, found, err := db.Setting(ctx, name); err != nil || found {
		return value, err
	}
	err := db.change(ctx, "INSERT INTO settings (name, value) VALUES ($1, $2) ON CONFLICT DO NOTHING", name, first)
	if err != nil {
		return "", fmt.Errorf("writing setting %s: %w", name, err)
	}
	value, _, err := db.Setting(ctx, name)
	return value, err
}

// SetSetting writes one of the server's own settings.
func (db *DB) SetSetting(ctx context.Context, name, value string) error {
	defer db.took("set_setting", time.Now())
	err := db.change(ctx, `INSERT INTO settings (name, value) VALUES ($1, $2)
		ON CONFLICT (name) DO UPDATE SET value = excluded.value`, name, value)
	if err != nil {
		return fmt.Errorf("writing setting %s: %w", name, err)
	}
	return nil
}

// DropSetting drops one of the server's own settings, if it exists.
func (db *DB) DropSetting(ctx context.Context, name string) error {
	defer db.took("drop_setting", time.Now())
	if err := db.change(ctx, "DELETE FROM settings WHERE name = $1", name); err != nil {
		return fmt.Errorf("dropping setting %s: %w", name, err)
	}
	return nil
}
