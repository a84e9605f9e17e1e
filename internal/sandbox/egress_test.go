package sandbox_test

import (
	"net/netip"
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
		field       string // "" is accepted
	}{
		"allow all":              {mode: "allow_all"},
		"deny all":               {mode: "deny_all"},
		"lists":                  {mode: "deny_all", allow: []string{"0.0.0.0/0"}, deny: []string{"10.0.0.0/8"}, ports: []int{1, 443, 65535}},
		"one address":            {mode: "deny_all", allow: []string{"192.0.2.1/32"}},
		"deny without allow":     {mode: "deny_all", deny: []string{"10.0.0.0/8"}},
		"allow the metadata":     {mode: "deny_all", allow: []string{"169.254.0.0/16"}}, // changes nothing
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
	} {
		t.Run(name, func(t *testing.T) {
			_, err := sandbox.ParseEgress(tt.mode, tt.allow, tt.deny, tt.ports)
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

// FuzzParseEgress: what is accepted is canonical, IPv4, and leaves the metadata range alone.
func FuzzParseEgress(f *testing.F) {
	f.Add("deny_all", "10.0.0.0/8,0.0.0.0/0", "192.168.0.0/16", 443)
	f.Add("allow_all", "", "", 0)
	f.Add("deny_all", "::/0", "169.254.0.0/15", 65536)
	f.Fuzz(func(t *testing.T, mode, allow, deny string, port int) {
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
		e, err := sandbox.ParseEgress(mode, split(allow), split(deny), ports)
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
		if sandbox.CheckEnv(map[string]string{name: value}) == nil && (name == "" || strings.ContainsAny(name+value, "\x00") || strings.ContainsAny(name, "= ")) {
			t.Errorf("accepted %q=%q", name, value)
		}
	})
}
