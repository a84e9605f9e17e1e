package network

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// scatter sends a packet to each of count ports of an address.
func scatter(t *testing.T, s *Slot, to netip.Addr, count int) {
	t.Helper()
	var packets [][]byte
	for i := range count {
		f := frame{src: netip.AddrPortFrom(s.Addr, 5555), dst: netip.AddrPortFrom(to, uint16(10_000+i)), payload: "x"}
		packets = append(packets, f.packet())
	}
	if err := sendPackets(s, packets...); err != nil {
		t.Fatal(err)
	}
}

// tracked returns how many connections of slots are tracked, once there are at least so many: the kernel may take
// packets later than they were sent.
func tracked(t *testing.T, least int, slots ...*Slot) (got int) {
	t.Helper()
	eventually(t, func() error {
		got = 0
		for _, s := range slots {
			got += connections(t, s.Addr)
		}
		if got < least {
			return fmt.Errorf("%d connections are tracked, want at least %d", got, least)
		}
		return nil
	})
	return got
}

// TestFlowsOfASlot checks that a slot has a bounded number of tracked connections, that those it
// has continue, and that neither another slot nor the host notices.
func TestFlowsOfASlot(t *testing.T) {
	c := newConfig()
	c.Flows = Flows{PerSlot: 100, PerSecond: 100_000}
	n := open(t, c)
	s, other := acquire(t, n), acquire(t, n)
	udpRoundTrip(t, s)
	serveTCP(t, outsidePath, probePort)
	kept, err := dialFrom(s, netip.AddrPortFrom(farAddr, probePort), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	const count = 5000
	scatter(t, s, farAddr, count)
	if got := tracked(t, 50, s); got > 100 {
		t.Errorf("%d connections are tracked of %d that were tried, want at most 100", got, count)
	}
	if err := passes(kept, time.Second); err != nil {
		t.Errorf("a connection from before: %v", err)
	}
	if c, err := dialFrom(s, netip.AddrPortFrom(farAddr, probePort), grace); err == nil {
		c.Close()
		t.Error("one more connection is there")
	}
	udpRoundTrip(t, other)
	if _, excess, err := n.Totals(); err != nil || excess < count-100 {
		t.Errorf("%d packets counted as too many, %v", excess, err)
	}
	eventually(t, func() error {
		for {
			select {
			case d := <-n.Denials():
				if d.Slot == s && d.Excess && d.Protocol == "udp" {
					return nil
				}
			default:
				return fmt.Errorf("not told of")
			}
		}
	})
	// There is room again as soon as connections are over.
	if err := n.Release(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	s = acquire(t, n)
	udpRoundTrip(t, s)
}

// TestFlowsPerSecond checks the rate of new connections.
func TestFlowsPerSecond(t *testing.T) {
	c := newConfig()
	c.Flows = Flows{PerSlot: 10_000, PerSecond: 10}
	n := open(t, c)
	s, other := acquire(t, n), acquire(t, n)
	started := time.Now()
	scatter(t, s, farAddr, 2000)
	got := tracked(t, flowsBurst*10/2, s)
	if most := flowsBurst*10 + int(10*time.Since(started).Seconds()) + 2; got > most {
		t.Errorf("%d connections began at once, want at most %d", got, most)
	}
	// A single connection may have any number of packets, also without answers.
	same := frame{src: netip.AddrPortFrom(other.Addr, 5555), dst: netip.AddrPortFrom(farAddr, probePort),
		payload: "x"}.packet()
	udpRoundTrip(t, other)
	before, err := n.Counters(other)
	if err != nil {
		t.Fatal(err)
	}
	if err := sendPackets(other, slices.Repeat([][]byte{same}, 1000)...); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		now, err := n.Counters(other)
		if sent := now.AllowedPackets - before.AllowedPackets; err != nil || sent < 1000 {
			return fmt.Errorf("of 1000 packets of one connection %d were let out, %v", sent, err)
		}
		return nil
	})
	udpRoundTrip(t, other)
}

// TestFlowsOfAllSlots checks that all slots together get their share of the host's table at most,
// whatever each of them may have.
func TestFlowsOfAllSlots(t *testing.T) {
	c := newConfig()
	c.Flows = Flows{PerSlot: 1 << 20, PerSecond: 1 << 20, Percent: 1}
	n := open(t, c)
	all := n.rules.flows.all
	one, two := acquire(t, n), acquire(t, n)
	scatter(t, one, farAddr, all)
	scatter(t, two, farAddr, all)
	if got := tracked(t, all/2, one, two); got > all {
		t.Errorf("%d connections are tracked, want nearly %d and no more", got, all)
	}
}

// TestFlowTimes checks that connections that were not answered, or have ended, soon make room.
func TestFlowTimes(t *testing.T) {
	c := newConfig()
	c.Services = Services{DNS: 5301}
	n := open(t, c)
	s := acquire(t, n)
	setPolicy(t, n, s, Policy{Names: true, Allow: prefixes("203.0.113.0/24")})
	serving(t, n)
	serveTCP(t, outsidePath, probePort)
	udpRoundTrip(t, s)
	scatter(t, s, farAddr, 3)
	if got := asks(t, s, "100.65.0.1:53"); got != "dns name?" {
		t.Fatalf("the resolver answered %q", got)
	}
	over, err := dialFrom(s, netip.AddrPortFrom(farAddr, probePort), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	over.Close()
	eventually(t, func() error {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		seen := map[uint16]bool{}
		for _, f := range flows {
			port := f.Forward.DstPort
			if from, ok := netip.AddrFromSlice(f.Forward.SrcIP.To4()); !ok || from != s.Addr {
				continue
			}
			most := map[uint16]uint32{10_000: 10, 10_001: 10, 10_002: 10, 53: 10, probePort: 60}[port]
			if f.Forward.Protocol == 6 {
				most = 30
			}
			if f.TimeOut > most {
				return fmt.Errorf("what was sent to port %d by protocol %d is remembered for %d s, want at most %d", port,
					f.Forward.Protocol, f.TimeOut, most)
			}
			seen[port] = true
		}
		if len(seen) != 5 {
			return fmt.Errorf("tracked: %v", seen)
		}
		return nil
	})
}

// TestOpenedNone checks that a slot without connections is known as one, and that a slot whose
// connections this table has not counted is not.
func TestOpenedNone(t *testing.T) {
	c := newConfig()
	c.Services = Services{Metadata: 5301}
	n := open(t, c)
	s, other := acquire(t, n), acquire(t, n)
	scatter(t, other, deniedAddr, 3)
	serveTCP(t, s.Namespace, agentPort)
	agent, err := n.Dial(t.Context(), s, agentPort)
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	udpRoundTrip(t, other)
	for slot, want := range map[*Slot]bool{s: true, other: false} {
		if got := n.openedNone(slot); got != want {
			t.Errorf("%s opened no connection: %v, want %v", slot.Link, got, want)
		}
	}
	n.checking.Lock() // so that the table is not repaired
	runNFT(t, "delete table inet cay-"+c.Instance)
	if n.openedNone(s) {
		t.Error("without the table it is known that a slot has no connections")
	}
	n.checking.Unlock()
	eventually(t, func() error {
		if n.Repairs() == 0 {
			return errors.New("the table was not repaired")
		}
		return nil
	})
	if n.openedNone(s) || n.openedNone(other) {
		t.Error("a new table knows connections from before")
	}
	setPolicy(t, n, other, Policy{})
	if got := connections(t, other.Addr); got != 0 {
		t.Errorf("%d connections are tracked that the table before has counted and no policy allows", got)
	}
}

// TestForgetConnections checks that all connections of an address are forgotten in both ways that
// kernels have, and no others.
func TestForgetConnections(t *testing.T) {
	n := open(t, newConfig())
	s, other := acquire(t, n), acquire(t, n)
	serveTCP(t, s.Namespace, agentPort)
	serveTCP(t, other.Namespace, agentPort)
	udpRoundTrip(t, other)
	if c, err := n.Dial(t.Context(), other, agentPort); err != nil {
		t.Fatal(err)
	} else {
		defer c.Close()
	}
	others := connections(t, other.Addr)
	for way, f := range map[string]func(tuple uint16) error{
		"at once": func(tuple uint16) error { return forgetAll(&n.rules.sockets, s.Addr, tuple) },
		"one by one": func(tuple uint16) error {
			return forget(t.Context(), &n.rules.sockets, s.Addr, tuple, func(connection) bool { return true })
		},
	} {
		udpRoundTrip(t, s)
		scatter(t, s, farAddr, 10)
		agent, err := n.Dial(t.Context(), s, agentPort)
		if err != nil {
			t.Fatal(err)
		}
		defer agent.Close()
		err = f(attrTupleOrig)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			t.Logf("this kernel does not forget connections %s", way)
			continue
		}
		if got := connections(t, s.Addr); err != nil || got != 1 {
			t.Errorf("%s: %d connections are tracked, %v; want the agent's", way, got, err)
		}
		if err := f(attrTupleReply); err != nil || connections(t, s.Addr) != 0 {
			t.Errorf("%s: %d connections are tracked, %v", way, connections(t, s.Addr), err)
		}
	}
	if got := connections(t, other.Addr); got != others || others != 2 {
		t.Errorf("%d of %d connections of another slot are left, want 2", got, others)
	}
}
