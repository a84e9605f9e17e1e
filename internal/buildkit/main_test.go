package buildkit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/cgi"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/network"
)

// inHostVariable tells the test program that it already runs in a namespace that plays the host,
// and has the directory of the programs.
const inHostVariable = "CAY_BUILDKIT_TEST_PROGRAMS"

// TestMain runs the tests in network and mount namespaces of their own, so that their slots do
// not conflict with the host's. Without root the tests that need it skip.
func TestMain(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(inHostVariable) != "" {
		if os.Getenv(inHostVariable) != "" {
			if err := playHost(); err != nil {
				fmt.Fprintln(os.Stderr, "preparing the namespace that plays the host:", err)
				os.Exit(1)
			}
		}
		os.Exit(m.Run())
	}
	code, err := runInHost()
	if err != nil {
		fmt.Fprintln(os.Stderr, "running the tests in a namespace:", err)
		code = 1
	}
	os.Exit(code)
}

func runInHost() (code int, err error) {
	programs, err := os.MkdirTemp("", "cay-buildkit-test")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(programs)
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inHostVariable+"="+programs)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig: syscall.SIGKILL}
	err = cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode(), nil
	}
	return 0, err
}

const (
	hostAddr    = "198.51.100.1" // on the uplink
	outsideAddr = "198.51.100.2" // of the machine that plays the rest of the world
)

// playHost sets up this process's namespaces as a host: a /run, a loopback, and an uplink to a
// machine outside that serves a file by HTTP.
func playHost() error {
	if _, err := os.Stat("/run/netns"); err == nil && isTmpfs("/run") {
		return nil // for a worker of the fuzzer it is done already
	}
	err := errors.Join(
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"),
		os.Mkdir("/run/netns", 0o755))
	if err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	host, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	outside := make(chan error)
	go func() {
		runtime.LockOSThread() // forever: the thread stays outside
		outside <- serveOutside(host)
	}()
	if err := <-outside; err != nil {
		return err
	}
	if err := address("up0", hostAddr); err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(outsideAddr)})
}

func isTmpfs(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.TMPFS_MAGIC
}

// served is the file that the machine outside serves.
const served = "from outside\n"

func serveOutside(host int) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "eth0"
	pair := netlink.NewVeth(attrs)
	pair.PeerName, pair.PeerNamespace = "up0", netlink.NsFd(host)
	if err := netlink.LinkAdd(pair); err != nil {
		return err
	}
	if err := address("eth0", outsideAddr); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", outsideAddr+":80")
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, served) })
	mux.HandleFunc("/git/", func(w http.ResponseWriter, r *http.Request) {
		(&cgi.Handler{Path: "/usr/lib/git-core/git-http-backend", Root: "/git",
			Env: []string{"GIT_PROJECT_ROOT=" + repositories, "GIT_HTTP_EXPORT_ALL=1"}}).ServeHTTP(w, r)
	})
	hostileOutside(mux)
	go http.Serve(listener, mux)
	names, err := net.ListenPacket("udp", outsideAddr+":53")
	if err != nil {
		return err
	}
	go serveNames(names)
	return nil
}

// repositories is the directory of the git repositories of the machine outside.
const repositories = "/run/repositories"

// serveNames is a name server that resolves every name to the machine outside.
func serveNames(conn net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
			continue
		}
		m.Header = dnsmessage.Header{ID: m.ID, Response: true, RecursionAvailable: true}
		m.Additionals = nil
		if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
			m.Answers = []dnsmessage.Resource{{Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class,
				TTL: 1}, Body: &dnsmessage.AResource{A: netip.MustParseAddr(outsideAddr).As4()}}}
		}
		if answer, err := m.Pack(); err == nil {
			conn.WriteTo(answer, from)
		}
	}
}

func address(link, addr string) error {
	l, err := netlink.LinkByName(link)
	if err != nil {
		return err
	}
	ip := &net.IPNet{IP: net.ParseIP(addr).To4(), Mask: net.CIDRMask(30, 32)}
	return errors.Join(netlink.AddrAdd(l, &netlink.Addr{IPNet: ip}), netlink.LinkSetUp(l))
}

// testSlots provides real slots, open to public addresses, and counts them.
type testSlots struct {
	net *network.Network

	mu sync.Mutex
	// +checklocks:mu
	taken int
}

func (s *testSlots) Take(ctx context.Context) (string, func(context.Context) error, error) {
	slot, err := s.net.Acquire(ctx)
	if err != nil {
		return "", nil, err
	}
	if err := s.net.SetPolicy(ctx, slot, network.Policy{Open: true}); err != nil {
		return "", nil, errors.Join(err, s.net.Release(context.WithoutCancel(ctx), slot))
	}
	s.count(1)
	return slot.Namespace, func(ctx context.Context) error { s.count(-1); return s.net.Release(ctx, slot) }, nil
}

func (s *testSlots) count(by int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken += by
	return s.taken
}

// fixture is the Builder of a test.
type fixture struct {
	*Builder
	slots *testSlots
}

// newFixture opens a Builder, closes it when the test ends, and checks what it left.
func newFixture(t testing.TB, change ...func(*Config)) *fixture {
	t.Helper()
	caytest.RequireRoot(t)
	programs := os.Getenv(inHostVariable)
	built, err := embedded.Unpack(programs)
	if err != nil {
		t.Fatal(err)
	}
	program, err := embedded.UnpackBuildkit(programs)
	if err != nil {
		t.Fatal(err)
	}
	instance := caytest.Instance()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	n, err := network.Open(t.Context(), network.Config{Instance: instance, AgentPort: 49983}, log)
	if err != nil {
		t.Fatal(err)
	}
	slots := &testSlots{net: n}
	cfg := Config{
		Dir: filepath.Join(t.TempDir(), "buildkit"), RunDir: "/run/cay-" + instance, Program: program, Runsc: built.Runsc,
		CgroupParent: "/cay-" + instance + "-build", Slots: slots, Nameservers: []netip.Addr{netip.MustParseAddr(outsideAddr)},
	}
	for _, f := range change {
		f(&cfg)
	}
	b, err := Open(cfg, log)
	if err != nil {
		t.Fatal(err)
	}
	r := &fixture{Builder: b, slots: slots}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
		defer cancel()
		if err := r.Close(ctx); err != nil {
			t.Error(err)
		}
		r.nothingLeft(t)
		if err := errors.Join(Purge(cfg), n.Sweep(nil), n.Close()); err != nil {
			t.Error(err)
		}
		if left := loops(t, cfg.Dir); len(left) > 0 {
			t.Errorf("loop devices are left: %v", left)
		}
		for _, path := range []string{cfg.Dir, cfg.RunDir} {
			if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is left: %v", path, err)
			}
		}
		if r.groups.Group(cfg.CgroupParent).Exists() {
			t.Errorf("the group %s is left", cfg.CgroupParent)
		}
	})
	return r
}

// nothingLeft checks that the Builder has no process, group, mount, slot or directory except
// those of idle programs.
func (r *fixture) nothingLeft(t testing.TB) {
	t.Helper()
	running, slots := []string{}, 0
	for _, seat := range r.taken() {
		if seat.running() {
			slots++
			running = append(running, fmt.Sprint(seat.number, "/program"))
		}
	}
	slices.Sort(running)
	groups, err := r.groupsBelow()
	if err != nil || strings.Join(groups, " ") != strings.Join(running, " ") {
		t.Errorf("control groups: %v, %v, want %v", groups, err, running)
	}
	if n := r.slots.count(0); n != slots {
		t.Errorf("%d slots are taken, want %d", n, slots)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), r.cfg.Dir) {
		t.Errorf("mounts are left below %s, %v:\n%s", r.cfg.Dir, err, mounts)
	}
	for _, inside := range []string{"data/scratch/steps", "run/runsc"} {
		if left := r.inside(t, inside); len(left) > 0 {
			t.Errorf("left in %s are %v", inside, left)
		}
	}
	for _, dir := range []string{r.results(), filepath.Join(r.builds(), "*")} {
		if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) > 0 && dir != r.results() {
			t.Errorf("left are %v, %v", left, err)
		}
	}
	if pids, err := processesOf(r.cfg.Runsc); err != nil || len(pids) > 0 {
		t.Errorf("processes of gVisor are left: %v, %v", pids, err)
	}
}

// groupsBelow returns the groups two levels below the Builder's, in order.
func (r *fixture) groupsBelow() ([]string, error) {
	parent := r.groups.Group(r.cfg.CgroupParent)
	seats, err := parent.Children()
	if err != nil {
		return nil, err
	}
	var all []string
	for _, seat := range seats {
		names, err := r.groups.Group(filepath.Join(r.cfg.CgroupParent, seat)).Children()
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			all = append(all, seat+"/"+name)
		}
	}
	slices.Sort(all)
	return all, nil
}

// inside lists a directory in the file trees of the running programs.
func (r *fixture) inside(t testing.TB, dir string) []string {
	t.Helper()
	pids, err := processesOf(r.cfg.Program)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, pid := range pids {
		found, err := filepath.Glob(filepath.Join("/proc", pid, "root", dir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, found...)
	}
	return all
}

// processesOf returns the processes that run a program, under any name.
func processesOf(program string) ([]string, error) {
	links, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		return nil, err
	}
	want, err := os.Stat(program)
	if err != nil {
		return nil, err
	}
	var pids []string
	for _, link := range links {
		if is, err := os.Stat(link); err == nil && os.SameFile(is, want) {
			pids = append(pids, filepath.Base(filepath.Dir(link)))
		}
	}
	return pids, nil
}
