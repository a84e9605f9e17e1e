package sandbox

import (
	"net/netip"

	"github.com/cayhq/cay/internal/fault"
)

// EgressMode says what happens to traffic no list speaks of.
type EgressMode string

// The egress modes.
const (
	AllowAll EgressMode = "allow_all"
	DenyAll  EgressMode = "deny_all"
)

// Egress is a sandbox's outbound policy. Denies are evaluated before allows.
type Egress struct {
	Mode       EgressMode     `json:"mode"`
	AllowCIDRs []netip.Prefix `json:"allow_cidrs,omitempty"`
	DenyCIDRs  []netip.Prefix `json:"deny_cidrs,omitempty"`
	// AllowPorts restricts AllowCIDRs to these destination TCP ports; empty is
	// every protocol and port.
	AllowPorts []uint16 `json:"allow_ports,omitempty"`
}

// metadataRange holds cay's own metadata service and the cloud providers'; no
// policy may speak of it.
var metadataRange = netip.MustParsePrefix("169.254.0.0/16")

const codeEgress = "invalid_egress"

// ParseEgress checks a policy as a user wrote it. Errors are Invalid, code
// "invalid_egress", and name the field below "egress".
func ParseEgress(mode string, allow, deny []string, ports []int) (Egress, error) {
	e := Egress{Mode: EgressMode(mode)}
	switch e.Mode {
	case AllowAll:
		if len(allow)+len(deny)+len(ports) > 0 {
			return Egress{}, fault.InField(codeEgress, "egress.mode", "allow_all takes no lists: use deny_all with allow_cidrs")
		}
	case DenyAll:
	default:
		return Egress{}, fault.InField(codeEgress, "egress.mode", "must be allow_all or deny_all, not %q", mode)
	}
	var err error
	if e.AllowCIDRs, err = parseCIDRs("egress.allow_cidrs", allow); err != nil {
		return Egress{}, err
	}
	if e.DenyCIDRs, err = parseCIDRs("egress.deny_cidrs", deny); err != nil {
		return Egress{}, err
	}
	for i, p := range e.DenyCIDRs {
		if p.Overlaps(metadataRange) {
			return Egress{}, fault.InField(codeEgress, index("egress.deny_cidrs", i), "%s touches the metadata range %s, which is cay's own", p, metadataRange)
		}
	}
	if len(ports) > 0 && len(allow) == 0 {
		return Egress{}, fault.InField(codeEgress, "egress.allow_ports", "restricts allow_cidrs, which is empty")
	}
	for i, port := range ports {
		if port < 1 || port > 65535 {
			return Egress{}, fault.InField(codeEgress, index("egress.allow_ports", i), "port %d is outside 1-65535", port)
		}
		e.AllowPorts = append(e.AllowPorts, uint16(port))
	}
	return e, nil
}

func parseCIDRs(field string, texts []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for i, text := range texts {
		p, err := netip.ParsePrefix(text)
		switch {
		case err != nil:
			return nil, fault.InField(codeEgress, index(field, i), "%q is not a CIDR such as 10.0.0.0/8", text)
		case !p.Addr().Is4():
			return nil, fault.InField(codeEgress, index(field, i), "%q is not IPv4: sandboxes have no IPv6", text)
		case p != p.Masked():
			return nil, fault.InField(codeEgress, index(field, i), "%q has host bits set: write %s", text, p.Masked())
		}
		out = append(out, p)
	}
	return out, nil
}
