package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/webhook"
	"github.com/cayhq/cay/internal/webhook/sender"
	cay "github.com/cayhq/cay/sdk/go"
)

// permitTests lets webhooks call the loopback, where the receivers of tests are, and no private network.
func permitTests(to netip.AddrPort) error {
	if to.Addr().IsPrivate() {
		return errors.New("it is private")
	}
	return nil
}

// openHooks opens the room of webhooks and runs it until stop is called.
func (h *testServer) openHooks(t testing.TB, log *slog.Logger) (stop func()) {
	t.Helper()
	post := sender.New(sender.Config{UserAgent: "cay/test", Permit: permitTests})
	h.hooks = webhook.New(webhook.Config{MaxPerOrg: 5, Concurrency: 8, Log: log}, h.db, h.feed, post,
		map[webhook.Format]webhook.Wire{webhook.Standard: webhook.NewStandard(EncodeEvent)})
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var wg sync.WaitGroup
	wg.Go(func() { h.hooks.Run(ctx) })
	return func() { cancel(); wg.Wait(); post.Close() }
}

// hookReceiver is a server that records the bodies that it is sent, and answers with a status.
type hookReceiver struct {
	*httptest.Server

	mu     sync.Mutex
	status int
	bodies []string
}

func newHookReceiver(t *testing.T) *hookReceiver {
	t.Helper()
	r := &hookReceiver{status: http.StatusOK}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body) // a test compares what came
		r.mu.Lock()
		defer r.mu.Unlock()
		r.bodies = append(r.bodies, string(body))
		w.WriteHeader(r.status)
		fmt.Fprint(w, "noted")
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *hookReceiver) answerWith(status int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status = status
}

// awaitBodies waits until the receiver has n bodies.
func (r *hookReceiver) awaitBodies(t *testing.T, n int) []string {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		r.mu.Lock()
		got := slices.Clone(r.bodies)
		r.mu.Unlock()
		if len(got) >= n {
			return got
		}
		if time.Now().After(deadline) { // a poll with a deadline
			t.Fatalf("the receiver has %d bodies, want %d", len(got), n)
		}
	}
}

// awaitDelivery waits until a webhook's newest delivery is as ok wants it.
func (h *testServer) awaitDelivery(t *testing.T, id string, ok func(Delivery) bool) Delivery {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		r := h.send(t, "GET", "/v1/webhooks/"+id+"/deliveries?limit=1", h.key, "")
		if all := as[DeliveryList](t, 200, r).Deliveries; len(all) == 1 && ok(all[0]) {
			return all[0]
		}
		if time.Now().After(deadline) { // a poll with a deadline
			t.Fatalf("the deliveries are %s", r.body)
		}
	}
}

// TestLifeOfAWebhook makes a webhook, whose receiver gets events as the feed shows them, and changes it.
func TestLifeOfAWebhook(t *testing.T) {
	h := newTestServer(t)
	receiver := newHookReceiver(t)
	r := h.send(t, "POST", "/v1/webhooks", h.key,
		`{"url":"`+receiver.URL+`/hook","name":"ops","types":["api_key.created","api_key.revoked"]}`)
	hook := as[Webhook](t, 201, r)
	path := "/v1/webhooks/" + hook.ID
	if r.header.Get("Location") != path || hook.Secret == nil || !strings.HasPrefix(*hook.Secret, "whsec_") ||
		*hook.Name != "ops" || !hook.Enabled || hook.Format != "standard" || len(hook.Types) != 2 {
		t.Errorf("created %s", r.body)
	}
	secret := *hook.Secret
	hook.Secret = nil
	same := as[Webhook](t, 200, h.send(t, "GET", path, h.key, ""))
	if diff := cmp.Diff(hook, same); diff != "" {
		t.Errorf("read it differs (-created +read):\n%s", diff)
	}
	as[NewAPIKey](t, 201, h.send(t, "POST", "/v1/api-keys", h.key, `{"name":"ci","scopes":["exec"]}`))
	var sent struct {
		Type, Timestamp string
		Data            FeedEvent
	}
	if err := json.Unmarshal([]byte(receiver.awaitBodies(t, 1)[0]), &sent); err != nil {
		t.Fatal(err)
	}
	all := h.feedOf(t, h.key, "type=api_key.created")
	if diff := cmp.Diff(all[len(all)-1], sent.Data); diff != "" ||
		sent.Type != "api_key.created" || sent.Timestamp == "" {
		t.Errorf("sent %+v (-feed +sent):\n%s", sent, diff)
	}
	made := h.awaitDelivery(t, hook.ID, func(d Delivery) bool { return d.Status == DeliveryStatusDelivered })
	if made.EventID != sent.Data.ID || made.Attempts != 1 || made.LastAttempt == nil || !made.LastAttempt.Delivered ||
		*made.LastAttempt.StatusCode != 200 || *made.LastAttempt.Answer != "noted" || made.DeliveredAt == nil {
		t.Errorf("the delivery is %+v", made)
	}

	if strings.Contains(h.log.String(), secret) {
		t.Error("the log has the secret")
	}
	if r := h.send(t, "DELETE", path, h.key, ""); r.status != 204 || len(r.body) != 0 {
		t.Errorf("deleting: %d %s", r.status, r.body)
	}
	for _, call := range [][2]string{{"GET", path}, {"DELETE", path}, {"GET", path + "/deliveries"}} {
		if r := h.send(t, call[0], call[1], h.key, ""); r.status != 404 || r.problem.Code != "webhook_not_found" {
			t.Errorf("%s after it is deleted: %d %s", call, r.status, r.body)
		}
	}
}

// TestWebhookThatFails has a receiver that fails and then answers, and replays what it got.
func TestWebhookThatFails(t *testing.T) {
	h := newTestServer(t)
	receiver := newHookReceiver(t)
	hook := as[Webhook](t, 201, h.send(t, "POST", "/v1/webhooks", h.key,
		`{"url":"`+receiver.URL+`","types":["api_key.created","api_key.revoked"]}`))
	path := "/v1/webhooks/" + hook.ID
	secret := *hook.Secret
	key := as[NewAPIKey](t, 201, h.send(t, "POST", "/v1/api-keys", h.key, `{"name":"ci","scopes":["exec"]}`))
	receiver.awaitBodies(t, 1)
	first := h.feedOf(t, h.key, "")[0].ID
	receiver.answerWith(http.StatusInternalServerError)
	if r := h.send(t, "DELETE", "/v1/api-keys/"+key.ID, h.key, ""); r.status != 204 {
		t.Fatalf("revoking: %s", r.body)
	}
	failed := h.awaitDelivery(t, hook.ID, func(d Delivery) bool { return d.Type == "api_key.revoked" && d.Attempts == 1 })
	if failed.Status != DeliveryStatusPending || failed.NextAttemptAt == nil || failed.LastAttempt.Delivered ||
		*failed.LastAttempt.Error != "the receiver answered 500" {
		t.Errorf("the failed delivery is %+v", failed)
	}
	if got := as[Webhook](t, 200, h.send(t, "GET", path, h.key, "")); got.Pending != 1 {
		t.Errorf("pending is %d", got.Pending)
	}
	tested := as[WebhookAttempt](t, 200, h.send(t, "POST", path+"/test", h.key, ""))
	if tested.Delivered || *tested.StatusCode != 500 || *tested.Answer != "noted" {
		t.Errorf("the test is %+v", tested)
	}
	receiver.answerWith(http.StatusNoContent)
	disabled := as[Webhook](t, 200, h.send(t, "PATCH", path, h.key, `{"enabled":false}`))
	if disabled.Enabled || *disabled.DisabledReason != "requested" || disabled.DisabledAt == nil {
		t.Errorf("disabled it is %+v", disabled)
	}
	if r := h.send(t, "POST", path+"/replay", h.key, `{"after":"`+first+`"}`); r.status != 409 ||
		r.problem.Code != "webhook_disabled" {
		t.Errorf("replaying while it is disabled: %d %s", r.status, r.body)
	}
	rotated := as[Webhook](t, 200, h.send(t, "PATCH", path, h.key, `{"enabled":true,"rotate_secret":true,"types":[]}`))
	if !rotated.Enabled || rotated.Secret == nil || *rotated.Secret == secret || len(rotated.Types) != 0 {
		t.Errorf("enabled with another secret it is %+v", rotated)
	}
	h.awaitDelivery(t, hook.ID, func(d Delivery) bool { return d.Status == DeliveryStatusDelivered })

	if strings.Contains(h.log.String(), *rotated.Secret) {
		t.Error("the log has the secret")
	}
	h.replay(t, receiver, path, first)
}

// replay delivers the events after an id again, and lists their deliveries.
func (h *testServer) replay(t *testing.T, receiver *hookReceiver, path, after string) {
	t.Helper()
	before := len(receiver.awaitBodies(t, 1))
	replayed := as[Replayed](t, 200, h.send(t, "POST", path+"/replay", h.key, `{"after":"`+after+`"}`))
	if replayed.Queued < 3 || replayed.More || replayed.Through <= after {
		t.Errorf("replayed %+v", replayed)
	}
	receiver.awaitBodies(t, before+replayed.Queued)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		if as[Webhook](t, 200, h.send(t, "GET", path, h.key, "")).Pending == 0 {
			break
		}
		if time.Now().After(deadline) { // a poll with a deadline
			t.Fatal("the replayed deliveries stay pending")
		}
	}
	seen := map[string]bool{}
	for cursor := ""; ; {
		page := as[DeliveryList](t, 200, h.send(t, "GET", path+"/deliveries?status=delivered&limit=2"+cursor, h.key, ""))
		for _, d := range page.Deliveries {
			seen[d.ID] = true
		}
		if page.NextCursor == nil {
			break
		}
		cursor = "&cursor=" + *page.NextCursor
	}
	if len(seen) < replayed.Queued {
		t.Errorf("%d deliveries are listed, and %d were replayed", len(seen), replayed.Queued)
	}
}

func TestWebhooksRefused(t *testing.T) {
	h := newTestServer(t)
	hook := as[Webhook](t, 201, h.send(t, "POST", "/v1/webhooks", h.key, `{"url":"https://example.com/"}`))
	path := "/v1/webhooks/" + hook.ID
	create := func(name, body, code, field string) refusal {
		return refusal{name, "POST", "/v1/webhooks", body, nil, 400, code, field}
	}
	change := func(name, body, code, field string) refusal {
		return refusal{name, "PATCH", path, body, nil, 400, code, field}
	}
	h.check(t, []refusal{
		create("no body", "", "missing_body", ""),
		create("unknown field", `{"url":"https://example.com/","format":"e2b"}`, "unknown_field", "format"),
		create("no URL", `{}`, "invalid_url", "url"),
		create("private address", `{"url":"https://192.168.1.1/"}`, "invalid_url", "url"),
		create("unknown type", `{"url":"https://example.com/","types":["x"]}`, "invalid_types", "types"),
		create("type of another type", `{"url":"https://example.com/","types":[1]}`, "invalid_types", "types[0]"),
		create("empty secret", `{"url":"https://example.com/","secret":""}`, "invalid_secret", "secret"),
		create("short secret", `{"url":"https://example.com/","secret":"whsec_AAAA"}`, "invalid_secret", "secret"),
		change("no body", "", "missing_body", ""),
		change("URL", `{"url":"ftp://example.com/"}`, "invalid_url", "url"),
		change("both secrets", `{"rotate_secret":true,"secret":"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}`,
			"invalid_secret", "secret"),
		change("enabled a text", `{"enabled":"yes"}`, "invalid_enabled", "enabled"),
		{"test with a field", "POST", path + "/test", `{"a":1}`, nil, 400, "unknown_field", "a"},
		{"replay of no id", "POST", path + "/replay", `{"after":"x"}`, nil, 400, "invalid_after", "after"},
		{"replay without after", "POST", path + "/replay", `{}`, nil, 400, "invalid_after", "after"},
		{"deliveries of a status", "GET", path + "/deliveries?status=lost", "", nil, 400, "invalid_status", "status"},
		{"deliveries after a cursor", "GET", path + "/deliveries?cursor=x", "", nil, 400, "invalid_cursor", "cursor"},
		{"a limit", "GET", "/v1/webhooks?limit=0", "", nil, 400, "invalid_limit", "limit"},
		{"none", "GET", "/v1/webhooks/whk_none", "", nil, 404, "webhook_not_found", ""},
	})
	for range 4 {
		as[Webhook](t, 201, h.send(t, "POST", "/v1/webhooks", h.key, `{"url":"https://example.com/"}`))
	}
	h.check(t, []refusal{{"one too many", "POST", "/v1/webhooks", `{"url":"https://example.com/"}`, nil, 429,
		"quota_exceeded", ""}})
}

func clientWebhooks(t *testing.T, ctx context.Context, c *cay.Client, fatal func(error)) {
	receiver := newHookReceiver(t)
	w, err := c.CreateWebhook(ctx, cay.CreateWebhookRequest{URL: receiver.URL, Types: []string{"api_key.created"}})
	fatal(err)
	other, err := c.CreateWebhook(ctx, cay.CreateWebhookRequest{URL: receiver.URL, Name: new("other")})
	fatal(err)
	n := 0
	for got, err := range c.Webhooks(ctx, cay.ListOptions{Limit: 1}) {
		fatal(err)
		if n++; n == 2 && got.ID != w.ID || got.Secret != nil {
			t.Errorf("webhook %d is %+v", n, got)
		}
	}
	changed, err := c.UpdateWebhook(ctx, w.ID, cay.UpdateWebhookRequest{Types: &[]string{}, Enabled: new(false)})
	fatal(err)
	read, err := c.GetWebhook(ctx, w.ID)
	fatal(err)
	if diff := cmp.Diff(changed, read); diff != "" || n != 2 || w.Secret == nil || len(read.Types) != 0 || read.Enabled {
		t.Errorf("%d webhooks; changed it is %+v, read %s", n, changed, diff)
	}
	fatal(c.DeleteWebhook(ctx, other.ID))
	attempt, err := c.TestWebhook(ctx, w.ID)
	fatal(err)
	if !attempt.Delivered || *attempt.StatusCode != 200 {
		t.Errorf("the test is %+v", attempt)
	}
	_, err = c.UpdateWebhook(ctx, w.ID, cay.UpdateWebhookRequest{Enabled: new(true)})
	fatal(err)
	var first string
	for e, err := range c.Feed(ctx, cay.FeedOptions{}) {
		fatal(err)
		first = e.ID
		break
	}
	replayed, err := c.ReplayWebhook(ctx, w.ID, first)
	fatal(err)
	receiver.awaitBodies(t, 1+replayed.Queued)
	n = 0
	for d, err := range c.Deliveries(ctx, w.ID, cay.ListDeliveriesOptions{Status: "delivered",
		ListOptions: cay.ListOptions{Limit: 5}}) {
		fatal(err)
		if n++; d.Status != cay.DeliveryStatusDelivered {
			t.Errorf("a delivery is %+v", d)
		}
	}
	if replayed.Queued < 10 || n < replayed.Queued/2 {
		t.Errorf("replayed %+v, and %d deliveries are made", replayed, n)
	}
}
