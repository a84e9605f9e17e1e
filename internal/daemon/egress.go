package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/egressproxy"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/node"
	"github.com/cayhq/cay/internal/sandbox"
)

// openNetwork opens the network on the configured range, else on the range that it chose the last time, in which
// sandboxes that still run have their addresses.
func (s *server) openNetwork(ctx context.Context) (*network.Network, error) {
	configured, err := s.cfg.Network.RangePrefix()
	if err != nil {
		return nil, err
	}
	if s.denied, err = newDenied(s.cfg, s.log); err != nil {
		return nil, err
	}
	if inFleet(s.cfg) {
		s.denied.addServers(s.instance, s.db.ListNodes)
	}
	deny, err := s.denied.open(ctx, string(s.cfg.Store.URL))
	if err != nil {
		return nil, err
	}
	c := network.Config{Instance: s.instance, Range: configured, AlwaysDeny: deny,
		Ready: s.cfg.Network.Ready, MTU: s.cfg.Network.MTU, AgentPort: node.AgentPort, MaxRanges: s.cfg.Network.MaxRanges,
		Flows: network.Flows{PerSlot: s.cfg.Network.MaxFlows, PerSecond: s.cfg.Network.FlowsPerSecond,
			Percent: s.cfg.Network.FlowsPercent}}
	c.Services.DNS, c.Services.Proxy = portOf(s.egressOn.DNS), portOf(s.egressOn.Proxy)
	c.Services.Metadata = portOf(s.egressOn.Metadata)
	if !configured.IsValid() {
		if c.Range, err = lastRange(s.cfg.DataDir); err != nil {
			return nil, err
		}
	}
	slots, err := network.Open(ctx, c, s.log)
	if err != nil && !configured.IsValid() && c.Range.IsValid() {
		s.log.WarnContext(ctx, "the range of the last start is not free any more; choosing another",
			"range", c.Range, "error", err)
		c.Range = netip.Prefix{}
		slots, err = network.Open(ctx, c, s.log)
	}
	if err != nil {
		return nil, err
	}
	return slots, writeID(filepath.Join(s.cfg.DataDir, rangeFile), slots.Range().String())
}

// listenEgress opens the sockets that the rules redirect to, at ports that the kernel chooses. Only sandboxes reach
// them, and never by their numbers.
func listenEgress() (egressproxy.Listeners, error) {
	var on egressproxy.Listeners
	var err error
	if on.Proxy, err = net.ListenTCP("tcp4", nil); err == nil {
		on.Metadata, err = net.ListenTCP("tcp4", nil)
	}
	// The resolver needs the same number in both protocols. Another program may have the number in one of them.
	for range 16 {
		if err != nil {
			break
		}
		if on.DNS, err = net.ListenTCP("tcp4", nil); err != nil {
			break
		}
		if on.UDP, err = net.ListenUDP("udp4", &net.UDPAddr{Port: on.DNS.Addr().(*net.TCPAddr).Port}); err == nil {
			return on, nil
		}
		on.DNS.Close()
		on.DNS, err = nil, nil
	}
	if err == nil {
		err = errors.New("no port is free in both protocols")
	}
	closeListeners(on)
	return egressproxy.Listeners{}, fmt.Errorf("listening for sandboxes: %w", err)
}

// closeListeners closes those listeners that are open.
func closeListeners(on egressproxy.Listeners) {
	for _, l := range []*net.TCPListener{on.DNS, on.Proxy, on.Metadata} {
		if l != nil {
			l.Close()
		}
	}
	if on.UDP != nil {
		on.UDP.Close()
	}
}

// portOf returns the port of a listener.
func portOf(l *net.TCPListener) uint16 { return l.Addr().(*net.TCPAddr).AddrPort().Port() }

// egressHost joins the egress proxy with the rooms that know slots and sandboxes. It implements [egressproxy.Host].
type egressHost struct {
	*server
	nameservers []netip.AddrPort
}

// newEgressHost returns a host whose sandboxes' questions go to the configured name servers.
func newEgressHost(s *server) (egressHost, error) {
	h := egressHost{server: s}
	addrs, err := nameserverAddrs(s.cfg.Network.Nameservers)
	if err != nil {
		return h, err
	}
	for _, a := range addrs {
		h.nameservers = append(h.nameservers, netip.AddrPortFrom(a, 53))
	}
	return h, nil
}

// egressHandle names an instance of a sandbox, since no two instances have the same slot.
type egressHandle struct {
	id   sandbox.ID
	slot *network.Slot
}

// Find implements [egressproxy.Host].
func (h egressHost) Find(from netip.Addr) (egressproxy.Sandbox, any, bool) {
	g, ok := h.node.Guest(from)
	if !ok {
		return egressproxy.Sandbox{}, nil, false
	}
	found := egressproxy.Sandbox{Domains: g.Egress.AllowDomains, Nameservers: h.nameservers, Owner: g.Org}
	return found, egressHandle{g.ID, g.Slot}, true
}

// Metadata implements [egressproxy.Host].
func (h egressHost) Metadata(ctx context.Context, handle any) (egressproxy.Metadata, error) {
	about, err := h.sandboxes.About(ctx, handle.(egressHandle).id)
	if err != nil {
		return egressproxy.Metadata{}, err
	}
	return egressproxy.Metadata{ID: string(about.ID), Template: about.Template, Mode: string(about.Mode),
		Metadata: about.Metadata, ExpiresAt: about.ExpiresAt}, nil
}

// Resolved implements [egressproxy.Host].
func (h egressHost) Resolved(handle any, addrs []netip.Addr, ttl time.Duration) error {
	return h.slots.Resolve(handle.(egressHandle).slot, addrs, ttl)
}

// Permitted implements [egressproxy.Host].
func (h egressHost) Permitted(handle any, a netip.Addr) error {
	slot := handle.(egressHandle).slot
	g, ok := h.node.Guest(slot.Addr)
	if !ok || g.Slot != slot {
		return fault.New(fault.Denied, "", "the sandbox has gone")
	}
	for _, p := range g.Egress.DenyCIDRs {
		if p.Contains(a.Unmap()) {
			return fault.New(fault.Denied, "", "%s is in deny_cidrs", a)
		}
	}
	return h.slots.Permitted(a)
}

// Original implements [egressproxy.Host].
func (h egressHost) Original(c *net.TCPConn) (netip.AddrPort, error) { return h.slots.Original(c) }

// Denied implements [egressproxy.Host].
func (h egressHost) Denied(handle any, protocol, name string, to netip.AddrPort) {
	h.node.Deny(denial(handle, protocol, name, to))
}

// Excess implements [egressproxy.Host].
func (h egressHost) Excess(handle any, protocol, name string, to netip.AddrPort) {
	d := denial(handle, protocol, name, to)
	d.Excess = true
	h.node.Deny(d)
}

// denial returns the record of one refusal.
func denial(handle any, protocol, name string, to netip.AddrPort) sandbox.Denial {
	return sandbox.Denial{ID: handle.(egressHandle).id, Protocol: protocol, Name: strings.TrimSuffix(name, "."),
		Destination: to, Count: 1}
}

// serveEgress runs the egress proxy until the server is closed.
func (s *server) serveEgress(on egressproxy.Listeners) {
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.egress.Serve(ctx, on); err != nil {
			s.log.Error("names and metadata are not served to sandboxes any more", "error", err)
		}
	}()
	s.onClose(func(closing context.Context) error {
		stop()
		select {
		case <-done:
			return nil
		case <-closing.Done():
			return closing.Err()
		}
	})
}
