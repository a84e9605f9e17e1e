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

// stateSize is the assumed size of a checkpoint in bytes, apart from the sandbox's memory and
// files: the state of its kernel takes 1 to 2 MiB, and more with very many open files. With too
// little a checkpoint begins that does not fit on the disk.
const stateSize = 16 << 20

// about is the part of a checkpoint's manifest that a restore needs.
type about struct {
	record
	Nameservers []string `json:"nameservers"`
	// Kept says what the checkpoint holds. A checkpoint of a server that did not record it holds everything.
	Kept sandbox.Kept `json:"kept,omitempty"`
	// CPUClass names the class of the machine's processors. A checkpoint of a server that did not record it has none.
	CPUClass string `json:"cpu_class,omitempty"`
}

// Suspend implements sandbox.Node. The sandbox is paused from before it is saved until it is ended
// or its checkpoint has failed, so nothing that it did is lost.
func (n *Node) Suspend(ctx context.Context, id sandbox.ID, keep sandbox.Kept) (sandbox.Checkpoint, error) {
	if b := n.instance(id); b != nil && keep == sandbox.KeepFiles && !b.record.Reboots {
		return sandbox.Checkpoint{}, fault.New(fault.Conflict, fault.CodeSandboxTooOld,
			"sandbox %s was started by an older version of cay, which cannot keep files without memory", id)
	}
	var hold *runsc.Hold
	w, err := n.save(ctx, id, keep, func(b *instance, dir string) (err error) {
		// A woken agent should not have connections to a peer that has gone.
		n.agents.Drop(string(id))
		hold, err = b.runtime().Save(ctx, b.container(), dir, keep == sandbox.KeepFiles)
		if errors.Is(err, runsc.ErrTooLarge) {
			return errIndexTooLarge.Because(err)
		}
		if err == nil && keep == sandbox.KeepFiles {
			if err = b.withinDisk(dir); err != nil {
				err = errors.Join(err, hold.Release())
			}
		}
		return err
	})
	if err != nil {
		return sandbox.Checkpoint{}, err
	}
	made, err := n.commit(w, string(id))
	if err != nil {
		err = errors.Join(err, hold.Release())
		return sandbox.Checkpoint{}, n.giveUp(w.instance, w.draft, err)
	}
	// From here on the checkpoint is the sandbox, and the paused instance is not.
	w.instance.gone.Store(true)
	err = n.Rest(ctx, id)
	return made, errors.Join(err, hold.Release())
}

// Checkpoint implements sandbox.Node.
func (n *Node) Checkpoint(ctx context.Context, id sandbox.ID) (sandbox.Checkpoint, error) {
	return n.saveLive(ctx, id, string(id))
}

// saveLive saves a sandbox that continues to run, as the latest checkpoint of a name: its own, or
// that of a snapshot.
func (n *Node) saveLive(ctx context.Context, id sandbox.ID, name string) (sandbox.Checkpoint, error) {
	w, err := n.save(ctx, id, sandbox.KeepAll, func(b *instance, dir string) error {
		return b.runtime().SaveLive(ctx, b.container(), dir)
	})
	if err != nil {
		return sandbox.Checkpoint{}, err
	}
	made, err := n.commit(w, name)
	if err != nil {
		return sandbox.Checkpoint{}, n.giveUp(w.instance, w.draft, err)
	}
	return made, nil
}

// saveAttempts limits the tries of a save. A save that fails because state changed during it rarely
// fails again; a third try would pause the sandbox once more and seldom help.
const saveAttempts = 2

// written records a sandbox that was saved into a draft, and the time of that.
type written struct {
	instance *instance
	draft    *checkpoint.Draft
	at       time.Time
	kept     sandbox.Kept
}

// save calls write with a running sandbox and the empty directory of a new draft. It tries again if
// gVisor fails and the sandbox continues, but not if the disk is full, the sandbox is dead or ctx
// has ended.
func (n *Node) save(ctx context.Context, id sandbox.ID, keep sandbox.Kept,
	write func(b *instance, dir string) error) (written, error) {
	for attempt := 1; ; attempt++ {
		b, draft, err := n.draft(ctx, id, keep)
		if err != nil {
			return written{}, err
		}
		w := written{b, draft, time.Now(), keep}
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

// giveUp abandons the draft of a checkpoint that failed with cause and revives the sandbox. It
// returns all errors. The former checkpoint is kept.
func (n *Node) giveUp(b *instance, draft *checkpoint.Draft, cause error) error {
	if errors.Is(cause, unix.ENOSPC) || draft.Full() {
		cause = fault.New(fault.NoSpace, fault.CodeDiskFull,
			"this machine's disk filled up while the checkpoint was written").Because(cause)
	}
	return errors.Join(cause, draft.Abandon(), n.revive(b))
}

// draft begins a checkpoint of a sandbox that runs.
func (n *Node) draft(ctx context.Context, id sandbox.ID, keep sandbox.Kept) (*instance, *checkpoint.Draft, error) {
	b := n.instance(id)
	if b == nil || b.dead() {
		return nil, nil, fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s does not run on this machine", id)
	}
	if err := b.sound(ctx); err != nil {
		return nil, nil, err
	}
	size, err := b.size(keep)
	if err != nil {
		return nil, nil, err
	}
	draft, err := n.checkpoints.Begin(string(id), size)
	return b, draft, err
}

func (n *Node) commit(w written, name string) (sandbox.Checkpoint, error) {
	if err := n.passed("save"); err != nil {
		return sandbox.Checkpoint{}, err
	}
	l := w.instance.record
	l.Shape = l.Shape.Public() // a restore gets the rest from its spec
	c, err := w.draft.CommitAs(name, w.at, about{l, n.cfg.Nameservers, w.kept, n.cpuClass})
	if err != nil {
		return sandbox.Checkpoint{}, err
	}
	n.saved(name, c.Size)
	return sandbox.Checkpoint{At: c.At, Size: c.Size, Run: w.instance.record.Run, Kept: w.kept}, n.passed("commit")
}

// passed calls the hook with which tests make an operation fail after a step.
func (n *Node) passed(step string) error {
	if n.after == nil {
		return nil
	}
	return n.after(step)
}

// size estimates the size of a checkpoint of the sandbox in bytes: that of its memory, unless the files
// are kept alone, and of what it has written to its disk. The checkpoint leaves out pages that are zero;
// their number is not known before.
func (b *instance) size(keep sandbox.Kept) (int64, error) {
	if keep == sandbox.KeepFiles {
		disk, err := b.layer()
		return disk + stateSize, err
	}
	memory, err := b.node.groups.Group(b.node.groupPath(b.record.ID)).MemoryHeld()
	if err != nil {
		return 0, err
	}
	disk, err := b.layer()
	return memory + disk + stateSize, err
}

// indexFraction is the part of a sandbox's memory that the index of its files may take: the tree of their
// names and attributes, and the list of their pages. A boot reads the index whole into that memory, and takes
// several times its size meanwhile. With more, a sandbox is suspended that cannot be booted again. gVisor
// itself stops writing at this size, see files-alone.patch.
const indexFraction = 8

// errIndexTooLarge reports that a sandbox's files cannot be kept without its memory.
var errIndexTooLarge = fault.New(fault.NoSpace, fault.CodeDiskFull,
	"the sandbox has too many files, too long paths or too large attributes to be kept without its memory; "+
		"keep its memory too")

// withinDisk returns an error if the saved files take more than the sandbox's disk, or their index more than
// its part of the memory. Files that were removed while a program had them open are saved too, and belong to
// no name after a boot. Without the limit, their number would grow with every suspend.
func (b *instance) withinDisk(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("looking at the saved files of %s: %w", b.record.ID, err)
	}
	var pages, index int64
	for _, entry := range entries {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, entry.Name()), &st); err != nil {
			return fmt.Errorf("looking at the saved files of %s: %w", b.record.ID, err)
		}
		if isPages(entry.Name()) {
			pages += st.Blocks * 512
		} else {
			index += st.Size
		}
	}
	if index > int64(b.record.Shape.Size.MemoryMB)<<20/indexFraction {
		return errIndexTooLarge
	}
	if limit := int64(b.record.Shape.DiskMB)<<20 + stateSize; pages > limit {
		return fault.New(fault.NoSpace, fault.CodeDiskFull,
			"the sandbox's files, with those that were removed while open, take %d MiB, more than its disk; keep its memory too",
			pages>>20)
	}
	return nil
}

// layer returns the size of the writable layer on disk in bytes. The layer is a file without a name
// that only the sentry has open.
func (b *instance) layer() (int64, error) {
	dir := fmt.Sprintf("/proc/%d/fd", b.pid)
	fds, err := os.ReadDir(dir)
	if err != nil {
		return 0, fmt.Errorf("looking for the writable layer of %s: %w", b.record.ID, err)
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

// revivePatience limits the time in which a sandbox continues after a checkpoint that failed or was
// interrupted. A sandbox that can continue takes milliseconds, or some seconds on a machine that
// swaps. A shorter time ends sandboxes that would have continued.
const revivePatience = 10 * time.Second

// revive waits for a paused sandbox to continue. It ends one that does not, which is then lost like
// any other and restored from its latest checkpoint.
func (n *Node) revive(b *instance) error {
	ctx, cancel := context.WithTimeout(b.ctx, revivePatience)
	defer cancel()
	err := n.awaitAgent(ctx, b)
	if err == nil || b.dead() || b.ctx.Err() != nil {
		return nil
	}
	n.log.ErrorContext(ctx, "ending a sandbox that did not go on after its checkpoint failed",
		"sandbox", b.record.ID, "error", err)
	b.gone.Store(true)
	return n.groups.Group(n.groupPath(b.record.ID)).Kill(n.ctx)
}

// latestCheckpoint returns the sandbox's recovery point, nil if it has none. It also returns one that cannot
// be read: that one is kept, and a wake reports what is wrong with it.
func (n *Node) latestCheckpoint(id sandbox.ID) (*sandbox.Checkpoint, error) {
	c, err := n.checkpoints.Latest(string(id))
	if err != nil {
		if fault.As(err) == nil {
			return nil, err
		}
		info, err := os.Stat(filepath.Join(n.cfg.Checkpoints, string(id)))
		if err != nil {
			return nil, fmt.Errorf("looking at a damaged checkpoint: %w", err)
		}
		return &sandbox.Checkpoint{At: info.ModTime().UTC()}, nil
	}
	if c == nil {
		return nil, nil
	}
	var was about
	if err := c.Understand(&was); err != nil {
		return &sandbox.Checkpoint{At: c.At, Size: c.Size}, nil
	}
	return &sandbox.Checkpoint{At: c.At, Size: c.Size, Run: was.Run, Kept: was.Kept}, nil
}

// Busy implements sandbox.Node.
func (n *Node) Busy(ctx context.Context, id sandbox.ID) (bool, error) {
	b := n.instance(id)
	if b == nil || b.dead() {
		return false, fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s does not run on this machine", id)
	}
	return n.agents.Busy(ctx, b.target())
}

// collect removes the programs of earlier versions that no sandbox and no checkpoint needs any
// more.
func (n *Node) collect() error {
	keep := []embedded.Version{n.cfg.Programs.Version}
	if others, err := embedded.Unneeded(n.cfg.ProgramsDir, keep); err == nil && len(others) == 0 {
		return nil // only this version is there: the checkpoints need not be read
	}
	n.mu.Lock()
	for _, b := range n.instances {
		keep = append(keep, b.record.Programs)
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
