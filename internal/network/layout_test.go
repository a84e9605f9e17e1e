package network

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/fault"
)

func TestSlotNames(t *testing.T) {
	l := layout{instance: "abc123", block: netip.MustParsePrefix("10.64.0.0/18")}
	want := Slot{Index: 8191, Namespace: "/run/netns/cay-abc123-8191", Link: "cayabc123-8191",
		Gateway: netip.MustParseAddr("10.64.63.254"), Addr: netip.MustParseAddr("10.64.63.255")}
	if got := l.slot(l.capacity() - 1); *got != want {
		t.Errorf("last slot is %+v, want %+v", *got, want)
	}
}

// FuzzLayout checks that in every range every slot has a pair of its own, names that lead back to
// it, and a link that the kernel accepts.
func FuzzLayout(f *testing.F) {
	f.Add(uint32(10<<24|64<<16), 18, 0)
	f.Add(uint32(10<<24|64<<16), 18, 8191)
	f.Add(uint32(10<<24), 15, 65535)
	f.Add(uint32(192<<24|168<<16|4), 30, 1)
	f.Fuzz(func(t *testing.T, base uint32, bits, index int) {
		block := netip.PrefixFrom(addrOf(base), bits)
		if checkRange(block) != nil {
			return
		}
		l := layout{instance: "abc123", block: block}
		if index < 0 || index >= l.capacity() {
			return
		}
		s := l.slot(index)
		for _, a := range []netip.Addr{s.Addr, s.Gateway} {
			b, first := a.As4(), block.Addr().As4()
			nth := binary.BigEndian.Uint32(b[:]) - binary.BigEndian.Uint32(first[:])
			if !block.Contains(a) || int(nth/2) != index {
				t.Errorf("%s is number %d of %s and given to slot %d", a, nth, block, index)
			}
		}
		if s.Gateway.Next() != s.Addr || !netip.PrefixFrom(s.Gateway, 31).Masked().Contains(s.Addr) {
			t.Errorf("%s and %s are not a pair", s.Gateway, s.Addr)
		}
		if len(s.Link) >= unix.IFNAMSIZ {
			t.Errorf("%s is too long for a link", s.Link)
		}
		if instance, got, ok := parseLink(s.Link); instance != "abc123" || got != index || !ok {
			t.Errorf("%s reads as %s %d %v", s.Link, instance, got, ok)
		}
		if instance, got, ok := parseNamespace(l.namespace(index)); instance != "abc123" || got != index || !ok {
			t.Errorf("%s reads as %s %d %v", l.namespace(index), instance, got, ok)
		}
	})
}

// FuzzParseName checks that only names as this package writes them are parsed.
func FuzzParseName(f *testing.F) {
	for _, name := range []string{"cayabc123-0", "cayabc123-65535", "cayabc123-65536", "cayabc123-01", "cayabc123--1",
		"cayabc123-+1", "cay-abc123-7", "cayABC123-0", "cayabc12-3", "cay-abc123", "cay-abc123-", "eth0", ""} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if instance, index, ok := parseLink(name); ok && (layout{instance: instance}).link(index) != name {
			t.Errorf("link %q reads as %q %d", name, instance, index)
		}
		if instance, index, ok := parseNamespace(name); ok && (layout{instance: instance}).namespace(index) != name {
			t.Errorf("namespace %q reads as %q %d", name, instance, index)
		}
		if instance, ok := parseTable(name); ok && (layout{instance: instance}).table() != name {
			t.Errorf("table %q reads as %q", name, instance)
		}
		if p, ok := parseBlockName(name); ok && blockPart+blockName(p) != name {
			t.Errorf("block %q reads as %s", name, p)
		}
	})
}

func (i interval) String() string { return fmt.Sprintf("%v-%v", addrOf(i.first), addrOf(i.last)) }

// FuzzMerge checks that the intervals hold exactly the addresses of the prefixes, in order and
// disjoint.
func FuzzMerge(f *testing.F) {
	f.Add([]byte{10, 0, 0, 0, 8, 10, 1, 0, 0, 16}, uint32(10<<24))
	f.Add([]byte{0, 0, 0, 0, 0}, uint32(0xffffffff))
	f.Add([]byte{224, 0, 0, 0, 4, 240, 0, 0, 0, 4}, uint32(0xffffffff))
	f.Add([]byte{0, 0, 0, 0, 32, 255, 255, 255, 255, 32, 0, 0, 0, 0, 32}, uint32(0))
	f.Fuzz(func(t *testing.T, raw []byte, probe uint32) {
		var prefixes []netip.Prefix
		for chunk := range slices.Chunk(raw, 5) {
			if len(chunk) == 5 {
				prefixes = append(prefixes, netip.PrefixFrom(netip.AddrFrom4([4]byte(chunk)), int(chunk[4]%33)))
			}
		}
		got := merge(append(prefixes, netip.MustParsePrefix("fd00::/8")))
		for i, v := range got {
			if v.first > v.last || i > 0 && uint64(got[i-1].last)+1 >= uint64(v.first) {
				t.Errorf("%v: %v is not apart and in order", prefixes, got)
			}
		}
		// The probe, and the addresses next to every border.
		probes := []uint32{probe}
		for _, v := range got {
			probes = append(probes, v.first-1, v.first, v.last, v.last+1)
		}
		for _, p := range probes {
			want := slices.ContainsFunc(prefixes, func(x netip.Prefix) bool { return x.Contains(addrOf(p)) })
			have := slices.ContainsFunc(got, func(v interval) bool { return v.first <= p && p <= v.last })
			if want != have {
				t.Errorf("%v: %s is in %v: %v, want %v", prefixes, addrOf(p), got, have, want)
			}
		}
	})
}

func TestCheckRange(t *testing.T) {
	for text, valid := range map[string]bool{
		"10.64.0.0/18": true, "10.0.0.0/15": true, "10.0.0.0/30": true,
		"10.0.0.0/14": false, "10.0.0.0/31": false, "10.64.0.1/18": false, "fd00::/64": false,
		"127.0.0.0/18": false, "169.254.0.0/18": false, "224.0.0.0/18": false, "240.0.0.0/18": false, "0.0.0.0/18": false,
	} {
		err := checkRange(netip.MustParsePrefix(text))
		if valid != (err == nil) || err != nil && !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: got %v, want valid %v", text, err, valid)
		}
	}
	if err := checkRange(netip.Prefix{}); !fault.Is(err, fault.Invalid) {
		t.Errorf("no range: got %v", err)
	}
	for text, valid := range map[string]bool{"10.0.0.0/8": true, "0.0.0.0/0": true, "fd00::/8": true,
		"::ffff:10.0.0.0/104": false} {
		if err := checkDeny([]netip.Prefix{netip.MustParsePrefix(text)}); valid != (err == nil) ||
			err != nil && !fault.Is(err, fault.Invalid) {
			t.Errorf("denying %s: got %v, want valid %v", text, err, valid)
		}
	}
	if err := checkDeny([]netip.Prefix{{}}); !fault.Is(err, fault.Invalid) {
		t.Errorf("denying nothing: got %v", err)
	}
	for _, name := range []string{"", "abc12", "abc1234", "ABC123", "abc-12", "abc12/", "äbc12"} {
		if err := checkInstance(name); !fault.Is(err, fault.Invalid) {
			t.Errorf("instance %q: got %v, want Invalid", name, err)
		}
	}
}

func TestCandidates(t *testing.T) {
	all := Candidates()
	if len(all) != 72 {
		t.Errorf("%d candidates, want 72", len(all))
	}
	for i, p := range all {
		if err := checkRange(p); err != nil {
			t.Error(err)
		}
		for _, other := range all[:i] {
			if p.Overlaps(other) {
				t.Errorf("%s overlaps %s", p, other)
			}
		}
	}
	if d := cmp.Diff([]string{"10.64.0.0/18", "10.64.64.0/18", "10.79.192.0/18", "198.18.0.0/18", "198.19.192.0/18"},
		[]string{all[0].String(), all[1].String(), all[63].String(), all[64].String(), all[71].String()}); d != "" {
		t.Errorf("candidates (-want +got):\n%s", d)
	}
}

// TestRefuses checks each reason against a block, without a host.
func TestRefuses(t *testing.T) {
	s := &survey{
		addrs:   []netip.Addr{netip.MustParseAddr("10.64.1.1")},
		routes:  []netip.Prefix{netip.MustParsePrefix("10.64.64.0/20"), netip.MustParsePrefix("172.16.0.0/12")},
		claimed: []netip.Prefix{netip.MustParsePrefix("10.65.0.0/24")},
	}
	for _, c := range []struct {
		block           string
		strict, refused bool
	}{
		{"10.64.0.0/18", false, true},   // the host's address
		{"10.64.64.0/18", false, true},  // a route inside
		{"10.64.64.0/22", true, true},   // part of a route, chosen
		{"10.64.64.0/22", false, false}, // part of a route, configured
		{"10.65.0.0/18", false, true},   // claimed
		{"172.20.0.0/18", true, true},
		{"172.20.0.0/18", false, false},
		{"10.66.0.0/18", true, false},
	} {
		if got := s.refuses(netip.MustParsePrefix(c.block), c.strict); (got != "") != c.refused {
			t.Errorf("%s, strict %v: %q, want refused %v", c.block, c.strict, got, c.refused)
		}
	}
}
