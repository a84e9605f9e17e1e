// Command cay-buildkit builds Dockerfiles: BuildKit as a library, with one worker whose RUN
// steps are gVisor sandboxes. The server starts it when a build is wanted and stops it when
// none was for a while; they talk over a connection that the program inherits (see
// internal/buildkit/wire). It is embedded into cay and unpacked under its content hash.
//
// It is PID 1 of a PID namespace, in a mount namespace and a network namespace that the
// server chose: whatever ends it ends everything that it started, and no mount of it
// outlives it.
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

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/buildkit/wire"
	"github.com/cayhq/cay/internal/cgroup"
)

// controlFD is the control connection's descriptor.
const controlFD = 3

func main() {
	logrus.SetLevel(logrus.ErrorLevel)
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "cay-buildkit:", err)
		os.Exit(1)
	}
}

// daemon is the program at work.
type daemon struct {
	control *wire.Conn
	slots   *slots
	engine  *engine

	mu sync.Mutex
	// +checklocks:mu
	running int // connections being served
}

// serve works until the control connection ends.
func serve() error {
	control, err := wire.Open(os.NewFile(controlFD, "control"))
	if err != nil {
		return fmt.Errorf("it is started by cay server, not by hand: %w", err)
	}
	var first wire.Control
	if _, err := control.Receive(&first); err != nil || first.Config == nil {
		return fmt.Errorf("waiting for a configuration: %w", err)
	}
	d := &daemon{control: control, slots: &slots{control: control, waiting: map[int64]chan gift{}}}
	if err := d.start(first.Config); err != nil {
		return errors.Join(err, control.Send(wire.Ask{Ready: &wire.Ready{Error: err.Error()}}, nil))
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

// start prepares the namespaces and the directories, and opens the cache.
func (d *daemon) start(c *wire.Config) error {
	if err := enter(c); err != nil {
		return err
	}
	groups, err := cgroup.Detect()
	if err != nil {
		return fmt.Errorf("finding control groups: %w", err)
	}
	scratch := filepath.Join(c.Dir, "scratch")
	if err := errors.Join(os.Setenv("TMPDIR", scratch), withoutSSH(c.RunDir)); err != nil {
		return err
	}
	run := &steps{config: c, slots: d.slots, groups: groups, dir: filepath.Join(scratch, "steps"), turns: map[string]chan struct{}{}}
	cache := filepath.Join(c.Dir, "cache")
	if d.engine, err = openEngine(context.Background(), cache, c.CacheBytes, run); err == nil {
		return nil
	}
	// A cache is only a cache: one that cannot be opened is begun anew.
	fmt.Fprintln(os.Stderr, "cay-buildkit: the cache is begun anew:", err)
	if err := os.RemoveAll(cache); err != nil {
		return fmt.Errorf("removing a broken cache: %w", err)
	}
	d.engine, err = openEngine(context.Background(), cache, c.CacheBytes, run)
	return err
}

// withoutSSH keeps git from ssh, which would show the server's own keys to whomever a
// repository's submodules name.
func withoutSSH(dir string) error {
	bin := filepath.Join(dir, "bin")
	return errors.Join(os.Mkdir(bin, 0o700), os.Symlink("/bin/false", filepath.Join(bin, "ssh")),
		os.Setenv("PATH", bin+":"+os.Getenv("PATH")))
}

// enter makes the mount namespace ours: nothing that is mounted here shows outside, and
// processes and names are seen as they are from inside.
func enter(c *wire.Config) error {
	if os.Getpid() != 1 {
		return errors.New("not in a PID namespace of its own")
	}
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("leaving the host's mounts: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	// Names are asked of the given servers, not of one on the host's loopback, which
	// is not reached from here, and are not what the host calls its neighbours.
	for file, text := range map[string]string{"resolv.conf": resolvConf(c.Nameservers), "hosts": "127.0.0.1\tlocalhost\n"} {
		path := filepath.Join(c.RunDir, file)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return fmt.Errorf("writing %s: %w", file, err)
		}
		target, err := filepath.EvalSymlinks("/etc/" + file)
		if errors.Is(err, os.ErrNotExist) {
			continue // nothing to hide
		}
		if err == nil {
			err = unix.Mount(path, target, "", unix.MS_BIND, "")
		}
		if err != nil {
			return fmt.Errorf("replacing /etc/%s: %w", file, err)
		}
	}
	return nil
}

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
		b := &build{engine: d.engine, conn: conn, request: r.Build, bases: map[string]*given{}, places: map[string]place{}}
		done.Manifest, err = b.run(ctx)
	case r.Prune != nil:
		done.Freed, err = d.engine.prune(ctx, r.Prune.Keep)
	default:
		err = errors.New("the request is empty")
	}
	if err != nil {
		done.Failure = failureOf(err)
	}
	// Who has left does not want to know.
	_ = conn.Send(wire.Report{Done: &done}, nil)
	if r.Build != nil {
		if _, err := d.engine.prune(ctx, d.engine.cacheBytes); err != nil && ctx.Err() == nil {
			fmt.Fprintln(os.Stderr, "cay-buildkit:", err)
		}
	}
}

// count counts connections. When the last one ends, nothing that this process started itself is
// waited for by anybody, and what is left to reap are orphans, whose parent PID 1 is. Memory that builds
// took is given back then.
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
