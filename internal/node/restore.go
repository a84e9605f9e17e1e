package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/checkpoint"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/runsc"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/trace"
)

// making is what a sandbox of the spec is made with, and the steps that do it: a boot, or
// with spec.From a restore from that checkpoint under an identity of its own. What comes
// of both is undone by Destroy.
func (n *Node) making(ctx context.Context, spec sandbox.Spec) (*box, []step, error) {
	if spec.From != "" {
		return n.restoration(ctx, spec, string(spec.From), n.introduce)
	}
	b := n.newBox(spec)
	return b, n.creation(b, spec), nil
}

// Wake implements sandbox.Node.
func (n *Node) Wake(ctx context.Context, spec sandbox.Spec) error {
	b, steps, err := n.restoration(ctx, spec, string(spec.ID), n.greetAgent)
	if err != nil {
		return err
	}
	return n.take(ctx, b, steps, n.Rest)
}

// restoration is a life from the latest checkpoint of a name, and the steps that make it.
// Of the spec ID, Run, Token and Egress are used, and what meet tells the agent; all else
// is what the saved sandbox was first made with, its programs included: a checkpoint is
// only restored by the gVisor that made it, with the spec it was made with. One checkpoint
// serves any number of lives, one after the other or at once, and is not needed by them any
// more once their last step is over.
func (n *Node) restoration(ctx context.Context, spec sandbox.Spec, name string, meet func(context.Context, *box, sandbox.Spec, about) error) (*box, []step, error) {
	failed := func(cause error, why string, args ...any) error {
		code := "wake_failed"
		if name != string(spec.ID) {
			code = "restore_failed"
		}
		return fault.New(fault.Internal, code, why, args...).Because(cause)
	}
	end := trace.Start(ctx, "checkpoint")
	c, was, err := n.restorable(ctx, name)
	end()
	switch {
	case fault.As(err) != nil:
		return nil, nil, failed(err, "%s", fault.As(err).Detail)
	case err != nil:
		return nil, nil, err
	case c == nil:
		return nil, nil, failed(nil, "its checkpoint is not on this machine")
	}
	programs, err := embedded.Find(n.cfg.ProgramsDir, was.Programs)
	if err != nil {
		return nil, nil, failed(err, "the version of cay's runtime that made the checkpoint (%s) is not on this machine any more", was.Programs.Runsc)
	}
	b := n.boxOf(life{ID: spec.ID, Org: spec.OrgID, Run: spec.Run, Token: spec.Token, Egress: spec.Egress, From: string(spec.From),
		Handshake: was.Handshake, MemoryMB: was.MemoryMB, CPUWeight: cpuWeight(spec), Programs: was.Programs, Flags: was.Flags})
	b.agentKey = was.Token
	n.warnOlder(b)
	steps := n.steps(b, spec, func(ctx context.Context, image string) (int, error) {
		pid, err := b.runtime().Restore(ctx, b.container(), c.Dir, runsc.Place{
			Image: image, Binds: binds(programs), Namespace: b.slot.Namespace, Cgroups: n.groupPath(spec.ID), HostUID: b.life.UID,
			CPUShares: uint64(hurried * b.life.CPUWeight)})
		b.hurry.settle() // its own processes run again
		if err != nil && ctx.Err() == nil {
			err = failed(err, "gVisor could not restore the checkpoint; the server's log has the cause")
		}
		return pid, err
	}, func(ctx context.Context) error { return meet(ctx, b, spec, was) })
	return b, append(steps, step{"verify", func(context.Context) error { return n.verify(b, c) }}), nil
}

// latest is the latest checkpoint of a name and what it is about; nil if there is none.
func (n *Node) latest(name string) (*checkpoint.Checkpoint, about, error) {
	var was about
	c, err := n.checkpoints.Latest(name)
	if err == nil && c != nil {
		err = c.Understand(&was)
	}
	return c, was, err
}

func isPages(name string) bool { return name == runsc.PagesFile }

// restorable finds the latest checkpoint of a name and looks at it: at the sums of all
// files but the pages, which take as long to read as the sandbox is large. They are
// verified while it runs, and before it does once they were found wrong.
func (n *Node) restorable(ctx context.Context, name string) (*checkpoint.Checkpoint, about, error) {
	c, was, err := n.latest(name)
	if err != nil || c == nil {
		return nil, was, err
	}
	suspect := c.Suspect()
	return c, was, c.Verify(ctx, func(name string) bool { return suspect || !isPages(name) })
}

// greetAgent gives a woken agent its new key, and the name servers if they are
// others now. Nothing else: what is in its files since may be the user's.
func (n *Node) greetAgent(ctx context.Context, b *box, _ sandbox.Spec, was about) error {
	return n.renew(ctx, b, was, agentapi.InitRequest{AccessToken: b.life.Token})
}

// introduce tells an agent that it is another sandbox's now: its token, its name, and what
// commands begin with from here on.
func (n *Node) introduce(ctx context.Context, b *box, spec sandbox.Spec, was about) error {
	return n.renew(ctx, b, was, agentapi.InitRequest{AccessToken: b.life.Token, Env: spec.Env,
		DefaultUser: spec.User, DefaultWorkdir: spec.Workdir, Hostname: hostname(spec.ID)})
}

// renew speaks to a restored agent, which still has the key of the life before.
func (n *Node) renew(ctx context.Context, b *box, was about, hello agentapi.InitRequest) error {
	if strings.Join(was.Nameservers, " ") != strings.Join(n.cfg.Nameservers, " ") {
		hello.Nameservers = n.cfg.Nameservers
	}
	if err := n.agents.Init(ctx, b.target(), hello); err != nil {
		return fmt.Errorf("giving the agent its new key: %w", err)
	}
	b.agentKnows(b.life.Token)
	return nil
}

// verification is the reading of the memory that sandboxes were restored with: of one
// checkpoint, once for all that were made from it before it began.
type verification struct {
	dir      string
	pages    *checkpoint.Opened
	distrust func() error
	wanted   chan struct{} // somebody waits for it
	done     chan struct{} // closed when err is set
	err      error

	ctx    context.Context // ends when nobody needs it any more
	cancel context.CancelFunc

	mu sync.Mutex
	// +checklocks:mu
	boxes []*box // guarded by mu
	// +checklocks:mu
	alive int // of boxes; guarded by mu
}

// verifyAfter is how long after a restore its memory is verified, if nobody waits for it. Until
// then the sandbox's kernel reads the same file, and whoever woke it wants the machine.
const verifyAfter = 5 * time.Second

// verify reads, in the background, the memory that a sandbox was restored with, and ends
// the sandbox if it is not what was written: it would go on with somebody else's memory. The
// checkpoint may be removed meanwhile: its pages are held open, here as by the sandbox's
// kernel.
func (n *Node) verify(b *box, c *checkpoint.Checkpoint) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if v := n.verifications[c.Dir]; v != nil && v.join(b) {
		return nil
	}
	pages, err := c.Open(isPages)
	if errors.Is(err, fs.ErrNotExist) {
		// Somebody removed it. What the sandbox has in memory is all there is now.
		n.log.WarnContext(b.ctx, "a checkpoint is gone while its sandbox runs", "sandbox", b.life.ID, "checkpoint", c.Dir)
		return nil
	}
	if err != nil {
		return err
	}
	v := &verification{dir: c.Dir, pages: pages, distrust: c.Distrust, wanted: make(chan struct{}, 1), done: make(chan struct{})}
	v.ctx, v.cancel = context.WithCancel(n.ctx)
	v.join(b)
	n.verifications[c.Dir] = v
	n.watches.Go(func() { n.verified(v) })
	return nil
}

// join makes it the box's too; false if nobody needs it any more.
func (v *verification) join(b *box) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ctx.Err() != nil {
		return false
	}
	b.verified = v
	v.boxes, v.alive = append(v.boxes, b), v.alive+1
	context.AfterFunc(b.ctx, func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.alive--; v.alive == 0 {
			v.cancel()
		}
	})
	return true
}

// verified does it, when it is time.
func (n *Node) verified(v *verification) {
	defer close(v.done)
	defer v.cancel()
	select {
	case <-time.After(verifyAfter):
	case <-v.wanted:
	case <-v.ctx.Done():
	}
	n.verifying.Lock()
	defer n.verifying.Unlock()
	n.mu.Lock()
	delete(n.verifications, v.dir) // who comes from now on has read what may be read already
	n.mu.Unlock()
	v.err = errors.Join(v.pages.Verify(v.ctx), v.pages.Close())
	if v.err == nil || v.ctx.Err() != nil {
		return
	}
	n.log.ErrorContext(n.ctx, "ending sandboxes whose checkpoint is damaged", "checkpoint", v.dir, "error", v.err)
	if err := v.distrust(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.log.ErrorContext(n.ctx, "marking a damaged checkpoint", "checkpoint", v.dir, "error", err)
	}
	v.mu.Lock()
	boxes := v.boxes
	v.mu.Unlock()
	for _, b := range boxes {
		if b.ctx.Err() != nil {
			continue
		}
		if err := n.groups.Group(n.groupPath(b.life.ID)).Kill(n.ctx); err != nil && n.ctx.Err() == nil {
			n.log.ErrorContext(n.ctx, "ending a sandbox", "sandbox", b.life.ID, "error", err)
		}
	}
}

// sound waits until the memory that the sandbox was restored with is known to be right.
// Before that no checkpoint may take the place of the one it came from.
func (b *box) sound(ctx context.Context) error {
	if b.verified == nil {
		return nil // it was booted
	}
	select {
	case b.verified.wanted <- struct{}{}:
	default: // somebody has said so
	}
	select {
	case <-b.verified.done:
		return b.verified.err
	case <-ctx.Done():
		return fmt.Errorf("waiting for the memory of %s to be verified: %w", b.life.ID, ctx.Err())
	}
}
