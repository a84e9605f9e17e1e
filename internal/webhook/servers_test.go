package webhook_test

import (
	"fmt"
	"net/http"
	"os/exec"
	"sync"
	"testing"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
	"github.com/cayhq/cay/internal/webhook"
)

// records makes a database in a PostgreSQL of the test's own.
func records(t *testing.T) (url string) {
	t.Helper()
	url, err := caytest.StartPostgres(t).Create("records", "")
	if err != nil {
		t.Fatal(err)
	}
	return url
}

func openRecords(t *testing.T, url string) *store.DB {
	t.Helper()
	db, err := store.OpenPostgres(t.Context(), store.PostgresConfig{URL: url, MaxConns: 8})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

// oneLane is the number of events of one lane in the tests of several servers.
const oneLane = 200

// TestTwoServers has two servers with the same records: one leads, and everything is done by the other one. Each
// delivery of a lane is made once, in order, by the leader, until it stops. Then the other one makes them.
func TestTwoServers(t *testing.T) {
	url := records(t)
	leader := serve(t, openRecords(t, url), "leader", nil)
	<-leader.leads
	other := serve(t, openRecords(t, url), "other", nil)
	r := newReceiver(t, nil)
	other.org("org_a")
	id := other.live("org_a")
	w := other.hook("org_a", r.URL, "sandbox.egress_denied") // the leader is idle
	half := oneLane / 2
	for i := range half {
		[]*harness{leader, other}[i%2].note(i, id)
	}
	by := func(n int, server string) {
		t.Helper()
		all := r.requests()
		if len(all) != n {
			t.Errorf("%d requests, want %d", len(all), n)
		}
		for _, one := range all[max(n-half, 0):] {
			if got := one.header.Get("User-Agent"); got != "cay/"+server {
				t.Fatalf("a delivery was made by %s, want %s", got, server)
			}
		}
	}
	eventually(t, "the first half", func() bool { return len(r.requests()) >= half && other.read(w).Pending == 0 })
	by(half, "leader")

	// What the other one queues again, the leader delivers.
	if _, err := other.Replay(t.Context(), "org_a", w.ID, event.Oldest); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the replay", func() bool { return len(r.requests()) >= 2*half && other.read(w).Pending == 0 })
	by(2*half, "leader")

	// The leader drops the deliveries of a webhook that the other one has deleted.
	short := other.hook("org_a", newReceiver(t, nil).URL, "org.created")
	if _, err := other.Replay(t.Context(), "org_a", short.ID, event.Oldest); err != nil {
		t.Fatal(err)
	}
	left := func() int {
		all, _, err := other.db.ListDeliveries(t.Context(), webhook.DeliveryFilter{WebhookID: short.ID, Limit: 5})
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	if n := left(); n != 1 {
		t.Errorf("%d deliveries are queued again, want 1", n)
	}
	if err := other.Delete(t.Context(), "org_a", short.ID); err != nil {
		t.Fatal(err)
	}
	eventually(t, "that its deliveries are dropped", func() bool { return left() == 0 })

	leader.stop()
	for i := range half {
		other.note(half+i, id)
	}
	eventually(t, "the second half", func() bool { return len(r.requests()) >= 3*half && other.read(w).Pending == 0 })
	by(3*half, "other")
	checkOrder(t, r, []sandbox.ID{id}, oneLane)
}

// TestLeaderKilled kills the server that delivers, again and again, while others wait: before the receiver answers, or
// after that. Each delivery of the lane is made, in order, and at most one is repeated for each kill.
func TestLeaderKilled(t *testing.T) {
	url := records(t)
	const most = 3 // kills
	var mu sync.Mutex
	children := map[string]*exec.Cmd{} // by the user agent; guarded by mu
	seen := map[string]bool{}          // the deliveries that came; guarded by mu
	kills := 0                         // guarded by mu
	r := newReceiver(t, func(w http.ResponseWriter, got request) {
		mu.Lock()
		defer mu.Unlock()
		seen[got.header.Get("webhook-id")] = true
		if kills == most || len(seen) < (kills+1)*oneLane/(most+1) {
			return
		}
		if kills++; kills%2 == 0 {
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush() // the server may or may not have written that the delivery is made
		}
		if err := children[got.header.Get("User-Agent")].Process.Kill(); err != nil {
			t.Error(err)
		}
	})
	w, ids := interrupted(t, openRecords(t, url), r.URL, 1, oneLane)
	mu.Lock()
	for range most + 1 {
		cmd, ended := startChild(t, url)
		children[fmt.Sprint("cay/", cmd.Process.Pid)] = cmd
		defer func() {
			_ = cmd.Process.Kill() // it may be killed already
			<-ended
		}()
	}
	mu.Unlock()
	h := &harness{t: t, db: openRecords(t, url)}
	h.Service, _, _ = room(h.db, "reader", &clock{}, nil) // it does not run
	defer func() {
		if err := h.db.Close(); err != nil {
			t.Error(err)
		}
	}()
	eventually(t, "all deliveries", func() bool {
		mu.Lock()
		n := len(seen)
		mu.Unlock()
		return n == oneLane && h.read(w).Pending == 0
	})
	checkOrder(t, r, ids, oneLane)
	mu.Lock()
	defer mu.Unlock()
	if n := len(r.requests()); kills != most || n > oneLane+kills {
		t.Errorf("%d requests for %d deliveries with %d kills", n, oneLane, kills)
	}
}
