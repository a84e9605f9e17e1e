package agent_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/cayhq/cay/internal/agent"
	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/cgroup"
)

// The tests of this package run the real agent as PID 1 in real gVisor.

const testToken = "token-of-the-test"

// sandbox is a gVisor sandbox with the agent in it. It is removed at the test's end.
type sandbox struct {
	t      testing.TB
	addr   string
	client *agentapi.Client
	target agentapi.Target
	// transport sends requests that the client cannot, on connections like the client's.
	transport *http.Transport
	args      []string
	out       string
}

// programsDir is the directory of programs. It is "" until programs is called; processes that fuzzing starts never
// call it.
var programsDir string

// programs builds the programs once for all tests and returns their paths.
var programs = sync.OnceValues(func() (_ map[string]string, err error) {
	if programsDir, err = os.MkdirTemp("", "cay-agent-test-"); err != nil {
		return nil, err
	}
	built := map[string]string{}
	for name, pkg := range map[string]string{"cay-agent": "../../cmd/cay-agent", "probe": "./testdata/probe"} {
		out := filepath.Join(programsDir, name)
		if err := caytest.Build(out, pkg); err != nil {
			return nil, err
		}
		built[name] = out
	}
	return built, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if programsDir != "" {
		os.RemoveAll(programsDir)
	}
	os.Exit(code)
}

func runscPath(t testing.TB) string {
	t.Helper()
	if p := os.Getenv("CAY_RUNSC"); p != "" {
		return caytest.RequireProgram(t, p)
	}
	p, err := filepath.Abs("../../bin/cay-runsc")
	if err != nil {
		t.Fatal(err)
	}
	return caytest.RequireProgram(t, p)
}

// options change the sandbox that startSandbox makes.
type options struct {
	pidsMax int    // 0 means the agent's default
	disk    string // size of the writable layer, such as 64m; "" means no limit
	noInit  bool

	attributes []byte                                   // the image's list of extended attributes
	image      func(t testing.TB, root, busybox string) // changes the image
}

func startSandbox(t testing.TB, o options) *sandbox {
	t.Helper()
	caytest.RequireRoot(t)
	runsc := runscPath(t)
	busybox := caytest.RequireProgram(t, "busybox")
	built, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	rootfs := makeRootfs(t, dir, busybox, built)
	if o.attributes != nil {
		if err := os.WriteFile(filepath.Join(rootfs, agent.AttributesPath), o.attributes, 0o400); err != nil {
			t.Fatal(err)
		}
	}
	if o.image != nil {
		o.image(t, rootfs, busybox)
	}
	id := fmt.Sprintf("cayagent%d", rand.Uint64())
	ns, addr := makeNetwork(t)
	writeSpec(t, dir, rootfs, ns, id, o)

	overlay := "root:memory"
	if o.disk != "" {
		overlay += ",size=" + o.disk
	}
	args := []string{"--root", filepath.Join(dir, "state"), "--network=sandbox", "--platform=systrap", "--allow-suid",
		"--overlay2=" + overlay}
	out, err := os.Create(filepath.Join(dir, "output"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	// The sandbox inherits the limit of CPU time, so that a runaway one ends even if
	// the test has died.
	run := exec.Command(caytest.RequireProgram(t, "prlimit"),
		append(append([]string{"--cpu=" + cpuSeconds, runsc}, args...), "run", "-detach", "-bundle", dir, id)...)
	run.Stdout, run.Stderr = out, out
	t.Cleanup(func() {
		if text, err := exec.Command(runsc, append(args, "delete", "-force", id)...).CombinedOutput(); err != nil {
			t.Errorf("deleting the sandbox: %v: %s", err, text)
		}
		if t.Failed() {
			text, _ := os.ReadFile(out.Name())
			t.Logf("output of the sandbox: %s", text)
		}
	})
	if err := run.Run(); err != nil {
		text, _ := os.ReadFile(out.Name())
		t.Fatalf("starting the sandbox: %v: %s", err, text)
	}
	s := &sandbox{t: t, addr: addr, target: agentapi.Target{SandboxID: id, Run: "1"}, args: args, out: out.Name()}
	s = s.with("")
	s.waitHealthy()
	groups, err := cgroup.Detect()
	if err == nil {
		err = groups.Group("/" + id).Renice() // as the server does
	}
	if err != nil {
		t.Fatal(err)
	}
	if !o.noInit {
		err := s.client.Init(t.Context(), s.target,
			agentapi.InitRequest{AccessToken: testToken, Env: map[string]string{"FROM_SANDBOX": "yes"}})
		if err != nil {
			t.Fatalf("init: %v", err)
		}
		*s = *s.with(testToken)
	}
	return s
}

// with returns the sandbox with a client that has the key; "" means no handshake.
func (s *sandbox) with(key string) *sandbox {
	dial := func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp4", s.addr)
		if err != nil || key == "" {
			return conn, err
		}
		return agentapi.Authenticate(ctx, conn, key)
	}
	c := *s
	c.client = agentapi.NewClient(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) })
	c.transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) },
	}
	s.t.Cleanup(c.client.CloseIdle)
	s.t.Cleanup(c.transport.CloseIdleConnections)
	return &c
}

func (s *sandbox) waitHealthy() {
	s.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		ctx, cancel := context.WithTimeout(s.t.Context(), time.Second)
		err := s.client.Health(ctx, s.target)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the agent does not answer: %v", err)
		}
		time.Sleep(5 * time.Millisecond) // between polls
	}
}

// makeRootfs makes the least root file system that the tests need: busybox, a few users and the probe.
func makeRootfs(t testing.TB, dir, busybox string, built map[string]string) string {
	t.Helper()
	root := filepath.Join(dir, "rootfs")
	for _, d := range []string{"bin", "proc", "dev", "sys", "tmp", "etc", "root", "home/user", "var", ".cay"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Chmod(filepath.Join(root, "tmp"), 0o1777))
	copyFile(t, busybox, filepath.Join(root, "bin/busybox"), 0o755)
	copyFile(t, built["cay-agent"], filepath.Join(root, ".cay/agent"), 0o755)
	copyFile(t, built["probe"], filepath.Join(root, "bin/probe"), 0o755)
	copyFile(t, built["probe"], filepath.Join(root, "bin/suidprobe"), 0o4755)
	must(os.Chmod(filepath.Join(root, "bin/suidprobe"), 0o4755|os.ModeSetuid))
	list, err := exec.Command(busybox, "--list").Output()
	must(err)
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" {
			must(os.Symlink("busybox", filepath.Join(root, "bin", applet)))
		}
	}
	must(os.WriteFile(filepath.Join(root, "etc/passwd"),
		[]byte("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n"+
			"nohome:x:1001:1001::/nonexistent:/bin/sh\n"), 0o644))
	must(os.WriteFile(filepath.Join(root, "etc/group"),
		[]byte("root:x:0:\nuser:x:1000:\nextra:x:2000:user\nmore:x:2001:other,user\nnohome:x:1001:\n"), 0o644))
	must(os.Chown(filepath.Join(root, "home/user"), 1000, 1000))
	return root
}

func copyFile(t testing.TB, from, to string, mode os.FileMode) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, mode); err != nil {
		t.Fatal(err)
	}
}

// makeNetwork makes a network namespace with an eth0 whose address runsc takes.
func makeNetwork(t testing.TB) (ns, agentAddr string) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("making the test's network: %v", err)
		}
	}
	home, err := netns.Get()
	must(err)
	defer home.Close()
	n := rand.Uint32N(1 << 14)
	name := fmt.Sprintf("caytest%d-%d", os.Getpid(), n)
	inside, err := netns.NewNamed(name) // also enters it
	must(err)
	t.Cleanup(func() {
		if err := netns.DeleteNamed(name); err != nil {
			t.Errorf("deleting the test's network: %v", err)
		}
	})
	defer inside.Close()
	must(netns.Set(home))

	host := fmt.Sprintf("cayt%d", n)
	must(netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: host}, PeerName: "eth0", PeerNamespace: netlink.NsFd(inside),
	}))
	t.Cleanup(func() {
		if l, err := netlink.LinkByName(host); err == nil {
			_ = netlink.LinkDel(l) // after an error the link goes with the namespace
		}
	})
	ip := func(last uint32) string {
		return fmt.Sprintf("10.213.%d.%d", n>>6, (n&63)<<2+last)
	}
	addAddress(t, handleHere(t), host, ip(1))
	handle, err := netlink.NewHandleAt(inside)
	must(err)
	defer handle.Close()
	addAddress(t, handle, "eth0", ip(2))
	lo, err := handle.LinkByName("lo")
	must(err)
	must(handle.LinkSetUp(lo))
	must(handle.RouteAdd(&netlink.Route{Gw: net.ParseIP(ip(1))}))
	return filepath.Join("/var/run/netns", name), fmt.Sprintf("%s:%d", ip(2), agentapi.Port)
}

func addAddress(t testing.TB, h *netlink.Handle, link, ip string) {
	t.Helper()
	l, err := h.LinkByName(link)
	if err == nil {
		err = h.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: net.ParseIP(ip).To4(), Mask: net.CIDRMask(30, 32)}})
	}
	if err == nil {
		err = h.LinkSetUp(l)
	}
	if err != nil {
		t.Fatalf("setting up %s: %v", link, err)
	}
}

// dockerCaps lists Docker's default capabilities, which commands must have.
var dockerCaps = []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW",
	"CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL",
	"CAP_AUDIT_WRITE"}

// Limits of a test's sandbox on the host. Without them a fork bomb that the agent
// does not stop would take the machine.
const (
	memoryBytes = 1 << 30
	hostTasks   = 8192
	cpuSeconds  = "300" // of each of the sandbox's processes
)

func writeSpec(t testing.TB, dir, rootfs, ns, id string, o options) {
	t.Helper()
	caps := append([]string{"CAP_SYS_ADMIN"}, dockerCaps...)
	env := []string{"PATH=/bin"}
	if o.pidsMax != 0 {
		env = append(env, fmt.Sprintf("CAY_PIDS_MAX=%d", o.pidsMax))
	}
	mount := func(dst, kind string) map[string]any {
		return map[string]any{"destination": dst, "type": kind, "source": kind}
	}
	spec := map[string]any{
		"ociVersion": "1.1.0",
		"process": map[string]any{
			"args": []string{"/.cay/agent"}, "env": env, "cwd": "/",
			"user":         map[string]any{"uid": 0, "gid": 0},
			"capabilities": map[string]any{"bounding": caps, "effective": caps, "permitted": caps},
		},
		"root":     map[string]any{"path": rootfs},
		"hostname": "before",
		"mounts": []any{mount("/proc", "proc"), mount("/sys", "sysfs"), mount("/dev", "dev"),
			mount("/dev/pts", "devpts"), mount("/dev/shm", "tmpfs")},
		"linux": map[string]any{"cgroupsPath": "/" + id, "resources": map[string]any{
			"memory": map[string]any{"limit": memoryBytes}, "pids": map[string]any{"limit": hostTasks},
		}, "namespaces": []any{
			map[string]any{"type": "pid"}, map[string]any{"type": "ipc"}, map[string]any{"type": "uts"},
			map[string]any{"type": "mount"}, map[string]any{"type": "network", "path": ns},
		}},
	}
	data, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// exec runs a command. The test fails if the agent cannot run it.
func (s *sandbox) exec(r agentapi.ExecuteRequest) agentapi.ExecuteResult {
	s.t.Helper()
	if r.Timeout == 0 {
		r.Timeout = 3 * time.Minute // a loaded machine takes long for a thousand processes
	}
	res, err := s.client.Execute(s.t.Context(), s.target, r)
	if err != nil {
		s.t.Fatalf("execute %q %q: %v", r.Command, r.Args, err)
	}
	return res
}

// sh runs a shell command and returns its output. The test fails if the command does.
func (s *sandbox) sh(command string) string {
	s.t.Helper()
	res := s.exec(agentapi.ExecuteRequest{Command: command})
	if res.ExitCode != 0 {
		s.t.Fatalf("%s: exit code %d, stdout %q, stderr %q", command, res.ExitCode, cut(res.Stdout), cut(res.Stderr))
	}
	return strings.TrimSpace(string(res.Stdout))
}

// eventually polls until f reports true.
func (s *sandbox) eventually(what string, f func() bool) {
	s.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !f() {
		if time.Now().After(deadline) {
			s.t.Fatalf("%s: not within 15 s", what)
		}
		time.Sleep(20 * time.Millisecond) // between polls
	}
}

func cut(b []byte) string { return string(b[:min(len(b), 400)]) }

// rpc calls a unary Connect method in JSON, as E2B's JavaScript client does.
func (s *sandbox) rpc(method, user string, in, out any) (status int, err error) {
	s.t.Helper()
	body, err := json.Marshal(in)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodPost, "http://"+s.addr+method, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Connect-Protocol-Version", "1")
	if user != "" {
		req.SetBasicAuth(user, "")
	}
	resp, err := s.transport.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var e struct{ Code, Message string }
		_ = json.NewDecoder(resp.Body).Decode(&e)
		return resp.StatusCode, errors.New(e.Code + ": " + e.Message)
	}
	return resp.StatusCode, json.NewDecoder(resp.Body).Decode(out)
}

func handleHere(t testing.TB) *netlink.Handle {
	t.Helper()
	h, err := netlink.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// in returns the sandbox with another test's t.
func (s *sandbox) in(t testing.TB) *sandbox {
	c := *s
	c.t = t
	return &c
}
