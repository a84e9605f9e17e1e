package daemon

import (
	"errors"
	"net/netip"
	"testing"
)

// TestPermitted checks that the operator's ranges are allowed besides what the network allows, and nothing else.
func TestPermitted(t *testing.T) {
	denied := errors.New("denied")
	permit := permitted([]netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00::/8")},
		func(a netip.Addr) error {
			if a == netip.MustParseAddr("192.0.2.1") {
				return nil
			}
			return denied
		})
	for to, want := range map[string]error{"10.1.2.3:80": nil, "[fd00::1]:443": nil, "192.0.2.1:80": nil,
		"10.2.0.1:80": denied, "127.0.0.1:80": denied, "[fe80::1]:80": denied} {
		if got := permit(netip.MustParseAddrPort(to)); got != want {
			t.Errorf("%s: %v", to, got)
		}
	}
}
