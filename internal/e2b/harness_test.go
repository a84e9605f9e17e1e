package e2b

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/blob"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/nodetest"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sampler"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
	"github.com/cayhq/cay/internal/template"
	"github.com/cayhq/cay/internal/webhook"
)

// harness runs the Handler over the real core, a real database and the real client of agents. The
// machine and the agents are fakes.
type harness struct {
	t         *testing.T
	url       string
	node      *nodetest.Fake
	sandboxes *sandbox.Service
	templates *template.Service
	db        *store.DB
	auth      *auth.Service
	agents    *agentapi.Client
	handler   *Handler
	hooks     *webhook.Service
	log       *buffer

	key   string // of the operator's organization, in E2B's format
	org   auth.Principal
	other string // key of another organization

	mu sync.Mutex
	// +checklocks:mu
	seen []*http.Request // requests that reached the agents or ports
	// +checklocks:mu
	answer http.HandlerFunc // the agent's handler
	// +checklocks:mu
	carried []portproxy.Destination // given to Serve
	// +checklocks:mu
	portErr error // of Serve
}

// nodeID is the id of the harness's node.
const nodeID = "abcdef"

// contextLimit bounds contexts and uploads of the harness, in bytes.
const contextLimit = 1 << 20

// Serve is the fake of the port proxy.
func (h *harness) Serve(w http.ResponseWriter, r *http.Request, to portproxy.Destination) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.portErr != nil {
		return h.portErr
	}
	h.carried, h.seen = append(h.carried, to), append(h.seen, r.Clone(context.Background()))
	w.WriteHeader(http.StatusAccepted)
	return nil
}

// buffer is a log that is safe for concurrent use.
type buffer struct {
	mu sync.Mutex
	// +checklocks:mu
	b bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// openStore opens the records of the harness's node.
func openStore(t *testing.T) *store.DB {
	t.Helper()
	db, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "cay.db"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.StartSession(t.Context(), nodeID, false); err != nil {
		t.Fatal(err)
	}
	return db
}

func newHarness(t *testing.T) *harness {
	t.Helper()
	ctx := t.Context()
	h := &harness{t: t, node: nodetest.NewFake(), log: &buffer{}}
	log := slog.New(slog.NewTextHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	db := openStore(t)
	contexts, err := blob.Open(filepath.Join(t.TempDir(), "contexts"), 0)
	if err != nil {
		t.Fatal(err)
	}
	templates := template.New(template.Config{Sizes: []string{"small"}, MaxDiskMB: 8192, ContextLimit: contextLimit},
		db, nil,
		contexts, db, log)
	h.templates, h.db = templates, db
	h.auth = auth.New(db, auth.Config{Quota: auth.Quota{Sandboxes: 10}, Log: log})
	settings := sandbox.Config{Node: nodeID, Sizes: []sandbox.Size{{Name: "small", VCPUs: 1, MemoryMB: 512}},
		DefaultSize: "small", DefaultDisk: 2048, MaxDisk: 8192, KeepDestroyed: time.Hour, MaxSnapshots: 10}
	h.sandboxes = sandbox.New(settings, db, h.node, templates, log, nil)
	var first string
	if _, err := h.auth.Bootstrap(ctx, func(secret string) error { first = secret; return nil }); err != nil {
		t.Fatal(err)
	}
	if h.org, err = h.auth.Authenticate(ctx, first); err != nil {
		t.Fatal(err)
	}
	h.key = h.newKey(auth.SandboxesWrite, auth.Exec, auth.Files, auth.TemplatesRead)
	if _, _, h.other, err = h.auth.CreateOrg(ctx, h.org, "other", auth.QuotaRequest{}); err != nil {
		t.Fatal(err)
	}
	for i, org := range []string{"", h.org.Org.ID} {
		v := template.Template{ID: "tpl_" + strings.Repeat(string(rune('a'+i)), 20), OrgID: org,
			Name: []string{"base", "mine"}[i], Status: template.Ready,
			Version: 1, CreatedAt: time.Now().UTC(),
			Shape: sandbox.Shape{Image: strings.Repeat("ab", 32), User: "root", Egress: sandbox.Egress{Mode: sandbox.AllowAll}}}
		if err := db.InsertTemplate(ctx, v, nil, 0); err != nil {
			t.Fatal(err)
		}
	}
	inside := httptest.NewServer(http.HandlerFunc(h.agent))
	h.agents = agentapi.NewClient(func(ctx context.Context, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", inside.Listener.Addr().String())
	})
	// A real node drops the connections when it suspends or ends a sandbox.
	h.node.OnSuspend = func(_ context.Context, id sandbox.ID) error { h.agents.Drop(string(id)); return nil }
	h.node.OnDestroy = h.node.OnSuspend
	next := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusTeapot) })
	feed := event.New(event.Config{}, db, log)
	db.OnEvents(feed.Wake)
	stopHooks := h.openHooks(feed, log)
	cfg := Config{Rows: h.sandboxes, TemplateRows: templates,
		Sandboxes: h.sandboxes, Templates: templates, Auth: h.auth, Agent: h.agents, Events: feed, Webhooks: h.hooks, Ports: h,
		Samples: sampler.New(h.sandboxes, h.agents, log), Names: portproxy.Names{Domain: "boxes.example", Scheme: "https"},
		Secret: []byte("0123456789abcdef"), Log: log, Registry: prometheus.NewRegistry()}
	h.handler = New(cfg, next)
	if throughReplica {
		h.handler = h.replicaOf(cfg, sandbox.NewRows(settings, db), template.NewReader(db), next)
	}
	listener := httptest.NewServer(h.handler)
	h.url = listener.URL
	t.Cleanup(func() {
		h.handler.Hangup()
		listener.Close()
		inside.CloseClientConnections()
		inside.Close()
		stopHooks()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		for _, err := range []error{h.sandboxes.Close(ctx), h.auth.Close(ctx), db.Close()} {
			if err != nil {
				t.Errorf("closing: %v", err)
			}
		}
		if n := h.sandboxes.InUse(); n != 0 {
			t.Errorf("%d leases are left", n)
		}
	})
	return h
}

func (h *harness) newKey(scopes ...auth.Scope) string {
	h.t.Helper()
	var names []string
	for _, s := range scopes {
		names = append(names, string(s))
	}
	_, secret, err := h.auth.CreateKey(h.t.Context(), h.org,
		auth.KeyRequest{Name: "test", Scopes: names, Format: auth.FormatE2B})
	if err != nil {
		h.t.Fatal(err)
	}
	return secret
}

// agent records the requests that reach it, and answers with h.answer.
func (h *harness) agent(w http.ResponseWriter, r *http.Request) {
	h.mu.Lock()
	h.seen = append(h.seen, r)
	answer := h.answer
	h.mu.Unlock()
	if answer == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	answer(w, r)
}

func (h *harness) play(answer http.HandlerFunc) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.answer, h.seen = answer, nil
}

// reached returns the requests since the last play.
func (h *harness) reached() []*http.Request {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]*http.Request(nil), h.seen...)
}

type answer struct {
	status int
	header http.Header
	body   string
	json   map[string]any // nil if it is no object
}

// send sends a request; heads are header names and values in turn.
func (h *harness) send(method, path, body string, heads ...string) answer {
	h.t.Helper()
	var in io.Reader
	if body != "" {
		in = strings.NewReader(body)
	}
	r, err := http.NewRequestWithContext(h.t.Context(), method, h.url+path, in)
	if err != nil {
		h.t.Fatal(err)
	}
	for i := 0; i < len(heads); i += 2 {
		if heads[i] == "Host" {
			r.Host = heads[i+1]
			continue
		}
		r.Header.Set(heads[i], heads[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		h.t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		h.t.Fatal(err)
	}
	out := answer{status: resp.StatusCode, header: resp.Header, body: string(data)}
	_ = json.Unmarshal(data, &out.json) // fails for a list
	return out
}

// control makes a call of the control API with the usual key.
func (h *harness) control(method, path, body string) answer {
	h.t.Helper()
	return h.send(method, path, body, "X-API-Key", h.key)
}

// create makes a sandbox and returns its id, as clients see it, and its token.
func (h *harness) create(body string) (id, token string) {
	h.t.Helper()
	r := h.control("POST", "/v2/sandboxes", body)
	if r.status != http.StatusCreated {
		h.t.Fatalf("create: %d %s", r.status, r.body)
	}
	id, _ = r.json["sandboxID"].(string)
	token, _ = r.json["envdAccessToken"].(string)
	return id, token
}

func (h *harness) row(id string) sandbox.Sandbox {
	h.t.Helper()
	sb, err := h.sandboxes.GetAny(h.t.Context(), sandbox.ID(idPrefix+id))
	if err != nil {
		h.t.Fatal(err)
	}
	return sb
}

// serve serves a handler until the test ends.
func serve(t *testing.T, h http.Handler) (url string) {
	t.Helper()
	listener := httptest.NewServer(h)
	t.Cleanup(listener.Close)
	return listener.URL
}
