package buildkit

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/buildkit/wire"
	"github.com/cayhq/cay/internal/cgroup"
)

// program is one run of cay-buildkit.
type program struct {
	builder *Builder
	seat    *seat
	log     *slog.Logger
	control *wire.Conn
	cmd     *exec.Cmd
	ready   chan *wire.Ready // receives one value
	over    chan struct{}    // closed when the process, all that it started, and its slots are gone
	status  error            // of the process; set before over is closed
	alive   context.Context  // ends with the process
	die     context.CancelFunc
	taking  sync.WaitGroup

	mu sync.Mutex
	// +checklocks:mu
	taken map[int64]func(context.Context) error // releases of slots, by the program's numbers of them
}

// startTimeout bounds a start. Opening the cache's files is quick, but a broken cache is removed
// first.
const startTimeout = 2 * time.Minute

// startProgram starts the program and waits until it is ready. If an image cannot be mounted, it
// fails with errNoDisk.
func (s *seat) startProgram(ctx context.Context, disk string, image bool) (_ *program, err error) {
	b := s.builder
	namespace, release, err := b.cfg.Slots.Take(ctx)
	if err != nil {
		return nil, fmt.Errorf("getting a network for the build program: %w", err)
	}
	control, theirs, err := wire.Pair()
	if err != nil {
		return nil, errors.Join(err, release(ctx))
	}
	defer theirs.Close()
	p := &program{builder: b, seat: s, log: b.log.With("scope", s.scope), control: control,
		ready: make(chan *wire.Ready, 1), over: make(chan struct{}), taken: map[int64]func(context.Context) error{0: release}}
	p.alive, p.die = context.WithCancel(context.Background())
	p.cmd = exec.Command(b.cfg.Program)
	p.cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		// The size of a step's log is bounded, not its speed.
		"BUILDKIT_STEP_LOG_MAX_SIZE=4194304", "BUILDKIT_STEP_LOG_MAX_SPEED=-1"}
	p.cmd.ExtraFiles = []*os.File{theirs}
	p.cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL,
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	said, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting the build program: %w", err), control.Close(), release(ctx))
	}
	started := make(chan error, 1)
	go p.live(namespace, said, started)
	if err := <-started; err != nil {
		<-p.over
		return nil, fmt.Errorf("starting the build program: %w", err)
	}
	if err := p.configure(ctx, disk, image); err != nil {
		p.kill()
		<-p.over
		return nil, fmt.Errorf("starting the build program: %w", err)
	}
	return p, nil
}

// live starts the process in a network namespace and waits for its end. The thread is the
// process's parent, so that the process dies with the server, and it is in the process's
// namespace.
func (p *program) live(namespace string, said io.Reader, started chan<- error) {
	runtime.LockOSThread() // never unlocked, so that the thread ends here
	if unix.Gettid() == unix.Getpid() {
		// The main thread cannot end, and must not enter another namespace.
		go p.live(namespace, said, started)
		<-p.over
		runtime.UnlockOSThread()
		return
	}
	err := enterNetwork(namespace)
	if err == nil {
		err = p.cmd.Start()
	}
	started <- err
	if err == nil {
		// Read the pipe before Wait, which closes it.
		logged := make(chan struct{})
		go func() { defer close(logged); p.logLines(said) }()
		listened := make(chan struct{})
		go func() { defer close(listened); p.listen() }()
		<-logged
		p.status = p.cmd.Wait()
		p.control.Close()
		<-listened
	} else {
		p.control.Close()
	}
	p.bury()
	close(p.over)
}

func enterNetwork(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("opening namespace %s: %w", path, err)
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("entering namespace %s: %w", path, err)
	}
	return nil
}

// bury removes what the process leaves: groups, scratch files, and its slots. The kernel has
// ended all that it started, with its PID namespace.
func (p *program) bury() {
	p.die()
	p.taking.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	err := errors.Join(p.builder.sweep(ctx, p.group()), os.RemoveAll(p.runDir()))
	p.mu.Lock()
	taken := p.taken
	p.taken = nil
	p.mu.Unlock()
	for _, release := range taken {
		err = errors.Join(err, release(ctx))
	}
	if err != nil {
		p.log.Error("cleaning up after the build program", "error", err)
	}
}

// logLines logs what the program writes, until its end.
func (p *program) logLines(said io.Reader) {
	lines := bufio.NewReaderSize(said, 8<<10)
	for {
		line, _, err := lines.ReadLine() // a longer line comes in pieces
		if err != nil {
			return
		}
		p.log.Warn("build program", "said", string(line))
	}
}

// group returns the control group of the program; its steps' groups are below.
func (p *program) group() string {
	return filepath.Join(p.builder.cfg.CgroupParent, strconv.Itoa(p.seat.number))
}

// runDir returns the empty directory over which the program mounts its file tree.
func (p *program) runDir() string {
	return filepath.Join(p.builder.cfg.RunDir, strconv.Itoa(p.seat.number))
}

// configure limits the process, which waits, and then sends it its configuration.
func (p *program) configure(ctx context.Context, disk string, image bool) error {
	cfg := p.builder.cfg
	contexts := p.builder.contexts(p.seat.scope)
	for _, dir := range []string{p.runDir(), contexts} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	group := p.builder.groups.Group(filepath.Join(p.group(), "program"))
	err := group.Make(cgroup.Limits{MemoryBytes: cfg.MemoryBytes, PIDs: programPIDs})
	if err == nil {
		err = group.Add(p.cmd.Process.Pid)
	}
	if err != nil {
		return err
	}
	c := &wire.Config{Disk: disk, Image: image, Contexts: contexts, RunDir: p.runDir(), Runsc: cfg.Runsc,
		Platform: cfg.Platform, Group: p.group(), CacheBytes: cfg.CacheBytes, BuildBytes: cfg.BuildBytes, Steps: cfg.Steps}
	for _, n := range cfg.Nameservers {
		c.Nameservers = append(c.Nameservers, n.String())
	}
	if err := p.control.Send(wire.Control{Config: c}, nil); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	select {
	case r := <-p.ready:
		switch {
		case r.NoDisk:
			return fmt.Errorf("%w: %s", errNoDisk, r.Error)
		case r.Error != "":
			return errors.New(r.Error)
		}
		p.log.Debug("build program started", "snapshotter", r.Snapshotter, "git", r.Git, "image", image)
		return nil
	case <-p.over:
		return p.end()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// listen answers the program until the connection ends.
func (p *program) listen() {
	for {
		var ask wire.Ask
		file, err := p.control.Receive(&ask)
		if file != nil {
			file.Close() // the program sends no files here
		}
		switch {
		case errors.Is(err, io.EOF):
			return
		case err != nil:
			p.log.Error("listening to the build program", "error", err)
			p.kill()
			return
		case ask.Ready != nil:
			select {
			case p.ready <- ask.Ready:
			default: // the program has reported it before
			}
		case ask.Take > 0:
			p.taking.Go(func() { p.give(ask.Take) })
		case ask.Release > 0:
			p.taking.Go(func() { p.takeBack(ask.Release) })
		}
	}
}

// give takes a slot for the program and sends it the namespace.
func (p *program) give(id int64) {
	namespace, release, err := p.builder.cfg.Slots.Take(p.alive)
	gift := &wire.SlotGift{ID: id}
	var file *os.File
	if err == nil {
		p.mu.Lock()
		p.taken[id] = release
		p.mu.Unlock()
		file, err = os.Open(namespace)
	}
	if err != nil {
		gift.Error = err.Error()
		p.takeBack(id)
	} else {
		defer file.Close()
	}
	if err := p.control.Send(wire.Control{Slot: gift}, file); err != nil && p.alive.Err() == nil {
		p.log.Error("giving a network to the build program", "error", err)
	}
}

func (p *program) takeBack(id int64) {
	p.mu.Lock()
	release := p.taken[id]
	delete(p.taken, id)
	p.mu.Unlock()
	if release == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	if err := release(ctx); err != nil {
		p.log.Error("giving a build's network back", "error", err)
	}
}

func (p *program) kill() {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.log.Error("killing the build program", "error", err)
	}
}

func (p *program) ended() bool {
	select {
	case <-p.over:
		return true
	default:
		return false
	}
}

// end returns how the process ended. It must have ended.
func (p *program) end() error {
	if p.status == nil {
		return errors.New("the build program has ended")
	}
	return fmt.Errorf("the build program has ended: %w", p.status)
}

// stop lets the program close its cache, and kills it when ctx ends.
func (p *program) stop(ctx context.Context) error {
	if err := p.control.Hangup(); err != nil {
		p.kill()
	}
	select {
	case <-p.over:
		return nil
	case <-ctx.Done():
	}
	p.kill()
	<-p.over
	return fmt.Errorf("stopping the build program: %w", ctx.Err())
}

// cancelTimeout is the time in which the program must end a cancelled build. After it the program
// is killed, with all its builds.
const cancelTimeout = 30 * time.Second

// talk sends a request on a new connection, calls hear with each report, and returns when the
// program is done with the request. After ctx ends it returns when nothing of the request runs
// any more. It closes the file that comes with a report after hear has returned. An error of hear
// ends the request.
func (p *program) talk(ctx context.Context, r wire.Request,
	hear func(*wire.Conn, wire.Report, *os.File) error) (*wire.Done, error) {
	conn, theirs, err := wire.Pair()
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	err = p.control.Send(wire.Control{Build: true}, theirs)
	theirs.Close()
	if err == nil {
		err = conn.Send(r, nil)
	}
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		<-p.over
		return nil, p.end()
	}
	if err != nil {
		return nil, err
	}
	over := make(chan struct{})
	defer close(over)
	defer context.AfterFunc(ctx, func() {
		_ = conn.Hangup() // the program may be gone
		select {
		case <-over:
		case <-time.After(cancelTimeout):
			p.log.Error("the build program did not end a build in time: killing it")
			p.kill()
		}
	})()
	var failed error // the error of hear
	for {
		var said wire.Report
		file, err := conn.Receive(&said)
		if err == nil && said.Done == nil && hear != nil && failed == nil {
			if failed = hear(conn, said, file); failed != nil {
				_ = conn.Hangup() // the program may be gone
			}
		}
		if file != nil {
			file.Close()
		}
		switch {
		case errors.Is(err, io.EOF):
			// Only its end makes the program leave without an answer.
			p.kill()
			<-p.over
			return nil, p.end()
		case err != nil:
			p.kill() // the program does not keep to the protocol
			return nil, err
		case said.Done != nil && ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case said.Done != nil && failed != nil:
			return nil, failed
		case said.Done != nil:
			return said.Done, nil
		}
	}
}
