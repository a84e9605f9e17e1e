package main

import (
	"encoding"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/egressproxy"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/node"
	"github.com/cayhq/cay/internal/sandbox"
)

// config is everything an operator decides. It is read from, in rising order of
// precedence: the defaults below, a TOML file, the environment (CAY_ and the
// key's path in upper case, such as CAY_NETWORK_RANGE; lists are separated by
// commas), and flags. docs/operating.md lists the keys.
type config struct {
	DataDir         string   `toml:"data_dir"`
	Listen          string   `toml:"listen"`
	MetricsListen   string   `toml:"metrics_listen"`
	LogLevel        string   `toml:"log_level"`
	LogFormat       string   `toml:"log_format"`
	ShutdownTimeout duration `toml:"shutdown_timeout"`

	Network   networkConfig   `toml:"network"`
	Sandbox   sandboxConfig   `toml:"sandbox"`
	Capacity  capacityConfig  `toml:"capacity"`
	Quota     quotaConfig     `toml:"quota"`
	RateLimit rateLimitConfig `toml:"rate_limit"`
	Images    imagesConfig    `toml:"images"`
	Templates templatesConfig `toml:"templates"`
	Build     buildConfig     `toml:"build"`
	Pool      poolConfig      `toml:"pool"`
	Memory    memoryConfig    `toml:"memory"`
	Proxy     proxyConfig     `toml:"proxy"`
	E2B       e2bConfig       `toml:"e2b"`
	Events    eventsConfig    `toml:"events"`
}

type eventsConfig struct {
	Keep         duration `toml:"keep"`
	MaxPerOrg    int      `toml:"max_per_org"`
	MaxFollowers int      `toml:"max_followers"`
}

type e2bConfig struct {
	Enabled bool `toml:"enabled"`
}

type networkConfig struct {
	Range       string   `toml:"range"`
	AlwaysDeny  []string `toml:"always_deny"`
	Nameservers []string `toml:"nameservers"`
	Ready       int      `toml:"ready"`
	MTU         int      `toml:"mtu"`

	MaxFlows           int `toml:"max_flows"`
	FlowsPerSecond     int `toml:"flows_per_second"`
	FlowsPercent       int `toml:"flows_percent"`
	MaxRanges          int `toml:"max_ranges"`
	QuestionsPerSecond int `toml:"questions_per_second"`
}

type sandboxConfig struct {
	Platform      string         `toml:"platform"`
	DefaultSize   string         `toml:"default_size"`
	DefaultDiskMB int            `toml:"default_disk_mb"`
	MaxDiskMB     int            `toml:"max_disk_mb"`
	MaxPIDs       int            `toml:"max_pids"`
	FirstUID      int            `toml:"first_uid"`
	MaxSnapshots  int            `toml:"max_snapshots"`
	KeepDestroyed duration       `toml:"keep_destroyed"`
	MaxDestroyed  int            `toml:"max_destroyed"`
	AnswerTimeout duration       `toml:"answer_timeout"`
	Sizes         []sandbox.Size `toml:"sizes"`
}

type capacityConfig struct {
	MaxSandboxes    int `toml:"max_sandboxes"`
	MinFreeMemoryMB int `toml:"min_free_memory_mb"`
	MinFreeDiskMB   int `toml:"min_free_disk_mb"`
}

type quotaConfig struct {
	Sandboxes int `toml:"sandboxes"`
	VCPUs     int `toml:"vcpus"`
	MemoryMB  int `toml:"memory_mb"`
	APIKeys   int `toml:"api_keys"`
}

type rateLimitConfig struct {
	PerSecond       float64 `toml:"per_second"`
	Burst           int     `toml:"burst"`
	FailedPerSecond float64 `toml:"failed_per_second"`
	FailedBurst     int     `toml:"failed_burst"`
}

type imagesConfig struct {
	CacheDir   string   `toml:"cache_dir"`
	Registry   bool     `toml:"registry"`
	Registries []string `toml:"registries"`
	PulledMB   int      `toml:"pulled_mb"`
}

type templatesConfig struct {
	Prepare   []string `toml:"prepare"`
	MaxPerOrg int      `toml:"max_per_org"`
}

type buildConfig struct {
	Concurrent     int      `toml:"concurrent"`
	PerOrg         int      `toml:"per_org"`
	Timeout        duration `toml:"timeout"`
	ContextLimitMB int      `toml:"context_limit_mb"`
	ContextsMB     int      `toml:"contexts_mb"`
	MemoryMB       int      `toml:"memory_mb"`
	CPUs           float64  `toml:"cpus"`
	DiskMB         int      `toml:"disk_mb"`
	CacheMB        int      `toml:"cache_mb"`
	IdleTimeout    duration `toml:"idle_timeout"`
}

// defaults are for one machine with one operator.
func defaults() config {
	return config{
		DataDir: "/var/lib/cay", Listen: "127.0.0.1:7070", LogLevel: "info", LogFormat: "text",
		ShutdownTimeout: duration(30 * time.Second),
		Network: networkConfig{Ready: 8, MaxFlows: network.DefaultFlowsPerSlot, FlowsPerSecond: network.DefaultFlowsPerSecond,
			FlowsPercent: network.DefaultFlowsPercent, MaxRanges: network.DefaultMaxRanges, QuestionsPerSecond: egressproxy.DefaultQuestionsPerSecond},
		Sandbox: sandboxConfig{
			Platform: "systrap", DefaultSize: "shared-cpu-1x", DefaultDiskMB: 2048, MaxDiskMB: 20480,
			MaxPIDs: 4096, FirstUID: node.DefaultFirstUID, MaxSnapshots: 100,
			KeepDestroyed: duration(7 * 24 * time.Hour), MaxDestroyed: 10_000, AnswerTimeout: duration(agentapi.DefaultPatience), Sizes: presets(),
		},
		Capacity:  capacityConfig{MaxSandboxes: 1000, MinFreeMemoryMB: 512, MinFreeDiskMB: 1024},
		Quota:     quotaConfig{Sandboxes: 500, VCPUs: 2000, MemoryMB: 1 << 20, APIKeys: 1000},
		RateLimit: rateLimitConfig{PerSecond: 500, Burst: 1000, FailedPerSecond: 10, FailedBurst: 200},
		Images:    imagesConfig{Registry: true, PulledMB: 20 << 10},
		Templates: templatesConfig{Prepare: []string{"python", "base"}, MaxPerOrg: 100},
		Build: buildConfig{Concurrent: 1, PerOrg: 1, Timeout: duration(30 * time.Minute), ContextLimitMB: 1024, ContextsMB: 10 << 10,
			MemoryMB: 2048, CPUs: 2, DiskMB: 20 << 10, CacheMB: 10 << 10, IdleTimeout: duration(5 * time.Minute)},
		Memory: memoryConfig{CallsMB: 192, OrgCallsMB: 96, HeapMB: 384, LimitMB: 1024},
		Pool:   poolConfig{Enabled: true, Target: 2, MaxMembers: 16},
		Proxy:  proxyConfig{Scheme: "https"},
		E2B:    e2bConfig{Enabled: true},
		Events: eventsConfig{Keep: duration(30 * 24 * time.Hour), MaxPerOrg: 1_000_000, MaxFollowers: 32},
	}
}

// presets are the sizes of the API contract.
func presets() []sandbox.Size {
	var sizes []sandbox.Size
	for _, vcpus := range []int{1, 2, 4, 8} {
		sizes = append(sizes, sandbox.Size{Name: fmt.Sprintf("shared-cpu-%dx", vcpus), VCPUs: vcpus, MemoryMB: 512 * vcpus})
	}
	for _, vcpus := range []int{1, 2, 4, 8} {
		sizes = append(sizes, sandbox.Size{Name: fmt.Sprintf("performance-%dx", vcpus), VCPUs: vcpus, MemoryMB: 2048 * vcpus, Dedicated: true})
	}
	return sizes
}

// duration is a time.Duration written as "30s" in files and variables.
type duration time.Duration

func (d *duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = duration(v)
	return err
}

// readConfig reads the file, if any, and the environment over the defaults.
// A key that does not exist is an error: it is a typing mistake.
func readConfig(file string, environ []string) (config, error) {
	c := defaults()
	// Decoding over the presets would mix them into the file's sizes.
	c.Sandbox.Sizes = nil
	if file != "" {
		meta, err := toml.DecodeFile(file, &c)
		if err != nil {
			return c, fmt.Errorf("reading %s: %w", file, err)
		}
		if unknown := meta.Undecoded(); len(unknown) > 0 {
			return c, fmt.Errorf("reading %s: there is no setting %s", file, unknown[0])
		}
	}
	if len(c.Sandbox.Sizes) == 0 {
		c.Sandbox.Sizes = presets()
	}
	env := map[string]string{}
	for _, pair := range environ {
		name, value, _ := strings.Cut(pair, "=")
		env[name] = value
	}
	return c, overlay(reflect.ValueOf(&c).Elem(), "CAY", env)
}

// overlay sets fields from variables named by the path of their toml keys.
func overlay(v reflect.Value, path string, env map[string]string) error {
	for i := range v.NumField() {
		name := path + "_" + strings.ToUpper(v.Type().Field(i).Tag.Get("toml"))
		field := v.Field(i)
		if field.Kind() == reflect.Struct {
			if err := overlay(field, name, env); err != nil {
				return err
			}
			continue
		}
		text, ok := env[name]
		if !ok {
			continue
		}
		if err := setText(field, text); err != nil {
			return fmt.Errorf("reading %s=%q: %w", name, text, err)
		}
	}
	return nil
}

func setText(field reflect.Value, text string) (err error) {
	if u, ok := field.Addr().Interface().(encoding.TextUnmarshaler); ok {
		return u.UnmarshalText([]byte(text))
	}
	switch field.Kind() {
	case reflect.String:
		field.SetString(text)
	case reflect.Bool:
		var v bool
		if v, err = strconv.ParseBool(text); err == nil {
			field.SetBool(v)
		}
	case reflect.Int:
		var v int64
		if v, err = strconv.ParseInt(text, 10, 64); err == nil {
			field.SetInt(v)
		}
	case reflect.Float64:
		var v float64
		if v, err = strconv.ParseFloat(text, 64); err == nil {
			field.SetFloat(v)
		}
	default:
		if list, ok := field.Addr().Interface().(*[]string); ok {
			*list = nil
			if text != "" {
				*list = strings.Split(text, ",")
			}
			return nil
		}
		return errors.New("can only be set in the file")
	}
	return err
}

const (
	// minFirstUID is above the ids that a host gives to users and services of its own, which are 16 bits long.
	minFirstUID = 1 << 16
	// maxFirstUID keeps the ids of sandboxes below 1<<31, since not all of the kernel and of the programs of a
	// host takes larger ones for positive numbers.
	maxFirstUID = 1<<31 - node.UIDs
)

// check refuses settings that cannot work, naming the key and the rule.
func (c *config) check() error {
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
		{"rate_limit.failed_burst", c.RateLimit.FailedBurst, 1},
		{"templates.max_per_org", c.Templates.MaxPerOrg, 0},
		{"build.concurrent", c.Build.Concurrent, 1},
		{"build.per_org", c.Build.PerOrg, 1},
		{"build.context_limit_mb", c.Build.ContextLimitMB, 1},
		{"build.contexts_mb", c.Build.ContextsMB, 1},
		{"build.memory_mb", c.Build.MemoryMB, 64},
		{"build.disk_mb", c.Build.DiskMB, 64},
		{"build.cache_mb", c.Build.CacheMB, 1},
		{"images.pulled_mb", c.Images.PulledMB, 1},
		{"events.max_per_org", c.Events.MaxPerOrg, 0},
		{"events.max_followers", c.Events.MaxFollowers, 0},
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
	if c.Build.IdleTimeout < duration(time.Second) {
		return fmt.Errorf("build.idle_timeout: must be at least 1s, not %s", time.Duration(c.Build.IdleTimeout))
	}
	if c.Build.Timeout < duration(time.Second) {
		return fmt.Errorf("build.timeout: must be at least 1s, not %s", time.Duration(c.Build.Timeout))
	}
	if c.Sandbox.AnswerTimeout < duration(time.Second) {
		return fmt.Errorf("sandbox.answer_timeout: must be at least 1s, not %s", time.Duration(c.Sandbox.AnswerTimeout))
	}
	if c.Events.Keep < duration(time.Minute) {
		return fmt.Errorf("events.keep: must be at least 1m, not %s", time.Duration(c.Events.Keep))
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
	if _, err := c.networkRange(); err != nil {
		return err
	}
	if _, err := parsePrefixes("network.always_deny", c.Network.AlwaysDeny); err != nil {
		return err
	}
	return nil
}

// networkRange is network.range, the zero Prefix when cay is to choose.
func (c *config) networkRange() (netip.Prefix, error) {
	if c.Network.Range == "" {
		return netip.Prefix{}, nil
	}
	p, err := parsePrefixes("network.range", []string{c.Network.Range})
	if err != nil {
		return netip.Prefix{}, err
	}
	return p[0], nil
}

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

// nameservers are the configured ones, else the host's own that a sandbox can
// reach: a resolver on the loopback is not.
func (c *config) nameservers() []string {
	if len(c.Network.Nameservers) > 0 {
		return c.Network.Nameservers
	}
	// systemd-resolved keeps the real ones beside the stub's.
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

// nameserverAddrs is nameservers, as addresses.
func (c *config) nameserverAddrs() ([]netip.Addr, error) {
	var out []netip.Addr
	for _, text := range c.nameservers() {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, fmt.Errorf("network.nameservers: %w", err)
		}
		out = append(out, a)
	}
	return out, nil
}

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
