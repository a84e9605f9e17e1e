package api

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"
	"github.com/google/go-cmp/cmp"

	contract "github.com/cayhq/cay"
	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	cay "github.com/cayhq/cay/sdk/go"
)

// requestChecker fails the test if a request does not match openapi.yaml. It records which
// operations were called.
type requestChecker struct {
	t      testing.TB
	router routers.Router
	base   http.RoundTripper

	mu sync.Mutex
	// +checklocks:mu
	seen map[string]bool // operation ids
}

func (c *requestChecker) RoundTrip(r *http.Request) (*http.Response, error) {
	route, params, err := c.router.FindRoute(r)
	if err != nil {
		c.t.Errorf("%s %s: %v", r.Method, r.URL, err)
		return c.base.RoundTrip(r)
	}
	c.mu.Lock()
	c.seen[route.Operation.OperationID] = true
	c.mu.Unlock()
	in := &openapi3filter.RequestValidationInput{Request: r.Clone(r.Context()), PathParams: params, Route: route,
		Options: &openapi3filter.Options{
			AuthenticationFunc: func(_ context.Context, a *openapi3filter.AuthenticationInput) error {
				if !strings.HasPrefix(a.RequestValidationInput.Request.Header.Get("Authorization"), "Bearer cay_") {
					return errors.New("no bearer key")
				}
				return nil
			},
			ExcludeRequestBody: r.Header.Get("Content-Type") == "application/octet-stream" || route.Operation.OperationID == "uploadTree" || strings.HasPrefix(r.Header.Get("Content-Type"), "multipart/"),
		}}
	in.Request.Body = http.NoBody
	if r.Body != nil && r.Header.Get("Content-Type") == "application/json" {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		r.Body, in.Request.Body = io.NopCloser(bytes.NewReader(b)), io.NopCloser(bytes.NewReader(b))
	}
	if err := openapi3filter.ValidateRequest(r.Context(), in); err != nil {
		c.t.Errorf("%s %s: the request does not match openapi.yaml: %v", r.Method, r.URL, err)
	}
	return c.base.RoundTrip(r)
}

// TestClient calls every operation through the client and checks requests and answers against
// openapi.yaml.
func TestClient(t *testing.T) {
	h := newTestServer(t)
	router, err := gorillamux.NewRouter(h.spec)
	if err != nil {
		t.Fatal(err)
	}
	checker := &requestChecker{t: t, router: router, base: h.http.Transport, seen: map[string]bool{}}
	c, err := cay.New(h.url+"/", h.key, cay.WithHTTPClient(&http.Client{Transport: checker}),
		cay.WithUserAgent("test"))
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	fatal := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	sbx := clientSandboxes(t, ctx, c, fatal)
	clientFiles(t, ctx, c, h, sbx, fatal)
	clientPorts(t, ctx, c, h, sbx, fatal)
	clientTrees(t, ctx, c, h, sbx, fatal)
	clientProcesses(t, ctx, c, h, sbx, fatal)
	fatal(c.DestroySandbox(ctx, sbx))
	if b, err := c.GetSandbox(ctx, sbx); err != nil || b.Status != cay.SandboxStatusDestroyed {
		t.Errorf("destroyed: %+v, %v", b, err)
	}
	clientAccount(t, ctx, c, fatal)
	clientTemplates(t, ctx, c, fatal)
	clientFeed(t, ctx, c, fatal, sbx)
	clientWebhooks(t, ctx, c, fatal)

	operations(h.spec, func(pattern, _ string, op *openapi3.Operation, _ openapi3.Parameters) {
		if !checker.seen[op.OperationID] {
			t.Errorf("%s (%s) was not called", pattern, op.OperationID)
		}
	})
}

func clientSleep(t *testing.T, ctx context.Context, c *cay.Client, fatal func(error)) {
	r := cay.CreateSandboxRequest{Template: "python", Mode: new("persistent"), IdleTimeout: new("0"),
		RecoveryInterval: new("30m")}
	sbx, err := c.CreateSandbox(ctx, r, cay.CreateOptions{})
	fatal(err)
	checkpoint, err := c.Checkpoint(ctx, sbx.ID)
	fatal(err)
	if *sbx.IdleTimeoutSeconds != 0 || *sbx.RecoveryIntervalSeconds != 1800 ||
		checkpoint.CreatedAt.Before(sbx.CreatedAt) || checkpoint.SizeBytes == 0 {
		t.Errorf("created %+v, recovery point %+v", sbx, checkpoint)
	}
	asleep, err := c.Suspend(ctx, sbx.ID)
	fatal(err)
	if asleep.Status != cay.SandboxStatusSuspended || asleep.SuspendedAt == nil {
		t.Errorf("suspended: %+v", asleep)
	}
	if _, err := c.Suspend(ctx, sbx.ID); !cay.HasCode(err, "sandbox_not_running") {
		t.Errorf("suspend twice: %v", err)
	}
	awake, err := c.Wake(ctx, sbx.ID)
	fatal(err)
	if awake.Status != cay.SandboxStatusRunning || awake.SuspendedAt != nil || awake.MemoryKept != nil ||
		awake.Durable != nil || asleep.MemoryKept == nil || !*asleep.MemoryKept || asleep.Durable == nil ||
		*asleep.Durable != cay.DurableNode {
		t.Errorf("woken: %+v", awake)
	}
	files, err := c.SuspendFiles(ctx, sbx.ID)
	fatal(err)
	snap, err := c.CreateSnapshot(ctx, sbx.ID, "")
	fatal(err)
	if files.Status != cay.SandboxStatusSuspended || files.MemoryKept == nil || *files.MemoryKept || snap.Memory {
		t.Errorf("suspended without memory: %+v, a snapshot of it: %+v", files, snap)
	}
	fatal(c.DeleteSnapshot(ctx, snap.ID))
	fatal(c.DestroySandbox(ctx, sbx.ID))
}

func clientSnapshots(t *testing.T, ctx context.Context, c *cay.Client, fatal func(error), id string) {
	for _, name := range []string{"", "named"} {
		s, err := c.CreateSnapshot(ctx, id, name)
		fatal(err)
		if s.SandboxID != id || !s.Memory || s.SizeBytes == 0 || (s.Name != nil) != (name != "") {
			t.Errorf("snapshot %+v", s)
		}
	}
	n := 0
	for s, err := range c.Snapshots(ctx, cay.ListSnapshotsOptions{SandboxID: id,
		ListOptions: cay.ListOptions{Limit: 1}}) {
		fatal(err)
		if n++; n == 1 && *s.Name != "named" {
			t.Errorf("the newest is %+v", s)
		}
	}
	l, err := c.ListSnapshots(ctx, cay.ListSnapshotsOptions{Name: "none"})
	fatal(err)
	if n != 2 || len(l.Snapshots) != 0 {
		t.Errorf("%d snapshots, %d with an unknown name", n, len(l.Snapshots))
	}
	s, err := c.GetSnapshot(ctx, "named")
	fatal(err)
	sbx, err := c.CreateSandbox(ctx, cay.CreateSandboxRequest{Snapshot: s.ID}, cay.CreateOptions{})
	fatal(err)
	if *sbx.Origin != s.ID || *sbx.Source != cay.SandboxSourceSnapshot {
		t.Errorf("made %+v", sbx)
	}
	fatal(c.DeleteSnapshot(ctx, "named"))
	if err := c.DeleteSnapshot(ctx, s.ID); !cay.HasCode(err, "snapshot_not_found") {
		t.Errorf("deleted again: %v", err)
	}
	children, err := c.Fork(ctx, sbx.ID, cay.ForkRequest{Count: new(2), Timeout: new("1h"),
		Metadata: cay.Metadata{"k": "child"}})
	fatal(err)
	for _, child := range children {
		if child.Error != nil || *child.Sandbox.Origin != sbx.ID || *child.Sandbox.TimeoutSeconds != 3600 {
			t.Errorf("child %+v", child)
		}
	}
	if len(children) != 2 {
		t.Errorf("%d children", len(children))
	}
}

func clientSandboxes(t *testing.T, ctx context.Context, c *cay.Client, fatal func(error)) (id string) {
	r := cay.CreateSandboxRequest{Template: "python", Timeout: new("5m"), Env: cay.Env{"A": "1"},
		Metadata: cay.Metadata{"k": "v w"}}
	first, err := c.CreateSandbox(ctx, r, cay.CreateOptions{IdempotencyKey: "a key"})
	fatal(err)
	again, err := c.CreateSandbox(ctx, r, cay.CreateOptions{IdempotencyKey: "a key", NoWait: true})
	fatal(err)
	if again.ID != first.ID || first.Status != cay.SandboxStatusRunning {
		t.Errorf("created %+v and %+v", first, again)
	}
	for range 3 {
		_, err := c.CreateSandbox(ctx, cay.CreateSandboxRequest{Template: "python"}, cay.CreateOptions{})
		fatal(err)
	}
	n := 0
	for b, err := range c.Sandboxes(ctx, cay.ListSandboxesOptions{Status: []cay.SandboxStatus{"running",
		"creating"}, ListOptions: cay.ListOptions{Limit: 3}}) {
		fatal(err)
		if n++; n == 4 && b.ID != first.ID {
			t.Errorf("the oldest is %s, want %s", b.ID, first.ID)
		}
	}
	l, err := c.ListSandboxes(ctx, cay.ListSandboxesOptions{Metadata: map[string]string{"k": "v w"}})
	fatal(err)
	if n != 4 || len(l.Sandboxes) != 1 {
		t.Errorf("%d sandboxes, %d with the metadata; want 4 and 1", n, len(l.Sandboxes))
	}
	kept, err := c.Keepalive(ctx, first.ID, time.Hour)
	fatal(err)
	if *kept.TimeoutSeconds != 3600 {
		t.Errorf("kept for %d s", *kept.TimeoutSeconds)
	}
	_, err = c.Keepalive(ctx, first.ID, 0)
	fatal(err)
	_, err = c.Wake(ctx, first.ID)
	fatal(err)
	_, err = c.SetEgress(ctx, first.ID, cay.Egress{Mode: cay.EgressModeDenyAll,
		AllowDomains: []string{"example.com"}})
	fatal(err)
	clientSleep(t, ctx, c, fatal)
	clientSnapshots(t, ctx, c, fatal, first.ID)
	n = 0
	for _, err := range c.Events(ctx, first.ID, cay.ListOptions{Limit: 1}) {
		fatal(err)
		n++
	}
	if n != 5 { // includes the change of its policy and two snapshots
		t.Errorf("%d events, want 5", n)
	}
	cursor := cay.ListSandboxesOptions{ListOptions: cay.ListOptions{Cursor: "nonsense"}}
	for b, err := range c.Sandboxes(ctx, cursor) {
		if !cay.HasCode(err, "invalid_cursor") {
			t.Errorf("%v, %v", b, err)
		}
	}
	return first.ID
}

func clientFeed(t *testing.T, ctx context.Context, c *cay.Client, fatal func(error), sbx string) {
	var all, some []cay.FeedEvent
	for e, err := range c.Feed(ctx, cay.FeedOptions{ListOptions: cay.ListOptions{Limit: 7}}) {
		fatal(err)
		all = append(all, e)
	}
	for e, err := range c.Feed(ctx, cay.FeedOptions{Sandbox: sbx,
		Types: []cay.FeedEventType{"sandbox.creating", "sandbox.running"}, After: all[0].ID}) {
		fatal(err)
		some = append(some, e)
	}
	if len(all) < 20 || len(some) != 2 {
		t.Errorf("%d events, %d of creating and starting the sandbox", len(all), len(some))
	}
	// A follower that begins in the middle gets the remaining events, then new ones.
	errEnough := errors.New("enough")
	middle := len(all) / 2
	var followed []cay.FeedEvent
	ready := false
	err := c.FollowFeed(ctx, cay.FeedOptions{After: all[middle-1].ID}, func(id string, e *cay.FeedEvent) error {
		if e == nil {
			ready = id == all[middle-1].ID
			return nil
		}
		if followed = append(followed, *e); id != e.ID {
			t.Errorf("event %s came with id %s", e.ID, id)
		}
		if len(followed) == len(all)-middle {
			_, err := c.CreateSandbox(ctx, cay.CreateSandboxRequest{Template: "python"}, cay.CreateOptions{})
			return err
		}
		if len(followed) > len(all)-middle {
			return errEnough
		}
		return nil
	})
	if !errors.Is(err, errEnough) || !ready {
		t.Errorf("following: %v, begun %v", err, ready)
	}
	if diff := cmp.Diff(all[middle:], followed[:len(all)-middle]); diff != "" {
		t.Error(diff)
	}
	if e := followed[len(followed)-1]; e.Type != cay.FeedEventTypeSandboxCreating {
		t.Errorf("the new one is %+v", e)
	}
	err = c.FollowFeed(ctx, cay.FeedOptions{After: "x"}, func(string, *cay.FeedEvent) error { return nil })
	if !cay.HasCode(err, "invalid_after") {
		t.Errorf("following after an invalid id: %v", err)
	}
}

func clientFiles(t *testing.T, ctx context.Context, c *cay.Client, h *testServer, id string, fatal func(error)) {
	h.agent.execute = func(_ context.Context, r agentapi.ExecuteRequest) (agentapi.ExecuteResult, error) {
		return agentapi.ExecuteResult{Stdout: append([]byte{0xff}, r.Stdin...), Stderr: []byte("é")}, nil
	}
	res, err := c.Execute(ctx, id, cay.ExecuteRequest{Args: []string{"cat"}, Stdin: new("in")})
	fatal(err)
	stdout, err := res.StdoutBytes()
	fatal(err)
	stderr, err := res.StderrBytes()
	fatal(err)
	if string(stdout) != "\xffin" || string(stderr) != "é" {
		t.Errorf("output %q, %q", stdout, stderr)
	}

	name := filepath.Join(t.TempDir(), "local")
	fatal(os.WriteFile(name, []byte("0123456789"), 0o600))
	local, err := os.Open(name)
	fatal(err)
	defer local.Close()
	_, err = local.Seek(2, io.SeekStart)
	fatal(err)
	fatal(c.WriteFile(ctx, id, "/home/user/a?b&c", local,
		cay.WriteFileOptions{Mode: new(fs.FileMode(0o700)), Owner: "user"}))
	if up := h.agent.uploads[0]; up.Path != "/home/user/a?b&c" || up.Size != 8 || *up.Mode != 0o700 || up.User != "user" {
		t.Errorf("uploaded %+v", up)
	}
	fatal(c.WriteFile(ctx, id, "/home/user/piped", io.MultiReader(strings.NewReader("piped")), cay.WriteFileOptions{}))
	fatal(c.WriteFile(ctx, id, "/home/user/empty", nil, cay.WriteFileOptions{}))
	if up := h.agent.uploads[1:]; up[0].Size != -1 || up[1].Size != 0 {
		t.Errorf("uploaded %+v", up)
	}
	for _, part := range []struct {
		o          cay.ReadFileOptions
		want, part string
	}{
		{cay.ReadFileOptions{}, "23456789", ""},
		{cay.ReadFileOptions{Offset: 6}, "89", "bytes 6-7/8"},
		{cay.ReadFileOptions{Length: 3}, "234", "bytes 0-2/8"},
		{cay.ReadFileOptions{Offset: 1, Length: 2}, "34", "bytes 1-2/8"},
	} {
		f, err := c.ReadFile(ctx, id, "/home/user/a?b&c", part.o)
		fatal(err)
		b, err := io.ReadAll(f)
		fatal(err)
		fatal(f.Close())
		if string(b) != part.want || f.Size != int64(len(part.want)) || f.ContentRange != part.part {
			t.Errorf("%+v: %q of %d bytes, %q", part.o, b, f.Size, f.ContentRange)
		}
	}
	entries, err := c.ListFiles(ctx, id, "/home", 2)
	fatal(err)
	if len(entries) != 3 {
		t.Errorf("entries %+v", entries)
	}
	fatal(c.RemoveFile(ctx, id, "/home/user/empty", false))
	fatal(c.RemoveFile(ctx, id, "/home/user", true))
	_, err = c.ReadFile(ctx, id, "/home/user/piped", cay.ReadFileOptions{})
	var e *cay.Error
	if !errors.As(err, &e) || e.Status != 404 || e.Code != "file_not_found" || e.Detail == "" || e.RequestID == "" ||
		!strings.Contains(e.Error(), e.RequestID) {
		t.Errorf("reading a file that was removed: %#v", err)
	}
	_, err = c.ReadFile(ctx, id, "relative", cay.ReadFileOptions{})
	if !errors.As(err, &e) || e.Field != "path" || !strings.HasPrefix(e.Error(), "path: ") {
		t.Errorf("reading a relative path: %v", err)
	}
}

func clientPorts(t *testing.T, ctx context.Context, c *cay.Client, h *testServer, id string, fatal func(error)) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	fatal(err)
	defer l.Close()
	h.ports.open(7000, l.Addr().String())
	conn, err := c.DialPort(ctx, id, 7000)
	fatal(err)
	in, err := l.Accept()
	fatal(err)
	_, err = io.WriteString(conn, "ping")
	fatal(err)
	fatal(conn.(interface{ CloseWrite() error }).CloseWrite())
	b, err := io.ReadAll(in)
	fatal(err)
	_, err = io.WriteString(in, "pong")
	fatal(err)
	fatal(in.Close())
	back, err := io.ReadAll(conn)
	fatal(err)
	fatal(conn.Close())
	if string(b) != "ping" || string(back) != "pong" {
		t.Errorf("the tunnel carried %q and %q", b, back)
	}
	if _, err := c.DialPort(ctx, id, 7001); !cay.HasCode(err, "port_closed") {
		t.Errorf("dialling a closed port: %v", err)
	}
	p, err := c.SetPortPublic(ctx, id, 7000, true)
	fatal(err)
	same, err := c.GetPort(ctx, id, 7000)
	fatal(err)
	all, err := c.Ports(ctx, id)
	fatal(err)
	if !p.Public || *same != *p || len(all) != 1 || all[0] != *p {
		t.Errorf("port %+v, %+v, %+v", p, same, all)
	}
	u, err := c.PortURL(ctx, id, 7000, time.Minute)
	fatal(err)
	if !strings.HasPrefix(u.URL, p.URL+"?") || time.Until(u.ExpiresAt) > 62*time.Second {
		t.Errorf("URL %+v", u)
	}
}

func clientTrees(t *testing.T, ctx context.Context, c *cay.Client, h *testServer, id string, fatal func(error)) {
	fatal(c.UploadTree(ctx, id, "/tree", bytes.NewReader(aTree(t, "a", "b/c")), "user"))
	archive, err := c.DownloadTree(ctx, id, "/tree")
	fatal(err)
	hd, err := tar.NewReader(archive).Next()
	fatal(err)
	fatal(archive.Close())
	dir, err := c.MakeDirectory(ctx, id, "/tree/d",
		cay.MakeDirectoryOptions{Mode: new(fs.FileMode(0o700)), Owner: "user"})
	fatal(err)
	moved, err := c.RenameFile(ctx, id, "/tree/a", "/tree/b/c", true)
	fatal(err)
	same, err := c.StatFile(ctx, id, "/tree/b/c")
	fatal(err)
	if hd.Size == 0 || dir.Mode != "0700" || moved.Path != same.Path || same.Size != 1 {
		t.Errorf("%+v, %+v, %+v, %+v", hd, dir, moved, same)
	}
	changes := 0
	err = c.WatchFiles(ctx, id, "/tree", false, func() {}, func(cay.FileChange) error { changes++; return nil })
	if changes != 2 || !cay.HasCode(err, fault.CodeSandboxUnreachable) {
		t.Errorf("%d changes, %v", changes, err)
	}
	if _, err := c.StatFile(ctx, id, "/tree/none"); !cay.HasCode(err, "file_not_found") {
		t.Errorf("stat: %v", err)
	}
}

func clientNodes(t *testing.T, ctx context.Context, c *cay.Client, fatal func(error)) {
	nodes, err := c.ListNodes(ctx)
	fatal(err)
	if len(nodes) != 1 || nodes[0].Name != nodeName || nodes[0].Status != cay.NodeStatusReady {
		t.Errorf("the nodes are %+v", nodes)
	}
	token, err := c.CreateNodeToken(ctx, cay.CreateNodeTokenRequest{ExpiresIn: new("1m")})
	fatal(err)
	if _, _, err := fleet.ParseToken(token.Token); err != nil {
		t.Errorf("the token is %q, %v", token.Token, err)
	}
	if err := c.RemoveNode(ctx, nodeName); !cay.HasCode(err, "node_in_use") {
		t.Errorf("a removal: %v", err)
	}
	n, err := c.CordonNode(ctx, nodeName)
	fatal(err)
	got, err := c.GetNode(ctx, n.ID)
	fatal(err)
	if n.Status != cay.NodeStatusCordoned || got.CordonedAt == nil || !got.CordonedAt.Equal(*n.CordonedAt) {
		t.Errorf("cordoned %+v, read %+v", n, got)
	}
	n, err = c.DrainNode(ctx, nodeName, 2*time.Hour)
	fatal(err)
	if n.DrainBy == nil || time.Until(*n.DrainBy) < time.Hour || n.Active != 0 != (n.Status == cay.NodeStatusDraining) {
		t.Errorf("drained: %+v", n)
	}
	if n, err = c.UncordonNode(ctx, nodeName); err != nil || n.Status != cay.NodeStatusReady || n.DrainBy != nil {
		t.Errorf("uncordoned: %+v, %v", n, err)
	}
}

func clientAccount(t *testing.T, ctx context.Context, c *cay.Client, fatal func(error)) {
	n := 0
	for _, err := range c.Templates(ctx, cay.ListOptions{Limit: 2}) {
		fatal(err)
		n++
	}
	python, err := c.GetTemplate(ctx, "python")
	fatal(err)
	lines, err := c.TemplateLogs(ctx, "python")
	fatal(err)
	sizes, err := c.ListSizes(ctx)
	fatal(err)
	pool, err := c.Pool(ctx)
	fatal(err)
	if len(pool) != 0 { // the warm pool is off
		t.Errorf("the pool is %+v", pool)
	}
	if n != 5 || python.Status != cay.TemplateStatusReady || len(lines) != 2 || len(sizes) != 2 {
		t.Errorf("%d templates, %+v, %v, %v", n, python, lines, sizes)
	}
	clientNodes(t, ctx, c, fatal)
	key, err := c.CreateAPIKey(ctx, cay.CreateAPIKeyRequest{Name: "k", Scopes: []string{string(cay.ScopeExec)},
		ExpiresIn: new("1h")})
	fatal(err)
	me, err := c.Me(ctx)
	fatal(err)
	keys := map[string]cay.APIKey{}
	fatal(c.RevokeAPIKey(ctx, key.ID))
	for k, err := range c.APIKeys(ctx, cay.ListOptions{Limit: 1}) {
		fatal(err)
		keys[k.ID] = k
	}
	if len(keys) != 2 || keys[key.ID].RevokedAt == nil || keys[me.APIKey.ID].Prefix == "" {
		t.Errorf("keys %+v", keys)
	}
	org, err := c.CreateOrg(ctx, cay.CreateOrgRequest{Name: "acme", Quota: &cay.QuotaRequest{VCPUs: new(2)}})
	fatal(err)
	n = 0
	for o, err := range c.Orgs(ctx, cay.ListOptions{}) {
		fatal(err)
		if n++; n == 1 && (o.ID != org.ID || o.Quota.VCPUs != 2) {
			t.Errorf("newest organization %+v", o)
		}
	}
	_, err = c.Health(ctx)
	fatal(err)
	_, err = c.Ready(ctx)
	fatal(err)
	metrics, err := c.Metrics(ctx)
	fatal(err)
	fatal(metrics.Close())
	doc, err := c.OpenAPI(ctx)
	fatal(err)
	if n != 3 || !bytes.Equal(doc, contract.OpenAPI) {
		t.Errorf("%d organizations, a document of %d bytes", n, len(doc))
	}
}

func clientTemplates(t *testing.T, ctx context.Context, c *cay.Client, fatal func(error)) {
	tpl, err := c.CreateTemplate(ctx, cay.CreateTemplateRequest{Name: "app", Dockerfile: new("Dockerfile"),
		BuildArgs: cay.BuildArgs{"A": "1"}}, bytes.NewReader(aTar(t)))
	fatal(err)
	var lines []string
	var ids []string
	end, err := c.FollowTemplate(ctx, tpl.ID, "", func(id string, l cay.TemplateLogLine) error {
		lines, ids = append(lines, l.Text), append(ids, id)
		return nil
	})
	fatal(err)
	if end.Status != cay.TemplateStatusReady || end.Version != 1 || !slices.Contains(lines, "step 2 of 2: RUN make") {
		t.Errorf("the log ends with %+v after %q", end, lines)
	}
	rest := 0
	_, err = c.FollowTemplate(ctx, "app", ids[1], func(string, cay.TemplateLogLine) error { rest++; return nil })
	fatal(err)
	if rest != len(lines)-2 {
		t.Errorf("%d lines after the second of %d", rest, len(lines))
	}
	no := errors.New("enough")
	if _, err := c.FollowTemplate(ctx, "app", "",
		func(string, cay.TemplateLogLine) error { return no }); !errors.Is(err, no) {
		t.Errorf("error is %v", err)
	}
	_, err = c.RebuildTemplate(ctx, "app", nil, nil)
	fatal(err)
	_, err = c.FollowTemplate(ctx, "app", "", func(string, cay.TemplateLogLine) error { return nil })
	fatal(err)
	_, err = c.RebuildTemplate(ctx, "app", &cay.RebuildTemplateRequest{Image: new("alpine:3")}, nil)
	fatal(err)
	if _, err := c.CancelTemplateBuild(ctx, "app"); err != nil && !cay.HasCode(err, "no_build") {
		t.Errorf("cancel: %v", err)
	}
	_, err = c.FollowTemplate(ctx, "app", "", func(string, cay.TemplateLogLine) error { return nil })
	fatal(err)
	_, err = c.RebuildTemplate(ctx, "app", &cay.RebuildTemplateRequest{Dockerfile: new("Dockerfile")},
		bytes.NewReader(aTar(t)))
	fatal(err)
	fatal(c.DeleteTemplate(ctx, "app", true))
	if err := c.DeleteTemplate(ctx, "app", false); !cay.HasCode(err, "template_not_found") {
		t.Errorf("deleted again: %v", err)
	}
}
