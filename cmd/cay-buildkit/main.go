// Command cay-buildkit builds Dockerfiles. It is BuildKit as a library, with one worker whose RUN
// steps are gVisor sandboxes. The server starts it for builds and stops it after some time
// without one; they talk over a connection that the program inherits (see
// internal/buildkit/wire). It is embedded into cay and unpacked under its content hash.
//
// It builds for one organization. It is PID 1 of a PID namespace, in a mount namespace and a
// network namespace that the server chose, so that its end ends everything that it started, and
// no mount of it outlives it. Before it serves anything it leaves the host's file tree and gives
// up what it does not need of the kernel.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/buildkit/wire"
	"github.com/cayhq/cay/internal/cgroup"
)

// controlFD is the descriptor of the control connection.
const controlFD = 3

func main() {
	logrus.SetLevel(logrus.ErrorLevel)
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "cay-buildkit:", err)
		os.Exit(1)
	}
}

// daemon is the state of the running program.
type daemon struct {
	control *wire.Conn
	slots   *slots
	disk    *disk
	engine  *engine
	tidying sync.Mutex // held while tidying up

	mu sync.Mutex
	// +checklocks:mu
	running int // connections being served
	// +checklocks:mu
	notYet context.CancelFunc // cancels the tidying after the latest build; nil before the first
}

// serve serves until the control connection ends.
func serve() error {
	control, err := wire.Open(os.NewFile(controlFD, "control"))
	if err != nil {
		return fmt.Errorf("cay server starts this program; it cannot be started by hand: %w", err)
	}
	var first wire.Control
	if _, err := control.Receive(&first); err != nil || first.Config == nil {
		return fmt.Errorf("waiting for a configuration: %w", err)
	}
	d := &daemon{control: control, slots: &slots{control: control, waiting: map[int64]chan gift{}}}
	if err := d.start(first.Config); err != nil {
		return errors.Join(err,
			control.Send(wire.Ask{Ready: &wire.Ready{Error: err.Error(), NoDisk: errors.Is(err, errNoDisk)}}, nil))
	}
	ready := &wire.Ready{Snapshotter: d.engine.snapshotter, Git: d.engine.worker.GitSource != nil}
	if err := control.Send(wire.Ask{Ready: ready}, nil); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var builds sync.WaitGroup
	for {
		var said wire.Control
		file, err := control.Receive(&said)
		if err != nil {
			cancel()
			builds.Wait()
			err = errors.Join(ignore(err, io.EOF), d.engine.close())
			return err
		}
		switch {
		case said.Build && file != nil:
			builds.Go(func() { d.connection(ctx, file) })
		case said.Slot != nil:
			d.slots.given(*said.Slot, file)
		case file != nil:
			file.Close()
		}
	}
}

func ignore(err, expected error) error {
	if errors.Is(err, expected) {
		return nil
	}
	return err
}

// start leaves the host's file tree, gives up privileges, and opens the disk and the cache.
func (d *daemon) start(c *wire.Config) error {
	if err := enter(c); err != nil {
		return err
	}
	// These directories have the program's own ssh and git.
	scratch := filepath.Join(dataDir, "scratch")
	err := errors.Join(os.Setenv("TMPDIR", scratch), os.Setenv("PATH", binDir+":/usr/bin:/bin"), confine())
	if err != nil {
		return err
	}
	groups, err := cgroup.Detect()
	if err != nil {
		return fmt.Errorf("finding control groups: %w", err)
	}
	cache := filepath.Join(dataDir, "cache")
	if _, err := os.Stat(overdrawn); err == nil {
		fmt.Fprintln(os.Stderr, "cay-buildkit: making the cache anew: it could not be cut to its limit")
		if err := errors.Join(os.RemoveAll(cache), os.Remove(overdrawn)); err != nil {
			return fmt.Errorf("removing a cache: %w", err)
		}
	}
	if err := errors.Join(os.RemoveAll(scratch), os.MkdirAll(scratch, 0o700)); err != nil {
		return fmt.Errorf("making room for steps: %w", err)
	}
	if d.disk, err = openDisk(dataDir, c); err != nil {
		return err
	}
	run := &steps{config: c, slots: d.slots, groups: groups, disk: d.disk, dir: filepath.Join(scratch, "steps"),
		running: make(chan struct{}, c.Steps)}
	if d.engine, err = openEngine(context.Background(), cache, c.CacheBytes, run); err != nil {
		// It is only a cache: one that cannot be opened is made anew.
		fmt.Fprintln(os.Stderr, "cay-buildkit: making the cache anew:", err)
		if err := os.RemoveAll(cache); err != nil {
			return fmt.Errorf("removing a broken cache: %w", err)
		}
		if d.engine, err = openEngine(context.Background(), cache, c.CacheBytes, run); err != nil {
			return err
		}
	}
	go d.disk.watch()
	return nil
}

// overdrawn is a file that marks a cache that was too large even after it was cut. The next
// program makes it anew.
const overdrawn = dataDir + "/overdrawn"

// connection serves a connection until it ends.
func (d *daemon) connection(ctx context.Context, file *os.File) {
	conn, err := wire.Open(file)
	if err != nil {
		return
	}
	defer conn.Close()
	d.count(1)
	defer d.count(-1)
	var r wire.Request
	if _, err := conn.Receive(&r); err != nil {
		return
	}
	var done wire.Done
	switch {
	case r.Build != nil:
		err = d.build(ctx, conn, r.Build, &done)
	case r.Prune != nil:
		done.Freed, err = d.engine.prune(ctx, r.Prune.Keep)
	default:
		err = errors.New("the request is empty")
	}
	if err != nil {
		done.Failure = failureOf(err)
	}
	// An error means that the client has left.
	_ = conn.Send(wire.Report{Done: &done}, nil)
	d.tidy(ctx, false)
	if r.Build != nil {
		d.tidyLater(ctx)
	}
}

// leftFor are the times after a build at which the disk is tidied up: soon after it, when what
// the build releases late is gone, and when its context has expired. Another build's end cancels
// the rest.
var leftFor = []time.Duration{time.Second, 3 * time.Second, 6 * time.Second, sourceAge}

// tidyLater tidies up after the latest build, at the times in leftFor.
func (d *daemon) tidyLater(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.notYet != nil {
		d.notYet()
	}
	d.notYet = cancel
	go func() {
		defer cancel()
		for _, wait := range leftFor {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
				d.tidy(ctx, true)
			}
		}
	}()
}

// build builds, in as much space on the disk as one build may have.
func (d *daemon) build(ctx context.Context, conn *wire.Conn, r *wire.Build, done *wire.Done) (err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	use, err := d.disk.begin(cancel)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.disk.end(use)) }()
	b := &build{engine: d.engine, disk: d.disk, use: use, conn: conn, request: r, bases: map[string]*given{},
		places: map[string]place{}}
	done.Manifest, done.Descriptor, err = b.run(ctx, cancel)
	return err
}

// tidy cuts the cache to its size, and if trim is true gives the host the unused blocks, which
// takes a while.
func (d *daemon) tidy(ctx context.Context, trim bool) {
	d.tidying.Lock()
	defer d.tidying.Unlock()
	_, err := d.engine.prune(ctx, d.engine.cacheBytes)
	if trim {
		err = errors.Join(err, d.disk.trim())
		if d.disk.overdrawn(d.engine.cacheBytes) {
			err = errors.Join(err, os.WriteFile(overdrawn, nil, 0o600))
		}
	}
	if err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, "cay-buildkit: tidying up:", err)
	}
}

// count counts connections. When the last one ends, this process waits for none of its own
// children, so all that is left to reap are orphans, whose parent PID 1 is. It then gives back
// the memory of builds.
func (d *daemon) count(by int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.running += by; d.running > 0 {
		return
	}
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if pid <= 0 || err != nil {
			break
		}
	}
	debug.FreeOSMemory()
}
