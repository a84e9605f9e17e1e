package sandbox

import (
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/net/idna"

	"github.com/cayhq/cay/internal/fault"
)

// EgressMode selects what happens to traffic that no list of the policy matches.
type EgressMode string

// The egress modes.
const (
	AllowAll EgressMode = "allow_all"
	DenyAll  EgressMode = "deny_all"
)

// Limits of one policy. The kernel looks a range up in a tree and would take more; the size of the
// row and of the answer that shows it sets the limits. Higher values make both larger.
const (
	MaxEgressCIDRs   = 10_000 // in each list
	MaxEgressPorts   = 1_000
	MaxEgressDomains = 100 // each is compared with every requested name
)

// Egress holds a sandbox's outbound policy. Denies are evaluated before allows.
type Egress struct {
	Mode       EgressMode     `json:"mode"`
	AllowCIDRs []netip.Prefix `json:"allow_cidrs,omitempty"`
	DenyCIDRs  []netip.Prefix `json:"deny_cidrs,omitempty"`
	// AllowPorts restricts AllowCIDRs to these destination TCP ports. An empty list allows every
	// protocol and port.
	AllowPorts []uint16 `json:"allow_ports,omitempty"`
	// AllowDomains lists domains that may be reached by name at any address. An entry matches the
	// exact name; one that begins with "*." matches every name below it, but not the name itself.
	// Entries are in lower case and ASCII.
	AllowDomains []string `json:"allow_domains,omitempty"`
}

// Equal reports whether both policies have the same entries in the same order.
func (e Egress) Equal(o Egress) bool {
	return e.Mode == o.Mode && slices.Equal(e.AllowCIDRs, o.AllowCIDRs) && slices.Equal(e.DenyCIDRs, o.DenyCIDRs) &&
		slices.Equal(e.AllowPorts, o.AllowPorts) && slices.Equal(e.AllowDomains, o.AllowDomains)
}

// Clone returns a copy that shares no list.
func (e Egress) Clone() Egress {
	e.AllowCIDRs, e.DenyCIDRs = slices.Clone(e.AllowCIDRs), slices.Clone(e.DenyCIDRs)
	e.AllowPorts, e.AllowDomains = slices.Clone(e.AllowPorts), slices.Clone(e.AllowDomains)
	return e
}

// metadataRange contains the metadata services of cay and of cloud providers. No policy may name
// it.
var metadataRange = netip.MustParsePrefix("169.254.0.0/16")

// EgressRequest holds a policy as a user wrote it.
type EgressRequest struct {
	Mode                  string
	AllowCIDRs, DenyCIDRs []string
	AllowPorts            []int
	AllowDomains          []string
}

// Parse checks the policy and returns it. Errors are Invalid, code "invalid_egress", and name the
// field below "egress".
func (r EgressRequest) Parse() (Egress, error) {
	e := Egress{Mode: EgressMode(r.Mode)}
	switch e.Mode {
	case AllowAll:
		if len(r.AllowCIDRs)+len(r.DenyCIDRs)+len(r.AllowPorts)+len(r.AllowDomains) > 0 {
			return Egress{}, fault.InvalidField("egress.mode",
				"allow_all takes no lists: use deny_all with allow_cidrs or allow_domains")
		}
	case DenyAll:
	default:
		return Egress{}, fault.InvalidField("egress.mode", "must be allow_all or deny_all, not %.40q", r.Mode)
	}
	var err error
	if e.AllowCIDRs, err = parseCIDRs(allowField, r.AllowCIDRs); err != nil {
		return Egress{}, err
	}
	if e.DenyCIDRs, err = parseCIDRs(denyField, r.DenyCIDRs); err != nil {
		return Egress{}, err
	}
	return e.with(r.AllowPorts, r.AllowDomains)
}

// NewEgress returns a policy that denies everything but the allowed ranges and domains. Its errors
// are those of [EgressRequest.Parse].
func NewEgress(allow, deny []netip.Prefix, domains []string) (Egress, error) {
	err := checkCIDRs(allowField, allow)
	if err == nil {
		err = checkCIDRs(denyField, deny)
	}
	if err != nil {
		return Egress{}, err
	}
	return Egress{Mode: DenyAll, AllowCIDRs: allow, DenyCIDRs: deny}.with(nil, domains)
}

const (
	allowField = "egress.allow_cidrs"
	denyField  = "egress.deny_cidrs"
)

// with returns the policy with ports and domains, if all of it is valid together.
func (e Egress) with(ports []int, domains []string) (Egress, error) {
	for i, p := range e.DenyCIDRs {
		if p.Overlaps(metadataRange) {
			return Egress{}, fault.InvalidField(index(denyField, i),
				"%s touches the metadata range %s, which is cay's own", p, metadataRange)
		}
	}
	if len(ports) > 0 && len(e.AllowCIDRs) == 0 {
		return Egress{}, fault.InvalidField("egress.allow_ports", "restricts allow_cidrs, which is empty")
	}
	var err error
	if e.AllowPorts, err = parsePorts("egress.allow_ports", ports); err != nil {
		return Egress{}, err
	}
	if e.AllowDomains, err = parseDomains("egress.allow_domains", domains); err != nil {
		return Egress{}, err
	}
	return e, nil
}

// short returns an error for a list of more than limit entries.
func short(field string, length, limit int) error {
	if length > limit {
		return fault.InvalidField(field, "has %d entries; at most %d", length, limit)
	}
	return nil
}

func parseCIDRs(field string, texts []string) ([]netip.Prefix, error) {
	if err := short(field, len(texts), MaxEgressCIDRs); err != nil {
		return nil, err
	}
	var out []netip.Prefix
	for i, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, fault.InvalidField(index(field, i), "%.100q is not a CIDR such as 10.0.0.0/8", text)
		}
		if err := checkCIDR(index(field, i), p, text); err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

func checkCIDRs(field string, ranges []netip.Prefix) error {
	if err := short(field, len(ranges), MaxEgressCIDRs); err != nil {
		return err
	}
	for i, p := range ranges {
		if err := checkCIDR(index(field, i), p, p.String()); err != nil {
			return err
		}
	}
	return nil
}

// checkCIDR refuses a range that no policy may have; text is how the user wrote it.
func checkCIDR(field string, p netip.Prefix, text string) error {
	switch {
	case !p.Addr().Is4():
		return fault.InvalidField(field, "%q is not IPv4: sandboxes have no IPv6", text)
	case p != p.Masked():
		return fault.InvalidField(field, "%q has host bits set: write %s", text, p.Masked())
	}
	return nil
}

func parsePorts(field string, ports []int) ([]uint16, error) {
	if err := short(field, len(ports), MaxEgressPorts); err != nil {
		return nil, err
	}
	var out []uint16
	for i, port := range ports {
		if port < 1 || port > 65535 {
			return nil, fault.InvalidField(index(field, i), "port %d is outside 1-65535", port)
		}
		out = append(out, uint16(port))
	}
	return out, nil
}

func parseDomains(field string, texts []string) ([]string, error) {
	if err := short(field, len(texts), MaxEgressDomains); err != nil {
		return nil, err
	}
	var out []string
	for i, text := range texts {
		bare, isWild := strings.CutPrefix(text, "*.")
		_, err := netip.ParseAddr(strings.TrimSuffix(bare, "."))
		if err == nil {
			return nil, fault.InvalidField(index(field, i),
				"%q is an address: it belongs in allow_cidrs", text)
		}
		name, err := idna.Lookup.ToASCII(strings.TrimSuffix(bare, "."))
		if err == nil {
			// idna encodes some names into a form that it does not accept itself. Stored names must be
			// accepted.
			_, err = idna.Lookup.ToASCII(name)
		}
		if err != nil || name == "" || len(name) > maxDomain || !domainName(name) {
			return nil, fault.InvalidField(index(field, i),
				"%.100q is not a name such as example.com, nor *.example.com for the names below it", text)
		}
		if isWild {
			name = "*." + name
		}
		out = append(out, name)
	}
	return out, nil
}

// maxDomain limits the length of a DNS name, in bytes of text without the last dot. The DNS allows
// no longer names.
const maxDomain = 253

// domainName reports whether a name in ASCII and lower case has labels that the DNS allows for
// hosts: 1 to 63 letters, digits and hyphens, no hyphen at either end. It refuses a last label of
// digits alone, because programs take such a name for an address.
func domainName(name string) bool {
	labels := strings.Split(name, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' ||
			strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
			return false
		}
	}
	return strings.Trim(labels[len(labels)-1], "0123456789") != ""
}
