package client

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
)

// FeedOptions selects events of the organization; the zero value is all.
type FeedOptions struct {
	After   string          // id of an event; only what comes after it
	Types   []FeedEventType // any of; empty is all that the key may see
	Sandbox string          // id of a sandbox; "" is any
	ListOptions
}

// ReadFeed returns a page of the organization's events, oldest first. It may be short or empty
// and have a NextCursor all the same. An error with code "events_gone" says that events after the
// given one have been dropped.
func (c *Client) ReadFeed(ctx context.Context, o FeedOptions) (*FeedPage, error) {
	p := o.params()
	p.Limit, p.Cursor = o.ListOptions.params()
	return decode[FeedPage](c.wire.ReadFeed(ctx, &p))
}

// Feed walks the organization's events, oldest first, up to the present, and ends after the first
// error.
func (c *Client) Feed(ctx context.Context, o FeedOptions) iter.Seq2[FeedEvent, error] {
	return all(o.ListOptions, func(page ListOptions) ([]FeedEvent, *string, error) {
		o.ListOptions = page
		l, err := c.ReadFeed(ctx, o)
		if err != nil {
			return nil, nil, err
		}
		return l.Events, l.NextCursor, nil
	})
}

func (o FeedOptions) params() ReadFeedParams {
	p := ReadFeedParams{Type: o.Types}
	if o.After != "" {
		p.After = &o.After
	}
	if o.Sandbox != "" {
		p.Sandbox = &o.Sandbox
	}
	return p
}

// maxFeedEvent bounds an event of the feed, bytes. The longest has a detail of some KiB.
const maxFeedEvent = 1 << 20

// FollowFeed hands the organization's events to emit as they come: those after o.After, or new
// ones if it is "". id is the place that has been reached; e is nil when there is a new one without
// an event, as there is at the beginning. A stream that breaks off is an [io.ErrUnexpectedEOF], and
// one whose server stops an [*Error] with code "stopping": follow again after the last id, and
// nothing is missed or repeated. An error of emit ends it. Limit and Cursor are not looked at.
func (c *Client) FollowFeed(ctx context.Context, o FeedOptions, emit func(id string, e *FeedEvent) error) error {
	p := o.params()
	resp, err := open(c.wire.ReadFeed(ctx, &p, acceptEvents))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	err = readEvents(resp.Body, maxFeedEvent, func(id, name string, data []byte) error {
		switch name {
		case "event":
			e := new(FeedEvent)
			if err := json.Unmarshal(data, e); err != nil {
				return fmt.Errorf("decoding an event: %w", err)
			}
			return emit(id, e)
		case "error":
			return errorOfEvent(data)
		}
		if id == "" {
			return nil
		}
		return emit(id, nil)
	})
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}
