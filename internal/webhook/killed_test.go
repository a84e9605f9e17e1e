package webhook_test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
	"github.com/cayhq/cay/internal/webhook"
)

// childOf names the variable with the database that a child of TestKilled works on.
const childOf = "CAY_WEBHOOK_TEST_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childOf); path != "" {
		deliverForever(path)
	}
	os.Exit(m.Run())
}

// deliverForever is the program of a child: a server that only delivers, and is known by its process id.
func deliverForever(path string) {
	ctx := context.Background()
	open := store.Open
	if strings.HasPrefix(path, "postgres:") {
		open = func(ctx context.Context, url string) (*store.DB, error) {
			return store.OpenPostgres(ctx, store.PostgresConfig{URL: url, MaxConns: 8})
		}
	}
	db, err := open(ctx, path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	server := fmt.Sprint(os.Getpid())
	service, _, _ := room(db, server, &clock{}, nil)
	db.Lead(ctx, "cluster", server, service.Run, func(err error) { fmt.Fprintln(os.Stderr, err) })
}

// TestKilled kills the server with SIGKILL in each delivery: before the receiver answers, or after that. In the end
// each delivery was made at least once, and in the order of its sandbox.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cay.db")
	var mu sync.Mutex
	var child *exec.Cmd
	kill := func() {
		mu.Lock()
		defer mu.Unlock()
		if child != nil {
			_ = child.Process.Kill() // it may have been killed for another delivery
		}
	}
	met := map[string]int{}    // how often a delivery came; guarded by mu
	taken := map[string]bool{} // the deliveries that were answered; guarded by mu
	allTaken := func(want int) bool {
		mu.Lock()
		defer mu.Unlock()
		return len(taken) == want
	}
	r := newReceiver(t, func(w http.ResponseWriter, got request) {
		id := got.header.Get("webhook-id")
		mu.Lock()
		met[id]++
		times, known := met[id], len(met)
		if times > 1 || known%2 == 1 {
			taken[id] = true
		}
		mu.Unlock()
		if times > 1 {
			return
		}
		if known%2 == 0 {
			kill() // the delivery is not made
			return
		}
		w.WriteHeader(http.StatusOK)
		w.(http.Flusher).Flush()
		kill() // the server may or may not have written that it is made
	})

	const each = 12
	db, err := store.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	w, ids := interrupted(t, db, r.URL, 3, each)
	kills := 0
	for deadline := time.Now().Add(5 * patience); ; kills++ {
		if time.Now().After(deadline) {
			t.Fatalf("after %d kills %d deliveries have arrived", kills, len(r.ids()))
		}
		cmd, ended := startChild(t, path)
		mu.Lock()
		child = cmd
		mu.Unlock()
		eventually(t, "the end of the server, or of all deliveries", func() bool {
			select {
			case <-ended:
				return true
			default:
				return allTaken(each * len(ids))
			}
		})
		kill()
		<-ended
		if allTaken(each * len(ids)) {
			break
		}
	}
	h := start(t, path, nil)
	eventually(t, "that nothing is pending", func() bool { return h.read(w).Pending == 0 })
	checkOrder(t, r, ids, each)
	if kills < each {
		t.Errorf("the server was killed only %d times", kills)
	}
	t.Logf("%d kills, %d requests for %d deliveries", kills, len(r.requests()), each*len(ids))
}

// startChild starts a server on a database, and returns a channel that is closed when it has ended.
func startChild(t *testing.T, path string) (*exec.Cmd, <-chan struct{}) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childOf+"="+path)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // it is killed
	}()
	return cmd, ended
}

// interrupted writes a webhook, and sandboxes that have events whose deliveries are not queued yet. It closes the
// database.
func interrupted(t *testing.T, db *store.DB, url string, sandboxes, each int) (webhook.Webhook, []sandbox.ID) {
	t.Helper()
	h := &harness{t: t, db: db}
	h.org("org_a")
	var ids []sandbox.ID
	for range sandboxes {
		ids = append(ids, h.live("org_a"))
	}
	w := webhook.Webhook{ID: "whk_test", OrgID: "org_a", URL: url, Format: webhook.Standard, CreatedAt: time.Now(),
		Types: []string{"sandbox.egress_denied"}, Secret: "whsec_" + "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", Enabled: true,
		EnabledAt: time.Now()}
	if err := db.AddWebhook(t.Context(), w, 0); err != nil {
		t.Fatal(err)
	}
	for i := range each {
		h.note(i, ids...)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	return w, ids
}

// checkOrder checks that each event of sandboxes arrived, and first in its order.
func checkOrder(t *testing.T, r *receiver, ids []sandbox.ID, each int) {
	t.Helper()
	next := map[string]int{}
	seen := map[string]bool{}
	for _, one := range r.requests() {
		if id := one.header.Get("webhook-id"); seen[id] {
			continue
		} else {
			seen[id] = true
		}
		id := one.sandbox()
		if want := fmt.Sprint(`"number":"`, next[id], `"`); !strings.Contains(one.body, want) {
			t.Fatalf("sandbox %s got %s, want number %d", id, one.body, next[id])
		}
		next[id]++
	}
	for _, id := range ids {
		if next[string(id)] != each {
			t.Errorf("of %d deliveries about %s %d arrived", each, id, next[string(id)])
		}
	}
}
