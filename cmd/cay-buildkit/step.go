package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/buildkit/executor"
	resourcestypes "github.com/moby/buildkit/executor/resources/types"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cayhq/cay/internal/buildkit/wire"
	"github.com/cayhq/cay/internal/cgroup"
)

// steps runs the RUN steps of builds, each in a gVisor sandbox with a network namespace and a
// control group of its own. It implements BuildKit's executor.
type steps struct {
	config  *wire.Config
	slots   *slots
	groups  *cgroup.Hierarchy
	disk    *disk
	dir     string        // scratch for steps, one directory each
	running chan struct{} // holds a value for each running step
}

// stepError is the error of a step that ran and failed.
type stepError struct {
	kind string // of wire.Failure
	code int    // -1 if no program ended with one
	text string
	tail []string
}

func (e *stepError) Error() string { return e.text }

// machineError is the error of a step that could not be run, through no fault of its own.
type machineError struct{ err error }

func (e *machineError) Error() string { return e.err.Error() }
func (e *machineError) Unwrap() error { return e.err }

// cleanup bounds the time for removing a step, even after the build has ended.
const cleanup = 30 * time.Second

// Run runs one step to its end. It leaves nothing of it.
func (s *steps) Run(ctx context.Context, _ string, root executor.Mount, mounts []executor.Mount, p executor.ProcessInfo,
	started chan<- struct{}) (resourcestypes.Recorder, error) {
	if started != nil {
		defer close(started)
	}
	// The limit keeps a Dockerfile of a hundred stages from taking all memory.
	select {
	case s.running <- struct{}{}:
		defer func() { <-s.running }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	err := s.step(ctx, root, mounts, p)
	if _, ofStep := errors.AsType[*stepError](err); err != nil && !ofStep && ctx.Err() == nil {
		err = &machineError{err}
	}
	return nil, err
}

func (s *steps) step(ctx context.Context, root executor.Mount, mounts []executor.Mount,
	p executor.ProcessInfo) (err error) {
	b := &runningStep{id: identity.NewID()}
	b.dir = filepath.Join(s.dir, b.id)
	defer func() { err = errors.Join(err, b.takeApart()) }()
	if err := os.MkdirAll(filepath.Join(b.dir, "root"), 0o700); err != nil {
		return fmt.Errorf("making a step's directory: %w", err)
	}

	rootPath, err := b.mount(ctx, root, filepath.Join(b.dir, "root"), nil)
	if err != nil {
		return fmt.Errorf("mounting a step's root: %w", err)
	}
	// Directories that did not exist before, and are empty afterwards, were made for mounts.
	stubs := append(slices.Clone(mounts), executor.Mount{Dest: "/tmp"}, executor.Mount{Dest: tmpMarker})
	clean := executor.MountStubsCleaner(context.WithoutCancel(ctx), rootPath, stubs, p.Meta.RemoveMountStubsRecursive)
	b.undo(func() error { clean(); return nil })
	spec, err := s.spec(ctx, b, rootPath, mounts, p.Meta)
	if err != nil {
		return err
	}
	if spec.Root.Readonly = root.Readonly || p.Meta.ReadonlyRootFS; !spec.Root.Readonly {
		if err := keepTmp(rootPath); err != nil {
			return fmt.Errorf("preparing a step's /tmp: %w", err)
		}
	}
	if p.Meta.NetMode != pb.NetMode_NONE {
		slot, err := s.slots.take(ctx)
		if err != nil {
			return err
		}
		b.undo(func() error { slot.release(); return nil })
		spec.Linux.Namespaces = append(spec.Linux.Namespaces,
			specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: slot.path()})
	}
	group, limits, err := s.group(b, p.Meta.LinuxResources)
	if err != nil {
		return err
	}
	b.undo(func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
		defer cancel()
		return errors.Join(group.Kill(ctx), group.Remove())
	})
	spec.Linux.CgroupsPath = s.groupPath(b)
	spec.Linux.Resources = &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limits.MemoryBytes}}
	if limits.CPUQuota > 0 {
		spec.Linux.Resources.CPU = &specs.LinuxCPU{Quota: &limits.CPUQuota, Period: new(uint64(cgroup.CPUPeriod))}
	}
	return s.run(ctx, b, spec, p, group, limits)
}

// Exec would enter containers for debugging, which is not supported.
func (s *steps) Exec(context.Context, string, executor.ProcessInfo) error {
	return errors.New("a step cannot be entered")
}

// groupPath returns the path of the step's group below the program's, where the hierarchy is
// mounted.
func (s *steps) groupPath(b *runningStep) string { return "/step-" + b.id }

// Default limits of a step, and the number of its processes.
const (
	defaultMemory = 2 << 30
	minMemory     = 128 << 20
	// stepPIDs bounds tasks of the host. A process inside takes about three.
	stepPIDs = 8192
)

// group makes the step's control group, which can be read after gVisor has ended.
func (s *steps) group(b *runningStep, r *pb.LinuxResources) (cgroup.Group, cgroup.Limits, error) {
	limits := cgroup.Limits{MemoryBytes: defaultMemory, PIDs: stepPIDs}
	if r != nil && r.Memory > 0 {
		limits.MemoryBytes = max(r.Memory, minMemory)
	}
	if r != nil && r.CpuQuota > 0 {
		limits.CPUQuota = r.CpuQuota
	}
	g := s.groups.Group(s.groupPath(b))
	if err := g.Make(limits); err != nil {
		return g, limits, errors.Join(fmt.Errorf("making a step's control group: %w", err), g.Remove())
	}
	return g, limits, nil
}

// run runs gVisor until the step's program has ended.
func (s *steps) run(ctx context.Context, b *runningStep, spec *specs.Spec, p executor.ProcessInfo, group cgroup.Group,
	limits cgroup.Limits) error {
	data, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("encoding a step's spec: %w", err)
	}
	if err := os.WriteFile(filepath.Join(b.dir, "config.json"), data, 0o600); err != nil {
		return fmt.Errorf("writing a step's spec: %w", err)
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	use := s.disk.step(stop)
	defer s.disk.end(use)
	logFile := filepath.Join(b.dir, "runsc.log")
	cmd := exec.CommandContext(ctx, runscPath,
		"--root="+runscDir,
		"--log="+logFile, "--log-format=json", "--panic-log="+logFile,
		"--platform="+s.config.Platform,
		"--network=sandbox",
		// The files that a step writes are the layer, so they go to the snapshot. Caches are
		// shared between steps that run at the same time.
		"--overlay2=none", "--file-access=exclusive", "--file-access-mounts=shared",
		"--allow-suid", "--host-settings=ignore", "--cpu-num-from-quota=true",
		"run", "--bundle="+b.dir, b.id)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TMPDIR=/tmp"}
	var said tail
	cmd.Stdout, cmd.Stderr = said.through(p.Stdout), said.through(p.Stderr)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = func() error {
		kill, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanup)
		defer cancel()
		return errors.Join(cmd.Process.Kill(), group.Kill(kill))
	}
	// The sandbox holds the streams open as long as it lives.
	cmd.WaitDelay = cleanup
	b.undo(func() error { return s.forget(b) })
	err = cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	} else {
		err = s.explain(err, group, limits, logFile)
	}
	if failed, ok := errors.AsType[*stepError](err); ok {
		failed.tail = said.lines()
	}
	return err
}

// commandNotFound is the exit code of a shell for a program that it cannot start.
const commandNotFound = 127

// explain returns the reason why a step failed that was not interrupted.
func (s *steps) explain(err error, group cgroup.Group, limits cgroup.Limits, logFile string) error {
	happened, lookErr := group.Events()
	if lookErr != nil {
		return lookErr
	}
	switch {
	case happened.OutOfMemory > 0:
		return &stepError{kind: wire.Memory, code: -1,
			text: fmt.Sprintf("the step needed more than the %d MiB of memory that it may have", limits.MemoryBytes>>20)}
	case s.disk.full():
		return s.disk.exceeded()
	case happened.NoMorePIDs > 0:
		return &stepError{kind: wire.Processes, code: -1, text: "the step started more processes than it may have"}
	}
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return fmt.Errorf("running gVisor: %w", err)
	}
	// gVisor's own failures exit with 128, and its messages tell them from a program that does.
	if code := exit.ExitCode(); code > 0 {
		said := lastMessage(logFile)
		if _, why, ok := strings.Cut(said, "creating process: "); ok && code == 128 {
			return &stepError{kind: wire.Step, code: commandNotFound, text: why}
		}
		if code == 128 && said != "" {
			return fmt.Errorf("gVisor failed: %s", said)
		}
		return &stepError{kind: wire.Step, code: code, text: "exit code " + strconv.Itoa(code)}
	}
	return fmt.Errorf("running gVisor: %w: %s", err, lastMessage(logFile))
}

// mostLog is the end of gVisor's log that is read for its last error, in bytes. The log of a step's sentry
// can be as long as the disk allows; with less, an error with much after it would be lost.
const mostLog = 1 << 20

// lastMessage returns the last error that gVisor wrote, "" if there is none.
func lastMessage(logFile string) string {
	f, err := os.Open(logFile)
	if err != nil {
		return ""
	}
	defer f.Close() // it was only read
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	from := max(0, st.Size()-mostLog)
	data, err := io.ReadAll(io.NewSectionReader(f, from, mostLog))
	if err != nil {
		return ""
	}
	if from > 0 {
		_, data, _ = bytes.Cut(data, []byte("\n")) // the rest of a line
	}
	last := ""
	for line := range strings.Lines(string(data)) {
		var entry struct{ Level, Msg string }
		if json.Unmarshal([]byte(line), &entry) != nil {
			last = strings.TrimSpace(line) // of a panic
		} else if entry.Level == "error" || entry.Level == "fatal" {
			last = entry.Msg
		}
	}
	return last
}

// forget removes the state of a sandbox that gVisor could not end itself.
func (s *steps) forget(b *runningStep) error {
	matches, err := filepath.Glob(filepath.Join(runscDir, "*"+b.id+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range matches {
		errs = append(errs, os.RemoveAll(path))
	}
	return errors.Join(errs...)
}
