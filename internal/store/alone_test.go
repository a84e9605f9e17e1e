package store

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestLead lets the connection break of each of several servers that lead, right when it has begun to lead and will not
// notice for some time. Another one follows, and never do two lead at once.
func TestLead(t *testing.T) {
	t.Parallel()
	url := newDatabase(t, true)
	ctx, stop := context.WithCancel(t.Context())
	var servers sync.WaitGroup
	defer servers.Wait()
	defer stop()
	var leading, losses atomic.Int32
	led := make(chan string)
	for _, server := range []string{"a", "b"} {
		db := openURL(t, url)
		servers.Go(func() {
			db.Lead(ctx, "work", server, func(ctx context.Context) {
				if leading.Add(1) > 1 {
					t.Error("two servers lead at once")
				}
				defer leading.Add(-1)
				select {
				case led <- server:
				case <-ctx.Done():
				}
				<-ctx.Done()
			}, func(error) { losses.Add(1) })
		})
	}
	admin := openURL(t, url)
	const turns = 4
	for range turns {
		<-led
		r, err := admin.writer.ExecContext(ctx, `SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'
			AND classid = $1 AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`,
			lockClassAlone)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := r.RowsAffected(); n != 1 || err != nil {
			t.Fatalf("%d servers had the lock, %v", n, err)
		}
	}
	<-led
	for deadline := time.Now().Add(time.Minute); losses.Load() != turns; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) { // a poll with a deadline
			t.Fatalf("the lead was lost %d times, and %d losses were told", turns, losses.Load())
		}
	}
}

// TestSilentLeader has a server that says nothing any more, as one whose process was stopped, lose its lock.
func TestSilentLeader(t *testing.T) {
	t.Parallel()
	url := newDatabase(t, true)
	silent, other := openURL(t, url), openURL(t, url)
	conn, err := silent.dialect.(*postgresDialect).connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer closeSoon(context.WithoutCancel(t.Context()), conn)
	if held, err := lockAlone(t.Context(), conn, "work"); !held || err != nil {
		t.Fatalf("locked: %t, %v", held, err)
	}
	led := false
	for deadline := time.Now().Add(aloneSilence + time.Minute); !led; time.Sleep(100 * time.Millisecond) {
		if err := other.Alone(t.Context(), "work", func(context.Context) error { led = true; return nil }); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) { // a poll with a deadline
			t.Fatal("the lock of a silent connection was not given back")
		}
	}
}

// TestLeadOfSQLite checks that to lead is a plain call if no other server can work with the records.
func TestLeadOfSQLite(t *testing.T) {
	db := open(t)
	if db.Shared() {
		t.Error("the records of SQLite are shared")
	}
	calls := 0
	db.OnCall(func(call string, _ time.Duration) { t.Errorf("the lead called %s", call) })
	db.Lead(t.Context(), "work", "a", func(ctx context.Context) {
		if calls++; ctx != t.Context() {
			t.Error("it has another context")
		}
	}, func(err error) { t.Error(err) })
	if calls != 1 {
		t.Errorf("%d calls", calls)
	}
}
