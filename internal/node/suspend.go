package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/checkpoint"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/runsc"
	"github.com/cayhq/cay/internal/sandbox"
)

// stateSize is what a checkpoint takes beside the sandbox's memory and files, in
// bytes: the state of its kernel is 1 to 2 MiB, more with very many open files.
const stateSize = 16 << 20

// about is what a checkpoint's manifest says for its restore.
type about struct {
	life
	Nameservers []string `json:"nameservers"`
}

// Suspend implements sandbox.Node. The sandbox stands still from before it is written
// down until it is ended or its checkpoint has failed, so nothing that it did is lost.
func (n *Node) Suspend(ctx context.Context, id sandbox.ID) (sandbox.Point, error) {
	var hold *runsc.Hold
	w, err := n.save(ctx, id, func(b *box, dir string) (err error) {
		// The agent should not wake with connections to somebody who has gone.
		n.agents.Drop(string(id))
		hold, err = b.runtime().Save(ctx, b.container(), dir)
		return err
	})
	if err != nil {
		return sandbox.Point{}, err
	}
	point, err := n.commit(w, string(id))
	if err != nil {
		err = errors.Join(err, hold.Release())
		return sandbox.Point{}, n.giveUp(w.box, w.draft, err)
	}
	// From here on the checkpoint is the sandbox, and what stands still is not.
	w.box.gone.Store(true)
	err = n.Rest(ctx, id)
	return point, errors.Join(err, hold.Release())
}

// Checkpoint implements sandbox.Node.
func (n *Node) Checkpoint(ctx context.Context, id sandbox.ID) (sandbox.Point, error) {
	return n.saveLive(ctx, id, string(id))
}

// saveLive writes a sandbox down that runs on, as the latest checkpoint of a name: its own,
// or that of a snapshot.
func (n *Node) saveLive(ctx context.Context, id sandbox.ID, name string) (sandbox.Point, error) {
	w, err := n.save(ctx, id, func(b *box, dir string) error { return b.runtime().SaveLive(ctx, b.container(), dir) })
	if err != nil {
		return sandbox.Point{}, err
	}
	point, err := n.commit(w, name)
	if err != nil {
		return sandbox.Point{}, n.giveUp(w.box, w.draft, err)
	}
	return point, nil
}

// saveAttempts counts the tries of a save. What gVisor stumbles over while state changes under it, it rarely meets
// again; a third try would hold the sandbox still once more and seldom help.
const saveAttempts = 2

// written is a sandbox that was written down into a draft at a time.
type written struct {
	box   *box
	draft *checkpoint.Draft
	at    time.Time
}

// save calls write with a sandbox that runs and the empty directory of a new draft, and once more if gVisor
// fails and the sandbox goes on: a full disk, a dead sandbox and a call that was given up stay as they are.
func (n *Node) save(ctx context.Context, id sandbox.ID, write func(b *box, dir string) error) (written, error) {
	for attempt := 1; ; attempt++ {
		b, draft, err := n.draft(ctx, id)
		if err != nil {
			return written{}, err
		}
		w := written{b, draft, time.Now()}
		if err = n.passed("draft"); err == nil {
			err = write(b, draft.Dir())
		}
		if err == nil {
			return w, nil
		}
		err = n.giveUp(b, draft, err)
		if attempt == saveAttempts || ctx.Err() != nil || b.dead() || fault.Is(err, fault.NoSpace) {
			return written{}, err
		}
		n.log.WarnContext(ctx, "saving a sandbox failed and is tried again", "sandbox", id, "error", err)
	}
}

// giveUp is the end of a checkpoint that failed. The one before is still there.
func (n *Node) giveUp(b *box, draft *checkpoint.Draft, cause error) error {
	if errors.Is(cause, unix.ENOSPC) || draft.Full() {
		cause = fault.New(fault.NoSpace, "disk_full", "this machine's disk filled up while the checkpoint was written").Because(cause)
	}
	return errors.Join(cause, draft.Abandon(), n.revive(b))
}

// draft begins a checkpoint of a sandbox that runs.
func (n *Node) draft(ctx context.Context, id sandbox.ID) (*box, *checkpoint.Draft, error) {
	b := n.box(id)
	if b == nil || b.dead() {
		return nil, nil, fault.New(fault.Conflict, "sandbox_not_running", "sandbox %s does not run on this machine", id)
	}
	if err := b.sound(ctx); err != nil {
		return nil, nil, err
	}
	size, err := b.size()
	if err != nil {
		return nil, nil, err
	}
	draft, err := n.checkpoints.Begin(string(id), size)
	return b, draft, err
}

func (n *Node) commit(w written, name string) (sandbox.Point, error) {
	if err := n.passed("save"); err != nil {
		return sandbox.Point{}, err
	}
	c, err := w.draft.CommitAs(name, w.at, about{w.box.life, n.cfg.Nameservers})
	if err != nil {
		return sandbox.Point{}, err
	}
	return sandbox.Point{At: c.At, Size: c.Size, Run: w.box.life.Run}, n.passed("commit")
}

// passed is the tests' door to break an operation after a step.
func (n *Node) passed(step string) error {
	if n.after == nil {
		return nil
	}
	return n.after(step)
}

// size is about what a checkpoint of the sandbox will take, in bytes: its memory and what
// it has written to its disk, less the pages that are zero, which nobody knows before.
func (b *box) size() (int64, error) {
	memory, err := b.node.groups.Group(b.node.groupPath(b.life.ID)).MemoryHeld()
	if err != nil {
		return 0, err
	}
	disk, err := b.layer()
	return memory + disk + stateSize, err
}

// layer is what the writable layer takes on disk, in bytes. It is a file without a name,
// which only the sentry has open.
func (b *box) layer() (int64, error) {
	dir := fmt.Sprintf("/proc/%d/fd", b.pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return 0, fmt.Errorf("looking for the writable layer of %s: %w", b.life.ID, err)
	}
	var size int64
	for _, fd := range fds {
		path := filepath.Join(dir, fd.Name())
		target, err := os.Readlink(path)
		if err != nil || !strings.Contains(target, ".gvisor.filestore") {
			continue // it may be closed already
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err == nil {
			size += st.Blocks * 512
		}
	}
	return size, nil
}

// revivePatience is how long a sandbox may take to go on after a checkpoint that failed or
// was interrupted. It takes milliseconds when it can at all; on a machine that swaps,
// some seconds.
const revivePatience = 10 * time.Second

// revive makes sure that a sandbox goes on which stood still: one that does not is ended,
// so that it is lost like any other and found again at its latest checkpoint.
func (n *Node) revive(b *box) error {
	ctx, cancel := context.WithTimeout(b.ctx, revivePatience)
	defer cancel()
	err := n.awaitAgent(ctx, b)
	if err == nil || b.dead() || b.ctx.Err() != nil {
		return nil
	}
	n.log.ErrorContext(ctx, "ending a sandbox that did not go on after its checkpoint failed", "sandbox", b.life.ID, "error", err)
	b.gone.Store(true)
	return n.groups.Group(n.groupPath(b.life.ID)).Kill(n.ctx)
}

// point is the sandbox's recovery point, nil if it has none. One that cannot be read is
// one too: it is kept, and a wake says what is wrong with it.
func (n *Node) point(id sandbox.ID) (*sandbox.Point, error) {
	c, err := n.checkpoints.Latest(string(id))
	if err != nil {
		if fault.As(err) == nil {
			return nil, err
		}
		info, err := os.Stat(filepath.Join(n.cfg.Checkpoints, string(id)))
		if err != nil {
			return nil, fmt.Errorf("looking at a damaged checkpoint: %w", err)
		}
		return &sandbox.Point{At: info.ModTime().UTC()}, nil
	}
	if c == nil {
		return nil, nil
	}
	var was about
	if err := c.Understand(&was); err != nil {
		return &sandbox.Point{At: c.At, Size: c.Size}, nil
	}
	return &sandbox.Point{At: c.At, Size: c.Size, Run: was.Run}, nil
}

// Busy implements sandbox.Node.
func (n *Node) Busy(ctx context.Context, id sandbox.ID) (bool, error) {
	b := n.box(id)
	if b == nil || b.dead() {
		return false, fault.New(fault.Conflict, "sandbox_not_running", "sandbox %s does not run on this machine", id)
	}
	return n.agents.Busy(ctx, b.target())
}

// collect removes the programs of earlier versions that no sandbox and no checkpoint
// needs any more.
func (n *Node) collect() error {
	if entries, err := os.ReadDir(n.cfg.ProgramsDir); err == nil && len(entries) <= 2 {
		return nil // those of this version: nothing to read all checkpoints for
	}
	keep := []embedded.Version{n.cfg.Programs.Version}
	n.mu.Lock()
	for _, b := range n.boxes {
		keep = append(keep, b.life.Programs)
	}
	n.mu.Unlock()
	names, err := n.checkpoints.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		_, was, err := n.latest(name)
		if err != nil {
			n.log.Warn("keeping all versions of the runtime: a checkpoint does not say which it needs", "of", name, "error", err)
			return nil
		}
		keep = append(keep, was.Programs)
	}
	removed, err := embedded.Collect(n.cfg.ProgramsDir, keep)
	if len(removed) > 0 {
		n.log.Info("removed versions of the runtime that nothing needs any more", "removed", removed)
	}
	return err
}
