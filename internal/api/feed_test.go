package api

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// feedOf reads all events after an id that a key may see, in several pages.
func (h *testServer) feedOf(t *testing.T, key, query string) []FeedEvent {
	t.Helper()
	var all []FeedEvent
	for cursor := ""; ; {
		r := h.send(t, "GET", "/v1/events?limit=3&"+query+cursor, key, "")
		page := as[FeedPage](t, 200, r)
		if len(page.Events) > 3 || page.Events == nil {
			t.Fatalf("a page of 3 is %s", r.body)
		}
		all = append(all, page.Events...)
		if page.NextCursor == nil {
			return all
		}
		cursor = "&cursor=" + url.QueryEscape(*page.NextCursor)
	}
}

func (h *testServer) lastOf(t *testing.T, key string) string {
	t.Helper()
	all := h.feedOf(t, key, "")
	return all[len(all)-1].ID
}

// awaitEvents waits until the events after an id have exactly the given types.
func (h *testServer) awaitEvents(t *testing.T, after string, want ...event.Type) []FeedEvent {
	t.Helper()
	var got []event.Type
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		events := h.feedOf(t, h.key, "after="+after)
		got = each(events, func(e FeedEvent) event.Type { return event.Type(e.Type) })
		if slices.Equal(got, want) {
			return events
		}
		if len(got) > len(want) || time.Now().After(deadline) {
			t.Fatalf("the events are %q, want %q", got, want)
		}
	}
}

// TestFeedHasEveryFact causes one fact of each kind through the API and checks that the feed has
// exactly its events, in order, and that other calls add none.
func TestFeedHasEveryFact(t *testing.T) {
	h := newTestServer(t)
	running, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); h.sandboxes.Run(running) }()
	defer func() { stop(); <-done }()
	const secret = "a-secret-that-no-event-holds"
	seen := map[event.Type]bool{}
	var facts []FeedEvent
	last := ""
	expect := func(want ...event.Type) []FeedEvent {
		t.Helper()
		events := h.awaitEvents(t, last, want...)
		for _, e := range events {
			seen[event.Type(e.Type)] = true
		}
		if len(events) > 0 {
			last = events[len(events)-1].ID
		}
		facts = append(facts, events...)
		return events
	}
	do := func(status int, method, path, body string) reply {
		t.Helper()
		r := h.send(t, method, path, h.key, body)
		if r.status != status {
			t.Fatalf("%s %s: status %d %s", method, path, r.status, r.body)
		}
		return r
	}
	// newTestServer created the operator's organization.
	if e := expect(event.OrgCreated, event.KeyCreated, event.TemplateCreated); *e[0].Name != auth.OperatorOrg ||
		*e[1].APIKeyID != h.org.Key.ID {
		t.Errorf("the first events are %+v", e)
	}

	create := func(body string) string {
		t.Helper()
		id := as[Sandbox](t, 201, do(201, "POST", "/v1/sandboxes",
			`{"template":"python","env":{"K":"`+secret+`"},"metadata":{"m":"`+secret+`"}`+body+`}`)).ID
		if e := expect(event.SandboxCreating, event.SandboxRunning); *e[0].SandboxID != id || e[0].From != nil ||
			*e[1].From != "creating" {
			t.Errorf("a create has %+v", e)
		}
		return id
	}
	sbx := create(`,"mode":"persistent"`)
	path := "/v1/sandboxes/" + sbx
	do(200, "POST", path+"/execute", `{"command":"id"}`)
	do(200, "POST", path+"/checkpoint", "")
	do(200, "GET", path, "")
	expect()
	do(200, "POST", path+"/suspend", "")
	expect(event.SandboxSuspending, event.SandboxSuspended)
	do(200, "POST", path+"/wake", "")
	do(200, "POST", path+"/wake", "")
	expect(event.SandboxWaking, event.SandboxRunning)
	do(200, "PUT", path+"/egress", `{"mode":"deny_all"}`)
	if e := expect(event.SandboxEgressChanged); *e[0].Detail != "deny_all" || *e[0].From != *e[0].To {
		t.Errorf("the event of a policy change is %+v", e)
	}
	h.node.OnSetEgress = func(context.Context, sandbox.ID) error { return errors.New("injected") }
	do(500, "PUT", path+"/egress", `{"mode":"allow_all"}`)
	h.node.OnSetEgress = nil
	if e := expect(event.SandboxEgressChanged, event.SandboxEgressChanged); *e[0].Detail != "allow_all" ||
		*e[1].Detail != "deny_all" {
		t.Errorf("the events of a policy that was restored are %+v", e)
	}
	for range 3 { // gathered into one event
		h.node.Deny(sandbox.Denial{ID: sandbox.ID(sbx), Protocol: "tcp",
			Destination: netip.MustParseAddrPort("203.0.113.5:443"), Count: 1})
	}
	if e := expect(event.SandboxEgressDenied); *e[0].Detail != "tcp 203.0.113.5:443 3 times" {
		t.Errorf("a denial has %+v", e)
	}
	for _, public := range []string{"true", "true", "false", "false"} {
		do(200, "PUT", path+"/ports/8080", `{"public":`+public+`}`)
	}
	if e := expect(event.SandboxPortPublic, event.SandboxPortPrivate); *e[0].Port != 8080 || *e[0].SandboxID != sbx {
		t.Errorf("a port has %+v", e)
	}

	snap := as[Snapshot](t, 201, do(201, "POST", path+"/snapshots", `{"name":"mine"}`)).ID
	if e := expect(event.SnapshotCreated); *e[0].SnapshotID != snap || *e[0].Name != "mine" || *e[0].SandboxID != sbx {
		t.Errorf("a snapshot has %+v", e)
	}
	h.node.OnSnapshot = func(context.Context, sandbox.ID) error { return errors.New("injected") }
	do(500, "POST", path+"/snapshots", "")
	do(500, "POST", path+"/fork", "")
	h.node.OnSnapshot = nil
	expect()
	do(201, "POST", "/v1/sandboxes", `{"snapshot":"mine"}`)
	if e := expect(event.SandboxCreating, event.SandboxRunning); *e[0].Reason != "snapshot" || *e[0].Detail != snap {
		t.Errorf("the event of a sandbox from a snapshot is %+v", e)
	}
	do(204, "DELETE", "/v1/snapshots/mine", "")
	do(404, "DELETE", "/v1/snapshots/mine", "")
	if e := expect(event.SnapshotDeleted); *e[0].SnapshotID != snap {
		t.Errorf("its end has %+v", e)
	}
	do(201, "POST", path+"/fork", "")
	if e := expect(event.SandboxForked, event.SandboxCreating, event.SandboxRunning); *e[1].Reason != "fork" ||
		*e[1].Detail != sbx {
		t.Errorf("a fork has %+v", e)
	}

	do(202, "POST", "/v1/templates", `{"name":"app","image":"alpine"}`)
	e := expect(event.TemplateCreated, event.TemplateBuildQueued, event.TemplateBuildStarted, event.TemplateBuildReady)
	if *e[3].Name != "app" || *e[3].TemplateVersion != 1 || e[2].TemplateVersion != nil ||
		*e[0].TemplateID != *e[3].TemplateID {
		t.Errorf("a build has %+v", e)
	}
	do(202, "POST", "/v1/templates/app/rebuild", `{"image":"fail"}`)
	expect(event.TemplateBuildQueued, event.TemplateBuildStarted, event.TemplateBuildFailed)
	do(204, "DELETE", "/v1/templates/app", "")
	expect(event.TemplateDeleted)

	h.node.OnCreate = func(context.Context, sandbox.Spec) error { return errors.New("injected") }
	do(500, "POST", "/v1/sandboxes", `{"template":"python"}`)
	h.node.OnCreate = nil
	expect(event.SandboxCreating, event.SandboxFailed)
	do(404, "POST", "/v1/sandboxes", `{"template":"cobol"}`)
	do(204, "DELETE", path, "")
	do(204, "DELETE", path, "")
	expect(event.SandboxDestroying, event.SandboxDestroyed)

	key := as[NewAPIKey](t, 201, do(201, "POST", "/v1/api-keys", `{"name":"ci","scopes":["exec"]}`))
	do(204, "DELETE", "/v1/api-keys/"+key.ID, "")
	do(204, "DELETE", "/v1/api-keys/"+key.ID, "")
	if e := expect(event.KeyCreated, event.KeyRevoked); *e[0].APIKeyID != key.ID || *e[1].Name != "ci" {
		t.Errorf("a key has %+v", e)
	}
	hook := as[Webhook](t, 201, do(201, "POST", "/v1/webhooks",
		`{"url":"https://receiver.invalid/`+secret+`","name":"ops"}`))
	for range 2 {
		do(200, "PATCH", "/v1/webhooks/"+hook.ID, `{"enabled":false}`)
	}
	do(204, "DELETE", "/v1/webhooks/"+hook.ID, "")
	do(404, "DELETE", "/v1/webhooks/"+hook.ID, "")
	if e := expect(event.WebhookCreated, event.WebhookDisabled, event.WebhookDeleted); *e[0].WebhookID != hook.ID ||
		*e[0].Name != "ops" || *e[1].Reason != "requested" || *e[2].WebhookID != hook.ID {
		t.Errorf("a webhook has %+v", e)
	}
	for _, typ := range event.Types() {
		if !seen[typ] {
			t.Errorf("the test caused no event of type %s", typ)
		}
		if !FeedEventType(typ).Valid() {
			t.Errorf("openapi.yaml has no type %s", typ)
		}
	}
	h.sameAsListing(t, sbx, facts)

	// No other organization sees any of the events, and none of them holds a secret.
	r := h.send(t, "GET", "/v1/events?limit=200", h.key, "")
	for _, s := range []string{secret, h.key, key.APIKey, h.org.Key.Prefix, *hook.Secret} {
		if strings.Contains(string(r.body), s) {
			t.Errorf("an event holds %q", s)
		}
	}
	others := h.feedOf(t, h.other, "")
	if len(others) != 2 || others[0].Type != "org.created" || *others[0].Name != "other" ||
		others[1].Type != "api_key.created" {
		t.Errorf("another organization sees %+v", others)
	}
	if theirs := h.feedOf(t, h.other, "sandbox="+sbx+"&after="+facts[0].ID); len(theirs) != 0 {
		t.Errorf("another organization sees events of our sandbox: %+v", theirs)
	}
}

// sameAsListing checks that the sandbox's own listing has the same events, except those of ports.
func (h *testServer) sameAsListing(t *testing.T, sbx string, facts []FeedEvent) {
	t.Helper()
	var listed, fed []Event
	for _, e := range as[EventList](t, 200, h.send(t, "GET", "/v1/sandboxes/"+sbx+"/events", h.key, "")).Events {
		e.ID = ""
		listed = append(listed, e)
	}
	slices.Reverse(listed)
	for _, e := range facts {
		if e.SandboxID != nil && *e.SandboxID == sbx && e.To != nil {
			reason := ""
			if e.Reason != nil {
				reason = *e.Reason
			}
			fed = append(fed, Event{Time: e.Time, From: e.From, To: *e.To, Reason: reason, Detail: e.Detail})
		}
	}
	if diff := cmp.Diff(listed, fed); diff != "" {
		t.Errorf("the listing of the sandbox (-) and the feed (+) differ:\n%s", diff)
	}
}

func TestFeedFilters(t *testing.T) {
	h := newTestServer(t)
	first, second := h.newSandbox(t), h.newSandbox(t)
	types := func(key, query string) []FeedEventType {
		t.Helper()
		return each(h.feedOf(t, key, query), func(e FeedEvent) FeedEventType { return e.Type })
	}
	two := []FeedEventType{"org.created", "sandbox.running", "sandbox.running"}
	if got := types(h.key, "type=sandbox.running&type=org.created"); !slices.Equal(got, two) {
		t.Errorf("of two types: %q", got)
	}
	for _, e := range h.feedOf(t, h.key, "sandbox="+second.ID) {
		if *e.SandboxID != second.ID {
			t.Errorf("the events of another sandbox are %+v", e)
		}
	}
	if got := types(h.key, "type=sandbox.creating&sandbox="+first.ID); len(got) != 1 {
		t.Errorf("the events of one type of one sandbox are %q", got)
	}
	// A key sees the events of the subjects that it may read.
	for _, tt := range []struct {
		scope auth.Scope
		sees  []FeedEventType
	}{
		{auth.SandboxesRead, []FeedEventType{"sandbox.creating", "sandbox.running", "sandbox.creating", "sandbox.running"}},
		{auth.SandboxesWrite, []FeedEventType{"sandbox.creating", "sandbox.running", "sandbox.creating", "sandbox.running"}},
		{auth.TemplatesRead, []FeedEventType{"template.created"}},
	} {
		_, key := h.newKey(t, 0, tt.scope)
		if got := types(key, ""); !slices.Equal(got, tt.sees) {
			t.Errorf("with %s one sees %q", tt.scope, got)
		}
		if r := h.send(t, "GET", "/v1/events?type=api_key.created", key, ""); r.status != 403 ||
			r.problem.Code != "scope_missing" {
			t.Errorf("a key with the scope %s may read events of keys: %d %s", tt.scope, r.status, r.body)
		}
	}
	_, key := h.newKey(t, 0, auth.Exec, auth.Files)
	if r := h.send(t, "GET", "/v1/events", key, ""); r.status != 403 || r.problem.Code != "scope_missing" {
		t.Errorf("with exec: %d %s", r.status, r.body)
	}
	h.check(t, []refusal{
		{"after no id", "GET", "/v1/events?after=x", "", nil, 400, "invalid_after", "after"},
		{"after an id of a sandbox's listing", "GET", "/v1/events?after=evt_0000000003", "", nil, 400, "invalid_after",
			"after"},
		{"cursor", "GET", "/v1/events?cursor=x", "", nil, 400, "invalid_cursor", "cursor"},
		{"type", "GET", "/v1/events?type=sandbox.born", "", nil, 400, "invalid_type", "type"},
		{"sandbox", "GET", "/v1/events?sandbox=x", "", nil, 400, "invalid_sandbox", "sandbox"},
		{"limit", "GET", "/v1/events?limit=0", "", nil, 400, "invalid_limit", "limit"},
		{"last event", "GET", "/v1/events", "", header("Last-Event-ID", "x"), 400, "invalid_last_event_id", "Last-Event-ID"},
	})
}

// feedStream follows the feed and returns the stream of its events, which begins with "ready".
func (h *testServer) feedStream(t *testing.T, key, query, last string) *bufio.Reader {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), "GET", h.url+"/v1/events?"+query, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+key)
	r.Header.Set("Accept", eventStream)
	if last != "" {
		r.Header.Set("Last-Event-ID", last)
	}
	resp, err := h.http.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != eventStream {
		b, _ := io.ReadAll(resp.Body)
		t.Fatalf("answered %d %s", resp.StatusCode, b)
	}
	stream := bufio.NewReader(resp.Body)
	if e := readEvent(t, stream); e["event"] != "ready" || e["id"] == "" {
		t.Fatalf("the stream begins with %v", e)
	}
	return stream
}

func nextFeedEvent(t *testing.T, r *bufio.Reader) FeedEvent {
	t.Helper()
	e := readEvent(t, r)
	var f FeedEvent
	if err := json.Unmarshal([]byte(e["data"]), &f); err != nil || e["event"] != "event" || f.ID != e["id"] {
		t.Fatalf("event %v, %v", e, err)
	}
	return f
}

func TestFeedIsFollowed(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	live := h.feedStream(t, h.key, "", "")
	other := h.feedStream(t, h.other, "", "")
	h.send(t, "PUT", "/v1/sandboxes/"+sbx.ID+"/egress", h.key, `{"mode":"deny_all"}`)
	h.send(t, "POST", "/v1/sandboxes", h.other, `{"template":"python"}`)
	if e := nextFeedEvent(t, live); e.Type != "sandbox.egress_changed" || *e.SandboxID != sbx.ID {
		t.Errorf("the first new event is %+v", e)
	}
	if e := nextFeedEvent(t, other); e.Type != "sandbox.creating" {
		t.Errorf("another organization's first new event is %+v", e)
	}
	// A follower that reconnects continues after its last event.
	all := h.feedOf(t, h.key, "")
	late := h.feedStream(t, h.key, "after="+all[3].ID, all[1].ID)
	for _, want := range all[2:] {
		if diff := cmp.Diff(want, nextFeedEvent(t, late)); diff != "" {
			t.Error(diff)
		}
	}
	// The organization has two followers now, which is the limit.
	r := h.send(t, "GET", "/v1/events", h.key, "", header("Accept", eventStream))
	if r.status != 429 || r.problem.Code != "too_many_followers" {
		t.Errorf("a third: %d %s", r.status, r.body)
	}
}

// TestFeedPassesWhatDoesNotMatch follows a rare type of event and checks that the stream reports
// how far it has read.
func TestFeedPassesWhatDoesNotMatch(t *testing.T) {
	h := newTestServer(t)
	stream := h.feedStream(t, h.key, "type=template.deleted", "")
	h.newSandbox(t)
	if e := readEvent(t, stream); len(e) != 1 || e["id"] == "" {
		t.Errorf("got %v, want an id without an event", e)
	}
	h.send(t, "DELETE", "/v1/templates/mine", h.key, "")
	for e := readEvent(t, stream); e["event"] != "event"; e = readEvent(t, stream) {
		if len(e) != 1 {
			t.Fatalf("event %v", e)
		}
	}
}

// awaitError reads a stream up to an error event, which must be the last event.
func awaitError(t *testing.T, r *bufio.Reader, status int, code string) {
	t.Helper()
	for {
		e := readEvent(t, r)
		if e["event"] != "error" {
			continue
		}
		var p Problem
		if err := json.Unmarshal([]byte(e["data"]), &p); err != nil || p.Status != status || p.Code != code {
			t.Errorf("the stream ends with %v, %v; want %d %s", e, err, status, code)
		}
		if rest, err := io.ReadAll(r); err != nil || strings.Trim(string(rest), ":\n") != "" {
			t.Errorf("got %q, %v after the end", rest, err)
		}
		return
	}
}

func TestFeedEndsWithTheServer(t *testing.T) {
	stopping, stop := context.WithCancel(t.Context())
	h := newTestServer(t, func(_ *auth.Config, _ *sandbox.Config, c *Config) { c.Stopping = stopping })
	stream := h.feedStream(t, h.key, "", "")
	stop()
	awaitError(t, stream, 503, "stopping")
}

func TestFeedEndsWithTheKey(t *testing.T) {
	h := newTestServer(t)
	h.server.front.Patience.Quiet = 20 * time.Millisecond
	key, secret := h.newKey(t, 0, auth.SandboxesRead)
	revoked := h.feedStream(t, secret, "", "")
	_, short := h.newKey(t, time.Second, auth.SandboxesRead)
	expired := h.feedStream(t, short, "", "")
	h.send(t, "DELETE", "/v1/api-keys/"+key.ID, h.key, "")
	awaitError(t, revoked, 401, "unauthenticated")
	awaitError(t, expired, 401, "unauthenticated")
	h.feedStream(t, h.key, "", "") // both followers have left
}

// TestFeedOfDropped asks for events after dropped ones and checks that only a reader that misses
// events is refused.
func TestFeedOfDropped(t *testing.T) {
	h := newTestServer(t)
	before, others := h.feedOf(t, h.key, ""), h.lastOf(t, h.other)
	h.newSandbox(t)
	if n, err := h.db.TrimEvents(t.Context(), time.Now().Add(time.Hour), 0); err != nil || n == 0 {
		t.Fatal(n, err)
	}
	for name, edit := range map[string]func(*http.Request){"a page": func(*http.Request) {},
		"a stream": header("Accept", eventStream)} {
		r := h.send(t, "GET", "/v1/events?after="+before[0].ID, h.key, "", edit)
		if r.status != 410 || r.problem.Code != fault.CodeEventsGone {
			t.Errorf("%s: %d %s", name, r.status, r.body)
		}
	}
	if got := h.feedOf(t, h.key, ""); len(got) != 1 || got[0].Type != "sandbox.running" {
		t.Errorf("what is left is %+v", got)
	}
	h.feedOf(t, h.other, "after="+others) // no event of this organization is missing
	stream := h.feedStream(t, h.key, "", "")
	h.newSandbox(t)
	nextFeedEvent(t, stream)
}
