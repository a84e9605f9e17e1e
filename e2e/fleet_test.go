package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	cay "github.com/cayhq/cay/sdk/go"
)

// fleetOfTwo are two servers with the same records and bucket.
type fleetOfTwo struct {
	t    *testing.T
	a, b *server
}

// newFleet starts two servers with the settings env, of which a is the first, with the template python ready.
func newFleet(t *testing.T, env ...string) *fleetOfTwo {
	dir := t.TempDir()
	secret, bucket := filepath.Join(dir, "secret"), filepath.Join(dir, "bucket")
	if err := os.WriteFile(secret, []byte(strings.Repeat("0123456789abcdef", 4)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(bucket, 0o700); err != nil {
		t.Fatal(err)
	}
	database := newDatabase(t)
	member := func(name string) *server {
		return newServer(t, append(env, "CAY_NODE_NAME="+name, "CAY_NODE_LABELS=host="+name, "CAY_STORE_URL="+database,
			"CAY_FILES_URL=file://"+bucket, "CAY_FLEET_LISTEN="+freeAddress(t), "CAY_FLEET_SECRET_FILE="+secret)...)
	}
	f := &fleetOfTwo{t: t, a: member("host-a"), b: member("host-b")}
	f.a.start()
	if err := os.MkdirAll(f.b.dataDir, 0o700); err != nil {
		t.Fatal(err)
	}
	// Only the first server of a cluster writes the first key.
	if err := os.WriteFile(filepath.Join(f.b.dataDir, "api-key"), []byte(f.a.key), 0o600); err != nil {
		t.Fatal(err)
	}
	f.b.start()
	f.b.needTemplate("python")
	return f
}

// on makes a sandbox through a server, which the named node must take.
func (f *fleetOfTwo) on(node string, through *server, more object) string {
	f.t.Helper()
	other := map[string]string{"host-a": "host-b", "host-b": "host-a"}[node]
	if _, err := through.api().CordonNode(f.t.Context(), other); err != nil {
		f.t.Fatal(err)
	}
	request := requestOf[cay.CreateSandboxRequest](f.t, object{"template": "python", "timeout": "10m"}, more)
	id := ""
	through.becomes(node+" takes a sandbox", func() bool {
		sandbox, err := through.api().CreateSandbox(f.t.Context(), request, cay.CreateOptions{})
		switch {
		case isRefused(err, 503, "image_unavailable"), // a new image comes to the bucket some seconds after its build
			isRefused(err, 503, "no_capacity"), isRefused(err, 503, "node_unreachable"): // not linked yet
			return false
		case err != nil:
			f.t.Fatal(err)
		}
		id = sandbox.ID
		return true
	})
	f.has(node, id)
	if _, err := through.api().UncordonNode(f.t.Context(), other); err != nil {
		f.t.Fatal(err)
	}
	return id
}

// has checks that a sandbox is on the named node.
func (f *fleetOfTwo) has(node, id string) {
	f.t.Helper()
	if s := map[string]*server{"host-a": f.a, "host-b": f.b}[node]; len(s.onHost(id)) == 0 {
		f.t.Errorf("the sandbox %s is not on %s", id, node)
	}
}

func (f *fleetOfTwo) sandboxes(node string) int {
	f.t.Helper()
	n, err := f.b.api().GetNode(f.t.Context(), node)
	if err != nil {
		f.t.Fatal(err)
	}
	return n.Sandboxes
}

// linked waits until each server can reach the other one.
func (f *fleetOfTwo) linked(sandboxes map[*server]string) {
	f.t.Helper()
	for through, id := range sandboxes {
		through.becomes("link to the node of "+id, func() bool {
			_, err := through.api().Execute(f.t.Context(), id, cay.ExecuteRequest{Command: new("true")})
			return err == nil
		})
	}
}

// TestFleet uses two machines as one: each server answers for what both have, a create goes to a machine that takes it,
// and a server that is lost or killed takes nothing of the other one with it.
func TestFleet(t *testing.T) {
	onOneStore(t) // it always uses PostgreSQL
	t.Parallel()  // it has its own servers
	f := newFleet(t)
	lasting := object{"timeout": "1h"}
	onA, onB := f.a.create(lasting), ""
	if f.sandboxes("host-a") == 0 {
		onA, onB = "", onA
	}
	if onA == "" {
		onA = f.on("host-a", f.b, lasting)
	}
	if onB == "" {
		onB = f.on("host-b", f.a, lasting)
	}
	f.linked(map[*server]string{f.a: onB, f.b: onA})
	t.Run("calls", func(t *testing.T) { f.calls(t, onB) })
	t.Run("persistent", f.persistent)
	t.Run("E2B", f.e2b)
	t.Run("snapshots", f.snapshots)
	t.Run("builds", f.builds)
	t.Run("lost", f.lost)
	onB = f.on("host-b", f.a, lasting) // the one before was lost
	t.Run("killed", func(t *testing.T) { f.killed(t, onA, onB) })
}

// calls makes calls about b's sandbox through a.
func (f *fleetOfTwo) calls(t *testing.T, id string) {
	c := f.a.api()
	if got := f.a.want(id, "hostname; id -un"); got != f.b.want(id, "hostname; id -un") {
		t.Errorf("the servers answer differently: %q", got)
	}
	var streamed strings.Builder
	count := cay.ExecuteRequest{Command: new("for i in 1 2 3; do echo $i; sleep 0.1; done")}
	_, err := c.ExecuteStream(t.Context(), id, count, func(o cay.Output) error { streamed.Write(o.Data); return nil })
	if err != nil || streamed.String() != "1\n2\n3\n" {
		t.Errorf("a stream: %q, %v", streamed.String(), err)
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	if err := c.WriteFile(t.Context(), id, "/tmp/data", bytes.NewReader(data), cay.WriteFileOptions{}); err != nil {
		t.Error(err)
	}
	file, err := c.ReadFile(t.Context(), id, "/tmp/data", cay.ReadFileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	back, err := io.ReadAll(file)
	if err := file.Close(); err != nil {
		t.Error(err)
	}
	if err != nil || !bytes.Equal(back, data) {
		t.Errorf("a file of %d bytes came back as %d, %v", len(data), len(back), err)
	}
	f.a.want(id, "cd /tmp && nohup python3 -m http.server 8000 >/dev/null 2>&1 & "+
		"until curl -sf http://127.0.0.1:8000/ >/dev/null || wget -qO- http://127.0.0.1:8000/ >/dev/null; do sleep 0.1; done")
	status, body := f.a.call("GET", "/v1/sandboxes/"+id+"/ports/8000/data", nil)
	if status != 200 || !bytes.Equal(body, data) {
		t.Errorf("a port: %d with %d bytes", status, len(body))
	}
	conn, err := c.DialPort(t.Context(), id, 8000)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "HEAD / HTTP/1.0\r\n\r\n")
	if answer, err := io.ReadAll(conn); err != nil || !bytes.HasPrefix(answer, []byte("HTTP/1.0 200")) {
		t.Errorf("a tunnel: %.100q, %v", answer, err)
	}
	ids := map[string]bool{}
	for sandbox, err := range c.Sandboxes(t.Context(), cay.ListSandboxesOptions{}) {
		if err != nil {
			t.Fatal(err)
		}
		ids[sandbox.ID] = true
	}
	if !ids[id] || len(ids) != 2 {
		t.Errorf("a lists %v", ids)
	}
}

// persistent suspends and wakes a sandbox of each machine through the other one.
func (f *fleetOfTwo) persistent(t *testing.T) {
	for node, through := range map[string]*server{"host-a": f.b, "host-b": f.a} {
		id := f.on(node, through, object{"mode": "persistent", "timeout": nil, "recovery_interval": "0"})
		const look = "cat /proc/sys/kernel/random/boot_id"
		before := through.want(id, look)
		if s, err := through.api().Suspend(t.Context(), id); err != nil || s.Status != cay.SandboxStatusSuspended {
			t.Errorf("suspending a sandbox of %s: %s, %v", node, jsonOf(s), err)
		}
		if after := through.want(id, look); after != before { // wakes it
			t.Errorf("a sandbox of %s was %s and is %s", node, before, after)
		}
		through.destroy(id)
	}
}

// e2b uses a sandbox of each machine through the other one, as E2B's clients do.
func (f *fleetOfTwo) e2b(t *testing.T) {
	key := f.a.e2bKey()
	for node, through := range map[string]*server{"host-a": f.b, "host-b": f.a} {
		id := strings.TrimPrefix(f.on(node, through, object{"mode": "persistent", "timeout": nil}), "sbx_")
		connect := func() e2bSandbox {
			status, body := through.e2bCall(key, "POST", "/v2/sandboxes/"+id+"/connect", `{"timeout":600}`)
			if status != 200 && status != 201 {
				t.Fatalf("connecting to a sandbox of %s: %d %s", node, status, body)
			}
			return e2bSandbox{through, id, text(body, "envdAccessToken")}
		}
		sandbox := connect()
		const out = "aGkK" // "hi\n"
		if got := sandbox.run("echo hi"); !strings.Contains(got, out) {
			t.Errorf("a command in a sandbox of %s: %q", node, got)
		}
		if status, body := through.e2bCall(key, "POST", "/sandboxes/"+id+"/pause", ""); status != 204 {
			t.Errorf("pausing a sandbox of %s: %d %s", node, status, body)
		}
		sandbox = connect()
		if got := sandbox.run("echo hi"); !strings.Contains(got, out) {
			t.Errorf("a command after the pause of a sandbox of %s: %q", node, got)
		}
		sandbox.token = "wrong"
		resp, err := sandbox.start(t.Context(), http.DefaultClient, "true")
		if err != nil {
			t.Fatal(err)
		}
		if err := resp.Body.Close(); err != nil || resp.StatusCode != 401 {
			t.Errorf("with a wrong token: %d, %v", resp.StatusCode, err)
		}
		path := "/sandboxes/metrics?sandbox_ids=" + id
		through.becomes("samples of another server's sandbox are read", func() bool {
			status, body := through.e2bCall(key, "GET", path, "")
			return status == 200 && strings.Contains(string(body), "cpuUsedPct")
		})
		if status, body := through.e2bCall(key, "DELETE", "/sandboxes/"+id, ""); status != 204 {
			t.Errorf("killing a sandbox of %s: %d %s", node, status, body)
		}
	}
}

// snapshots makes sandboxes of a snapshot, which the machine that has it must make.
func (f *fleetOfTwo) snapshots(t *testing.T) {
	id := f.on("host-b", f.a, nil)
	f.a.want(id, "echo kept > /tmp/kept")
	snapshot, err := f.a.api().CreateSnapshot(t.Context(), id, "of-b")
	if err != nil {
		t.Fatal(err)
	}
	request := cay.CreateSandboxRequest{Snapshot: snapshot.ID}
	for _, through := range []*server{f.a, f.b, f.a} {
		made, err := through.api().CreateSandbox(t.Context(), request, cay.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		f.has("host-b", made.ID)
		if got := f.a.want(made.ID, "cat /tmp/kept"); got != "kept" {
			t.Errorf("a sandbox of the snapshot has %q", got)
		}
		f.a.destroy(made.ID)
	}
	f.b.destroy(id)
	if err := f.a.api().DeleteSnapshot(t.Context(), "of-b"); err != nil {
		t.Error(err)
	}
}

// builds builds a template through each server, and makes a sandbox of it on the other machine.
func (f *fleetOfTwo) builds(t *testing.T) {
	for node, through := range map[string]*server{"host-a": f.b, "host-b": f.a} {
		name := "made-for-" + node
		through.beginBuild(object{"name": name, "dockerfile": "Dockerfile"},
			tarOf(t, map[string]string{"Dockerfile": "FROM python\nRUN echo " + name + " > /made\n"}))
		through.needTemplate(name)
		id := f.on(node, through, object{"template": name})
		if got := through.want(id, "cat /made"); got != name {
			t.Errorf("a sandbox of %s has %q", name, got)
		}
		through.destroy(id)
	}
}

// killed kills one server after the other.
func (f *fleetOfTwo) killed(t *testing.T, onA, onB string) {
	const look = "cat /proc/sys/kernel/random/boot_id"
	before := f.a.want(onB, look)
	f.b.stop(syscall.SIGKILL)
	_, err := f.a.api().Execute(t.Context(), onB, cay.ExecuteRequest{Command: new("true")})
	if !isRefused(err, 503, "node_unreachable") {
		t.Errorf("a call about a sandbox of a dead server: %v", err)
	}
	if s, err := f.a.api().GetSandbox(t.Context(), onB); err != nil || s.Status != cay.SandboxStatusRunning {
		t.Errorf("the sandbox of a dead server is %s, %v", jsonOf(s), err)
	}
	for range 4 { // some are offered to the dead server first
		f.a.destroy(f.a.create(nil))
	}
	f.b.start()
	f.linked(map[*server]string{f.a: onB, f.b: onA})
	if after := f.a.want(onB, look); after != before {
		t.Errorf("the sandbox was %s before its server was killed, and is %s", before, after)
	}

	before = f.b.want(onA, look)
	f.a.stop(syscall.SIGKILL) // it built the templates
	f.b.alive(onB)
	files := tarOf(t, map[string]string{"Dockerfile": "FROM python\nRUN true\n"})
	f.b.becomes("it builds", func() bool {
		request := cay.CreateTemplateRequest{Name: "after", Dockerfile: new("Dockerfile")}
		_, err := f.b.api().CreateTemplate(t.Context(), request, bytes.NewReader(files))
		return err == nil || isRefused(err, 409, "template_exists")
	})
	f.b.needTemplate("after")
	f.a.start()
	f.linked(map[*server]string{f.a: onB, f.b: onA})
	if after := f.b.want(onA, look); after != before {
		t.Errorf("the sandbox was %s before its server was killed, and is %s", before, after)
	}
	f.b.destroy(onA)
	f.a.destroy(onB)
}
