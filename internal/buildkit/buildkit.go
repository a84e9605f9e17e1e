// Package buildkit builds Dockerfiles. It owns the program cay-buildkit, which it starts for
// builds and stops after some time without one, that program's cache, and what the program leaves
// on the host: control groups, network slots, directories.
//
// Nothing of a build reaches the host. The program and each RUN step have network namespaces that
// the caller has closed to the host, RUN steps run in gVisor, images come in only through
// [Request].Base, and the program sees a file tree of its own. Each scope has a program and a
// cache of its own. What the program writes goes to a file system of fixed size in one file, if
// the machine can mount one. The package knows nothing of the product.
//
// A [Builder] is safe for concurrent use. An error of [Builder.Build] leaves nothing of the build
// except what is in the cache.
package buildkit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/cgroup"
)

// Slots provides network namespaces: one for the program, from which it fetches what ADD names,
// and one for each RUN step, since gVisor takes over the address of its eth0. The namespaces must
// be closed to the host and to other private networks.
type Slots interface {
	// Take returns the path of a namespace that belongs to the caller until it calls release,
	// exactly once, when nothing runs in the namespace any more.
	Take(ctx context.Context) (namespace string, release func(context.Context) error, err error)
}

// Config configures a Builder.
type Config struct {
	Dir          string // for the cache and for builds under way; for the Builder alone
	RunDir       string // short, for gVisor's sockets; may be lost at a reboot; for the Builder alone
	Program      string // path of cay-buildkit
	Runsc        string // path of cay-runsc
	Platform     string // of gVisor; "": systrap
	CgroupParent string // absolute, such as /cay-1a2b3c-build; holds no process; for the Builder alone
	Slots        Slots
	Nameservers  []netip.Addr  // for the program and for RUN steps
	IdleTimeout  time.Duration // time without builds until the program is stopped; 0: 5 minutes
	CacheBytes   int64         // size to which a scope's cache is cut after each build; 0: 10 GiB
	Steps        int           // RUN steps at once in one scope; 0: 4
	Programs     int           // programs at once before idle ones are stopped for another scope's; 0: 8
	BuildBytes   int64         // bytes that one build may write, and that its result may have; 0: 20 GiB
	Builds       int           // builds at once in one scope with BuildBytes each; more builds share that space; 0: 4
	MemoryBytes  int64         // limit of the program itself, with its page cache; 0: 1 GiB
}

const (
	defaultIdle   = 5 * time.Minute
	defaultCache  = 10 << 30
	defaultBuild  = 20 << 30
	defaultBuilds = 4
	defaultSteps  = 4
	// defaultPrograms is the number of programs that run at once. Each takes some 15 MiB, so more
	// cost memory; with fewer there are more starts, of 0.1 s each.
	defaultPrograms = 8
	defaultMemory   = 1 << 30
	// programPIDs bounds the program's threads and the helpers of its steps.
	programPIDs = 4096
)

func (c *Config) complete() error {
	if c.Dir == "" || c.RunDir == "" || c.Program == "" || c.Runsc == "" || c.Slots == nil ||
		!filepath.IsAbs(c.CgroupParent) || c.CgroupParent == "/" {
		return errors.New("opening the builder: the configuration is incomplete")
	}
	if c.Platform == "" {
		c.Platform = "systrap"
	}
	c.Steps, c.Builds, c.Programs = cmp.Or(c.Steps, defaultSteps), cmp.Or(c.Builds, defaultBuilds),
		cmp.Or(c.Programs, defaultPrograms)
	for _, d := range []struct {
		value   *int64
		without int64
	}{{(*int64)(&c.IdleTimeout), int64(defaultIdle)}, {&c.CacheBytes, defaultCache}, {&c.BuildBytes, defaultBuild},
		{&c.MemoryBytes, defaultMemory}} {
		if *d.value == 0 {
			*d.value = d.without
		}
	}
	return nil
}

// Builder builds Dockerfiles. Make it with [Open].
type Builder struct {
	cfg    Config
	log    *slog.Logger
	groups *cgroup.Hierarchy
	closed context.Context // ends with Close
	close  context.CancelFunc

	mu sync.Mutex
	// +checklocks:mu
	seats map[string]*seat // by scope
	// +checklocks:mu
	noImage string // why disks are directories, once that is known
}

// ErrClosed is returned by builds after [Builder.Close] has begun.
var ErrClosed = errors.New("the builder is closed")

// Open returns a Builder, after removing what a crash left: processes, control groups,
// directories of builds. It starts nothing.
func Open(cfg Config, log *slog.Logger) (*Builder, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	groups, err := cgroup.Detect()
	if err != nil {
		return nil, fmt.Errorf("opening the build room: %w", err)
	}
	b := &Builder{cfg: cfg, log: log, groups: groups, seats: map[string]*seat{}}
	b.closed, b.close = context.WithCancel(context.Background())
	if err := b.clean(); err != nil {
		return nil, fmt.Errorf("cleaning up after an earlier build: %w", err)
	}
	for _, dir := range []string{b.cfg.Dir, b.builds(), b.results(), b.disks()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("opening the build room: %w", err)
		}
	}
	if err := b.forget(); err != nil {
		return nil, fmt.Errorf("removing unused disks: %w", err)
	}
	return b, nil
}

// builds is the directory of the contexts of builds under way, by scope.
func (b *Builder) builds() string { return filepath.Join(b.cfg.Dir, "builds") }

// results is the directory of results that are not closed yet.
func (b *Builder) results() string { return filepath.Join(b.cfg.Dir, "results") }

// disks is the directory of the scopes' disks, to which the programs write.
func (b *Builder) disks() string { return filepath.Join(b.cfg.Dir, "disks") }

// cleanTimeout bounds the time in which killed processes end. A sandbox with gigabytes takes
// seconds.
const cleanTimeout = 30 * time.Second

// clean kills the processes in the Builder's control groups and removes the directories of
// builds. It also removes the cache that all scopes shared in older versions.
func (b *Builder) clean() error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	parent := b.groups.Group(b.cfg.CgroupParent)
	names, err := parent.Children()
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		errs = append(errs, b.sweep(ctx, filepath.Join(b.cfg.CgroupParent, name)))
	}
	if err := errors.Join(append(errs, parent.Remove())...); err != nil {
		return err // processes that may still run use the files
	}
	return errors.Join(b.remove("builds"), b.remove("results"), b.remove("scratch"), b.remove("cache"),
		os.RemoveAll(b.cfg.RunDir))
}

// sweep removes a group, with the groups below it and the processes in them, which a killed
// program leaves.
func (b *Builder) sweep(ctx context.Context, path string) error {
	group := b.groups.Group(path)
	names, err := group.Children()
	if err != nil {
		return err
	}
	errs := []error{group.Kill(ctx)}
	for _, name := range names {
		g := b.groups.Group(filepath.Join(path, name))
		errs = append(errs, g.Kill(ctx), g.Remove())
	}
	return errors.Join(append(errs, group.Remove())...)
}

// remove removes a directory of the Builder's, if its place is known.
func (b *Builder) remove(name string) error {
	if b.cfg.Dir == "" {
		return nil
	}
	return os.RemoveAll(filepath.Join(b.cfg.Dir, name))
}

// Purge removes everything of a Builder that no process has open: processes, groups, directories,
// the cache. It does not remove the slots. If there is nothing, or if [Config].Dir is not known
// any more, it succeeds.
func Purge(cfg Config) error {
	groups, err := cgroup.Detect()
	if err != nil {
		return err
	}
	b := &Builder{cfg: cfg, groups: groups}
	if err := b.clean(); err != nil {
		return fmt.Errorf("removing the build room: %w", err)
	}
	if err := b.remove(""); err != nil {
		return fmt.Errorf("removing the build room: %w", err)
	}
	return nil
}
