package api

import (
	"context"
	"log/slog"
	"net/http"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/nodetest"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
	"github.com/cayhq/cay/internal/template"
)

// cluster has two nodes with the same records in PostgreSQL, and a replica that forwards to them.
type cluster struct {
	t       *testing.T
	db      *store.DB // of the replica
	key     string
	nodes   map[string]*nodetest.Fake
	servers map[string]*server
	order   []string         // in which new sandboxes are offered to nodes
	needs   httpserver.Needs // of the latest create, as the replica knew them
	replica http.Handler
}

var settingsOfTwo = sandbox.Config{Sizes: []sandbox.Size{{Name: "small", VCPUs: 1, MemoryMB: 512}},
	DefaultSize: "small", DefaultDisk: 512, MaxDisk: 512}

// onlyPython is the one template of a cluster.
type onlyPython struct{}

func (onlyPython) Ready(context.Context, string, string) (sandbox.TemplateVersion, error) {
	return sandbox.TemplateVersion{ID: "tpl_aaaaaaaaaaaaaaaaaaaa", Name: "python", Version: 1,
		Shape: sandbox.Shape{Image: "x"}}, nil
}

// anyLabels are nodes of which each has every label.
type anyLabels struct{ Nodes }

func (anyLabels) Takes(context.Context, map[string]string) error { return nil }

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{t: t, nodes: map[string]*nodetest.Fake{}, servers: map[string]*server{}}
	url, err := caytest.StartPostgres(t).Create("two", "")
	if err != nil {
		t.Fatal(err)
	}
	c.db = c.open(url)
	if _, err := c.db.JoinSession(t.Context(), false); err != nil { // else it writes nothing after the nodes have begun
		t.Fatal(err)
	}
	keys := auth.New(c.db, auth.Config{Log: slog.New(slog.DiscardHandler)})
	if _, err := keys.Bootstrap(t.Context(), func(secret string) error { c.key = secret; return nil }); err != nil {
		t.Fatal(err)
	}
	cfg := Config{Auth: keys, Nodes: anyLabels{}, Expect: c.db.Expect, Log: slog.New(slog.DiscardHandler),
		Registry: prometheus.NewRegistry(), Version: "test"}
	handlers := map[string]http.Handler{}
	for _, id := range []string{"n1", "n2"} {
		db := c.open(url)
		if _, err := db.StartSession(t.Context(), id, false); err != nil {
			t.Fatal(err)
		}
		c.nodes[id] = nodetest.NewFake()
		settings := settingsOfTwo
		settings.Node = id
		core := sandbox.New(settings, db, c.nodes[id], onlyPython{}, slog.New(slog.DiscardHandler), nil)
		t.Cleanup(func() {
			if err := core.Close(context.WithoutCancel(t.Context())); err != nil {
				t.Error(err)
			}
		})
		own := cfg
		own.Rows, own.Sandboxes, own.Agent, own.Registry = core, core, newFakeAgent(), prometheus.NewRegistry()
		own.Expect = db.Expect
		c.servers[id] = New(own).(*server)
		handlers[id] = c.servers[id]
	}
	cfg.Relay = &httpserver.Relay{Forwarder: nodetest.Linked(t, handlers),
		Nodes: func(_ context.Context, needs httpserver.Needs) ([]string, error) {
			c.needs = needs
			return c.order, nil
		}}
	c.replica = withoutMachine(cfg, sandbox.NewRows(settingsOfTwo, c.db), template.NewReader(c.db))
	t.Cleanup(func() {
		if err := keys.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return c
}

func (c *cluster) open(url string) *store.DB {
	c.t.Helper()
	db, err := store.OpenPostgres(c.t.Context(), store.PostgresConfig{URL: url, MaxConns: 4})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		if err := db.Close(); err != nil {
			c.t.Error(err)
		}
	})
	return db
}

// ask makes a call to a server of the cluster.
func (c *cluster) ask(to http.Handler, method, path, body string, edit ...func(*http.Request)) reply {
	c.t.Helper()
	r := newRequest(c.t, method, path, c.key, body)
	for _, e := range edit {
		e(r)
	}
	w := answerOf(to, r)
	return reply{status: w.Code, header: w.Header(), body: w.Body.Bytes()}
}

// create makes a sandbox through the replica and returns its id and its node.
func (c *cluster) create(order []string, body string, edit ...func(*http.Request)) (id, node string) {
	c.t.Helper()
	c.order = order
	sbx := as[Sandbox](c.t, 201, c.ask(c.replica, "POST", "/v1/sandboxes", body, edit...))
	row, err := c.db.Get(c.t.Context(), sandbox.ID(sbx.ID))
	if err != nil {
		c.t.Fatal(err)
	}
	return sbx.ID, row.Holder.Node
}

// refused makes a create that must fail.
func (c *cluster) refused(order []string, code string) {
	c.t.Helper()
	c.order = order
	r := c.ask(c.replica, "POST", "/v1/sandboxes", `{"template":"python"}`)
	if p := as[Problem](c.t, 503, r); p.Code != code || r.header.Get("Retry-After") == "" {
		c.t.Errorf("offered to %v: %s", order, r.body)
	}
}

const anyTemplate = `{"template":"python","mode":"persistent"}`

// TestPlaced creates sandboxes through a replica while nodes refuse or cannot be reached.
func TestPlaced(t *testing.T) {
	c := newCluster(t)
	for _, want := range []string{"n1", "n2"} {
		id, node := c.create([]string{want, "n1"}, anyTemplate)
		if node != want {
			t.Errorf("offered to %s first, made on %s", want, node)
		}
		if c.needs.MemoryMB != 0 || c.needs.Labels != nil {
			t.Errorf("a create without a size is placed for %+v", c.needs)
		}
		if r := c.ask(c.replica, "POST", "/v1/sandboxes/"+id+"/execute", `{"command":"true"}`); r.status != 200 {
			t.Errorf("a command on %s: %d %s", want, r.status, r.body)
		}
	}
	c.nodes["n1"].OnFindImage = func(context.Context, string) error {
		return fault.New(fault.Unavailable, fault.CodeImageUnavailable, "not here").After(5e9)
	}
	if _, node := c.create([]string{"n1", "n2"}, anyTemplate); node != "n2" {
		t.Errorf("made on %s, which has no image", node)
	}
	c.refused([]string{"n1"}, fault.CodeImageUnavailable)
	c.nodes["n1"].OnFindImage = nil
	c.nodes["n1"].SetFull(true)
	if _, node := c.create([]string{"n1", "n2"}, anyTemplate); node != "n2" {
		t.Errorf("made on %s, which is full", node)
	}
	if list := as[SandboxList](t, 200, c.ask(c.replica, "GET", "/v1/sandboxes?limit=100", "")); len(list.Sandboxes) != 4 {
		t.Errorf("the nodes that refused left sandboxes: %+v", list.Sandboxes)
	}
	if _, node := c.create([]string{"gone", "n2"}, anyTemplate); node != "n2" {
		t.Errorf("made on %s", node)
	}
	c.refused([]string{"n1"}, fault.CodeNoCapacity)
	c.refused([]string{"gone", "n1"}, fault.CodeNoCapacity)
	c.refused([]string{"gone"}, fault.CodeNoCapacity)
	c.refused(nil, fault.CodeNoCapacity)
	c.refused([]string{"g1", "g2", "g3", "g4", "g5", "n2"}, fault.CodeNoCapacity) // no more than placeTries
	c.nodes["n2"].SetFull(true)
	c.refused([]string{"n1", "n2"}, fault.CodeNoCapacity)
	if r := c.ask(c.replica, "POST", "/v1/sandboxes", `{"template":`); r.status != 503 && r.status != 400 {
		t.Errorf("a wrong body: %d %s", r.status, r.body)
	}
	c.nodes["n2"].SetFull(false)
	if r := c.ask(c.replica, "POST", "/v1/sandboxes", `{"size":"x"}`); r.status != 400 {
		t.Errorf("a wrong size: %d %s", r.status, r.body)
	}
	if c.create([]string{"n2"}, `{"template":"python","size":"small"}`); c.needs.MemoryMB != 512 {
		t.Errorf("a create of the size small is placed for %d MiB, want 512", c.needs.MemoryMB)
	}
	const placed = `{"template":"python","placement":{"require":{"zone":"b"}}}`
	if c.create([]string{"n2"}, placed); c.needs.Labels["zone"] != "b" {
		t.Errorf("a create that needs a zone is placed by the labels %v", c.needs.Labels)
	}
}

// TestPlacedHere creates sandboxes on a server that is a replica and a node.
func TestPlacedHere(t *testing.T) {
	c := newCluster(t)
	both := c.servers["n1"]
	relay := *c.replica.(*server).Relay
	relay.Self = "n1"
	both.Relay = &relay
	c.replica = both
	if _, node := c.create([]string{"n1", "n2"}, anyTemplate); node != "n1" {
		t.Errorf("made on %s", node)
	}
	id, node := c.create([]string{"n2", "n1"}, anyTemplate)
	if node != "n2" {
		t.Errorf("made on %s", node)
	}
	if r := c.ask(both, "POST", "/v1/sandboxes/"+id+"/execute", `{"command":"true"}`); r.status != 200 {
		t.Errorf("a command on the other: %d %s", r.status, r.body)
	}
	c.nodes["n1"].SetFull(true)
	if _, node := c.create([]string{"n1", "n2"}, anyTemplate); node != "n2" {
		t.Errorf("made on %s, which is full", node)
	}
	c.nodes["n2"].SetFull(true)
	c.refused([]string{"n1", "n2"}, fault.CodeNoCapacity)
	c.refused([]string{"n2", "n1"}, fault.CodeNoCapacity)
}

// TestRepeatedElsewhere repeats a create with its Idempotency-Key, and makes a sandbox of a snapshot, when the replica
// asks the wrong node first.
func TestRepeatedElsewhere(t *testing.T) {
	c := newCluster(t)
	once := header("Idempotency-Key", "k")
	id, node := c.create([]string{"n1"}, anyTemplate, once)
	if node != "n1" {
		t.Fatalf("made on %s", node)
	}
	if again, _ := c.create([]string{"n2"}, anyTemplate, once); again != id {
		t.Errorf("a repeat made %s, not %s", again, id)
	}
	c.nodes["n2"].SetFull(true)
	if again, _ := c.create([]string{"n2"}, anyTemplate, once); again != id {
		t.Errorf("a repeat at a full node made %s, not %s", again, id)
	}
	c.nodes["n2"].SetFull(false)
	r := c.ask(c.replica, "POST", "/v1/sandboxes", `{"template":"python"}`, once)
	if p := as[Problem](t, 409, r); p.Code != fault.CodeIdempotencyKeyReused {
		t.Errorf("another create with the key: %s", r.body)
	}
	if r := c.ask(c.replica, "POST", "/v1/sandboxes/"+id+"/snapshots", `{"name":"saved"}`); r.status != 201 {
		t.Fatalf("a snapshot: %d %s", r.status, r.body)
	}
	if _, node := c.create([]string{"n2"}, `{"snapshot":"saved"}`); node != "n1" {
		t.Errorf("made from a snapshot of n1 on %s", node)
	}
	if r := c.ask(c.replica, "DELETE", "/v1/snapshots/saved", ""); r.status != 204 {
		t.Errorf("deleting the snapshot: %d %s", r.status, r.body)
	}
	// A node that was asked in vain says so to a caller of its own.
	r = c.ask(c.servers["n2"], "DELETE", "/v1/sandboxes/"+id, "")
	if p := as[Problem](t, 503, r); p.Code != fault.CodeElsewhere {
		t.Errorf("at the wrong server: %s", r.body)
	}
	if r := c.ask(c.replica, "DELETE", "/v1/sandboxes/"+id, ""); r.status != 204 {
		t.Errorf("destroying it: %d %s", r.status, r.body)
	}
}

// TestReadWithoutItsNode reads a sandbox whose node cannot be reached.
func TestReadWithoutItsNode(t *testing.T) {
	c := newCluster(t)
	id, _ := c.create([]string{"n1"}, anyTemplate)
	if sbx := as[Sandbox](t, 200, c.ask(c.replica, "GET", "/v1/sandboxes/"+id, "")); sbx.Network == nil {
		t.Error("the node's answer has no traffic")
	}
	cut := c.replica.(*server)
	relay := *cut.Relay
	relay.Forwarder = unreachable(t).Forwarder
	cut.Relay = &relay
	sbx := as[Sandbox](t, 200, c.ask(cut, "GET", "/v1/sandboxes/"+id, ""))
	if sbx.Network != nil || sbx.Status != "running" {
		t.Errorf("from rows: %+v", sbx)
	}
	r := c.ask(cut, "POST", "/v1/sandboxes/"+id+"/execute", `{"command":"true"}`)
	if p := as[Problem](t, 503, r); p.Code != fault.CodeNodeUnreachable || r.header.Get("Retry-After") == "" {
		t.Errorf("a command: %s", r.body)
	}
}

// TestPoolOfAll reads the pool of a cluster, which is the sum of its nodes' pools.
func TestPoolOfAll(t *testing.T) {
	c := newCluster(t)
	c.order = []string{"n1", "n2", "gone"}
	c.servers["n1"].Sandboxes = pooled{c.servers["n1"].Sandboxes, []sandbox.PoolStatus{
		{Template: "python", Version: 1, Size: "small", Ready: 2, Claimed: 3, Target: 4}}}
	c.servers["n2"].Sandboxes = pooled{c.servers["n2"].Sandboxes, []sandbox.PoolStatus{
		{Template: "python", Version: 1, Size: "small", Ready: 1, Claimed: 1, Target: 1},
		{Template: "node", Size: "small", Ready: 5}}}
	want := map[string]PoolEntry{"node": {Template: "node", Size: "small", Ready: 5},
		"python": {Template: "python", TemplateVersion: 1, Size: "small", Ready: 3, Claimed: 4, Target: 5}}
	got := as[Pool](t, 200, c.ask(c.replica, "GET", "/v1/pool", "")).Pool
	if len(got) != len(want) {
		t.Errorf("the pool is %+v", got)
	}
	for _, e := range got {
		if e != want[e.Template] {
			t.Errorf("%+v, want %+v", e, want[e.Template])
		}
	}
}

// pooled has a pool that the test says.
type pooled struct {
	Sandboxes
	pool []sandbox.PoolStatus
}

func (p pooled) Pool() []sandbox.PoolStatus { return p.pool }
