// Package buildkit builds Dockerfiles. It owns the program cay-buildkit, which it starts when
// a build is wanted and stops when none was for a while, that program's cache, and what
// it leaves on the host: control groups, network slots, directories.
//
// Nothing of a build reaches the host: the program and each RUN step have network
// namespaces that whoever opens the room has closed to the host, RUN steps run in gVisor,
// images come in only through [Request].Base, and the program sees a file tree of its own. There is one
// program, with a cache of its own, for each scope. What it writes goes to a file system of fixed size
// in one file, where the machine can mount one. It knows nothing of the product.
//
// A [Builder] may be used concurrently. After an error of [Builder.Build] nothing of the
// build is left but what the cache keeps of it.
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

// Slots gives network namespaces: one to the program, from which it fetches what ADD names,
// and one to each RUN step, since gVisor takes over the address of its eth0. Whoever gives
// them has closed them to the host and to other private networks.
type Slots interface {
	// Take returns the path of a namespace that is the caller's until it calls release,
	// exactly once, when nothing runs in it any more.
	Take(ctx context.Context) (namespace string, release func(context.Context) error, err error)
}

// Config is what a room needs.
type Config struct {
	Dir          string // for the cache and for builds under way; the room's alone
	RunDir       string // short, for gVisor's sockets; need not outlive a reboot; the room's alone
	Program      string // path of cay-buildkit
	Runsc        string // path of cay-runsc
	Platform     string // of gVisor; "" is systrap
	CgroupParent string // absolute, such as /cay-1a2b3c-build; holds no process; the room's alone
	Slots        Slots
	Nameservers  []netip.Addr  // for the program and for RUN steps
	IdleTimeout  time.Duration // without builds, after which the program is stopped; 0 is 5 minutes
	CacheBytes   int64         // what a scope's cache is cut to after each build; 0 is 10 GiB
	Steps        int           // that run at once in one scope; 0 is 4
	Programs     int           // that run before idle ones are stopped for another scope's; 0 is 8
	BuildBytes   int64         // what one build may write, and what its result may have; 0 is 20 GiB
	Builds       int           // that run at once in one scope; more share the room of these; 0 is 4
	MemoryBytes  int64         // limit of the program itself, its page cache included; 0 is 1 GiB
}

const (
	defaultIdle   = 5 * time.Minute
	defaultCache  = 10 << 30
	defaultBuild  = 20 << 30
	defaultBuilds = 4
	defaultSteps  = 4
	// defaultPrograms have some 15 MiB of their own each. More cost memory; fewer cost starts, of 0.1 s each.
	defaultPrograms = 8
	defaultMemory   = 1 << 30
	// programPIDs bounds the program's threads and the helpers of its steps.
	programPIDs = 4096
)

func (c *Config) complete() error {
	if c.Dir == "" || c.RunDir == "" || c.Program == "" || c.Runsc == "" || c.Slots == nil || !filepath.IsAbs(c.CgroupParent) || c.CgroupParent == "/" {
		return errors.New("opening the build room: the configuration is not complete")
	}
	if c.Platform == "" {
		c.Platform = "systrap"
	}
	c.Steps, c.Builds, c.Programs = cmp.Or(c.Steps, defaultSteps), cmp.Or(c.Builds, defaultBuilds), cmp.Or(c.Programs, defaultPrograms)
	for _, d := range []struct {
		value   *int64
		without int64
	}{{(*int64)(&c.IdleTimeout), int64(defaultIdle)}, {&c.CacheBytes, defaultCache}, {&c.BuildBytes, defaultBuild}, {&c.MemoryBytes, defaultMemory}} {
		if *d.value == 0 {
			*d.value = d.without
		}
	}
	return nil
}

// Builder is the open room.
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

// ErrClosed is the error of builds after [Builder.Close] has begun.
var ErrClosed = errors.New("the build room is closed")

// Open opens the room and removes what a crash left: processes, control groups, directories of
// builds. It starts nothing.
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
		return nil, fmt.Errorf("removing disks that nobody uses: %w", err)
	}
	return b, nil
}

// builds is where builds under way have their contexts, by scope.
func (b *Builder) builds() string { return filepath.Join(b.cfg.Dir, "builds") }

// results is where results that are not closed yet have their directories.
func (b *Builder) results() string { return filepath.Join(b.cfg.Dir, "results") }

// disks is where scopes have what their programs write.
func (b *Builder) disks() string { return filepath.Join(b.cfg.Dir, "disks") }

// cleanTimeout bounds the end of what was killed: a sandbox with gigabytes takes seconds.
const cleanTimeout = 30 * time.Second

// clean ends what is left in the room's control groups and removes the directories of builds, and the
// cache that all scopes shared before there was one for each.
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
		return err // what may still run uses the files
	}
	return errors.Join(b.remove("builds"), b.remove("results"), b.remove("scratch"), b.remove("cache"), os.RemoveAll(b.cfg.RunDir))
}

// sweep removes a group, and what a program leaves that did not end by itself: the groups below it with what
// runs in them.
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

// remove removes a directory of the room's, if anybody knows where that is.
func (b *Builder) remove(name string) error {
	if b.cfg.Dir == "" {
		return nil
	}
	return os.RemoveAll(filepath.Join(b.cfg.Dir, name))
}

// Purge removes everything of a room that nobody has open: processes, groups, directories, the cache. The
// slots are for who gave them to remove. Nothing there is success, and so is a [Config].Dir that nobody
// knows any more.
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
