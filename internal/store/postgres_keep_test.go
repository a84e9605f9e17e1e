package store

import (
	"context"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// eventually waits for a condition.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(5 * time.Millisecond) { // a poll with a deadline
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// isRefused reports whether a second server of the node cannot start.
func isRefused(t *testing.T, db *DB, node string) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := db.StartSession(ctx, node, false)
	if err != nil && !strings.Contains(err.Error(), "another server works with the records of node "+node) {
		t.Errorf("a second server of the node: %v", err)
	}
	return err != nil
}

// TestPostgresOneServerOfANode checks that a second server of a node does not start while the first one lives.
func TestPostgresOneServerOfANode(t *testing.T) {
	address := newDatabase(t, true)
	a, err := OpenPostgres(t.Context(), PostgresConfig{URL: address, MaxConns: 2})
	if err != nil {
		t.Fatal(err)
	}
	startSession(t, a, "aaaaaa")
	b := openURL(t, address)
	if !isRefused(t, b, "aaaaaa") {
		t.Error("two servers of one node have started")
	}
	startSession(t, openURL(t, address), "bbbbbb")
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	startSession(t, b, "aaaaaa")
}

// holdsLock reports whether a connection of the database holds the lock of a node.
const holdsLock = `SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted AND classid = 3
	AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))`

// TestPostgresLockLost ends the connection that holds the lock. While another one has the lock, the server is not ready
// and lists nothing by which something could be removed; it goes on when it has the lock again, unless a newer server
// has started meanwhile.
func TestPostgresLockLost(t *testing.T) {
	ctx := t.Context()
	address := newDatabase(t, true)
	db := openURL(t, address)
	s := startSession(t, db, "aaaaaa")
	other, err := pgx.Connect(ctx, address)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close(ctx)
	take := func() {
		t.Helper()
		var taken sync.WaitGroup
		taken.Go(func() { // waits in PostgreSQL, and so has the lock next
			if _, err := other.Exec(ctx, "SELECT pg_advisory_lock(3, hashtext('aaaaaa'))"); err != nil {
				t.Error(err)
			}
		})
		waits := "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND classid = 3)"
		eventually(t, "no connection waits for the lock", func() (is bool) {
			return db.reader.QueryRowContext(ctx, waits).Scan(&is) == nil && is
		})
		if _, err := db.reader.ExecContext(ctx, `SELECT pg_terminate_backend(pid) FROM pg_locks
			WHERE locktype = 'advisory' AND granted AND classid = 3`); err != nil {
			t.Fatal(err)
		}
		taken.Wait()
		eventually(t, "the server is ready without its lock", func() bool {
			return fault.Is(db.Ping(ctx), fault.Unavailable)
		})
	}
	give := func() {
		t.Helper()
		if _, err := other.Exec(ctx, "SELECT pg_advisory_unlock(3, hashtext('aaaaaa'))"); err != nil {
			t.Fatal(err)
		}
	}
	take()
	for what, call := range map[string]func() error{
		"unfinished":       func() error { _, err := db.Unfinished(ctx); return err },
		"living":           func() error { _, err := db.Living(ctx); return err },
		"images":           func() error { _, err := db.Images(ctx); return err },
		"a row":            func() error { _, err := db.Get(ctx, "sbx_none"); return err },
		"template's files": func() error { _, err := db.TemplateContexts(ctx, ""); return err },
	} {
		if err := call(); !fault.Is(err, fault.Unavailable) {
			t.Errorf("%s without the lock: %v", what, err)
		}
	}
	give()
	eventually(t, "the server has not got its lock again", func() bool { return db.Ping(ctx) == nil })
	mustInsert(t, db, small("org_a", 0))

	take()
	if _, err := other.Exec(ctx, "UPDATE nodes SET fence = fence + 1 WHERE id = 'aaaaaa'"); err != nil {
		t.Fatal(err)
	}
	give()
	last := openURL(t, address)
	if got := startSession(t, last, "aaaaaa"); got.Holder.Fence != s.Holder.Fence+2 {
		t.Errorf("the last session is %+v", got)
	}
	if err := db.Ping(ctx); !fault.Is(err, fault.Unavailable) {
		t.Errorf("a server whose node has a newer one: %v", err)
	}
	if err := last.Ping(ctx); err != nil {
		t.Errorf("the newer server: %v", err)
	}
}

// TestPostgresCut stops the network between cay and PostgreSQL from carrying anything, without an end of a connection.
// Calls that wait fail soon, also those that wait for a connection, and others at once. All succeed when the network is
// back.
func TestPostgresCut(t *testing.T) {
	address, err := url.Parse(newDatabase(t, true))
	if err != nil {
		t.Fatal(err)
	}
	relay := caytest.StartRelay(t, "unix", filepath.Join(address.Query().Get("host"), ".s.PGSQL.5432"))
	db := openURL(t, "postgres://cay@"+relay.Address()+address.Path+"?sslmode=disable")
	ctx := t.Context()
	startSession(t, db, "aaaaaa")
	s := mustInsert(t, db, small("org_a", 0))
	relay.Freeze()
	thaw := sync.OnceFunc(relay.Thaw)
	t.Cleanup(thaw)
	begin := time.Now()
	var callers sync.WaitGroup
	for i := range 3 * poolOfTests {
		callers.Go(func() {
			var err error
			switch i % 3 {
			case 0:
				_, err = db.Get(ctx, s.ID)
			case 1:
				_, err = db.SetExpiry(ctx, s.ID, start, 1, false)
			case 2:
				err = db.Ping(ctx)
			}
			if !fault.Is(err, fault.Unavailable) || fault.As(err).RetryAfter != awayRetry {
				t.Errorf("a call while the network is cut: %v", err)
			}
		})
	}
	callers.Wait()
	t.Logf("%d calls failed after %s", 3*poolOfTests, time.Since(begin).Round(time.Millisecond))
	begin = time.Now()
	for range 20 {
		if err := db.Ping(ctx); !fault.Is(err, fault.Unavailable) {
			t.Errorf("a call after the cut was noticed: %v", err)
		}
	}
	t.Logf("20 more failed after %s", time.Since(begin).Round(time.Millisecond))
	thaw()
	eventually(t, "PostgreSQL is not back", func() bool { return db.Ping(ctx) == nil })
	mustMove(t, db, s.ID, sandbox.Creating, sandbox.Running, start)
	var held bool
	if err := db.reader.QueryRowContext(ctx, holdsLock).Scan(&held); err != nil || !held {
		t.Errorf("the lock is held: %v, %v", held, err)
	}
}

// TestPostgresSlowCall checks that a call that waits for long does not make PostgreSQL look as if it were away.
func TestPostgresSlowCall(t *testing.T) {
	db := openPostgres(t)
	startSession(t, db, "aaaaaa")
	if _, err := db.reader.ExecContext(t.Context(), "SELECT pg_sleep(3)"); err != nil { // longer than the patience
		t.Error(err)
	}
	if err := db.Ping(t.Context()); err != nil {
		t.Error(err)
	}
}
