package network

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// linkPrefix and namePrefix are the first parts of all names on the host.
	linkPrefix = "cay"
	namePrefix = "cay-"

	// netnsDir is the directory in which iproute2 looks for named namespaces, so that `ip netns
	// exec cay-…` works for an operator.
	netnsDir = "/run/netns"

	// shortestPrefix is the prefix length of the largest range: 65,536 slots, so that an index
	// has at most five digits and "cay" + instance + "-" + index fits into the 15 characters of a
	// link's name.
	shortestPrefix = 15
	// longestPrefix is the prefix length of the smallest range: two slots.
	longestPrefix = 30
)

var instanceForm = regexp.MustCompile(`^[a-z0-9]{6}$`)

// checkInstance refuses names that could not be recognised again on the host.
func checkInstance(instance string) error {
	if !instanceForm.MatchString(instance) {
		return fault.InvalidField("instance", "%q is not 6 characters of a-z and 0-9", instance)
	}
	return nil
}

// checkRange refuses blocks that cannot be divided into slots.
func checkRange(p netip.Prefix) error {
	switch {
	case !p.IsValid() || !p.Addr().Is4():
		return fault.InField(fault.CodeInvalidRange, "network.range", "%v is not an IPv4 range", p)
	case p != p.Masked():
		return fault.InField(fault.CodeInvalidRange, "network.range", "%v has host bits set: write %v", p, p.Masked())
	case p.Bits() < shortestPrefix || p.Bits() > longestPrefix:
		return fault.InField(fault.CodeInvalidRange, "network.range", "%v must be between /%d and /%d", p, shortestPrefix,
			longestPrefix)
	}
	for _, never := range neverRanges {
		if p.Overlaps(never) {
			return fault.InField(fault.CodeInvalidRange, "network.range",
				"%v overlaps %v, which sandboxes may never use", p, never)
		}
	}
	return nil
}

// checkDeny refuses too many prefixes, and those that would silently have no effect.
func checkDeny(prefixes []netip.Prefix) error {
	if len(prefixes) > MaxDeny {
		return fault.InField(fault.CodeInvalidRange, "network.always_deny",
			"there are %d ranges that no sandbox may reach, and may be %d", len(prefixes), MaxDeny)
	}
	for _, p := range prefixes {
		if !p.IsValid() || p.Addr().Is4In6() {
			return fault.InField(fault.CodeInvalidRange, "network.always_deny", "%v is not a range of IPv4 or IPv6 addresses", p)
		}
	}
	return nil
}

// layout computes names and addresses of one instance's slots. The block is valid.
type layout struct {
	instance string
	block    netip.Prefix
}

// capacity returns the number of slots, two addresses each.
func (l layout) capacity() int { return 1 << (31 - l.block.Bits()) }

// slot returns the slot of an index, which is below the capacity.
func (l layout) slot(index int) *Slot {
	base := l.block.Addr().As4()
	first := binary.BigEndian.Uint32(base[:]) + 2*uint32(index)
	return &Slot{
		Index:     index,
		Namespace: filepath.Join(netnsDir, l.namespace(index)),
		Addr:      addrOf(first + 1),
		Gateway:   addrOf(first),
		Link:      l.link(index),
	}
}

// index returns the index of the slot whose sandbox has the address.
func (l layout) index(a netip.Addr) (int, bool) {
	if !l.block.Contains(a) {
		return 0, false
	}
	base, b := l.block.Addr().As4(), a.As4()
	offset := binary.BigEndian.Uint32(b[:]) - binary.BigEndian.Uint32(base[:])
	return int(offset / 2), offset%2 == 1
}

// links returns the first part of all names of the instance's links. It ends with a dash, so that
// the rules can match these links, and no others, by this prefix.
func (l layout) links() string              { return linkPrefix + l.instance + "-" }
func (l layout) link(index int) string      { return l.links() + strconv.Itoa(index) }
func (l layout) table() string              { return namePrefix + l.instance }
func (l layout) namespaces() string         { return namePrefix + l.instance + "-" }
func (l layout) namespace(index int) string { return l.namespaces() + strconv.Itoa(index) }

func addrOf(n uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], n)
	return netip.AddrFrom4(b)
}

// parseLink splits a link's name; ok is false for a name of another form.
func parseLink(name string) (instance string, index int, ok bool) {
	rest, found := strings.CutPrefix(name, linkPrefix)
	if !found {
		return "", 0, false
	}
	return parseIndexed(rest)
}

// parseNamespace splits a namespace's file name.
func parseNamespace(name string) (instance string, index int, ok bool) {
	rest, found := strings.CutPrefix(name, namePrefix)
	if !found {
		return "", 0, false
	}
	return parseIndexed(rest)
}

// parseTable splits a table's name.
func parseTable(name string) (instance string, ok bool) {
	instance, found := strings.CutPrefix(name, namePrefix)
	return instance, found && instanceForm.MatchString(instance)
}

// parseIndexed parses "<instance>-<index>" exactly as this package writes it. A name with a
// leading zero or a sign belongs to another program.
func parseIndexed(s string) (string, int, bool) {
	instance, digits, found := strings.Cut(s, "-")
	if !found || !instanceForm.MatchString(instance) {
		return "", 0, false
	}
	index, err := strconv.Atoi(digits)
	if err != nil || index < 0 || index >= 1<<(31-shortestPrefix) || strconv.Itoa(index) != digits {
		return "", 0, false
	}
	return instance, index, true
}

// interval is a closed range of IPv4 addresses.
type interval struct{ first, last uint32 }

// merge converts prefixes to disjoint intervals in ascending order, as an interval set of
// nftables needs them. It leaves out IPv6 prefixes.
func merge(prefixes []netip.Prefix) []interval {
	var in []interval
	for _, p := range prefixes {
		if !p.Addr().Is4() {
			continue
		}
		b := p.Masked().Addr().As4()
		first := binary.BigEndian.Uint32(b[:])
		in = append(in, interval{first, first | uint32(1<<(32-p.Bits())-1)})
	}
	return mergeIntervals(in)
}

func mergeIntervals(in []interval) []interval {
	slices.SortFunc(in, func(a, b interval) int { return cmp.Compare(a.first, b.first) })
	var out []interval
	for _, i := range in {
		// An interval that touches the previous one joins it. last+1 would overflow at the end of
		// the address space.
		if n := len(out); n > 0 && (i.first <= out[n-1].last || i.first-1 == out[n-1].last) {
			out[n-1].last = max(out[n-1].last, i.last)
			continue
		}
		out = append(out, i)
	}
	return out
}
