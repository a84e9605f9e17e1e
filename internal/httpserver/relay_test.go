package httpserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
)

// failed returns the answer to a call that fails, with the passage if it is not nil.
func failed(p *Passage, err error) *httptest.ResponseRecorder {
	r := httptest.NewRequest("POST", "/", nil)
	if p != nil {
		r = r.WithContext(context.WithValue(r.Context(), passageKey{}, *p))
	}
	w := httptest.NewRecorder()
	frontOf(func(*Recorder, *http.Request) error { return err }).ServeHTTP(w, r)
	return w
}

// TestForwardedCallsFail checks what a node tells a replica about a call that it does not do, and that no caller is
// told so.
func TestForwardedCallsFail(t *testing.T) {
	there := fault.New(fault.Unavailable, fault.CodeElsewhere, "it is on another machine").On("n2")
	unavailable := func(code string) error { return fault.New(fault.Unavailable, code, "not now") }
	replica, offered := &Passage{Nonce: "n"}, &Passage{Nonce: "n", Offered: true}
	for name, c := range map[string]struct {
		p      *Passage
		err    error
		status int
		node   string
	}{
		"elsewhere, a caller":    {nil, there, 503, ""},
		"elsewhere, a replica":   {replica, there, 421, "n n2"},
		"elsewhere, offered":     {offered, there, 421, "n n2"},
		"full, a caller":         {nil, unavailable(fault.CodeNoCapacity), 503, ""},
		"full, a replica":        {replica, unavailable(fault.CodeNoCapacity), 503, ""},
		"full, offered":          {offered, unavailable(fault.CodeNoCapacity), 503, "n -"},
		"shutting down, offered": {offered, unavailable(fault.CodeShuttingDown), 503, "n -"},
		"no image, offered":      {offered, unavailable(fault.CodeImageUnavailable), 503, "n -"},
		"unreachable, offered":   {offered, unavailable(fault.CodeNodeUnreachable), 503, ""},
		"over quota, offered":    {offered, fault.New(fault.Exhausted, fault.CodeQuotaExceeded, "over"), 429, ""},
		"invalid, offered":       {offered, fault.InvalidField("a", "b"), 400, ""},
		"a defect, offered":      {offered, errors.New("x"), 500, ""},
	} {
		if w := failed(c.p, c.err); w.Code != c.status || w.Header().Get(nodeHeader) != c.node {
			t.Errorf("%s: %d with %q, want %d with %q", name, w.Code, w.Header().Get(nodeHeader), c.status, c.node)
		}
	}
	if id := failed(&Passage{ID: "req_of_the_replica"}, there).Header().Get("X-Request-Id"); id != "req_of_the_replica" {
		t.Errorf("the node's id of the request is %q", id)
	}
}

// TestRefusalIsTheNodes has an application in a sandbox answer as a node that refuses.
func TestRefusalIsTheNodes(t *testing.T) {
	for name, value := range map[string]string{"no nonce": "-", "another nonce": "m -", "none": ""} {
		resp := &http.Response{StatusCode: http.StatusServiceUnavailable, Header: http.Header{nodeHeader: {value}}}
		if err := misdirected(resp, "n"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	resp := &http.Response{StatusCode: http.StatusServiceUnavailable, Header: http.Header{nodeHeader: {"n -"}}}
	if err := misdirected(resp, "n"); !errors.Is(err, errRefused) {
		t.Errorf("a refusal: %v", err)
	}
	resp.StatusCode = http.StatusOK
	if err := misdirected(resp, "n"); err != nil {
		t.Errorf("an answer: %v", err)
	}
}

// TestMadeSandbox checks that a replica learns which sandbox a call made, from its node alone.
func TestMadeSandbox(t *testing.T) {
	r := httptest.NewRequest("POST", "/", nil)
	maker := frontOf(func(w *Recorder, r *http.Request) error {
		CallOf(r).Sandbox = "sbx_1"
		w.WriteHeader(http.StatusCreated)
		return nil
	})
	for name, c := range map[string]struct {
		p    *Passage
		want string
	}{"a caller": {nil, ""}, "a replica": {&Passage{Nonce: "n"}, "n sbx_1"},
		"a replica that knows": {&Passage{Nonce: "n", Sandbox: "sbx_1"}, ""}} {
		in := r
		if c.p != nil {
			in = r.WithContext(context.WithValue(r.Context(), passageKey{}, *c.p))
		}
		w := httptest.NewRecorder()
		maker.ServeHTTP(w, in)
		if got := w.Header().Get(sandboxHeader); got != c.want {
			t.Errorf("%s is told %q, want %q", name, got, c.want)
		}
	}
	call := &Call{}
	takeMade(call, http.Header{sandboxHeader: {"m sbx_1"}}, "n")
	if call.Sandbox != "" {
		t.Errorf("an application said that the call made %q", call.Sandbox)
	}
	h := http.Header{sandboxHeader: {"n sbx_1"}}
	takeMade(call, h, "n")
	if call.Sandbox != "sbx_1" || len(h) != 0 {
		t.Errorf("the call made %q, and the caller gets %v", call.Sandbox, h)
	}
}

// TestCallerOf reads the callers of forwarded requests.
func TestCallerOf(t *testing.T) {
	r := httptest.NewRequest("GET", "/", nil)
	r.Header.Set(passageHeader, "anything")
	if _, forwarded, err := CallerOf(r, auth.Admin); forwarded || err != nil {
		t.Errorf("a header alone: %v, %v", forwarded, err)
	}
	with := func(p Passage) *http.Request { return r.WithContext(context.WithValue(r.Context(), passageKey{}, p)) }
	reader := Passage{Who: auth.Principal{Key: auth.Key{ID: "key_1", Scopes: []auth.Scope{auth.SandboxesRead}}}}
	who, forwarded, err := CallerOf(with(reader), auth.SandboxesRead, "")
	if !forwarded || err != nil || who.Key.ID != "key_1" {
		t.Errorf("with the scope: %v, %v, %v", who, forwarded, err)
	}
	if _, _, err := CallerOf(with(reader), auth.SandboxesRead, auth.Exec); !fault.Is(err, fault.Denied) {
		t.Errorf("without a scope: %v", err)
	}
	if _, forwarded, err := CallerOf(with(Passage{Org: "org_1"})); !forwarded || !fault.Is(err, fault.Unauthenticated) {
		t.Errorf("without a key: %v, %v", forwarded, err)
	}
}

// TestRelayEndsAtTheNode checks that a forwarded request goes no further, and that a server without a Relay does all
// calls.
func TestRelayEndsAtTheNode(t *testing.T) {
	r := httptest.NewRequest("GET", "/", nil)
	forwarded := r.WithContext(context.WithValue(r.Context(), passageKey{}, Passage{}))
	node, replica := &Relay{Self: "n1"}, &Relay{}
	for name, c := range map[string]struct {
		relay *Relay
		r     *http.Request
		node  string
		want  bool
	}{
		"no relay":                 {nil, r, "n1", false},
		"its own":                  {node, r, "n1", false},
		"another's":                {node, r, "n2", true},
		"another's, forwarded":     {node, forwarded, "n2", false},
		"a replica's":              {replica, r, "n1", true},
		"of no node, at a replica": {replica, r, "", true},
	} {
		if got := c.relay.Away(c.r, c.node); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestOwnRefusalGoesOn has this server refuse a create that it was to try first.
func TestOwnRefusalGoesOn(t *testing.T) {
	node := func(name string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			p, _ := PassageOf(r.Context())
			fmt.Fprintf(w, "%s got %s, offered %t", name, must(io.ReadAll(r.Body)), p.Offered)
		})
	}
	f := startFleet(t, map[string]http.Handler{"n1": node("n1"), "n2": node("n2")})
	full := fault.New(fault.Unavailable, fault.CodeNoCapacity, "full")
	for name, c := range map[string]struct {
		nodes  []string
		err    error
		status int
		want   string
	}{
		"full":            {[]string{"n0", "n1", "n2"}, full, 200, "n1 got body, offered true"},
		"none":            {nil, full, 503, fault.CodeNoCapacity},
		"full, the last":  {[]string{"n0"}, full, 503, fault.CodeNoCapacity},
		"has it":          {[]string{"n0", "n1"}, fault.New(fault.Unavailable, fault.CodeElsewhere, "").On("n2"), 200, "n2 got body, offered false"},
		"has it, is gone": {[]string{"n0", "n1"}, fault.New(fault.Unavailable, fault.CodeElsewhere, "").On("n9"), 503, fault.CodeNodeUnreachable},
		"invalid":         {[]string{"n0", "n1"}, fault.InvalidField("a", "b"), 400, "invalid_a"},
	} {
		relay := &Relay{Self: "n0", Forwarder: f.forwarder,
			Nodes: func(context.Context, Needs) ([]string, error) { return c.nodes, nil }}
		w := httptest.NewRecorder()
		frontOf(func(w *Recorder, r *http.Request) error {
			here, err := relay.Place(w, r, 100, Passage{Front: "api"}, nil)
			if here == nil || err != nil {
				t.Errorf("%s: this server is not tried first: %v", name, err)
			}
			return c.err
		}).ServeHTTP(w, httptest.NewRequest("POST", "/", strings.NewReader("body")))
		if w.Code != c.status || w.Body.String() != c.want {
			t.Errorf("%s: %d %q, want %d %q", name, w.Code, w.Body, c.status, c.want)
		}
	}
}

// TestGather asks five nodes, of which one fails, one answers too much and one has no connection.
func TestGather(t *testing.T) {
	answer := func(status int, body string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet || r.URL.Path != "/v1/what" || r.Header.Get("X-Api-Key") != "" {
				t.Errorf("a node got %s %s with %v", r.Method, r.URL, r.Header)
			}
			w.WriteHeader(status)
			fmt.Fprint(w, body, r.URL.RawQuery)
		})
	}
	f := startFleet(t, map[string]http.Handler{"n1": answer(200, "one "), "n2": answer(200, "two "),
		"n3": answer(503, ""), "n4": answer(200, "0123456789")})
	relay := &Relay{Forwarder: f.forwarder}
	queries := map[string]string{"n1": "a=1", "n2": "a=2", "n3": "", "n4": "", "n5": ""}
	for limit, want := range map[int64]map[string]string{
		10: {"n1": "one a=1", "n2": "two a=2", "n4": "0123456789"},
		9:  {"n1": "one a=1", "n2": "two a=2"},
	} {
		got := map[string]string{}
		front := frontOf(func(_ *Recorder, r *http.Request) error {
			return relay.Gather(r, queries, limit, Passage{Front: "api"}, func(node string, body []byte) error {
				got[node] = string(body)
				return nil
			})
		})
		r := httptest.NewRequest("GET", "/v1/what?a=3", nil)
		r.Header.Set("X-API-Key", "secret")
		w := httptest.NewRecorder()
		front.ServeHTTP(w, r)
		if w.Code != 200 || !maps.Equal(got, want) {
			t.Errorf("of at most %d bytes: %d, %v, want %v", limit, w.Code, got, want)
		}
	}
}

// TestLostNode refuses calls that a lost node alone can do.
func TestLostNode(t *testing.T) {
	since := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	relay := &Relay{Self: "n1", Lost: func(node string) (time.Time, bool) { return since, node == "n3" }}
	r := httptest.NewRequest("GET", "/", nil)
	for node, want := range map[string][2]bool{"n1": {false, false}, "n2": {true, true}, "n3": {true, false}} {
		if got := [2]bool{relay.Away(r, node), relay.AwayUnlessLost(r, node)}; got != want {
			t.Errorf("%s is away, and so for what any server can do if it is lost: %v, want %v", node, got, want)
		}
	}
	err := relay.Send(httptest.NewRecorder(), httptest.NewRequest("POST", "/", nil), "n3", Passage{})
	if f := fault.As(err); f == nil || f.Code != fault.CodeNodeUnreachable || !unsent(err) ||
		!strings.Contains(f.Detail, "2026-01-02T03:04:05Z") {
		t.Errorf("a call for a lost node: %v", err)
	}
	if _, lost := (*Relay)(nil).LostSince("n3"); lost {
		t.Error("a server that is alone has a lost node")
	}
}
