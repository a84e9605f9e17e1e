package network

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// serving starts fake services: TCP answers with the connection's destination and source, UDP
// echoes.
func serving(t *testing.T, n *Network) {
	t.Helper()
	s := n.rules.services
	for name, port := range map[string]uint16{"dns": s.DNS, "proxy": s.Proxy, "metadata": s.Metadata} {
		l, err := net.Listen("tcp4", fmt.Sprintf(":%d", port))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					to, err := n.Original(c.(*net.TCPConn))
					from := netip.MustParseAddrPort(c.RemoteAddr().String()).Addr()
					slot, ok := n.SlotOf(from)
					if err != nil || !ok {
						fmt.Fprintf(c, "%s: %v, slot %v\n", name, err, ok)
						return
					}
					fmt.Fprintf(c, "%s for slot %d to %s\n", name, slot.Index, to)
				}()
			}
		}()
	}
	conn, err := net.ListenPacket("udp4", fmt.Sprintf(":%d", s.DNS))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		b := make([]byte, 512)
		for {
			count, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			conn.WriteTo(append([]byte("dns "), b[:count]...), from)
		}
	}()
}

// says returns the answer to a TCP connection from the namespace, or the error.
func says(path, to string) string {
	var c net.Conn
	err := enter(path, func() (err error) {
		c, err = net.DialTimeout("tcp4", to, grace)
		return err
	})
	if err != nil {
		return "no connection"
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(grace)); err != nil {
		return err.Error()
	}
	text, err := io.ReadAll(c)
	if err != nil {
		return "no answer"
	}
	return string(text)
}

// asks sends a UDP packet from the slot and returns the answer, "" for none.
func asks(t *testing.T, s *Slot, to string) string {
	t.Helper()
	var c net.Conn
	if err := inNamespace(s.Namespace, func() (err error) {
		c, err = net.Dial("udp4", to)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(grace)); err != nil {
		t.Fatal(err)
	}
	c.Write([]byte("name?"))
	b := make([]byte, 64)
	count, _ := c.Read(b)
	return string(b[:count])
}

func TestServices(t *testing.T) {
	c := newConfig()
	c.Services = Services{DNS: 5301, Proxy: 5302, Metadata: 5303}
	n := open(t, c)
	named, plain, none := acquire(t, n), acquire(t, n), acquire(t, n)
	setPolicy(t, n, named, Policy{Names: true, Allow: prefixes("203.0.113.64/26"), Deny: prefixes("203.0.113.9/32")})
	setPolicy(t, n, none, Policy{})
	serving(t, n)
	serveTCP(t, outsidePath, 443)
	addAddress(t, "", uplink, "169.254.169.254/32") // some clouds' agents have it on the machine itself

	for _, s := range []*Slot{named, plain, none} {
		want := fmt.Sprintf("metadata for slot %d to 169.254.169.254:80\n", s.Index)
		if got := says(s.Namespace, "169.254.169.254:80"); got != want {
			t.Errorf("the metadata service said %q, want %q", got, want)
		}
		if got := says(s.Namespace, "169.254.169.254:5303"); got != "no connection" {
			t.Errorf("another port of the metadata address said %q", got)
		}
		for _, port := range []int{5301, 5302, 5303} {
			for _, to := range []string{s.Gateway.String(), hostAddr.String()} {
				if got := says(s.Namespace, fmt.Sprintf("%s:%d", to, port)); got != "no connection" {
					t.Errorf("%s addressed from a slot said %q", to, got)
				}
			}
		}
	}
	for _, from := range []string{"", outsidePath} {
		for _, port := range []int{5301, 5302, 5303} {
			if got := says(from, fmt.Sprintf("%s:%d", hostAddr, port)); got != "no connection" {
				t.Errorf("port %d said %q to %q", port, got, from)
			}
		}
	}
	if got := says("", "127.0.0.1:5302"); got != "no connection" {
		t.Errorf("the loopback's proxy said %q", got)
	}

	if got := asks(t, named, "203.0.113.7:53"); got != "dns name?" {
		t.Errorf("a resolver outside answered %q, want ours", got)
	}
	if got, want := says(named.Namespace, "203.0.113.7:53"), "dns for slot 0 to 203.0.113.7:53\n"; got != want {
		t.Errorf("by TCP it answered %q, want %q", got, want)
	}
	if got := asks(t, plain, "203.0.113.7:53"); got != "" {
		t.Errorf("a slot without names was led to our resolver: %q", got)
	}
	resolved := []netip.Addr{farAddr, netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("203.0.113.70")}
	if got := says(named.Namespace, "203.0.113.7:443"); got != "no connection" {
		t.Errorf("before it was resolved: %q", got)
	}
	for _, s := range []*Slot{named, none} {
		if err := n.Resolve(s, resolved, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	for to, want := range map[string]string{
		"203.0.113.7:443":  "proxy for slot 0 to 203.0.113.7:443\n",
		"203.0.113.9:443":  "no connection", // denied
		"203.0.113.10:443": "no connection", // not resolved
		"203.0.113.70:443": "no answer",     // allowed by range: the echo outside waits for the client
	} {
		if got := says(named.Namespace, to); got != want {
			t.Errorf("%s said %q, want %q", to, got, want)
		}
	}
	if got := says(none.Namespace, "203.0.113.7:443"); got != "no connection" {
		t.Errorf("a slot without names reached %q", got)
	}
	// Resolved addresses stay open for their time, and across a change of policy.
	setPolicy(t, n, named, Policy{Names: true})
	if got, want := says(named.Namespace, "203.0.113.9:443"), "proxy for slot 0 to 203.0.113.9:443\n"; got != want {
		t.Errorf("after the policy changed: %q, want %q", got, want)
	}
	setPolicy(t, n, named, Policy{})
	setPolicy(t, n, named, Policy{Names: true})
	if got := says(named.Namespace, "203.0.113.9:443"); got != "no connection" {
		t.Errorf("names were off and on again: %q", got)
	}
	if err := n.Resolve(named, resolved, 50*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if got := says(named.Namespace, "203.0.113.7:443"); got != "no connection" {
			return fmt.Errorf("long after its time: %q", got)
		}
		return nil
	})
}

// TestServicesOpenWithoutRules checks that without rules every address reaches the ports, so that
// it is the rules that refuse in TestServices.
func TestServicesOpenWithoutRules(t *testing.T) {
	c := newConfig()
	c.Services = Services{DNS: 5301, Proxy: 5302, Metadata: 5303}
	n := open(t, c)
	s := acquire(t, n)
	serving(t, n)
	withoutRules(t, n, func() {
		for _, from := range []string{"", outsidePath, s.Namespace} {
			eventually(t, func() error {
				if says(from, fmt.Sprintf("%s:5302", hostAddr)) == "no connection" {
					return fmt.Errorf("not even without rules from %q", from)
				}
				return nil
			})
		}
	})
}

// TestServicesCut checks that a connection through a service is cut when the policy has no names
// any more, and not when another policy with names replaces it.
func TestServicesCut(t *testing.T) {
	c := newConfig()
	c.Services = Services{Proxy: 5302, Metadata: 5303}
	n := open(t, c)
	s := acquire(t, n)
	setPolicy(t, n, s, Policy{Names: true})
	for _, port := range []int{5302, 5303} {
		serveTCP(t, "", port)
	}
	if err := n.Resolve(s, []netip.Addr{farAddr}, time.Hour); err != nil {
		t.Fatal(err)
	}
	proxied, err := dialFrom(s, netip.AddrPortFrom(farAddr, 443), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer proxied.Close()
	metadata, err := dialFrom(s, netip.AddrPortFrom(metadataAddr, metadataPort), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer metadata.Close()
	setPolicy(t, n, s, Policy{Names: true, Allow: prefixes("100.65.0.0/24")})
	if err := passes(proxied, time.Second); err != nil {
		t.Errorf("cut although there still are names: %v", err)
	}
	setPolicy(t, n, s, Policy{Allow: prefixes("100.65.0.0/24")})
	if passes(proxied, grace) == nil {
		t.Error("not cut when there were no names any more")
	}
	if err := passes(metadata, time.Second); err != nil {
		t.Errorf("the metadata service was cut: %v", err)
	}
}

func TestPermitted(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	for _, a := range []netip.Addr{farAddr, outsideAddr, netip.MustParseAddr("::ffff:203.0.113.7")} {
		if err := n.Permitted(a); err != nil {
			t.Errorf("%s: %v", a, err)
		}
	}
	for _, a := range []string{"127.0.0.1", "0.0.0.0", "169.254.169.254", "224.0.0.1", "255.255.255.255", "198.51.100.1",
		"198.51.100.255", "203.0.113.200", s.Addr.String(), s.Gateway.String(), "::1", "2001:db8::1", "::ffff:127.0.0.1"} {
		if n.Permitted(netip.MustParseAddr(a)) == nil {
			t.Errorf("%s is permitted", a)
		}
	}
}

// TestDenials checks that refusals are reported, counted together, and counted completely.
func TestDenials(t *testing.T) {
	n := open(t, newConfig())
	s, quiet := acquire(t, n), acquire(t, n)
	setPolicy(t, n, s, Policy{Allow: prefixes("100.65.0.0/24")})
	udpRoundTrip(t, quiet)
	const flood = 1000
	want := map[string]bool{"udp 203.0.113.7:9999": true, "tcp 203.0.113.7:443": true, "icmp 203.0.113.7:0": true,
		"udp 169.254.169.254:80": true, "udp " + hostAddr.String() + ":22": true}
	if err := inNamespace(s.Namespace, func() error {
		for i := range flood + 1 {
			to := netip.AddrPortFrom(farAddr, probePort)
			if i == 0 {
				to = netip.AddrPortFrom(metadataAddr, metadataPort)
			}
			if i == 1 {
				to = netip.AddrPortFrom(hostAddr, 22)
			}
			f := frame{src: netip.AddrPortFrom(s.Addr, 5555), dst: to, payload: "x"}
			if err := f.send(); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	p := hearPings(t, s)
	told := 0
	eventually(t, func() error {
		if c, err := dialFrom(s, netip.AddrPortFrom(farAddr, 443), 10*time.Millisecond); err == nil {
			c.Close()
		}
		if err := p.send(farAddr, 1, 1); err != nil {
			return err
		}
		for {
			select {
			case d := <-n.Denials():
				if d.Slot != s {
					t.Errorf("told of %+v", d)
				}
				delete(want, fmt.Sprintf("%s %s", d.Protocol, d.Destination))
				if d.Destination.Port() == probePort {
					told += d.Count
				}
				continue
			default:
			}
			if len(want) > 0 {
				return fmt.Errorf("not told of %v", want)
			}
			return nil
		}
	})
	if told > flood/2 {
		t.Errorf("told of %d packets of a flood of %d", told, flood)
	}
	c, err := n.Counters(s)
	if err != nil || c.DeniedPackets < flood || c.DeniedBytes < flood*29 || c.AllowedPackets != 0 {
		t.Errorf("counted %+v, %v", c, err)
	}
	q, err := n.Counters(quiet)
	if err != nil || q.AllowedPackets == 0 ||
		q != (Counters{AllowedPackets: q.AllowedPackets, AllowedBytes: q.AllowedPackets * (28 + uint64(len("question")))}) {
		t.Errorf("counted %+v of the other slot, %v", q, err)
	}
	if err := n.Release(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	runNFT(t, "delete chain inet "+n.rules.table.Name+" nat") // a repair continues the counters
	if _, err := n.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	if total, _, err := n.Totals(); err != nil || total.DeniedPackets < c.DeniedPackets ||
		total.AllowedPackets != q.AllowedPackets {
		t.Errorf("counted %+v of all, %v; want what the slot had at least", total, err)
	}
}

// FuzzParsePacket parses the kernel's reports of packets, whose bytes a sandbox wrote.
func FuzzParsePacket(f *testing.F) {
	f.Add(frame{src: at("10.0.0.1", 1), dst: at("203.0.113.7", 53), payload: "x"}.packet())
	f.Add([]byte{0x4f, 0, 0, 20})
	f.Fuzz(func(t *testing.T, b []byte) {
		got, ok := parsePacket(b)
		if ok && (len(b) < 20 || !got.source.Addr().Is4() || !got.destination.IsValid()) {
			t.Errorf("%x: got %+v", b, got)
		}
		if ok && got.protocol != unix.IPPROTO_TCP && got.protocol != unix.IPPROTO_UDP && got.destination.Port() != 0 {
			t.Errorf("%x: a port for protocol %d", b, got.protocol)
		}
	})
}

// TestBesideInputFirewall checks that a firewall that drops unknown packets blocks the services
// until it has the rule that Probe advises.
func TestBesideInputFirewall(t *testing.T) {
	c := newConfig()
	c.Services = Services{DNS: 5311, Proxy: 5312, Metadata: 5313}
	n := open(t, c)
	s := acquire(t, n)
	serving(t, n)
	const table = "table ip other { chain input { type filter hook input priority filter; policy drop; " +
		"ct state established accept; %s }; }"
	runNFT(t, fmt.Sprintf(table, ""))
	t.Cleanup(func() { runNFT(t, "delete table ip other") })
	if got := says(s.Namespace, "169.254.169.254:80"); got != "no connection" {
		t.Errorf("behind the firewall the metadata service said %q: the advice is not needed", got)
	}
	runNFT(t, "delete table ip other; "+fmt.Sprintf(table, `iifname "cay*" ct status dnat accept;`))
	if got, want := says(s.Namespace, "169.254.169.254:80"),
		fmt.Sprintf("metadata for slot %d to 169.254.169.254:80\n", s.Index); got != want {
		t.Errorf("after what is advised the metadata service said %q, want %q", got, want)
	}
}
