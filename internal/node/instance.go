package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/cgroup"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/runsc"
	"github.com/cayhq/cay/internal/sandbox"
)

// instance holds what the node knows of a sandbox on this machine and of its processes.
type instance struct {
	node   *Node
	record record
	slot   *network.Slot // nil until it is acquired

	policed bool // whether the slot has the policy of record; node.mu guards both
	pid     int  // of the sentry; 0 until it has started

	over     func()        // frees its start slot; nil if it had none; safe to repeat
	verified *verification // of the memory that it was restored with; nil if it was booted

	hurry hurry // raises its CPU weight during calls

	agentKey string    // the agent's present key; "" while it has none; node.mu guards it
	impostor sync.Once // limits the log to one warning of another program that answers

	watched atomic.Bool        // a watch waits for the end of the sentry
	gone    atomic.Bool        // the sentry has ended
	ending  atomic.Bool        // its end is intended
	ctx     context.Context    // of the watches; ends with the sentry; nil until they start
	stop    context.CancelFunc // ends ctx
}

// instanceOf returns a new instance for the sandbox of a record.
func (n *Node) instanceOf(l record) *instance {
	b := &instance{node: n, record: l}
	b.hurry.attach(n.groups.Group(n.groupPath(l.ID)), cpuWeight(l.Shape))
	return b
}

func (b *instance) target() agentapi.Target {
	return agentapi.Target{SandboxID: string(b.record.ID), Run: b.record.Run}
}

// container returns the sandbox for the runtime, without the spec, which only the start needs.
func (b *instance) container() runsc.Container {
	return runsc.Container{ID: string(b.record.ID), Bundle: b.node.dir(b.record.ID)}
}

// runtime returns the version of runsc that first started the sandbox.
func (b *instance) runtime() *runsc.Runtime {
	cfg := b.node.cfg
	return &runsc.Runtime{Program: embedded.At(cfg.ProgramsDir, b.record.Programs).Runsc, Flags: b.record.Flags,
		Root: cfg.RunDir, Standby: b.node.standby}
}

// dead reports whether the sandbox has no instance: its sentry has ended or never ran.
func (b *instance) dead() bool { return b.gone.Load() || !b.watched.Load() }

// end marks the coming end of the sandbox as intended and stops its watches.
func (b *instance) end() {
	b.ending.Store(true)
	if b.stop != nil {
		b.stop()
	}
}

// watch starts to guard the sandbox's memory and to wait for its end.
func (b *instance) watch() error {
	n := b.node
	pidfd, err := openProcess(b.pid, string(b.record.ID))
	if err != nil {
		return err
	}
	guard := &cgroup.Guard{
		Group: n.groups.Group(n.groupPath(b.record.ID)), Limit: int64(b.record.Shape.Size.MemoryMB)<<20 + overhead, Reserve: reserve,
		Relieve: func(ctx context.Context, over int64) (int64, error) {
			freed, killed, err := n.agents.RelieveMemory(ctx, b.target(), over)
			n.log.InfoContext(ctx, "sandbox out of memory", "sandbox", b.record.ID,
				"over_bytes", over, "freed_bytes", freed, "killed", killed)
			return freed, err
		},
		Log: n.log,
	}
	if err := guard.Arm(); err != nil {
		pidfd.Close()
		return err
	}
	ctx, stop := context.WithCancel(n.ctx)
	b.ctx, b.stop = ctx, stop
	b.watched.Store(true)
	n.watches.Add(2)
	go func() {
		defer n.watches.Done()
		b.guardMemory(ctx, guard)
	}()
	go func() {
		defer n.watches.Done()
		b.awaitEnd(ctx, pidfd)
	}()
	return nil
}

func (b *instance) guardMemory(ctx context.Context, guard *cgroup.Guard) {
	err := guard.Run(ctx)
	if err == nil || ctx.Err() != nil {
		return
	}
	b.node.log.ErrorContext(ctx, "ending a sandbox whose memory cannot be bounded", "sandbox", b.record.ID, "error", err)
	// awaitEnd does the rest.
	if err := guard.Group.Kill(ctx); err != nil && ctx.Err() == nil {
		b.node.log.ErrorContext(ctx, "ending a sandbox", "sandbox", b.record.ID, "error", err)
	}
}

// awaitEnd waits for the sentry to end and reports an end that was not intended.
func (b *instance) awaitEnd(ctx context.Context, pidfd *os.File) {
	stop := context.AfterFunc(ctx, func() { pidfd.Close() })
	defer func() {
		if stop() {
			pidfd.Close()
		}
	}()
	raw, err := pidfd.SyscallConn()
	if err == nil {
		err = raw.Read(func(fd uintptr) bool {
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(poll, 0)
			return err == nil && n > 0
		})
	}
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		b.node.log.ErrorContext(ctx, "watching a sandbox", "sandbox", b.record.ID, "error", err)
		return
	}
	b.gone.Store(true)
	// Without this calls to the agent would wait for ever: no process is left to answer or to close
	// the connection.
	b.stop()
	b.node.agents.Drop(string(b.record.ID))
	if b.ending.Load() {
		return
	}
	b.node.log.WarnContext(b.node.ctx, "a sandbox ended by itself", "sandbox", b.record.ID, "panic", b.container().Panic())
	select {
	case b.node.lost <- sandbox.Observed{ID: b.record.ID, Run: b.record.Run}:
	case <-b.node.ctx.Done():
	}
}

// openProcess opens the process of the sentry and checks that it belongs to the sandbox, since the
// kernel reuses process IDs.
func openProcess(pid int, id string) (*os.File, error) {
	// The runtime's poller takes the descriptor only when it does not block.
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("opening the sentry of %s: %w", id, err)
	}
	file := os.NewFile(uintptr(fd), "sentry of "+id)
	cmdline, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil || !slices.Contains(strings.Split(string(cmdline), "\x00"), id) {
		file.Close()
		return nil, errors.Join(fmt.Errorf("process %d is not the sentry of %s", pid, id), err)
	}
	return file, nil
}
