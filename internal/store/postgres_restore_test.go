package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
)

// orNone returns nil for an error that says that something does not exist.
func orNone(err error) error {
	if fault.Is(err, fault.NotFound) {
		return nil
	}
	return err
}

// TestPostgresRestored restores a database to an older state, under a process that has seen the newer one and before
// the next process starts. It checks that nothing is listed that could make the server remove something.
func TestPostgresRestored(t *testing.T) {
	server := sharedPostgres(t)
	if _, err := server.Create("older", "migrated"); err != nil {
		t.Fatal(err)
	}
	cfg := PostgresConfig{URL: server.URL("older"), MaxConns: 2, MarkFile: filepath.Join(t.TempDir(), "mark")}
	ctx := t.Context()
	run := func(accept bool, f func(db *DB)) {
		t.Helper()
		c := cfg
		c.AcceptRestore = accept
		db, err := OpenPostgres(ctx, c)
		if err != nil {
			t.Fatal(err)
		}
		if accept {
			if _, err := db.StartSession(ctx, "node", true); err != nil {
				t.Fatal(err)
			}
		}
		f(db)
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	}
	check := func(db *DB, restored bool) {
		t.Helper()
		for what, call := range map[string]func() error{
			"ping":       func() error { return db.Ping(ctx) },
			"unfinished": func() error { _, err := db.Unfinished(ctx); return err },
			"a row":      func() error { _, err := db.Get(ctx, "sbx_none"); return orNone(err) },
			"a snapshot": func() error { _, err := db.GetSnapshot(ctx, "snap_none"); return orNone(err) },
			"living":     func() error { _, err := db.Living(ctx); return err },
			"images":     func() error { _, err := db.Images(ctx); return err },
			"templates":  func() error { _, err := db.TemplateImages(ctx); return err },
			"contexts":   func() error { _, err := db.TemplateContexts(ctx, ""); return err },
		} {
			if err := call(); fault.Is(err, fault.Unavailable) != restored || !restored && err != nil {
				t.Errorf("%s: %v, restored: %v", what, err, restored)
			}
		}
	}
	run(false, func(db *DB) {
		putOrg(t, db, "org_a")
		settle(t, db)
		check(db, false)
	})
	// A copy of the present state is the backup.
	if _, err := server.Create("backup", "older"); err != nil {
		t.Fatal(err)
	}
	restore := func() {
		t.Helper()
		if err := errors.Join(server.Exec("postgres", "DROP DATABASE older WITH (FORCE)"),
			server.Exec("postgres", "CREATE DATABASE older TEMPLATE backup")); err != nil {
			t.Fatal(err)
		}
	}
	run(false, func(db *DB) {
		check(db, false)
		mustInsert(t, db, small("org_a", 0))
		settle(t, db)
		check(db, false)
		restore()
		for db.Ping(ctx) != nil && !fault.Is(db.Ping(ctx), fault.Unavailable) {
			continue // each connection meets its end once
		}
		check(db, true)
		// What is written now does not make the records newer.
		mustInsert(t, db, small("org_a", 0))
		if err := db.dialect.(*postgresDialect).number(ctx); err == nil {
			t.Error("numbered an event of restored records")
		}
		check(db, true)
	})
	run(false, func(db *DB) { check(db, true) })
	// A start that fails before its session accepts nothing.
	failed := cfg
	failed.AcceptRestore = true
	db, err := OpenPostgres(ctx, failed)
	if err == nil {
		err = errors.Join(db.dialect.(*postgresDialect).number(ctx), db.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	run(false, func(db *DB) { check(db, true) })
	run(true, func(db *DB) { check(db, false) })
	run(false, func(db *DB) {
		startSession(t, db, "node")
		mustInsert(t, db, small("org_a", 0))
		settle(t, db)
		check(db, false)
	})
	restore()
	run(false, func(db *DB) { check(db, true) })
	// Events that were dropped in order do not look like a restore.
	var seen event.Seq
	run(true, func(db *DB) {
		putOrg(t, db, "org_b")
		settle(t, db)
		seen = db.dialect.(*postgresDialect).mark.value().last
		putOrg(t, db, "org_c")
		settle(t, db)
		if _, err := db.TrimEvents(ctx, start.Add(time.Hour), 0); err != nil {
			t.Fatal(err)
		}
		check(db, false)
	})
	if err := os.WriteFile(cfg.MarkFile, fmt.Append(nil, int64(seen)), 0o600); err != nil {
		t.Fatal(err)
	}
	run(false, func(db *DB) { check(db, false) })
	for _, damaged := range []string{"x", "", "\x00\x00\x00", "1 x"} { // a loss of power may empty a file
		if err := os.WriteFile(cfg.MarkFile, []byte(damaged), 0o600); err != nil {
			t.Fatal(err)
		}
		if db, err := OpenPostgres(ctx, cfg); err == nil {
			t.Errorf("opened with the mark %q, %v", damaged, db.Close())
		}
	}
}
