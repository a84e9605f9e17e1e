package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"github.com/cayhq/cay/internal/node"
	"github.com/cayhq/cay/internal/sandbox"
)

const (
	// minFirstUID keeps the user ids of sandboxes above those of 16 bits, which a host gives to its own users and
	// services. With a lower one a process that escapes from a sandbox could be a user of the host.
	minFirstUID = 1 << 16
	// maxFirstUID keeps the user ids of sandboxes below 1<<31, since parts of the kernel and some programs of a
	// host take larger ones for negative numbers.
	maxFirstUID = 1<<31 - node.UIDs
)

// Check refuses settings that cannot work, naming the key and the rule, and makes DataDir absolute.
func (c *Config) Check() error {
	if c.DataDir == "" {
		return errors.New("data_dir must not be empty")
	}
	abs, err := filepath.Abs(c.DataDir)
	if err != nil {
		return fmt.Errorf("finding data_dir %q: %w", c.DataDir, err)
	}
	c.DataDir = abs
	names := map[string]bool{}
	for _, s := range c.Sandbox.Sizes {
		if s.Name == "" || s.VCPUs < 1 || s.MemoryMB < 128 || names[s.Name] {
			return fmt.Errorf("sandbox.sizes: %q needs a name of its own, at least 1 vCPU and 128 MiB", s.Name)
		}
		names[s.Name] = true
	}
	if !names[c.Sandbox.DefaultSize] {
		return fmt.Errorf("sandbox.default_size: %q is not among sandbox.sizes", c.Sandbox.DefaultSize)
	}
	if c.Sandbox.Platform != "systrap" && c.Sandbox.Platform != "kvm" {
		return fmt.Errorf("sandbox.platform: must be systrap or kvm, not %q", c.Sandbox.Platform)
	}
	if err := c.checkNumbers(); err != nil {
		return err
	}
	if err := c.Store.check(); err != nil {
		return err
	}
	if err := c.Node.check(); err != nil {
		return err
	}
	if err := c.Fleet.check(c.Store.URL != ""); err != nil {
		return err
	}
	if err := c.Memory.check(); err != nil {
		return err
	}
	if err := c.Pool.check(names); err != nil {
		return err
	}
	if err := c.Proxy.check(); err != nil {
		return err
	}
	if err := c.Files.check(); err != nil {
		return err
	}
	if _, err := c.Network.RangePrefix(); err != nil {
		return err
	}
	if _, err = c.Network.AlwaysDenyPrefixes(); err != nil {
		return err
	}
	_, err = c.Webhooks.AllowPrefixes()
	return err
}

// checkNumbers refuses numbers and times that are too small or too large.
func (c *Config) checkNumbers() error {
	for _, rule := range []struct {
		key       string
		got, from int
	}{
		{"sandbox.default_disk_mb", c.Sandbox.DefaultDiskMB, sandbox.MinDiskMB},
		{"sandbox.max_disk_mb", c.Sandbox.MaxDiskMB, c.Sandbox.DefaultDiskMB},
		{"sandbox.max_snapshots", c.Sandbox.MaxSnapshots, 0},
		{"sandbox.max_destroyed", c.Sandbox.MaxDestroyed, 0},
		{"sandbox.max_pids", c.Sandbox.MaxPIDs, 16},
		{"sandbox.first_uid", c.Sandbox.FirstUID, minFirstUID},
		{"capacity.max_sandboxes", c.Capacity.MaxSandboxes, 1},
		{"capacity.min_free_memory_mb", c.Capacity.MinFreeMemoryMB, 0},
		{"capacity.min_free_disk_mb", c.Capacity.MinFreeDiskMB, 0},
		{"network.ready", c.Network.Ready, 0},
		{"network.max_flows", c.Network.MaxFlows, 1},
		{"network.flows_per_second", c.Network.FlowsPerSecond, 1},
		{"network.flows_percent", c.Network.FlowsPercent, 1},
		{"network.max_ranges", c.Network.MaxRanges, 10_000}, // one policy of the longest
		{"network.questions_per_second", c.Network.QuestionsPerSecond, 1},
		{"quota.sandboxes", c.Quota.Sandboxes, 0},
		{"quota.api_keys", c.Quota.APIKeys, 0},
		{"rate_limit.burst", c.RateLimit.Burst, 1},
		{"rate_limit.org_factor", c.RateLimit.OrgFactor, 0},
		{"rate_limit.failed_burst", c.RateLimit.FailedBurst, 1},
		{"templates.max_per_org", c.Templates.MaxPerOrg, 0},
		{"build.concurrent", c.Build.Concurrent, 1},
		{"build.per_org", c.Build.PerOrg, 1},
		{"build.context_limit_mb", c.Build.ContextLimitMB, 1},
		{"build.contexts_mb", c.Build.ContextsMB, 1},
		{"build.memory_mb", c.Build.MemoryMB, 64},
		{"build.disk_mb", c.Build.DiskMB, 64},
		{"build.cache_mb", c.Build.CacheMB, 1},
		{"images.cache_mb", c.Images.CacheMB, 1},
		{"images.pulled_mb", c.Images.PulledMB, 1},
		{"events.max_per_org", c.Events.MaxPerOrg, 0},
		{"events.max_followers", c.Events.MaxFollowers, 0},
		{"webhooks.max_per_org", c.Webhooks.MaxPerOrg, 0},
		{"webhooks.concurrency", c.Webhooks.Concurrency, 4},
		{"files.images_mb", c.Files.ImagesMB, 0},
		{"files.contexts_mb", c.Files.ContextsMB, 0},
		{"files.checkpoints_mb", c.Files.CheckpointsMB, 0},
	} {
		if rule.got < rule.from {
			return fmt.Errorf("%s: must be at least %d, not %d", rule.key, rule.from, rule.got)
		}
	}
	if c.Sandbox.FirstUID > maxFirstUID {
		return fmt.Errorf("sandbox.first_uid: must be at most %d, not %d", maxFirstUID, c.Sandbox.FirstUID)
	}
	if c.Network.FlowsPercent > 100 {
		return fmt.Errorf("network.flows_percent: must be at most 100, not %d", c.Network.FlowsPercent)
	}
	if c.Build.CPUs < 0 {
		return fmt.Errorf("build.cpus: must be at least 0, which is no limit, not %v", c.Build.CPUs)
	}
	for _, rule := range []struct {
		key       string
		got, from Duration
		least     string
	}{
		{"build.idle_timeout", c.Build.IdleTimeout, Duration(time.Second), "1s"},
		{"build.timeout", c.Build.Timeout, Duration(time.Second), "1s"},
		{"sandbox.answer_timeout", c.Sandbox.AnswerTimeout, Duration(time.Second), "1s"},
		{"events.keep", c.Events.Keep, Duration(time.Minute), "1m"},
	} {
		if rule.got < rule.from {
			return fmt.Errorf("%s: must be at least %s, not %s", rule.key, rule.least, time.Duration(rule.got))
		}
	}
	return nil
}

// leastConns is the least number of connections to PostgreSQL: one for the work in the background and some for calls.
// With fewer, one long listing would delay all calls.
const leastConns = 4

// check refuses settings of the records that contradict each other. The store itself checks the URL.
func (s Store) check() error {
	switch {
	case s.URL == "" && (s.Password != "" || s.PasswordFile != ""):
		return errors.New("store.password and store.password_file need store.url")
	case s.Password != "" && s.PasswordFile != "":
		return errors.New("store.password and store.password_file: only one of them can be set")
	case s.MaxConns < leastConns:
		return fmt.Errorf("store.max_conns: must be at least %d, not %d", leastConns, s.MaxConns)
	}
	return nil
}

// RangePrefix returns network.range, the zero Prefix if cay is to choose one.
func (n Network) RangePrefix() (netip.Prefix, error) {
	if n.Range == "" {
		return netip.Prefix{}, nil
	}
	p, err := parsePrefixes("network.range", []string{n.Range})
	if err != nil {
		return netip.Prefix{}, err
	}
	return p[0], nil
}

// maxAlwaysDeny limits network.always_deny. The kernel needs 350 bytes for each range, and as much again for a moment.
const maxAlwaysDeny = 100_000

// AlwaysDenyPrefixes returns network.always_deny.
func (n Network) AlwaysDenyPrefixes() ([]netip.Prefix, error) {
	if len(n.AlwaysDeny) > maxAlwaysDeny {
		return nil, fmt.Errorf("network.always_deny: has %d ranges, more than %d", len(n.AlwaysDeny), maxAlwaysDeny)
	}
	return parsePrefixes("network.always_deny", n.AlwaysDeny)
}

// parsePrefixes returns the ranges that the texts of a setting name.
func parsePrefixes(key string, texts []string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, text := range texts {
		p, err := netip.ParsePrefix(text)
		if err != nil || p != p.Masked() {
			return nil, fmt.Errorf("%s: %q is not a range such as 10.0.0.0/8", key, text)
		}
		out = append(out, p)
	}
	return out, nil
}

// leastCallsMB is the least memory for calls, in MiB. It has room for one command with all the output that a command
// may have, and for other calls. With less, one command could make the server refuse all other calls.
const leastCallsMB = 32

// check refuses limits that do not fit into each other.
func (m Memory) check() error {
	switch {
	case m.CallsMB < leastCallsMB:
		return fmt.Errorf("memory.calls_mb: must be at least %d, not %d", leastCallsMB, m.CallsMB)
	case m.OrgCallsMB < leastCallsMB/2 || m.OrgCallsMB > m.CallsMB:
		return fmt.Errorf("memory.org_calls_mb: must be from %d to memory.calls_mb, not %d", leastCallsMB/2, m.OrgCallsMB)
	case m.HeapMB < m.CallsMB+leastCallsMB:
		return fmt.Errorf("memory.heap_mb: must be at least %d more than memory.calls_mb, not %d", leastCallsMB, m.HeapMB)
	case m.LimitMB != 0 && m.LimitMB < m.HeapMB:
		return fmt.Errorf("memory.limit_mb: must be at least memory.heap_mb, or 0 for no limit, not %d", m.LimitMB)
	}
	return nil
}

// check refuses settings of the pool that cannot work. sizes has the names of all sizes.
func (p Pool) check(sizes map[string]bool) error {
	if p.Target < 0 {
		return fmt.Errorf("pool.target: must be at least 0, not %d", p.Target)
	}
	if p.MaxPooled < 0 {
		return fmt.Errorf("pool.max_members: must be at least 0, not %d", p.MaxPooled)
	}
	for i, t := range p.Templates {
		switch {
		case t.Template == "":
			return fmt.Errorf("pool.templates[%d].template: must name a template", i)
		case t.Size != "" && !sizes[t.Size]:
			return fmt.Errorf("pool.templates[%d].size: %q is not among sandbox.sizes", i, t.Size)
		case t.Target < 0:
			return fmt.Errorf("pool.templates[%d].target: must be at least 0, not %d", i, t.Target)
		}
	}
	return nil
}

// domainName matches a domain in lower case.
var domainName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$`)

// check refuses a scheme or a domain that no URL of a port can have.
func (p Proxy) check() error {
	if p.Scheme != "https" && p.Scheme != "http" {
		return fmt.Errorf("proxy.scheme: must be https or http, not %q", p.Scheme)
	}
	if p.Domain == "" {
		return nil
	}
	name := p.Domain
	if host, port, err := net.SplitHostPort(p.Domain); err == nil {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("proxy.domain: %q has no port from 1 to 65535", p.Domain)
		}
		name = host
	}
	// A name has at most 253 bytes, 27 of which are kept for the label of a port and an id, with its dot.
	if !domainName.MatchString(name) || net.ParseIP(name) != nil || len(name) > 253-27 {
		return fmt.Errorf("proxy.domain: must be a domain in lower case such as sandboxes.example.com, with a port if "+
			"that is not the scheme's, not %q", p.Domain)
	}
	return nil
}
