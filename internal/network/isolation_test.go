package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
)

const (
	probePort = 9999
	// grace is the time that tests listen for packets that must not come. Packets that come take
	// less than a millisecond here.
	grace = 300 * time.Millisecond
)

// receivers is a set of UDP sockets that record the text of each packet.
type receivers struct {
	mu sync.Mutex
	// +checklocks:mu
	heard map[string]netip.Addr // source by text
}

// listen opens a socket on the port, on every address of the namespace at path, "" for the host.
// It is closed with the test.
func (e *receivers) listen(t *testing.T, path string, port int) {
	t.Helper()
	for _, family := range []string{"udp4", "udp6"} {
		e.listenFamily(t, path, family, port)
	}
}

func (e *receivers) listenFamily(t *testing.T, path, family string, port int) {
	t.Helper()
	var conn net.PacketConn
	open := func() (err error) {
		conn, err = net.ListenPacket(family, fmt.Sprintf(":%d", port))
		return err
	}
	if err := enter(path, open); err != nil {
		t.Fatalf("listening in %q: %v", path, err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			e.mu.Lock()
			e.heard[string(b[:n])] = from.(*net.UDPAddr).AddrPort().Addr().Unmap()
			e.mu.Unlock()
		}
	}()
}

func (e *receivers) hears(text string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, ok := e.heard[text]
	return ok
}

// enter runs f in the namespace at path, "" for the host.
func enter(path string, f func() error) error {
	if path == "" {
		return f()
	}
	return inNamespace(path, f)
}

func at(a string, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(a), port)
}

// TestNever tries everything that a slot must never be able to do. All settings that would also
// prevent it are off, so the rules alone must. It then does the same without the rules, to show
// that each try would have succeeded.
func TestNever(t *testing.T) {
	n := open(t, newConfig())
	a, b := acquire(t, n), acquire(t, n)
	loosen(t, a, b)
	hear := &receivers{heard: map[string]netip.Addr{}}
	for _, path := range []string{"", outsidePath, a.Namespace, b.Namespace} {
		hear.listen(t, path, probePort)
	}
	hear.listen(t, a.Namespace, agentPort)
	hear.listen(t, a.Namespace, agentPort+1)

	from := netip.AddrPortFrom(a.Addr, 5555)
	far := netip.AddrPortFrom(farAddr, probePort)
	v6 := at("fe80::2", 5555)
	everyone := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	to := func(addr string) frame { return frame{src: from, dst: at(addr, probePort)} }
	tries := []struct {
		name string
		in   string // namespace
		frame
	}{
		{"gateway", a.Namespace, frame{src: from, dst: netip.AddrPortFrom(a.Gateway, probePort)}},
		{"gateway from the agent's port", a.Namespace, frame{src: netip.AddrPortFrom(a.Addr, agentPort), dst: netip.AddrPortFrom(a.Gateway, probePort)}},
		{"uplink", a.Namespace, frame{src: from, dst: netip.AddrPortFrom(hostAddr, probePort)}},
		{"address added later", a.Namespace, to("192.0.2.77")},
		{"loopback", a.Namespace, to("127.0.0.1")},
		{"other gateway", a.Namespace, frame{src: from, dst: netip.AddrPortFrom(b.Gateway, probePort)}},
		{"other slot", a.Namespace, frame{src: from, dst: netip.AddrPortFrom(b.Addr, probePort)}},
		{"itself through the host", a.Namespace, frame{src: from, dst: netip.AddrPortFrom(a.Addr, probePort)}},
		{"metadata", a.Namespace, to("169.254.169.254")},
		{"always denied", a.Namespace, frame{src: from, dst: netip.AddrPortFrom(deniedAddr, probePort)}},
		{"limited broadcast", a.Namespace, frame{to: everyone, src: from, dst: at("255.255.255.255", probePort)}},
		{"uplink's broadcast", a.Namespace, to("198.51.100.255")},
		{"multicast", a.Namespace, frame{to: net.HardwareAddr{1, 0, 0x5e, 0, 0, 1}, src: from, dst: at("224.0.0.1", probePort)}},
		{"spoofed as other slot", a.Namespace, frame{src: netip.AddrPortFrom(b.Addr, 5555), dst: far}},
		{"spoofed as gateway", a.Namespace, frame{src: netip.AddrPortFrom(b.Gateway, 5555), dst: far}},
		{"spoofed as neighbour of the host", a.Namespace, frame{src: at("198.51.100.50", 5555), dst: far}},
		{"spoofed as anybody", a.Namespace, frame{src: at("192.0.2.9", 5555), dst: far}},
		{"IPv6 link-local multicast", a.Namespace, frame{to: net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, src: v6, dst: at("ff02::1", probePort)}},
		{"IPv6 of the host", a.Namespace, frame{src: at("fd00:a::2", 5555), dst: at("fd00:1::1", probePort)}},
		{"IPv6 to the outside", a.Namespace, frame{src: at("fd00:a::2", 5555), dst: at("fd00:2::2", probePort)}},
		{"gateway with the route recorded", a.Namespace, frame{src: from, dst: netip.AddrPortFrom(a.Gateway, probePort), options: recordRoute}},
		{"metadata with the route recorded", a.Namespace, frame{src: from, dst: at("169.254.169.254", probePort), options: recordRoute}},
		{"by a loose source route over the host", a.Namespace, frame{src: from, dst: netip.AddrPortFrom(hostAddr, probePort), options: routeOver(deniedAddr), end: deniedAddr}},
		{"gateway in fragments", a.Namespace, frame{src: from, dst: netip.AddrPortFrom(a.Gateway, probePort), pieces: true}},
		{"other slot in fragments", a.Namespace, frame{src: from, dst: netip.AddrPortFrom(b.Addr, probePort), pieces: true}},
		{"metadata in fragments", a.Namespace, frame{src: from, dst: at("169.254.169.254", probePort), pieces: true}},
		{"from outside", outsidePath, frame{src: netip.AddrPortFrom(farAddr, 5555), dst: netip.AddrPortFrom(a.Addr, probePort)}},
		{"from outside to the agent", outsidePath, frame{src: netip.AddrPortFrom(farAddr, 5555), dst: netip.AddrPortFrom(a.Addr, agentPort)}},
		{"from outside as the host", outsidePath, frame{src: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.8"), agentPort), dst: netip.AddrPortFrom(a.Addr, agentPort+1)}},
	}
	addAddress(t, "", uplink, "192.0.2.77/32") // after the slots were made
	send := func(t *testing.T, phase string, only func(string) bool) {
		for _, try := range tries {
			f := try.frame
			f.payload = phase + try.name
			if !only(f.payload) {
				continue
			}
			if try.in == outsidePath {
				f.to = linkAddress(t, uplink)
			}
			if err := inNamespace(try.in, f.send); err != nil {
				t.Errorf("%s: sending: %v", try.name, err)
			}
		}
	}
	everything := prefixes("0.0.0.0/0")
	for name, p := range map[string]struct {
		Policy
		allowed bool // what the others allow passes
	}{
		"closed":        {Policy{}, false},
		"open":          {Policy{Open: true}, true},
		"all addresses": {Policy{Allow: everything}, true},
		"ports":         {Policy{Allow: everything, Ports: []uint16{probePort}}, false}, // TCP ports
		"denied":        {Policy{Allow: everything, Deny: prefixes("203.0.113.0/28")}, false},
		"names":         {Policy{Names: true, Allow: everything}, true},
	} {
		t.Run(name, func(t *testing.T) {
			setPolicy(t, n, a, p.Policy)
			send(t, name+": ", func(string) bool { return true })
			// Allowed packets must arrive, also in fragments and with options, which shows that
			// the tries did not fail for another reason.
			open := []frame{{src: from, dst: far, payload: name + ", plain"},
				{src: from, dst: far, pieces: true, payload: name + ", pieces"},
				{src: from, dst: far, options: recordRoute, payload: name + ", options"}}
			sendOpen := func() error {
				var errs []error
				for _, f := range open {
					errs = append(errs, inNamespace(a.Namespace, f.send))
				}
				return errors.Join(errs...)
			}
			eventually(t, func() error {
				if err := sendOpen(); err != nil {
					return err
				}
				for _, f := range open {
					if p.allowed && !hear.hears(f.payload) {
						return fmt.Errorf("what is allowed did not arrive: %s", f.payload)
					}
				}
				return nil
			})
			time.Sleep(grace)
			for _, f := range open {
				if !p.allowed && hear.hears(f.payload) {
					t.Errorf("%s: arrived", f.payload)
				}
			}
			for _, try := range tries {
				if hear.hears(name + ": " + try.name) {
					t.Errorf("%s: arrived", try.name)
				}
			}
		})
	}

	withoutRules(t, n, func() {
		for _, try := range tries {
			eventually(t, func() error {
				text := "without: " + try.name
				send(t, "without: ", func(s string) bool { return s == text })
				time.Sleep(time.Millisecond)
				if !hear.hears(text) {
					return fmt.Errorf("%s: does not arrive without the rules either: the try proves nothing", try.name)
				}
				return nil
			})
		}
	})
}

// recordRoute has room for one address; routeOver leads over the packet's destination to another
// (RFC 791).
var recordRoute = []byte{7, 7, 4, 0, 0, 0, 0, 0}

func routeOver(to netip.Addr) []byte { return append(append([]byte{131, 7, 4}, to.AsSlice()...), 0) }

// TestNeverByPing checks that no echo comes from addresses that no packet may come from.
func TestNeverByPing(t *testing.T) {
	c := newConfig()
	c.Services = Services{DNS: 5301, Proxy: 5302, Metadata: 5303}
	n := open(t, c)
	a, b := acquire(t, n), acquire(t, n)
	loosen(t, a, b)
	hear := hearPings(t, a)
	targets := []netip.Addr{a.Gateway, b.Gateway, b.Addr, hostAddr, deniedAddr, metadataAddr}
	for round, p := range []Policy{{Open: true}, {}, {Allow: prefixes("0.0.0.0/0")}, {Names: true}} {
		setPolicy(t, n, a, p)
		for i, to := range targets {
			if err := hear.send(to, uint16(round), uint16(i)); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(grace)
		for i, to := range targets {
			if hear.hears(uint16(round), uint16(i)) {
				t.Errorf("%s answered under %+v", to, p)
			}
		}
	}
	withoutRules(t, n, func() {
		for i, to := range targets {
			eventually(t, func() error {
				if err := hear.send(to, 99, uint16(i)); err != nil {
					return err
				}
				time.Sleep(time.Millisecond)
				if !hear.hears(99, uint16(i)) {
					return fmt.Errorf("%s does not answer without the rules either: the try proves nothing", to)
				}
				return nil
			})
		}
	})
}

// withoutRules runs f while the table is removed and is not repaired.
func withoutRules(t *testing.T, n *Network, f func()) {
	t.Helper()
	n.installing.Lock()
	defer n.installing.Unlock()
	if err := n.rules.remove(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := n.install(); err != nil {
			t.Error(err)
		}
	}()
	f()
}

// loosen turns off, on the host and on the slots' links, all settings that would stop a packet
// that the rules let through, and gives the host and the outside the addresses of the tries.
func loosen(t *testing.T, slots ...*Slot) {
	t.Helper()
	settings := []string{"ipv4/conf/all/rp_filter=0", "ipv4/conf/all/route_localnet=1", "ipv4/conf/all/bc_forwarding=1",
		"ipv4/conf/" + uplink + "/rp_filter=0", "ipv6/conf/all/forwarding=1", "ipv4/conf/all/accept_local=1", "ipv4/conf/all/accept_source_route=1"}
	for _, s := range slots {
		for _, v := range []string{"rp_filter=0", "route_localnet=1", "bc_forwarding=1", "accept_local=1",
			"accept_source_route=1"} {
			settings = append(settings, "ipv4/conf/"+s.Link+"/"+v)
		}
		settings = append(settings, "ipv6/conf/"+s.Link+"/disable_ipv6=0", "ipv6/conf/"+s.Link+"/accept_dad=0")
	}
	for _, v := range settings {
		apply(t, v)
	}
	for _, s := range slots {
		if err := inNamespace(s.Namespace, func() error {
			return errors.Join(setting("ipv4/conf/"+insideLink+"/accept_local", "1"), setting("ipv4/conf/all/rp_filter", "0"),
				setting("ipv4/conf/"+insideLink+"/rp_filter", "0"))
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := inNamespace(outsidePath, func() error {
		return errors.Join(setting("ipv4/conf/all/accept_source_route", "1"),
			setting("ipv4/conf/eth0/accept_source_route", "1"))
	}); err != nil {
		t.Fatal(err)
	}
	addAddress(t, "", "lo", "fd00:1::1/128")
	addAddress(t, "", uplink, "fd00:2::1/64")
	addAddress(t, outsidePath, "eth0", "fd00:2::2/64")
	addAddress(t, outsidePath, "eth0", "169.254.169.254/32")
	// The outside has a route to sandboxes, which it would normally not have.
	addRoute(t, outsidePath, "eth0", "10.77.0.0/16", hostAddr)
}

// apply writes "path=value" and restores the old value after the test.
func apply(t *testing.T, assignment string) {
	t.Helper()
	i := slices.Index([]byte(assignment), '=')
	path, value := assignment[:i], assignment[i+1:]
	old, err := os.ReadFile(sysctlDir + "/" + path)
	if err != nil {
		t.Fatal(err)
	}
	if err := setting(path, value); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := setting(path, string(old)); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	})
}

// addAddress gives a link an address until the test ends, without waiting for IPv6's duplicate
// address detection.
func addAddress(t *testing.T, path, name, text string) {
	t.Helper()
	change := func(f func(netlink.Link, *netlink.Addr) error) error {
		return enter(path, func() error {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			addr, err := netlink.ParseAddr(text)
			if err != nil {
				return err
			}
			addr.Flags = unix.IFA_F_NODAD
			return f(link, addr)
		})
	}
	if err := change(netlink.AddrReplace); err != nil {
		t.Fatalf("adding %s to %s: %v", text, name, err)
	}
	t.Cleanup(func() { change(netlink.AddrDel) })
}

func addRoute(t *testing.T, path, name, text string, via netip.Addr) {
	t.Helper()
	change := func(f func(*netlink.Route) error) error {
		return enter(path, func() error {
			link, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			_, dst, err := net.ParseCIDR(text)
			if err != nil {
				return err
			}
			return f(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: via.AsSlice()})
		})
	}
	if err := change(netlink.RouteReplace); err != nil {
		t.Fatalf("adding a route to %s: %v", text, err)
	}
	t.Cleanup(func() { change(netlink.RouteDel) })
}

func linkAddress(t *testing.T, name string) net.HardwareAddr {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	return link.Attrs().HardwareAddr
}

// TestNeverThroughPortForwarding checks that the port forwarding of another tool, which rewrites
// an address of the host before filters see it, helps neither a sandbox nor another machine to reach one.
func TestNeverThroughPortForwarding(t *testing.T) {
	n := open(t, newConfig())
	a := acquire(t, n)
	hear := &receivers{heard: map[string]netip.Addr{}}
	hear.listen(t, outsidePath, probePort)
	hear.listen(t, a.Namespace, probePort)
	addRoute(t, outsidePath, "eth0", "10.77.0.0/16", hostAddr)
	runNFT(t, fmt.Sprintf(`table ip forwarding {
		chain pre { type nat hook prerouting priority dstnat; policy accept;
			iifname %q ip daddr %s udp dport 7001 dnat to %s:%d
			iifname %q ip daddr %s udp dport 7002 dnat to %s:%d
			iifname %q ip daddr %s udp dport 7003 dnat to %s:%d
		}
	}`, a.Link, hostAddr, farAddr, probePort,
		a.Link, farAddr, deniedAddr, probePort,
		uplink, hostAddr, a.Addr, probePort))
	t.Cleanup(func() { runNFT(t, "delete table ip forwarding") })
	tries := []struct {
		name, in string
		frame
	}{
		{"the host's address to the outside", a.Namespace, frame{src: netip.AddrPortFrom(a.Addr, 5555), dst: netip.AddrPortFrom(hostAddr, 7001)}},
		{"the outside to what is denied", a.Namespace, frame{src: netip.AddrPortFrom(a.Addr, 5556), dst: netip.AddrPortFrom(farAddr, 7002)}},
		{"the host's address into the slot", outsidePath, frame{to: linkAddress(t, uplink), src: netip.AddrPortFrom(farAddr, 5557), dst: netip.AddrPortFrom(hostAddr, 7003)}},
	}
	send := func(phase string) {
		for _, try := range tries {
			try.payload = phase + try.name
			if err := inNamespace(try.in, try.send); err != nil {
				t.Errorf("%s: sending: %v", try.name, err)
			}
		}
	}
	send("with rules: ")
	time.Sleep(grace)
	for _, try := range tries {
		if hear.hears("with rules: " + try.name) {
			t.Errorf("%s: arrived", try.name)
		}
	}
	withoutRules(t, n, func() {
		eventually(t, func() error {
			send("without: ")
			time.Sleep(time.Millisecond)
			for _, try := range tries {
				if !hear.hears("without: " + try.name) {
					return fmt.Errorf("%s: does not arrive without the rules either: the try proves nothing", try.name)
				}
			}
			return nil
		})
	})
}

// TestNoARP checks that a sandbox gets no answer to ARP, whatever address it asks for.
func TestNoARP(t *testing.T) {
	n := open(t, newConfig())
	a := acquire(t, n)
	ask := func(target netip.Addr) (answered bool) {
		err := inNamespace(a.Namespace, func() error {
			link, err := net.InterfaceByName(insideLink)
			if err != nil {
				return err
			}
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ARP)))
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ARP), Ifindex: link.Index}); err != nil {
				return err
			}
			everyone := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
			request := append([]byte{0, 1, 8, 0, 6, 4, 0, 1}, sandboxMAC...)
			request = append(append(request, a.Addr.AsSlice()...), make([]byte, 6)...)
			if err := sendRaw(link.Index, everyone, unix.ETH_P_ARP, append(request, target.AsSlice()...)); err != nil {
				return err
			}
			tv := unix.NsecToTimeval(grace.Nanoseconds())
			if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
				return err
			}
			b := make([]byte, 128)
			for {
				count, from, err := unix.Recvfrom(fd, b, 0)
				if errors.Is(err, unix.EAGAIN) {
					return nil
				}
				if err != nil {
					return err
				}
				const reply, opcode = 2, 14 + 6
				if from.(*unix.SockaddrLinklayer).Pkttype != unix.PACKET_OUTGOING && count > opcode+1 && b[opcode+1] == reply {
					answered = true
					return nil
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		return answered
	}
	for _, target := range []netip.Addr{a.Gateway, hostAddr} {
		if ask(target) {
			t.Errorf("the host answered ARP for %s", target)
		}
	}
	link, err := netlink.LinkByName(a.Link)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetARPOn(link); err != nil {
		t.Fatal(err)
	}
	if !ask(a.Gateway) {
		t.Error("no answer with ARP turned on either: the test proves nothing")
	}
}

func htons(v uint16) uint16 { return binary.NativeEndian.Uint16([]byte{byte(v >> 8), byte(v)}) }

// TestHostReachesOnlyTheAgent checks that the host can connect to the agent's port and to no
// other.
func TestHostReachesOnlyTheAgent(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	serveTCP(t, s.Namespace, agentPort)
	serveTCP(t, s.Namespace, probePort)

	c, err := n.Dial(t.Context(), s, agentPort)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	echo(t, c, 1<<20)
	if got := netip.MustParseAddrPort(c.LocalAddr().String()).Addr(); got != s.Gateway {
		t.Errorf("the agent is dialed from %s, want the gateway %s", got, s.Gateway)
	}
	ctx, cancel := context.WithTimeout(t.Context(), grace)
	defer cancel()
	if c, err := n.Dial(ctx, s, probePort); err == nil {
		c.Close()
		t.Error("the host reached another port")
	}
	withoutRules(t, n, func() {
		c, err := n.Dial(t.Context(), s, probePort)
		if err != nil {
			t.Fatalf("the port is not reached without the rules either: %v", err)
		}
		c.Close()
	})
}

// TestSlotOpensNothingToTheHost connects to the host from the agent's own port, which looks like
// an answer of the agent except for who opened it.
func TestSlotOpensNothingToTheHost(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	serveTCP(t, "", probePort)
	dial := func(to netip.Addr, from int) error {
		return inNamespace(s.Namespace, func() error {
			d := net.Dialer{Timeout: grace, LocalAddr: &net.TCPAddr{Port: from}}
			c, err := d.Dial("tcp4", netip.AddrPortFrom(to, probePort).String())
			if err == nil {
				c.Close()
			}
			return err
		})
	}
	for _, to := range []netip.Addr{s.Gateway, hostAddr} {
		for _, from := range []int{0, agentPort} {
			if dial(to, from) == nil {
				t.Errorf("connected to %s from port %d", to, from)
			}
		}
	}
	withoutRules(t, n, func() {
		if err := dial(hostAddr, 0); err != nil {
			t.Errorf("not connected without the rules either: %v", err)
		}
	})
}

func runNFT(t *testing.T, text string) {
	t.Helper()
	nft := caytest.RequireProgram(t, "nft")
	if out, err := command(nft, text); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
}
