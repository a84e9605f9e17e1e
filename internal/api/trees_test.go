package api

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"path"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	cay "github.com/cayhq/cay/sdk/go"
)

// The methods of fakeAgent for trees follow. They know the files in its map; directories do not
// exist by themselves.

func (a *fakeAgent) Stat(_ context.Context, _ agentapi.Target, p, _ string) (agentapi.Entry, error) {
	if a.fail != nil {
		return agentapi.Entry{}, a.fail
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	b, ok := a.files[p]
	if !ok {
		return agentapi.Entry{}, errNoFile
	}
	return agentapi.Entry{Name: path.Base(p), Path: p, Type: agentapi.TypeFile, Size: int64(len(b)), Mode: 0o100644,
		Owner: "user", Group: "user", ModifiedAt: time.Now()}, nil
}

func (a *fakeAgent) MakeDirectory(_ context.Context, _ agentapi.Target, p, user string,
	mode *fs.FileMode) (agentapi.Entry, error) {
	if a.fail != nil {
		return agentapi.Entry{}, a.fail
	}
	bits := fs.FileMode(0o755)
	if mode != nil {
		bits = *mode
	}
	return agentapi.Entry{Name: path.Base(p), Path: p, Type: agentapi.TypeDirectory, Mode: uint32(bits), Owner: user,
		Group: user, ModifiedAt: time.Now()}, nil
}

func (a *fakeAgent) Rename(ctx context.Context, t agentapi.Target, from, to, user string,
	overwrite bool) (agentapi.Entry, error) {
	if a.fail != nil {
		return agentapi.Entry{}, a.fail
	}
	a.mu.Lock()
	b, ok := a.files[from]
	_, taken := a.files[to]
	switch {
	case !ok:
		a.mu.Unlock()
		return agentapi.Entry{}, errNoFile
	case taken && !overwrite:
		a.mu.Unlock()
		return agentapi.Entry{}, fault.New(fault.Conflict, fault.CodePathExists, "it is there")
	}
	delete(a.files, from)
	a.files[to] = b
	a.mu.Unlock()
	return a.Stat(ctx, t, to, user)
}

func (a *fakeAgent) DownloadTree(_ context.Context, _ agentapi.Target, dir, _ string) (io.ReadCloser, error) {
	if a.fail != nil {
		return nil, a.fail
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, content := range a.files {
		if rel, ok := strings.CutPrefix(name, dir+"/"); ok {
			if err := w.WriteHeader(&tar.Header{Name: rel, Size: int64(len(content)), Mode: 0o644}); err != nil {
				return nil, err
			}
			if _, err := w.Write(content); err != nil {
				return nil, err
			}
		}
	}
	if b.Len() == 0 {
		return nil, errNoFile
	}
	if a.cutTrees {
		return io.NopCloser(io.MultiReader(&b, brokenReader{errors.New("cut off")})), nil
	}
	return io.NopCloser(&b), w.Close()
}

func (a *fakeAgent) UploadTree(_ context.Context, _ agentapi.Target, dir, user string, body io.Reader) error {
	if a.fail != nil {
		return a.fail
	}
	in := tar.NewReader(body)
	for {
		h, err := in.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fault.New(fault.Invalid, fault.CodeInvalidTar, "%s", err)
		}
		b, err := io.ReadAll(in)
		if err != nil {
			return err
		}
		a.mu.Lock()
		a.files[path.Join(dir, h.Name)] = b
		a.uploads = append(a.uploads, agentapi.UploadRequest{Path: path.Join(dir, h.Name), User: user})
		a.mu.Unlock()
	}
}

func (a *fakeAgent) Watch(ctx context.Context, _ agentapi.Target, p string, recursive bool, ready func(),
	emit func(agentapi.Change) error) error {
	if a.fail != nil {
		return a.fail
	}
	ready()
	for _, name := range []string{"a", "ü\nb"} {
		if err := emit(agentapi.Change{Type: agentapi.ChangeCreate, Name: name}); err != nil {
			return err
		}
	}
	if !recursive { // stands for a sandbox that ends
		return fault.New(fault.Unavailable, fault.CodeSandboxUnreachable, "gone")
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

func aTree(t *testing.T, names ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range names {
		if err := errors.Join(w.WriteHeader(&tar.Header{Name: name, Size: int64(len(name)), Mode: 0o644})); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, name); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestTreeCalls(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	base := "/v1/sandboxes/" + sbx.ID + "/files"
	archive := func(r *http.Request) { r.Header.Set("Content-Type", "application/x-tar") }
	if r := h.send(t, "PUT", base+"/tar?path=/d&owner=user", h.key, string(aTree(t, "a", "b/c")),
		archive); r.status != 204 {
		t.Fatalf("%d %s", r.status, r.body)
	}
	if string(h.agent.files["/d/b/c"]) != "b/c" || h.agent.uploads[0].User != "user" {
		t.Errorf("files %q, uploads %+v", h.agent.files, h.agent.uploads)
	}
	if e := as[FileEntry](t, 200, h.send(t, "GET", base+"/stat?path=/d/a", h.key, "")); e.Name != "a" ||
		e.Type != "file" || e.Size != 1 {
		t.Errorf("entry %+v", e)
	}
	if e := as[FileEntry](t, 200,
		h.send(t, "POST", base+"/mkdir", h.key, `{"path":"/e","mode":"0700","owner":"user"}`)); e.Mode != "0700" ||
		e.Owner != "user" || e.Type != "directory" {
		t.Errorf("entry %+v", e)
	}
	if e := as[FileEntry](t, 200,
		h.send(t, "POST", base+"/rename", h.key, `{"from":"/d/a","to":"/d/b/c","overwrite":true}`)); e.Path != "/d/b/c" ||
		e.Size != 1 {
		t.Errorf("entry %+v", e)
	}
	r := h.send(t, "GET", base+"/tar?path=/d", h.key, "")
	if hd, err := tar.NewReader(bytes.NewReader(r.body)).Next(); r.status != 200 || err != nil || hd.Name != "b/c" ||
		r.header.Get("Content-Type") != "application/x-tar" {
		t.Errorf("%d %+v, %v", r.status, hd, err)
	}
	h.agent.cutTrees = true
	resp, err := h.visitRaw(t, base+"/tar?path=/d")
	if err == nil {
		_, err = io.ReadAll(resp.Body)
		resp.Body.Close()
	}
	if err == nil && resp.StatusCode == http.StatusOK { // a replica that has got nothing yet answers 503
		t.Error("an archive that was cut off looks complete")
	}
	h.released(t)
}

// visitRaw sends a request without checking the answer against openapi.yaml.
func (h *testServer) visitRaw(t *testing.T, path string) (*http.Response, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), "GET", h.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+h.key)
	return http.DefaultClient.Do(r)
}

func TestTreesRefused(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	gone := "/v1/sandboxes/" + string(h.putSandbox(t, sandbox.Ephemeral, sandbox.Destroyed)) + "/files"
	base := "/v1/sandboxes/" + sbx.ID + "/files"
	h.agent.files["/a"], h.agent.files["/b"] = []byte("a"), []byte("b")
	archive := func(r *http.Request) { r.Header.Set("Content-Type", "application/x-tar") }
	large := func(r *http.Request) {
		archive(r)
		r.ContentLength = agentapi.MaxTar + 1
		r.Header.Set("Expect", "100-continue")
	}
	h.check(t, []refusal{
		{"stat without a path", "GET", base + "/stat", "", nil, 400, "invalid_path", "path"},
		{"stat a relative path", "GET", base + "/stat?path=a", "", nil, 400, "invalid_path", "path"},
		{"stat nothing", "GET", base + "/stat?path=/none", "", nil, 404, "file_not_found", ""},
		{"stat in what is destroyed", "GET", gone + "/stat?path=/a", "", nil, 409, "sandbox_not_running", ""},
		{"mkdir without a body", "POST", base + "/mkdir", "", nil, 400, "missing_body", ""},
		{"mkdir without a path", "POST", base + "/mkdir", `{}`, nil, 400, "invalid_path", "path"},
		{"mkdir with dots", "POST", base + "/mkdir", `{"path":"/a/../b"}`, nil, 400, "invalid_path", "path"},
		{"mkdir with a wrong mode", "POST", base + "/mkdir", `{"path":"/x","mode":"1777"}`, nil, 400, "invalid_mode", "mode"},
		{"mkdir with an empty owner", "POST", base + "/mkdir", `{"path":"/x","owner":""}`, nil, 400, "invalid_owner", "owner"},
		{"rename nothing", "POST", base + "/rename", `{"from":"/none","to":"/x"}`, nil, 404, "file_not_found", ""},
		{"rename without from", "POST", base + "/rename", `{"to":"/x"}`, nil, 400, "invalid_path", "from"},
		{"rename without to", "POST", base + "/rename", `{"from":"/a"}`, nil, 400, "invalid_path", "to"},
		{"rename to the root", "POST", base + "/rename", `{"from":"/a","to":"//"}`, nil, 400, "invalid_path", "to"},
		{"rename over something", "POST", base + "/rename", `{"from":"/a","to":"/b"}`, nil, 409, "path_exists", ""},
		{"watch without a path", "GET", base + "/watch", "", nil, 400, "invalid_path", "path"},
		{"watch with a wrong recursive", "GET", base + "/watch?path=/&recursive=perhaps", "", nil, 400, "invalid_recursive", "recursive"},
		{"tar of nothing", "GET", base + "/tar?path=/none", "", nil, 404, "file_not_found", ""},
		{"tar of a relative path", "GET", base + "/tar?path=x", "", nil, 400, "invalid_path", "path"},
		{"tar to nowhere", "PUT", base + "/tar", "x", archive, 400, "invalid_path", "path"},
		{"tar that is none", "PUT", base + "/tar?path=/d", strings.Repeat("x", 1000), archive, 400, "invalid_tar", ""},
		{"tar with an empty owner", "PUT", base + "/tar?path=/d&owner=", "x", archive, 400, "invalid_owner", "owner"},
		{"tar that is too large", "PUT", base + "/tar?path=/d", "x", large, 400, "tar_too_large", ""},
	})
	// Errors of the agent about a path or a user name the field as the call does.
	for field, want := range map[string]string{"path": "from", "to": "to"} {
		h.agent.fail = fault.InField(fault.CodePathNotDirectory, field, "no")
		h.check(t, []refusal{{"rename, " + field, "POST", base + "/rename", `{"from":"/a","to":"/b"}`, nil, 400,
			"path_not_directory", want}})
	}
	h.agent.fail = fault.InField(fault.CodeUnknownUser, "user", "no")
	h.check(t, []refusal{
		{"mkdir for a stranger", "POST", base + "/mkdir", `{"path":"/x","owner":"x"}`, nil, 400, "unknown_user", "owner"},
		{"tar for a stranger", "PUT", base + "/tar?path=/d&owner=x", "x", archive, 400, "unknown_user", "owner"},
	})
	h.agent.fail = fault.InField(fault.CodePathNotDirectory, "path", "no")
	h.check(t, []refusal{{"watch a file", "GET", base + "/watch?path=/a", "", nil, 400, "path_not_directory", "path"}})
}

func TestWatch(t *testing.T) {
	notForwarded(t, "a replica breaks streams, and cannot say why")
	h := newTestServer(t)
	stopping, stop := context.WithCancel(context.Background())
	defer stop()
	h.server.Stopping = stopping
	sbx := h.newSandbox(t)
	c, err := cay.New(h.url, h.key)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	ready := 0
	watch := func(recursive bool) error {
		got, ready = nil, 0
		return c.WatchFiles(t.Context(), sbx.ID, "/d", recursive, func() { ready++ }, func(f cay.FileChange) error {
			if got = append(got, string(f.Type)+" "+f.Path); len(got) == 2 && recursive {
				stop() // the server ends calls that have no end of their own
			}
			return nil
		})
	}
	for _, recursive := range []bool{false, true} {
		err := watch(recursive)
		if want := map[bool]string{false: fault.CodeSandboxUnreachable, true: "stopping"}[recursive]; !cay.HasCode(err,
			want) || ready != 1 || strings.Join(got, "|") != "create /d/a|create /d/ü\nb" {
			t.Errorf("recursive %v: %v, ready %d times, got %q", recursive, err, ready, got)
		}
	}
	h.released(t)
}
