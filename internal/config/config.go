// Package config owns the settings of a server: their keys, defaults and rules. A setting comes from, in rising order
// of precedence, [Default], a TOML file, the environment (CAY_ and the key's path in upper case, such as
// CAY_NETWORK_RANGE; commas separate the entries of lists), and flags, which the command line sets on what [Read]
// returns. docs/operating.md lists the keys.
//
// The package reads that file, the one of credentials, and nothing else of the machine. It returns values, which are
// not safe for concurrent change.
package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/egressproxy"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/node"
	"github.com/cayhq/cay/internal/sandbox"
)

// Config holds all settings of a server.
type Config struct {
	DataDir         string   `toml:"data_dir"`
	Listen          string   `toml:"listen"`
	MetricsListen   string   `toml:"metrics_listen"`
	LogLevel        string   `toml:"log_level"`
	LogFormat       string   `toml:"log_format"`
	ShutdownTimeout Duration `toml:"shutdown_timeout"`

	Store     Store     `toml:"store"`
	Node      Node      `toml:"node"`
	Fleet     Fleet     `toml:"fleet"`
	Network   Network   `toml:"network"`
	Sandbox   Sandbox   `toml:"sandbox"`
	Capacity  Capacity  `toml:"capacity"`
	Quota     Quota     `toml:"quota"`
	RateLimit RateLimit `toml:"rate_limit"`
	Images    Images    `toml:"images"`
	Templates Templates `toml:"templates"`
	Build     Build     `toml:"build"`
	Pool      Pool      `toml:"pool"`
	Memory    Memory    `toml:"memory"`
	Proxy     Proxy     `toml:"proxy"`
	E2B       E2B       `toml:"e2b"`
	Events    Events    `toml:"events"`
	Webhooks  Webhooks  `toml:"webhooks"`
	Files     Files     `toml:"files"`
}

// Store says where the records are: in DataDir, or in the PostgreSQL that URL names.
type Store struct {
	URL          Secret `toml:"url"` // may contain the password
	Password     Secret `toml:"password"`
	PasswordFile string `toml:"password_file"`
	MaxConns     int    `toml:"max_conns"`
}

// Node says what this machine is called, and what its operator says about it.
type Node struct {
	Name   string   `toml:"name"` // "" is the host's name
	Labels []string `toml:"labels"`
}

// check refuses a name and labels that no node may have.
func (n Node) check() error {
	if n.Name != "" {
		if err := fleet.CheckName(n.Name); err != nil {
			return fmt.Errorf("node.name: %w", err)
		}
	}
	if _, err := fleet.ParseLabels(n.Labels); err != nil {
		return fmt.Errorf("node.labels: %w", err)
	}
	return nil
}

// Fleet lets other machines join. An empty Listen lets none, and makes nothing for it.
type Fleet struct {
	Listen     string `toml:"listen"`
	Advertise  string `toml:"advertise"`
	SecretFile string `toml:"secret_file"`
}

// check refuses a listener without the secret that seals the authority of its certificates, and one of which other
// servers with the same records would not know where it is.
func (f Fleet) check(shared bool) error {
	if f.Listen == "" {
		if f.Advertise != "" {
			return errors.New("fleet.advertise: needs fleet.listen")
		}
		return nil
	}
	host, _, err := net.SplitHostPort(f.Listen)
	if err != nil {
		return fmt.Errorf("fleet.listen: must be host:port, not %q", f.Listen)
	}
	if a, err := netip.ParseAddr(host); shared && f.Advertise == "" && (host == "" || err == nil && a.IsUnspecified()) {
		return fmt.Errorf("fleet.listen: %q does not say where other servers find this one: set fleet.advertise to a "+
			"host:port that they reach", f.Listen)
	}
	if host, port, err := net.SplitHostPort(f.Advertise); f.Advertise != "" &&
		(err != nil || host == "" || port == "" || port == "0") {
		return fmt.Errorf("fleet.advertise: must be host:port, not %q", f.Advertise)
	}
	if f.SecretFile == "" {
		return errors.New("fleet.listen: needs fleet.secret_file, a file of openssl rand -hex 32 that only root can read")
	}
	return nil
}

// Events limits the events that are kept and the streams that follow them.
type Events struct {
	Keep         Duration `toml:"keep"`
	MaxPerOrg    int      `toml:"max_per_org"`
	MaxFollowers int      `toml:"max_followers"`
}

// Webhooks limits webhooks, and lists addresses that they may call besides those that sandboxes may reach.
type Webhooks struct {
	MaxPerOrg   int      `toml:"max_per_org"`
	Concurrency int      `toml:"concurrency"`
	AllowCIDRs  []string `toml:"allow_cidrs"`
}

// AllowPrefixes returns webhooks.allow_cidrs.
func (w Webhooks) AllowPrefixes() ([]netip.Prefix, error) {
	return parsePrefixes("webhooks.allow_cidrs", w.AllowCIDRs)
}

// E2B turns the API for E2B's clients on or off.
type E2B struct {
	Enabled bool `toml:"enabled"`
}

// Network sets the addresses of sandboxes, and what they may reach and use of the network.
type Network struct {
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

// Sandbox sets the sizes, limits and lifetimes of sandboxes.
type Sandbox struct {
	Platform      string         `toml:"platform"`
	DefaultSize   string         `toml:"default_size"`
	DefaultDiskMB int            `toml:"default_disk_mb"`
	MaxDiskMB     int            `toml:"max_disk_mb"`
	MaxPIDs       int            `toml:"max_pids"`
	FirstUID      int            `toml:"first_uid"`
	MaxSnapshots  int            `toml:"max_snapshots"`
	KeepDestroyed Duration       `toml:"keep_destroyed"`
	MaxDestroyed  int            `toml:"max_destroyed"`
	AnswerTimeout Duration       `toml:"answer_timeout"`
	Sizes         []sandbox.Size `toml:"sizes"`
}

// Capacity limits the sandboxes of this machine, and reserves memory and disk that they may not take.
type Capacity struct {
	MaxSandboxes    int `toml:"max_sandboxes"`
	MinFreeMemoryMB int `toml:"min_free_memory_mb"`
	MinFreeDiskMB   int `toml:"min_free_disk_mb"`
}

// Quota sets the default quota of an organization.
type Quota struct {
	Sandboxes int `toml:"sandboxes"`
	VCPUs     int `toml:"vcpus"`
	MemoryMB  int `toml:"memory_mb"`
	APIKeys   int `toml:"api_keys"`
}

// RateLimit limits the calls of a key and of an organization, and the calls of an address without a valid
// key.
type RateLimit struct {
	PerSecond       float64 `toml:"per_second"`
	Burst           int     `toml:"burst"`
	OrgFactor       int     `toml:"org_factor"`
	FailedPerSecond float64 `toml:"failed_per_second"`
	FailedBurst     int     `toml:"failed_burst"`
}

// Images sets the sources of images and the disk that pulled ones may take.
type Images struct {
	CacheDir   string   `toml:"cache_dir"`
	CacheMB    int      `toml:"cache_mb"`
	Registry   bool     `toml:"registry"`
	Registries []string `toml:"registries"`
	PulledMB   int      `toml:"pulled_mb"`
}

// Templates names the built-in templates that the server builds at its start, and limits those of an organization.
type Templates struct {
	Prepare   []string `toml:"prepare"`
	MaxPerOrg int      `toml:"max_per_org"`
}

// Build limits the builds of templates.
type Build struct {
	Concurrent     int      `toml:"concurrent"`
	PerOrg         int      `toml:"per_org"`
	Timeout        Duration `toml:"timeout"`
	ContextLimitMB int      `toml:"context_limit_mb"`
	ContextsMB     int      `toml:"contexts_mb"`
	MemoryMB       int      `toml:"memory_mb"`
	CPUs           float64  `toml:"cpus"`
	DiskMB         int      `toml:"disk_mb"`
	CacheMB        int      `toml:"cache_mb"`
	IdleTimeout    Duration `toml:"idle_timeout"`
}

// Pool sets the number of sandboxes in the warm pool.
type Pool struct {
	Enabled   bool           `toml:"enabled"`
	Target    int            `toml:"target"`
	MaxPooled int            `toml:"max_members"`
	Templates []PoolTemplate `toml:"templates"`
}

// PoolTemplate sets the number of pooled sandboxes of one template.
type PoolTemplate struct {
	Template string `toml:"template"`
	Org      string `toml:"org"`
	Size     string `toml:"size"`
	Target   int    `toml:"target"`
}

// Memory limits the memory of the server itself.
type Memory struct {
	CallsMB    int `toml:"calls_mb"`
	OrgCallsMB int `toml:"org_calls_mb"`
	HeapMB     int `toml:"heap_mb"`
	LimitMB    int `toml:"limit_mb"`
}

// Proxy sets the host names of ports of sandboxes.
type Proxy struct {
	Domain string `toml:"domain"`
	Scheme string `toml:"scheme"`
}

// Default returns the settings of one machine with one operator.
func Default() Config {
	return Config{
		DataDir: "/var/lib/cay", Listen: "127.0.0.1:7070", LogLevel: "info", LogFormat: "text",
		ShutdownTimeout: Duration(30 * time.Second),
		Store:           Store{MaxConns: 16},
		Network: Network{Ready: 8, MaxFlows: network.DefaultFlowsPerSlot, FlowsPerSecond: network.DefaultFlowsPerSecond,
			FlowsPercent: network.DefaultFlowsPercent, MaxRanges: network.DefaultMaxRanges, QuestionsPerSecond: egressproxy.DefaultQuestionsPerSecond},
		Sandbox: Sandbox{
			Platform: "systrap", DefaultSize: "shared-cpu-1x", DefaultDiskMB: 2048, MaxDiskMB: 20480,
			MaxPIDs: 4096, FirstUID: node.DefaultFirstUID, MaxSnapshots: 100,
			KeepDestroyed: Duration(7 * 24 * time.Hour), MaxDestroyed: 10_000, AnswerTimeout: Duration(agentapi.DefaultPatience), Sizes: defaultSizes(),
		},
		Capacity:  Capacity{MaxSandboxes: 1000, MinFreeMemoryMB: 512, MinFreeDiskMB: 1024},
		Quota:     Quota{Sandboxes: 500, VCPUs: 2000, MemoryMB: 1 << 20, APIKeys: 1000},
		RateLimit: RateLimit{PerSecond: 500, Burst: 1000, OrgFactor: 4, FailedPerSecond: 10, FailedBurst: 200},
		Images:    Images{Registry: true, CacheMB: 10 << 10, PulledMB: 20 << 10},
		Templates: Templates{Prepare: []string{"python", "base"}, MaxPerOrg: 100},
		Build: Build{Concurrent: 1, PerOrg: 1, Timeout: Duration(30 * time.Minute),
			ContextLimitMB: 1024, ContextsMB: 10 << 10, MemoryMB: 2048, CPUs: 2, DiskMB: 20 << 10, CacheMB: 10 << 10,
			IdleTimeout: Duration(5 * time.Minute)},
		Memory: Memory{CallsMB: 192, OrgCallsMB: 96, HeapMB: 384, LimitMB: 1024},
		Pool:   Pool{Enabled: true, Target: 2, MaxPooled: 16},
		Proxy:  Proxy{Scheme: "https"},
		E2B:    E2B{Enabled: true},
		Events: Events{Keep: Duration(30 * 24 * time.Hour), MaxPerOrg: 1_000_000, MaxFollowers: 32},
		// A server with one busy organization makes 16 deliveries at once.
		Webhooks: Webhooks{MaxPerOrg: 20, Concurrency: 64},
		Files:    Files{ImagesMB: 50 << 10, ContextsMB: 10 << 10, CheckpointsMB: 100 << 10},
	}
}

// defaultSizes returns the sizes that the API contract names.
func defaultSizes() []sandbox.Size {
	var sizes []sandbox.Size
	for _, vcpus := range []int{1, 2, 4, 8} {
		sizes = append(sizes, sandbox.Size{Name: fmt.Sprintf("shared-cpu-%dx", vcpus), VCPUs: vcpus, MemoryMB: 512 * vcpus})
	}
	for _, vcpus := range []int{1, 2, 4, 8} {
		sizes = append(sizes, sandbox.Size{Name: fmt.Sprintf("performance-%dx", vcpus), VCPUs: vcpus,
			MemoryMB: 2048 * vcpus, Dedicated: true})
	}
	return sizes
}

// Duration holds a time that files and variables write as "30s".
type Duration time.Duration

// UnmarshalText implements [encoding.TextUnmarshaler].
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = Duration(v)
	return err
}
