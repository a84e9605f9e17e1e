package sandbox_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

func TestParseEgress(t *testing.T) {
	for name, tt := range map[string]struct {
		mode        string
		allow, deny []string
		ports       []int
		domains     []string
		field       string // "" if the policy is valid
	}{
		"allow all":              {mode: "allow_all"},
		"deny all":               {mode: "deny_all"},
		"lists":                  {mode: "deny_all", allow: []string{"0.0.0.0/0"}, deny: []string{"10.0.0.0/8"}, ports: []int{1, 443, 65535}},
		"one address":            {mode: "deny_all", allow: []string{"192.0.2.1/32"}},
		"deny without allow":     {mode: "deny_all", deny: []string{"10.0.0.0/8"}},
		"allow the metadata":     {mode: "deny_all", allow: []string{"169.254.0.0/16"}}, // has no effect
		"no mode":                {field: "egress.mode"},
		"unknown mode":           {mode: "open", field: "egress.mode"},
		"allow all, allow list":  {mode: "allow_all", allow: []string{"10.0.0.0/8"}, field: "egress.mode"},
		"allow all, deny list":   {mode: "allow_all", deny: []string{"10.0.0.0/8"}, field: "egress.mode"},
		"allow all, ports":       {mode: "allow_all", ports: []int{80}, field: "egress.mode"},
		"ports without allow":    {mode: "deny_all", ports: []int{80}, field: "egress.allow_ports"},
		"port 0":                 {mode: "deny_all", allow: []string{"10.0.0.0/8"}, ports: []int{80, 0}, field: "egress.allow_ports[1]"},
		"port 65536":             {mode: "deny_all", allow: []string{"10.0.0.0/8"}, ports: []int{65536}, field: "egress.allow_ports[0]"},
		"port -1":                {mode: "deny_all", allow: []string{"10.0.0.0/8"}, ports: []int{-1}, field: "egress.allow_ports[0]"},
		"no CIDR":                {mode: "deny_all", allow: []string{"10.0.0.1"}, field: "egress.allow_cidrs[0]"},
		"host bits":              {mode: "deny_all", allow: []string{"10.0.0.0/8", "10.0.0.1/8"}, field: "egress.allow_cidrs[1]"},
		"too long":               {mode: "deny_all", allow: []string{"10.0.0.0/33"}, field: "egress.allow_cidrs[0]"},
		"leading zero":           {mode: "deny_all", allow: []string{"010.0.0.0/8"}, field: "egress.allow_cidrs[0]"},
		"IPv6":                   {mode: "deny_all", allow: []string{"2001:db8::/32"}, field: "egress.allow_cidrs[0]"},
		"IPv4 in IPv6":           {mode: "deny_all", deny: []string{"::ffff:10.0.0.0/104"}, field: "egress.deny_cidrs[0]"},
		"deny the metadata":      {mode: "deny_all", deny: []string{"169.254.169.254/32"}, field: "egress.deny_cidrs[0]"},
		"deny around metadata":   {mode: "deny_all", deny: []string{"10.0.0.0/8", "169.0.0.0/8"}, field: "egress.deny_cidrs[1]"},
		"deny everything at all": {mode: "deny_all", deny: []string{"0.0.0.0/0"}, field: "egress.deny_cidrs[0]"},

		"domains":               {mode: "deny_all", domains: []string{"example.com", "*.example.com", "db", "xn--bcher-kva.example", "*.com"}},
		"domains beside ranges": {mode: "deny_all", allow: []string{"10.0.0.0/8"}, deny: []string{"10.1.0.0/16"}, ports: []int{443}, domains: []string{"example.com"}},
		"allow all, domains":    {mode: "allow_all", domains: []string{"example.com"}, field: "egress.mode"},
		"domains, ports alone":  {mode: "deny_all", domains: []string{"example.com"}, ports: []int{443}, field: "egress.allow_ports"},
		"every domain":          {mode: "deny_all", domains: []string{"*"}, field: "egress.allow_domains[0]"},
		"every domain, dotted":  {mode: "deny_all", domains: []string{"*."}, field: "egress.allow_domains[0]"},
		"star inside":           {mode: "deny_all", domains: []string{"a.com", "a.*.com"}, field: "egress.allow_domains[1]"},
		"star in a label":       {mode: "deny_all", domains: []string{"a*.com"}, field: "egress.allow_domains[0]"},
		"two stars":             {mode: "deny_all", domains: []string{"*.*.com"}, field: "egress.allow_domains[0]"},
		"empty domain":          {mode: "deny_all", domains: []string{""}, field: "egress.allow_domains[0]"},
		"root domain":           {mode: "deny_all", domains: []string{"."}, field: "egress.allow_domains[0]"},
		"empty label":           {mode: "deny_all", domains: []string{"a..com"}, field: "egress.allow_domains[0]"},
		"leading dot":           {mode: "deny_all", domains: []string{".example.com"}, field: "egress.allow_domains[0]"},
		"space":                 {mode: "deny_all", domains: []string{"exa mple.com"}, field: "egress.allow_domains[0]"},
		"a URL":                 {mode: "deny_all", domains: []string{"https://example.com"}, field: "egress.allow_domains[0]"},
		"a port":                {mode: "deny_all", domains: []string{"example.com:443"}, field: "egress.allow_domains[0]"},
		"underscore":            {mode: "deny_all", domains: []string{"_dmarc.example.com"}, field: "egress.allow_domains[0]"},
		"hyphen first":          {mode: "deny_all", domains: []string{"-a.example.com"}, field: "egress.allow_domains[0]"},
		"bad punycode":          {mode: "deny_all", domains: []string{"xn--a.example.com"}, field: "egress.allow_domains[0]"},
		"an address":            {mode: "deny_all", domains: []string{"192.0.2.1"}, field: "egress.allow_domains[0]"},
		"an IPv6 address":       {mode: "deny_all", domains: []string{"2001:db8::1"}, field: "egress.allow_domains[0]"},
		"half an address":       {mode: "deny_all", domains: []string{"192.0.2"}, field: "egress.allow_domains[0]"},
		"label too long":        {mode: "deny_all", domains: []string{strings.Repeat("a", 64) + ".com"}, field: "egress.allow_domains[0]"},
		"name too long":         {mode: "deny_all", domains: []string{strings.Repeat("abcdefg.", 32) + "com"}, field: "egress.allow_domains[0]"},

		"most ranges":      {mode: "deny_all", allow: slices.Repeat([]string{"10.0.0.0/8"}, 10_000), deny: slices.Repeat([]string{"10.0.0.0/8"}, 10_000)},
		"too many allows":  {mode: "deny_all", allow: slices.Repeat([]string{"10.0.0.0/8"}, 10_001), field: "egress.allow_cidrs"},
		"too many denies":  {mode: "deny_all", deny: slices.Repeat([]string{"10.0.0.0/8"}, 10_001), field: "egress.deny_cidrs"},
		"most ports":       {mode: "deny_all", allow: []string{"10.0.0.0/8"}, ports: slices.Repeat([]int{443}, 1000)},
		"too many ports":   {mode: "deny_all", allow: []string{"10.0.0.0/8"}, ports: slices.Repeat([]int{443}, 1001), field: "egress.allow_ports"},
		"most domains":     {mode: "deny_all", domains: slices.Repeat([]string{"example.com"}, 100)},
		"too many domains": {mode: "deny_all", domains: slices.Repeat([]string{"example.com"}, 101), field: "egress.allow_domains"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := sandbox.EgressRequest{Mode: tt.mode, AllowCIDRs: tt.allow, DenyCIDRs: tt.deny, AllowPorts: tt.ports,
				AllowDomains: tt.domains}.Parse()
			e := fault.As(err)
			switch {
			case tt.field == "" && err != nil:
				t.Errorf("refused: %v", err)
			case tt.field != "" && (e == nil || e.Kind != fault.Invalid || e.Code != "invalid_egress" || e.Field != tt.field):
				t.Errorf("got %v, want invalid_egress in %s", err, tt.field)
			}
		})
	}
}

func TestDomainsAreCanonical(t *testing.T) {
	got, err := sandbox.EgressRequest{Mode: "deny_all",
		AllowDomains: []string{"Example.COM", "*.Bücher.example.", "EXAMPLE。org"}}.Parse()
	if want := []string{"example.com", "*.xn--bcher-kva.example", "example.org"}; err != nil ||
		!slices.Equal(got.AllowDomains, want) {
		t.Errorf("got %q, %v, want %q", got.AllowDomains, err, want)
	}
}

// FuzzParseEgress checks that accepted policies are canonical, IPv4 only, and leave the metadata
// range alone.
func FuzzParseEgress(f *testing.F) {
	f.Add("deny_all", "10.0.0.0/8,0.0.0.0/0", "192.168.0.0/16", 443, "*.Example.com,xn--bcher-kva.example")
	f.Add("allow_all", "", "", 0, "")
	f.Add("deny_all", "::/0", "169.254.0.0/15", 65536, "*")
	f.Fuzz(func(t *testing.T, mode, allow, deny string, port int, domains string) {
		split := func(s string) []string {
			if s == "" {
				return nil
			}
			return strings.Split(s, ",")
		}
		var ports []int
		if port != 0 {
			ports = []int{port}
		}
		e, err := sandbox.EgressRequest{Mode: mode, AllowCIDRs: split(allow), DenyCIDRs: split(deny), AllowPorts: ports,
			AllowDomains: split(domains)}.Parse()
		if err != nil {
			if fe := fault.As(err); fe == nil || fe.Kind != fault.Invalid || !strings.HasPrefix(fe.Field, "egress.") {
				t.Errorf("refused with %v", err)
			}
			return
		}
		for _, p := range append(e.AllowCIDRs, e.DenyCIDRs...) {
			if !p.Addr().Is4() || p != p.Masked() {
				t.Errorf("accepted %s", p)
			}
		}
		for _, p := range e.DenyCIDRs {
			if p.Overlaps(netip.MustParsePrefix("169.254.0.0/16")) {
				t.Errorf("accepted a deny of %s", p)
			}
		}
		for _, d := range e.AllowDomains {
			bare := strings.TrimPrefix(d, "*.")
			if bare == "" || len(bare) > 253 || strings.Trim(bare, "abcdefghijklmnopqrstuvwxyz0123456789-.") != "" {
				t.Errorf("accepted the domain %q", d)
			}
		}
		again := sandbox.EgressRequest{Mode: string(e.Mode), AllowPorts: ports, AllowDomains: e.AllowDomains}
		for _, p := range e.AllowCIDRs {
			again.AllowCIDRs = append(again.AllowCIDRs, p.String())
		}
		for _, p := range e.DenyCIDRs {
			again.DenyCIDRs = append(again.DenyCIDRs, p.String())
		}
		if same, err := again.Parse(); err != nil || !same.Equal(e) {
			t.Errorf("%+v read again is %+v, %v", e, same, err)
		}
		for i, p := range e.AllowPorts {
			if int(p) != ports[i] {
				t.Errorf("port %d became %d", ports[i], p)
			}
		}
	})
}

func FuzzCheckEnv(f *testing.F) {
	f.Add("PATH", "/bin")
	f.Add("1", "\x00")
	f.Fuzz(func(t *testing.T, name, value string) {
		if sandbox.CheckEnv(map[string]string{name: value}) == nil &&
			(name == "" || strings.ContainsAny(name+value, "\x00") || strings.ContainsAny(name, "= ")) {
			t.Errorf("accepted %q=%q", name, value)
		}
	})
}
