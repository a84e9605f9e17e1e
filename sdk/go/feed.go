package cay

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
)

// FeedOptions selects events of the organization; the zero value selects all.
type FeedOptions struct {
	After   string          // id of an event; selects only later events
	Types   []FeedEventType // selects events of any of these; empty is all that the key may see
	Sandbox string          // id of a sandbox; "" is any
	ListOptions
}

// ReadFeed returns a page of the organization's events, oldest first. A page that is short or
// empty may have a NextCursor too. An error with code "events_gone" reports that the server has
// dropped events after o.After.
func (c *Client) ReadFeed(ctx context.Context, o FeedOptions) (*FeedPage, error) {
	p := o.params()
	p.Limit, p.Cursor = o.ListOptions.params()
	return decode[FeedPage](c.wire.ReadFeed(ctx, &p))
}

// Feed returns an iterator over the organization's events up to the present, oldest first, which ends
// after the first error.
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

// params returns the options as parameters of a request, without the page.
func (o FeedOptions) params() readFeedParams {
	p := readFeedParams{Type: o.Types}
	if o.After != "" {
		p.After = &o.After
	}
	if o.Sandbox != "" {
		p.Sandbox = &o.Sandbox
	}
	return p
}

// maxFeedEvent limits an event of the feed, bytes. The longest has a detail of some KiB, which a
// much lower limit would refuse.
const maxFeedEvent = 1 << 20

// FollowFeed calls emit with the organization's events as they come: with those after o.After, or
// with new ones if o.After is "". id is the position that the stream has reached; e is nil if the
// position moved without an event, as at the beginning. If the stream breaks off, FollowFeed returns
// [io.ErrUnexpectedEOF], and if the server stops, an [*Error] with code "stopping". A call with the
// last id as o.After then continues without a gap or a repeated event. An error of emit ends
// FollowFeed. It ignores Limit and Cursor.
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
