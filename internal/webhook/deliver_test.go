package webhook_test

import (
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/store"
	"github.com/cayhq/cay/internal/webhook"
)

// TestDelivery follows events to receivers, which verify them with the library of Standard Webhooks.
func TestDelivery(t *testing.T) {
	h := open(t, nil)
	all, some, other := newReceiver(t, nil), newReceiver(t, nil), newReceiver(t, nil)
	h.org("org_a")
	h.org("org_b")
	everything := h.hook("org_a", all.URL+"/path?a=b")
	created := h.hook("org_a", some.URL, "org.created", "webhook.created")
	foreign := h.hook("org_b", other.URL)
	h.happen("org_a", "one", "two")
	h.happen("org_b", "three")
	h.settled(everything, 3) // and the event of the other webhook
	h.settled(created, 0)
	h.settled(foreign, 1)
	if got := names(other.requests()); !slices.Equal(got, []string{"three"}) {
		t.Errorf("another organization got %q", got)
	}
	if got := names(all.requests()); !slices.Contains(got, "one") || !slices.Contains(got, "two") {
		t.Errorf("got %q", got)
	}
	if got := some.requests(); len(got) != 0 {
		t.Errorf("a webhook got the event of its own creation, or of another type: %q", names(got))
	}
	verifier, err := standardwebhooks.NewWebhook(string(everything.Secret))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range all.requests() {
		if err := verifier.Verify([]byte(r.body), r.header); err != nil {
			t.Errorf("the library refuses %s: %v", r.body, err)
		}
		if err := verifier.Verify([]byte(r.body+" "), r.header); err == nil {
			t.Error("the library accepts another body")
		}
		if r.header.Get("User-Agent") != "cay/test" || r.header.Get("Content-Type") != "application/json" ||
			!strings.HasPrefix(r.body, `{"type":"`) || !strings.Contains(r.body, `,"data":{"id":"evt_`) {
			t.Errorf("the request is %v %s", r.header, r.body)
		}
	}
	// The delivery and its event have the names of the list.
	for _, d := range h.deliveries(everything) {
		if !slices.Contains(all.ids(), webhook.DeliveryID(everything.ID, d.Seq)) || d.Attempts != 1 ||
			d.Last.Status != http.StatusNoContent || d.Last.Error != "" || d.MadeAt.IsZero() {
			t.Errorf("a delivery is %+v", d)
		}
	}
}

// TestSignature compares a signature with one that Standard Webhooks publishes.
func TestSignature(t *testing.T) {
	w := webhook.Webhook{Secret: "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}
	header := webhook.NewStandard(encode).Header(w, "msg_p5jXN8AQM9LWM0D4loKWxJek", time.Unix(1614265330, 0),
		[]byte(`{"test": 2432232314}`))
	if got := header["webhook-signature"]; got != "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=" {
		t.Errorf("the signature is %s", got)
	}
}

// TestOrder lets the deliveries about one key fail. Those after it about the same key wait, and those about others do
// not.
func TestOrder(t *testing.T) {
	h := open(t, nil)
	broken := true
	r := newReceiver(t, nil)
	gate := make(chan bool, 1)
	r.answer = func(w http.ResponseWriter, got request) {
		select {
		case broken = <-gate:
		default:
		}
		if broken && strings.Contains(got.body, `"name":"bad"`) {
			w.WriteHeader(http.StatusInternalServerError)
		}
	}
	h.org("org_a")
	w := h.hook("org_a", r.URL)
	h.happen("org_a", "bad")
	if err := h.db.RevokeKey(t.Context(), "org_a", "key_org_abad", time.Now()); err != nil {
		t.Fatal(err)
	}
	h.happen("org_a", "good", "better")
	eventually(t, "that the others arrive", func() bool {
		got := names(r.requests())
		return slices.Contains(got, "good") && slices.Contains(got, "better")
	})
	var pending []webhook.Delivery
	eventually(t, "that the others are made", func() bool {
		pending = slices.DeleteFunc(h.deliveries(w), func(d webhook.Delivery) bool { return !d.MadeAt.IsZero() })
		return len(pending) == 2
	})
	if pending[0].Last.Status != http.StatusInternalServerError || pending[1].Attempts != 0 ||
		!pending[1].NextAt.IsZero() {
		t.Errorf("pending are %+v", pending)
	}
	gate <- false
	h.retry(w)
	h.settled(w, 4)
	var last []string
	for _, one := range r.requests() {
		if strings.Contains(one.body, `"name":"bad"`) {
			last = append(last, one.header.Get("webhook-id"))
		}
	}
	if n := len(last); n < 3 || last[0] != last[n-2] || last[n-1] == last[n-2] {
		t.Errorf("the deliveries about one key were %q", last)
	}
}

// retry makes what is pending due.
func (h *harness) retry(w webhook.Webhook) {
	h.t.Helper()
	for _, on := range []bool{false, true} {
		if _, err := h.Change(h.t.Context(), w.OrgID, w.ID, webhook.Change{Enabled: &on}); err != nil {
			h.t.Fatal(err)
		}
	}
}

// look makes the service look at a webhook by its clock, and waits until the receiver has n requests.
func (h *harness) look(w webhook.Webhook, r *receiver, n int) {
	h.t.Helper()
	if _, err := h.Change(h.t.Context(), w.OrgID, w.ID, webhook.Change{}); err != nil {
		h.t.Fatal(err)
	}
	eventually(h.t, fmt.Sprintf("request %d", n), func() bool { return len(r.requests()) >= n })
}

// TestRetries moves the clock over the waits. The webhook is disabled after three days with an event, keeps what is
// pending, and makes it when it is enabled again.
func TestRetries(t *testing.T) {
	h := open(t, nil)
	status, after := http.StatusInternalServerError, ""
	r := newReceiver(t, nil)
	r.answer = func(w http.ResponseWriter, _ request) {
		w.Header().Set("Retry-After", after)
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(status)
	}
	h.org("org_a")
	w := h.hook("org_a", r.URL)
	watcher := newReceiver(t, nil)
	h.hook("org_a", watcher.URL, "webhook.disabled")
	h.happen("org_a", "key")
	one := func() webhook.Delivery {
		t.Helper()
		for _, d := range h.deliveries(w) {
			if d.Type == "api_key.created" {
				return d
			}
		}
		return webhook.Delivery{} // it is not queued yet
	}
	attempted := func(n int) webhook.Delivery {
		t.Helper()
		eventually(t, fmt.Sprintf("attempt %d", n), func() bool { return one().Attempts >= n })
		return one()
	}
	for i, c := range []struct {
		status int
		after  string
		least  time.Duration
		text   string
	}{
		{500, "", 4 * time.Second, "the receiver answered 500"},
		{302, "", 24 * time.Second, "the receiver answered 302, and redirects are not followed"},
		{429, "7200", 2 * time.Hour, "the receiver answered 429"},
	} {
		if i > 0 {
			h.clock.move(one().NextAt.Sub(h.clock.now()) + time.Second)
			status, after = c.status, c.after
			h.look(w, r, i+1)
		}
		d := attempted(i + 1)
		if wait := d.NextAt.Sub(d.Last.At); wait < c.least || d.Last.Error != c.text || d.Last.Status != c.status && i > 0 {
			t.Errorf("attempt %d is %+v, and the next is %s later", i+1, d.Last, wait)
		}
	}
	status, after = 503, ""
	h.clock.move(3 * 24 * time.Hour)
	h.look(w, r, 4)
	eventually(t, "that the webhook is disabled", func() bool { return !h.read(w).Enabled })
	got := h.read(w)
	if got.Reason != webhook.Failing || got.Pending == 0 {
		t.Errorf("after three days it is %+v", got)
	}
	eventually(t, "the event", func() bool { return len(watcher.requests()) > 0 })
	page, err := h.feed.Read(t.Context(), event.Query{OrgID: "org_a", After: event.Oldest, Limit: 100,
		Types: []event.Type{event.WebhookDisabled}})
	if err != nil || len(page.Events) != 1 || page.Events[0].Reason != "failing" || page.Events[0].WebhookID != w.ID {
		t.Errorf("the events are %+v, %v", page.Events, err)
	}
	before := len(r.requests())
	h.happen("org_a", "missed")
	status = http.StatusOK
	if _, err := h.Change(t.Context(), "org_a", w.ID, webhook.Change{Enabled: new(true)}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what was pending", func() bool { return h.read(w).Pending == 0 })
	for _, name := range names(r.requests()[before:]) {
		if name == "missed" {
			t.Error("an event from when the webhook was disabled was delivered")
		}
	}
	if ids := r.ids(); one().Attempts != 1 || len(ids) != len(h.deliveries(w)) {
		t.Errorf("%d ids for %d deliveries, %+v", len(ids), len(h.deliveries(w)), one())
	}
}

// TestGone checks that a receiver ends its deliveries with 410.
func TestGone(t *testing.T) {
	h := open(t, nil)
	r := newReceiver(t, func(w http.ResponseWriter, _ request) { w.WriteHeader(http.StatusGone) })
	h.org("org_a")
	w := h.hook("org_a", r.URL)
	h.happen("org_a", "key")
	eventually(t, "that the webhook is disabled", func() bool { return !h.read(w).Enabled })
	if got := h.read(w); got.Reason != webhook.Gone || got.Pending != 1 {
		t.Errorf("it is %+v", got)
	}
}

// TestBacklog checks that a webhook with too much pending is disabled.
func TestBacklog(t *testing.T) {
	h := open(t, func(c *webhook.Config) { c.Bounds = webhook.Bounds{Deliveries: 3, Bytes: 1 << 20} })
	r := newReceiver(t, func(w http.ResponseWriter, _ request) { w.WriteHeader(http.StatusInternalServerError) })
	h.org("org_a")
	w := h.hook("org_a", r.URL)
	h.happen("org_a", "a", "b", "c", "d", "e")
	eventually(t, "that the webhook is disabled", func() bool { return !h.read(w).Enabled })
	if got := h.read(w); got.Reason != webhook.Backlog || got.Pending < 4 {
		t.Errorf("it is %+v", got)
	}
}

// TestReplay delivers events again that were made, and events from before the webhook.
func TestReplay(t *testing.T) {
	h := open(t, nil)
	r := newReceiver(t, nil)
	h.org("org_a")
	last, err := h.feed.Last(t.Context(), "org_a")
	if err != nil {
		t.Fatal(err)
	}
	h.happen("org_a", "before")
	w := h.hook("org_a", r.URL, "api_key.created")
	h.happen("org_a", "after")
	h.settled(w, 1)
	first := r.ids()
	got, err := h.Replay(t.Context(), "org_a", w.ID, last)
	if err != nil || got.Queued != 2 || got.More {
		t.Fatalf("replayed %+v, %v", got, err)
	}
	h.settled(w, 2)
	ids := r.ids()
	if n := names(r.requests()); len(n) != 3 || len(ids) != 2 || ids[0] != first[0] || !slices.Contains(n[1:], "before") {
		t.Errorf("got %q with the ids %q", n, ids)
	}
	if got, err := h.Replay(t.Context(), "org_a", w.ID, got.Through); err != nil || got.Queued != 0 || got.More {
		t.Errorf("a replay of nothing is %+v, %v", got, err)
	}
	if _, err := h.Replay(t.Context(), "org_b", w.ID, last); !fault.Is(err, fault.NotFound) {
		t.Errorf("another organization replayed: %v", err)
	}
	if _, err := h.db.TrimEvents(t.Context(), time.Now().Add(time.Hour), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Replay(t.Context(), "org_a", w.ID, last); !fault.Is(err, fault.Gone) {
		t.Errorf("a replay of dropped events: %v", err)
	}
	if _, err := h.Change(t.Context(), "org_a", w.ID, webhook.Change{Enabled: new(false)}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Replay(t.Context(), "org_a", w.ID, event.Oldest); !fault.Is(err, fault.Conflict) {
		t.Errorf("a replay to a disabled webhook: %v", err)
	}
}

// TestTest tests webhooks: one that answers, a disabled one, one that fails, and one that a test of its own waits for.
func TestTest(t *testing.T) {
	h := open(t, nil)
	h.org("org_a")
	good := newReceiver(t, func(w http.ResponseWriter, _ request) { fmt.Fprint(w, "thanks\x00") })
	w := h.hook("org_a", good.URL)
	if _, err := h.Change(t.Context(), "org_a", w.ID, webhook.Change{Enabled: new(false)}); err != nil {
		t.Fatal(err)
	}
	a, err := h.Test(t.Context(), "org_a", w.ID)
	if err != nil || a.Status != 200 || a.Error != "" || a.Answer != "thanks\uFFFD" || a.Took <= 0 {
		t.Errorf("got %+v, %v", a, err)
	}
	if got := good.requests(); len(got) != 1 || !strings.HasPrefix(got[0].body, `{"type":"webhook.test",`) ||
		!strings.Contains(got[0].body, w.ID) {
		t.Errorf("the receiver got %q", names(got))
	}
	if d := h.deliveries(w); len(d) != 0 {
		t.Errorf("the test is among the deliveries: %+v", d)
	}
	began, end := make(chan struct{}), make(chan struct{})
	slow := h.hook("org_a", newReceiver(t, func(w http.ResponseWriter, _ request) {
		close(began)
		<-end
		w.WriteHeader(http.StatusTeapot)
	}).URL, "org.created")
	done := make(chan webhook.Attempt, 1)
	go func() {
		a, err := h.Test(t.Context(), "org_a", slow.ID)
		if err != nil {
			t.Error(err)
		}
		done <- a
	}()
	<-began
	if _, err := h.Test(t.Context(), "org_a", slow.ID); fault.As(err) == nil ||
		fault.As(err).Code != fault.CodeWebhookBusy {
		t.Errorf("a second test at once: %v", err)
	}
	close(end)
	if a := <-done; a.Status != http.StatusTeapot || a.Error != "the receiver answered 418" {
		t.Errorf("got %+v", a)
	}
	if _, err := h.Test(t.Context(), "org_b", w.ID); !fault.Is(err, fault.NotFound) {
		t.Errorf("another organization tested: %v", err)
	}
}

// TestIdle checks that events are not kept for webhooks when there are none.
func TestIdle(t *testing.T) {
	h := open(t, nil)
	h.org("org_a")
	h.happen("org_a", "a", "b")
	consumed := func() bool {
		_, found, err := h.db.Consumed(t.Context(), webhook.Consumer)
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	if consumed() {
		t.Error("without a webhook there is a consumer")
	}
	r := newReceiver(t, nil)
	w := h.hook("org_a", r.URL)
	if h.happen("org_a", "c"); !consumed() {
		t.Error("with a webhook there is no consumer")
	}
	h.settled(w, 1)
	if got := names(r.requests()); !slices.Equal(got, []string{"c"}) {
		t.Errorf("got %q", got)
	}
	if err := h.Service.Delete(t.Context(), "org_a", w.ID); err != nil {
		t.Fatal(err)
	}
	h.happen("org_a", "unseen")
	absent := 0 // looks in a row
	eventually(t, "that the consumer ends for good", func() bool {
		if absent++; consumed() {
			absent = 0
		}
		return absent == 200
	})
	h.hook("org_a", r.URL+"/again")
	h.happen("org_a", "d")
	eventually(t, "the event after it was idle", func() bool { return slices.Contains(names(r.requests()), "d") })
}

// TestEventsFromBefore hands old events over again. A webhook gets none from before it was made.
func TestEventsFromBefore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cay.db")
	h := start(t, path, nil)
	r := newReceiver(t, nil)
	h.org("org_a")
	first := h.hook("org_a", r.URL+"/first", "api_key.created")
	h.happen("org_a", "before")
	h.settled(first, 1)
	second := h.hook("org_a", r.URL+"/second", "api_key.created")
	h.stop()
	db, err := store.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.SetConsumed(t.Context(), webhook.Consumer, 0), db.Close()); err != nil {
		t.Fatal(err)
	}
	h = start(t, path, nil)
	h.happen("org_a", "after")
	h.settled(second, 1)
	if got := names(r.requests()); slices.Contains(got[1:], "before") {
		t.Errorf("got %q", got)
	}
}
