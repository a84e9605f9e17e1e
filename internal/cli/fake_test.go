package cli

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// fakeKey is the only key of the fake server. It belongs to the organization "default".
const fakeKey = "cay_0123456789abcdef0123456789abcdef01234567"

// fakeAPI is a server without a machine. It has enough of the API, with the same texts on the wire, to test the calls
// and the output of the command line. fakeCommand lists the commands that it can run.
type fakeAPI struct {
	*httptest.Server

	mu        sync.Mutex
	calls     []string // "METHOD /path body", in order
	sandboxes []cay.Sandbox
	files     map[string][]byte
	modes     map[string]string
	building  int // number of further questions about the template "slow" until it is ready
	executing int // commands in flight
	processes []cay.Process
}

// fakeHandler answers a request, whose body it gets.
type fakeHandler func(w http.ResponseWriter, r *http.Request, body []byte)

// newFakeAPI starts a fake server.
func newFakeAPI() *fakeAPI {
	f := &fakeAPI{files: map[string][]byte{"/data/hello.txt": []byte("hello\n")}, modes: map[string]string{}, building: 3}
	mux := http.NewServeMux()
	for pattern, h := range map[string]fakeHandler{
		"POST /v1/sandboxes": f.create,
		"GET /v1/sandboxes":  f.list,
		"GET /v1/sandboxes/{id}": f.withSandbox(func(w http.ResponseWriter, s *cay.Sandbox, _ []byte) {
			read := *s
			read.Network = &cay.NetworkUse{PacketsAllowed: 12, BytesAllowed: 1500, PacketsDenied: 3, BytesDenied: 180}
			answer(w, 200, read)
		}),
		"PUT /v1/sandboxes/{id}/egress":     f.withSandbox(f.setEgress),
		"DELETE /v1/sandboxes/{id}":         f.destroy,
		"POST /v1/sandboxes/{id}/keepalive": f.withSandbox(f.keepalive),
		"POST /v1/sandboxes/{id}/wake": f.withSandbox(func(w http.ResponseWriter, s *cay.Sandbox, _ []byte) {
			s.Status, s.State, s.SuspendedAt = "running", "running", nil
			answer(w, 200, s)
		}),
		"POST /v1/sandboxes/{id}/suspend": f.withSandbox(persistentOnly(func(w http.ResponseWriter, s *cay.Sandbox) {
			s.Status, s.State, s.SuspendedAt = "suspended", "suspended", new(time.Now().UTC())
			answer(w, 200, s)
		})),
		"POST /v1/sandboxes/{id}/checkpoint": f.withSandbox(persistentOnly(func(w http.ResponseWriter, _ *cay.Sandbox) {
			answer(w, 200, cay.RecoveryPoint{CreatedAt: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), SizeBytes: 2_200_000})
		})),
		"POST /v1/sandboxes/{id}/snapshots": f.withSandbox(f.snapshot),
		"POST /v1/sandboxes/{id}/fork":      f.withSandbox(f.fork),
		"GET /v1/snapshots":                 f.snapshots,
		"GET /v1/snapshots/{name}": func(w http.ResponseWriter, r *http.Request, _ []byte) {
			if r.PathValue("name") != "after-setup" {
				refuse(w, 404, "snapshot_not_found", "", fmt.Sprintf("there is no snapshot %q", r.PathValue("name")))
				return
			}
			answer(w, 200, aSnapshot())
		},
		"DELETE /v1/snapshots/{name}": func(w http.ResponseWriter, r *http.Request, _ []byte) {
			if r.PathValue("name") == "none" {
				refuse(w, 404, "snapshot_not_found", "", `there is no snapshot "none"`)
				return
			}
			w.WriteHeader(204)
		},
		"POST /v1/sandboxes/{id}/execute":   f.execute,
		"PUT /v1/sandboxes/{id}/files":      f.writeFile,
		"GET /v1/sandboxes/{id}/files":      f.readFile,
		"DELETE /v1/sandboxes/{id}/files":   f.removeFile,
		"GET /v1/sandboxes/{id}/files/list": f.listFiles,
		"GET /v1/sandboxes/{id}/events":     f.events,
		"GET /v1/events":                    f.feed,
		"GET /v1/templates":                 f.templates,
		"GET /v1/templates/{name}":          f.template,
		"GET /v1/templates/{name}/logs":     f.logs,
		"POST /v1/templates":                f.createTemplate,
		"POST /v1/templates/{name}/rebuild": f.rebuildTemplate,
		"POST /v1/templates/{name}/cancel": func(w http.ResponseWriter, r *http.Request, _ []byte) {
			answer(w, 200, cay.Template{ID: "tpl_1", Name: r.PathValue("name"), Status: "failed"})
		},
		"DELETE /v1/templates/{name}": func(w http.ResponseWriter, r *http.Request, _ []byte) {
			if r.PathValue("name") == "used" && r.URL.Query().Get("force") != "true" {
				refuse(w, 409, "template_in_use", "", "2 sandboxes of it are not destroyed")
				return
			}
			w.WriteHeader(204)
		},
		"POST /v1/api-keys":        f.createKey,
		"GET /v1/api-keys":         f.listKeys,
		"DELETE /v1/api-keys/{id}": func(w http.ResponseWriter, _ *http.Request, _ []byte) { w.WriteHeader(204) },
		"POST /v1/orgs":            f.createOrg,
		"GET /v1/orgs":             f.listOrgs,
		"GET /v1/me":               f.me,
		"GET /v1/pool":             f.pool,
	} {
		mux.HandleFunc(pattern, f.recorded(h))
	}
	f.addPorts(mux)
	for pattern, h := range webhookRoutes() {
		mux.HandleFunc(pattern, f.recorded(h))
	}
	for pattern, h := range nodeRoutes() {
		mux.HandleFunc(pattern, f.recorded(h))
	}
	for pattern, h := range f.liveRoutes() {
		mux.HandleFunc(pattern, f.recorded(h))
	}
	f.Server = httptest.NewServer(mux)
	return f
}

// recorded returns a handler that records the call and refuses all keys but fakeKey.
func (f *fakeAPI) recorded(h fakeHandler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // the caller has gone
		}
		noted := string(body)
		if r.Method == http.MethodPut {
			noted = fmt.Sprintf("(%d bytes)", len(body))
		}
		if _, params, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err == nil && params["boundary"] != "" {
			noted = fakeForm(body, params["boundary"])
		}
		f.mu.Lock()
		f.calls = append(f.calls, strings.TrimSpace(r.Method+" "+r.URL.RequestURI()+" "+noted))
		f.mu.Unlock()
		if r.Header.Get("Authorization") != "Bearer "+fakeKey {
			refuse(w, 401, "unauthenticated", "", "a valid API key is needed")
			return
		}
		h(w, r, body)
	}
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // fails in tests whose client goes away
}

func refuse(w http.ResponseWriter, status int, code, field, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.Header().Set("X-Request-Id", "req_1")
	w.WriteHeader(status)
	problem := map[string]any{"type": "urn:cay:problem:" + code, "title": http.StatusText(status), "status": status,
		"code": code, "detail": detail, "request_id": "req_1"}
	if field != "" {
		problem["field"] = field
	}
	_ = json.NewEncoder(w).Encode(problem) // fails as in answer
}

func (f *fakeAPI) create(w http.ResponseWriter, r *http.Request, body []byte) {
	var in cay.CreateSandboxRequest
	dec := json.NewDecoder(strings.NewReader(string(body)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&in); err != nil {
		refuse(w, 400, "invalid_json", "", err.Error())
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case in.Template == "none":
		refuse(w, 404, "template_not_found", "template", `there is no template "none"`)
		return
	case in.Template == "slow" && f.building > 0, in.Template == "broken":
		refuse(w, 409, "template_not_ready", "", "template "+in.Template+" is being built")
		return
	case deref(in.Size) == "huge":
		refuse(w, 400, "invalid_size", "size", `"huge" is not a size`)
		return
	case in.Egress != nil && len(in.Egress.AllowCIDRs) > 0 && in.Egress.AllowCIDRs[0] == "10.0.0.1/8":
		refuse(w, 400, "invalid_egress", "egress.allow_cidrs[0]", `"10.0.0.1/8" has host bits set: write 10.0.0.0/8`)
		return
	}
	if field, detail := wrongLife(in); field != "" {
		refuse(w, 400, "invalid_"+field, field, detail)
		return
	}
	s := cay.Sandbox{ID: fmt.Sprintf("sbx_%020d", len(f.sandboxes)+1), Template: in.Template, TemplateID: "tpl_1",
		TemplateVersion: 3, Mode: "ephemeral",
		Status: "running", State: "running", Size: "shared-cpu-1x", VCPUs: 1, MemoryMB: 512, DiskMB: 2048, Env: in.Env, Metadata: in.Metadata,
		Egress: cay.Egress{Mode: "allow_all"}, CreatedAt: time.Now().UTC(), ExpiresAt: new(time.Now().UTC().Add(5 * time.Minute)), TimeoutSeconds: new(int64(300))}
	if deref(in.Mode) == "persistent" {
		s.Mode, s.ExpiresAt, s.TimeoutSeconds, s.LastActivityAt = "persistent", nil, nil, &s.CreatedAt
		s.IdleTimeoutSeconds, s.RecoveryIntervalSeconds = fakeSeconds(in.IdleTimeout), fakeSeconds(in.RecoveryInterval)
	}
	if in.Egress != nil {
		s.Egress = *in.Egress
	}
	if r.URL.Query().Get("wait") == "false" {
		s.Status, s.State = "creating", "creating"
	}
	f.sandboxes = append(f.sandboxes, s)
	answer(w, 201, s)
}

// wrongLife returns a field that only sandboxes of the other mode have, and the refusal of it.
func wrongLife(in cay.CreateSandboxRequest) (field, detail string) {
	switch persistent := deref(in.Mode) == "persistent"; {
	case persistent && in.Timeout != nil:
		return "timeout", "is for ephemeral sandboxes; a persistent one has an idle_timeout"
	case !persistent && in.IdleTimeout != nil:
		return "idle_timeout", "is for persistent sandboxes; an ephemeral one has a timeout"
	case !persistent && in.RecoveryInterval != nil:
		return "recovery_interval", "is for persistent sandboxes"
	}
	return "", ""
}

// fakeSeconds returns the duration of a request as answers have it, 10m if it is absent.
func fakeSeconds(text *string) *int64 {
	d, err := time.ParseDuration(first(deref(text), "10m"))
	if err != nil {
		panic(err) // the command line sends the text of a Duration
	}
	return new(int64(d.Seconds()))
}

func persistentOnly(h func(http.ResponseWriter, *cay.Sandbox)) func(http.ResponseWriter, *cay.Sandbox, []byte) {
	return func(w http.ResponseWriter, s *cay.Sandbox, _ []byte) {
		switch {
		case s.Mode != "persistent":
			refuse(w, 409, "sandbox_not_persistent", "", "sandbox "+s.ID+" is ephemeral")
		case s.Status != "running":
			refuse(w, 409, "sandbox_not_running", "", "sandbox "+s.ID+" is "+string(s.Status))
		default:
			h(w, s)
		}
	}
}

func (f *fakeAPI) list(w http.ResponseWriter, r *http.Request, _ []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	q := r.URL.Query()
	from, _ := strconv.Atoi(q.Get("cursor"))
	limit, _ := strconv.Atoi(q.Get("limit"))
	out := cay.SandboxList{Sandboxes: []cay.Sandbox{}}
	var all []cay.Sandbox
	for _, s := range slices.Backward(f.sandboxes) {
		if wanted := q["status"]; len(wanted) == 0 && s.Status != "destroyed" || slices.Contains(wanted, string(s.Status)) {
			all = append(all, s)
		}
	}
	for i := from; i < len(all) && len(out.Sandboxes) < limit; i++ {
		out.Sandboxes = append(out.Sandboxes, all[i])
	}
	if end := from + len(out.Sandboxes); end < len(all) {
		out.NextCursor = new(strconv.Itoa(end))
	}
	answer(w, 200, out)
}

// withSandbox returns a handler that calls h with the sandbox of the path.
func (f *fakeAPI) withSandbox(h func(http.ResponseWriter, *cay.Sandbox, []byte)) fakeHandler {
	return func(w http.ResponseWriter, r *http.Request, body []byte) {
		f.mu.Lock()
		defer f.mu.Unlock()
		for i := range f.sandboxes {
			if f.sandboxes[i].ID == r.PathValue("id") {
				h(w, &f.sandboxes[i], body)
				return
			}
		}
		refuse(w, 404, "sandbox_not_found", "", "there is no sandbox "+r.PathValue("id"))
	}
}

func (f *fakeAPI) destroy(w http.ResponseWriter, r *http.Request, body []byte) {
	f.withSandbox(func(w http.ResponseWriter, s *cay.Sandbox, _ []byte) {
		s.Status, s.State, s.DestroyReason, s.DestroyedAt = "destroyed", "destroyed", new("requested"), new(time.Now().UTC())
		w.WriteHeader(204)
	})(w, r, body)
}

func (f *fakeAPI) setEgress(w http.ResponseWriter, s *cay.Sandbox, body []byte) {
	var in cay.Egress
	if err := json.Unmarshal(body, &in); err != nil {
		refuse(w, 400, "invalid_json", "", err.Error())
		return
	}
	if slices.Contains(in.AllowDomains, "1.1.1.1") {
		refuse(w, 400, "invalid_egress", "allow_domains[0]", `"1.1.1.1" is an address: it belongs in allow_cidrs`)
		return
	}
	s.Egress = in
	answer(w, 200, s)
}

func (f *fakeAPI) keepalive(w http.ResponseWriter, s *cay.Sandbox, body []byte) {
	var in struct{ Timeout *string }
	if err := json.Unmarshal(body, &in); err != nil {
		refuse(w, 400, "invalid_json", "", err.Error())
		return
	}
	if in.Timeout != nil {
		d, err := time.ParseDuration(*in.Timeout)
		if err != nil {
			refuse(w, 400, "invalid_timeout", "timeout", err.Error())
			return
		}
		s.ExpiresAt, s.TimeoutSeconds = new(time.Now().UTC().Add(d)), new(int64(d.Seconds()))
	}
	answer(w, 200, s)
}

func (f *fakeAPI) execute(w http.ResponseWriter, r *http.Request, body []byte) {
	f.mu.Lock()
	known := slices.ContainsFunc(f.sandboxes, func(s cay.Sandbox) bool { return s.ID == r.PathValue("id") })
	f.mu.Unlock()
	if !known {
		refuse(w, 404, "sandbox_not_found", "", "there is no sandbox "+r.PathValue("id"))
		return
	}
	var in cay.ExecuteRequest
	if err := json.Unmarshal(body, &in); err != nil {
		refuse(w, 400, "invalid_json", "", err.Error())
		return
	}
	if deref(in.Workdir) == "/none" {
		refuse(w, 400, "workdir_not_found", "workdir", "there is no directory /none")
		return
	}
	if deref(in.User) == "nobody2" {
		refuse(w, 400, "user_not_found", "user", "there is no user nobody2")
		return
	}
	stdin := []byte(deref(in.Stdin))
	args := in.Args
	// The command line uploads long input as a file.
	if len(args) > 4 && args[0] == "/bin/sh" && strings.HasPrefix(args[2], `exec <"$0"`) {
		f.mu.Lock()
		stdin = f.files[args[3]]
		delete(f.files, args[3])
		f.mu.Unlock()
		args = args[4:]
	}
	f.mu.Lock()
	f.executing++
	f.mu.Unlock()
	result := fakeCommand(r.Context(), args, in.Env, stdin)
	f.mu.Lock()
	f.executing--
	f.mu.Unlock()
	if r.Header.Get("Accept") == "text/event-stream" {
		streamResult(w, result)
		return
	}
	answer(w, 200, result)
}

// streamResult writes a result as a stream of events.
func streamResult(w http.ResponseWriter, r cay.ExecuteResult) {
	w.Header().Set("Content-Type", "text/event-stream")
	event := func(name string, v any) {
		b, _ := json.Marshal(v) // a type of the client
		fmt.Fprintf(w, "event: %s\ndata: %s\n\n", name, b)
	}
	event("started", map[string]any{"pid": 7})
	out := cay.OutputPiece{Data: r.Stdout}
	if r.StdoutEncoding != nil {
		out.Encoding = new("base64")
	}
	event("stdout", out)
	event("stderr", cay.OutputPiece{Data: r.Stderr})
	event("exit", cay.ProcessExit{ExitCode: r.ExitCode, Signal: r.Signal, TimedOut: r.TimedOut, OOMKilled: r.OOMKilled,
		StdoutTruncated: &r.StdoutTruncated, StderrTruncated: &r.StderrTruncated})
}

// fakeCommand returns the result of a command.
func fakeCommand(ctx context.Context, args []string, env map[string]string, stdin []byte) cay.ExecuteResult {
	var out, errs []byte
	var r cay.ExecuteResult
	rest := strings.Join(args[1:], " ")
	switch args[0] {
	case "echo":
		out = []byte(rest + "\n")
	case "complain":
		out, errs, r.ExitCode = []byte("out\n"), []byte("err"), 3
	case "cat":
		out = stdin
	case "wc":
		out = fmt.Append(nil, len(stdin), "\n")
	case "getenv":
		out = []byte(env[rest] + "\n")
	case "exit":
		r.ExitCode, _ = strconv.Atoi(rest)
	case "timeout":
		r.ExitCode, r.TimedOut, r.Signal = 124, true, new("SIGKILL")
	case "oom":
		r.ExitCode, r.OOMKilled, r.Signal = 137, true, new("SIGKILL")
	case "much":
		out, r.StdoutTruncated = []byte("the beginning"), true
	case "hang":
		<-ctx.Done()
	}
	encode := func(b []byte) string { return string(b) }
	if args[0] == "cat" { // its bytes may not be UTF-8
		r.StdoutEncoding = new("base64")
		encode = base64.StdEncoding.EncodeToString
	}
	r.Stdout, r.Stderr = encode(out), string(errs)
	return r
}

func (f *fakeAPI) writeFile(w http.ResponseWriter, r *http.Request, body []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	path := r.URL.Query().Get("path")
	if !strings.HasPrefix(path, "/") {
		refuse(w, 400, "invalid_path", "path", "must be absolute")
		return
	}
	f.files[path], f.modes[path] = body, r.URL.Query().Get("mode")
	w.WriteHeader(204)
}

func (f *fakeAPI) readFile(w http.ResponseWriter, r *http.Request, _ []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, ok := f.files[r.URL.Query().Get("path")]
	if !ok {
		refuse(w, 404, "file_not_found", "path", "there is no such file")
		return
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	if r.URL.Query().Get("path") == "/data/cut" {
		b = b[:len(b)/2] // the connection breaks in the middle
	}
	_, _ = w.Write(b) // fails in tests whose client goes away
}

func (f *fakeAPI) removeFile(w http.ResponseWriter, r *http.Request, _ []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.files, r.URL.Query().Get("path"))
	w.WriteHeader(204)
}

func (f *fakeAPI) listFiles(w http.ResponseWriter, r *http.Request, _ []byte) {
	dir := strings.TrimSuffix(r.URL.Query().Get("path"), "/")
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	answer(w, 200, map[string]any{"entries": []cay.FileEntry{
		{Name: "sub", Path: dir + "/sub", Type: "directory", Mode: "0755", Owner: "root", Group: "root", Size: 4096, ModifiedAt: at},
		{Name: "link", Path: dir + "/sub/link", Type: "symlink", Mode: "0777", Owner: "user", Group: "user", Size: 5, ModifiedAt: at, SymlinkTarget: new("/etc\x1b[2J")},
	}})
}

func (f *fakeAPI) events(w http.ResponseWriter, _ *http.Request, _ []byte) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	from := cay.SandboxState("creating")
	lost := cay.Event{ID: "evt_3", Time: at.Add(time.Minute), From: new(cay.SandboxState("running")),
		To: "suspended", Reason: "lost",
		Detail: new("fell back to the recovery point of 03:05")}
	answer(w, 200, cay.EventList{Events: []cay.Event{lost,
		{ID: "evt_2", Time: at.Add(time.Second), From: &from, To: "running", Reason: "created"},
		{ID: "evt_1", Time: at, To: "creating"}}})
}

func (f *fakeAPI) createKey(w http.ResponseWriter, _ *http.Request, body []byte) {
	var in cay.CreateAPIKeyRequest
	if err := json.Unmarshal(body, &in); err != nil {
		refuse(w, 400, "invalid_json", "", err.Error())
		return
	}
	var scopes []cay.Scope
	for _, s := range in.Scopes {
		if s == "fly" {
			refuse(w, 400, "invalid_scopes", "scopes", `"fly" is not a scope`)
			return
		}
		scopes = append(scopes, cay.Scope(s))
	}
	answer(w, 201, cay.NewAPIKey{APIKey: "cay_secret", ID: "key_1", Name: in.Name, Prefix: "cay_secr", Scopes: scopes,
		CreatedAt: time.Now()})
}

func (f *fakeAPI) listKeys(w http.ResponseWriter, _ *http.Request, _ []byte) {
	now := time.Now()
	answer(w, 200, cay.APIKeyList{APIKeys: []cay.APIKey{
		{ID: "key_2", Name: "ci", Prefix: "cay_abcd", Scopes: []cay.Scope{"exec", "files"}, CreatedAt: now.Add(-25 * time.Hour), RevokedAt: new(now.Add(-5 * time.Minute))},
		{ID: "key_1", Name: "first", Prefix: "cay_0123", Scopes: []cay.Scope{"admin"}, CreatedAt: now.Add(-72 * time.Hour), LastUsedAt: new(now.Add(-30 * time.Second))},
	}})
}

func (f *fakeAPI) createOrg(w http.ResponseWriter, _ *http.Request, body []byte) {
	var in cay.CreateOrgRequest
	if err := json.Unmarshal(body, &in); err != nil || in.Name == "default" {
		refuse(w, 409, "org_exists", "", `there is an organization "default" already`)
		return
	}
	answer(w, 201, cay.NewOrg{ID: "org_2", Name: in.Name, APIKey: "cay_orgsecret", APIKeyID: "key_9",
		CreatedAt: time.Now()})
}

func (f *fakeAPI) listOrgs(w http.ResponseWriter, _ *http.Request, _ []byte) {
	answer(w, 200, cay.OrgList{Orgs: []cay.Org{{ID: "org_1", Name: "default", Quota: cay.Quota{Sandboxes: 5},
		CreatedAt: time.Now()}}})
}

func (f *fakeAPI) me(w http.ResponseWriter, _ *http.Request, _ []byte) {
	answer(w, 200, cay.Me{Org: cay.Org{ID: "org_1", Name: "default"},
		APIKey: cay.APIKey{ID: "key_1", Name: "first", Scopes: []cay.Scope{"admin"}}})
}

func (f *fakeAPI) pool(w http.ResponseWriter, _ *http.Request, _ []byte) {
	answer(w, 200, map[string]any{"pool": []cay.PoolEntry{{Template: "python", TemplateVersion: 2, Size: "shared-cpu-1x",
		Ready: 1, Claimed: 7, Target: 3}}})
}
