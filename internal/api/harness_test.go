package api

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/blob"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/nodetest"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
	"github.com/cayhq/cay/internal/template"
	"github.com/cayhq/cay/internal/webhook"
)

// testServer holds the real core on a real database behind the real HTTP stack. Only the machine and the
// inside of the sandboxes are fakes.
type testServer struct {
	url       string
	spec      *openapi3.T
	http      *http.Client // checks every answer against openapi.yaml
	log       *logBuffer
	db        *store.DB
	node      *nodetest.Fake
	agent     *fakeAgent
	ports     *fakePorts
	server    *server // must not be changed after the first request
	sandboxes *sandbox.Service
	auth      *auth.Service
	nodes     *fleet.Service
	ready     error
	builds    *fakeBuilder
	templates *template.Service

	key   string // admin of the operator's organization
	org   auth.Principal
	other string // admin of another organization
	feed  *event.Feed
	hooks *webhook.Service
}

// eventStream is the media type of server-sent events.
const eventStream = "text/event-stream"

type option func(*auth.Config, *sandbox.Config, *Config)

// withAgent replaces the fake inside of the sandboxes.
func withAgent(a Agent) option {
	return func(_ *auth.Config, _ *sandbox.Config, c *Config) { c.Agent = a }
}

func newTestServer(t testing.TB, options ...option) *testServer {
	t.Helper()
	ctx := t.Context()
	h := &testServer{log: &logBuffer{}, node: nodetest.NewFake(), agent: newFakeAgent(),
		ports: &fakePorts{addrs: map[int]string{}}, spec: loadSpec(t)}
	log := slog.New(slog.NewJSONHandler(h.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	db, err := store.Open(ctx, filepath.Join(t.TempDir(), "cay.db"))
	if err != nil {
		t.Fatal(err)
	}
	h.db = db
	authConfig := auth.Config{Quota: auth.Quota{Sandboxes: 50}, Log: log}
	boxConfig := sandbox.Config{Node: nodeID,
		Sizes:       []sandbox.Size{{Name: "shared-cpu-1x", VCPUs: 1, MemoryMB: 512}, {Name: "performance-1x", VCPUs: 1, MemoryMB: 2048, Dedicated: true}},
		DefaultSize: "shared-cpu-1x", DefaultDisk: 2048, MaxDisk: 8192, KeepDestroyed: time.Hour,
	}
	contexts, err := blob.Open(filepath.Join(t.TempDir(), "contexts"), 0)
	if err != nil {
		t.Fatal(err)
	}
	h.builds = &fakeBuilder{}
	templates := template.New(template.Config{
		Builtins: []template.Definition{{Name: "lazy", Image: "lazy:1", StartCommand: new("")}},
		Sizes:    []string{"shared-cpu-1x"}, MaxDiskMB: 8192, MaxTemplates: 20, ContextLimit: contextLimit,
	}, db, h.builds, contexts, db, log)
	registry := prometheus.NewRegistry()
	ports := portproxy.New(h.ports, log)
	cfg := Config{
		Ports: ports, Signer: portproxy.NewSigner("secret"),
		Agent: h.agent, TemplateRows: templates, Templates: templates, Log: log, Version: "test", Registry: registry,
		Metrics: promhttp.HandlerFor(registry, promhttp.HandlerOpts{}),
		Ready:   func() error { return h.ready }, Expect: db.Expect,
	}
	for _, o := range options {
		o(&authConfig, &boxConfig, &cfg)
	}
	h.auth = auth.New(db, authConfig)
	h.sandboxes = sandbox.New(boxConfig, db, h.node, templates, log, nil)
	cfg.Sandboxes, cfg.Rows = h.sandboxes, cmp.Or[Rows](cfg.Rows, h.sandboxes)
	cfg.Auth = h.auth
	h.feed = event.New(event.Config{Keep: time.Hour, MaxFollowers: 2}, db, log)
	db.OnEvents(h.feed.Wake)
	cfg.Events = h.feed
	stopHooks := h.openHooks(t, log)
	cfg.Webhooks = h.hooks
	h.nodes = h.openNodes(t, log)
	cfg.Nodes = h.nodes
	if _, err := h.auth.Bootstrap(ctx, func(secret string) error { h.key = secret; return nil }); err != nil {
		t.Fatal(err)
	}
	if h.org, err = h.auth.Authenticate(ctx, h.key); err != nil {
		t.Fatal(err)
	}
	if _, _, h.other, err = h.auth.CreateOrg(ctx, h.org, "other", auth.QuotaRequest{}); err != nil {
		t.Fatal(err)
	}
	h.putTemplates(t)
	h.templates = templates
	if err := templates.Register(ctx); err != nil {
		t.Fatal(err)
	}
	building, stop := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = templates.Run(building) // always nil
	}()

	listener := httptest.NewUnstartedServer(nil)
	h.server = New(cfg).(*server)
	if throughReplica {
		h.server = h.replicaOf(t, cfg, sandbox.NewRows(boxConfig, db), template.NewReader(db))
	}
	listener.Config = httpserver.Server("", h.server, log)
	listener.Start()
	h.url = listener.URL
	router, err := gorillamux.NewRouter(h.spec)
	if err != nil {
		t.Fatal(err)
	}
	h.http = &http.Client{Transport: &checkedTransport{t: t, router: router,
		base: &http.Transport{ExpectContinueTimeout: 10 * time.Second}}}
	t.Cleanup(func() {
		templates.Hangup()
		listener.Close()
		stop()
		<-done
		stopHooks()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		for _, err := range []error{ports.Close(ctx), h.sandboxes.Close(ctx), h.auth.Close(ctx), db.Close()} {
			if err != nil {
				t.Errorf("closing: %v", err)
			}
		}
	})
	return h
}

// putTemplates stores one template in each status; only python is ready.
func (h *testServer) putTemplates(t testing.TB) {
	t.Helper()
	at := time.Now().UTC().Add(-time.Hour)
	for i, v := range []template.Template{
		{Name: "python", Status: template.Ready, Version: 3, ImageSize: 5, Source: "debian:bookworm", BuiltAt: at,
			Shape: sandbox.Shape{Image: strings.Repeat("ab", 32), Env: map[string]string{"LANG": "C.UTF-8"},
				Workdir: "/home/user", User: "user", Size: sandbox.Size{Name: "shared-cpu-1x"}, DiskMB: 512}},
		{Name: "slow", Status: template.Building, Progress: "installing packages, 3 of 9"},
		{Name: "broken", Status: template.Failed, BuildError: &template.BuildError{Step: "step 2", ExitCode: 100, Message: "exit code 100", Tail: []string{"E: no"}}},
		{Name: "mine", OrgID: h.org.Org.ID, Status: template.Pending},
	} {
		v.ID = "tpl_" + strings.Repeat(string(rune('a'+i)), 20)
		v.CreatedAt, v.UpdatedAt = at.Add(time.Duration(i)*time.Second), at.Add(time.Duration(i)*time.Second)
		v.Egress.Mode = sandbox.AllowAll
		if err := h.db.InsertTemplate(t.Context(), v,
			&template.Build{Definition: template.Definition{Name: v.Name, Image: v.Name + ":1"}}, 0); err != nil {
			t.Fatal(err)
		}
		if err := h.db.ChangeTemplateLog(t.Context(), v.ID,
			template.LogChange{Add: []template.LogLine{{Seq: 1, At: at, Text: "first"},
				{Seq: 2, At: at, Text: "second"}}}); err != nil {
			t.Fatal(err)
		}
	}
}

func loadSpec(t testing.TB) *openapi3.T {
	t.Helper()
	spec, err := openapi3.NewLoader().LoadFromData(cay.OpenAPI)
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// checkedTransport fails the test if an answer does not match what openapi.yaml says of the
// operation, or lacks the headers of all answers.
type checkedTransport struct {
	t      testing.TB
	router routers.Router
	base   http.RoundTripper
}

func (c *checkedTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := c.base.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if resp.Header.Get("X-Request-Id") == "" {
		c.t.Errorf("%s %s: no X-Request-Id", r.Method, r.URL)
	}
	route, params, err := c.router.FindRoute(&http.Request{Method: r.Method, URL: r.URL, Host: r.Host})
	if err != nil {
		return resp, nil // 404 and 405 belong to no operation
	}
	if resp.Header.Get("Content-Type") == eventStream || resp.StatusCode == http.StatusSwitchingProtocols {
		return resp, nil // the stream does not end
	}
	if resp.ContentLength > 1<<20 {
		return resp, nil // tests that read large files check them
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	resp.Body = io.NopCloser(bytes.NewReader(body))
	if err != nil {
		resp.Body = io.NopCloser(io.MultiReader(bytes.NewReader(body), brokenReader{err}))
		return resp, nil
	}
	err = openapi3filter.ValidateResponse(context.Background(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{Request: r, PathParams: params, Route: route},
		Status:                 resp.StatusCode, Header: resp.Header, Body: io.NopCloser(bytes.NewReader(body)),
		Options: &openapi3filter.Options{IncludeResponseStatus: true, ExcludeResponseBody: resp.Header.Get("Content-Type") == "application/yaml"},
	})
	if err != nil {
		c.t.Errorf("%s %s: the answer does not match openapi.yaml: %v", r.Method, r.URL, err)
	}
	return resp, nil
}

type brokenReader struct{ err error }

func (b brokenReader) Read([]byte) (int, error) { return 0, b.err }

// reply holds an answer that was read to its end.
type reply struct {
	status  int
	header  http.Header
	body    []byte
	problem Problem // set if the answer is a problem
}

// send sends a request unchanged. A body other than "" is sent as JSON.
func (h *testServer) send(t testing.TB, method, path, key, body string, edit ...func(*http.Request)) reply {
	t.Helper()
	var in io.Reader
	if body != "" {
		in = strings.NewReader(body)
	}
	r, err := http.NewRequestWithContext(t.Context(), method, h.url+path, in)
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	if key != "" {
		r.Header.Set("Authorization", "Bearer "+key)
	}
	for _, e := range edit {
		e(r)
	}
	resp, err := h.http.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	out := reply{status: resp.StatusCode, header: resp.Header}
	if out.body, err = io.ReadAll(resp.Body); err != nil {
		t.Fatalf("reading the answer: %v", err)
	}
	if resp.Header.Get("Content-Type") == "application/problem+json" && len(out.body) > 0 {
		if err := json.Unmarshal(out.body, &out.problem); err != nil {
			t.Fatal(err)
		}
		if out.problem.RequestID != resp.Header.Get("X-Request-Id") || out.problem.Status != resp.StatusCode {
			t.Errorf("problem %s does not match the head of its answer", out.body)
		}
	}
	return out
}

func header(name, value string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set(name, value) }
}

// as checks the status of an answer and decodes its body.
func as[T any](t testing.TB, status int, r reply) T {
	t.Helper()
	var v T
	if r.status != status {
		t.Fatalf("status %d, want %d: %s", r.status, status, r.body)
	}
	if err := json.Unmarshal(r.body, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// newSandbox creates a running sandbox of the operator's organization.
func (h *testServer) newSandbox(t testing.TB) Sandbox {
	t.Helper()
	return as[Sandbox](t, http.StatusCreated, h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"python"}`))
}

// newAsleep creates a persistent sandbox of the operator's organization and suspends it.
func (h *testServer) newAsleep(t testing.TB) Sandbox {
	t.Helper()
	sbx := as[Sandbox](t, http.StatusCreated,
		h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"python","mode":"persistent"}`))
	return as[Sandbox](t, http.StatusOK, h.send(t, "POST", "/v1/sandboxes/"+sbx.ID+"/suspend", h.key, ""))
}

// newKey creates a key of the operator's organization.
func (h *testServer) newKey(t testing.TB, expiresIn time.Duration, scopes ...auth.Scope) (auth.Key, string) {
	t.Helper()
	var names []string
	for _, s := range scopes {
		names = append(names, string(s))
	}
	k, secret, err := h.auth.CreateKey(t.Context(), h.org,
		auth.KeyRequest{Name: "test", Scopes: names, ExpiresIn: expiresIn})
	if err != nil {
		t.Fatal(err)
	}
	return k, secret
}

// putSandbox stores a sandbox as a crash or a later version might leave it.
func (h *testServer) putSandbox(t testing.TB, mode sandbox.Mode, state sandbox.State) sandbox.ID {
	t.Helper()
	now := time.Now().UTC()
	b := sandbox.Sandbox{ID: sandbox.NewID(), OrgID: h.org.Org.ID, Mode: mode, State: sandbox.Creating, Run: "r",
		Template: "python", TemplateID: "tpl_aaaaaaaaaaaaaaaaaaaa", TemplateVersion: 3,
		Shape: sandbox.Shape{Size: sandbox.Size{Name: "shared-cpu-1x", VCPUs: 1, MemoryMB: 512}, DiskMB: 64,
			Egress: sandbox.Egress{Mode: sandbox.AllowAll}},
		Timeout: time.Minute, IdleTimeout: time.Minute, CreatedAt: now, Source: sandbox.Cold}
	if _, _, err := h.db.Insert(t.Context(), b, sandbox.Quota{}, sandbox.Once{}); err != nil {
		t.Fatal(err)
	}
	if state != sandbox.Creating {
		if _, err := h.db.Transition(t.Context(),
			sandbox.Change{ID: b.ID, From: []sandbox.State{sandbox.Creating}, To: state, At: now}); err != nil {
			t.Fatal(err)
		}
	}
	return b.ID
}

// contextLimit limits the build contexts of a testServer, in bytes.
const contextLimit = 2 << 20

// fakeBuilder fakes all builds. Each build logs a few lines, then waits for hold if it is set. A
// build of the image "fail" fails.
type fakeBuilder struct {
	mu sync.Mutex
	// +checklocks:mu
	hold chan struct{}
	// +checklocks:mu
	jobs []template.Job
}

func (b *fakeBuilder) Build(ctx context.Context, j template.Job,
	progress func(template.Progress)) (template.Built, error) {
	b.mu.Lock()
	b.jobs = append(b.jobs, j)
	hold := b.hold
	b.mu.Unlock()
	progress(template.Progress{Step: 1, Steps: 2, Name: "FROM " + j.Definition.Image, Cached: true})
	progress(template.Progress{Step: 2, Steps: 2, Name: "RUN make"})
	progress(template.Progress{Step: 2, Steps: 2, Text: "cc main.c"})
	if hold != nil {
		select {
		case <-hold:
		case <-ctx.Done():
			return template.Built{}, context.Cause(ctx)
		}
	}
	if j.Definition.Image == "fail" {
		return template.Built{}, &template.BuildError{Step: "RUN make", ExitCode: 2, Tail: []string{"cc: no"},
			Message: "the command ended with exit code 2"}
	}
	sum := sha256.Sum256([]byte(j.Definition.Image + j.Definition.Dockerfile + j.Context))
	return template.Built{Image: hex.EncodeToString(sum[:]), Size: 9, Source: "test",
		Env: map[string]string{"FROM": "image"}, User: "app:app", Workdir: "/srv",
		Entrypoint: []string{"serve"}, Cmd: []string{"--port", "80 80"}}, nil
}

func (b *fakeBuilder) Check(context.Context, string) error { return nil }

func (b *fakeBuilder) Same(_ context.Context, one, other string) (bool, error) {
	return one == other, nil
}

func (b *fakeBuilder) HasUser(context.Context, string, string) (bool, error) { return true, nil }

func (b *fakeBuilder) Collect(context.Context, []string, []string) ([]string, int64, error) {
	return nil, 0, nil
}

// holding makes builds wait until release is called.
func (b *fakeBuilder) holding() (release func()) {
	hold := make(chan struct{})
	b.mu.Lock()
	defer b.mu.Unlock()
	b.hold = hold
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.hold = nil
		close(hold)
	}
}

// fakeAgent fakes the inside of every sandbox. It keeps files in a map and runs commands with
// execute.
type fakeAgent struct {
	fakeProcesses
	execute func(ctx context.Context, r agentapi.ExecuteRequest) (agentapi.ExecuteResult, error)
	fail    error // returned by every call but execute

	cutTrees bool // archives end early

	mu sync.Mutex
	// +checklocks:mu
	files map[string][]byte
	// +checklocks:mu
	uploads []agentapi.UploadRequest // without bodies
	// +checklocks:mu
	targets []agentapi.Target
}

func newFakeAgent() *fakeAgent {
	return &fakeAgent{files: map[string][]byte{},
		execute: func(context.Context, agentapi.ExecuteRequest) (agentapi.ExecuteResult, error) {
			return agentapi.ExecuteResult{Stdout: []byte("42\n"), Duration: 1500 * time.Microsecond}, nil
		}}
}

func (a *fakeAgent) Collect(ctx context.Context, t agentapi.Target, r agentapi.ExecuteRequest,
	stdout, stderr *budget.Bytes) (agentapi.ExecuteResult, error) {
	a.mu.Lock()
	a.targets = append(a.targets, t)
	execute := a.execute
	a.mu.Unlock()
	res, err := execute(ctx, r)
	if err == nil {
		err = errors.Join(stdout.Keep(res.Stdout), stderr.Keep(res.Stderr))
	}
	return res, err
}

func (a *fakeAgent) Upload(_ context.Context, _ agentapi.Target, r agentapi.UploadRequest) error {
	if a.fail != nil {
		return a.fail
	}
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.files[r.Path] = b
	r.Body = nil
	a.uploads = append(a.uploads, r)
	return nil
}

var errNoFile = fault.New(fault.NotFound, fault.CodeFileNotFound, "no such file")

func (a *fakeAgent) Download(_ context.Context, _ agentapi.Target, path, _, rng string) (*agentapi.Download, error) {
	if a.fail != nil {
		return nil, a.fail
	}
	a.mu.Lock()
	b, ok := a.files[path]
	a.mu.Unlock()
	if !ok {
		return nil, errNoFile
	}
	// The file server of net/http takes the place of the agent's.
	rec := httptest.NewRecorder()
	r := httptest.NewRequest("GET", "/files", nil)
	if rng != "" {
		r.Header.Set("Range", rng)
	}
	http.ServeContent(rec, r, "", time.Time{}, bytes.NewReader(b))
	resp := rec.Result()
	return &agentapi.Download{Body: resp.Body, Size: int64(rec.Body.Len()), Status: resp.StatusCode,
		Header: resp.Header}, nil
}

func (a *fakeAgent) Remove(_ context.Context, _ agentapi.Target, path, _ string, recursive bool) error {
	if a.fail != nil {
		return a.fail
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	found := false
	for name := range a.files {
		if name == path || recursive && strings.HasPrefix(name, path+"/") {
			delete(a.files, name)
			found = true
		}
	}
	if !found {
		return errNoFile
	}
	return nil
}

func (a *fakeAgent) List(_ context.Context, _ agentapi.Target, path, _ string, depth int,
	emit func(agentapi.Entry) error) error {
	if a.fail != nil {
		return a.fail
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var entries []agentapi.Entry
	for name, b := range a.files {
		rest, ok := strings.CutPrefix(name, strings.TrimSuffix(path, "/")+"/")
		if ok && strings.Count(rest, "/") < depth {
			entries = append(entries, agentapi.Entry{Name: filepath.Base(name), Path: name, Type: agentapi.TypeFile,
				Size: int64(len(b)),
				Mode: 0o100644, Owner: "user", Group: "user", ModifiedAt: time.Now()})
		}
	}
	for _, e := range entries {
		if err := emit(e); err != nil {
			return err
		}
	}
	return nil
}

// logBuffer collects log lines; several goroutines may write to it.
type logBuffer struct {
	mu sync.Mutex
	// +checklocks:mu
	buf bytes.Buffer // guarded by mu
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// line returns the access log line of a request. It waits for the line, which is written after the
// answer was sent.
func (l *logBuffer) line(t testing.TB, requestID string) map[string]any {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Second); ; {
		for text := range strings.Lines(l.String()) {
			var line map[string]any
			if json.Unmarshal([]byte(text), &line) == nil && line["request_id"] == requestID && line["msg"] == "request" {
				return line
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("no log line for request %s in:\n%s", requestID, l)
		}
		time.Sleep(time.Millisecond) // between two polls, until the deadline
	}
}
