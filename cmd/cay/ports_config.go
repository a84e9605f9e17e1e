package main

import (
	"fmt"
	"net"
	"regexp"
	"strconv"

	"github.com/cayhq/cay/internal/portproxy"
)

// proxyConfig sets how ports of sandboxes are reached by host name.
type proxyConfig struct {
	Domain string `toml:"domain"`
	Scheme string `toml:"scheme"`
}

var domainName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$`)

func (c proxyConfig) check() error {
	if c.Scheme != "https" && c.Scheme != "http" {
		return fmt.Errorf("proxy.scheme: must be https or http, not %q", c.Scheme)
	}
	if c.Domain == "" {
		return nil
	}
	name := c.Domain
	if host, port, err := net.SplitHostPort(c.Domain); err == nil {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("proxy.domain: %q has no port from 1 to 65535", c.Domain)
		}
		name = host
	}
	// A label of a port and an id is 26 bytes with its dot, and a name has 253.
	if !domainName.MatchString(name) || net.ParseIP(name) != nil || len(name) > 253-27 {
		return fmt.Errorf("proxy.domain: must be a domain in lower case such as sandboxes.example.com, with a port if that is not the scheme's, not %q", c.Domain)
	}
	return nil
}

func (c proxyConfig) names() portproxy.Names {
	return portproxy.Names{Domain: c.Domain, Scheme: c.Scheme}
}
