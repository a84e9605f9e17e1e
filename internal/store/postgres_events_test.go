package store

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/event"
)

// TestPostgresUnannounced has a transaction that numbers events fail although it is committed. The followers are woken
// with the next one, and the mark has its events.
func TestPostgresUnannounced(t *testing.T) {
	url := newDatabase(t, true)
	db := openURL(t, url)
	d := db.dialect.(*postgresDialect)
	// Events wait for the call of this test.
	d.stop()
	<-d.stopped
	var mu sync.Mutex
	var woken []string
	db.OnEvents(func(orgs []string) {
		mu.Lock()
		defer mu.Unlock()
		woken = append(woken, orgs...)
	})
	putOrg(t, db, "org_x")
	gone, leave := context.WithCancel(t.Context())
	leave()
	if err := d.number(gone); err == nil {
		t.Fatal("numbered events for a caller who has left")
	}
	settle(t, openURL(t, url)) // it commits what the failed transaction may have committed
	if d.waiting(t.Context()) || !d.owes() {
		t.Fatal("the events are not numbered, or nothing is owed")
	}
	if err := d.number(t.Context()); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if !slices.Contains(woken, "org_x") || d.mark.value().last == 0 || d.owes() {
		t.Errorf("woken %v, seen %+v, owes %v", woken, d.mark.value(), d.owes())
	}
}

// TestPostgresNewEventsPlan checks that looking for new events reads an index, also of a large table that PostgreSQL
// knows nothing about yet, and with a plan that it has made for any place.
func TestPostgresNewEventsPlan(t *testing.T) {
	db := openPostgres(t)
	addEvents(t, db, 5000, event.Event{OrgID: "org_a", At: start, Type: event.SandboxRunning})
	settle(t, db)
	conn, err := db.reader.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() // its settings end with the pool
	for _, s := range []string{"PREPARE news (bigint, bigint) AS " + newEvents,
		"SET plan_cache_mode = force_generic_plan"} {
		if _, err := conn.ExecContext(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	for _, query := range []string{"EXECUTE news (5, 1000)", lastOfAll} {
		plan, err := texts(t.Context(), conn, "EXPLAIN "+query)
		if err != nil {
			t.Fatal(err)
		}
		all := strings.Join(plan, "\n")
		if !strings.Contains(all, "events_seq_key") || strings.Contains(all, "Seq Scan") || strings.Contains(all, "Sort") {
			t.Errorf("the plan of %s:\n%s", query, all)
		}
	}
}

// TestPurgeDropsCommits checks that a purge drops the rows of old transactions, and those alone.
func TestPurgeDropsCommits(t *testing.T) {
	db := openPostgres(t)
	now := db.Now()
	for _, at := range []time.Time{now.Add(-commitsKept - time.Minute), now.Add(-commitsKept + time.Minute)} {
		if _, err := db.writer.ExecContext(t.Context(), insertFreeCommit, at.UnixMicro(), 1); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := db.Purge(t.Context(), start, start, 0); err != nil {
		t.Fatal(err)
	}
	var old, young int
	if err := db.reader.QueryRowContext(t.Context(), `SELECT COUNT(*) FILTER (WHERE at < $1),
		COUNT(*) FILTER (WHERE at < $2) FROM commits`, now.Add(-commitsKept).UnixMicro(), now.Add(-time.Second).UnixMicro()).Scan(&old, &young); err != nil {
		t.Fatal(err)
	}
	if old != 0 || young != 1 {
		t.Errorf("%d old rows are left, and %d others, want 0 and 1", old, young)
	}
}
