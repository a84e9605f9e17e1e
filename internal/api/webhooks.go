package api

import (
	"net/http"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/webhook"
)

// secretGiven returns the secret of a request, "" if it has none. An empty one is refused, since its sender cannot mean
// that the server is to make one.
func secretGiven(secret *string) (webhook.Secret, error) {
	if secret == nil {
		return "", nil
	}
	if *secret == "" {
		return "", fault.InvalidField("secret", "must not be empty: leave it out, and the server makes one")
	}
	return webhook.Secret(*secret), nil
}

func newWebhookOf(in CreateWebhookRequest) (webhook.NewWebhook, error) {
	out := webhook.NewWebhook{URL: in.URL, Format: webhook.Standard, Types: in.Types}
	if in.Name != nil {
		out.Name = *in.Name
	}
	var err error
	out.Secret, err = secretGiven(in.Secret)
	return out, err
}

func webhookChangeOf(in UpdateWebhookRequest) (webhook.Change, error) {
	out := webhook.Change{Name: in.Name, URL: in.URL, Types: in.Types, Enabled: in.Enabled}
	secret, err := secretGiven(in.Secret)
	if rotate := in.RotateSecret != nil && *in.RotateSecret; rotate || secret != "" {
		if rotate && secret != "" {
			err = fault.InvalidField("secret", "cannot be given together with rotate_secret")
		}
		out.Secret = &secret
	}
	return out, err
}

// CreateWebhook answers POST /v1/webhooks.
func (s *server) CreateWebhook(w http.ResponseWriter, r *http.Request) {
	var in CreateWebhookRequest
	if _, err := read(w, r, maxBody, true, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	request, err := newWebhookOf(in)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	hook, err := s.Webhooks.Create(r.Context(), callOf(r).Who.Org.ID, request)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	w.Header().Set("Location", "/v1/webhooks/"+hook.ID)
	s.answer(w, r, http.StatusCreated, withSecret(hook))
}

// ListWebhooks answers GET /v1/webhooks.
func (s *server) ListWebhooks(w http.ResponseWriter, r *http.Request, params ListWebhooksParams) {
	limit, cursor, err := page(params.Limit, params.Cursor)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	f := webhook.Filter{OrgID: callOf(r).Who.Org.ID}
	answerList(s, w, r, "webhooks", limit, cursor, func(limit int, cursor string) ([]webhook.Webhook, string, error) {
		f.Limit, f.Cursor = limit, cursor
		return s.Webhooks.List(r.Context(), f)
	}, webhookOf)
}

// GetWebhook answers GET /v1/webhooks/{webhook}.
func (s *server) GetWebhook(w http.ResponseWriter, r *http.Request, id WebhookID) {
	hook, err := s.Webhooks.Get(r.Context(), callOf(r).Who.Org.ID, id)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusOK, webhookOf(hook))
}

// UpdateWebhook answers PATCH /v1/webhooks/{webhook}.
func (s *server) UpdateWebhook(w http.ResponseWriter, r *http.Request, id WebhookID) {
	var in UpdateWebhookRequest
	if _, err := read(w, r, maxBody, true, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	c, err := webhookChangeOf(in)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	hook, err := s.Webhooks.Change(r.Context(), callOf(r).Who.Org.ID, id, c)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	if in.RotateSecret != nil && *in.RotateSecret {
		s.answer(w, r, http.StatusOK, withSecret(hook))
		return
	}
	s.answer(w, r, http.StatusOK, webhookOf(hook))
}

// DeleteWebhook answers DELETE /v1/webhooks/{webhook}.
func (s *server) DeleteWebhook(w http.ResponseWriter, r *http.Request, id WebhookID) {
	if err := s.Webhooks.Delete(r.Context(), callOf(r).Who.Org.ID, id); err != nil {
		s.fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// TestWebhook answers POST /v1/webhooks/{webhook}/test.
func (s *server) TestWebhook(w http.ResponseWriter, r *http.Request, id WebhookID) {
	if _, err := read(w, r, maxBody, false, &nothing{}); err != nil {
		s.fail(w, r, err)
		return
	}
	ctx, cancel := s.untilStop(r.Context())
	defer cancel()
	a, err := s.Webhooks.Test(ctx, callOf(r).Who.Org.ID, id)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusOK, attemptOf(a))
}

// ListWebhookDeliveries answers GET /v1/webhooks/{webhook}/deliveries.
func (s *server) ListWebhookDeliveries(w http.ResponseWriter, r *http.Request, id WebhookID,
	params ListWebhookDeliveriesParams) {
	limit, cursor, err := page(params.Limit, params.Cursor)
	f := webhook.DeliveryFilter{WebhookID: id}
	if err == nil && params.Status != nil {
		switch *params.Status {
		case DeliveryStatusDelivered:
			f.Made = new(true)
		case DeliveryStatusPending:
			f.Made = new(false)
		default:
			err = fault.InvalidField("status", "must be %s or %s", DeliveryStatusPending, DeliveryStatusDelivered)
		}
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	answerList(s, w, r, "deliveries", limit, cursor, func(limit int, cursor string) ([]webhook.Delivery, string, error) {
		f.Limit, f.Cursor = limit, cursor
		return s.Webhooks.Deliveries(r.Context(), callOf(r).Who.Org.ID, f)
	}, deliveryOf)
}

// ReplayWebhook answers POST /v1/webhooks/{webhook}/replay.
func (s *server) ReplayWebhook(w http.ResponseWriter, r *http.Request, id WebhookID) {
	var in ReplayWebhookRequest
	if _, err := read(w, r, maxBody, true, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	after, err := event.ParseID("after", fault.InvalidCode("after"), in.After)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	done, err := s.Webhooks.Replay(r.Context(), callOf(r).Who.Org.ID, id, after)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.answer(w, r, http.StatusOK, Replayed{Queued: done.Queued, Through: done.Through.ID(), More: done.More})
}

// withSecret encodes a webhook for its creator, who is shown the secret once.
func withSecret(hook webhook.Webhook) Webhook {
	out := webhookOf(hook)
	out.Secret = optional(string(hook.Secret))
	return out
}

func webhookOf(hook webhook.Webhook) Webhook {
	return Webhook{
		ID: hook.ID, Name: optional(hook.Name), URL: hook.URL, Types: each(hook.Types, func(t string) string { return t }),
		Format: WebhookFormat(hook.Format), Enabled: hook.Enabled,
		DisabledReason: optional(DisabledReason(hook.Reason)), DisabledAt: at(hook.DisabledAt),
		Pending: hook.Pending, CreatedAt: hook.CreatedAt.UTC(),
	}
}

func attemptOf(a webhook.Attempt) WebhookAttempt {
	return WebhookAttempt{
		Delivered: a.Error == "", Time: a.At.UTC(), DurationMs: a.Took.Milliseconds(), StatusCode: optional(a.Status),
		Error: optional(a.Error), Answer: optional(a.Answer),
	}
}

func deliveryOf(d webhook.Delivery) Delivery {
	out := Delivery{
		ID: webhook.DeliveryID(d.WebhookID, d.Seq), EventID: d.Seq.ID(), Type: d.Type, Status: DeliveryStatusPending,
		Attempts: d.Attempts, QueuedAt: d.QueuedAt.UTC(), DeliveredAt: at(d.MadeAt), NextAttemptAt: at(d.NextAt),
	}
	if !d.MadeAt.IsZero() {
		out.Status = DeliveryStatusDelivered
	}
	if !d.Last.At.IsZero() {
		out.LastAttempt = new(attemptOf(d.Last))
	}
	return out
}
