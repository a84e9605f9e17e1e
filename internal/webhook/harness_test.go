package webhook_test

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/store"
	"github.com/cayhq/cay/internal/webhook"
	"github.com/cayhq/cay/internal/webhook/sender"
)

// patience limits how long a test waits for what must happen.
const patience = 2 * time.Minute

// request is a delivery as a receiver got it.
type request struct {
	header http.Header
	body   string
	gone   <-chan struct{} // closed when the sender has given up
}

// sandbox returns the sandbox that the event of a request is about.
func (r request) sandbox() string {
	var b struct {
		Data struct {
			ID string `json:"sandbox_id"`
		} `json:"data"`
	}
	_ = json.Unmarshal([]byte(r.body), &b) // a test that compares it fails
	return b.Data.ID
}

// receiver is a real server that records what it gets.
type receiver struct {
	*httptest.Server
	answer func(w http.ResponseWriter, r request)

	mu  sync.Mutex
	got []request
}

// newReceiver starts a receiver. answer may be nil, for 204.
func newReceiver(t *testing.T, answer func(w http.ResponseWriter, r request)) *receiver {
	t.Helper()
	one := &receiver{answer: answer}
	one.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // the sender has gone
		}
		got := request{r.Header, string(body), r.Context().Done()}
		one.mu.Lock()
		one.got = append(one.got, got)
		one.mu.Unlock()
		if one.answer == nil {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		one.answer(w, got)
	}))
	t.Cleanup(one.Close)
	return one
}

func (r *receiver) requests() []request {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

// ids returns the ids of the deliveries that arrived, in the order in which they did first.
func (r *receiver) ids() (all []string) {
	seen := map[string]bool{}
	for _, one := range r.requests() {
		if id := one.header.Get("webhook-id"); !seen[id] {
			seen[id] = true
			all = append(all, id)
		}
	}
	return all
}

// eventually waits until ok is true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) { // a poll with a deadline
			t.Fatalf("%s did not come to be", what)
		}
	}
}

// clock is a time that a test can move.
type clock struct {
	mu    sync.Mutex
	ahead time.Duration
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.ahead)
}

func (c *clock) move(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ahead += d
}

// encode shows an event with the fields that the tests look at.
func encode(e event.Event) ([]byte, error) {
	return json.Marshal(map[string]any{"id": e.Seq.ID(), "type": e.Type, "sandbox_id": e.SandboxID, "name": e.Name,
		"number": e.Detail})
}

// harness is the whole room with a real database, a real feed and a real sender.
type harness struct {
	*webhook.Service
	t     *testing.T
	db    *store.DB
	feed  *event.Feed
	clock *clock
	leads chan struct{} // closed when Run has begun
	stop  func()        // ends Run and closes the database; safe to repeat
}

// start opens the room as each start of a server does. change may be nil.
func start(t *testing.T, path string, change func(*webhook.Config)) *harness {
	t.Helper()
	db, err := store.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	return serve(t, db, "test", change)
}

// room returns the room of a server on a database, and what sends for it.
func room(db *store.DB, server string, clock *clock, change func(*webhook.Config)) (*webhook.Service, *event.Feed,
	*sender.Sender) {
	log := slog.New(slog.DiscardHandler)
	feed := event.New(event.Config{Keep: time.Hour, MaxFollowers: 2, Shared: db.Shared()}, db, log)
	db.OnEvents(feed.Wake)
	cfg := webhook.Config{Concurrency: 16, Log: log, Now: clock.now, Shared: db.Shared()}
	if change != nil {
		change(&cfg)
	}
	post := sender.New(sender.Config{UserAgent: "cay/" + server, Permit: func(netip.AddrPort) error { return nil }})
	return webhook.New(cfg, db, feed, post,
		map[webhook.Format]webhook.Wire{webhook.Standard: webhook.NewStandard(encode)}), feed, post
}

// serve opens the room of a server on a database, which it closes in the end. It delivers while the server leads.
func serve(t *testing.T, db *store.DB, server string, change func(*webhook.Config)) *harness {
	t.Helper()
	h := &harness{t: t, clock: &clock{}, db: db, leads: make(chan struct{})}
	var post *sender.Sender
	h.Service, h.feed, post = room(db, server, h.clock, change)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	var once sync.Once
	go func() {
		defer close(done)
		db.Lead(ctx, "cluster", server, func(ctx context.Context) {
			once.Do(func() { close(h.leads) })
			h.Run(ctx)
		}, func(error) {})
	}()
	h.stop = sync.OnceFunc(func() {
		cancel()
		<-done
		post.Close()
		if err := h.db.Close(); err != nil {
			t.Errorf("closing the database: %v", err)
		}
	})
	t.Cleanup(h.stop)
	return h
}

// open opens the room on a new database.
func open(t *testing.T, change func(*webhook.Config)) *harness {
	t.Helper()
	return start(t, filepath.Join(t.TempDir(), "cay.db"), change)
}

// hook makes a webhook of an organization.
func (h *harness) hook(org, url string, types ...string) webhook.Webhook {
	h.t.Helper()
	w, err := h.Create(h.t.Context(), org, webhook.NewWebhook{URL: url, Format: webhook.Standard, Types: types})
	if err != nil {
		h.t.Fatal(err)
	}
	return w
}

// happen makes facts, whose events name the sandbox "" and the key that is given.
func (h *harness) happen(org string, names ...string) {
	h.t.Helper()
	for _, name := range names {
		if err := h.db.PutKey(h.t.Context(), auth.Key{ID: "key_" + org + name, OrgID: org, Name: name,
			Hash: []byte(org + name), CreatedAt: time.Now()}, 0); err != nil {
			h.t.Fatal(err)
		}
	}
}

// org makes an organization.
func (h *harness) org(id string) {
	h.t.Helper()
	if err := h.db.PutOrg(h.t.Context(), auth.Org{ID: id, Name: id, CreatedAt: time.Now()},
		auth.Key{ID: "key_" + id, OrgID: id, Hash: []byte(id), CreatedAt: time.Now()}); err != nil {
		h.t.Fatal(err)
	}
}

// names returns the names in the events of requests.
func names(all []request) (out []string) {
	for _, r := range all {
		var b struct {
			Data struct {
				Name string `json:"name"`
			} `json:"data"`
		}
		if err := json.Unmarshal([]byte(r.body), &b); err != nil {
			return append(out, err.Error())
		}
		out = append(out, b.Data.Name)
	}
	return out
}

// deliveries returns all deliveries of a webhook, oldest first.
func (h *harness) deliveries(w webhook.Webhook) (all []webhook.Delivery) {
	h.t.Helper()
	for f := (webhook.DeliveryFilter{WebhookID: w.ID, Limit: 200}); ; {
		page, next, err := h.Deliveries(h.t.Context(), w.OrgID, f)
		if err != nil {
			h.t.Fatal(err)
		}
		all = append(all, page...)
		if f.Cursor = next; next == "" {
			slices.SortFunc(all, func(a, b webhook.Delivery) int { return cmp.Compare(a.Seq, b.Seq) })
			return all
		}
	}
}

// read returns a webhook as it is now.
func (h *harness) read(w webhook.Webhook) webhook.Webhook {
	h.t.Helper()
	got, err := h.Get(h.t.Context(), w.OrgID, w.ID)
	if err != nil {
		h.t.Fatal(err)
	}
	return got
}

// settledWithin waits until nothing of a webhook is pending and all events are queued.
func (h *harness) settledWithin(w webhook.Webhook, d time.Duration) {
	h.t.Helper()
	last, err := h.feed.Last(h.t.Context(), w.OrgID)
	if err != nil {
		h.t.Fatal(err)
	}
	for deadline := time.Now().Add(d); ; time.Sleep(5 * time.Millisecond) {
		place, _, err := h.db.Consumed(h.t.Context(), webhook.Consumer)
		if err != nil {
			h.t.Fatal(err)
		}
		if place >= last && h.read(w).Pending == 0 {
			return
		}
		if time.Now().After(deadline) { // a poll with a deadline
			h.t.Fatalf("%+v has %d pending", w, h.read(w).Pending)
		}
	}
}

// settled waits until nothing of a webhook is pending.
func (h *harness) settled(w webhook.Webhook, made int) {
	h.t.Helper()
	eventually(h.t, fmt.Sprintf("that %d deliveries of %s are made", made, w.URL), func() bool {
		_, _, err := h.db.NextDelivery(h.t.Context(), w.ID, nil)
		if err != nil {
			h.t.Fatal(err)
		}
		n := 0
		for _, d := range h.deliveries(w) {
			if !d.MadeAt.IsZero() {
				n++
			}
		}
		return n == made && h.read(w).Pending == 0
	})
}
