// Package buildkit builds Dockerfiles. It owns the program cay-buildkit, which it starts when
// a build is wanted and stops when none was for a while, that program's cache, and what
// it leaves on the host: control groups, network slots, directories.
//
// Nothing of a build reaches the host: the program and each RUN step have network
// namespaces that whoever opens the room has closed to the host, RUN steps run in gVisor, and
// images come in only through [Request].Base. It knows nothing of the product.
//
// A [Builder] may be used concurrently. After an error of [Builder.Build] nothing of the
// build is left but what the cache keeps of it.
package buildkit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/buildkit/wire"
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
	CacheBytes   int64         // what the cache is cut to after each build; 0 is 10 GiB
	Steps        int           // that run at once in one scope; 0 is 4
	StepBytes    int64         // what one RUN step may write; 0 is 10 GiB
	MemoryBytes  int64         // limit of the program itself, its page cache included; 0 is 1 GiB
}

const (
	defaultIdle   = 5 * time.Minute
	defaultCache  = 10 << 30
	defaultStep   = 10 << 30
	defaultSteps  = 4
	defaultMemory = 1 << 30
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
	if c.Steps == 0 {
		c.Steps = defaultSteps
	}
	for _, d := range []struct {
		value   *int64
		without int64
	}{{(*int64)(&c.IdleTimeout), int64(defaultIdle)}, {&c.CacheBytes, defaultCache}, {&c.StepBytes, defaultStep}, {&c.MemoryBytes, defaultMemory}} {
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

	mu sync.Mutex // held while the program is started or stopped
	// +checklocks:mu
	program *program // nil if none was started
	// +checklocks:mu
	users int // builds under way
	// +checklocks:mu
	idle *time.Timer // stops the program; nil while there are users
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
	b := &Builder{cfg: cfg, log: log, groups: groups}
	b.closed, b.close = context.WithCancel(context.Background())
	if err := b.clean(); err != nil {
		return nil, fmt.Errorf("cleaning up after an earlier build: %w", err)
	}
	for _, dir := range []string{b.cfg.Dir, b.builds()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("opening the build room: %w", err)
		}
	}
	return b, nil
}

// builds is where builds under way, and results that nobody has closed yet, have their directories.
func (b *Builder) builds() string { return filepath.Join(b.cfg.Dir, "builds") }

// cleanTimeout bounds the end of what was killed: a sandbox with gigabytes takes seconds.
const cleanTimeout = 30 * time.Second

// clean ends what is left in the room's control groups and removes the directories of builds.
func (b *Builder) clean() error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	return errors.Join(b.sweep(ctx), b.remove("builds"))
}

// sweep removes what a program leaves that did not end by itself: its groups with what runs in them, and
// then the scratch files of its steps.
func (b *Builder) sweep(ctx context.Context) error {
	parent := b.groups.Group(b.cfg.CgroupParent)
	names, err := parent.Children()
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		g := b.groups.Group(filepath.Join(b.cfg.CgroupParent, name))
		errs = append(errs, g.Kill(ctx), g.Remove())
	}
	if err := errors.Join(append(errs, parent.Remove())...); err != nil {
		return err // what may still run uses the files
	}
	return errors.Join(b.remove("scratch"), os.RemoveAll(b.cfg.RunDir))
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

// use returns the running program, started if need be, and counts the caller among its
// users until release is called, exactly once.
func (b *Builder) use(ctx context.Context) (*program, func(), error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed.Err() != nil {
		return nil, nil, ErrClosed
	}
	if b.idle != nil {
		b.idle.Stop()
		b.idle = nil
	}
	if b.program != nil && b.program.alive.Err() != nil {
		<-b.program.over
		b.program = nil
	}
	if b.program == nil {
		p, err := b.start(ctx)
		if err != nil {
			return nil, nil, err
		}
		b.program = p
	}
	b.users++
	return b.program, b.release, nil
}

func (b *Builder) release() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.users--; b.users == 0 {
		b.idle = time.AfterFunc(b.cfg.IdleTimeout, b.rest)
	}
}

// rest stops the program if it is still idle.
func (b *Builder) rest() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.users > 0 || b.program == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	b.log.Debug("stopping the build program: idle")
	if err := b.program.stop(ctx); err != nil {
		b.log.Error("stopping the build program", "error", err)
	}
	b.program = nil
}

// Running reports whether the program runs.
func (b *Builder) Running() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.program != nil && !b.program.ended()
}

// Prune removes from the cache what is not in use, the longest unused first, until keep bytes are
// left, and says how many bytes that freed.
func (b *Builder) Prune(ctx context.Context, keep int64) (freed int64, err error) {
	if _, err := os.Stat(filepath.Join(b.cfg.Dir, "cache")); errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	p, release, err := b.use(ctx)
	if err != nil {
		return 0, err
	}
	defer release()
	done, err := p.talk(ctx, wire.Request{Prune: &wire.Prune{Keep: max(keep, 0)}}, nil)
	if err != nil {
		return 0, err
	}
	if done.Failure != nil {
		return done.Freed, errors.New(done.Failure.Message)
	}
	return done.Freed, nil
}

// Close ends all builds and the program. Results stay as they are.
func (b *Builder) Close(ctx context.Context) error {
	b.close()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.idle != nil {
		b.idle.Stop()
	}
	if b.program == nil {
		return nil
	}
	err := b.program.stop(ctx)
	b.program = nil
	return err
}
