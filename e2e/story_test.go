package e2e

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/cayhq/cay/internal/caytest"
	cay "github.com/cayhq/cay/sdk/go"
)

// groupsOnHost lists the sandboxes that have a control group.
func (s *server) groupsOnHost() []string {
	s.t.Helper()
	found := map[string]bool{}
	for _, pattern := range []string{"/sys/fs/cgroup/memory/cay-%s/sbx_*", "/sys/fs/cgroup/cay-%s/sbx_*"} {
		paths, err := filepath.Glob(fmt.Sprintf(pattern, s.instance()))
		if err != nil {
			s.t.Fatal(err)
		}
		for _, p := range paths {
			found[filepath.Base(p)] = true
		}
	}
	var ids []string
	for id := range found {
		ids = append(ids, id)
	}
	return ids
}

// TestStory runs the commands of the README: the first one, and those that follow.
func TestStory(t *testing.T) {
	s := shared(t)
	out, errOut, code := s.cli("", "run", "-t", "python", "--", "python3", "-c", "print(6*7)")
	if out != "42\n" || code != 0 {
		t.Fatalf("got %q, %q, exit code %d", out, errOut, code)
	}
	out, _, code = s.cli("hello", "run", "-t", "python", "--", "sh", "-c", "cat; echo oops >&2; exit 3")
	if out != "hello" || code != 3 {
		t.Errorf("got %q, exit code %d", out, code)
	}
	if n := len(s.sandboxes("running")); n != 0 {
		t.Errorf("cay run left %d sandboxes", n)
	}

	out, errOut, code = s.cli("", "sandbox", "create", "-t", "python", "--timeout", "10m", "-e", "A=b", "--metadata",
		"k=v", "--json")
	id := text([]byte(out), "id")
	if code != 0 || id == "" {
		t.Fatalf("create: %q %q %d", out, errOut, code)
	}
	dir := t.TempDir()
	local := filepath.Join(dir, "local")
	data := make([]byte, 1<<20)
	rand.Read(data)
	if err := os.WriteFile(local, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		args []string
		want string
	}{
		{[]string{"sandbox", "exec", id, "--", "sh", "-c", "echo $A; id -un"}, "b\nroot\n"},
		{[]string{"sandbox", "upload", id, local, "/tmp/there"}, ""},
		{[]string{"sandbox", "download", id, "/tmp/there", filepath.Join(dir, "back")}, ""},
	} {
		out, errOut, code := s.cli("", step.args...)
		if code != 0 || step.want != "" && out != step.want {
			t.Errorf("%v: %q %q %d", step.args, out, errOut, code)
		}
	}
	back, err := os.ReadFile(filepath.Join(dir, "back"))
	if err != nil || !bytes.Equal(back, data) {
		t.Errorf("the download differs from the upload: %d bytes, %v", len(back), err)
	}
	for _, args := range [][]string{
		{"sandbox", "list"}, {"sandbox", "status", id}, {"sandbox", "ls", id, "/tmp"}, {"sandbox", "events", id},
		{"sandbox", "keepalive", id, "--timeout", "5m"}, {"templates", "list"}, {"templates", "show", "python"},
		{"templates", "logs", "python"}, {"keys", "list"}, {"orgs", "list"}, {"version"},
	} {
		if out, errOut, code := s.cli("", args...); code != 0 || out == "" {
			t.Errorf("%v: %q %q %d", args, out, errOut, code)
		}
	}
	if _, errOut, code := s.cli("", "sandbox", "destroy", id); code != 0 {
		t.Errorf("destroy: %q %d", errOut, code)
	}
	if _, errOut, code := s.cli("", "sandbox", "exec", id, "--", "true"); code != 125 || errOut == "" {
		t.Errorf("exec in a destroyed sandbox: %q %d", errOut, code)
	}
	s.destroy(id) // this waits for the first destroy, because other tests count what is on the host
}

// TestStoryInGo builds and runs the first program of docs/go.md.
func TestStoryInGo(t *testing.T) {
	compiler := caytest.RequireProgram(t, "go")
	s := shared(t)
	document, err := os.ReadFile("../docs/go.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := bytes.Cut(document, []byte("```go\n"))
	program, _, found := bytes.Cut(rest, []byte("```"))
	if !found {
		t.Fatal("docs/go.md has no program")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "main.go"), program, 0o600); err != nil {
		t.Fatal(err)
	}
	hello := filepath.Join(dir, "hello")
	cmd := exec.CommandContext(t.Context(), compiler, "build", "-o", hello, filepath.Join(dir, "main.go"))
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building the program: %v: %s", err, out)
	}
	before := len(s.sandboxes("running"))
	cmd = exec.CommandContext(t.Context(), hello)
	cmd.Env = append(os.Environ(), "CAY_API_URL="+s.url, "CAY_API_KEY="+s.key)
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "42\n" {
		t.Errorf("the program printed %q: %v", out, err)
	}
	if n := len(s.sandboxes("running")); n != before {
		t.Errorf("the program left %d sandboxes", n-before)
	}
}

// createOnceThereIsRoom creates a sandbox, again while a slow machine has more to start than it can.
func (s *server) createOnceThereIsRoom(r cay.CreateSandboxRequest) (sandbox *cay.Sandbox, err error) {
	s.t.Helper()
	for range 3 {
		if sandbox, err = s.api().CreateSandbox(s.t.Context(), r, cay.CreateOptions{}); !isRefused(err, 503, "no_capacity") {
			break
		}
	}
	return sandbox, err
}

// TestThirtyAtOnce creates and destroys thirty sandboxes concurrently.
func TestThirtyAtOnce(t *testing.T) {
	s := shared(t)
	before := len(s.groupsOnHost())
	var wg sync.WaitGroup
	for i := range 30 {
		wg.Go(func() {
			sandbox, err := s.createOnceThereIsRoom(cay.CreateSandboxRequest{Template: "python"})
			if err != nil {
				t.Errorf("create: %v", err)
				return
			}
			id := sandbox.ID
			if got := s.want(id, fmt.Sprintf("echo %d > /tmp/n; cat /tmp/n", i)); got != fmt.Sprint(i) {
				t.Errorf("sandbox %d says %q", i, got)
			}
			s.destroy(id)
		})
	}
	wg.Wait()
	// Sandboxes of the test before may have been on their way out.
	if after := len(s.groupsOnHost()); after > before {
		t.Errorf("%d sandboxes are left on the host", after-before)
	}
}

// TestTimeIsUp checks that an ephemeral sandbox is destroyed when its time is up.
func TestTimeIsUp(t *testing.T) {
	s := shared(t)
	id := s.create(object{"timeout": "3s"})
	s.alive(id)
	if reason := s.waitState(id, "destroyed"); reason != "expired" {
		t.Errorf("destroyed with reason %q", reason)
	}
	sandbox := s.get(id)
	if sandbox.ExpiresAt == nil || sandbox.DestroyedAt == nil || sandbox.DestroyedAt.Before(*sandbox.ExpiresAt) {
		t.Errorf("expires %v, destroyed %v", sandbox.ExpiresAt, sandbox.DestroyedAt)
	}
	if _, err := s.api().Execute(t.Context(), id, cay.ExecuteRequest{Command: new("true")}); !isRefused(err, 409,
		"sandbox_not_running") {
		t.Errorf("execute: %v", err)
	}
}

// TestSizesAreLimits reads the limits that the host enforces on sandboxes of two sizes.
func TestSizesAreLimits(t *testing.T) {
	s := shared(t)
	for size, want := range map[string]map[string]string{
		// Memory and tasks are those of the size plus those of the sandbox's kernel.
		"shared-cpu-1x":  {"cpu.shares": "1024", "cpu.cfs_quota_us": "-1", "memory.limit_in_bytes": fmt.Sprint((512 + 64 + 64) << 20), "pids.max": fmt.Sprint(256*12 + 1024)},
		"performance-2x": {"cpu.shares": "2048", "cpu.cfs_quota_us": "200000", "memory.limit_in_bytes": fmt.Sprint((4096 + 64 + 64) << 20), "pids.max": fmt.Sprint(1024*12 + 1024)},
	} {
		id := s.create(object{"size": size})
		for file, value := range want {
			controller, _, _ := strings.Cut(file, ".")
			path := filepath.Join("/sys/fs/cgroup", controller, "cay-"+s.instance(), id, file)
			if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
				path, value = s.unified(id, file, value)
			}
			got, err := os.ReadFile(path)
			if err != nil || strings.TrimSpace(string(got)) != value {
				t.Errorf("%s: %s is %q, %v, want %s", size, file, got, err, value)
			}
		}
		s.destroy(id)
	}
}

// unified returns the cgroup v2 file of a v1 file, and the value as v2 writes it.
func (s *server) unified(id, file, value string) (string, string) {
	dir := filepath.Join("/sys/fs/cgroup", "cay-"+s.instance(), id)
	switch file {
	case "cpu.shares": // 1024 there are 100 here
		var shares int
		_, _ = fmt.Sscan(value, &shares) // the table above has a number
		return filepath.Join(dir, "cpu.weight"), fmt.Sprint(shares * 100 / 1024)
	case "cpu.cfs_quota_us":
		return filepath.Join(dir, "cpu.max"), strings.Replace(value, "-1", "max", 1) + " 100000"
	case "memory.limit_in_bytes":
		return filepath.Join(dir, "memory.max"), value
	}
	return filepath.Join(dir, file), value
}

// TestLostSandbox kills a sentry from outside. The sandbox is destroyed as lost.
func TestLostSandbox(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	s.killSentry(id)
	if reason := s.waitState(id, "destroyed"); reason != "lost" {
		t.Errorf("destroyed with reason %q", reason)
	}
}

// TestFiles moves large files and files with unusual names.
func TestFiles(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	data := make([]byte, 100_000_000) // the largest size that is allowed
	rand.Read(data[:1<<20])
	path := "/v1/sandboxes/" + id + "/files?path="
	if code, body := s.call("PUT", path+"/srv/new/dir/big", bytes.NewReader(data)); code != 204 {
		t.Fatalf("upload: %d %s", code, body)
	}
	if code, body := s.call("PUT", path+"/srv/too-big", bytes.NewReader(append(data, 0))); code != 400 {
		t.Errorf("upload with one byte too many: %d %s", code, body)
	}
	if code, body := s.call("GET", path+"/srv/new/dir/big", nil); code != 200 || !bytes.Equal(body, data) {
		t.Errorf("download: %d, %d bytes", code, len(body))
	}
	if code, body := s.part(path+"/srv/new/dir/big", "bytes=10-19"); code != 206 || !bytes.Equal(body, data[10:20]) {
		t.Errorf("range: %d %x", code, body)
	}
	if code, body := s.call("PUT", path+"/home/user/mine&mode=0640&owner=user", strings.NewReader("x")); code != 204 {
		t.Errorf("upload with mode and owner: %d %s", code, body)
	}
	if got := s.want(id, "stat -c '%a %U' /home/user/mine"); got != "640 user" {
		t.Errorf("stat says %q", got)
	}
	if code, body := s.call("DELETE", path+"/srv/new&recursive=true", nil); code != 204 {
		t.Errorf("delete: %d %s", code, body)
	}
	for bad, want := range map[string]int{"": 400, "relative": 400, "/a/../b": 400, "/tmp": 400, "/nothing/here": 404,
		"/a%00b": 400} {
		if code, body := s.call("GET", path+bad, nil); code != want {
			t.Errorf("GET %q: %d %s, want %d", bad, code, body, want)
		}
	}
	s.cutUpload(path + "/srv/cut")
	// The agent notices a moment after the caller.
	if left := s.want(id,
		"for i in $(seq 100); do n=$(find /srv -type f | wc -l); [ $n = 0 ] && break; sleep 0.1; done; echo $n",
		object{"timeout": "2m"}); left != "0" {
		t.Errorf("%s files are left of an upload that was cut", left)
	}
}

// part downloads a range.
func (s *server) part(path, byteRange string) (int, []byte) {
	s.t.Helper()
	req, err := http.NewRequest("GET", s.url+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+s.key)
	req.Header.Set("Range", byteRange)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	body := new(bytes.Buffer)
	if _, err := body.ReadFrom(resp.Body); err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, body.Bytes()
}

// cutUpload breaks off in the middle of a body.
func (s *server) cutUpload(path string) {
	s.t.Helper()
	req, err := http.NewRequest("PUT", s.url+path, &cutReader{left: 1 << 20})
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+s.key)
	req.ContentLength = 2 << 20
	if resp, err := http.DefaultClient.Do(req); err == nil {
		resp.Body.Close()
		if resp.StatusCode < 400 {
			s.t.Errorf("an upload that was cut answers %d", resp.StatusCode)
		}
	}
}

type cutReader struct{ left int }

func (c *cutReader) Read(p []byte) (int, error) {
	if c.left <= 0 {
		return 0, errors.New("cut on purpose")
	}
	n := min(len(p), c.left)
	c.left -= n
	return n, nil
}

// TestDoctorCleans stops a server without its sandboxes. doctor finds what is left and removes it.
func TestDoctorCleans(t *testing.T) {
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	s.create(nil)
	s.create(nil)
	s.stop(syscall.SIGTERM)
	if n := len(s.groupsOnHost()); n != 2 {
		t.Errorf("SIGTERM left %d sandboxes, want 2", n)
	}
	out, errOut, code := s.cli("", "doctor", "--clean")
	if code != 0 {
		t.Errorf("doctor: %q %q %d", out, errOut, code)
	}
	if n := len(s.groupsOnHost()); n != 0 {
		t.Errorf("doctor left %d sandboxes", n)
	}
	// The next server starts, and reports both sandboxes as lost.
	s.start()
	if n := len(s.sandboxes("running")); n != 0 {
		t.Errorf("%d sandboxes have the status running", n)
	}
}
