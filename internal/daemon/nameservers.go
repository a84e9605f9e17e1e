package daemon

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
)

// nameservers returns the configured name servers, else the host's own ones that a sandbox can reach, which excludes a
// resolver on the loopback.
func nameservers(configured []string) []string {
	if len(configured) > 0 {
		return configured
	}
	// systemd-resolved keeps the name servers that it asks in a file of its own.
	for _, path := range []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"} {
		data, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if found := parseResolvConf(string(data)); len(found) > 0 {
			return found
		}
	}
	return []string{"1.1.1.1", "8.8.8.8"} // public resolvers, when the host names none
}

// nameserverAddrs returns the name servers as addresses.
func nameserverAddrs(configured []string) ([]netip.Addr, error) {
	var out []netip.Addr
	for _, text := range nameservers(configured) {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, fmt.Errorf("network.nameservers: %w", err)
		}
		out = append(out, a)
	}
	return out, nil
}

// parseResolvConf returns the IPv4 addresses of the name servers in the text of a resolv.conf, without those of the
// loopback.
func parseResolvConf(text string) []string {
	var found []string
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		addr, err := netip.ParseAddr(fields[1])
		if err == nil && addr.Is4() && !addr.IsLoopback() {
			found = append(found, addr.String())
		}
	}
	return found
}
