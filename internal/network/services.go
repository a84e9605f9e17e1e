package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Services are TCP ports of the host, and one UDP port, to which sandboxes' traffic is
// redirected. Nothing else reaches them, not even the host itself. 0 means no such service. They
// must listen on all addresses, since traffic is redirected to the slot's own gateway.
type Services struct {
	DNS      uint16 // UDP and TCP: gets packets of slots with names to port 53 of any address
	Proxy    uint16 // gets TCP connections of slots with names to resolved addresses
	Metadata uint16 // gets connections of any slot to 169.254.169.254, TCP port 80
}

const (
	dnsPort      = 53
	metadataPort = 80
)

// metadataAddr is the address of the metadata service, as in clouds.
var metadataAddr = netip.MustParseAddr("169.254.169.254")

// redirects returns the rules that redirect new connections of slots' links to the services.
// Slots without names cost one look-up.
func (t *table) redirects(fromUs []expr.Any) [][]expr.Any {
	var out [][]expr.Any
	if t.services.Metadata != 0 {
		out = append(out, join(fromUs, isIPv4(), load(destination), equals(metadataAddr.AsSlice()),
			tcpPort(destination, metadataPort), redirectTo(t.services.Metadata)))
	}
	if t.services.DNS != 0 || t.services.Proxy != 0 {
		out = append(out, join(fromUs, isIPv4(), linkAnd(incoming, source), verdictOf(t.named)))
	}
	return out
}

// serviceInput returns the rules that let redirected connections reach the services, and nothing
// else. A sandbox cannot address the services: guard drops packets to the host.
func (t *table) serviceInput(fromUs []expr.Any) [][]expr.Any {
	notFromUs := linkIsNot(incoming, t.layout.links())
	led := join(isIPv4(), isRedirected(), isOriginal())
	var out [][]expr.Any
	add := func(protocol byte, port uint16, let ...[]expr.Any) {
		if port == 0 {
			return
		}
		for _, l := range let {
			out = append(out, join(portOf(protocol, destination, port), fromUs, led, l))
		}
		out = append(out, join(portOf(protocol, destination, port), notFromUs, drop()))
	}
	f := t.flows
	add(unix.IPPROTO_TCP, t.services.Metadata, join(isNew(), jumpTo(chainFlows)), accept())
	add(unix.IPPROTO_UDP, t.services.DNS,
		join(linkAnd(incoming, source), over(f.questions, &expr.Limit{Type: expr.LimitTypePkts, Rate: questionsPerSecond,
			Unit: expr.LimitTimeSecond, Burst: questionsPerSecond, Over: true}), gotoChain(chainExcess)), gotoChain(chainAllow))
	add(unix.IPPROTO_TCP, t.services.DNS, gotoChain(chainAllow))
	add(unix.IPPROTO_TCP, t.services.Proxy, gotoChain(chainAllow))
	return out
}

// serviceOutput returns the rules that let the services answer.
func (t *table) serviceOutput(toUs []expr.Any) [][]expr.Any {
	if t.services == (Services{}) {
		return nil
	}
	return [][]expr.Any{join(toUs, isIPv4(), isRedirected(), isReply(), accept())}
}

// errForbidden is wrapped by every refusal of Permitted.
var errForbidden = errors.New("no sandbox may reach it")

// Permitted returns an error if no slot may reach the address. The services ask before they
// connect on behalf of a slot. It does not check the slot's policy.
func (n *Network) Permitted(a netip.Addr) error {
	a = a.Unmap()
	if !a.Is4() {
		return fmt.Errorf("%s is not an IPv4 address: %w", a, errForbidden)
	}
	if contains(n.rules.never.Load().intervals, a) {
		return fmt.Errorf("%s is in a range that is always denied: %w", a, errForbidden)
	}
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil {
		return fmt.Errorf("looking up the route to %s: %w", a, err)
	}
	for _, r := range routes {
		if r.Type != unix.RTN_UNICAST {
			return fmt.Errorf("%s is an address of this machine, or no unicast address: %w", a, errForbidden)
		}
	}
	return nil
}

// Original returns the original destination of a redirected connection.
func (n *Network) Original(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("looking for the original destination: %w", err)
	}
	var was netip.AddrPort
	var asked error
	err = raw.Control(func(fd uintptr) {
		// The option's value is a sockaddr_in. Of the calls that read an option of at least its
		// size this has the simplest type.
		var m *unix.IPv6Mreq
		if m, asked = unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, unix.SO_ORIGINAL_DST); asked == nil {
			b := m.Multiaddr
			was = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), binaryutil.BigEndian.Uint16(b[2:4]))
		}
	})
	if err := errors.Join(err, asked); err != nil {
		return netip.AddrPort{}, fmt.Errorf("looking for the original destination: %w", err)
	}
	return was, nil
}
