package cli

import (
	"encoding/json"
	"net/http"
	"strings"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// aWebhook returns the fake server's webhook. It is disabled if the id says so.
func aWebhook(id string) cay.Webhook {
	w := cay.Webhook{ID: id, URL: "https://example.com/hook", Types: []string{}, Format: "standard", Enabled: true,
		Pending: 2, CreatedAt: time.Now().Add(-5 * time.Minute)}
	if id == "whk_off" {
		w.Enabled, w.DisabledReason, w.DisabledAt = false, new(cay.DisabledReason("failing")), new(time.Now().Add(-time.Hour))
		w.Name, w.Types = new("ops\x1b[2J"), []string{"sandbox.failed"}
	}
	return w
}

// anAttempt returns an attempt that failed if status is not 200.
func anAttempt(status int) cay.WebhookAttempt {
	a := cay.WebhookAttempt{Delivered: status == 200, DurationMs: 1234, StatusCode: &status, Answer: new("go\x1baway")}
	if status != 200 {
		a.Error = new("the receiver answered 500")
	}
	return a
}

// webhookRoutes returns the calls about webhooks.
func webhookRoutes() map[string]fakeHandler {
	return map[string]fakeHandler{
		"POST /v1/webhooks": func(w http.ResponseWriter, _ *http.Request, body []byte) {
			if strings.Contains(string(body), "127.0.0.1") {
				refuse(w, 400, "invalid_url", "url", "names an address that webhooks may not call")
				return
			}
			made := aWebhook("whk_1")
			made.Secret = new("whsec_secret")
			answer(w, 201, made)
		},
		"GET /v1/webhooks": func(w http.ResponseWriter, _ *http.Request, _ []byte) {
			answer(w, 200, cay.WebhookList{Webhooks: []cay.Webhook{aWebhook("whk_off"), aWebhook("whk_1")}})
		},
		"GET /v1/webhooks/{id}": func(w http.ResponseWriter, r *http.Request, _ []byte) {
			answer(w, 200, aWebhook(r.PathValue("id")))
		},
		"PATCH /v1/webhooks/{id}": func(w http.ResponseWriter, r *http.Request, body []byte) {
			changed := aWebhook(r.PathValue("id"))
			var in cay.UpdateWebhookRequest
			if err := json.Unmarshal(body, &in); err == nil && deref(in.RotateSecret) {
				changed.Secret = new("whsec_rotated")
			}
			answer(w, 200, changed)
		},
		"DELETE /v1/webhooks/{id}": func(w http.ResponseWriter, r *http.Request, _ []byte) {
			if r.PathValue("id") == "none" {
				refuse(w, 404, "webhook_not_found", "", `there is no webhook "none"`)
				return
			}
			w.WriteHeader(204)
		},
		"POST /v1/webhooks/{id}/test": func(w http.ResponseWriter, r *http.Request, _ []byte) {
			if r.PathValue("id") == "whk_off" {
				answer(w, 200, anAttempt(500))
				return
			}
			answer(w, 200, anAttempt(200))
		},
		"GET /v1/webhooks/{id}/deliveries": func(w http.ResponseWriter, _ *http.Request, _ []byte) {
			answer(w, 200, cay.DeliveryList{Deliveries: []cay.Delivery{
				{ID: "msg_2", EventID: "evt_2", Type: "sandbox.failed", Status: "pending", Attempts: 3, QueuedAt: time.Now(),
					NextAttemptAt: new(time.Now().Add(10*time.Minute + 30*time.Second)), LastAttempt: new(anAttempt(500))},
				{ID: "msg_1", EventID: "evt_1", Type: "org.created", Status: "delivered", Attempts: 1, QueuedAt: time.Now(),
					LastAttempt: new(anAttempt(200))},
				{ID: "msg_0", EventID: "evt_0", Type: "org.created", Status: "pending", QueuedAt: time.Now()},
			}})
		},
		"POST /v1/webhooks/{id}/replay": func(w http.ResponseWriter, _ *http.Request, body []byte) {
			if strings.Contains(string(body), "evt_1") {
				answer(w, 200, cay.Replayed{Queued: 1000, Through: "evt_2", More: true})
				return
			}
			answer(w, 200, cay.Replayed{Queued: 7, Through: "evt_3"})
		},
	}
}
