package e2b

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/nodetest"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// throughReplica makes harnesses answer through a replica, which has no machine and forwards calls to the handler with
// the whole core. CAY_TEST_FORWARDED sets it for all tests, [TestForwarded] for some.
var throughReplica = os.Getenv("CAY_TEST_FORWARDED") != ""

// replicaOf returns a replica that forwards to the harness's own handler over a real link. The test fails if the
// handler sees a key or a token of a caller.
func (h *harness) replicaOf(cfg Config, rows Rows, templates TemplateRows, next http.Handler) *Handler {
	node := h.handler
	seesNoKey := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		head := fmt.Sprint(r.RequestURI, r.Host, r.Header)
		for _, secret := range []string{h.key, h.other, trafficHeader + ":", agentapi.TokenHeader + ":[cayt_"} {
			if strings.Contains(head, secret) {
				h.t.Errorf("the node sees %q of the caller: %s", secret, head)
			}
		}
		node.ServeHTTP(w, r)
	})
	h.t.Cleanup(node.Hangup)
	cfg.Relay = &httpserver.Relay{
		Forwarder: nodetest.Linked(h.t, map[string]http.Handler{nodeID: seesNoKey}),
		Nodes:     func(context.Context, httpserver.Needs) ([]string, error) { return []string{nodeID}, nil },
		Builder:   func(context.Context) (string, error) { return nodeID, nil },
	}
	return withoutMachine(cfg, rows, templates, next)
}

// withoutMachine returns a handler that has rows and no machine.
func withoutMachine(cfg Config, rows Rows, templates TemplateRows, next http.Handler) *Handler {
	cfg.Rows, cfg.TemplateRows = rows, templates
	cfg.Sandboxes, cfg.Templates, cfg.Agent, cfg.Ports, cfg.Samples = nil, nil, nil, nil, nil
	cfg.Registry = prometheus.NewRegistry()
	return New(cfg, next)
}

// TestForwarded runs other tests through a replica: what a client sees is the same.
func TestForwarded(t *testing.T) {
	if throughReplica {
		t.Skip("all tests run through a replica")
	}
	throughReplica = true
	defer func() { throughReplica = false }()
	for name, test := range map[string]func(*testing.T){
		"keys":       TestEveryRouteNeedsAKey,
		"creates":    TestCreate,
		"pauses":     TestConnectAndPause,
		"network":    TestSetNetwork,
		"ports":      TestPorts,
		"traffic":    TestTraffic,
		"signatures": TestSignedURLsFindTheirSandbox,
		"wakes":      TestTrafficWakes,
		"builds":     TestBuildTemplate,
		"uploads":    TestUploadsAreSigned,
		"tags":       TestTags,
	} {
		t.Run(name, test)
	}
}

// TestEveryRouteHasALocation calls every route on a replica without a machine whose nodes cannot be reached. Each is
// answered from rows, or says so.
func TestEveryRouteHasALocation(t *testing.T) {
	h := newHarness(t)
	id, token := h.create(`{"templateID":"base"}`)
	cfg := h.handler.Config
	cfg.Relay = &httpserver.Relay{Forwarder: nodetest.Linked(t, nil),
		Nodes:   func(context.Context, httpserver.Needs) ([]string, error) { return []string{nodeID}, nil },
		Builder: func(context.Context) (string, error) { return nodeID, nil }}
	replica := withoutMachine(cfg, sandbox.NewRows(sandbox.Config{}, h.db), template.NewReader(h.db),
		http.NotFoundHandler())
	h.url = serve(t, replica)
	key := h.newKey(auth.Admin)
	for pattern, route := range replica.table() {
		method, path, ok := strings.Cut(pattern, " ")
		if !ok {
			method, path = "GET", pattern
		}
		path = strings.NewReplacer("{id}", id, "{ref}", "base", "{alias}", "base", "{rest...}", "x", "{build}", "y",
			"{what}", "tags", "{webhook}", "x", "{hash}", strings.Repeat("0", 64)).Replace(path)
		if route.at == eachHolder {
			path += "?sandbox_ids=" + id
		}
		r := h.send(method, path, `{}`, "X-API-Key", key)
		far := route.at != 0 && route.at != anywhere && route.at != eachHolder
		if r.status == http.StatusInternalServerError || far != (r.status == http.StatusServiceUnavailable) || route.at == 0 {
			t.Errorf("%s is at %d: %d %s", pattern, route.at, r.status, r.body)
		}
	}
	for name, heads := range map[string][]string{"the agent": toEnvd(id, token),
		"a port": {idHeader, id, portHeader, "8080"}} {
		if r := h.send("GET", "/envs", "", heads...); r.status != http.StatusServiceUnavailable {
			t.Errorf("%s: %d %s", name, r.status, r.body)
		}
	}
}
