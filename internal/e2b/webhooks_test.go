package e2b

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
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

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/webhook"
	"github.com/cayhq/cay/internal/webhook/sender"
)

// openHooks opens the room of webhooks and runs it until stop is called.
func (h *harness) openHooks(feed *event.Feed, log *slog.Logger) (stop func()) {
	post := sender.New(sender.Config{Permit: func(netip.AddrPort) error { return nil }})
	h.hooks = webhook.New(webhook.Config{MaxPerOrg: 3, Concurrency: 8, Log: log}, h.db, feed, post,
		map[webhook.Format]webhook.Wire{webhook.E2B: NewWire(h.sandboxes),
			webhook.Standard: webhook.NewStandard(func(e event.Event) ([]byte, error) { return json.Marshal(e) })})
	ctx, cancel := context.WithCancel(context.WithoutCancel(h.t.Context()))
	var wg sync.WaitGroup
	wg.Go(func() { h.hooks.Run(ctx) })
	return func() { cancel(); wg.Wait(); post.Close() }
}

// hookReceiver is a server that records the requests that it is sent.
type hookReceiver struct {
	*httptest.Server

	mu  sync.Mutex
	got []hookRequest
}

type hookRequest struct {
	header http.Header
	body   string
}

func newHookReceiver(t *testing.T) *hookReceiver {
	t.Helper()
	r := &hookReceiver{}
	r.Server = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
		body, _ := io.ReadAll(req.Body) // a test compares what came
		r.mu.Lock()
		defer r.mu.Unlock()
		r.got = append(r.got, hookRequest{req.Header, string(body)})
	}))
	t.Cleanup(r.Close)
	return r
}

// await waits until the receiver has n requests, and returns them.
func (r *hookReceiver) await(t *testing.T, n int) []hookRequest {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(2 * time.Millisecond) {
		r.mu.Lock()
		got := slices.Clone(r.got)
		r.mu.Unlock()
		if len(got) >= n {
			return got
		}
		if time.Now().After(deadline) { // a poll with a deadline
			t.Fatalf("the receiver has %d requests, want %d", len(got), n)
		}
	}
}

// verified reports whether a receiver of E2B's would take a request.
func (r hookRequest) verified(secret string) bool {
	sum := sha256.Sum256([]byte(secret + r.body))
	want := strings.TrimRight(base64.StdEncoding.EncodeToString(sum[:]), "=")
	return r.header.Get("E2b-Signature") == want && r.header.Get("E2b-Signature-Version") == "v1"
}

// TestWebhooks makes, reads, changes and deletes webhooks as E2B's documents say, and follows their deliveries.
func TestWebhooks(t *testing.T) {
	h := newHarness(t)
	admin := h.newKey(auth.Admin)
	receiver := newHookReceiver(t)
	call := func(status int, method, path, body string) (out webhookBody) {
		t.Helper()
		r := h.send(method, "/events/webhooks"+path, body, "X-API-Key", admin)
		if r.status != status {
			t.Fatalf("%s %s: %d %s", method, path, r.status, r.body)
		}
		if strings.Contains(r.body, "a secret") {
			t.Errorf("the answer has the secret: %s", r.body)
		}
		if strings.HasPrefix(r.body, "{") {
			if err := json.Unmarshal([]byte(r.body), &out); err != nil {
				t.Fatal(err)
			}
		}
		return out
	}
	made := call(201, "POST", "", `{"name":"Mine","url":"`+receiver.URL+`","enabled":true,"signatureSecret":"a secret",
		"events":["sandbox.lifecycle.created","sandbox.lifecycle.killed"]}`)
	want := webhookBody{ID: made.ID, TeamID: h.org.Org.ID, Name: "Mine", CreatedAt: made.CreatedAt, Enabled: true,
		URL: receiver.URL, Events: []string{"sandbox.lifecycle.created", "sandbox.lifecycle.killed"}}
	if diff := cmp.Diff(want, made); diff != "" || made.ID == "" || made.CreatedAt.IsZero() {
		t.Errorf("made (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(want, call(200, "GET", "/"+made.ID, "")); diff != "" {
		t.Errorf("read (-want +got):\n%s", diff)
	}
	id, _ := h.create(`{"templateID":"base","metadata":{"a":"b"}}`)
	for _, step := range [][2]string{{"POST", "/pause"}, {"POST", "/connect"}, {"DELETE", ""}} {
		body := ""
		if step[1] == "/connect" {
			body = `{"timeout":60}`
		}
		if r := h.control(step[0], "/sandboxes/"+id+step[1], body); r.status/100 != 2 {
			t.Fatalf("%s: %d %s", step, r.status, r.body)
		}
	}
	got := receiver.await(t, 2)
	h.checkDeliveries(got, made.ID, id, "a secret", "created", "killed")

	changed := call(200, "PATCH", "/"+made.ID, `{"name":"Other","events":["sandbox.lifecycle.paused"],"enabled":false,
		"signatureSecret":"a secret of another kind"}`)
	want.Name, want.Events, want.Enabled = "Other", []string{"sandbox.lifecycle.paused"}, false
	if diff := cmp.Diff(want, changed); diff != "" {
		t.Errorf("changed (-want +got):\n%s", diff)
	}
	if got := call(200, "PATCH", "/"+made.ID, `{"enabled":true}`); !got.Enabled || got.Name != "Other" {
		t.Errorf("enabled %+v", got)
	}
	other, _ := h.create(`{"templateID":"base"}`)
	if r := h.control("POST", "/sandboxes/"+other+"/pause", ""); r.status/100 != 2 {
		t.Fatalf("pausing: %d %s", r.status, r.body)
	}
	h.checkDeliveries(receiver.await(t, 3)[2:], made.ID, other, "a secret of another kind", "paused")

	h.onlyTheirs(admin, made.ID, receiver.URL)
	call(200, "DELETE", "/"+made.ID, "")
	call(404, "DELETE", "/"+made.ID, "")
}

// onlyTheirs checks that the API shows one webhook, which it made, and none that v1 made, and others nothing.
func (h *harness) onlyTheirs(admin, made, url string) {
	t := h.t
	t.Helper()
	standard, err := h.hooks.Create(t.Context(), h.org.Org.ID,
		webhook.NewWebhook{URL: url, Format: webhook.Standard})
	if err != nil {
		t.Fatal(err)
	}
	r := h.send("GET", "/events/webhooks", "", "X-API-Key", admin)
	var all []webhookBody
	if err := json.Unmarshal([]byte(r.body), &all); err != nil || len(all) != 1 || all[0].ID != made {
		t.Errorf("the list is %s, %v", r.body, err)
	}
	for _, method := range []string{"GET", "PATCH", "DELETE"} {
		for key, ids := range map[string][]string{admin: {standard.ID, "whk_none"}, h.other: {made}} {
			for _, id := range ids {
				if r := h.send(method, "/events/webhooks/"+id, "", "X-API-Key", key); r.status != 404 {
					t.Errorf("%s %s: %d %s", method, id, r.status, r.body)
				}
			}
		}
	}
	if r := h.send("GET", "/events/webhooks", "", "X-API-Key", h.other); strings.TrimSpace(r.body) != "[]" {
		t.Errorf("another organization sees %s", r.body)
	}
}

// checkDeliveries checks requests about one sandbox.
func (h *harness) checkDeliveries(got []hookRequest, hook, id, secret string, kinds ...string) {
	h.t.Helper()
	ids := map[string]bool{}
	for i, r := range got {
		var body map[string]any
		if err := json.Unmarshal([]byte(r.body), &body); err != nil {
			h.t.Fatal(err)
		}
		event := body["id"]
		if !r.verified(secret) || r.header.Get("E2b-Webhook-Id") != hook || ids[r.header.Get("E2b-Delivery-Id")] ||
			len(r.header.Get("E2b-Delivery-Id")) != 36 {
			h.t.Errorf("the head of a delivery is %v", r.header)
		}
		ids[r.header.Get("E2b-Delivery-Id")] = true
		label := map[string]string{"created": "create", "killed": "kill", "paused": "pause"}[kinds[i]]
		for name, want := range map[string]any{"type": "sandbox.lifecycle." + kinds[i], "version": "v2", "sandboxId": id,
			"sandbox_id": id, "sandboxTeamId": h.org.Org.ID, "sandbox_team_id": h.org.Org.ID, "event_category": "lifecycle",
			"event_label": label, "sandboxTemplateId": h.row(id).TemplateID, "sandbox_template_id": h.row(id).TemplateID} {
			if body[name] != want {
				h.t.Errorf("delivery %d has the %s %v, want %v", i, name, body[name], want)
			}
		}
		metadata := "map[sandbox_metadata:" + fmt.Sprint(h.row(id).Metadata) + "]"
		if fmt.Sprint(body["event_data"]) != metadata || fmt.Sprint(body["eventData"]) != metadata {
			h.t.Errorf("delivery %d has the data %v", i, body["event_data"])
		}
		// The same event in the API.
		if r := h.control("GET", "/events/sandboxes/"+id, ""); !strings.Contains(r.body, `"id":"`+fmt.Sprint(event)+`"`) {
			h.t.Errorf("the listing has no event %v: %s", event, r.body)
		}
	}
	if len(got) != len(kinds) {
		h.t.Errorf("%d deliveries, want %d", len(got), len(kinds))
	}
}

func TestWebhooksRefused(t *testing.T) {
	h := newHarness(t)
	admin := h.newKey(auth.Admin)
	const good = `"name":"n","url":"https://example.com/","events":["sandbox.lifecycle.created"],"signatureSecret":"s"`
	for body, want := range map[string]string{
		`{}`: "400 name: ",
		`{` + strings.Replace(good, `"n"`, `""`, 1) + `}`:                         "400 name: ",
		`{` + strings.Replace(good, "https", "ftp", 1) + `}`:                      "400 url: ",
		`{` + strings.Replace(good, "created", "born", 1) + `}`:                   "400 events: ",
		`{` + strings.Replace(good, `"sandbox.lifecycle.created"`, ``, 1) + `}`:   "400 events: ",
		`{` + strings.Replace(good, `"s"`, `"\u0000"`, 1) + `}`:                   "400 signatureSecret: ",
		`{` + strings.Replace(good, `"s"`, `""`, 1) + `}`:                         "400 signatureSecret: ",
		`{` + good + `,"headers":{}}`:                                             "501 ",
		`{` + strings.Replace(good, `"events":["`, `"events":["x","`, 1) + `}`:    "400 events: ",
		`{` + strings.Replace(good, `"signatureSecret":"s"`, `"a":1`, 1) + `}`:    "501 ",
		`{` + strings.Replace(good, `,"signatureSecret":"s"`, ``, 1) + `}`:        "400 signatureSecret: ",
		`{` + strings.Replace(good, `"url":"https://example.com/",`, ``, 1) + `}`: "400 url: ",
	} {
		r := h.send("POST", "/events/webhooks", body, "X-API-Key", admin)
		var p struct{ Message string }
		_ = json.Unmarshal([]byte(r.body), &p) // the comparison fails
		if got := fmt.Sprint(r.status, " ", p.Message); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %d %s, want %s", body, r.status, r.body, want)
		}
	}
	for _, path := range []string{"", "/whk_a"} {
		if r := h.send("GET", "/events/webhooks"+path, "", "X-API-Key", h.key); r.status != 403 {
			t.Errorf("without the scope admin: %d %s", r.status, r.body)
		}
	}
	for _, path := range []string{"/webhooks/whk_a/deliveries", "/webhooks/whk_a/stats", "/other"} {
		if r := h.send("GET", "/events"+path, "", "X-API-Key", admin); r.status != 501 {
			t.Errorf("%s: %d %s", path, r.status, r.body)
		}
	}
	for i := range 4 {
		r := h.send("POST", "/events/webhooks", "{"+good+"}", "X-API-Key", admin)
		if want := 201; i < 3 && r.status != want || i == 3 && r.status != 429 {
			t.Errorf("webhook %d: %d %s", i, r.status, r.body)
		}
	}
}

// TestWebhookTest tests a webhook of E2B's format through v1.
func TestWebhookTest(t *testing.T) {
	h := newHarness(t)
	receiver := newHookReceiver(t)
	hook, err := h.hooks.Create(t.Context(), h.org.Org.ID, webhook.NewWebhook{URL: receiver.URL, Format: webhook.E2B})
	if err != nil {
		t.Fatal(err)
	}
	if a, err := h.hooks.Test(t.Context(), h.org.Org.ID, hook.ID); err != nil || a.Status != 200 {
		t.Errorf("got %+v, %v", a, err)
	}
	got := receiver.await(t, 1)[0]
	if !got.verified(string(hook.Secret)) || !strings.Contains(got.body, `"type":"webhook.test"`) {
		t.Errorf("the receiver got %v %s", got.header, got.body)
	}
}
