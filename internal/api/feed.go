package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
)

// Events has the methods of the event room that this package calls; [*event.Feed] implements it.
type Events interface {
	Read(ctx context.Context, q event.Query) (event.Page, error)
	Last(ctx context.Context, orgID string) (event.Seq, error)
	Follow(ctx context.Context, q event.Query, idle time.Duration, emit func(event.Page) error) error
}

// eventScopes maps the subject of an event to the scope that a key needs to see the event. It is
// the scope that the key needs to read the subject itself.
var eventScopes = map[string]auth.Scope{
	"sandbox": auth.SandboxesRead, "snapshot": auth.SandboxesRead, "template": auth.TemplatesRead,
	"api_key": auth.Admin, "org": auth.Admin, "webhook": auth.Admin,
}

// visibleTypes returns the types of events that a key may see, out of the types asked for, or out
// of all types if none is asked for. A nil result stands for all types.
func visibleTypes(p auth.Principal, asked []FeedEventType) ([]event.Type, error) {
	missing := func(scope auth.Scope) error {
		return fault.New(fault.Denied, fault.CodeScopeMissing, "the key lacks the scope %s", scope)
	}
	var types []event.Type
	for _, text := range asked {
		t := event.Type(text)
		if !t.Known() {
			return nil, fault.InvalidField("type", "there is no type of events %.40q", string(text))
		}
		if scope := eventScopes[t.Subject()]; !p.May(scope) {
			return nil, missing(scope)
		}
		types = append(types, t)
	}
	if len(asked) > 0 || p.May(auth.Admin) {
		return types, nil
	}
	for _, t := range event.Types() {
		if p.May(eventScopes[t.Subject()]) {
			types = append(types, t)
		}
	}
	if len(types) == 0 {
		return nil, missing(auth.SandboxesRead)
	}
	return types, nil
}

// placeOf reads the id of an event from a parameter. It returns nil if the parameter is absent.
func placeOf(field string, text *string) (*event.Seq, error) {
	if text == nil || *text == "" {
		return nil, nil
	}
	s, err := event.ParseID(field, fault.InvalidCode(field), *text)
	return &s, err
}

// ReadFeed answers GET /v1/events.
func (s *server) ReadFeed(w http.ResponseWriter, r *http.Request, params ReadFeedParams) {
	q := event.Query{OrgID: callOf(r).Who.Org.ID}
	var after, cursor, last *event.Seq
	limit, _, err := page(params.Limit, params.Cursor)
	if err == nil {
		q.Types, err = visibleTypes(callOf(r).Who, params.Type)
	}
	if err == nil {
		after, err = placeOf("after", params.After)
	}
	if err == nil {
		cursor, err = placeOf("cursor", params.Cursor)
	}
	if err == nil {
		last, err = placeOf("Last-Event-ID", params.LastEventID)
	}
	if id := params.Sandbox; err == nil && id != nil {
		if q.SandboxID = *id; !sandbox.ID(*id).Valid() {
			err = fault.InvalidField("sandbox", "is not the id of a sandbox")
		}
	}
	switch {
	case err != nil:
		s.fail(w, r, err)
	case httpserver.WantsEvents(r):
		if last != nil {
			after = last
		}
		s.followFeed(w, r, q, after)
	default:
		q.After, q.Limit = event.Oldest, limit
		if cursor != nil {
			after = cursor
		}
		if after != nil {
			q.After = *after
		}
		s.answerFeed(w, r, q)
	}
}

// answerFeed answers with one page of events.
func (s *server) answerFeed(w http.ResponseWriter, r *http.Request, q event.Query) {
	page, err := s.Events.Read(r.Context(), q)
	if err == nil {
		err = callOf(r).Account.Take(sizeOfEvents(page.Events))
	}
	reply := newListReply(w, "events")
	for i := 0; err == nil && i < len(page.Events); i++ {
		var item []byte
		if item, err = encode(feedEventOf(page.Events[i])); err == nil {
			err = reply.add(item)
		}
	}
	if err == nil {
		members := ""
		if page.More {
			members = fmt.Sprintf(`,"next_cursor":"%s"`, page.Through.ID())
		}
		err = reply.end(members)
	}
	if err != nil {
		s.broken(reply, w, r, err)
	}
}

// sizeOfEvents estimates the memory that events take as rows and as text, bytes.
func sizeOfEvents(events []event.Event) int64 {
	const eventCost = 1024
	size := int64(0)
	for _, e := range events {
		size += eventCost + 2*int64(len(e.Detail))
	}
	return size
}

// followBatch is the largest number of events that a follower is sent at once, about 100 KiB. With
// fewer, a follower that catches up causes more reads of the database; with more, the server holds
// more memory while a caller reads slowly.
const followBatch = 100

// errFeedStopping ends the streams of followers when the server stops.
var errFeedStopping = fault.New(fault.Unavailable, fault.CodeStopping,
	"the server stops; follow again with Last-Event-ID when it is back")

// followFeed streams events until the caller leaves, the server stops, or the key is no longer
// valid.
func (s *server) followFeed(w http.ResponseWriter, r *http.Request, q event.Query, after *event.Seq) {
	reply := s.newEventReply(w, r)
	defer reply.Close()
	ctx, cancel := s.untilStop(r.Context())
	defer cancel()
	if after == nil {
		last, err := s.Events.Last(ctx, q.OrgID)
		if err != nil {
			reply.fail(err)
			return
		}
		after = &last
	}
	q.After, q.Limit = *after, followBatch
	quiet := callOf(r).Patience.Quiet
	checked, sent := time.Now(), event.Oldest
	err := s.Events.Follow(ctx, q, quiet, func(page event.Page) error {
		if time.Since(checked) >= quiet {
			// The key was valid when the stream began; check that it still is.
			if _, err := s.Auth.Authenticate(ctx, secretOf(r)); err != nil {
				return err
			}
			checked = time.Now()
		}
		account := &callOf(r).Account
		held := sizeOfEvents(page.Events)
		if err := account.Take(held); err != nil {
			return err
		}
		defer account.Give(held)
		var b strings.Builder
		if sent == event.Oldest {
			if err := httpserver.WriteEvent(&b, q.After.ID(), "ready", struct{}{}); err != nil {
				return err
			}
			sent = q.After
		}
		for _, e := range page.Events {
			if err := httpserver.WriteEvent(&b, e.Seq.ID(), "event", feedEventOf(e)); err != nil {
				return err
			}
			sent = e.Seq
		}
		if page.Through > sent {
			sent = page.Through
			fmt.Fprintf(&b, "id: %s\n\n", sent.ID())
		}
		if b.Len() == 0 {
			return nil
		}
		return reply.send(b.String())
	})
	if errors.Is(err, errStopping) {
		err = errFeedStopping
	}
	reply.fail(err)
}

func feedEventOf(e event.Event) FeedEvent {
	return FeedEvent{
		ID: e.Seq.ID(), Time: e.At.UTC(), Type: FeedEventType(e.Type), SandboxID: optional(e.SandboxID),
		From: optional(SandboxState(e.From)), To: optional(SandboxState(e.To)),
		Reason: optional(e.Reason), Detail: optional(e.Detail),
		SnapshotID: optional(e.SnapshotID), TemplateID: optional(e.TemplateID), APIKeyID: optional(e.KeyID),
		WebhookID: optional(e.WebhookID), Name: optional(e.Name), TemplateVersion: optional(e.Version), Port: optional(e.Port),
	}
}

// EncodeEvent returns an event as GET /v1/events shows it.
func EncodeEvent(e event.Event) ([]byte, error) { return encode(feedEventOf(e)) }
