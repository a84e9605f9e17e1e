package webhook_test

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/webhook"
)

// live adds a running sandbox of an organization.
func (h *harness) live(org string) sandbox.ID {
	h.t.Helper()
	s := sandbox.Sandbox{ID: sandbox.NewID(), OrgID: org, Mode: sandbox.Ephemeral, State: sandbox.Creating,
		CreatedAt: time.Now().UTC()}
	if _, _, err := h.db.Insert(h.t.Context(), s, sandbox.Quota{Sandboxes: 1 << 20, VCPUs: 1 << 20, MemoryMB: 1 << 30},
		sandbox.Once{}); err != nil {
		h.t.Fatal(err)
	}
	return s.ID
}

// note writes one event of each of the sandboxes, whose detail is a number.
func (h *harness) note(n int, ids ...sandbox.ID) {
	h.t.Helper()
	var all []sandbox.Event
	for _, id := range ids {
		all = append(all, sandbox.Event{SandboxID: id, At: time.Now(), Reason: "egress_denied",
			Detail: fmt.Sprint(n)})
	}
	if err := h.db.Note(h.t.Context(), all); err != nil {
		h.t.Fatal(err)
	}
}

// silence counts the requests that wait at a receiver that never answers.
type silence struct {
	mu        sync.Mutex
	now, most int
}

func (s *silence) add(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now += n
	s.most = max(s.most, s.now)
}

// silent starts a receiver that never answers.
func silent(t *testing.T) (*receiver, *silence) {
	t.Helper()
	waiting, end := &silence{}, make(chan struct{})
	one := newReceiver(t, func(_ http.ResponseWriter, r request) {
		waiting.add(1)
		defer waiting.add(-1)
		select {
		case <-r.gone:
		case <-end:
		}
	})
	t.Cleanup(func() { close(end) }) // before the server is closed
	return one, waiting
}

// TestDeadReceivers makes 10,000 deliveries to one receiver while receivers of its own organization and of another one
// never answer. It gets all, in the order of each sandbox.
func TestDeadReceivers(t *testing.T) {
	h := open(t, func(c *webhook.Config) { c.Concurrency = 64 })
	h.org("org_a")
	h.org("org_b")
	dead, waiting := silent(t)
	const types = "sandbox.egress_denied"
	h.hook("org_a", dead.URL, types)
	for i := range 20 {
		h.hook("org_b", fmt.Sprint(dead.URL, "/", i), types)
	}
	var ids, others []sandbox.ID
	for range 100 {
		ids, others = append(ids, h.live("org_a")), append(others, h.live("org_b"))
	}
	h.note(0, others...) // they are dead before the other one gets anything
	eventually(t, "that the dead receivers have what they may have", func() bool { return len(dead.requests()) >= 16 })
	r := newReceiver(t, nil)
	w := h.hook("org_a", r.URL, types)
	const each = 100
	for i := range each {
		h.note(i, ids...)
	}
	h.settledWithin(w, 10*patience)
	next := map[string]int{}
	for _, one := range r.requests() {
		id := one.sandbox()
		if want := fmt.Sprint(`"number":"`, next[id], `"`); !strings.Contains(one.body, want) {
			t.Fatalf("sandbox %s got %s, want number %d", id, one.body, next[id])
		}
		next[id]++
	}
	if len(next) != len(ids) || len(r.requests()) != each*len(ids) {
		t.Errorf("%d requests about %d sandboxes", len(r.requests()), len(next))
	}
	// A quarter of all attempts, and one of the other organization. The receiver notices late that a sender has gone.
	if waiting.most < 16 || waiting.most > 2*17 {
		t.Errorf("%d requests at once waited for the dead receivers", waiting.most)
	}
}
