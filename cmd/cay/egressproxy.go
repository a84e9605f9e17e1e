package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/egressproxy"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/sandbox"
)

// listenEgress opens the sockets that the rules redirect to, at ports of the kernel's
// choice: nobody but sandboxes reaches them, and these never by their number.
func listenEgress() (egressproxy.Listeners, error) {
	var on egressproxy.Listeners
	var err error
	if on.Proxy, err = net.ListenTCP("tcp4", nil); err == nil {
		on.Metadata, err = net.ListenTCP("tcp4", nil)
	}
	// The resolver needs one number in both protocols; another program may have the
	// number in one of them.
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
		err = fmt.Errorf("no port is free in both protocols")
	}
	closeListeners(on)
	return egressproxy.Listeners{}, fmt.Errorf("listening for sandboxes: %w", err)
}

// closeListeners closes what is open; one that is closed already is no error.
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

func portOf(l *net.TCPListener) uint16 { return l.Addr().(*net.TCPAddr).AddrPort().Port() }

// egressHost joins the gate with what knows slots and sandboxes.
type egressHost struct {
	*server
	nameservers []netip.AddrPort
}

// newEgressHost takes the configured name servers as those that the gate asks.
func newEgressHost(s *server) (egressHost, error) {
	h := egressHost{server: s}
	addrs, err := s.cfg.nameserverAddrs()
	if err != nil {
		return h, err
	}
	for _, a := range addrs {
		h.nameservers = append(h.nameservers, netip.AddrPortFrom(a, 53))
	}
	return h, nil
}

// boxHandle is one life of a sandbox, since a slot is handed out once.
type boxHandle struct {
	id   sandbox.ID
	slot *network.Slot
}

func (h egressHost) Find(from netip.Addr) (egressproxy.Sandbox, any, bool) {
	g, ok := h.node.Guest(from)
	if !ok {
		return egressproxy.Sandbox{}, nil, false
	}
	return egressproxy.Sandbox{Domains: g.Egress.AllowDomains, Nameservers: h.nameservers, Owner: g.Org}, boxHandle{g.ID, g.Slot}, true
}

// Metadata reads the row each time: a keepalive moves the end.
func (h egressHost) Metadata(ctx context.Context, handle any) (egressproxy.Metadata, error) {
	box, err := h.sandboxes.Look(ctx, handle.(boxHandle).id)
	if err != nil {
		return egressproxy.Metadata{}, err
	}
	return egressproxy.Metadata{ID: string(box.ID), Template: box.Template, Mode: string(box.Mode), Metadata: box.Metadata, ExpiresAt: box.ExpiresAt}, nil
}

func (h egressHost) Resolved(handle any, addrs []netip.Addr, ttl time.Duration) error {
	return h.slots.Resolve(handle.(boxHandle).slot, addrs, ttl)
}

func (h egressHost) Permitted(handle any, a netip.Addr) error {
	slot := handle.(boxHandle).slot
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

func (h egressHost) Original(c *net.TCPConn) (netip.AddrPort, error) { return h.slots.Original(c) }

func (h egressHost) Denied(handle any, protocol, name string, to netip.AddrPort) {
	h.node.Deny(sandbox.Denial{ID: handle.(boxHandle).id, Protocol: protocol, Name: strings.TrimSuffix(name, "."), Destination: to, Count: 1})
}

func (h egressHost) Excess(handle any, protocol, name string, to netip.AddrPort) {
	h.node.Deny(sandbox.Denial{ID: handle.(boxHandle).id, Protocol: protocol, Name: strings.TrimSuffix(name, "."), Destination: to, Count: 1, Excess: true})
}

// serveEgress serves until the server is closed.
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

// trafficMetrics are the counters of all sandboxes together: one of each would be a
// series that ends with it.
type trafficMetrics struct{ slots *network.Network }

var (
	packetsMetric = prometheus.NewDesc("cay_network_packets_total", "Packets that left sandboxes (allowed) or were kept in (denied).", []string{"verdict"}, nil)
	excessMetric  = prometheus.NewDesc("cay_network_excess_packets_total", "Packets that were kept in because a sandbox, or all together, had too many connections or questions.", nil, nil)
	bytesMetric   = prometheus.NewDesc("cay_network_bytes_total", "Bytes that left sandboxes (allowed) or were kept in (denied).", []string{"verdict"}, nil)
)

func (m trafficMetrics) Describe(ch chan<- *prometheus.Desc) {
	ch <- packetsMetric
	ch <- bytesMetric
	ch <- excessMetric
}

func (m trafficMetrics) Collect(ch chan<- prometheus.Metric) {
	c, excess, err := m.slots.Totals()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(packetsMetric, err)
		return
	}
	ch <- prometheus.MustNewConstMetric(excessMetric, prometheus.CounterValue, float64(excess))
	for _, v := range []struct {
		desc    *prometheus.Desc
		n       uint64
		verdict string
	}{
		{packetsMetric, c.AllowedPackets, "allowed"}, {packetsMetric, c.DeniedPackets, "denied"},
		{bytesMetric, c.AllowedBytes, "allowed"}, {bytesMetric, c.DeniedBytes, "denied"},
	} {
		ch <- prometheus.MustNewConstMetric(v.desc, prometheus.CounterValue, float64(v.n), v.verdict)
	}
}
