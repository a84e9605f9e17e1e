package e2b

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Events has the methods of [*event.Feed] that this package calls.
type Events interface {
	Read(ctx context.Context, q event.Query) (event.Page, error)
}

// lifecycleTypes has E2B's types of events, and the types of the feed that they are found by.
var lifecycleTypes = map[string]event.Type{
	"sandbox.lifecycle.created":      event.SandboxRunning,
	"sandbox.lifecycle.resumed":      event.SandboxRunning,
	"sandbox.lifecycle.paused":       event.SandboxSuspended,
	"sandbox.lifecycle.killed":       event.SandboxDestroyed,
	"sandbox.lifecycle.updated":      event.SandboxEgressChanged,
	"sandbox.lifecycle.checkpointed": event.SnapshotCreated,
}

// lifecycleOf returns E2B's type of an event; "" for one that E2B does not have.
func lifecycleOf(from, to sandbox.State, reason string) string {
	what := ""
	switch {
	case from == to && reason == sandbox.ReasonEgressChanged:
		what = "updated"
	case from == to && reason == sandbox.ReasonSnapshot:
		what = "checkpointed"
	case from == to:
		return ""
	case to == sandbox.Running && from == sandbox.Creating:
		what = "created"
	case to == sandbox.Running && from == sandbox.Waking:
		what = "resumed"
	case to == sandbox.Suspended && from != sandbox.Waking: // else it had been paused before
		what = "paused"
	case to == sandbox.Destroyed:
		what = "killed"
	default:
		return ""
	}
	return "sandbox.lifecycle." + what
}

// eventBody is E2B's SandboxEvent.
type eventBody struct {
	Version            string         `json:"version"`
	ID                 string         `json:"id"`
	Type               string         `json:"type"`
	EventData          map[string]any `json:"eventData"`
	SandboxID          string         `json:"sandboxId"`
	SandboxTemplateID  string         `json:"sandboxTemplateId"`
	SandboxBuildID     string         `json:"sandboxBuildId"`
	SandboxExecutionID string         `json:"sandboxExecutionId"`
	SandboxTeamID      string         `json:"sandboxTeamId"`
	Timestamp          time.Time      `json:"timestamp"`
}

// eventVersion is the version of E2B's SandboxEvent.
const eventVersion = "v2"

// eventOf returns E2B's form of an event of a sandbox, or of one whose sandbox is gone, which is the zero value then.
func eventOf(e sandbox.Event, kind, org string, sb sandbox.Sandbox) eventBody {
	body := eventBody{Version: eventVersion, Type: kind, SandboxID: shown(e.SandboxID), SandboxTemplateID: sb.TemplateID,
		SandboxExecutionID: shown(e.SandboxID), SandboxTeamID: org, Timestamp: e.At.UTC()}
	// The same in both listings, which number their events differently, and in webhooks.
	body.ID = uuid.NewSHA1(uuid.NameSpaceOID, []byte(strings.Join([]string{string(e.SandboxID), kind,
		body.Timestamp.Format(time.RFC3339Nano)}, " "))).String()
	if len(sb.Metadata) > 0 {
		body.EventData = map[string]any{"sandbox_metadata": sb.Metadata}
	}
	return body
}

// eventPage is the default number of events in an answer, as in E2B.
const eventPage = 10

// maxEventOffset bounds the events that a request may skip, which the server reads all the same.
const maxEventOffset = 10_000

// eventQuery selects events as clients do.
type eventQuery struct {
	types         []string // none is all
	offset, limit int
	oldestFirst   bool
}

func eventQueryOf(r *http.Request) (out eventQuery, err error) {
	q := r.URL.Query()
	out = eventQuery{limit: eventPage}
	for _, n := range []struct {
		name        string
		to          *int
		least, most int
	}{{"offset", &out.offset, 0, maxEventOffset}, {"limit", &out.limit, 1, maxPage}} {
		text := q.Get(n.name)
		if text == "" {
			continue
		}
		if *n.to, err = strconv.Atoi(text); err != nil || *n.to < n.least || *n.to > n.most {
			return out, fault.InvalidField(n.name, "must be from %d to %d", n.least, n.most)
		}
	}
	if text := q.Get("orderAsc"); text != "" {
		if out.oldestFirst, err = strconv.ParseBool(strings.ToLower(text)); err != nil {
			return out, fault.InvalidField("orderAsc", "must be true or false")
		}
	}
	for name := range strings.SplitSeq(strings.Join(q["types"], ","), ",") {
		if name == "" {
			continue
		}
		if lifecycleTypes[name] == "" {
			return out, fault.InvalidField("types", "there is no type %.60q", name)
		}
		out.types = append(out.types, name)
	}
	return out, nil
}

// eventPicker picks the events of an answer out of a sequence.
type eventPicker struct {
	eventQuery
	s    *Handler
	r    *http.Request
	rows map[sandbox.ID]sandbox.Sandbox // what the answer needs of sandboxes, as far as they can be read
	out  []json.RawMessage
}

// take adds an event to the answer if it belongs there, and reports whether the answer is complete.
func (p *eventPicker) take(e sandbox.Event) (full bool, err error) {
	kind := lifecycleOf(e.From, e.To, e.Reason)
	if kind == "" || len(p.types) > 0 && !slices.Contains(p.types, kind) {
		return false, nil
	}
	if p.offset > 0 {
		p.offset--
		return false, nil
	}
	sb, known := p.rows[e.SandboxID]
	if !known {
		sb, err = p.s.Rows.Get(p.r.Context(), orgOf(p.r), e.SandboxID)
		if err != nil && !fault.Is(err, fault.NotFound) {
			return false, err
		}
		sb = sandbox.Sandbox{TemplateID: sb.TemplateID, Metadata: sb.Metadata}
		p.rows[e.SandboxID] = sb
	}
	body := eventOf(e, kind, orgOf(p.r), sb)
	text, err := json.Marshal(body)
	if err == nil {
		err = callOf(p.r).Account.Take(2 * int64(len(text))) // twice, since the answer is assembled from all
	}
	p.out = append(p.out, text)
	return len(p.out) == p.limit, err
}

// newEventPicker parses the query of a request for events.
func (s *Handler) newEventPicker(r *http.Request) (*eventPicker, error) {
	q, err := eventQueryOf(r)
	return &eventPicker{eventQuery: q, s: s, r: r, rows: map[sandbox.ID]sandbox.Sandbox{}, out: []json.RawMessage{}}, err
}

// sandboxEvents answers GET /events/sandboxes/{id} from the listing of the sandbox, which can be read for a
// time after its end.
func (s *Handler) sandboxEvents(w http.ResponseWriter, r *http.Request) error {
	p, err := s.newEventPicker(r)
	if err != nil {
		return err
	}
	id := sandboxID(r)
	all, err := s.events(r, id)
	if err != nil {
		return hidden(err, id)
	}
	if !p.oldestFirst {
		slices.Reverse(all)
	}
	for _, e := range all {
		if full, err := p.take(e); err != nil || full {
			if err != nil {
				return err
			}
			break
		}
	}
	reply(w, r, http.StatusOK, p.out)
	return nil
}

// feedPage is the number of events of the feed that are held at once, some 100 KiB.
const feedPage = 100

// allEvents answers GET /events/sandboxes from the organization's feed.
func (s *Handler) allEvents(w http.ResponseWriter, r *http.Request) error {
	p, err := s.newEventPicker(r)
	if err != nil {
		return err
	}
	q := event.Query{OrgID: orgOf(r), After: event.Oldest, Limit: feedPage}
	if !p.oldestFirst {
		q.Before = event.Newest
	}
	for name, t := range lifecycleTypes {
		if len(p.types) == 0 || slices.Contains(p.types, name) {
			q.Types = append(q.Types, t)
		}
	}
	for {
		page, err := s.Events.Read(r.Context(), q)
		if err != nil {
			return err
		}
		for _, e := range page.Events {
			full, err := p.take(sandbox.Event{SandboxID: sandbox.ID(e.SandboxID), At: e.At, From: sandbox.State(e.From),
				To: sandbox.State(e.To), Reason: e.Reason})
			if err != nil {
				return err
			}
			if full {
				page.More = false
				break
			}
		}
		if !page.More {
			reply(w, r, http.StatusOK, p.out)
			return nil
		}
		if q.Before > 0 {
			q.Before = page.Through
		} else {
			q.After = page.Through
		}
	}
}
