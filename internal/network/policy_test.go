package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
)

func prefixes(texts ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, t := range texts {
		out = append(out, netip.MustParsePrefix(t))
	}
	return out
}

// try is one packet to an address outside.
type try struct {
	protocol string
	to       netip.AddrPort
}

// model reports whether a try gets through according to the contract. It knows nothing of how the
// rules are made.
func model(p Policy, always []netip.Prefix, t try) bool {
	within := func(list []netip.Prefix) bool {
		return slices.ContainsFunc(list, func(r netip.Prefix) bool { return r.Contains(t.to.Addr()) })
	}
	if within(always) {
		return false
	}
	if p.Open {
		return true
	}
	if within(p.Deny) || !within(p.Allow) {
		return false
	}
	return len(p.Ports) == 0 || t.protocol == "tcp" && slices.Contains(p.Ports, t.to.Port())
}

// triedPorts are the TCP and UDP ports on which both outside networks listen.
var triedPorts = []uint16{7001, 7002, 7003}

// TestPolicyAsModelled compares the kernel with the model: random policies, and for each some
// tries by every protocol to both networks.
func TestPolicyAsModelled(t *testing.T) {
	c := newConfig()
	n := open(t, c)
	s := acquire(t, n)
	bystander := acquire(t, n)
	hear := &receivers{heard: map[string]netip.Addr{}}
	for _, path := range []string{outsidePath, elsewherePath} {
		for _, port := range triedPorts {
			hear.listen(t, path, int(port))
			serveTCP(t, path, int(port))
		}
	}
	pings := hearPings(t, s)
	round := 0
	rapid.Check(t, func(rt *rapid.T) {
		round++
		p := anyPolicy().Draw(rt, "policy")
		tries := rapid.SliceOfN(anyTry(), 8, 24).Draw(rt, "tries")
		if err := n.SetPolicy(t.Context(), s, p); err != nil {
			rt.Fatal(err)
		}
		passed := attempt(rt, s, tries, hear, pings, round, func(t try) bool { return model(p, c.AlwaysDeny, t) })
		for i, try := range tries {
			if want := model(p, c.AlwaysDeny, try); passed(i) != want {
				rt.Errorf("%s to %s: passed is %v, want %v", try.protocol, try.to, !want, want)
			}
		}
	})
	udpRoundTrip(t, bystander) // the other policies changed nothing for it
}

// anyPolicy draws ranges in and around the two networks, so that they overlap.
func anyPolicy() *rapid.Generator[Policy] {
	ranges := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) netip.Prefix {
		return netip.PrefixFrom(anyAddress().Draw(t, "address"),
			rapid.OneOf(rapid.IntRange(24, 32), rapid.IntRange(0, 32)).Draw(t, "bits")).Masked()
	}), 0, 6)
	return rapid.Custom(func(t *rapid.T) Policy {
		if rapid.IntRange(0, 9).Draw(t, "open") == 0 {
			return Policy{Open: true}
		}
		p := Policy{Allow: ranges.Draw(t, "allow"), Deny: ranges.Draw(t, "deny")}
		if len(p.Allow) > 0 && rapid.Bool().Draw(t, "by port") {
			p.Ports = rapid.SliceOfN(rapid.SampledFrom(triedPorts), 1, 2).Draw(t, "ports")
		}
		return p
	})
}

// anyAddress draws from few addresses of each network, so that tries meet the ranges.
func anyAddress() *rapid.Generator[netip.Addr] {
	return rapid.Custom(func(t *rapid.T) netip.Addr {
		b := rapid.SampledFrom([]netip.Prefix{farRange, elsewhereRange}).Draw(t, "network").Addr().As4()
		b[3] = rapid.SampledFrom([]byte{1, 7, 8, 64, 127, 128, 191, 192, 200, 254}).Draw(t, "host")
		return netip.AddrFrom4(b)
	})
}

func anyTry() *rapid.Generator[try] {
	return rapid.Custom(func(t *rapid.T) try {
		return try{rapid.SampledFrom([]string{"tcp", "udp", "icmp"}).Draw(t, "protocol"),
			netip.AddrPortFrom(anyAddress().Draw(t, "to"), rapid.SampledFrom(triedPorts).Draw(t, "port"))}
	})
}

// attempt makes all tries at once. It waits for those that are expected to pass, and a little
// longer for the others.
func attempt(t *rapid.T, s *Slot, tries []try, hear *receivers, pings *pings, round int,
	expected func(try) bool) func(int) bool {
	const longer = 20 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	connected := make([]bool, len(tries))
	var mu sync.Mutex
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	passed := func(i int) bool {
		mu.Lock()
		defer mu.Unlock()
		switch tries[i].protocol {
		case "tcp":
			return connected[i]
		case "udp":
			return hear.hears(fmt.Sprintf("round %d try %d", round, i))
		}
		return pings.hears(uint16(round), uint16(i))
	}
	for i, try := range tries {
		group.Go(func() {
			err := inNamespace(s.Namespace, func() error {
				switch try.protocol {
				case "tcp":
					return connect(ctx, try.to, func() { mu.Lock(); connected[i] = true; mu.Unlock() })
				case "udp":
					c, err := net.Dial("udp4", try.to.String())
					if err != nil {
						return err
					}
					defer c.Close()
					return again(ctx, func() bool { return passed(i) }, func() error {
						_, err := fmt.Fprintf(c, "round %d try %d", round, i)
						return err
					})
				}
				return again(ctx, func() bool { return passed(i) }, func() error {
					return pings.send(try.to.Addr(), uint16(round), uint16(i))
				})
			})
			if err != nil {
				t.Errorf("%s to %s: %v", try.protocol, try.to, err)
			}
		})
	}
	deadline := time.Now().Add(time.Minute)
	for i := 0; i < len(tries); i++ {
		for expected(tries[i]) && !passed(i) && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
	}
	time.Sleep(longer)
	return passed
}

// again sends now and each second until it arrived or ctx ends: the kernel may drop packets on a busy machine. Errors
// of later packets may be answers to the first one.
func again(ctx context.Context, arrived func() bool, send func() error) error {
	err := send()
	for err == nil && !arrived() {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
			_ = send()
		}
	}
	return err
}

// connect opens a TCP connection, waiting for it until ctx ends, and calls done when it is open.
// The thread, and so the socket, is in the slot's namespace.
func connect(ctx context.Context, to netip.AddrPort, done func()) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); !errors.Is(err,
		unix.EINPROGRESS) {
		return err
	}
	for ctx.Err() == nil {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if count, err := unix.Poll(poll, 1); err != nil || count == 0 {
			continue
		}
		if failed, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); failed != 0 || err != nil {
			return fmt.Errorf("connecting: %w", errors.Join(unix.Errno(failed), err))
		}
		done()
		return nil
	}
	return nil
}

// pings records the echo replies that a slot gets.
type pings struct {
	fd int
	mu sync.Mutex
	// +checklocks:mu
	heard map[[2]uint16]bool
}

func hearPings(t *testing.T, s *Slot) *pings {
	t.Helper()
	p := &pings{heard: map[[2]uint16]bool{}}
	if err := inNamespace(s.Namespace, func() (err error) {
		p.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	tv := unix.NsecToTimeval((10 * time.Millisecond).Nanoseconds())
	if err := unix.SetsockoptTimeval(p.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	t.Cleanup(func() { stop(); <-ended; unix.Close(p.fd) })
	go func() {
		defer close(ended)
		b := make([]byte, 256)
		for ctx.Err() == nil {
			const header = 20
			count, _, err := unix.Recvfrom(p.fd, b, 0)
			if err == nil && count >= header+8 && b[header] == icmpEchoReply {
				p.mu.Lock()
				p.heard[[2]uint16{binary.BigEndian.Uint16(b[header+4:]), binary.BigEndian.Uint16(b[header+6:])}] = true
				p.mu.Unlock()
			}
		}
	}()
	return p
}

func (p *pings) send(to netip.Addr, id, sequence uint16) error {
	request := []byte{icmpEchoRequest, 0, 0, 0}
	request = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(request, id), sequence)
	binary.BigEndian.PutUint16(request[2:], checksum(request))
	return unix.Sendto(p.fd, request, 0, &unix.SockaddrInet4{Addr: to.As4()})
}

func (p *pings) hears(id, sequence uint16) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.heard[[2]uint16{id, sequence}]
}

// dialFrom connects from the slot by TCP.
func dialFrom(s *Slot, to netip.AddrPort, timeout time.Duration) (c net.Conn, err error) {
	err = inNamespace(s.Namespace, func() (err error) {
		c, err = net.DialTimeout("tcp4", to.String(), timeout)
		return err
	})
	return c, err
}

// passes checks that a line passes in each direction.
func passes(c net.Conn, timeout time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("line")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 4))
	return err
}

// TestPolicyCuts checks that a changed policy cuts what it forbids, at both ends, and nothing
// else.
func TestPolicyCuts(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	serveTCP(t, outsidePath, probePort)
	serveTCP(t, elsewherePath, probePort)
	serveTCP(t, s.Namespace, agentPort)
	kept, err := dialFrom(s, netip.AddrPortFrom(farAddr, probePort), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	cut, err := dialFrom(s, netip.MustParseAddrPort("100.65.0.9:9999"), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer cut.Close()
	agent, err := n.Dial(t.Context(), s, agentPort)
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	if err := errors.Join(passes(kept, time.Second), passes(cut, time.Second), passes(agent, time.Second)); err != nil {
		t.Fatal(err)
	}
	setPolicy(t, n, s, Policy{Allow: prefixes("203.0.113.0/24"), Ports: []uint16{probePort}})
	if err := errors.Join(passes(kept, time.Second), passes(agent, time.Second)); err != nil {
		t.Errorf("what is still allowed was cut: %v", err)
	}
	if err := passes(cut, grace); err == nil {
		t.Error("what is not allowed any more lives on")
	}
	if got := connections(t, s.Addr); got != 2 {
		t.Errorf("%d connections are tracked, want the allowed one and the agent's", got)
	}
	setPolicy(t, n, s, Policy{Allow: prefixes("203.0.113.0/24"), Ports: []uint16{probePort + 1}})
	if err := passes(kept, grace); err == nil {
		t.Error("a port that is not allowed any more lives on")
	}
	setPolicy(t, n, s, Policy{})
	if err := passes(agent, time.Second); err != nil {
		t.Errorf("the agent was cut off: %v", err)
	}
}

// TestPolicyIsReplacedWhole replaces policies quickly. What all of them allow must never stop,
// and what none allows must never pass.
func TestPolicyIsReplacedWhole(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	always, never := netip.AddrPortFrom(farAddr, probePort), netip.MustParseAddrPort("100.65.0.9:9999")
	policies := []Policy{
		{Allow: prefixes("203.0.113.0/28", "198.18.0.0/15")},
		{Allow: prefixes("0.0.0.0/0"), Deny: prefixes("100.65.0.0/28")},
		{Allow: prefixes("203.0.113.7/32", "100.65.0.10/32")},
	}
	udpRoundTrip(t, s) // the first packets of a link are lost
	setPolicy(t, n, s, policies[0])
	hear := &receivers{heard: map[string]netip.Addr{}}
	hear.listen(t, outsidePath, probePort)
	hear.listen(t, elsewherePath, probePort)
	const rounds = 100
	ctx, cancel := context.WithCancel(t.Context())
	var sent int
	var group sync.WaitGroup
	group.Go(func() {
		if err := inNamespace(s.Namespace, func() error {
			c, err := net.ListenPacket("udp4", ":0")
			if err != nil {
				return err
			}
			defer c.Close()
			for ; ctx.Err() == nil; sent++ {
				for _, to := range []netip.AddrPort{always, never} {
					if _, err := c.WriteTo(fmt.Appendf(nil, "%s %d", to, sent), net.UDPAddrFromAddrPort(to)); err != nil {
						return err
					}
				}
				time.Sleep(50 * time.Microsecond)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
	for i := range rounds {
		setPolicy(t, n, s, policies[i%len(policies)])
	}
	cancel()
	group.Wait()
	if sent < rounds {
		t.Fatalf("only %d packets in %d changes: the test proves nothing", sent, rounds)
	}
	eventually(t, func() error {
		for i := range sent {
			if !hear.hears(fmt.Sprintf("%s %d", always, i)) {
				return fmt.Errorf("of %d packets that every policy allows number %d is missing", sent, i)
			}
		}
		return nil
	})
	for i := range sent {
		if hear.hears(fmt.Sprintf("%s %d", never, i)) {
			t.Fatalf("packet %d passed, which no policy allows", i)
		}
	}
}

// TestClosedWithoutPolicy checks that a slot reaches nothing before it has a policy, and an
// adopted one nothing until it has one again. Its open connections then continue.
func TestClosedWithoutPolicy(t *testing.T) {
	caytest.RequireRoot(t)
	c := newConfig()
	first, err := Open(t.Context(), c, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	s, err := first.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	to := netip.AddrPortFrom(farAddr, probePort)
	serveTCP(t, outsidePath, probePort)
	eventually(t, func() error { // the first packets of a link are lost
		if c, err := dialFrom(s, to, grace); err == nil {
			c.Close()
			t.Error("a slot without a policy reached the outside")
		}
		if c, err := first.Counters(s); err != nil || c.DeniedPackets == 0 {
			return fmt.Errorf("counted %+v, %v", c, err)
		}
		return nil
	})
	policy := Policy{Allow: prefixes("203.0.113.0/24")}
	setPolicy(t, first, s, policy)
	conn, err := dialFrom(s, to, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	before, err := first.Counters(s)
	if err != nil || before.AllowedPackets == 0 || before.DeniedPackets == 0 {
		t.Errorf("counted %+v, %v", before, err)
	}
	crash(t, first)
	n := open(t, c)
	if s, err = n.Adopt(s.Index); err != nil {
		t.Fatal(err)
	}
	if c, err := dialFrom(s, to, grace); err == nil {
		c.Close()
		t.Error("an adopted slot without a policy reached the outside")
	}
	setPolicy(t, n, s, policy)
	if err := passes(conn, 5*time.Second); err != nil {
		t.Errorf("a connection from before the restart: %v", err)
	}
	after, err := n.Counters(s)
	if err != nil || after.AllowedPackets <= before.AllowedPackets || after.DeniedPackets <= before.DeniedPackets {
		t.Errorf("counted %+v (%v), and %+v before the restart", after, err, before)
	}
}

func TestPolicyRefused(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	for name, p := range map[string]Policy{
		"open with a list": {Open: true, Allow: prefixes("10.0.0.0/8")},
		"open with names":  {Open: true, Names: true},
		"IPv6":             {Allow: prefixes("fd00::/8")},
		"no range":         {Deny: []netip.Prefix{{}}},
		"port 0":           {Allow: prefixes("0.0.0.0/0"), Ports: []uint16{0}},
	} {
		if n.SetPolicy(t.Context(), s, p) == nil {
			t.Errorf("%s: no error", name)
		}
	}
	udpRoundTrip(t, s) // the policy before is in force
	if err := n.Release(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := n.SetPolicy(t.Context(), s, Policy{Open: true}); !fault.Is(err, fault.NotFound) {
		t.Errorf("a released slot: got %v, want NotFound", err)
	}
}

// longPolicy returns a policy of count ranges that do not touch.
func longPolicy(count int) Policy {
	var p Policy
	for i := range count {
		p.Allow = append(p.Allow, netip.PrefixFrom(addrOf(20<<24|uint32(i)<<9), 24))
	}
	return p
}

// TestLongPolicy checks that a long policy is installed in one transaction, is checked and is
// repaired.
func TestLongPolicy(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	p := longPolicy(10_000)
	p.Allow = append(p.Allow, netip.PrefixFrom(farAddr, 32))
	setPolicy(t, n, s, p)
	udpRoundTrip(t, s)
	runNFT(t, "flush ruleset")
	if _, err := n.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	udpRoundTrip(t, s)
	e := inForce(t, n, s)
	runNFT(t, fmt.Sprintf("delete element inet %s %s { 20.0.0.0/24 }", n.rules.table.Name, e.name(kindAllow)))
	if repaired, err := n.Check(t.Context()); !repaired || err != nil {
		t.Errorf("a missing range: repaired %v, %v", repaired, err)
	}
	if repaired, err := n.Check(t.Context()); repaired || err != nil {
		t.Errorf("nothing to do: repaired %v, %v", repaired, err)
	}
	setPolicy(t, n, s, Policy{})
}

// FuzzPolicy compares a look-up in merged intervals with a search of every range.
func FuzzPolicy(f *testing.F) {
	f.Add([]byte{203, 0, 113, 0, 24, 203, 0, 113, 8, 32}, byte(1), []byte{203, 0, 113, 9}, uint16(443),
		byte(unix.IPPROTO_TCP))
	f.Add([]byte{0, 0, 0, 0, 0, 255, 255, 255, 255, 32}, byte(1), []byte{255, 255, 255, 255}, uint16(0),
		byte(unix.IPPROTO_ICMP))
	f.Fuzz(func(t *testing.T, ranges []byte, denied byte, addr []byte, port uint16, protocol byte) {
		if len(addr) != 4 {
			return
		}
		var all []netip.Prefix
		for part := range slices.Chunk(ranges, 5) {
			if len(part) == 5 {
				all = append(all, netip.PrefixFrom(netip.AddrFrom4([4]byte(part)), int(part[4]%33)).Masked())
			}
		}
		split := min(int(denied), len(all))
		p := Policy{Deny: all[:split], Allow: all[split:]}
		if port%2 == 1 {
			p.Ports = []uint16{port, 80}
		}
		kind := try{map[byte]string{unix.IPPROTO_TCP: "tcp"}[protocol],
			netip.AddrPortFrom(netip.AddrFrom4([4]byte(addr)), port)}
		r := compile(p)
		if got, want := r.allows(protocol, kind.to), model(p, nil, kind); got != want {
			t.Errorf("%+v, %+v: got %v, want %v", p, kind, got, want)
		}
		for _, list := range [][]interval{r.allow, r.deny} {
			for i, v := range list {
				if v.first > v.last || i > 0 && v.first <= list[i-1].last {
					t.Errorf("intervals %v overlap", list)
				}
			}
		}
	})
}

// BenchmarkSetPolicy measures a change by the length of the policy and the number of other slots
// with one.
func BenchmarkSetPolicy(b *testing.B) {
	caytest.RequireRoot(b)
	c := newConfig()
	c.Range = netip.MustParsePrefix("10.78.0.0/22")
	n, err := Open(b.Context(), c, testLog(b))
	if err != nil {
		b.Fatal(err)
	}
	defer n.Close()
	var slots []*Slot
	defer func() {
		for _, s := range slots {
			if err := n.Release(context.Background(), s); err != nil {
				b.Error(err)
			}
		}
	}()
	for _, others := range []int{1, 200} {
		for len(slots) < others {
			s, err := n.Acquire(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			setPolicy(b, n, s, longPolicy(10))
			slots = append(slots, s)
		}
		for _, p := range []struct {
			name   string
			policy Policy
		}{{"open", Policy{Open: true}}, {"10 ranges", longPolicy(10)}, {"10000 ranges", longPolicy(10_000)}} {
			b.Run(fmt.Sprintf("%d slots/%s", others, p.name), func(b *testing.B) {
				for b.Loop() {
					setPolicy(b, n, slots[0], p.policy)
				}
			})
		}
		setPolicy(b, n, slots[0], longPolicy(10))
	}
}
