package api

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/nodetest"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// throughReplica makes test servers answer through a replica, which has no machine and forwards calls to the server
// with the whole core. CAY_TEST_FORWARDED sets it for all tests, [TestForwarded] for some.
var throughReplica = os.Getenv("CAY_TEST_FORWARDED") != ""

// notForwarded skips a test of what is different behind a replica.
func notForwarded(t *testing.T, why string) {
	t.Helper()
	if throughReplica {
		t.Skip("not through a replica: ", why)
	}
}

// replicaOf returns a replica that forwards to the test server's own handler over a real link. The test fails if the
// handler sees a key of a caller.
func (h *testServer) replicaOf(t testing.TB, cfg Config, rows *sandbox.Rows, templates *template.Reader) *server {
	t.Helper()
	node := h.server
	seesNoKey := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		head := fmt.Sprint(r.RequestURI, r.Host, r.Header)
		if strings.Contains(head, h.key) || strings.Contains(head, h.other) {
			t.Errorf("the node sees a key of the caller: %s", head)
		}
		node.ServeHTTP(w, r)
	})
	cfg.Relay = &httpserver.Relay{
		Forwarder: nodetest.Linked(t, map[string]http.Handler{nodeID: seesNoKey}),
		Nodes:     func(context.Context, httpserver.Needs) ([]string, error) { return []string{nodeID}, nil },
		Builder:   func(context.Context) (string, error) { return nodeID, nil },
	}
	return withoutMachine(cfg, rows, templates)
}

// withoutMachine returns a server that has rows and no machine.
func withoutMachine(cfg Config, rows Rows, templates TemplateRows) *server {
	cfg.Rows, cfg.TemplateRows = rows, templates
	cfg.Sandboxes, cfg.Templates, cfg.Agent, cfg.Ports = nil, nil, nil, nil
	cfg.Registry = prometheus.NewRegistry()
	return New(cfg).(*server)
}

// TestForwarded runs other tests through a replica: what a caller sees is the same.
func TestForwarded(t *testing.T) {
	if throughReplica {
		t.Skip("all tests run through a replica")
	}
	throughReplica = true
	defer func() { throughReplica = false }()
	for name, test := range map[string]func(*testing.T){
		"authorization": TestAuthorizationMatrix,
		"life":          TestLifeOfASandbox,
		"idempotency":   TestIdempotency,
		"executions":    TestExecute,
		"streams":       TestStreamedExecution,
		"terminals":     TestTerminalOfABrowser,
		"files":         TestFiles,
		"trees":         TestTreeCalls,
		"ports":         TestPortByPathAndHost,
		"private ports": TestPortRefused,
		"public ports":  TestPortPublic,
		"signed ports":  TestPortSigned,
		"tunnels":       TestTunnel,
		"snapshots":     TestSnapshots,
		"templates":     TestTemplateWithContext,
		"builds":        TestFollowingABuild,
		"fields":        TestAnswersHaveEveryField,
	} {
		t.Run(name, test)
	}
}

// unreachable is a Relay whose nodes cannot be reached.
func unreachable(t *testing.T) *httpserver.Relay {
	return &httpserver.Relay{Forwarder: nodetest.Linked(t, nil),
		Nodes:   func(context.Context, httpserver.Needs) ([]string, error) { return []string{nodeID}, nil },
		Builder: func(context.Context) (string, error) { return nodeID, nil }}
}

// TestEveryRouteHasAPlace calls every route on a replica without a machine whose nodes cannot be reached. Each is
// answered from rows, or says so.
func TestEveryRouteHasAPlace(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	snap := as[Snapshot](t, 201, h.send(t, "POST", "/v1/sandboxes/"+sbx.ID+"/snapshots", h.key, `{"name":"saved"}`))
	cfg := h.server.Config
	cfg.Relay = unreachable(t)
	replica := withoutMachine(cfg, sandbox.NewRows(sandbox.Config{}, h.db), template.NewReader(h.db))
	path := strings.NewReplacer("{id}", sbx.ID, "{snapshot}", snap.ID, "{template}", "python", "{port}", "8080",
		"{process}", "prc_1", "{node}", nodeName, "{webhook}", "whk_1", "{key}", "key_1")
	for pattern, route := range routes {
		method, to, _ := strings.Cut(path.Replace(pattern), " ")
		for _, accept := range []string{"", eventStream} {
			if pattern == "GET /v1/events" && accept != "" {
				continue // does not end
			}
			r := newRequest(t, method, to, h.key, `{"template":"python"}`)
			r.Header.Set("Accept", accept)
			w := answerOf(replica, r)
			far := w.Code == http.StatusServiceUnavailable
			switch at := cmp.Or(route.at, -1); {
			case w.Code == http.StatusInternalServerError:
				t.Errorf("%s: %d %s", pattern, w.Code, w.Body)
			case slices.Contains([]place{holder, holderUnlessLost, snapshotHolder, builder, placed}, at) && !far,
				at == rowsOrBuilder && far != (accept != ""),
				slices.Contains([]place{anywhere, holderOrRows, eachNode}, at) && far:
				t.Errorf("%s with %q is at %d: %d %s", pattern, accept, at, w.Code, w.Body)
			}
		}
	}
	r := newRequest(t, "GET", "/v1/sandboxes/"+sbx.ID+"/ports/8080/", h.key, "")
	if w := answerOf(replica, r); w.Code != 503 || !strings.Contains(w.Body.String(), fault.CodeNodeUnreachable) {
		t.Errorf("a port: %d %s", w.Code, w.Body)
	}
}

// newRequest returns a request as a server gets it.
func newRequest(t *testing.T, method, path, key, body string) *http.Request {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader(body))
	r.Header.Set("Content-Type", "application/json")
	if key != "" {
		r.Header.Set("Authorization", "Bearer "+key)
	}
	return r
}

func answerOf(h http.Handler, r *http.Request) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// replicaWith returns a replica that forwards every request with the passage, without a look at its key.
func replicaWith(forwarder *httpserver.Forwarder, p *httpserver.Passage) http.Handler {
	front := httpserver.New(httpserver.Config{Log: slog.New(slog.DiscardHandler), Patience: httpserver.Usual,
		Failed: func(string) error { return nil },
		Problem: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, err.Error(), http.StatusTeapot)
		}})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		front.Serve(w, r, func(w *httpserver.Recorder, r *http.Request) error {
			p.ID = httpserver.CallOf(r).ID
			return forwarder.Forward(w, r, nodeID, *p)
		})
	})
}

// TestPassageIsNoKey sends calls with the header of a passage to a server that hears clients.
func TestPassageIsNoKey(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	sealed := make(chan string, 1)
	via := roundTripper(func(r *http.Request) (*http.Response, error) {
		sealed <- r.Header.Get("Cay-Passage")
		return nil, io.ErrUnexpectedEOF
	})
	forwarder := &httpserver.Forwarder{Via: func(string) http.RoundTripper { return via }, Log: h.server.Log}
	stolen := httpserver.Passage{Front: frontAPI, Who: h.org, Org: h.org.Org.ID}
	answerOf(replicaWith(forwarder, &stolen), newRequest(t, "GET", "/", "", ""))
	passage := <-sealed
	if passage == "" {
		t.Fatal("there is no passage to steal")
	}
	for _, path := range []string{"/v1/me", "/v1/sandboxes/" + sbx.ID, "/v1/sandboxes/" + sbx.ID + "/ports/8080/"} {
		if r := h.send(t, "GET", path, "", "", header("Cay-Passage", passage)); r.status != 401 {
			t.Errorf("%s with a stolen passage: %d %s", path, r.status, r.body)
		}
	}
}

// TestNodeChecksScopes sends passages of keys without the scope that a call needs, and without a key, to a node.
func TestNodeChecksScopes(t *testing.T) {
	notForwarded(t, "it is the node")
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	forwarder := nodetest.Linked(t, map[string]http.Handler{nodeID: h.server})
	weak := h.org
	weak.Key.Scopes = []auth.Scope{auth.TemplatesRead}
	var p httpserver.Passage
	replica := replicaWith(forwarder, &p)
	to := "/v1/sandboxes/" + sbx.ID
	for name, c := range map[string]struct {
		passage httpserver.Passage
		path    string
		status  int
	}{
		"with all scopes":   {httpserver.Passage{Front: frontAPI, Who: h.org}, to, 200},
		"without the scope": {httpserver.Passage{Front: frontAPI, Who: weak}, to, 403},
		"without a key":     {httpserver.Passage{Front: frontAPI}, to, 401},
		"a port without the scope": {httpserver.Passage{Front: frontPort, Who: weak, Org: h.org.Org.ID, Sandbox: sbx.ID,
			Port: 8080, Shared: true}, to + "/ports/8080/", 403},
		"an unknown front": {httpserver.Passage{Front: "other", Who: h.org}, to, 500},
	} {
		p = c.passage
		if w := answerOf(replica, newRequest(t, "GET", c.path, "", "")); w.Code != c.status {
			t.Errorf("%s: %d %s", name, w.Code, w.Body)
		}
	}
}
