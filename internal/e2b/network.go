package e2b

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"strings"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// networkBody is the object network of a create.
type networkBody struct {
	AllowOut           []string                     `json:"allowOut,omitempty"`
	DenyOut            []string                     `json:"denyOut,omitempty"`
	AllowPublicTraffic *bool                        `json:"allowPublicTraffic,omitempty"`
	MaskRequestHost    string                       `json:"maskRequestHost,omitempty"`
	Rules              map[string][]json.RawMessage `json:"rules,omitempty"`
	EgressProxy        json.RawMessage              `json:"egressProxy,omitempty"`
	HTTPSPorts         []int                        `json:"httpsPorts,omitempty"`
}

// updateBody is E2B's NetworkUpdate. It replaces the former settings.
type updateBody struct {
	AllowOut            []string                     `json:"allowOut"`
	DenyOut             []string                     `json:"denyOut"`
	Rules               map[string][]json.RawMessage `json:"rules"`
	EgressProxy         json.RawMessage              `json:"egressProxy"`
	AllowInternetAccess *bool                        `json:"allow_internet_access"`
}

var everything = netip.MustParsePrefix("0.0.0.0/0")

// egress returns the policy for what a request says about the network, nil if it says nothing, so
// that the template's policy applies.
//
// In this API allow rules take precedence over deny rules, and all other traffic passes. In the
// core, deny rules take precedence. So egress subtracts the allowed ranges from the denied ones.
func egress(internet *bool, n *networkBody) (*sandbox.Egress, error) {
	closed := internet != nil && !*internet
	if n == nil {
		n = &networkBody{}
	}
	if err := refuseNetwork(n); err != nil {
		return nil, err
	}
	allow, names, err := parseAllowed(n.AllowOut)
	if err != nil {
		return nil, err
	}
	var deny []netip.Prefix
	for _, text := range n.DenyOut {
		p, isName, err := parseRange(text)
		if err != nil || isName {
			return nil, fault.InvalidField("network.denyOut", "%.100q is not an address or a range", text)
		}
		if p.Addr().Is4() { // all IPv6 is denied
			deny = append(deny, p)
		}
		closed = closed || p == everything
	}
	switch {
	case closed:
		return renamed(sandbox.NewEgress(allow, nil, names))
	case len(names) > 0:
		return nil, fault.InvalidField("network.allowOut",
			"domains can be allowed when all else is denied: put 0.0.0.0/0 into denyOut")
	case len(deny) == 0:
		return nil, nil
	}
	var left []netip.Prefix
	for _, p := range deny {
		left = subtract(left, p, allow)
		if len(left) > sandbox.MaxEgressCIDRs {
			return nil, fault.InvalidField("network.denyOut",
				"is more than %d ranges after allowOut is subtracted", sandbox.MaxEgressCIDRs)
		}
	}
	if len(left) == 0 {
		return &sandbox.Egress{Mode: sandbox.AllowAll}, nil
	}
	return renamed(sandbox.NewEgress([]netip.Prefix{everything}, left, nil))
}

func refuseNetwork(n *networkBody) error {
	switch {
	case len(n.Rules) > 0:
		return unsupported("network.rules: requests are not changed on their way out")
	case len(n.EgressProxy) > 0 && string(n.EgressProxy) != "null":
		return unsupported("network.egressProxy: traffic goes out through no proxy of the caller's")
	case len(n.HTTPSPorts) > 0:
		return unsupported("network.httpsPorts: servers in sandboxes are spoken to in plain HTTP")
	}
	return nil
}

// renamed returns a policy, or its error with this API's names of fields.
func renamed(e sandbox.Egress, err error) (*sandbox.Egress, error) {
	if f := fault.As(err); f != nil {
		named := f.Because(err)
		named.Code = fault.CodeInvalidNetwork
		named.Field = strings.NewReplacer("egress.allow_cidrs", "network.allowOut", "egress.allow_domains",
			"network.allowOut",
			"egress.deny_cidrs", "network.denyOut").Replace(f.Field)
		return nil, named
	}
	return &e, err
}

// parseAllowed parses a list of ranges and names.
func parseAllowed(list []string) (ranges []netip.Prefix, names []string, err error) {
	for _, text := range list {
		p, isName, err := parseRange(text)
		switch {
		case err != nil:
			return nil, nil, fault.InvalidField("network.allowOut", "%.100q is not an address, a range or a domain", text)
		case isName:
			names = append(names, text)
		case !p.Addr().Is4():
			return nil, nil, fault.InvalidField("network.allowOut", "%q is not IPv4: sandboxes have no IPv6", text)
		default:
			ranges = append(ranges, p)
		}
	}
	return ranges, names, nil
}

// parseRange parses an address or a range. Any other text is a name.
func parseRange(text string) (p netip.Prefix, isName bool, err error) {
	if addr, err := netip.ParseAddr(text); err == nil {
		return netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()), false, nil
	}
	if strings.Contains(text, "/") {
		p, err = netip.ParsePrefix(text)
		return p.Masked(), false, err
	}
	return p, true, nil
}

// subtract appends to list the parts of p outside the ranges of without.
func subtract(list []netip.Prefix, p netip.Prefix, without []netip.Prefix) []netip.Prefix {
	touched := false
	for _, w := range without {
		if w.Overlaps(p) {
			if w.Bits() <= p.Bits() {
				return list
			}
			touched = true
		}
	}
	if !touched || len(list) > sandbox.MaxEgressCIDRs {
		return append(list, p)
	}
	low, high := halves(p)
	return subtract(subtract(list, low, without), high, without)
}

// halves splits an IPv4 range of more than one address in two.
func halves(p netip.Prefix) (low, high netip.Prefix) {
	bits := p.Bits() + 1
	b := p.Addr().As4()
	b[(bits-1)/8] |= 1 << (7 - (bits-1)%8)
	return netip.PrefixFrom(p.Addr(), bits), netip.PrefixFrom(netip.AddrFrom4(b), bits)
}

// setNetwork answers PUT /sandboxes/{id}/network.
func (s *Handler) setNetwork(w http.ResponseWriter, r *http.Request) error {
	var in updateBody
	if err := read(w, r, &in); err != nil {
		return err
	}
	id := sandboxID(r)
	sb, err := s.present(r, id)
	if err != nil {
		return err
	}
	opts := optionsOf(sb)
	now := networkBody{AllowOut: in.AllowOut, DenyOut: in.DenyOut, Rules: in.Rules, EgressProxy: in.EgressProxy}
	policy, err := egress(in.AllowInternetAccess, &now)
	if err != nil {
		return err
	}
	if policy == nil {
		policy = &sandbox.Egress{Mode: sandbox.AllowAll}
	}
	if _, err := s.Sandboxes.SetEgress(r.Context(), orgOf(r), id, *policy); err != nil {
		return ended(err, id)
	}
	if opts.Made {
		// Settings that do not concern egress stay.
		if old := opts.Network; old != nil {
			now.AllowPublicTraffic, now.MaskRequestHost = old.AllowPublicTraffic, old.MaskRequestHost
		}
		opts.Network, opts.Internet = &now, in.AllowInternetAccess
		if _, err := s.Sandboxes.SetFrontData(r.Context(), orgOf(r), id, opts.String()); err != nil {
			return ended(err, id)
		}
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}
