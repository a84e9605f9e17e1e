package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/api"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/buildkit"
	"github.com/cayhq/cay/internal/e2b"
	"github.com/cayhq/cay/internal/egressproxy"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/image"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/node"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
	"github.com/cayhq/cay/internal/template"
)

// Names in a data directory, and of settings in its database.
const (
	databaseFile    = "cay.db"
	keyFile         = "api-key"
	settingInstance = "instance"
	settingRange    = "network_range"
	settingE2B      = "e2b_secret"
	settingPorts    = "ports_secret" // signs URLs of ports
)

// dataFiles is everything a server puts into its data directory, and the log that
// make run keeps there.
var dataFiles = []string{databaseFile, databaseFile + "-wal", databaseFile + "-shm", keyFile, "lock", "programs", "images", "sandboxes", "checkpoints", "contexts", buildDir, "scratch", "server.log"}

func serverCommand() *cobra.Command {
	var file string
	var doPurge bool
	flags := defaults()
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run the sandbox service on this machine",
		Long: `Run the sandbox service on this machine.

The server needs root. It keeps everything in one data directory, writes the
first API key to DIR/api-key, and runs until SIGTERM or SIGINT. Sandboxes
outlive it: the next server on the same directory adopts them.

Settings come from the file, then the environment (CAY_LISTEN,
CAY_NETWORK_RANGE, …), then flags.`,
		Example: "  cay server --data-dir /var/lib/cay --listen 127.0.0.1:7070\n  cay server --data-dir /var/lib/cay --purge",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := readConfig(file, os.Environ())
			if err != nil {
				return err
			}
			for name, set := range map[string]func(){
				"data-dir":       func() { cfg.DataDir = flags.DataDir },
				"listen":         func() { cfg.Listen = flags.Listen },
				"metrics-listen": func() { cfg.MetricsListen = flags.MetricsListen },
				"log-level":      func() { cfg.LogLevel = flags.LogLevel },
				"log-format":     func() { cfg.LogFormat = flags.LogFormat },
			} {
				if cmd.Flags().Changed(name) {
					set()
				}
			}
			if err := cfg.check(); err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGTERM, unix.SIGINT)
			defer stop()
			if doPurge {
				return purge(ctx, cfg.DataDir)
			}
			return serve(ctx, cfg, nil)
		},
	}
	f := cmd.Flags()
	f.StringVar(&file, "config", "", "TOML file with settings")
	f.StringVar(&flags.DataDir, "data-dir", flags.DataDir, "directory for everything the server keeps")
	f.StringVar(&flags.Listen, "listen", flags.Listen, "host:port of the API")
	f.StringVar(&flags.MetricsListen, "metrics-listen", "", "host:port that serves /metrics without a key")
	f.StringVar(&flags.LogLevel, "log-level", flags.LogLevel, "debug, info, warn or error")
	f.StringVar(&flags.LogFormat, "log-format", flags.LogFormat, "text or json")
	f.BoolVar(&doPurge, "purge", false, "remove the server's sandboxes and data from this machine, and exit")
	return cmd
}

func newLogger(cfg config) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.LogLevel)); err != nil {
		return nil, fmt.Errorf("log_level: must be debug, info, warn or error, not %q", cfg.LogLevel)
	}
	opts := &slog.HandlerOptions{Level: level}
	switch cfg.LogFormat {
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, opts)), nil
	}
	return nil, fmt.Errorf("log_format: must be text or json, not %q", cfg.LogFormat)
}

// server is everything wired together. Its parts are closed in reverse order.
type server struct {
	cfg      config
	log      *slog.Logger
	instance string
	closers  []func(context.Context) error

	db          *store.DB
	slots       *network.Network
	images      *image.Store
	dockerfiles *buildkit.Builder
	node        *node.Node
	egress      *egressproxy.Proxy
	egressOn    egressproxy.Listeners // until serveEgress owns them
	templates   *template.Service
	auth        *auth.Service
	sandboxes   *sandbox.Service
	events      *event.Feed
	ports       *portproxy.Proxy
	registry    *prometheus.Registry
	budget      *budget.Budget // of the memory that calls hold
}

// serve runs the service until ctx ends. It calls ready, if not nil, with the
// address of the API once that takes requests.
func serve(ctx context.Context, cfg config, ready func(net.Addr)) (err error) {
	log, err := newLogger(cfg)
	if err != nil {
		return err
	}
	catchLibraries(log)
	if os.Geteuid() != 0 {
		return errors.New("cay server needs root: it makes namespaces, control groups and packet filter rules")
	}
	if err := dropUnneeded(); err != nil {
		return err
	}
	s := &server{cfg: cfg, log: log, registry: prometheus.NewRegistry()}
	defer func() {
		// Not ctx, which is over: closing has a time of its own.
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(cfg.ShutdownTimeout))
		defer cancel()
		for i := len(s.closers) - 1; i >= 0; i-- {
			err = errors.Join(err, s.closers[i](closing))
		}
	}()
	if err := s.open(ctx); err != nil {
		return err
	}
	return s.listen(ctx, ready)
}

func (s *server) onClose(f func(context.Context) error) { s.closers = append(s.closers, f) }

// open brings up the rooms, from the leaves to the core, and makes rows and
// host agree before the first request.
func (s *server) open(ctx context.Context) error {
	cfg := s.cfg
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("making the data directory: %w", err)
	}
	lock, err := lockDir(cfg.DataDir, lockPatience)
	if err != nil {
		return err
	}
	s.onClose(func(context.Context) error { return lock.Close() })
	if s.db, err = store.Open(ctx, filepath.Join(cfg.DataDir, databaseFile)); err != nil {
		return err
	}
	s.onClose(func(context.Context) error { return s.db.Close() })
	s.events = event.New(event.Config{Keep: time.Duration(cfg.Events.Keep), MaxPerOrg: cfg.Events.MaxPerOrg,
		MaxFollowers: cfg.Events.MaxFollowers}, s.db, s.log)
	s.db.OnEvents(s.events.Wake)
	if s.instance, err = s.setting(ctx, settingInstance, newInstance); err != nil {
		return err
	}
	s.boundMemory(ctx)
	record := serverRecord{Instance: s.instance, URL: "http://" + cfg.Listen, KeyFile: filepath.Join(cfg.DataDir, keyFile), DataDir: cfg.DataDir, PID: os.Getpid()}
	if err := record.write(); err != nil {
		return err
	}
	if err := s.openHost(ctx); err != nil {
		return err
	}
	return s.openCore(ctx)
}

// setting reads a setting of this server, making it the first time.
func (s *server) setting(ctx context.Context, name string, first func() string) (string, error) {
	value, found, err := s.db.Setting(ctx, name)
	if err != nil || found {
		return value, err
	}
	value = first()
	return value, s.db.SetSetting(ctx, name, value)
}

// openHost brings up what touches the machine.
func (s *server) openHost(ctx context.Context) error {
	cfg := s.cfg
	programsDir := filepath.Join(cfg.DataDir, "programs")
	programs, err := embedded.Unpack(programsDir)
	if err != nil {
		return err
	}
	host, err := newEgressHost(s)
	if err != nil {
		return err
	}
	s.egress = egressproxy.New(host, s.cfg.Network.QuestionsPerSecond, s.log)
	if s.egressOn, err = listenEgress(); err != nil {
		return err
	}
	s.onClose(func(context.Context) error { closeListeners(s.egressOn); return nil })
	if s.slots, err = s.openNetwork(ctx); err != nil {
		return err
	}
	s.onClose(func(context.Context) error { return s.slots.Close() })
	s.images, err = image.Open(image.Config{Dir: filepath.Join(cfg.DataDir, "images"), CacheDir: cfg.Images.CacheDir,
		Budget: int64(cfg.Images.PulledMB) << 20, PlainHTTP: cfg.Images.Registries,
		// The name of a registry is anybody's: what no sandbox reaches, none is reached for.
		Dial: func(to netip.AddrPort) error { return s.slots.Permitted(to.Addr()) }}, s.log)
	if err != nil {
		return err
	}
	if err := s.openBuilds(programsDir, programs); err != nil {
		return err
	}
	s.node, err = node.Open(node.Config{
		Instance: s.instance, Dir: filepath.Join(cfg.DataDir, "sandboxes"), RunDir: stateDir(s.instance),
		Platform: cfg.Sandbox.Platform, Programs: programs, ProgramsDir: programsDir,
		Checkpoints: filepath.Join(cfg.DataDir, "checkpoints"), Nameservers: cfg.nameservers(), PolicyChanged: s.egress.Recheck,
		MaxSandboxes: cfg.Capacity.MaxSandboxes, MinHostMemory: int64(cfg.Capacity.MinFreeMemoryMB) << 20,
		MinDisk: int64(cfg.Capacity.MinFreeDiskMB) << 20, MaxPIDs: cfg.Sandbox.MaxPIDs, FirstUID: uint32(cfg.Sandbox.FirstUID),
		AnswerTimeout: time.Duration(cfg.Sandbox.AnswerTimeout),
	}, s.slots, rootFS{s.images, func(image string) { s.templates.Recheck(image) }}, s.log)
	if err != nil {
		return err
	}
	s.onClose(func(context.Context) error { s.node.Close(); return nil })
	return nil
}

// openNetwork opens the network on the configured range, else on the one it chose
// the last time: sandboxes that still run have addresses in it.
func (s *server) openNetwork(ctx context.Context) (*network.Network, error) {
	configured, err := s.cfg.networkRange()
	if err != nil {
		return nil, err
	}
	deny, err := parsePrefixes("network.always_deny", s.cfg.Network.AlwaysDeny)
	if err != nil {
		return nil, err
	}
	c := network.Config{Instance: s.instance, Range: configured, AlwaysDeny: deny,
		Ready: s.cfg.Network.Ready, MTU: s.cfg.Network.MTU, AgentPort: node.AgentPort, MaxRanges: s.cfg.Network.MaxRanges,
		Flows: network.Flows{PerSlot: s.cfg.Network.MaxFlows, PerSecond: s.cfg.Network.FlowsPerSecond, Percent: s.cfg.Network.FlowsPercent}}
	c.Services.DNS, c.Services.Proxy, c.Services.Metadata = portOf(s.egressOn.DNS), portOf(s.egressOn.Proxy), portOf(s.egressOn.Metadata)
	if !configured.IsValid() {
		last, found, err := s.db.Setting(ctx, settingRange)
		if err != nil {
			return nil, err
		}
		if found {
			if c.Range, err = netip.ParsePrefix(last); err != nil {
				return nil, fmt.Errorf("reading the setting %s: %w", settingRange, err)
			}
		}
	}
	slots, err := network.Open(ctx, c, s.log)
	if err != nil && !configured.IsValid() && c.Range.IsValid() {
		s.log.WarnContext(ctx, "the range of the last start is not free any more; choosing another", "range", c.Range, "error", err)
		c.Range = netip.Prefix{}
		slots, err = network.Open(ctx, c, s.log)
	}
	if err != nil {
		return nil, err
	}
	return slots, s.db.SetSetting(ctx, settingRange, slots.Range().String())
}

// openCore brings up what decides, and lets it look at the host.
func (s *server) openCore(ctx context.Context) error {
	cfg := s.cfg
	s.auth = auth.New(s.db, auth.Config{
		Quota: auth.Quota{Sandboxes: cfg.Quota.Sandboxes, VCPUs: cfg.Quota.VCPUs, MemoryMB: cfg.Quota.MemoryMB},
		Rate:  cfg.RateLimit.PerSecond, Burst: cfg.RateLimit.Burst,
		FailedRate: cfg.RateLimit.FailedPerSecond, FailedBurst: cfg.RateLimit.FailedBurst, MaxKeys: cfg.Quota.APIKeys, Log: s.log,
	})
	s.onClose(s.auth.Close)
	if _, err := s.auth.Bootstrap(ctx, func(secret string) error {
		return os.WriteFile(filepath.Join(cfg.DataDir, keyFile), []byte(secret+"\n"), 0o600)
	}); err != nil {
		return err
	}
	var err error
	if s.templates, err = s.openTemplates(ctx); err != nil {
		return err
	}
	s.sandboxes = sandbox.New(sandbox.Config{
		Sizes: cfg.Sandbox.Sizes, DefaultSize: cfg.Sandbox.DefaultSize, DefaultDisk: cfg.Sandbox.DefaultDiskMB,
		MaxDisk: cfg.Sandbox.MaxDiskMB, KeepDestroyed: time.Duration(cfg.Sandbox.KeepDestroyed), MaxDestroyed: cfg.Sandbox.MaxDestroyed, MaxSnapshots: cfg.Sandbox.MaxSnapshots, Pool: s.pool(),
	}, s.db, s.node, s.templates, s.log, s.observe())
	s.onClose(s.sandboxes.Close)
	s.ports = portproxy.New(s.node.Agents(), s.log)
	s.onClose(s.ports.Close)
	s.serveEgress(s.egressOn)
	return s.sandboxes.Reconcile(ctx)
}

// observe counts transitions.
func (s *server) observe() func(sandbox.Event) {
	transitions := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "cay_sandbox_transitions_total",
		Help: "Transitions of sandboxes by the state they went to and the reason."}, []string{"to", "reason"})
	s.registry.MustRegister(transitions, trafficMetrics{s.slots},
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cay_sandbox_leases", Help: "Calls that use a sandbox now."},
			func() float64 { return float64(s.sandboxes.InUse()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "cay_network_rules_repaired_total",
			Help: "Times that packet filter rules were put back after somebody removed them."},
			func() float64 { return float64(s.slots.Repairs()) }),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return func(e sandbox.Event) { transitions.WithLabelValues(string(e.To), e.Reason).Inc() }
}

// openE2B makes the surface for E2B's clients in front of the API's handler, nil when it is
// turned off.
func (s *server) openE2B(ctx context.Context, next http.Handler) (*e2b.Surface, error) {
	if !s.cfg.E2B.Enabled {
		return nil, nil
	}
	secret, err := s.setting(ctx, settingE2B, rand.Text) // 128 bits at the least
	if err != nil {
		return nil, err
	}
	return e2b.New(e2b.Config{Sandboxes: s.sandboxes, Templates: s.templates, Auth: s.auth, Agent: s.node.Agents(),
		Ports: s.ports, Names: s.cfg.Proxy.names(), Secret: []byte(secret), Budget: s.budget, Log: s.log, Registry: s.registry}, next), nil
}

// listen serves until ctx ends, then stops taking requests and lets those in
// flight finish until the shutdown timeout.
func (s *server) listen(ctx context.Context, ready func(net.Addr)) error {
	listener, err := net.Listen("tcp", s.cfg.Listen)
	if err != nil {
		return fmt.Errorf("listening for the API: %w", err)
	}
	metrics := promhttp.HandlerFor(s.registry, promhttp.HandlerOpts{})
	secret, err := s.setting(ctx, settingPorts, portproxy.NewSecret)
	if err != nil {
		return err
	}
	stopping, hangup := context.WithCancel(context.WithoutCancel(ctx))
	defer hangup()
	var hijacked sync.WaitGroup
	handler := api.New(api.Config{
		Stopping: stopping, Hijacked: &hijacked,
		Ports: s.ports, Names: s.cfg.Proxy.names(), Signer: portproxy.NewSigner(secret),
		Sandboxes: s.sandboxes, Templates: s.templates, Auth: s.auth, Events: s.events, Agent: s.node.Agents(),
		Budget: s.budget, Ready: func() error { return s.db.Ping(ctx) }, Metrics: metrics, Registry: s.registry, Log: s.log, Version: version,
	})
	surface, err := s.openE2B(ctx, handler)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	if surface != nil {
		handler = surface
	}
	work, stopWork := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { s.sandboxes.Run(work) })
	wg.Go(func() { _ = s.templates.Run(work) }) // returns nil
	wg.Go(func() { s.events.Run(work) })
	if surface != nil {
		wg.Go(func() { surface.Run(work) })
	}
	defer wg.Wait()
	defer stopWork()

	servers := []*http.Server{api.Server(s.cfg.Listen, handler, s.log)}
	servers[0].RegisterOnShutdown(s.templates.Hangup)
	servers[0].RegisterOnShutdown(s.ports.Hangup)
	servers[0].RegisterOnShutdown(hangup)
	if surface != nil {
		servers[0].RegisterOnShutdown(surface.Hangup)
	}
	failed := make(chan error, 2)
	go func() { failed <- servers[0].Serve(listener) }()
	if s.cfg.MetricsListen != "" {
		l, err := net.Listen("tcp", s.cfg.MetricsListen)
		if err != nil {
			return errors.Join(fmt.Errorf("listening for metrics: %w", err), servers[0].Close())
		}
		mux := http.NewServeMux()
		mux.Handle("GET /metrics", metrics)
		servers = append(servers, api.Server(s.cfg.MetricsListen, mux, s.log))
		go func() { failed <- servers[1].Serve(l) }()
	}
	s.log.InfoContext(ctx, "cay is ready", "url", "http://"+listener.Addr().String(), "data_dir", s.cfg.DataDir,
		"instance", s.instance, "network", s.slots.Range(), "version", version)
	if ready != nil {
		ready(listener.Addr())
	}
	select {
	case err := <-failed:
		return fmt.Errorf("serving: %w", err)
	case <-ctx.Done():
	}
	s.log.Info("shutting down; sandboxes go on running")
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(s.cfg.ShutdownTimeout))
	defer cancel()
	for _, srv := range servers {
		if err := srv.Shutdown(closing); err != nil {
			s.log.Warn("calls were cut off by the shutdown", "error", err)
			_ = srv.Close() // what Shutdown could not wait for
		}
	}
	waitFor(closing, &hijacked)
	return nil
}

// waitFor waits for those that net/http does not wait for, or until ctx ends.
func waitFor(ctx context.Context, wg *sync.WaitGroup) {
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-ctx.Done():
	}
}
