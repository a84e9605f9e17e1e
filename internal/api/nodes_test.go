package api

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/noderpc"
	"github.com/cayhq/cay/internal/pki"
)

// The id and the name of the node of a test server.
const (
	nodeID   = "abcdef"
	nodeName = "host-1"
)

// openNodes returns the nodes of the test server: its own, whose orders its sandboxes get.
func (h *testServer) openNodes(t testing.TB, log *slog.Logger) *fleet.Service {
	t.Helper()
	if _, err := h.db.StartSession(t.Context(), nodeID, false); err != nil {
		t.Fatal(err)
	}
	authority, err := pki.NewAuthority("ABC", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	nodes := fleet.New(fleet.Config{Self: nodeID, Now: h.db.Now, Log: log,
		CA:   noderpc.CA{Signer: authority, Trusted: authority.Certificate()},
		Obey: func(o fleet.Orders) { h.sandboxes.SetCordon(o.Cordoned, o.Drain) }}, h.db)
	about := fleet.About{Version: "test", VCPUs: 2, MemoryMB: 4096, MaxSandboxes: 10}
	if err := nodes.Register(t.Context(), nodeName, map[string]string{"zone": "a"}, about); err != nil {
		t.Fatal(err)
	}
	return nodes
}

// TestPlacement creates sandboxes that need labels of a server that is alone.
func TestPlacement(t *testing.T) {
	h := newTestServer(t)
	create := func(status int, placement string) Problem {
		t.Helper()
		r := h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"python","placement":`+placement+`}`)
		if r.status != status {
			t.Errorf("%s: %d %s", placement, r.status, r.body)
		}
		if status == 201 {
			return Problem{}
		}
		return r.problem
	}
	create(201, `{"require":{"zone":"a"}}`)
	create(201, `{}`)
	for _, bad := range []string{`{"require":{"zone":"b"}}`, `{"require":{"rack":""}}`,
		`{"require":{"zone":"a","rack":"1"}}`, `{"require":{"no name":"a"}}`, `{"require":{"zone":"` + strings.Repeat("a", 64) + `"}}`} {
		if p := create(400, bad); p.Field == nil || *p.Field != "placement.require" {
			t.Errorf("%s: %+v", bad, p)
		}
	}
	r := h.send(t, "POST", "/v1/sandboxes", h.key, `{"snapshot":"s","placement":{"require":{"zone":"a"}}}`)
	if r.status != 400 || r.problem.Field == nil || *r.problem.Field != "placement.require" {
		t.Errorf("with a snapshot: %d %s", r.status, r.body)
	}
}

// TestNodes cordons and drains the node by calls, and checks what calls about sandboxes are answered meanwhile.
func TestNodes(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	all := as[NodeList](t, 200, h.send(t, "GET", "/v1/nodes", h.key, "")).Nodes
	if len(all) != 1 {
		t.Fatalf("the nodes are %+v", all)
	}
	n := all[0]
	if n.ID != nodeID || n.Name != nodeName || n.Status != NodeStatusReady || n.Labels["zone"] != "a" || n.VCPUs != 2 ||
		n.Sandboxes != 1 || n.Active != 1 || n.StartedAt.IsZero() || n.CordonedAt != nil {
		t.Errorf("the node is %+v", n)
	}
	n = as[Node](t, 200, h.send(t, "POST", "/v1/nodes/"+nodeName+"/drain", h.key, ""))
	if left := time.Until(*n.DrainBy); n.Status != NodeStatusDraining || left < 59*time.Minute || left > time.Hour {
		t.Errorf("draining: %+v", n)
	}
	r := h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"python"}`)
	if r.status != 503 || r.problem.Code != "no_capacity" || r.problem.Detail != "this machine is cordoned" ||
		r.header.Get("Retry-After") == "" {
		t.Errorf("a create: status %d %s", r.status, r.body)
	}
	if r := h.send(t, "DELETE", "/v1/sandboxes/"+sbx.ID, h.key, ""); r.status != 204 {
		t.Errorf("a destroy: status %d %s", r.status, r.body)
	}
	deadline := time.Now().Add(90 * time.Second)
	for n.Status != NodeStatusDrained {
		if n = as[Node](t, 200, h.send(t, "GET", "/v1/nodes/"+nodeID, h.key, "")); time.Now().After(deadline) {
			t.Fatalf("the node without a sandbox is %+v", n)
		}
	}
	if n = as[Node](t, 200, h.send(t, "POST", "/v1/nodes/"+nodeID+"/cordon", h.key, "{}")); n.Status != NodeStatusDrained {
		t.Errorf("a cordon during a drain: %+v", n)
	}
	if n = as[Node](t, 200, h.send(t, "POST", "/v1/nodes/"+nodeID+"/uncordon", h.key, "")); n.Status != NodeStatusReady {
		t.Errorf("uncordoned: %+v", n)
	}
	h.newSandbox(t)
}

// TestNodeTokens makes a token, joins with it, and removes the node.
func TestNodeTokens(t *testing.T) {
	h := newTestServer(t)
	token := as[NodeToken](t, 201, h.send(t, "POST", "/v1/nodes/tokens", h.key,
		`{"name":"host-2","labels":{"zone":"b"},"expires_in":"5m"}`))
	if left := time.Until(token.ExpiresAt); left < 4*time.Minute || left > 5*time.Minute {
		t.Errorf("the token expires in %s", left)
	}
	if strings.Contains(h.log.String(), strings.Split(token.Token, ".")[0]) {
		t.Error("the token is in the log")
	}
	key, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	request, err := pki.NewRequest(key)
	if err != nil {
		t.Fatal(err)
	}
	join := fleet.JoinRequest{Token: token.Token, CSR: string(request), Name: "ignored"}
	if _, err := h.nodes.Join(t.Context(), join); err != nil {
		t.Fatal(err)
	}
	n := as[Node](t, 200, h.send(t, "GET", "/v1/nodes/host-2", h.key, ""))
	if n.Status != NodeStatusUnreachable || n.Labels["zone"] != "b" || n.JoinedAt == nil {
		t.Errorf("the node is %+v", n)
	}
	if r := h.send(t, "POST", "/v1/nodes/tokens", h.key, `{"rejoin":"host-2"}`); r.status != 201 {
		t.Errorf("a token to join again: status %d %s", r.status, r.body)
	}
	if r := h.send(t, "DELETE", "/v1/nodes/"+n.ID, h.key, ""); r.status != 204 {
		t.Errorf("a removal: status %d %s", r.status, r.body)
	}
	if all := as[NodeList](t, 200, h.send(t, "GET", "/v1/nodes", h.key, "")).Nodes; len(all) != 1 {
		t.Errorf("the nodes are %+v", all)
	}
}

func TestNodeCallsRefused(t *testing.T) {
	h := newTestServer(t)
	const node = "/v1/nodes/" + nodeName
	h.check(t, []refusal{
		{"a removal of none", "DELETE", "/v1/nodes/none", "", nil, 404, "node_not_found", ""},
		{"a removal of the server's own", "DELETE", node, "", nil, 409, "node_in_use", ""},
		{"a long token", "POST", "/v1/nodes/tokens", `{"expires_in":"16m"}`, nil, 400, "invalid_expires_in", "expires_in"},
		{"a token for a name", "POST", "/v1/nodes/tokens", `{"name":"A"}`, nil, 400, "invalid_name", "name"},
		{"a token for none", "POST", "/v1/nodes/tokens", `{"rejoin":"none"}`, nil, 404, "node_not_found", ""},
		{"an unknown node", "GET", "/v1/nodes/none", "", nil, 404, "node_not_found", ""},
		{"a strange name", "GET", "/v1/nodes/%00%ff", "", nil, 404, "node_not_found", ""},
		{"a cordon of none", "POST", "/v1/nodes/none/cordon", "", nil, 404, "node_not_found", ""},
		{"an uncordon of none", "POST", "/v1/nodes/none/uncordon", "", nil, 404, "node_not_found", ""},
		{"a drain of none", "POST", "/v1/nodes/none/drain", "", nil, 404, "node_not_found", ""},
		{"a body", "POST", node + "/cordon", `{"a":1}`, nil, 400, "unknown_field", "a"},
		{"a body of an uncordon", "POST", node + "/uncordon", `{"a":1}`, nil, 400, "unknown_field", "a"},
		{"a time that is none", "POST", node + "/drain", `{"timeout":"soon"}`, nil, 400, "invalid_timeout", "timeout"},
		{"no time", "POST", node + "/drain", `{"timeout":"0s"}`, nil, 400, "invalid_timeout", "timeout"},
		{"a long time", "POST", node + "/drain", `{"timeout":"169h"}`, nil, 400, "invalid_timeout", "timeout"},
		{"an unknown field", "POST", node + "/drain", `{"destroy":true}`, nil, 400, "unknown_field", "destroy"},
		{"a parameter", "GET", "/v1/nodes?limit=1", "", nil, 400, "unknown_parameter", "limit"},
	})
	if n := as[Node](t, 200, h.send(t, "GET", node, h.key, "")); n.Status != NodeStatusReady || n.DrainBy != nil {
		t.Errorf("the node is %+v", n)
	}
}
