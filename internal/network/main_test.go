package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
)

// inHostVariable tells the test program that it already runs in a namespace that plays the host.
const inHostVariable = "CAY_NETWORK_TEST_IN_HOST"

// TestMain runs the tests in a network namespace and with a /run of their own, so that they never
// touch the real host. Without root the tests that need it skip.
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
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inHostVariable+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, "running the tests in a namespace:", err)
		os.Exit(1)
	}
}

// playHost sets up this process's namespaces as a host: a private /run, a loopback, and an uplink
// to "outside". For a worker of the fuzzer it is done already.
func playHost() error {
	if _, err := os.Stat(outsidePath); err == nil {
		return nil
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"); err != nil {
		return err
	}
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	return errors.Join(makeOutside(), makeElsewhere())
}

const (
	outsidePath = netnsDir + "/outside"
	uplink      = "up0"
	// icmpLimit is the least time between errors to one address, in ms. With the default of a
	// second the same error would be missing when tests run often.
	icmpLimit = "ipv4/icmp_ratelimit"
)

var (
	// The host on its uplink, the machine outside, and a network behind that.
	hostAddr    = netip.MustParseAddr("198.51.100.1")
	outsideAddr = netip.MustParseAddr("198.51.100.2")
	farAddr     = netip.MustParseAddr("203.0.113.7")
	deniedAddr  = netip.MustParseAddr("203.0.113.200")
	// +checklocks:instancesMu
	deniedRange = netip.MustParsePrefix("203.0.113.192/26")
)

// makeOutside makes the namespace that plays the rest of the world: the router of the host's
// default route, with some addresses.
func makeOutside() error {
	if err := os.WriteFile(outsidePath, nil, 0o444); err != nil {
		return err
	}
	host, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(host)
	err = onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := unix.Mount("/proc/thread-self/ns/net", outsidePath, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = "eth0", 1400
		pair := netlink.NewVeth(attrs)
		pair.PeerName, pair.PeerNamespace, pair.PeerMTU = uplink, netlink.NsFd(host), 1400
		if err := netlink.LinkAdd(pair); err != nil {
			return err
		}
		return errors.Join(setting(icmpLimit, "0"), configure("eth0", outsideAddr, farAddr, deniedAddr))
	})
	if err != nil {
		return err
	}
	if err := setting(icmpLimit, "0"); err != nil {
		return err
	}
	if err := configure(uplink, hostAddr); err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{Gw: outsideAddr.AsSlice(),
		Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}})
}

// makeElsewhere makes a second network beside the outside, in which every address of
// elsewhereRange answers, as every address of farRange does in the first.
func makeElsewhere() error {
	everything := func(r netip.Prefix) error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: lo.Attrs().Index, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL,
			Scope: netlink.SCOPE_HOST, Dst: netPrefix(r)})
	}
	if err := inNamespace(outsidePath, func() error { return everything(farRange) }); err != nil {
		return err
	}
	if err := os.WriteFile(elsewherePath, nil, 0o444); err != nil {
		return err
	}
	host, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(host)
	if err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if err := unix.Mount("/proc/thread-self/ns/net", elsewherePath, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		pair := netlink.NewVeth(netlink.LinkAttrs{Name: "eth0", MTU: 1400})
		pair.PeerName, pair.PeerNamespace, pair.PeerMTU = "up1", netlink.NsFd(host), 1400
		if err := netlink.LinkAdd(pair); err != nil {
			return err
		}
		return errors.Join(setting(icmpLimit, "0"), configure("eth0", elsewhereAddr), everything(elsewhereRange))
	}); err != nil {
		return err
	}
	if err := configure("up1", netip.MustParseAddr("100.64.1.1")); err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{Gw: elsewhereAddr.AsSlice(), Dst: netPrefix(elsewhereRange)})
}

func netPrefix(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}

// configure sets a link up, with the first address as a network and the others alone.
func configure(name string, addrs ...netip.Addr) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for i, a := range addrs {
		bits := 32
		if i == 0 {
			bits = 24
		}
		if err := netlink.AddrAdd(link,
			&netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, 32)}}); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

const (
	agentPort     = 49983
	elsewherePath = netnsDir + "/elsewhere"
)

var (
	elsewhereAddr  = netip.MustParseAddr("100.64.1.2")
	elsewhereRange = netip.MustParsePrefix("100.65.0.0/24")
	farRange       = netip.MustParsePrefix("203.0.113.0/24")
)

var (
	instancesMu sync.Mutex
	// +checklocks:instancesMu
	instances int
)

// newConfig returns a configuration with an instance and a range that no other test has.
func newConfig() Config {
	instancesMu.Lock()
	defer instancesMu.Unlock()
	instances++
	return Config{
		Instance:   fmt.Sprintf("t%05d", instances),
		Range:      netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, byte(instances), 0}), 24),
		AlwaysDeny: []netip.Prefix{deniedRange},
		AgentPort:  agentPort,
	}
}

// open opens a network that leaves no trace after the test.
func open(t *testing.T, c Config) *Network {
	t.Helper()
	caytest.RequireRoot(t)
	n, err := Open(t.Context(), c, testLog(t))
	if err != nil {
		t.Fatalf("opening: %v", err)
	}
	t.Cleanup(func() {
		for _, s := range n.Slots() {
			if err := n.Release(context.Background(), s); err != nil {
				t.Errorf("releasing %s: %v", s.Link, err)
			}
		}
		if err := n.Sweep(nil); err != nil {
			t.Errorf("sweeping: %v", err)
		}
		if err := n.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
		if left := traces(t, c.Instance); len(left) > 0 {
			t.Errorf("left on the host: %s", strings.Join(left, ", "))
		}
	})
	return n
}

// acquire returns a slot that may reach everything a slot can.
func acquire(t *testing.T, n *Network) *Slot {
	t.Helper()
	s, err := n.Acquire(t.Context())
	if err != nil {
		t.Fatalf("acquiring: %v", err)
	}
	setPolicy(t, n, s, Policy{Open: true})
	return s
}

func setPolicy(t testing.TB, n *Network, s *Slot, p Policy) {
	t.Helper()
	if err := n.SetPolicy(t.Context(), s, p); err != nil {
		t.Fatalf("setting the policy of %s: %v", s.Link, err)
	}
}

// inForce returns the entry in force of a slot.
func inForce(t *testing.T, n *Network, s *Slot) *entry {
	t.Helper()
	r, err := n.rulesOf(s)
	if err != nil {
		t.Fatal(err)
	}
	return r.now.Load()
}

// traces returns everything of an instance on the host.
func traces(t *testing.T, instance string) []string {
	t.Helper()
	var out []string
	links, err := listLinks()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "cay"+instance) {
			out = append(out, "link "+l.Attrs().Name)
		}
	}
	for _, pattern := range []string{netnsDir + "/cay-" + instance + "*", lockDir + "/*" + instance + "*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, found...)
	}
	if rules := listTable(t, "cay-"+instance); rules != "" {
		out = append(out, "table cay-"+instance)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(mounts, []byte("cay-"+instance)) {
		out = append(out, "mounts")
	}
	return out
}

// listTable returns the table as nft prints it, "" if there is none.
func listTable(t *testing.T, name string) string {
	t.Helper()
	nft := caytest.RequireProgram(t, "nft")
	out, err := exec.Command(nft, "list", "table", "inet", name).CombinedOutput()
	if err != nil {
		if bytes.Contains(out, []byte("No such file or directory")) {
			return ""
		}
		t.Fatalf("nft list table: %v\n%s", err, out)
	}
	return string(out)
}

// eventually polls until f returns nil, and fails with its last error.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func indices(slots []*Slot) []int {
	var out []int
	for _, s := range slots {
		out = append(out, s.Index)
	}
	slices.Sort(out)
	return out
}

// testLog returns a logger that writes to the test's output.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}
