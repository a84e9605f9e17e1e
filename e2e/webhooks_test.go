package e2e

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// hookReceiver is a receiver of webhooks on the loopback.
type hookReceiver struct {
	*httptest.Server
	hold atomic.Bool   // answer nothing until the caller goes
	held chan struct{} // gets a value for each request that is held

	mu  sync.Mutex
	got []hookRequest
}

type hookRequest struct {
	header http.Header
	body   string
}

func newHookReceiver(t *testing.T) *hookReceiver {
	t.Helper()
	r := &hookReceiver{held: make(chan struct{}, 1000)}
	r.Server = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return // the server was killed
		}
		r.mu.Lock()
		r.got = append(r.got, hookRequest{req.Header, string(body)})
		r.mu.Unlock()
		if r.hold.Load() {
			r.held <- struct{}{}
			<-req.Context().Done()
		}
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *hookReceiver) requests() []hookRequest {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

// awaitRequests waits until a receiver has requests that ok accepts, and returns them.
func (s *server) awaitRequests(r *hookReceiver, what string, ok func([]hookRequest) bool) []hookRequest {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) { // a poll with a deadline
		if got := r.requests(); ok(got) {
			return got
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the receiver has %d requests, and not %s", len(r.requests()), what)
		}
	}
}

// signed reports whether a request has the signature of Standard Webhooks.
func (r hookRequest) signed(secret string) bool {
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret, "whsec_"))
	if err != nil {
		return false
	}
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.%s", r.header.Get("webhook-id"), r.header.Get("webhook-timestamp"), r.body)
	return r.header.Get("webhook-signature") == "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// TestWebhooksAcrossKills kills the server with SIGKILL in the middle of deliveries. The receiver gets each event of
// the feed at least once, with a signature, and those about one sandbox in their order.
func TestWebhooksAcrossKills(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t, "CAY_WEBHOOKS_ALLOW_CIDRS=127.0.0.0/8")
	s.start()
	s.needTemplate("python")
	receiver := newHookReceiver(t)
	hook, err := s.api().CreateWebhook(t.Context(), cay.CreateWebhookRequest{URL: receiver.URL})
	if err != nil {
		t.Fatal(err)
	}
	secret := *hook.Secret
	makeKey := func(name string) {
		t.Helper()
		if _, err := s.api().CreateAPIKey(t.Context(), cay.CreateAPIKeyRequest{Name: name,
			Scopes: []string{"exec"}}); err != nil {
			t.Fatal(err)
		}
	}
	const kills = 4
	for round := range kills {
		id := s.persistent(nil)
		s.suspend(id)
		s.want(id, "true") // this wakes it
		for i := range 5 {
			makeKey(fmt.Sprint(round, " ", i))
		}
		s.destroy(id)
		receiver.hold.Store(true)
		makeKey(fmt.Sprint("held ", round))
		select {
		case <-receiver.held:
		case <-time.After(patience):
			t.Fatal("no delivery arrives")
		}
		s.stop(syscall.SIGKILL)
		receiver.hold.Store(false)
		s.start()
	}
	for _, id := range s.sandboxes("running") {
		s.waitState(id, "destroyed")
	}
	var want []cay.FeedEvent
	complete := func(got []hookRequest) bool {
		seen := map[string]bool{}
		for _, r := range got {
			seen[eventIn(t, r).ID] = true
		}
		// The first events are from before the webhook, and one is its own.
		want = slices.DeleteFunc(s.allEvents(), func(e cay.FeedEvent) bool {
			return e.WebhookID != nil || e.Time.Before(hook.CreatedAt)
		})
		// In each round the server was killed before the receiver had answered.
		return !slices.ContainsFunc(want, func(e cay.FeedEvent) bool { return !seen[e.ID] }) && len(got) >= len(want)+kills
	}
	got := s.awaitRequests(receiver, "all events, and again those that were under way", complete)
	checkHookOrder(t, got, secret)
	t.Logf("%d requests for %d events", len(got), len(want))
	makeKey("the last")
	s.awaitHookMetrics()
	s.mustNotLog(secret)
}

// checkHookOrder checks the signatures of requests, and that those about a sandbox came first in their order.
func checkHookOrder(t *testing.T, got []hookRequest, secret string) {
	t.Helper()
	last := map[string]string{} // the last new event of a sandbox
	seen := map[string]bool{}
	for _, r := range got {
		e := eventIn(t, r)
		if !r.signed(secret) {
			t.Errorf("the signature is wrong: %v %s", r.header, r.body)
		}
		if seen[e.ID] || e.SandboxID == nil {
			continue
		}
		seen[e.ID] = true
		if e.ID < last[*e.SandboxID] {
			t.Errorf("event %s of %s came after %s", e.ID, *e.SandboxID, last[*e.SandboxID])
		}
		last[*e.SandboxID] = e.ID
	}
}

// awaitHookMetrics waits until the metrics say that deliveries were made and none is pending.
func (s *server) awaitHookMetrics() {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) { // a poll with a deadline
		text := s.metrics()
		if strings.Contains(text, `cay_webhook_attempt_seconds_count{outcome="delivered"}`) &&
			strings.Contains(text, "cay_webhook_deliveries_pending 0\n") &&
			strings.Contains(text, "cay_webhook_oldest_pending_seconds 0\n") {
			break
		}
		if time.Now().After(deadline) {
			s.t.Fatal("the metrics lack webhooks")
		}
	}
}

// mustNotLog fails the test if the server's log has a text.
func (s *server) mustNotLog(text string) {
	s.t.Helper()
	log, err := os.ReadFile(s.logFile())
	if err != nil {
		s.t.Fatal(err)
	}
	if strings.Contains(string(log), text) {
		s.t.Error("the log has the secret of a webhook")
	}
}

// eventIn returns the event of a request.
func eventIn(t *testing.T, r hookRequest) cay.FeedEvent {
	t.Helper()
	var b struct{ Data cay.FeedEvent }
	if err := json.Unmarshal([]byte(r.body), &b); err != nil {
		t.Fatal(err)
	}
	return b.Data
}

// TestWebhooksStayOutside checks that webhooks reach no address that sandboxes may not reach: not by an address, nor by
// a name, a redirect or another form of an address.
func TestWebhooksStayOutside(t *testing.T) {
	s := shared(t).tenant("webhooks-outside", nil)
	receiver := newHookReceiver(t)
	_, port, err := net.SplitHostPort(receiver.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	addresses, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	hosts := []string{"127.0.0.1", "127.1.2.3", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254",
		"224.0.0.1", "255.255.255.255"}
	for _, a := range addresses { // the machine's own
		if ip := a.(*net.IPNet).IP; ip.To4() != nil {
			hosts = append(hosts, ip.String())
		}
	}
	for _, host := range hosts {
		_, err := s.api().CreateWebhook(t.Context(), cay.CreateWebhookRequest{URL: "http://" + host + ":" + port + "/"})
		if !cay.HasCode(err, "invalid_url") {
			t.Errorf("%s: %v", host, err)
		}
	}
	for _, host := range []string{"localhost", "2130706433", "0x7f.1", "127.1"} {
		hook, err := s.api().CreateWebhook(t.Context(), cay.CreateWebhookRequest{URL: "http://" + host + ":" + port + "/",
			Types: []string{"org.created"}})
		if err != nil {
			t.Fatalf("%s: %v", host, err)
		}
		got, err := s.api().TestWebhook(t.Context(), hook.ID)
		if err != nil || got.Delivered || got.Error == nil || strings.Contains(*got.Error, "127.0.0.1") {
			t.Errorf("%s: %+v, %v", host, got, err)
		}
		if host == "localhost" && *got.Error != "webhooks may not call this address" {
			t.Errorf("%s: %s", host, *got.Error)
		}
	}
	if got := receiver.requests(); len(got) != 0 {
		t.Errorf("%d requests arrived", len(got))
	}
}

// TestE2BWebhooks follows a real sandbox with a webhook that E2B's API made.
func TestE2BWebhooks(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t, "CAY_WEBHOOKS_ALLOW_CIDRS=127.0.0.0/8")
	s.start()
	s.needTemplate("python")
	receiver := newHookReceiver(t)
	body, err := json.Marshal(object{"name": "mine", "url": receiver.URL, "signatureSecret": "a secret",
		"events": []string{"sandbox.lifecycle.created", "sandbox.lifecycle.paused", "sandbox.lifecycle.resumed",
			"sandbox.lifecycle.killed"}})
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(t.Context(), "POST", s.url+"/events/webhooks", strings.NewReader(string(body)))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-API-Key", s.key)
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusCreated {
		t.Fatalf("making a webhook: %d", answer.StatusCode)
	}
	id := s.persistent(nil)
	s.suspend(id)
	s.want(id, "true") // this wakes it
	s.destroy(id)
	got := s.awaitRequests(receiver, "4 requests", func(got []hookRequest) bool { return len(got) >= 4 })
	var kinds []string
	for _, one := range got {
		sum := sha256.Sum256([]byte("a secret" + one.body))
		var e struct {
			Type    string `json:"type"`
			Sandbox string `json:"sandbox_id"`
		}
		if err := json.Unmarshal([]byte(one.body), &e); err != nil || e.Sandbox != strings.TrimPrefix(id, "sbx_") ||
			one.header.Get("e2b-signature") != base64.RawStdEncoding.EncodeToString(sum[:]) {
			t.Errorf("a request is %v %s, %v", one.header, one.body, err)
		}
		kinds = append(kinds, strings.TrimPrefix(e.Type, "sandbox.lifecycle."))
	}
	if !slices.Equal(kinds, []string{"created", "paused", "resumed", "killed"}) {
		t.Errorf("the receiver got %q", kinds)
	}
}
