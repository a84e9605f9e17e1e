package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
)

// deny denies ranges beside those of the configuration.
func deny(t *testing.T, n *Network, c Config, texts ...string) {
	t.Helper()
	if err := n.Deny(t.Context(), slices.Concat(c.AlwaysDeny, prefixes(texts...))); err != nil {
		t.Fatalf("denying %v: %v", texts, err)
	}
}

// whole checks that the table is as it should be, and has one set of forbidden destinations.
func whole(t *testing.T, n *Network) {
	t.Helper()
	if found, err := n.difference(); found != "" || err != nil {
		t.Errorf("the table: %s, %v", found, err)
	}
	if sets := strings.Count(listTable(t, n.rules.table.Name), "set never-"); sets != 1 {
		t.Errorf("the table has %d sets of forbidden destinations, want 1", sets)
	}
}

// dialed returns a connection of the slot over which data passes.
func dialed(t *testing.T, s *Slot, to netip.AddrPort) net.Conn {
	t.Helper()
	conn, err := dialFrom(s, to, 5*time.Second)
	if err == nil {
		t.Cleanup(func() { conn.Close() })
		err = passes(conn, 5*time.Second)
	}
	if err != nil {
		t.Fatalf("%s to %s: %v", s.Link, to, err)
	}
	return conn
}

// refused checks that the slots do not reach a destination, and that the services may not connect to it.
func refused(t *testing.T, n *Network, when string, to netip.AddrPort, slots map[*Slot]Policy) {
	t.Helper()
	for s := range slots {
		if conn, err := dialFrom(s, to, grace); err == nil {
			conn.Close()
			t.Errorf("%s: %s reaches the denied address", when, s.Link)
		}
	}
	if n.Permitted(to.Addr()) == nil {
		t.Errorf("%s: the services may connect to the denied address", when)
	}
	if err := n.Permitted(farAddr); err != nil {
		t.Errorf("%s: %v", when, err)
	}
}

// TestDenyCuts denies an address to which slots of every kind of policy have connections, and allows it again.
func TestDenyCuts(t *testing.T) {
	c := newConfig()
	c.Services = Services{Proxy: 5302, Metadata: 5303}
	n := open(t, c)
	open, listed, named := acquire(t, n), acquire(t, n), acquire(t, n)
	policies := map[*Slot]Policy{open: {Open: true}, listed: {Allow: prefixes("203.0.113.0/24")}, named: {Names: true}}
	for _, port := range []int{5302, 5303} {
		serveTCP(t, "", port)
	}
	serveTCP(t, outsidePath, probePort)
	serveTCP(t, open.Namespace, agentPort)
	moved, stays := netip.MustParseAddrPort("203.0.113.8:9999"), netip.AddrPortFrom(farAddr, probePort)
	for s, p := range policies {
		setPolicy(t, n, s, p)
	}
	if err := n.Resolve(named, []netip.Addr{moved.Addr(), farAddr}, time.Hour); err != nil {
		t.Fatal(err)
	}
	var cut, kept []net.Conn
	for s := range policies {
		cut = append(cut, dialed(t, s, moved))
		kept = append(kept, dialed(t, s, stays), dialed(t, s, netip.AddrPortFrom(metadataAddr, metadataPort)))
	}
	agent, err := n.Dial(t.Context(), open, agentPort)
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	kept = append(kept, agent)
	before := connections(t, open.Addr)
	if err := n.Permitted(moved.Addr()); err != nil {
		t.Errorf("before: %v", err)
	}

	deny(t, n, c, "203.0.113.8/32", "fd00::/8")
	if got := connections(t, open.Addr); got != before-1 {
		t.Errorf("%d connections are tracked, want one less than the %d before", got, before)
	}
	for _, conn := range cut {
		if passes(conn, grace) == nil {
			t.Errorf("the connection of %s lives on", conn.LocalAddr())
		}
	}
	for _, conn := range kept {
		if err := passes(conn, 5*time.Second); err != nil {
			t.Errorf("the connection of %s to %s was cut: %v", conn.LocalAddr(), conn.RemoteAddr(), err)
		}
	}
	refused(t, n, "denied", moved, policies)
	for s, p := range policies {
		setPolicy(t, n, s, Policy{})
		setPolicy(t, n, s, p)
	}
	if err := n.Resolve(named, []netip.Addr{moved.Addr()}, 2*time.Hour); err != nil {
		t.Fatal(err)
	}
	refused(t, n, "with the policies set again", moved, policies)
	whole(t, n)

	deny(t, n, c)
	if err := n.Permitted(moved.Addr()); err != nil {
		t.Errorf("allowed again: %v", err)
	}
	for s := range policies {
		dialed(t, s, moved).Close()
	}
	refused(t, n, "by the configuration", netip.AddrPortFrom(deniedAddr, probePort), policies)
	whole(t, n)
}

// TestDenyCutsBehindForwarding cuts a connection that another firewall has led to the denied address.
func TestDenyCutsBehindForwarding(t *testing.T) {
	c := newConfig()
	n := open(t, c)
	s := acquire(t, n)
	serveTCP(t, outsidePath, probePort)
	runNFT(t, "table ip other { chain forwarding { type nat hook prerouting priority dstnat; "+
		"ip daddr 100.65.0.9 dnat to 203.0.113.8; }; }")
	t.Cleanup(func() { runNFT(t, "delete table ip other") })
	conn, err := dialFrom(s, netip.MustParseAddrPort("100.65.0.9:9999"), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := passes(conn, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	deny(t, n, c, "203.0.113.8/32")
	if got := connections(t, s.Addr); got != 0 {
		t.Errorf("%d connections are tracked, want none", got)
	}
	if passes(conn, grace) == nil {
		t.Error("the connection lives on")
	}
}

// TestDenyIsRepaired damages and removes the rules after a change, and changes them while they are gone.
func TestDenyIsRepaired(t *testing.T) {
	c := newConfig()
	n := open(t, c)
	s := acquire(t, n)
	udpRoundTrip(t, s)
	serveTCP(t, outsidePath, probePort)
	to := netip.MustParseAddrPort("203.0.113.8:9999")
	reaches := func() bool {
		conn, err := dialFrom(s, to, grace)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}
	if !reaches() {
		t.Fatal("the address does not answer: the test proves nothing")
	}
	// No other goroutine repairs the table.
	n.stop()
	n.done.Wait()
	table := "inet " + n.rules.table.Name
	deny(t, n, c, "203.0.113.8/32")
	for _, text := range []string{"flush ruleset", "flush set " + table + " " + n.rules.never.Load().set.Name,
		"flush chain " + table + " raw",
		"flush chain " + table + " leaving", "add rule " + table + " leaving accept"} {
		repairs := n.Repairs()
		runNFT(t, text)
		if repaired, err := n.Check(t.Context()); !repaired || err != nil {
			t.Errorf("after %q: repaired %v, %v", text, repaired, err)
		}
		if got := n.Repairs(); got != repairs+1 {
			t.Errorf("after %q: %d repairs more, want 1", text, got-repairs)
		}
		if reaches() {
			t.Errorf("after %q: the denied address is reached", text)
		}
		whole(t, n)
	}
	// The change itself finds that the rules are gone, and what it cannot see is left to the next check.
	for i, text := range []string{"flush ruleset", "flush chain " + table + " raw", "flush chain " + table + " leaving",
		"insert rule " + table + " raw accept", "insert rule " + table + " leaving accept"} {
		runNFT(t, text)
		deny(t, n, c, "203.0.113.8/32", fmt.Sprintf("192.0.2.%d/32", i))
		if _, err := n.Check(t.Context()); err != nil {
			t.Error(err)
		}
		if reaches() {
			t.Errorf("changed after %q: the denied address is reached", text)
		}
		whole(t, n)
	}
	if repaired, err := n.Check(t.Context()); repaired || err != nil {
		t.Errorf("nothing to do: repaired %v, %v", repaired, err)
	}
	deny(t, n, c)
	if !reaches() {
		t.Error("the address is not reached again")
	}
}

// sendInTurn sends numbered packets to the destinations from the slot until ctx ends, and returns how many to each.
func sendInTurn(ctx context.Context, s *Slot, to ...netip.AddrPort) (sent int, err error) {
	err = inNamespace(s.Namespace, func() error {
		out, err := net.ListenPacket("udp4", ":0")
		if err != nil {
			return err
		}
		defer out.Close()
		for ; ctx.Err() == nil; sent++ {
			for _, a := range to {
				if _, err := out.WriteTo(fmt.Appendf(nil, "%s %d", a, sent), net.UDPAddrFromAddrPort(a)); err != nil {
					return err
				}
			}
			time.Sleep(200 * time.Microsecond)
		}
		return nil
	})
	return sent, err
}

// TestDenyIsReplacedWhole replaces the list quickly, by lists that cover the same address by other ranges. It must
// never be reached, and one that no list has must always be.
func TestDenyIsReplacedWhole(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	always, never := netip.AddrPortFrom(farAddr, probePort), netip.MustParseAddrPort("100.65.0.9:9999")
	// The ranges before it make the transactions long, and hold the address in other ways.
	long := func(ranges ...string) []netip.Prefix {
		return slices.Concat(longPolicy(2000).Allow, prefixes(ranges...))
	}
	lists := [][]netip.Prefix{long("100.65.0.9/32"), long("100.65.0.0/28"), long("100.64.0.0/10"),
		prefixes("100.65.0.8/31", "100.65.0.10/31")}
	if err := n.Deny(t.Context(), lists[0]); err != nil {
		t.Fatal(err)
	}
	udpRoundTrip(t, s) // the first packets of a link are lost
	hear := &receivers{heard: map[string]netip.Addr{}}
	hear.listen(t, outsidePath, probePort)
	hear.listen(t, elsewherePath, probePort)
	const rounds = 40
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	sent, permitted := 0, 0
	var group sync.WaitGroup
	group.Go(func() {
		var err error
		if sent, err = sendInTurn(ctx, s, always, never); err != nil {
			t.Error(err)
		}
	})
	group.Go(func() {
		for ctx.Err() == nil {
			if n.Permitted(never.Addr()) == nil {
				permitted++
			}
			time.Sleep(time.Millisecond)
		}
	})
	for i := range rounds {
		if err := n.Deny(t.Context(), lists[i%len(lists)]); err != nil {
			t.Error(err)
		}
	}
	cancel()
	group.Wait()
	if sent < rounds {
		t.Fatalf("only %d packets in %d changes: the test proves nothing", sent, rounds)
	}
	eventually(t, func() error {
		for i := range sent {
			if !hear.hears(fmt.Sprintf("%s %d", always, i)) {
				return fmt.Errorf("of %d packets that every list lets out number %d is missing", sent, i)
			}
		}
		return nil
	})
	passed := 0
	for i := range sent {
		if hear.hears(fmt.Sprintf("%s %d", never, i)) {
			passed++
		}
	}
	if passed+permitted > 0 {
		t.Errorf("of %d packets to what every list denies %d passed, and the services might connect %d times", sent, passed,
			permitted)
	}
	if err := n.Deny(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		if _, err := sendInTurn(ctx, s, never); err != nil {
			return err
		}
		if !hear.hears(fmt.Sprintf("%s 0", never)) {
			return errors.New("the address is not reached although nothing denies it: the test proves nothing")
		}
		return nil
	})
	whole(t, n)
}

// TestDenyMany checks that a long list is put in force in transactions of bounded size, which delay no slot, is checked
// and repaired, and that the same list again changes nothing.
func TestDenyMany(t *testing.T) {
	c := newConfig()
	n := open(t, c)
	s := acquire(t, n)
	udpRoundTrip(t, s)
	many := longPolicy(10_000).Allow
	stop := heard(t, n.rules.table.Name)
	if err := n.Deny(t.Context(), slices.Concat(c.AlwaysDeny, many)); err != nil {
		t.Fatal(err)
	}
	most, transactions := stop()
	if most > elementsPerChange || most < elementsPerChange/2 {
		t.Errorf("a transaction has %d elements, want at most %d", most, elementsPerChange)
	}
	if least := 2 * 10_000 / elementsPerChange; transactions < least {
		t.Errorf("%d transactions were heard, want at least %d: the test proves nothing", transactions, least)
	}
	for _, i := range []int{0, 1, 5_000, 9_999} {
		if n.Permitted(many[i].Addr().Next()) == nil {
			t.Errorf("%s is permitted", many[i])
		}
	}
	udpRoundTrip(t, s)
	before := sent(n)
	slices.Reverse(many)
	if err := n.Deny(t.Context(), slices.Concat(many, many[:10], c.AlwaysDeny)); err != nil {
		t.Fatal(err)
	}
	if got := sent(n) - before; got != 0 {
		t.Errorf("the same list was %d transactions, want none", got)
	}
	runNFT(t, fmt.Sprintf("delete element inet %s %s { 20.0.0.0/24 }", n.rules.table.Name, n.rules.never.Load().set.Name))
	if _, err := n.Check(t.Context()); err != nil || n.Repairs() != 1 {
		t.Errorf("a missing range: %d repairs, %v", n.Repairs(), err)
	}
	whole(t, n)
	r, err := n.rulesOf(s)
	if err != nil {
		t.Fatal(err)
	}
	r.mu.Lock() // as in the middle of a change of the slot's policy
	defer r.mu.Unlock()
	within(t, "a shorter list", func() error { return n.Deny(t.Context(), c.AlwaysDeny) })
	whole(t, n)
}

// TestDenyRefused checks what is not accepted, and that the list before stays in force.
func TestDenyRefused(t *testing.T) {
	c := newConfig()
	n := open(t, c)
	s := acquire(t, n)
	deny(t, n, c, "203.0.113.8/32")
	before, was := sent(n), n.rules.never.Load()
	tooMany := make([]netip.Prefix, MaxDeny+1)
	for i := range tooMany {
		tooMany[i] = netip.PrefixFrom(addrOf(20<<24|uint32(i)<<1), 32)
	}
	for name, list := range map[string][]netip.Prefix{
		"no range":     {{}},
		"IPv4 in IPv6": {netip.PrefixFrom(netip.MustParseAddr("::ffff:203.0.113.7"), 128)},
		"too many":     tooMany,
	} {
		err := n.Deny(t.Context(), list)
		if !fault.Is(err, fault.Invalid) || fault.As(err).Field != "network.always_deny" {
			t.Errorf("%s: got %v, want Invalid with the field", name, err)
		}
		bad := c
		bad.Instance, bad.AlwaysDeny = "refuse", list
		if other, err := Open(t.Context(), bad, testLog(t)); err == nil {
			t.Errorf("%s: opened with it: %v", name, other.Close())
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := n.Deny(ended, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("an ended context: %v", err)
	}
	if sent(n) != before || n.rules.never.Load() != was || n.Permitted(netip.MustParseAddr("203.0.113.8")) == nil {
		t.Error("what was refused changed the list")
	}
	whole(t, n)
	if err := n.Release(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if err := n.Deny(t.Context(), nil); !errors.Is(err, errClosed) {
		t.Errorf("a closed network: %v", err)
	}
}

// TestDenyCutsAdopted checks that connections from before a restart are cut if their destination has been denied since.
func TestDenyCutsAdopted(t *testing.T) {
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
	setPolicy(t, first, s, Policy{Open: true})
	serveTCP(t, outsidePath, probePort)
	for _, to := range []string{"203.0.113.7:9999", "203.0.113.8:9999"} {
		conn, err := dialFrom(s, netip.MustParseAddrPort(to), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	if got := connections(t, s.Addr); got != 2 {
		t.Fatalf("%d connections are tracked, want 2: the test proves nothing", got)
	}
	crash(t, first)
	c.AlwaysDeny = append(c.AlwaysDeny, prefixes("203.0.113.8/32")...)
	n := open(t, c)
	if s, err = n.Adopt(s.Index); err != nil {
		t.Fatal(err)
	}
	setPolicy(t, n, s, Policy{Open: true})
	if got := connections(t, s.Addr); got != 1 {
		t.Errorf("%d connections are tracked, want the one that is still allowed", got)
	}
	deny(t, n, c, "203.0.113.7/32") // before the slot has opened anything since
	if got := connections(t, s.Addr); got != 0 {
		t.Errorf("%d connections are tracked, want none", got)
	}
}

// TestDenyCutsAgain checks that connections that could not be cut are cut by the next call.
func TestDenyCutsAgain(t *testing.T) {
	c := newConfig()
	n := open(t, c)
	s := acquire(t, n)
	serveTCP(t, outsidePath, probePort)
	conn, err := dialFrom(s, netip.MustParseAddrPort("203.0.113.8:9999"), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(t.Context())
	n.rules.sockets.tracked.mu.Lock() // so that cutting waits
	failed := make(chan error, 1)
	list := slices.Concat(c.AlwaysDeny, prefixes("203.0.113.8/32"))
	go func() { failed <- n.Deny(ctx, list) }()
	eventually(t, func() error {
		if n.Permitted(netip.MustParseAddr("203.0.113.8")) == nil {
			return errors.New("the list is not in force")
		}
		return nil
	})
	cancel()
	n.rules.sockets.tracked.mu.Unlock()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Fatalf("an ended context: %v", err)
	}
	if got := connections(t, s.Addr); got != 1 {
		t.Fatalf("%d connections are tracked, want 1: the test proves nothing", got)
	}
	if err := n.Deny(t.Context(), list); err != nil {
		t.Fatal(err)
	}
	if got := connections(t, s.Addr); got != 0 {
		t.Errorf("%d connections are tracked, want none", got)
	}
}

// TestDenyAtOnce changes lists and policies at once, while another program changes other rules of the host, or removes
// the table.
func TestDenyAtOnce(t *testing.T) {
	for name, disturb := range map[string]string{
		"others' rules": "add table inet foreign; delete table inet foreign",
		"our rules":     "flush ruleset",
	} {
		t.Run(name, func(t *testing.T) {
			c := newConfig()
			c.Services = Services{DNS: 5301, Proxy: 5302}
			n := open(t, c)
			s := acquire(t, n)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var group sync.WaitGroup
			for i := range 2 {
				group.Go(func() {
					for k := 0; ctx.Err() == nil; k++ {
						list := append(longPolicy(k%3*450).Allow, netip.PrefixFrom(addrOf(uint32(40+i)<<24|uint32(k)), 32))
						if err := n.Deny(t.Context(), list); err != nil {
							t.Errorf("change %d: %v", k, err)
						}
						time.Sleep(10 * time.Millisecond)
					}
				})
			}
			group.Go(func() {
				for k := 0; ctx.Err() == nil; k++ {
					if err := n.SetPolicy(t.Context(), s, longPolicy(k%3*450)); err != nil {
						t.Errorf("policy %d: %v", k, err)
					}
				}
			})
			for range 10 {
				runNFT(t, disturb)
				if _, err := n.Check(t.Context()); err != nil {
					t.Error(err)
				}
				time.Sleep(100 * time.Millisecond) // a change is tried a few times only
			}
			cancel()
			group.Wait()
			if got := n.Repairs(); (got > 0) != (name == "our rules") {
				t.Errorf("%d repairs", got)
			}
			if _, err := n.Check(t.Context()); err != nil {
				t.Error(err)
			}
			deny(t, n, c)
			setPolicy(t, n, s, Policy{Open: true})
			udpRoundTrip(t, s)
			whole(t, n)
		})
	}
}

// TestRenumbered checks that only the replaced rule's handle can change in the line that later checks compare with.
func TestRenumbered(t *testing.T) {
	const line, replaced = "filter 0 -300 1 10 11 12", "filter 0 -300 1 10 20 12"
	for now, want := range map[string]string{
		"10 20 12":        replaced,
		"10 11 12":        line,     // the kernel has kept the handle
		"20 12":           replaced, // the next check finds that the first rule is missing
		"":                line,     // and that all are
		"10 20 13":        "",       // another rule was replaced too
		"20 11 12":        "",
		"10 20":           "",
		"9 10 20 12":      "", // there is one more
		"10 20 12 13":     "",
		"1 2 3 4 5 6 7 8": "",
	} {
		if got, ok := renumbered(line, 11, now); ok != (want != "") || ok && got != want {
			t.Errorf("%q: got %q, %v, want %q", now, got, ok, want)
		}
	}
}
