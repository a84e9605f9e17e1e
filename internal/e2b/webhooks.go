package e2b

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/webhook"
)

// Webhooks has the methods of [*webhook.Service] that this package calls.
type Webhooks interface {
	Create(ctx context.Context, orgID string, r webhook.NewWebhook) (webhook.Webhook, error)
	Get(ctx context.Context, orgID, id string) (webhook.Webhook, error)
	List(ctx context.Context, f webhook.Filter) ([]webhook.Webhook, string, error)
	Change(ctx context.Context, orgID, id string, c webhook.Change) (webhook.Webhook, error)
	Delete(ctx context.Context, orgID, id string) error
}

// webhookBody is E2B's form of a webhook. Answers have no secret.
type webhookBody struct {
	ID        string    `json:"id"`
	TeamID    string    `json:"teamId"`
	Name      string    `json:"name"`
	CreatedAt time.Time `json:"createdAt"`
	Enabled   bool      `json:"enabled"`
	URL       string    `json:"url"`
	Events    []string  `json:"events"`
}

func webhookOf(w webhook.Webhook) webhookBody {
	return webhookBody{ID: w.ID, TeamID: w.OrgID, Name: w.Name, CreatedAt: w.CreatedAt.UTC(), Enabled: w.Enabled,
		URL: w.URL, Events: append([]string{}, w.Types...)}
}

// webhookRequest has the fields of a create and of a change.
type webhookRequest struct {
	Name            *string   `json:"name"`
	URL             *string   `json:"url"`
	Enabled         *bool     `json:"enabled"`
	Events          *[]string `json:"events"`
	SignatureSecret *string   `json:"signatureSecret"`
}

// check refuses what E2B refuses. All but enabled is required of a new webhook.
func (in webhookRequest) check(created bool) error {
	for _, f := range []struct {
		name string
		text *string
	}{{"name", in.Name}, {"url", in.URL}, {"signatureSecret", in.SignatureSecret}} {
		if f.text == nil && created || f.text != nil && *f.text == "" {
			return fault.InvalidField(f.name, "is required and must not be empty")
		}
	}
	if in.Events == nil && created || in.Events != nil && len(*in.Events) == 0 {
		return fault.InvalidField("events", "must name at least one type of events")
	}
	return nil
}

// named returns err with the names that fields have in E2B's API.
func named(err error) error {
	if f := fault.As(err); f != nil {
		if name := map[string]string{"types": "events", "secret": "signatureSecret"}[f.Field]; name != "" {
			return fault.InvalidField(name, "%s", f.Detail).Because(err)
		}
	}
	return err
}

// createWebhook answers POST /events/webhooks.
func (s *Handler) createWebhook(w http.ResponseWriter, r *http.Request) error {
	var in webhookRequest
	if err := read(w, r, &in); err != nil {
		return err
	}
	if err := in.check(true); err != nil {
		return err
	}
	hook, err := s.Webhooks.Create(r.Context(), orgOf(r), webhook.NewWebhook{Name: *in.Name, URL: *in.URL,
		Format: webhook.E2B, Types: *in.Events, Secret: webhook.Secret(*in.SignatureSecret),
		Disabled: in.Enabled != nil && !*in.Enabled})
	if err != nil {
		return named(err)
	}
	reply(w, r, http.StatusCreated, webhookOf(hook))
	return nil
}

// webhookPage is the number of webhooks that are read at once.
const webhookPage = 100

// listWebhooks answers GET /events/webhooks, with those that this API made.
func (s *Handler) listWebhooks(w http.ResponseWriter, r *http.Request) error {
	out := []webhookBody{}
	f := webhook.Filter{OrgID: orgOf(r), Format: webhook.E2B, Limit: webhookPage}
	for {
		all, next, err := s.Webhooks.List(r.Context(), f)
		if err != nil {
			return err
		}
		var held int64
		for _, hook := range all {
			held += 2 * int64(len(hook.URL)+len(hook.Name)+len(hook.Types)*32+256)
			out = append(out, webhookOf(hook))
		}
		if err := callOf(r).Account.Take(held); err != nil {
			return err
		}
		if f.Cursor = next; next == "" {
			break
		}
	}
	reply(w, r, http.StatusOK, out)
	return nil
}

// theWebhook returns the webhook of the path. One that this API did not make is not found, since it has other types.
func (s *Handler) theWebhook(r *http.Request) (webhook.Webhook, error) {
	id := r.PathValue("webhook")
	hook, err := s.Webhooks.Get(r.Context(), orgOf(r), id)
	if err == nil && hook.Format != webhook.E2B {
		err = webhook.NotFound(id)
	}
	return hook, err
}

// getWebhook answers GET /events/webhooks/{webhook}.
func (s *Handler) getWebhook(w http.ResponseWriter, r *http.Request) error {
	hook, err := s.theWebhook(r)
	if err != nil {
		return err
	}
	reply(w, r, http.StatusOK, webhookOf(hook))
	return nil
}

// changeWebhook answers PATCH /events/webhooks/{webhook}.
func (s *Handler) changeWebhook(w http.ResponseWriter, r *http.Request) error {
	var in webhookRequest
	if err := read(w, r, &in); err != nil {
		return err
	}
	if err := in.check(false); err != nil {
		return err
	}
	hook, err := s.theWebhook(r)
	if err != nil {
		return err
	}
	hook, err = s.Webhooks.Change(r.Context(), orgOf(r), hook.ID, webhook.Change{Name: in.Name, URL: in.URL,
		Types: in.Events, Secret: (*webhook.Secret)(in.SignatureSecret), Enabled: in.Enabled})
	if err != nil {
		return named(err)
	}
	reply(w, r, http.StatusOK, webhookOf(hook))
	return nil
}

// deleteWebhook answers DELETE /events/webhooks/{webhook}.
func (s *Handler) deleteWebhook(w http.ResponseWriter, r *http.Request) error {
	hook, err := s.theWebhook(r)
	if err != nil {
		return err
	}
	if err := s.Webhooks.Delete(r.Context(), orgOf(r), hook.ID); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

// maxSignatureSecret limits the secret of a webhook, in bytes. E2B names no limit; more makes no signature better.
const maxSignatureSecret = 512

// wire implements [webhook.Wire] with E2B's requests.
type wire struct {
	sandboxes interface {
		GetAny(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error)
	}
}

// NewWire returns the wire of webhooks that E2B's clients made.
func NewWire(sandboxes interface {
	GetAny(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error)
}) webhook.Wire {
	return wire{sandboxes}
}

// Known implements [webhook.Wire].
func (wire) Known(kind string) bool { return lifecycleTypes[kind] != "" }

// NewSecret implements [webhook.Wire].
func (wire) NewSecret() webhook.Secret { return webhook.Secret(rand.Text() + rand.Text()) }

// CheckSecret implements [webhook.Wire].
func (wire) CheckSecret(secret string) error {
	if secret == "" || len(secret) > maxSignatureSecret || !utf8.ValidString(secret) ||
		strings.ContainsFunc(secret, unicode.IsControl) {
		return fault.InvalidField("secret", "must have 1 to %d bytes of text", maxSignatureSecret)
	}
	return nil
}

// deliveryBody holds an event in both spellings that E2B's documents have had for it.
type deliveryBody struct {
	eventBody
	Category    string         `json:"event_category"`
	Label       string         `json:"event_label"`
	Data        map[string]any `json:"event_data"`
	Sandbox     string         `json:"sandbox_id"`
	Template    string         `json:"sandbox_template_id"`
	Build       string         `json:"sandbox_build_id"`
	Execution   string         `json:"sandbox_execution_id"`
	SandboxTeam string         `json:"sandbox_team_id"`
}

// labels has E2B's older names of its types of events.
var labels = map[string]string{"created": "create", "resumed": "resume", "paused": "pause", "killed": "kill",
	"updated": "update", "checkpointed": "checkpoint"}

func deliveryOf(e eventBody) deliveryBody {
	if e.EventData == nil {
		e.EventData = map[string]any{"sandbox_metadata": map[string]string{}}
	}
	return deliveryBody{eventBody: e, Category: "lifecycle",
		Label: labels[strings.TrimPrefix(e.Type, "sandbox.lifecycle.")], Data: e.EventData, Sandbox: e.SandboxID,
		Template: e.SandboxTemplateID, Build: e.SandboxBuildID, Execution: e.SandboxExecutionID, SandboxTeam: e.SandboxTeamID}
}

// Message implements [webhook.Wire]. A sandbox that is gone has no metadata.
func (w wire) Message(ctx context.Context, e event.Event) (string, []byte, error) {
	one := sandbox.Event{SandboxID: sandbox.ID(e.SandboxID), At: e.At, From: sandbox.State(e.From),
		To: sandbox.State(e.To), Reason: e.Reason}
	kind := lifecycleOf(one.From, one.To, one.Reason)
	if kind == "" || lifecycleTypes[kind] != e.Type {
		return "", nil, nil
	}
	sb, err := w.sandboxes.GetAny(ctx, one.SandboxID)
	if err != nil && !fault.Is(err, fault.NotFound) {
		return "", nil, err
	}
	text, err := json.Marshal(deliveryOf(eventOf(one, kind, e.OrgID, sb)))
	return kind, text, err
}

// Test implements [webhook.Wire].
func (wire) Test(w webhook.Webhook, now time.Time) ([]byte, error) {
	return json.Marshal(deliveryOf(eventBody{Version: eventVersion, ID: uuid.NewString(), Type: webhook.TestType,
		SandboxTeamID: w.OrgID, Timestamp: now.UTC()}))
}

// Header implements [webhook.Wire]. E2B's signature is a hash and no HMAC.
func (wire) Header(w webhook.Webhook, _ string, _ time.Time, body []byte) map[string]string {
	sum := sha256.Sum256(append([]byte(w.Secret), body...))
	return map[string]string{
		"e2b-webhook-id":        w.ID,
		"e2b-delivery-id":       uuid.NewString(),
		"e2b-signature-version": "v1",
		"e2b-signature":         base64.RawStdEncoding.EncodeToString(sum[:]),
	}
}
