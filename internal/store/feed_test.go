package store

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// putOrg adds an organization, which writes two events.
func putOrg(t *testing.T, db *DB, id string) {
	t.Helper()
	key := auth.Key{ID: "key_" + id, OrgID: id, Name: "first", Hash: []byte(id), CreatedAt: start}
	if err := db.PutOrg(t.Context(), auth.Org{ID: id, Name: id, CreatedAt: start}, key); err != nil {
		t.Fatal(err)
	}
}

// addEvents writes n events of an organization in one transaction.
func addEvents(t *testing.T, db *DB, n int, e event.Event) {
	t.Helper()
	err := db.record(t.Context(), func(_ *sql.Tx, out *outbox) error {
		for i := range n {
			e.About.Version = i
			if err := out.add(t.Context(), e); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// settle waits until the events that are committed can be read.
func settle(t *testing.T, db *DB) {
	t.Helper()
	if d, ok := db.dialect.(*postgresDialect); ok {
		if err := d.number(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// feed returns all events that a query selects, and the number of pages that they took.
func feed(t *testing.T, db *DB, q event.Query) (all []event.Event, pages int) {
	t.Helper()
	settle(t, db)
	for {
		page, err := db.ReadEvents(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		if page.Through < q.After || len(page.Events) > q.Limit {
			t.Fatalf("the page after %d has %d events up to %d", q.After, len(page.Events), page.Through)
		}
		all = append(all, page.Events...)
		if q.Before > 0 {
			q.Before = page.Through
		} else {
			q.After = page.Through
		}
		if pages++; !page.More {
			return all, pages
		}
	}
}

// testEventStore tests the contract of event.Store, which every implementation must keep. No interface
// writes events by itself, so the tests take the whole database.
func testEventStore(t *testing.T, open func(t *testing.T) *DB) {
	for name, f := range map[string]func(*testing.T, *DB){
		"every field":            feedFields,
		"pages":                  feedPages,
		"order":                  feedOrder,
		"new events":             feedNews,
		"settling":               feedSettles,
		"waking":                 feedWakes,
		"trimming":               feedTrims,
		"trimming and listings":  feedTrimsAndListings,
		"a clock that goes back": feedClock,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, open(t))
		})
	}
}

// feedSettles reads an event right after it was written, while nothing else looks for events.
func feedSettles(t *testing.T, db *DB) {
	if d, ok := db.dialect.(*postgresDialect); ok {
		d.stop()
		<-d.stopped
	}
	for i := range 3 {
		addEvents(t, db, 1, event.Event{OrgID: "org_a", At: start, Type: event.SandboxRunning})
		db.SettleEvents(t.Context())
		page, err := db.ReadEvents(t.Context(), event.Query{OrgID: "org_a", Limit: 10})
		if err != nil || len(page.Events) != i+1 {
			t.Errorf("after %d events the feed has %d, %v", i+1, len(page.Events), err)
		}
	}
}

// feedFields writes an event with all fields and reads it back.
func feedFields(t *testing.T, db *DB) {
	want := event.Event{OrgID: "org_a", At: start, Type: event.SnapshotCreated, SandboxID: "sbx_a",
		From: "running", To: "suspended", Reason: "why", Detail: "\"\\\x01\u2028",
		About: event.About{SnapshotID: "snap_a", TemplateID: "tpl_a", KeyID: "key_a", WebhookID: "whk_a",
			Name: "name", Version: 3, Port: 80}}
	err := db.record(t.Context(), func(_ *sql.Tx, out *outbox) error { return out.add(t.Context(), want) })
	if err != nil {
		t.Fatal(err)
	}
	settle(t, db)
	before := time.Now().UnixMicro()
	got, _ := feed(t, db, event.Query{OrgID: "org_a", After: event.Oldest, Limit: 5})
	if len(got) != 1 || int64(got[0].Seq) > before || int64(got[0].Seq) < before-int64(time.Hour/time.Microsecond) {
		t.Fatalf("the feed is %+v", got)
	}
	want.Seq = got[0].Seq
	if diff := cmp.Diff(want, got[0]); diff != "" {
		t.Error(diff)
	}
}

func feedPages(t *testing.T, db *DB) {
	const many = 2*feedScan + 10
	addEvents(t, db, many, event.Event{OrgID: "org_a", At: start, Type: event.SandboxRunning, SandboxID: "sbx_a"})
	addEvents(t, db, 5, event.Event{OrgID: "org_b", At: start, Type: event.SandboxFailed, SandboxID: "sbx_b"})
	addEvents(t, db, 2, event.Event{OrgID: "org_a", At: start, Type: event.SandboxFailed, SandboxID: "sbx_c"})
	q := event.Query{OrgID: "org_a", After: event.Oldest, Limit: 1000}
	all, pages := feed(t, db, q)
	if len(all) != many+2 || pages != 11 || !slices.IsSortedFunc(all,
		func(a, b event.Event) int { return int(a.Seq - b.Seq) }) {
		t.Errorf("%d events on %d pages", len(all), pages)
	}
	for i, e := range all[:many] {
		if e.OrgID != "org_a" || e.Version != i {
			t.Fatalf("event %d is %+v", i, e)
		}
	}
	for name, q := range map[string]event.Query{
		"all": {Limit: 1000}, "some": {Limit: 7, After: all[many-20].Seq},
		"types": {Limit: 50, Types: []event.Type{event.OrgCreated, event.SandboxFailed}}, "a sandbox": {Limit: 1, SandboxID: "sbx_c"},
		"nothing": {Limit: 5, SandboxID: "sbx_b"}, "before a place": {Limit: 1000, Before: all[5].Seq},
	} {
		q.OrgID = "org_a"
		if q.After == 0 {
			q.After = event.Oldest
		}
		forward := q
		forward.Before, forward.Limit = 0, 1000
		want, _ := feed(t, db, forward)
		if q.Before == 0 {
			q.Before = event.Newest
		} else {
			want = want[:5]
		}
		slices.Reverse(want)
		got, _ := feed(t, db, q)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s from the end (-want +got):\n%s", name, diff)
		}
	}
	for name, q := range map[string]event.Query{
		"a type":        {Types: []event.Type{event.SandboxFailed}},
		"types":         {Types: []event.Type{event.OrgCreated, event.SandboxFailed}},
		"a sandbox":     {SandboxID: "sbx_c"},
		"both":          {SandboxID: "sbx_c", Types: []event.Type{event.SandboxFailed}},
		"after a place": {SandboxID: "sbx_c", After: all[many-1].Seq},
	} {
		q.OrgID, q.Limit = "org_a", 50
		got, pages := feed(t, db, q)
		if len(got) != 2 || q.After == 0 && pages != 3 || got[0].SandboxID != "sbx_c" {
			t.Errorf("%s: %d events on %d pages", name, len(got), pages)
		}
	}
	if got, _ := feed(t, db, event.Query{OrgID: "org_c", After: event.Oldest, Limit: 1}); len(got) != 0 {
		t.Errorf("another organization sees %v", got)
	}
	if last, err := db.LastEvent(t.Context(), "org_a"); err != nil || last != all[many+1].Seq {
		t.Errorf("the last event is %d, %v", last, err)
	}
	if _, err := db.ReadEvents(t.Context(), event.Query{OrgID: "org_a"}); err == nil {
		t.Error("answered a query with limit 0")
	}
}

// feedOrder runs writers and readers at once. It checks that no reader misses an event, reads
// one twice, or reads one that precedes an event it has read before.
func feedOrder(t *testing.T, db *DB) {
	const writers, each = 6, 40
	done := make(chan struct{})
	var writing, reading sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			for i := range each {
				e := event.Event{OrgID: fmt.Sprint("org_", w%2), At: start, Type: event.OrgCreated,
					About: event.About{Version: i, Port: w}}
				err := db.record(context.Background(), func(_ *sql.Tx, out *outbox) error {
					if err := out.add(context.Background(), e); err != nil {
						return err
					}
					if i%5 == 4 {
						return fault.New(fault.Conflict, "taken_back", "this one is not to be")
					}
					return nil
				})
				if (err != nil) != (i%5 == 4) {
					t.Error(err)
				}
			}
		})
	}
	for range 2 {
		reading.Go(func() {
			var last event.Seq
			next := map[int]int{} // the next number of each writer
			for over := false; ; {
				select {
				case <-done:
					over = true
				default:
				}
				page, err := db.ReadAllEvents(context.Background(), last, 7)
				if err != nil {
					t.Error(err)
					return
				}
				for _, e := range page {
					if e.Seq <= last || e.Version != next[e.Port] {
						t.Errorf("after %d the reader got %+v, want number %d of that writer", last, e, next[e.Port])
						return
					}
					last = e.Seq
					if next[e.Port]++; next[e.Port]%5 == 4 {
						next[e.Port]++
					}
				}
				if over && len(page) == 0 {
					break
				}
			}
			for w := range writers {
				if next[w] != each {
					t.Errorf("the next event of writer %d is %d", w, next[w])
				}
			}
		})
	}
	writing.Wait()
	settle(t, db)
	close(done)
	reading.Wait()
}

// feedWakes checks that followers are woken once an event can be read, and for nothing else.
func feedWakes(t *testing.T, db *DB) {
	var mu sync.Mutex
	var woken []string
	db.OnEvents(func(orgs []string) {
		for _, org := range orgs {
			if last, err := db.LastEvent(t.Context(), org); err != nil || last == 0 {
				t.Errorf("woken for %s before its events can be read, %v", org, err)
			}
		}
		mu.Lock()
		defer mu.Unlock()
		woken = append(woken, orgs...)
	})
	s := mustInsert(t, db, small("org_a", 0))
	settle(t, db)
	mustMove(t, db, s.ID, sandbox.Creating, sandbox.Running, start)
	settle(t, db)
	if err := db.SetActivity(t.Context(), map[sandbox.ID]time.Time{s.ID: start}); err != nil {
		t.Fatal(err)
	}
	if _, err := db.SetExpiry(t.Context(), s.ID, start, time.Minute, false); err != nil {
		t.Fatal(err)
	}
	settle(t, db)
	mu.Lock()
	defer mu.Unlock()
	if !slices.Equal(woken, []string{"org_a", "org_a"}) {
		t.Errorf("woken for %q", woken)
	}
}

// feedNews asks for what is new after several places.
func feedNews(t *testing.T, db *DB) {
	want := func(after, last event.Seq, orgs ...string) {
		t.Helper()
		settle(t, db)
		got, to, err := db.NewEvents(t.Context(), after)
		if err != nil || to != last || !slices.Equal(got, orgs) {
			t.Errorf("after %d there are events of %q up to %d, %v, want %q up to %d", after, got, to, err, orgs, last)
		}
	}
	end := func(org string) event.Seq {
		t.Helper()
		settle(t, db)
		last, err := db.LastEvent(t.Context(), org)
		if err != nil {
			t.Fatal(err)
		}
		return last
	}
	want(event.Newest, 0)
	want(event.Oldest, event.Oldest)
	addEvents(t, db, 2, event.Event{OrgID: "org_b", At: start, Type: event.SandboxRunning})
	first := end("org_b")
	want(event.Newest, first)
	want(first, first)
	want(event.Oldest, first, "org_b")
	addEvents(t, db, 2*newEventsBatch, event.Event{OrgID: "org_a", At: start, Type: event.SandboxRunning})
	addEvents(t, db, 1, event.Event{At: start, Type: event.TemplateCreated})
	last := end("")
	want(first, last, "", "org_a")
	want(first-1, last, "", "org_a", "org_b")
	want(end("org_a"), last, "")
	want(event.Newest, last)
}

// trimmed drops old events and returns the rest of the feed of org_a.
func trimmed(t *testing.T, db *DB, before time.Time, most int) []event.Event {
	t.Helper()
	settle(t, db)
	if _, err := db.TrimEvents(t.Context(), before, most); err != nil {
		t.Fatal(err)
	}
	left, _ := feed(t, db, event.Query{OrgID: "org_a", After: event.Oldest, Limit: 100})
	return left
}

func feedTrims(t *testing.T, db *DB) {
	putOrg(t, db, "org_a")
	putOrg(t, db, "org_b")
	addEvents(t, db, trimBatch, event.Event{OrgID: "org_a", At: start, Type: event.SandboxRunning})
	addEvents(t, db, 10, event.Event{OrgID: "org_a", At: start.Add(time.Hour), Type: event.SandboxRunning})
	all, _ := feed(t, db, event.Query{OrgID: "org_a", After: event.Oldest, Limit: 1000})
	q := event.Query{OrgID: "org_a", Limit: 100, After: all[0].Seq}

	// TrimEvents keeps events that are not old enough, and events that a consumer has not read.
	if left := trimmed(t, db, start, 0); len(left) != len(all) {
		t.Errorf("%d events are left, want %d", len(left), len(all))
	}
	if err := db.SetConsumed(t.Context(), "webhooks", all[4].Seq); err != nil {
		t.Fatal(err)
	}
	if left := trimmed(t, db, start.Add(time.Minute), 1); len(left) != len(all)-5 || left[0].Seq != all[5].Seq {
		t.Errorf("%d events are left, want those that the consumer has not read", len(left))
	}
	_, err := db.ReadEvents(t.Context(), q)
	wantFault(t, err, fault.Gone, fault.CodeEventsGone)
	back, _ := feed(t, db, event.Query{OrgID: "org_a", After: event.Oldest, Before: event.Newest, Limit: 100})
	if len(back) != len(all)-5 || back[len(back)-1].Seq != all[5].Seq {
		t.Errorf("from the end there are %d events, the last is %d", len(back), back[len(back)-1].Seq)
	}
	q.After = all[4].Seq // this reader misses no event
	if page, err := db.ReadEvents(t.Context(), q); err != nil || page.Events[0].Seq != all[5].Seq {
		t.Errorf("the page after the last dropped event is %+v, %v", page, err)
	}
	if through, found, err := db.Consumed(t.Context(), "webhooks"); err != nil || !found || through != all[4].Seq {
		t.Errorf("the consumer is at %d, %v, %v", through, found, err)
	}
	for range 2 {
		if err := db.EndConsumer(t.Context(), "webhooks"); err != nil {
			t.Fatal(err)
		}
	}
	if _, found, err := db.Consumed(t.Context(), "webhooks"); err != nil || found {
		t.Errorf("the consumer still exists: %v", err)
	}

	// Drop events by age, then by number, in more than one transaction.
	if left := trimmed(t, db, start.Add(time.Minute), 0); len(left) != 10 {
		t.Errorf("%d events are left, want the 10 that are not old", len(left))
	}
	if left := trimmed(t, db, start, 4); len(left) != 4 || left[3].Seq != all[len(all)-1].Seq {
		t.Errorf("%d events are left, want 4", len(left))
	}
	// The last event stays, so that the next one gets a higher seq even if the clock was set back.
	left := trimmed(t, db, start.Add(24*time.Hour), 1)
	if len(left) != 1 || left[0].Seq != all[len(all)-1].Seq {
		t.Errorf("%+v are left, want the last event", left)
	}
	addEvents(t, db, 1, event.Event{OrgID: "org_b", At: start, Type: event.SandboxRunning})
	if left := trimmed(t, db, start.Add(24*time.Hour), 0); len(left) != 0 {
		t.Errorf("%d events are left, want 0", len(left))
	}
	if last, err := db.LastEvent(t.Context(), "org_a"); err != nil || last != all[len(all)-1].Seq {
		t.Errorf("the last event of an organization without events is %d, %v", last, err)
	}
}

// feedTrimsAndListings drops events from the feed and from the listing of a sandbox. It checks
// that each keeps the events that only the other has dropped, and that events that both have dropped
// are deleted.
func feedTrimsAndListings(t *testing.T, db *DB) {
	putOrg(t, db, "org_a")
	rows := func() (n int) {
		t.Helper()
		if err := db.reader.QueryRow("SELECT COUNT(*) FROM events WHERE org_id = 'org_a'").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	listed := func(id sandbox.ID) int {
		t.Helper()
		all, _, err := db.Events(t.Context(), id, 2000, "")
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	s := mustInsert(t, db, small("org_a", 0))
	var notes []sandbox.Event
	for range notesKept + 20 {
		notes = append(notes, sandbox.Event{SandboxID: s.ID, At: start, Reason: "egress_denied"})
	}
	if err := db.Note(t.Context(), notes); err != nil {
		t.Fatal(err)
	}
	if left := trimmed(t, db, start.Add(-time.Hour), 0); len(left) != 2+1+len(notes) || listed(s.ID) != 1+notesKept {
		t.Errorf("the feed has %d, the listing %d", len(left), listed(s.ID))
	}
	putOrg(t, db, "org_b") // the last event of all is now one of org_b
	if left := trimmed(t, db, start.Add(time.Hour), 0); len(left) != 0 || listed(s.ID) != 1+notesKept ||
		rows() != 1+notesKept {
		t.Errorf("the feed has %d, the listing %d, the table %d", len(left), listed(s.ID), rows())
	}
	// The feed has dropped these events, so dropping them from the listing deletes them.
	if err := db.Note(t.Context(), notes[:10]); err != nil {
		t.Fatal(err)
	}
	if listed(s.ID) != 1+notesKept || rows() != 1+notesKept {
		t.Errorf("the listing has %d, the table %d", listed(s.ID), rows())
	}
	mustMove(t, db, s.ID, sandbox.Creating, sandbox.Destroyed, start)
	if listed(s.ID) != eventsKeptOver {
		t.Errorf("after its end the listing has %d", listed(s.ID))
	}
	if n, err := db.Purge(t.Context(), start.Add(time.Hour), start.Add(time.Hour), 0); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	left, _ := feed(t, db, event.Query{OrgID: "org_a", After: event.Oldest, Limit: 100})
	if len(left) != 11 || listed(s.ID) != 0 || rows() != 11 {
		t.Errorf("without the row the feed has %d, the listing %d, the table %d", len(left), listed(s.ID), rows())
	}
	if left := trimmed(t, db, start.Add(time.Hour), 0); len(left) > 1 || rows() > 1 {
		t.Errorf("in the end the feed has %d, the table %d", len(left), rows())
	}
}

// feedClock checks that events get seqs above the existing ones when the clock was set back,
// and that no seq is used twice.
func feedClock(t *testing.T, db *DB) {
	ahead := time.Now().Add(time.Hour).UnixMicro()
	const insert = `INSERT INTO events (seq, org_id, at, type, sandbox_id, number, from_state, to_state, reason, detail, about)
		SELECT $1, 'org_a', 1, 'org.created', '', NULL, '', '', '', '', '{}'`
	if _, err := db.writer.Exec(insert, ahead); err != nil {
		t.Fatal(err)
	}
	addEvents(t, db, 3, event.Event{OrgID: "org_a", At: start, Type: event.OrgCreated})
	all, _ := feed(t, db, event.Query{OrgID: "org_a", After: event.Oldest, Limit: 10})
	for i, e := range all {
		if e.Seq != event.Seq(ahead+int64(i)) {
			t.Errorf("event %d is at %d, want %d", i, e.Seq, ahead+int64(i))
		}
	}
}

// TestStatesHaveEvents fails for a state whose transition has no type of events.
func TestStatesHaveEvents(t *testing.T) {
	for _, s := range sandbox.States() {
		if typ := event.Transition(string(s)); !typ.Known() {
			t.Errorf("there is no type of events %q", typ)
		}
	}
}
