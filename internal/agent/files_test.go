package agent_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime/multipart"
	"net/http"
	"net/textproto"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

func wantFault(t *testing.T, err error, kind fault.Kind, code string) {
	t.Helper()
	if f := fault.As(err); f == nil || f.Kind != kind || f.Code != code {
		t.Errorf("got %v, want %v %s", err, kind, code)
	}
}

func (s *sandbox) upload(path, content string) error {
	return s.client.Upload(s.t.Context(), s.target,
		agentapi.UploadRequest{Path: path, Body: strings.NewReader(content), Size: int64(len(content))})
}

func (s *sandbox) download(path, rng string) (string, *agentapi.Download, error) {
	d, err := s.client.Download(s.t.Context(), s.target, path, "", rng)
	if err != nil {
		return "", nil, err
	}
	defer d.Body.Close()
	b, err := io.ReadAll(d.Body)
	return string(b), d, err
}

func TestUploadAndDownload(t *testing.T) {
	s := startSandbox(t, options{})
	mode := fs.FileMode(0o600)
	big := strings.Repeat("0123456789abcdef", 300_000)
	for _, r := range []agentapi.UploadRequest{
		{Path: "/home/user/a/b/c", User: "user", Body: strings.NewReader("hello"), Size: 5},
		{Path: "/tmp/mode", Mode: &mode, Owner: "user:extra", Body: strings.NewReader(""), Size: 0},
		{Path: "/tmp/unknown size", Body: strings.NewReader(big), Size: -1},
		{Path: "/tmp/known size", Body: strings.NewReader(big), Size: int64(len(big))},
	} {
		if err := s.client.Upload(t.Context(), s.target, r); err != nil {
			t.Fatalf("uploading %s: %v", r.Path, err)
		}
	}
	got := s.sh("stat -c '%n %a %U %G %s' /home/user/a /home/user/a/b/c /tmp/mode '/tmp/unknown size'")
	want := fmt.Sprintf("/home/user/a 755 user user 4096\n/home/user/a/b/c 644 user user 5\n"+
		"/tmp/mode 600 user extra 0\n/tmp/unknown size 644 root root %d", len(big))
	got = strings.Replace(got, "user user 80\n", "user user 4096\n", 1)
	if strings.Replace(got, " 60\n", " 4096\n", 1) != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	for _, c := range []struct {
		path, rng, want string
		status          int
	}{
		{"/home/user/a/b/c", "", "hello", 200}, {"/tmp/mode", "", "", 200}, {"/tmp/known size", "", big, 200},
		{"/home/user/a/b/c", "bytes=1-2", "el", 206}, {"/home/user/a/b/c", "bytes=-2", "lo", 206},
	} {
		body, d, err := s.download(c.path, c.rng)
		if err != nil || body != c.want || d.Status != c.status || d.Size != int64(len(c.want)) {
			t.Errorf("download %s %q: %d bytes, %+v, %v", c.path, c.rng, len(body), d, err)
		}
	}
	if _, d, err := s.download("/home/user/a/b/c", "bytes=9-"); err != nil ||
		d.Status != http.StatusRequestedRangeNotSatisfiable {
		t.Errorf("a range outside: %+v, %v", d, err)
	}

	// Replacing a file keeps its mode and follows a link.
	s.sh("chmod 755 /home/user/a/b/c; ln -s a/b/c /home/user/link; mkfifo /tmp/fifo")
	if err := s.upload("/home/user/link", "new"); err != nil {
		t.Error(err)
	}
	got = s.sh("cat /home/user/a/b/c; stat -c ' %a' /home/user/a/b/c; readlink /home/user/link")
	if got != "new 755\na/b/c" {
		t.Errorf("through a link: %q", got)
	}
	_, _, err := s.download("/nosuch", "")
	wantFault(t, err, fault.NotFound, fault.CodeFileNotFound)
	_, _, err = s.download("/etc/passwd/x", "")
	wantFault(t, err, fault.NotFound, fault.CodeFileNotFound)
	_, _, err = s.download("/tmp", "")
	wantFault(t, err, fault.Invalid, fault.CodePathIsDirectory)
	_, _, err = s.download("/tmp/fifo", "")
	wantFault(t, err, fault.Invalid, fault.CodeInvalidPath)
	wantFault(t, s.upload("/tmp", "x"), fault.Invalid, fault.CodePathIsDirectory)
	wantFault(t, s.upload("/etc/passwd/x", "x"), fault.Invalid, fault.CodePathNotDirectory)
	err = s.client.Upload(t.Context(), s.target,
		agentapi.UploadRequest{Path: "/tmp/x", Owner: "nosuch", Body: strings.NewReader("x"), Size: 1})
	wantFault(t, err, fault.Invalid, fault.CodeUnknownOwner)
	err = s.client.Upload(t.Context(), s.target,
		agentapi.UploadRequest{Path: "/tmp/x", User: "nosuch", Body: strings.NewReader("x"), Size: 1})
	wantFault(t, err, fault.Invalid, fault.CodeUnknownUser)
}

// failingReader returns some bytes and then an error.
type failingReader struct {
	left int
	err  error
}

func (r *failingReader) Read(b []byte) (int, error) {
	if r.left <= 0 {
		return 0, r.err
	}
	n := min(len(b), r.left)
	r.left -= n
	return n, nil
}

func TestAbortedUploadLeavesNothing(t *testing.T) {
	s := startSandbox(t, options{})
	s.sh("mkdir /tmp/d; echo old >/tmp/d/f")
	broken := errors.New("the body broke")
	for _, size := range []int64{-1, 8 << 20} {
		err := s.client.Upload(t.Context(), s.target,
			agentapi.UploadRequest{Path: "/tmp/d/f", Body: &failingReader{3 << 20, broken}, Size: size})
		if !errors.Is(err, broken) {
			t.Errorf("size %d: %v, want the body's error", size, err)
		}
	}
	s.eventually("only the old file is there", func() bool { return s.sh("ls -A /tmp/d; cat /tmp/d/f") == "f\nold" })
}

func TestFullDisk(t *testing.T) {
	s := startSandbox(t, options{disk: "32m"})
	big := int64(64 << 20)
	for _, size := range []int64{-1, big} {
		err := s.client.Upload(t.Context(), s.target,
			agentapi.UploadRequest{Path: "/var/big", Body: &failingReader{int(big), io.EOF}, Size: size})
		wantFault(t, err, fault.NoSpace, fault.CodeDiskFull)
	}
	if got := s.sh("ls -A /var"); got != "" {
		t.Errorf("left behind: %q", got)
	}
	// On a completely full disk everything that needs no space still works.
	res := s.exec(agentapi.ExecuteRequest{Command: "dd if=/dev/zero of=/var/fill bs=1M; echo status $?"})
	if !strings.Contains(string(res.Stdout), "status 1") {
		t.Errorf("filling: %q %q", res.Stdout, res.Stderr)
	}
	s.exec(agentapi.ExecuteRequest{
		Command: "while echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx >>/var/rest; do :; done 2>/dev/null",
		Timeout: 5 * time.Second,
	})
	wantFault(t, s.upload("/var/more", strings.Repeat("x", 1<<20)), fault.NoSpace, fault.CodeDiskFull)
	if got := s.sh("echo alive"); got != "alive" {
		t.Error(got)
	}
	if err := s.client.Remove(t.Context(), s.target, "/var/fill", "", false); err != nil {
		t.Error(err)
	}
	if err := s.upload("/var/more", "fits"); err != nil {
		t.Errorf("after making room: %v", err)
	}
}

func TestRemoveAndList(t *testing.T) {
	s := startSandbox(t, options{})
	s.sh("mkdir -p /tmp/t/b/c; echo 12345 >/tmp/t/a; chown user:extra /tmp/t/a; chmod 4750 /tmp/t/a; " +
		"ln -s /nowhere /tmp/t/z; echo x >/tmp/t/b/c/d; mkfifo /tmp/t/p")
	got, err := s.list("/tmp/t", "", 3)
	if err != nil {
		t.Fatal(err)
	}
	want := []agentapi.Entry{
		{Name: "a", Path: "/tmp/t/a", Type: "file", Size: 6, Mode: 0o4750, Owner: "user", Group: "extra"},
		{Name: "b", Path: "/tmp/t/b", Type: "directory", Mode: 0o755, Owner: "root", Group: "root"},
		{Name: "c", Path: "/tmp/t/b/c", Type: "directory", Mode: 0o755, Owner: "root", Group: "root"},
		{Name: "d", Path: "/tmp/t/b/c/d", Type: "file", Size: 2, Mode: 0o644, Owner: "root", Group: "root"},
		{Name: "p", Path: "/tmp/t/p", Type: "other", Mode: 0o644, Owner: "root", Group: "root"},
		{Name: "z", Path: "/tmp/t/z", Type: "symlink", Mode: 0o777, Owner: "root", Group: "root", SymlinkTarget: "/nowhere"},
	}
	for i := range got {
		if time.Since(got[i].ModifiedAt).Abs() > time.Minute {
			t.Errorf("%s was modified at %s", got[i].Path, got[i].ModifiedAt)
		}
		if got[i].Type == "directory" || got[i].Type == "symlink" {
			got[i].Size = 0 // depends on the file system
		}
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(agentapi.Entry{}, "ModifiedAt")); diff != "" {
		t.Errorf("listing (-want +got):\n%s", diff)
	}
	if one, err := s.list("/tmp/t", "", 1); err != nil || len(one) != 4 {
		t.Errorf("one level: %d entries, %v", len(one), err)
	}
	_, err = s.list("/tmp/t/a", "", 1)
	wantFault(t, err, fault.Invalid, fault.CodePathNotDirectory)
	_, err = s.list("/nosuch", "", 1)
	wantFault(t, err, fault.NotFound, fault.CodeFileNotFound)

	remove := func(path string, recursive bool) error {
		return s.client.Remove(t.Context(), s.target, path, "", recursive)
	}
	wantFault(t, remove("/tmp/t/b", false), fault.Invalid, fault.CodeDirectoryNotEmpty)
	wantFault(t, remove("/tmp/t/nosuch", false), fault.NotFound, fault.CodeFileNotFound)
	wantFault(t, remove("/tmp/t/nosuch", true), fault.NotFound, fault.CodeFileNotFound)
	wantFault(t, remove("/", true), fault.Invalid, fault.CodeInvalidPath)
	for _, path := range []string{"/tmp/t/a", "/tmp/t/z", "/tmp/t/p", "/tmp/t/b/c/d", "/tmp/t/b/c"} {
		if err := remove(path, false); err != nil {
			t.Errorf("removing %s: %v", path, err)
		}
	}
	if err := remove("/tmp/t", true); err != nil {
		t.Error(err)
	}
	s.sh("test ! -e /tmp/t")
}

// request sends a plain HTTP request to the agent, as E2B's clients do.
func (s *sandbox) request(method, target string, header http.Header, body io.Reader) (int, http.Header, string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+s.addr+target, body)
	if err != nil {
		s.t.Fatal(err)
	}
	for k, v := range header {
		req.Header[k] = v
	}
	resp, err := s.transport.RoundTrip(req)
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, target, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, target, err)
	}
	return resp.StatusCode, resp.Header, strings.TrimSpace(string(text))
}

func TestE2BFiles(t *testing.T) {
	s := startSandbox(t, options{})
	with := func(more ...string) http.Header {
		h := http.Header{}
		for i := 0; i < len(more); i += 2 {
			h.Set(more[i], more[i+1])
		}
		return h
	}
	expect := func(what string, status int, body string, wantStatus int, wantBody string) {
		t.Helper()
		if status != wantStatus || body != wantBody {
			t.Errorf("%s: %d %s\nwant %d %s", what, status, body, wantStatus, wantBody)
		}
	}
	var form bytes.Buffer
	mw := multipart.NewWriter(&form)
	for _, name := range []string{"dir/one.txt", "/tmp/two.txt"} {
		h := textproto.MIMEHeader{}
		h.Set("Content-Disposition", `form-data; name="file"; filename="`+name+`"`)
		part, _ := mw.CreatePart(h)
		fmt.Fprint(part, "content of "+name)
	}
	mw.Close()
	status, _, body := s.request("POST", "/files?username=user", with("Content-Type", mw.FormDataContentType()), &form)
	expect("several files", status, body, 200, `[{"name":"one.txt","path":"/home/user/dir/one.txt","type":"file"},`+
		`{"name":"two.txt","path":"/tmp/two.txt","type":"file"}]`)
	got := s.sh("cat /home/user/dir/one.txt; stat -c ' %U %a' /home/user/dir /home/user/dir/one.txt")
	if got != "content of dir/one.txt user 755\n user 644" {
		t.Errorf("on disk: %q", got)
	}

	status, _, body = s.request("POST", "/files?username=user&path=meta",
		with("Content-Type", "application/octet-stream", "X-Metadata-Some-Key", "a value"), strings.NewReader("x"))
	expect("with metadata", status, body, 200,
		`[{"name":"meta","path":"/home/user/meta","type":"file","metadata":{"some-key":"a value"}}]`)
	var stat struct {
		Entry struct {
			Metadata    map[string]string
			Permissions string
			Mode        int
		}
	}
	if _, err := s.rpc("/filesystem.Filesystem/Stat", "user", map[string]any{"path": "~/meta"}, &stat); err != nil ||
		stat.Entry.Metadata["some-key"] != "a value" || stat.Entry.Permissions != "-rw-r--r--" || stat.Entry.Mode != 420 {
		t.Errorf("stat: %+v, %v", stat, err)
	}
	s.request("POST", "/files?username=user&path=meta", with("Content-Type", "application/octet-stream"),
		strings.NewReader("y"))
	stat.Entry.Metadata = nil
	if _, err := s.rpc("/filesystem.Filesystem/Stat", "user", map[string]any{"path": "meta"}, &stat); err != nil ||
		stat.Entry.Metadata != nil {
		t.Errorf("old metadata stays: %+v, %v", stat, err)
	}

	status, _, body = s.request("GET", "/files?path=nosuch&username=user", nil, nil)
	expect("missing", status, body, 404, `{"code":404,"message":"path \"/home/user/nosuch\" does not exist"}`)
	status, _, body = s.request("GET", "/files?path=x&username=nosuch", nil, nil)
	expect("unknown user", status, body, 401, `{"code":401,"message":"unknown user \"nosuch\""}`)
	status, _, _ = s.request("POST", "/files?path=x", with("Content-Type", "text/plain"), strings.NewReader("x"))
	expect("other content type", status, "", 400, "")
	status, h, body := s.request("GET", "/files?path=/home/user/dir/one.txt", nil, nil)
	expect("read", status, body, 200, "content of dir/one.txt")
	if h.Get("Content-Length") != "22" {
		t.Errorf("headers %v", h)
	}

	status, _, body = s.request("POST", "/files/compose", with("Content-Type", "application/json"),
		strings.NewReader(`{"source_paths":["/home/user/dir/one.txt","/tmp/two.txt"],`+
			`"destination":"both","username":"user"}`))
	expect("compose", status, body, 200, `{"name":"both","path":"/home/user/both","type":"file"}`)
	got = s.sh("cat /home/user/both; ls /tmp /home/user/dir")
	if !strings.HasPrefix(got, "content of dir/one.txtcontent of /tmp/two.txt") || strings.Contains(got, "one.txt\n") {
		t.Errorf("composed: %q", got)
	}

	status, _, body = s.request("GET", "/envs", nil, nil)
	expect("envs", status, body, 200, `{"FROM_SANDBOX":"yes"}`)
	if status, _, body = s.request("GET", "/metrics", nil, nil); status != 200 ||
		!strings.Contains(body, `"mem_total":`) || strings.Contains(body, `"mem_total":0,`) ||
		strings.Contains(body, `"disk_total":0`) {
		t.Errorf("metrics: %d %s", status, body)
	}
	if status, _, _ = s.request("GET", "/health", nil, nil); status != 204 {
		t.Errorf("health: %d", status)
	}
}

func TestInit(t *testing.T) {
	s := startSandbox(t, options{noInit: true})
	s.sh("true") // before there is a key, the agent takes all calls
	first := agentapi.InitRequest{AccessToken: "one", DefaultUser: "user", DefaultWorkdir: "/tmp",
		Env: map[string]string{"A": "1"}, Hostname: "newname", Nameservers: []string{"10.9.8.7"}}
	if err := s.client.Init(t.Context(), s.target, first); err != nil {
		t.Fatal(err)
	}
	plain := s.with("")
	if err := plain.client.Init(t.Context(), s.target, agentapi.InitRequest{AccessToken: "two"}); err == nil {
		t.Error("a second init without the key was accepted")
	}
	// Call on the connection that brought the key and on one that proves that it knows it.
	for _, s := range []*sandbox{s, s.with("one")} {
		got := s.sh("id -un; pwd; echo $A; hostname; cat /etc/resolv.conf")
		if got != "user\n/tmp\n1\nnewname\nnameserver 10.9.8.7" {
			t.Errorf("got %q", got)
		}
	}
	old, again := s.with("one"), s.with("one")
	old.sh("true")
	if err := again.client.Init(t.Context(), s.target,
		agentapi.InitRequest{AccessToken: "two", Env: map[string]string{"B": "2"}}); err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]*sandbox{
		"a connection under the old key": old, "a new one with the old key": s.with("one"),
		"one without a key": s.with(""),
	} {
		if _, err := s.client.Execute(t.Context(), s.target, agentapi.ExecuteRequest{Command: "true"}); err == nil {
			t.Errorf("%s still works", name)
		}
	}
	for _, s := range []*sandbox{again, s.with("two")} {
		if got := s.sh("id -un; echo $A$B"); got != "user\n2" {
			t.Errorf("got %q", got)
		}
	}
}

// BenchmarkFiles moves 100 MB in each direction.
func BenchmarkFiles(b *testing.B) {
	s := startSandbox(b, options{})
	const size = 100_000_000
	b.Run("upload", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			if err := s.client.Upload(b.Context(), s.target,
				agentapi.UploadRequest{Path: "/var/big", Body: &failingReader{size, io.EOF}, Size: size}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("download", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			d, err := s.client.Download(b.Context(), s.target, "/var/big", "", "")
			if err != nil {
				b.Fatal(err)
			}
			n, err := io.Copy(io.Discard, d.Body)
			d.Body.Close()
			if n != size || err != nil {
				b.Fatal(n, err)
			}
		}
	})
}

// list returns the entries of a listing.
func (s *sandbox) list(path, user string, depth int) (entries []agentapi.Entry, err error) {
	err = s.client.List(s.t.Context(), s.target, path, user, depth, func(e agentapi.Entry) error {
		entries = append(entries, e)
		return nil
	})
	return entries, err
}
