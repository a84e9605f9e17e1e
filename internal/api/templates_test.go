package api

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	cay "github.com/cayhq/cay/sdk/go"
)

// aTar returns a build context with a Dockerfile.
func aTar(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	text := "FROM base\n"
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: "Dockerfile", Mode: 0o644, Size: int64(len(text))}),
		write(w, text), w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func write(w io.Writer, text string) error {
	_, err := io.WriteString(w, text)
	return err
}

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if err := errors.Join(write(w, string(b)), w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// form sets the body to a form. parts holds the name and the content of each part in turn.
func form(t testing.TB, parts ...string) func(*http.Request) {
	t.Helper()
	var b bytes.Buffer
	w := multipart.NewWriter(&b)
	for i := 0; i < len(parts); i += 2 {
		part, err := w.CreateFormField(parts[i])
		if err != nil {
			t.Fatal(err)
		}
		if err := write(part, parts[i+1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return func(r *http.Request) {
		r.Header.Set("Content-Type", w.FormDataContentType())
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(b.Bytes())), int64(b.Len())
	}
}

// waitTemplate waits until no build of the template is waiting or running.
func (h *testServer) waitTemplate(t *testing.T, name string) Template {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; {
		tpl := as[Template](t, 200, h.send(t, "GET", "/v1/templates/"+name, h.key, ""))
		if tpl.Status == TemplateStatusReady || tpl.Status == TemplateStatusFailed {
			return tpl
		}
		if time.Now().After(deadline) {
			t.Fatalf("template %s is still %s", name, tpl.Status)
		}
		time.Sleep(time.Millisecond) // between two polls, until the deadline
	}
}

func TestLifeOfATemplate(t *testing.T) {
	h := newTestServer(t)
	r := h.send(t, "POST", "/v1/templates", h.key, `{"name":"app","description":"mine","image":"ghcr.io/a/b:1","env":{"A":"1"},"workdir":"/w","user":"me",
		"start_command":"serve","ready":{"http":{"port":80,"path":"/ok"},"timeout":"30s"},"egress":{"mode":"deny_all","allow_domains":["pypi.org"]},
		"disk_size_mb":100,"size":"shared-cpu-1x","credentials":{"username":"u","password":"hush-hush"},"target":null}`)
	created := as[Template](t, 202, r)
	if r.header.Get("Location") != "/v1/templates/"+created.ID || created.Version != 0 || created.Builtin {
		t.Errorf("created %s, at %q", r.body, r.header.Get("Location"))
	}
	ready := h.waitTemplate(t, "app")
	want := Template{ID: created.ID, Name: "app", Description: "mine", Status: TemplateStatusReady, Version: 1,
		Source: new("test"), ImageSizeBytes: new(int64(9)),
		Env: Env{"A": "1", "FROM": "image"}, Workdir: new("/w"), User: new("me"), StartCommand: new("serve"),
		Ready: &ReadyCheck{HTTP: &ReadyHTTP{Port: 80, Path: "/ok"}, Timeout: new("30s")}, Size: new("shared-cpu-1x"), DiskSizeMB: new(100),
		Egress:    Egress{Mode: EgressModeDenyAll, AllowDomains: []string{"pypi.org"}},
		CreatedAt: ready.CreatedAt, UpdatedAt: ready.UpdatedAt, BuiltAt: ready.BuiltAt}
	if diff := cmp.Diff(want, ready); diff != "" || ready.BuiltAt == nil {
		t.Errorf("ready (-want +got):\n%s", diff)
	}
	h.builds.mu.Lock()
	if c := h.builds.jobs[0].Credentials; c == nil || c.Password != "hush-hush" {
		t.Errorf("the builder got credentials %+v", c)
	}
	h.builds.mu.Unlock()
	if strings.Contains(h.log.String(), "hush-hush") {
		t.Error("the log has the password")
	}
	sbx := as[Sandbox](t, 201, h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"app"}`))
	if sbx.TemplateVersion != 1 || sbx.DiskMB != 100 || sbx.Env["A"] != "1" || sbx.Egress.Mode != EgressModeDenyAll {
		t.Errorf("sandbox %+v", sbx)
	}

	// A rebuild with other inputs gets their defaults and keeps the egress policy.
	as[Template](t, 202, h.send(t, "POST", "/v1/templates/app/rebuild", h.key, `{"dockerfile":"FROM python\nCMD serve"}`))
	second := h.waitTemplate(t, "app")
	if second.Version != 2 || *second.User != "app" || *second.Workdir != "/srv" || second.Description != "" ||
		second.Size != nil || second.Ready != nil ||
		second.Egress.Mode != EgressModeDenyAll || *second.StartCommand != "serve --port '80 80'" {
		t.Errorf("rebuilt %+v", second)
	}
	// Rebuilds with the same inputs, asked for in both ways, create no new version.
	for _, body := range []string{`{"dockerfile":"FROM python\nCMD serve"}`, ""} {
		as[Template](t, 202, h.send(t, "POST", "/v1/templates/app/rebuild", h.key, body))
		if again := h.waitTemplate(t, "app"); again.Version != 2 {
			t.Errorf("rebuild %q: version %d", body, again.Version)
		}
	}
	// A failed build leaves the ready version in use.
	as[Template](t, 202, h.send(t, "POST", "/v1/templates/app/rebuild", h.key, `{"image":"fail"}`))
	failed := h.waitTemplate(t, "app")
	wantError := &BuildError{Message: "the command ended with exit code 2", Step: new("RUN make"), ExitCode: new(2),
		Tail: []string{"cc: no"}}
	if diff := cmp.Diff(wantError, failed.BuildError); diff != "" || failed.Version != 2 ||
		failed.Status != TemplateStatusFailed {
		t.Errorf("failed: %+v\n%s", failed, diff)
	}
	if other := as[Sandbox](t, 201,
		h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"app"}`)); other.TemplateVersion != 2 {
		t.Errorf("sandbox of version %d", other.TemplateVersion)
	}
	if r := h.send(t, "DELETE", "/v1/templates/app", h.key, ""); r.status != 409 || r.problem.Code != "template_in_use" {
		t.Errorf("delete in use: %d %s", r.status, r.body)
	}
	if r := h.send(t, "DELETE", "/v1/templates/app?force=true", h.key, ""); r.status != 204 || len(r.body) != 0 {
		t.Errorf("delete: %d %s", r.status, r.body)
	}
	if r := h.send(t, "GET", "/v1/templates/app", h.key, ""); r.status != 404 {
		t.Errorf("deleted: %d %s", r.status, r.body)
	}
	if same := as[Sandbox](t, 200,
		h.send(t, "GET", "/v1/sandboxes/"+sbx.ID, h.key, "")); same.Status != SandboxStatusRunning {
		t.Errorf("the sandbox of the deleted template is %s", same.Status)
	}
}

func TestTemplateWithContext(t *testing.T) {
	h := newTestServer(t)
	for name, source := range map[string][]byte{"plain": aTar(t), "gzip": gzipped(t, aTar(t)),
		"empty": make([]byte, 1024)} {
		r := h.send(t, "POST", "/v1/templates", h.key, "",
			form(t, "template", `{"name":"`+name+`","dockerfile":"Dockerfile"}`, "context", string(source)))
		as[Template](t, 202, r)
		if tpl := h.waitTemplate(t, name); tpl.Status != TemplateStatusReady {
			t.Errorf("%s: %+v", name, tpl)
		}
	}
	as[Template](t, 202, h.send(t, "POST", "/v1/templates", h.key, "",
		form(t, "template", `{"name":"none","image":"alpine"}`)))
	h.builds.mu.Lock()
	for _, j := range h.builds.jobs {
		if (j.Context != "") != (j.Definition.Dockerfile != "") {
			t.Errorf("job %+v", j)
		}
	}
	h.builds.mu.Unlock()
	as[Template](t, 202, h.send(t, "POST", "/v1/templates/plain/rebuild", h.key, "",
		form(t, "template", `{"image":"image.tar"}`, "context", string(aTar(t)))))
	if tpl := h.waitTemplate(t, "plain"); tpl.Version != 2 {
		t.Errorf("rebuilt: %+v", tpl)
	}
}

func TestTemplatesRefused(t *testing.T) {
	h := newTestServer(t)
	create := func(name, fields, code, field string) refusal {
		return refusal{name, "POST", "/v1/templates", `{"name":"x",` + fields + `}`, nil, 400, code, field}
	}
	image := func(name, fields, code, field string) refusal {
		return create(name, `"image":"alpine",`+fields, code, field)
	}
	context := func(name string, status int, code, field string, parts ...string) refusal {
		return refusal{name, "POST", "/v1/templates", "", form(t, parts...), status, code, field}
	}
	tarred := string(aTar(t))
	const good = `{"name":"x","dockerfile":"Dockerfile"}`
	h.check(t, []refusal{
		{"no body", "POST", "/v1/templates", "", nil, 400, "missing_body", ""},
		{"no name", "POST", "/v1/templates", `{"image":"alpine"}`, nil, 400, "invalid_name", "name"},
		{"bad name", "POST", "/v1/templates", `{"name":"A b","image":"alpine"}`, nil, 400, "invalid_name", "name"},
		{"name taken", "POST", "/v1/templates", `{"name":"mine","image":"alpine"}`, nil, 409, "template_exists", ""},
		{"built-in name", "POST", "/v1/templates", `{"name":"python","image":"alpine"}`, nil, 409, "template_exists", ""},
		{"built-in name, never built", "POST", "/v1/templates", `{"name":"lazy","image":"alpine"}`, nil, 409, "template_exists", ""},
		create("no source", `"user":"a"`, "invalid_source", ""),
		create("two sources", `"image":"alpine","dockerfile":"FROM x"`, "invalid_source", ""),
		create("unknown field", `"immage":"alpine"`, "unknown_field", "immage"),
		create("bad reference", `"image":"Alpine Linux"`, "invalid_image", "image"),
		create("reference with a scheme", `"image":"https://ghcr.io/a"`, "invalid_image", "image"),
		create("path without a context", `"dockerfile":"Dockerfile"`, "invalid_dockerfile", "dockerfile"),
		create("dockerfile too long", `"dockerfile":"FROM x`+strings.Repeat("x", 512<<10)+`"`, "invalid_dockerfile", "dockerfile"),
		create("bad suite", `"debian":{"suite":"../x"}`, "invalid_debian", "debian.suite"),
		create("bad package", `"debian":{"packages":["git","--x"]}`, "invalid_debian", "debian.packages[1]"),
		create("mirrors", `"debian":{"mirrors":["deb http://x y z"]}`, "unknown_field", "debian.mirrors"),
		create("build args without a dockerfile", `"image":"alpine","build_args":{"A":"1"}`, "invalid_build_args", "build_args"),
		create("bad build arg", `"dockerfile":"FROM x","build_args":{"A B":"1"}`, "invalid_build_args", "build_args.A B"),
		create("bad target", `"dockerfile":"FROM x","target":"a b"`, "invalid_target", "target"),
		create("target without a dockerfile", `"image":"alpine","target":"a"`, "invalid_target", "target"),
		create("credentials without a registry", `"dockerfile":"FROM x","credentials":{"username":"a","password":"b"}`, "invalid_credentials", "credentials.registry"),
		create("credentials for packages", `"debian":{},"credentials":{"username":"a","password":"b"}`, "invalid_credentials", "credentials"),
		image("no password", `"credentials":{"username":"a"}`, "invalid_credentials", "credentials.password"),
		image("env", `"env":{"A-B":"1"}`, "invalid_env", "env.A-B"),
		image("workdir", `"workdir":"tmp"`, "invalid_workdir", "workdir"),
		image("user", `"user":"a b"`, "invalid_user", "user"),
		image("size", `"size":"huge"`, "invalid_size", "size"),
		image("size empty", `"size":""`, "invalid_size", "size"),
		image("disk", `"disk_size_mb":8193`, "invalid_disk_size_mb", "disk_size_mb"),
		image("no disk", `"disk_size_mb":0`, "invalid_disk_size_mb", "disk_size_mb"),
		image("egress", `"egress":{"mode":"maybe"}`, "invalid_egress", "egress.mode"),
		image("description", `"description":"`+strings.Repeat("x", 1025)+`"`, "invalid_description", "description"),
		image("ready twice", `"ready":{"port":1,"command":"x"}`, "invalid_ready", "ready"),
		image("ready port", `"ready":{"port":65536}`, "invalid_ready", "ready.port"),
		image("ready path", `"ready":{"http":{"port":1,"path":"x"}}`, "invalid_ready", "ready.http.path"),
		image("ready timeout", `"ready":{"port":1,"timeout":"soon"}`, "invalid_ready", "ready.timeout"),
		image("ready in no time", `"ready":{"port":1,"timeout":"0"}`, "invalid_ready", "ready.timeout"),
		image("ready of nothing", `"start_command":"","ready":{"port":1}`, "invalid_ready", "ready"),
		create("packages ready", `"debian":{},"ready":{"port":1}`, "invalid_ready", "ready"),
		context("context without a template", 400, "unknown_field", "context", "context", tarred),
		context("no part", 400, "invalid_template", "template"),
		context("another part", 400, "unknown_field", "file", "template", good, "file", tarred),
		context("two contexts", 400, "unknown_field", "context", "template", good, "context", tarred, "context", tarred),
		context("template not JSON", 400, "invalid_json", "", "template", "name=x", "context", tarred),
		context("template too large", 413, "body_too_large", "", "template", `{"name":"`+strings.Repeat("x", 1<<20)+`"}`),
		context("context not a tar", 400, "invalid_context", "context", "template", good, "context", strings.Repeat("FROM x\n", 100)),
		context("context empty", 400, "invalid_context", "context", "template", good, "context", ""),
		context("context too large", 413, "context_too_large", "", "template", good, "context", tarred+strings.Repeat("\x00", contextLimit)),
		context("path out of the context", 400, "invalid_dockerfile", "dockerfile", "template", `{"name":"x","dockerfile":"../Dockerfile"}`, "context", tarred),
		context("absolute image", 400, "invalid_image", "image", "template", `{"name":"x","image":"/etc/passwd"}`, "context", tarred),
		context("context for packages", 400, "invalid_context", "context", "template", `{"name":"x","debian":{}}`, "context", tarred),
		{"no boundary", "POST", "/v1/templates", "x", header("Content-Type", "multipart/form-data"), 415, "unsupported_media_type", "Content-Type"},
		{"no form", "POST", "/v1/templates", "x", header("Content-Type", "multipart/form-data; boundary=b"), 400, "invalid_multipart", ""},
		{"cut off", "POST", "/v1/templates", "--b\r\nContent-Disposition: form-data; name=\"template\"\r\n\r\n{", header("Content-Type", "multipart/form-data; boundary=b"), 400, "incomplete_body", ""},
		{"compressed", "POST", "/v1/templates", "x", func(r *http.Request) { form(t, "template", good)(r); r.Header.Set("Content-Encoding", "gzip") }, 415, "unsupported_media_type", "Content-Type"},

		{"rebuild of none", "POST", "/v1/templates/none/rebuild", "", nil, 404, "template_not_found", ""},
		{"rebuild of a built-in one", "POST", "/v1/templates/python/rebuild", "", nil, 403, "template_builtin", ""},
		{"rebuild with a name", "POST", "/v1/templates/mine/rebuild", `{"name":"other","image":"alpine"}`, nil, 400, "unknown_field", "name"},
		{"rebuild with a policy", "POST", "/v1/templates/mine/rebuild", `{"image":"alpine","egress":{"mode":"deny_all"}}`, nil, 400, "unknown_field", "egress"},
		{"rebuild without a source", "POST", "/v1/templates/mine/rebuild", `{"user":"a"}`, nil, 400, "invalid_source", ""},
		{"built-in one from an image", "POST", "/v1/templates/lazy/rebuild", `{"image":"alpine"}`, nil, 403, "template_builtin", ""},
		{"delete none", "DELETE", "/v1/templates/none", "", nil, 404, "template_not_found", ""},
		{"delete a built-in one", "DELETE", "/v1/templates/python?force=true", "", nil, 403, "template_builtin", ""},
		{"delete with a wrong force", "DELETE", "/v1/templates/mine?force=maybe", "", nil, 400, "invalid_force", "force"},
		{"cancel of none", "POST", "/v1/templates/none/cancel", "", nil, 404, "template_not_found", ""},
		{"cancel of a built-in one", "POST", "/v1/templates/python/cancel", "", nil, 403, "template_builtin", ""},
		{"cancel without a build", "POST", "/v1/templates/mine/cancel", "", nil, 409, "no_build", ""},
		{"follow none", "GET", "/v1/templates/none/logs", "", header("Accept", eventStream), 404, "template_not_found", ""},
		{"follow after nothing", "GET", "/v1/templates/mine/logs", "", func(r *http.Request) { r.Header.Set("Accept", eventStream); r.Header.Set("Last-Event-ID", "x") }, 400, "invalid_last_event_id", "Last-Event-ID"},
	})
	h.builds.mu.Lock()
	defer h.builds.mu.Unlock()
	if len(h.builds.jobs) > 0 {
		t.Errorf("refused requests started builds: %+v", h.builds.jobs)
	}
}

func TestTemplateQuota(t *testing.T) {
	h := newTestServer(t)
	for i := range 20 - 1 { // the template mine exists already
		as[Template](t, 202, h.send(t, "POST", "/v1/templates", h.key, fmt.Sprintf(`{"name":"t%d","image":"alpine"}`, i)))
	}
	if r := h.send(t, "POST", "/v1/templates", h.key, `{"name":"more","image":"alpine"}`); r.status != 429 ||
		r.problem.Code != "quota_exceeded" {
		t.Errorf("a template over the quota: %d %s", r.status, r.body)
	}
}

// TestContextThatBreaksOff checks that a caller that leaves in the middle of a build context leaves
// no template behind.
func TestContextThatBreaksOff(t *testing.T) {
	h := newTestServer(t)
	broken := errors.New("gone")
	request, err := http.NewRequestWithContext(t.Context(), "POST", h.url+"/v1/templates", nil)
	if err != nil {
		t.Fatal(err)
	}
	form(t, "template", `{"name":"x","dockerfile":"Dockerfile"}`, "context", string(aTar(t)))(request)
	whole, err := io.ReadAll(request.Body)
	if err != nil {
		t.Fatal(err)
	}
	request.Body, request.ContentLength = io.NopCloser(io.MultiReader(bytes.NewReader(whole[:len(whole)-600]),
		iotest.ErrReader(broken))), -1
	request.Header.Set("Authorization", "Bearer "+h.key)
	if resp, err := http.DefaultClient.Do(request); err == nil {
		resp.Body.Close()
		t.Errorf("answered %d", resp.StatusCode)
	}
	if r := h.send(t, "GET", "/v1/templates/x", h.key, ""); r.status != 404 {
		t.Errorf("there is %s", r.body)
	}
}

func TestBuiltinWhenFirstAskedFor(t *testing.T) {
	h := newTestServer(t)
	if tpl := as[Template](t, 200,
		h.send(t, "GET", "/v1/templates/lazy", h.key, "")); tpl.Status != TemplateStatusPending || tpl.Progress == nil {
		t.Errorf("%+v", tpl)
	}
	if r := h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"lazy"}`); r.status != 409 ||
		r.problem.Code != "template_not_ready" {
		t.Errorf("%d %s", r.status, r.body)
	}
	if tpl := h.waitTemplate(t, "lazy"); tpl.Status != TemplateStatusReady || tpl.StartCommand != nil {
		t.Errorf("%+v", tpl)
	}
	// Only the operator may rebuild it.
	_, writer := h.newKey(t, 0, auth.TemplatesWrite)
	for _, c := range []struct {
		key    string
		status int
	}{{h.other, 403}, {writer, 403}, {h.key, 202}} {
		if r := h.send(t, "POST", "/v1/templates/lazy/rebuild", c.key, ""); r.status != c.status {
			t.Errorf("rebuild: %d %s, want %d", r.status, r.body, c.status)
		}
	}
	if tpl := h.waitTemplate(t, "lazy"); tpl.Version != 1 {
		t.Errorf("%+v", tpl)
	}
}

// readEvent reads one event and skips comments.
func readEvent(t *testing.T, r *bufio.Reader) map[string]string {
	t.Helper()
	event := map[string]string{}
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatalf("reading an event: %v", err)
		}
		line = strings.TrimSuffix(line, "\n")
		if line == "" && len(event) > 0 {
			return event
		}
		if name, value, ok := strings.Cut(line, ": "); ok && name != "" {
			event[name] = value
		}
	}
}

func (h *testServer) follow(t *testing.T, name, last string) *bufio.Reader {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), "GET", h.url+"/v1/templates/"+name+"/logs", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+h.key)
	r.Header.Set("Accept", "text/html, text/event-stream;q=0.9")
	if last != "" {
		r.Header.Set("Last-Event-ID", last)
	}
	resp, err := h.http.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != eventStream {
		t.Fatalf("answered %d %s", resp.StatusCode, resp.Header.Get("Content-Type"))
	}
	return bufio.NewReader(resp.Body)
}

func TestFollowingABuild(t *testing.T) {
	h := newTestServer(t)
	release := h.builds.holding()
	as[Template](t, 202, h.send(t, "POST", "/v1/templates", h.key, `{"name":"app","image":"alpine"}`))
	stream := h.follow(t, "app", "")
	var got []TemplateLogLine
	var ids []string
	line := func(r *bufio.Reader) {
		t.Helper()
		e := readEvent(t, r)
		var l TemplateLogLine
		if err := json.Unmarshal([]byte(e["data"]), &l); err != nil || e["event"] != "line" {
			t.Fatalf("event %v, %v", e, err)
		}
		got, ids = append(got, l), append(ids, e["id"])
	}
	for range 4 {
		line(stream) // read while the build runs
	}
	if l := got[2]; l.Text != "step 2 of 2: RUN make" || !l.Heading || l.Step == nil || *l.Step != 2 {
		t.Errorf("heading %+v", l)
	}
	if l := got[3]; l.Text != "cc main.c" || l.Heading || *l.Step != 2 {
		t.Errorf("line %+v", l)
	}
	again := h.follow(t, "app", ids[1])
	got = nil
	line(again)
	if got[0].Text != "step 2 of 2: RUN make" {
		t.Errorf("after %s comes %+v", ids[1], got[0])
	}
	release()
	line(stream)
	end := readEvent(t, stream)
	var tpl Template
	if err := json.Unmarshal([]byte(end["data"]), &tpl); err != nil || end["event"] != "end" ||
		tpl.Status != TemplateStatusReady || tpl.Version != 1 {
		t.Errorf("end is %v, %v", end, err)
	}
	if _, err := stream.ReadByte(); err != io.EOF {
		t.Errorf("got %v after the end", err)
	}
	whole := as[TemplateLogs](t, 200, h.send(t, "GET", "/v1/templates/app/logs", h.key, ""))
	if len(whole.Lines) != 5 {
		t.Errorf("the log is %+v", whole)
	}
	// The log of a finished build ends at once. The log of another build is sent from its beginning.
	late := h.follow(t, "app", "bld_other.3")
	for range 5 {
		line(late)
	}
	if e := readEvent(t, late); e["event"] != "end" {
		t.Errorf("end is %v", e)
	}
}

func TestCancelABuild(t *testing.T) {
	h := newTestServer(t)
	release := h.builds.holding()
	defer release()
	as[Template](t, 202, h.send(t, "POST", "/v1/templates", h.key, `{"name":"app","image":"alpine"}`))
	stream := h.follow(t, "app", "")
	readEvent(t, stream) // the build runs
	if r := h.send(t, "POST", "/v1/templates/app/rebuild", h.key, `{"image":"other"}`); r.status != 409 ||
		r.problem.Code != "build_in_progress" {
		t.Errorf("rebuild: %d %s", r.status, r.body)
	}
	// This rebuild joins the running build, which has the same inputs.
	as[Template](t, 202, h.send(t, "POST", "/v1/templates/app/rebuild", h.key, `{"image":"alpine"}`))
	tpl := as[Template](t, 200, h.send(t, "POST", "/v1/templates/app/cancel", h.key, ""))
	if tpl.Status != TemplateStatusFailed || tpl.BuildError == nil ||
		!strings.Contains(tpl.BuildError.Message, "cancelled") {
		t.Errorf("%+v", tpl)
	}
	for e := map[string]string{}; e["event"] != "end"; e = readEvent(t, stream) {
	}
	if r := h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"app"}`); r.status != 409 ||
		!strings.Contains(r.problem.Detail, "cancelled") {
		t.Errorf("create: %d %s", r.status, r.body)
	}
}

// TestFollowersAreSentAway checks that a server that stops does not wait for followers of a build.
func TestFollowersAreSentAway(t *testing.T) {
	h := newTestServer(t)
	release := h.builds.holding()
	defer release()
	as[Template](t, 202, h.send(t, "POST", "/v1/templates", h.key, `{"name":"app","image":"alpine"}`))
	stream := h.follow(t, "app", "")
	readEvent(t, stream)
	h.templates.Hangup()
	if rest, err := io.ReadAll(stream); err != nil || strings.Contains(string(rest), "event: end") {
		t.Errorf("the stream went on with %q, %v", rest, err)
	}
}

func TestStartText(t *testing.T) {
	for want, start := range map[string]sandbox.Start{
		"": {}, "a b": {Command: "a b"}, "a 'b c' '' 'it'\\''s' d=/e": {Args: []string{"a", "b c", "", "it's", "d=/e"}},
	} {
		if got := startText(start); got != want {
			t.Errorf("%+v is %q, want %q", start, got, want)
		}
	}
}

// zeroes reads as many zero bytes as are left, and counts those that were taken.
type zeroes struct{ left, taken int64 }

func (z *zeroes) Read(p []byte) (int, error) {
	if z.left == 0 {
		return 0, io.EOF
	}
	n := min(int64(len(p)), z.left)
	clear(p[:n])
	z.left, z.taken = z.left-n, z.taken+n
	return int(n), nil
}

// TestHugeContextIsRefused sends a context that is larger than what the server reads of a refused
// body. The client must get the answer and not only a broken connection.
func TestHugeContextIsRefused(t *testing.T) {
	h := newTestServer(t)
	c, err := cay.New(h.url, h.key)
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		body := &zeroes{left: 4 << 30}
		_, err := c.CreateTemplate(t.Context(), cay.CreateTemplateRequest{Name: "huge", Dockerfile: new("Dockerfile")},
			body)
		if !cay.HasCode(err, fault.CodeContextTooLarge) {
			t.Errorf("after %d bytes: %v", body.taken, err)
		}
	}
}
