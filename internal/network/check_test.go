package network

import (
	"errors"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestRepair removes and changes rules, as a firewall service does that flushes all rules when it
// reloads.
func TestRepair(t *testing.T) {
	c := newConfig()
	c.Services = Services{DNS: 5301, Proxy: 5302, Metadata: 5303}
	n := open(t, c)
	s, names, ports := acquire(t, n), acquire(t, n), acquire(t, n)
	setPolicy(t, n, names, Policy{Names: true, Deny: prefixes("203.0.113.0/28")})
	if err := n.Resolve(names, []netip.Addr{farAddr}, time.Hour); err != nil {
		t.Fatal(err)
	}
	setPolicy(t, n, ports, Policy{Allow: prefixes("203.0.113.0/24"), Ports: []uint16{443}})
	named, ported := inForce(t, n, names), inForce(t, n, ports)
	// Rules added later may be listed before others.
	list := func() []string {
		text := regexp.MustCompile(`elements = |[,{}]`).ReplaceAllString(listTable(t, n.rules.table.Name), "")
		lines := strings.Split(text, "\n")
		for i := range lines {
			lines[i] = strings.TrimSpace(lines[i])
		}
		slices.Sort(lines)
		return lines
	}
	before := list()
	if want := farAddr.String(); !slices.Contains(before, want) {
		t.Errorf("no line %q in\n%s", want, strings.Join(before, "\n"))
	}
	for i, text := range []string{
		"flush ruleset",
		"flush chain inet " + n.rules.table.Name + " " + named.policyChain(),
		"flush chain inet " + n.rules.table.Name + " " + named.namesChain(),
		"add rule inet " + n.rules.table.Name + " " + ported.policyChain() + " accept",
		"flush set inet " + n.rules.table.Name + " " + named.name(kindDeny),
		"add element inet " + n.rules.table.Name + " " + ported.name(kindPorts) + " { 80 }",
		"flush set inet " + n.rules.table.Name + " " + n.rules.resolved(names).Name,
		"flush chain inet " + n.rules.table.Name + " flows",
		"delete element inet " + n.rules.table.Name + " named { \"" + names.Link + "\" . " + names.Addr.String() + " }",
		"flush map inet " + n.rules.table.Name + " policies",
		"flush chain inet " + n.rules.table.Name + " raw",
		"flush set inet " + n.rules.table.Name + " " + n.rules.never.Load().set.Name,
		"delete element inet " + n.rules.table.Name + " slots { \"" + s.Link + "\" . " + s.Addr.String() + " }",
		"insert rule inet " + n.rules.table.Name + " input accept",
		"add chain inet " + n.rules.table.Name + " input { policy drop; }",
	} {
		runNFT(t, text)
		if _, err := n.Check(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(before, list()); d != "" {
			t.Errorf("after %q (-want +got):\n%s", text, d)
		}
		if got := n.Repairs(); got != i+1 {
			t.Errorf("after %q: %d repairs, want %d", text, got, i+1)
		}
	}
	if repaired, err := n.Check(t.Context()); repaired || err != nil {
		t.Errorf("nothing to do: repaired %v, %v", repaired, err)
	}
}

// TestRepairByItself checks that the rules come back without a call of Check.
func TestRepairByItself(t *testing.T) {
	n := open(t, newConfig())
	before := listTable(t, n.rules.table.Name)
	started := time.Now()
	runNFT(t, "flush ruleset")
	eventually(t, func() error {
		if listTable(t, n.rules.table.Name) != before {
			return errors.New("the rules do not come back")
		}
		return nil
	})
	if took := time.Since(started); took > checkInterval/2 {
		t.Errorf("the rules came back after %v: not because of the kernel's notice", took)
	}
}

// TestRulesBeforeSlot removes the table while a slot is made. It is back before the slot is
// handed out.
func TestRulesBeforeSlot(t *testing.T) {
	n := open(t, newConfig())
	// No other goroutine repairs the table.
	n.stop()
	n.done.Wait()
	runNFT(t, "flush ruleset")
	s := acquire(t, n)
	keys, err := n.rules.keys(n.rules.slots)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([][]byte{slotKey(s)}, keys); d != "" {
		t.Errorf("slots in the rules (-want +got):\n%s", d)
	}
}

// TestRestore checks that Restore puts back what the sandbox's kernel removes when it starts.
func TestRestore(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	describe := func() (out []string) {
		if err := inNamespace(s.Namespace, func() error {
			link, err := netlink.LinkByName(insideLink)
			if err != nil {
				return err
			}
			addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			for _, a := range addrs {
				out = append(out, a.IPNet.String())
			}
			routes, err := netlink.RouteList(link, netlink.FAMILY_ALL)
			if err != nil {
				return err
			}
			for _, r := range routes {
				out = append(out, r.String())
			}
			neighbours, err := netlink.NeighList(link.Attrs().Index, unix.AF_INET)
			if err != nil {
				return err
			}
			for _, v := range neighbours {
				out = append(out, v.String())
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		return out
	}
	fresh := describe()
	if len(fresh) != 4 { // address, its network, the default route, the gateway's entry
		t.Errorf("a fresh slot has %q", fresh)
	}
	if err := s.Restore(); err != nil {
		t.Fatalf("nothing to restore: %v", err)
	}
	if err := inNamespace(s.Namespace, func() error {
		link, err := netlink.LinkByName(insideLink)
		if err != nil {
			return err
		}
		return netlink.AddrDel(link, &netlink.Addr{IPNet: pairNet(s.Addr)})
	}); err != nil {
		t.Fatal(err)
	}
	if got := describe(); len(got) >= len(fresh) {
		t.Fatalf("without its address the slot has %q", got)
	}
	if err := s.Restore(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(fresh, describe()); d != "" {
		t.Errorf("restored slot (-want +got):\n%s", d)
	}
}

// TestConnectionsAreForgotten checks that the next sandbox with an address gets no packets for
// the last one.
func TestConnectionsAreForgotten(t *testing.T) {
	c := newConfig()
	c.Range = netip.PrefixFrom(c.Range.Addr(), 30)
	n := open(t, c)
	s := acquire(t, n)
	udpRoundTrip(t, s)
	serveTCP(t, s.Namespace, agentPort)
	conn, err := n.Dial(t.Context(), s, agentPort)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := connections(t, s.Addr); got != 2 {
		t.Errorf("%d connections of %s are tracked, want 2: the test proves nothing", got, s.Addr)
	}
	if err := n.Release(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if got := connections(t, s.Addr); got != 0 {
		t.Errorf("%d connections of %s are still tracked", got, s.Addr)
	}
}

// connections counts the tracked connections of an address, in another way than the code under
// test.
func connections(t *testing.T, a netip.Addr) int {
	t.Helper()
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for _, f := range flows {
		if ip := net.IP(a.AsSlice()); f.Forward.SrcIP.Equal(ip) || f.Forward.DstIP.Equal(ip) {
			count++
		}
	}
	return count
}
