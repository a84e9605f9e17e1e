package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/config"
	"github.com/cayhq/cay/internal/egressproxy"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/store"
)

// ownHostVariable tells the test program that it already runs in namespaces that play a host.
const ownHostVariable = "CAY_DAEMON_TEST_OWN_HOST"

// onOwnHost returns true in a process that has namespaces of its own for networks and mounts, with a /run of its own,
// so that the calling test touches nothing of the machine. Elsewhere it runs the test in such a process and returns
// false.
func onOwnHost(t *testing.T) bool {
	t.Helper()
	caytest.RequireRoot(t)
	if os.Getenv(ownHostVariable) == "" {
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), ownHostVariable+"=1", "GODEBUG=netdns=go")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
			Pdeathsig: syscall.SIGKILL}
		runtime.LockOSThread() // the process ends with the thread that started it
		defer runtime.UnlockOSThread()
		out, err := cmd.CombinedOutput()
		t.Logf("in its own namespaces:\n%s", out)
		if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
			t.Errorf("in its own namespaces: %v", err)
		}
		return false
	}
	if err := errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755")); err != nil {
		t.Fatal(err)
	}
	return true
}

// ip runs the program ip.
func ip(t *testing.T, args string) {
	t.Helper()
	if out, err := exec.Command(caytest.RequireProgram(t, "ip"), strings.Fields(args)...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v: %s", args, err, out)
	}
}

// inside runs f on a thread in the network namespace at path, which ends with it.
func inside(path string, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			err = errors.Join(unix.Setns(fd, unix.CLONE_NEWNET), unix.Close(fd))
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// nameServer answers questions for IPv4 addresses on the loopback, which it makes the system's resolver ask.
type nameServer struct {
	mu sync.Mutex
	// +checklocks:mu
	zone map[string]string // an address by name; a name without one fails
}

func (s *nameServer) set(name, address string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.zone[name+"."] = address
}

func startNameServer(t *testing.T) *nameServer {
	t.Helper()
	s := &nameServer{zone: map[string]string{}}
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 53})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		b := make([]byte, 512)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			if answer, err := s.answer(b[:n]); err != nil {
				t.Error(err)
			} else if _, err := conn.WriteToUDPAddrPort(answer, from); err != nil && !errors.Is(err, net.ErrClosed) {
				t.Error(err)
			}
		}
	}()
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte("nameserver 127.0.0.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(path, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount("/etc/resolv.conf", 0); err != nil {
			t.Error(err)
		}
	})
	return s
}

func (s *nameServer) answer(question []byte) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(question); err != nil || len(m.Questions) != 1 {
		return nil, fmt.Errorf("a question of %d parts: %w", len(m.Questions), err)
	}
	s.mu.Lock()
	address, ok := s.zone[m.Questions[0].Name.String()]
	s.mu.Unlock()
	m.Response, m.Additionals = true, nil
	switch {
	case !ok || address == "":
		m.RCode = dnsmessage.RCodeServerFailure
	case m.Questions[0].Type == dnsmessage.TypeA:
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: m.Questions[0].Name, Class: dnsmessage.ClassINET},
			Body:   &dnsmessage.AResource{A: netip.MustParseAddr(address).As4()}}}
	}
	return m.Pack()
}

// outsidePort is the port on which every address outside echoes.
const outsidePort = ":5432"

// makeOutside makes a namespace that plays the rest of the world, with addresses that echo.
func makeOutside(t *testing.T, addresses ...string) {
	t.Helper()
	for _, args := range []string{"link set lo up", "netns add outside",
		"link add up0 type veth peer name eth0 netns outside",
		"address add 198.51.100.1/24 dev up0", "link set up0 up", "-n outside link set lo up",
		"-n outside address add 198.51.100.2/24 dev eth0", "-n outside link set eth0 up",
		"route add default via 198.51.100.2"} {
		ip(t, args)
	}
	for _, a := range addresses {
		ip(t, "-n outside address add "+a+"/32 dev lo")
	}
	var listener net.Listener
	if err := inside("/run/netns/outside", func() (err error) {
		listener, err = net.Listen("tcp4", outsidePort)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
}

// guest is a slot that may reach everything, on a server.
type guest struct {
	*server
	slot *network.Slot
}

const (
	patience = 90 * time.Second
	grace    = 300 * time.Millisecond // for what must not come; an answer takes less than a millisecond here
)

func (g guest) dial(address string, patience time.Duration) (c net.Conn, err error) {
	err = inside(g.slot.Namespace, func() (err error) {
		c, err = net.DialTimeout("tcp4", address+outsidePort, patience)
		return err
	})
	return c, err
}

func echoes(c net.Conn, patience time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("line")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 4))
	return err
}

// reaches checks that the guest reaches addresses, and that the server may connect to them for it.
func (g guest) reaches(t *testing.T, when string, all ...string) (open []net.Conn) {
	t.Helper()
	for _, a := range all {
		c, err := g.dial(a, patience)
		if err == nil {
			t.Cleanup(func() { c.Close() })
			err = echoes(c, patience)
		}
		if err = errors.Join(err, g.slots.Permitted(netip.MustParseAddr(a))); err != nil {
			t.Fatalf("%s: %s is not reached: %v", when, a, err)
		}
		open = append(open, c)
	}
	return open
}

// misses checks the opposite of reaches.
func (g guest) misses(t *testing.T, when string, all ...string) {
	t.Helper()
	for _, a := range all {
		if c, err := g.dial(a, grace); err == nil {
			c.Close()
			t.Errorf("%s: %s is reached", when, a)
		}
		if g.slots.Permitted(netip.MustParseAddr(a)) == nil {
			t.Errorf("%s: the server may connect to %s for a sandbox", when, a)
		}
	}
}

// TestDatabaseMoves moves the names of a database and of a bucket to other addresses, with a sandbox's slot that may
// reach everything, the real rules and the real resolver. Before and after, the slot reaches neither the old addresses
// nor the new ones.
func TestDatabaseMoves(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	const old, moved, bucket, newBucket, other = "203.0.113.7", "203.0.113.8", "10.9.0.1", "10.9.0.2", "203.0.113.9"
	makeOutside(t, old, moved, bucket, newBucket, other)
	dns := startNameServer(t)
	dns.set("db.example", old)
	dns.set("minio.example", bucket)
	g := openGuest(t, config.Config{
		Network: config.Network{Range: "10.88.0.0/29"},
		Store:   config.Store{URL: "postgres://cay@db.example/cay?sslmode=disable"},
		Files:   config.Files{URL: "s3://bucket?endpoint=http://minio.example:5432&path_style=true"},
	})
	established := g.reaches(t, "before", moved, newBucket, other)
	g.misses(t, "before", old, bucket)
	dns.set("db.example", moved)
	dns.set("minio.example", newBucket)
	g.denied.update(t.Context(), g.deny)
	g.misses(t, "moved", old, moved, bucket, newBucket)
	for _, c := range established[:2] {
		if echoes(c, grace) == nil {
			t.Errorf("the connection to %s lives on", c.RemoteAddr())
		}
	}
	if err := echoes(established[2], patience); err != nil {
		t.Errorf("another connection was cut: %v", err)
	}
	g.reaches(t, "moved", other)

	// The names are lost, and the rules too.
	dns.set("db.example", "")
	dns.set("minio.example", "")
	g.denied.update(t.Context(), g.deny)
	if out, err := exec.Command(caytest.RequireProgram(t, "nft"), "flush", "ruleset").CombinedOutput(); err != nil {
		t.Fatalf("nft: %v: %s", err, out)
	}
	if _, err := g.slots.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.misses(t, "without names", old, moved, bucket, newBucket)

	// What the names lost long ago is reached again.
	dns.set("db.example", moved)
	dns.set("minio.example", newBucket)
	for _, n := range g.denied.names {
		for a, lost := range n.lost {
			if !lost.IsZero() {
				n.lost[a] = lost.Add(-denyKept)
			}
		}
	}
	g.denied.update(t.Context(), g.deny)
	g.reaches(t, "long after", old, bucket, other)
	g.misses(t, "long after", moved, newBucket)
}

// TestDatabaseWithoutAddress checks that a server does not start without the addresses of its database, and starts
// without those of its bucket, which it denies later.
func TestDatabaseWithoutAddress(t *testing.T) {
	if !onOwnHost(t) {
		return
	}
	ip(t, "link set lo up")
	dns := startNameServer(t)
	dns.set("db.example", "192.0.2.7")
	const text = "postgres://cay@db.example,db2.example/cay?sslmode=require"
	cfg := config.Config{Store: config.Store{URL: text},
		Files: config.Files{URL: "s3://bucket?endpoint=http://minio.example&path_style=true"}}
	d, err := newDenied(cfg, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	if list, err := d.open(t.Context(), text); err == nil || !strings.Contains(err.Error(), "database") {
		t.Errorf("a database without an address: %v, %v", list, err)
	}
	dns.set("db2.example", "192.0.2.8")
	if list, err := d.open(t.Context(), text); err != nil || fmt.Sprint(list) != "[192.0.2.7/32 192.0.2.8/32]" {
		t.Errorf("a bucket without an address: %v, %v", list, err)
	}
	dns.set("minio.example", "192.168.0.1")
	var applied []netip.Prefix
	d.update(t.Context(), func(_ context.Context, all []netip.Prefix) error { applied = all; return nil })
	if want := "[192.0.2.7/32 192.0.2.8/32 192.168.0.1/32]"; fmt.Sprint(applied) != want {
		t.Errorf("denied are then %v, want %s", applied, want)
	}
}

// openGuest opens the network of a server with the settings, and a slot in it. All is gone after the test.
func openGuest(t *testing.T, cfg config.Config) guest {
	t.Helper()
	dir := t.TempDir()
	cfg.DataDir = dir
	s := &server{cfg: cfg, log: testLog(t), instance: "denied"}
	var err error
	if s.db, err = store.Open(t.Context(), filepath.Join(dir, databaseFile)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.db.Close(); err != nil {
			t.Error(err)
		}
	})
	if _, err := s.db.StartSession(t.Context(), s.instance, false); err != nil {
		t.Fatal(err)
	}
	if s.egressOn, err = listenEgress(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeListeners(s.egressOn) })
	s.egress = egressproxy.New(egressHost{server: s}, 0, s.log)
	if s.slots, err = s.openNetwork(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.slots.Close(); err != nil {
			t.Error(err)
		}
		if left := caytest.Leftovers(t, s.instance, filepath.Join(dir, "nothing")); len(left) > 0 {
			t.Errorf("left behind: %q", left)
		}
	})
	slot, err := s.slots.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.slots.Release(context.Background(), slot); err != nil {
			t.Error(err)
		}
	})
	if err := s.slots.SetPolicy(t.Context(), slot, network.Policy{Open: true}); err != nil {
		t.Fatal(err)
	}
	return guest{s, slot}
}
