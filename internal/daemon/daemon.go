// Package daemon is the server: it opens all rooms with the settings of an operator, joins the core with the rooms that
// implement its interfaces, serves the API, and closes everything in reverse order. The adapters between rooms that do
// not know each other are here too. It also removes a server from the machine, and checks whether a machine has what a
// server needs.
//
// It decides nothing about sandboxes, and reads neither flags nor the environment. One process runs one server. A
// server that ends leaves its sandboxes running, which the next server on the same data directory adopts, and a record
// below [RunDir], which [Clean] removes together with them.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/blob"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/buildkit"
	"github.com/cayhq/cay/internal/config"
	"github.com/cayhq/cay/internal/egressproxy"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/hostfile"
	"github.com/cayhq/cay/internal/image"
	"github.com/cayhq/cay/internal/imagebuild"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/node"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sampler"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
	"github.com/cayhq/cay/internal/template"
	"github.com/cayhq/cay/internal/webhook"
)

// Names of files in a data directory, and of settings in its database.
const (
	databaseFile    = "cay.db"
	keyFile         = "api-key"
	settingInstance = "instance"
	settingRange    = "network_range" // of earlier versions; see moveRange
	settingE2B      = "e2b_secret"
	settingPorts    = "ports_secret" // signs URLs of ports
)

// dataFiles names everything that a server puts into its data directory, and the log that `make run` keeps there.
var dataFiles = []string{databaseFile, databaseFile + "-wal", databaseFile + "-shm", instanceFile, markFile,
	directoryFile, rangeFile, keyFile, "lock", "programs",
	"images", "sandboxes", "checkpoints", "contexts", buildDir, "scratch", "server.log"}

// server holds all rooms of a running server.
type server struct {
	cfg     config.Config
	version string
	// acceptRestore is the argument of Run.
	acceptRestore bool
	log           *slog.Logger
	session       store.Session
	instance      string // the node of the session
	// closers close the rooms, in reverse order.
	closers []func(context.Context) error

	db          *store.DB
	slots       *network.Network
	denied      *denied // what no sandbox may reach; used by openNetwork, and then by followDenied alone
	images      *image.Store
	contexts    *blob.Store // of builds
	files       *files      // nil without files.url
	dockerfiles *buildkit.Builder
	node        *node.Node
	egress      *egressproxy.Proxy
	egressOn    egressproxy.Listeners // opened before the network, whose rules name their ports
	templates   *template.Service
	auth        *auth.Service
	sandboxes   *sandbox.Service
	nodes       *fleet.Service
	fleet       *fleetRooms // nil without fleet.listen
	events      *event.Feed
	webhooks    *webhook.Service
	ports       *portproxy.Proxy
	samples     *sampler.Sampler
	registry    *prometheus.Registry
	budget      *budget.Budget // the memory that calls hold
}

// Run runs the server until ctx ends, with settings that [config.Config.Check] accepts. It closes everything that it
// opened before it returns. Sandboxes keep running. With acceptRestore it takes the state of PostgreSQL as it is,
// also if it is older than the machine's. It returns an error if the other servers of a fleet count this one as lost,
// so that the caller's service manager starts another process.
func Run(ctx context.Context, cfg config.Config, version string, acceptRestore bool) (err error) {
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
	s := &server{cfg: cfg, version: version, acceptRestore: acceptRestore, log: log, registry: prometheus.NewRegistry()}
	defer func() {
		// ctx has ended; closing has a time limit of its own.
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(cfg.ShutdownTimeout))
		defer cancel()
		for i := len(s.closers) - 1; i >= 0; i-- {
			err = errors.Join(err, s.closers[i](closing))
		}
	}()
	if err := s.open(ctx); err != nil {
		return err
	}
	return s.listen(ctx)
}

// onClose adds a closer.
func (s *server) onClose(f func(context.Context) error) { s.closers = append(s.closers, f) }

// open opens the rooms, from the leaves to the core, and reconciles rows and machine before the first request.
func (s *server) open(ctx context.Context) error {
	cfg := s.cfg
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("making the data directory: %w", err)
	}
	if f := checkDataDir(cfg.DataDir); !f.OK {
		s.log.Warn("the file system of the data directory is unfit", "reason", f.Detail, "fix", f.Fix)
	}
	lock, err := lockDir(cfg.DataDir, lockPatience)
	if err != nil {
		return err
	}
	s.onClose(func(context.Context) error { return lock.Close() })
	if s.db, s.session, err = openRecords(ctx, cfg, s.acceptRestore); err != nil {
		return err
	}
	s.instance = s.session.Holder.Node
	s.onClose(func(context.Context) error { return s.db.Close() })
	observeRecords(s.db, s.registry)
	s.events = event.New(event.Config{Keep: time.Duration(cfg.Events.Keep), MaxPerOrg: cfg.Events.MaxPerOrg,
		MaxFollowers: cfg.Events.MaxFollowers, Shared: s.db.Shared(), Now: s.db.Now}, s.db, s.log)
	s.db.OnEvents(s.events.Wake)
	s.boundMemory(ctx)
	record := ServerRecord{Instance: s.instance, URL: "http://" + cfg.Listen,
		KeyFile: filepath.Join(cfg.DataDir, keyFile), DataDir: cfg.DataDir, PID: os.Getpid()}
	if err := record.write(RunDir); err != nil {
		return err
	}
	if err := s.openHost(ctx); err != nil {
		return err
	}
	return s.openCore(ctx)
}

// setting returns a setting of this data directory, which first makes when the server starts for the first time.
func (s *server) setting(ctx context.Context, name string, first func() string) (string, error) {
	return s.db.FirstSetting(ctx, name, first())
}

// openHost opens the rooms that work on the machine.
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
		CacheBudget: int64(cfg.Images.CacheMB) << 20, Budget: int64(cfg.Images.PulledMB) << 20, PlainHTTP: cfg.Images.Registries,
		// Any user may name a registry, so that the server reaches only addresses that sandboxes may reach too.
		Dial: func(to netip.AddrPort) error { return s.slots.Permitted(to.Addr()) }}, s.log)
	if err != nil {
		return err
	}
	s.onClose(func(context.Context) error { s.images.Close(); return nil })
	s.contexts, err = blob.Open(filepath.Join(cfg.DataDir, "contexts"), int64(cfg.Capacity.MinFreeDiskMB)<<20)
	if err != nil {
		return fmt.Errorf("opening the directory of build contexts: %w", err)
	}
	if err := s.openFiles(ctx); err != nil {
		return err
	}
	if err := s.openBuilds(programsDir, programs); err != nil {
		return err
	}
	rootFS := imagebuild.RootFS{Images: s.images, Recheck: func(image string) { s.templates.Recheck(image) }}
	s.node, err = node.Open(node.Config{
		Instance: s.instance, Dir: filepath.Join(cfg.DataDir, "sandboxes"), RunDir: stateDir(RunDir, s.instance),
		Platform: cfg.Sandbox.Platform, Programs: programs, ProgramsDir: programsDir,
		Checkpoints: filepath.Join(cfg.DataDir, "checkpoints"), Nameservers: nameservers(cfg.Network.Nameservers),
		PolicyChanged: s.egress.Recheck, Saved: s.saved,
		MaxSandboxes: cfg.Capacity.MaxSandboxes, MinHostMemory: int64(cfg.Capacity.MinFreeMemoryMB) << 20,
		MinDisk: int64(cfg.Capacity.MinFreeDiskMB) << 20, MaxPIDs: cfg.Sandbox.MaxPIDs,
		FirstUID: uint32(cfg.Sandbox.FirstUID), AnswerTimeout: time.Duration(cfg.Sandbox.AnswerTimeout),
	}, s.slots, rootFS, s.log)
	if err != nil {
		return err
	}
	s.onClose(func(context.Context) error { s.node.Close(); return nil })
	return nil
}

// limitsOf returns the quotas, limits and rates of the settings.
func limitsOf(cfg config.Config) auth.Config {
	return auth.Config{
		Quota: auth.Quota{Sandboxes: cfg.Quota.Sandboxes, VCPUs: cfg.Quota.VCPUs, MemoryMB: cfg.Quota.MemoryMB},
		Rate:  cfg.RateLimit.PerSecond, Burst: cfg.RateLimit.Burst, OrgFactor: cfg.RateLimit.OrgFactor,
		FailedRate: cfg.RateLimit.FailedPerSecond, FailedBurst: cfg.RateLimit.FailedBurst, MaxKeys: cfg.Quota.APIKeys,
	}
}

// saveKey returns a function that writes the first API key into a data directory. It returns once the key is on the
// disk: after that the key's row is written, and with the row in the records no start makes another first key.
func saveKey(dataDir string) func(secret string) error {
	return func(secret string) error {
		return hostfile.ReplaceSynced(filepath.Join(dataDir, keyFile), []byte(secret+"\n"), 0o600)
	}
}

// openCore opens the core rooms, which decide, and reconciles them with the machine.
func (s *server) openCore(ctx context.Context) error {
	cfg := s.cfg
	limits := limitsOf(cfg)
	limits.Log, limits.Now, limits.Alone = s.log, s.db.Now, s.db.Alone
	s.auth = auth.New(s.db, limits)
	s.onClose(s.auth.Close)
	if _, err := s.auth.Bootstrap(ctx, saveKey(cfg.DataDir)); err != nil {
		return err
	}
	var err error
	if s.templates, err = s.openTemplates(ctx); err != nil {
		return err
	}
	s.sandboxes = sandbox.New(sandbox.Config{
		Sizes: cfg.Sandbox.Sizes, DefaultSize: cfg.Sandbox.DefaultSize, DefaultDisk: cfg.Sandbox.DefaultDiskMB,
		MaxDisk: cfg.Sandbox.MaxDiskMB, KeepDestroyed: time.Duration(cfg.Sandbox.KeepDestroyed),
		MaxDestroyed: cfg.Sandbox.MaxDestroyed, MaxSnapshots: cfg.Sandbox.MaxSnapshots, Pool: s.pool(),
		Node: s.instance, Now: s.db.Now,
	}, s.db, s.node, s.templates, s.log, s.observe())
	s.onClose(s.sandboxes.Close)
	if err := s.openWebhooks(); err != nil {
		return err
	}
	s.ports = portproxy.New(s.node.Agents(), s.log)
	s.samples = sampler.New(s.sandboxes, s.node.Agents(), s.log)
	s.onClose(s.ports.Close)
	s.serveEgress(s.egressOn)
	s.followDenied()
	if err := s.openNodes(ctx); err != nil {
		return err
	}
	return s.sandboxes.Reconcile(ctx)
}

// newLogger returns a logger to standard error with the level and format of the settings.
func newLogger(cfg config.Config) (*slog.Logger, error) {
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
