package webhook

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/cayhq/cay/internal/event"
)

// message is an event in the words of a format.
type message struct{ kind, body string }

// errIdle ends reading the feed while no webhook is enabled.
var errIdle = errors.New("no webhook is enabled")

// consume puts the deliveries of all events into the store until ctx ends. While no webhook is enabled it reads
// nothing.
func (s *Service) consume(ctx context.Context) {
	for ctx.Err() == nil {
		idle, err := s.store.EndIdle(ctx)
		if err == nil && !idle {
			err = s.feed.Consume(ctx, Consumer, func(all []event.Event) error { return s.take(ctx, all) })
		}
		switch {
		case errors.Is(err, errIdle) || ctx.Err() != nil:
		case err != nil:
			s.cfg.Log.ErrorContext(ctx, "queueing events for webhooks; trying again", "error", err)
			pause(ctx, troublePause)
		case idle:
			var others <-chan time.Time
			if s.cfg.Shared {
				others = time.After(sharedInterval)
			}
			select {
			case <-s.changed:
			case <-others:
			case <-ctx.Done():
			}
		}
	}
}

// pause waits for d or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// take queues the deliveries of events. To take events twice does no harm.
func (s *Service) take(ctx context.Context, events []event.Event) error {
	hooks := map[string][]Webhook{} // by organization
	queued := map[string][]Delivery{}
	orgs := map[string]string{} // of the webhooks in queued
	for _, e := range events {
		if s.cfg.Shared && e.Type == event.WebhookDeleted {
			s.deleted() // perhaps by another process
		}
		of, known := hooks[e.OrgID]
		if !known {
			var err error
			if of, err = s.store.EnabledWebhooks(ctx, e.OrgID); err != nil {
				return err
			}
			hooks[e.OrgID] = of
		}
		messages := map[Format]message{}
		for i := range of {
			w := &of[i]
			if e.Seq <= w.After {
				continue
			}
			d, ok, err := s.deliveryOf(ctx, w, e, messages)
			if err != nil {
				return err
			}
			if ok {
				queued[w.ID], orgs[w.ID] = append(queued[w.ID], d), w.OrgID
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(queued)) {
		if _, err := s.store.Enqueue(ctx, id, queued[id], s.cfg.Bounds, s.now()); err != nil {
			return err
		}
		s.queues.due(id, orgs[id], s.cfg.Now())
	}
	if len(queued) > 0 {
		return nil
	}
	if idle, err := s.store.EndIdle(ctx); err != nil || !idle {
		return err
	}
	return errIdle
}

// deliveryOf returns the delivery of an event to a webhook, and whether the webhook receives the event. messages keeps
// what the event is in each format; nil keeps nothing.
func (s *Service) deliveryOf(ctx context.Context, w *Webhook, e event.Event, messages map[Format]message) (Delivery,
	bool, error) {
	if e.WebhookID == w.ID {
		return Delivery{}, false, nil // else an event of a webhook could cause the next one
	}
	m, known := messages[w.Format]
	if !known {
		kind, body, err := s.wires[w.Format].Message(ctx, e)
		if err != nil {
			return Delivery{}, false, err
		}
		m = message{kind, string(body)}
		if messages != nil {
			messages[w.Format] = m
		}
	}
	if m.kind == "" || !w.wants(m.kind) {
		return Delivery{}, false, nil
	}
	return Delivery{WebhookID: w.ID, Seq: e.Seq, Lane: laneOf(e), Type: m.kind, Body: m.body}, true, nil
}
