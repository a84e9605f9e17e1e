package webhook

import (
	"context"
	"time"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
)

// Filter selects webhooks of one organization.
type Filter struct {
	OrgID  string
	Format Format // "" is any
	Limit  int
	Cursor string
}

// DeliveryFilter selects deliveries of one webhook.
type DeliveryFilter struct {
	WebhookID string
	Made      *bool // only those that are made, or only those that are not
	Limit     int
	Cursor    string
}

// Bounds limit what one webhook has pending.
type Bounds struct {
	Deliveries int
	Bytes      int64 // of their bodies
}

// Due says when the next attempt of a webhook is to be made.
type Due struct {
	WebhookID, OrgID string
	At               time.Time
}

// Result is the end of an attempt at a delivery.
type Result struct {
	WebhookID string
	URL       string    // that was called
	EnabledAt time.Time // of the webhook, when the attempt began
	Seq       event.Seq
	Attempt   Attempt
	Made      bool
	NextAt    time.Time // of the next attempt, if it is not made
	Disable   Reason    // disables the webhook, unless it is ""
}

// Store keeps webhooks and their deliveries. Of the deliveries of a webhook that are pending in one lane, the one with
// the lowest Seq, the head, has a NextAt, and no other. Events of webhooks are written in the transactions that make
// them true.
type Store interface {
	// AddWebhook adds a webhook, with the event [event.WebhookCreated]. w.After becomes the place of the last event. It
	// begins the consumer there, if there is none. Exhausted, code "quota_exceeded", if the organization has most already;
	// 0 is no limit.
	AddWebhook(ctx context.Context, w Webhook, most int) error
	// GetWebhook returns a webhook of an organization. NotFound, code "webhook_not_found", if there is none.
	GetWebhook(ctx context.Context, orgID, id string) (Webhook, error)
	// ListWebhooks returns a page of webhooks, newest first, and the cursor of the next page, "" if there is none.
	ListWebhooks(ctx context.Context, f Filter) ([]Webhook, string, error)
	// ChangeWebhook changes a webhook in one transaction and returns it. An error of change is returned as it is, and
	// nothing is changed. change may be called several times. A webhook that change disabled gets the event
	// [event.WebhookDisabled]. One that it enabled receives only events from now on, besides what is pending. If it was
	// enabled or its URL changed, its heads are due at now.
	ChangeWebhook(ctx context.Context, orgID, id string, now time.Time, change func(*Webhook) error) (Webhook, error)
	// DeleteWebhook deletes a webhook, with the event [event.WebhookDeleted]. NotFound as for GetWebhook.
	// [Store].TrimDeliveries deletes its deliveries.
	DeleteWebhook(ctx context.Context, orgID, id string, now time.Time) error

	// EnabledWebhooks returns the enabled webhooks of an organization.
	EnabledWebhooks(ctx context.Context, orgID string) ([]Webhook, error)
	// EndIdle reports whether no webhook of any organization is enabled. Then it also forgets the consumer, so that events
	// are not kept for it.
	EndIdle(ctx context.Context) (idle bool, err error)
	// Enqueue adds deliveries to a webhook, with their heads due at now, and returns how many it added. A delivery that
	// exists is left as it is. It adds none if the webhook is disabled or gone. If more is pending then than the bounds
	// allow, it disables the webhook, with the reason Backlog.
	Enqueue(ctx context.Context, webhookID string, all []Delivery, most Bounds, now time.Time) (added int, err error)
	// Requeue adds deliveries as Enqueue does, and makes those pending again that are made. Conflict, code
	// "webhook_disabled", if the webhook is disabled; Exhausted, code "quota_exceeded", if the bounds leave no room.
	Requeue(ctx context.Context, webhookID string, all []Delivery, most Bounds, now time.Time) (added int, err error)

	// DueWebhooks returns the enabled webhooks that have something pending, and when each is due.
	DueWebhooks(ctx context.Context) ([]Due, error)
	// NextDelivery returns the enabled webhook with its head that is due first, of those lanes that are not busy.
	// NotFound, code "webhook_not_found", if the webhook is disabled or gone; a delivery without a WebhookID if it has no
	// such head.
	NextDelivery(ctx context.Context, webhookID string, busy []string) (Webhook, Delivery, error)
	// EndAttempt writes the end of an attempt. It changes nothing if the delivery is made or gone.
	EndAttempt(ctx context.Context, r Result) error

	// ListDeliveries returns a page of deliveries, those of the newest events first, without bodies, and the cursor of the
	// next page, "" if there is none.
	ListDeliveries(ctx context.Context, f DeliveryFilter) ([]Delivery, string, error)
	// TrimDeliveries deletes the deliveries that were made before the time and, of each webhook, all made ones but the
	// newest most. It also deletes what is pending of webhooks that are deleted or were disabled before the time. It
	// works in short transactions and returns the number of deleted deliveries.
	TrimDeliveries(ctx context.Context, before time.Time, most int) (int, error)
	// PendingDeliveries returns the number of pending deliveries of enabled webhooks, and when the oldest of them was
	// queued, zero if there is none.
	PendingDeliveries(ctx context.Context) (n int, oldest time.Time, err error)
}

// NotFound returns the error of a store for a webhook that it does not have.
func NotFound(id string) error {
	return fault.New(fault.NotFound, fault.CodeWebhookNotFound, "there is no webhook %.60q", id)
}
