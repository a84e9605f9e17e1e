package cay

import (
	"context"
	"iter"
)

// CreateWebhook makes a webhook. The field Secret of the answer has the secret that signs its requests, which the
// server never returns again.
func (c *Client) CreateWebhook(ctx context.Context, r CreateWebhookRequest) (*Webhook, error) {
	return decode[Webhook](c.wire.CreateWebhook(ctx, r))
}

// ListWebhooks returns a page of the organization's webhooks, newest first.
func (c *Client) ListWebhooks(ctx context.Context, o ListOptions) (*WebhookList, error) {
	var p listWebhooksParams
	p.Limit, p.Cursor = o.params()
	return decode[WebhookList](c.wire.ListWebhooks(ctx, &p))
}

// Webhooks returns an iterator over all of the organization's webhooks, which ends after the first error.
func (c *Client) Webhooks(ctx context.Context, o ListOptions) iter.Seq2[Webhook, error] {
	return all(o, func(page ListOptions) ([]Webhook, *string, error) {
		l, err := c.ListWebhooks(ctx, page)
		if err != nil {
			return nil, nil, err
		}
		return l.Webhooks, l.NextCursor, nil
	})
}

// GetWebhook returns a webhook.
func (c *Client) GetWebhook(ctx context.Context, id string) (*Webhook, error) {
	return decode[Webhook](c.wire.GetWebhook(ctx, id))
}

// UpdateWebhook changes the fields of a webhook that r has. If r rotates the secret, the answer has the new one.
func (c *Client) UpdateWebhook(ctx context.Context, id string, r UpdateWebhookRequest) (*Webhook, error) {
	return decode[Webhook](c.wire.UpdateWebhook(ctx, id, r))
}

// DeleteWebhook deletes a webhook with its deliveries.
func (c *Client) DeleteWebhook(ctx context.Context, id string) error {
	return done(c.wire.DeleteWebhook(ctx, id))
}

// TestWebhook has the server send a request of the type "webhook.test" to a webhook, and returns what came of it. That
// the receiver failed is no error.
func (c *Client) TestWebhook(ctx context.Context, id string) (*WebhookAttempt, error) {
	return decode[WebhookAttempt](c.wire.TestWebhook(ctx, id))
}

// ListDeliveriesOptions selects deliveries of a webhook and a page; the zero value selects the first page of all.
type ListDeliveriesOptions struct {
	Status DeliveryStatus // "" is any
	ListOptions
}

// ListDeliveries returns a page of the deliveries of a webhook, those of the newest events first.
func (c *Client) ListDeliveries(ctx context.Context, id string, o ListDeliveriesOptions) (*DeliveryList, error) {
	var p listWebhookDeliveriesParams
	p.Limit, p.Cursor = o.params()
	if o.Status != "" {
		p.Status = &o.Status
	}
	return decode[DeliveryList](c.wire.ListWebhookDeliveries(ctx, id, &p))
}

// Deliveries returns an iterator over the deliveries of a webhook that o selects, which ends after the first error.
func (c *Client) Deliveries(ctx context.Context, id string, o ListDeliveriesOptions) iter.Seq2[Delivery, error] {
	return all(o.ListOptions, func(page ListOptions) ([]Delivery, *string, error) {
		o.ListOptions = page
		l, err := c.ListDeliveries(ctx, id, o)
		if err != nil {
			return nil, nil, err
		}
		return l.Deliveries, l.NextCursor, nil
	})
}

// ReplayWebhook makes the deliveries of a bounded number of events after the one with the id after pending again. While
// the answer has More, the next call with its Through goes on. An error with code "events_gone" reports that the server
// has dropped events after it.
func (c *Client) ReplayWebhook(ctx context.Context, id, after string) (*Replayed, error) {
	return decode[Replayed](c.wire.ReplayWebhook(ctx, id, replayWebhookRequest{After: after}))
}
