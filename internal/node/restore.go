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

// making returns the instance of a new sandbox and the steps that make it: a boot, or with spec.From a
// restore from that snapshot, or a boot with its files, under an identity of its own. Destroy undoes the steps of both.
func (n *Node) making(ctx context.Context, spec sandbox.Spec) (*instance, []step, error) {
	if spec.From != "" {
		return n.restoration(ctx, spec, string(spec.From), n.introduce)
	}
	b := n.newInstance(spec)
	return b, n.bootSteps(b, spec), nil
}

// Wake implements sandbox.Node.
func (n *Node) Wake(ctx context.Context, spec sandbox.Spec) error {
	b, steps, err := n.restoration(ctx, spec, string(spec.ID), n.greetAgent)
	if err != nil {
		return err
	}
	return n.take(ctx, b, steps, n.Rest)
}

// restoration returns an instance from the latest checkpoint of a name, and the steps that make it: a
// restore, or a boot if the checkpoint holds files alone. Of the spec it uses ID, Run, Token and Egress, the
// settings that meet tells the agent, and for a boot the start command. Everything else is what the saved
// sandbox was first made with, its programs included: only the gVisor that made a checkpoint can restore
// it, and only with the spec that it was made with. One checkpoint serves any number of instances, one
// after the other or at once. An instance does not need it after its last step.
func (n *Node) restoration(ctx context.Context, spec sandbox.Spec, name string,
	meet func(context.Context, *instance, sandbox.Spec, about) error) (*instance, []step, error) {
	failed := func(cause error, why string, args ...any) error {
		code := fault.CodeWakeFailed
		if name != string(spec.ID) {
			code = fault.CodeRestoreFailed
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
		return nil, nil, failed(err,
			"the version of cay's runtime that made the checkpoint (%s) is not on this machine any more", was.Programs.Runsc)
	}
	boots := was.Kept == sandbox.KeepFiles
	if !boots {
		spec.Start = sandbox.Start{} // it runs already
	}
	b := n.instanceOf(record{ID: spec.ID, Org: spec.OrgID, Run: spec.Run, Token: spec.Token, Shape: spec.Shape,
		From: string(spec.From), Handshake: was.Handshake, Reboots: was.Reboots, Programs: was.Programs, Flags: was.Flags})
	if !boots {
		b.agentKey = was.Token
	}
	n.warnOlder(b)
	steps := n.steps(b, spec, func(ctx context.Context, image string) (int, error) {
		start := b.runtime().Restore
		if boots {
			start = b.runtime().Reboot
		}
		pid, err := start(ctx, b.container(), c.Dir, runsc.Place{
			Image: image, Binds: binds(programs), Namespace: b.slot.Namespace, Cgroups: n.groupPath(spec.ID),
			HostUID: b.record.UID, CPUShares: b.bootShares(), Hostname: hostname(was.ID)})
		if !boots {
			b.hurry.settle() // programs other than the agent run again
		}
		if err != nil && ctx.Err() == nil {
			err = failed(err, "gVisor could not restore the checkpoint; the server's log has the cause")
		}
		return pid, err
	}, func(ctx context.Context) error { return meet(ctx, b, spec, was) })
	steps = append(steps, step{"verify", func(context.Context) error { return n.verify(b, c) }})
	return b, append(steps, n.commandStep(b, spec.Start)...), nil
}

// latest returns the latest checkpoint of a name and the contents of its manifest; the checkpoint
// is nil if there is none.
func (n *Node) latest(name string) (*checkpoint.Checkpoint, about, error) {
	var was about
	c, err := n.checkpoints.Latest(name)
	if err == nil && c != nil {
		err = c.Understand(&was)
	}
	return c, was, err
}

func isPages(name string) bool { return name == runsc.PagesFile }

// restorable returns the latest checkpoint of a name after it has verified the sums of its files.
// It leaves out the pages, which take as long to read as the sandbox is large: verify reads them
// while the sandbox runs. Once they were found damaged, restorable verifies them too.
func (n *Node) restorable(ctx context.Context, name string) (*checkpoint.Checkpoint, about, error) {
	c, was, err := n.latest(name)
	if err != nil || c == nil {
		return nil, was, err
	}
	suspect := c.Suspect()
	return c, was, c.Verify(ctx, func(name string) bool { return suspect || !isPages(name) })
}

// greetAgent gives a woken agent its new key, and the name servers if they have changed. An agent that was
// booted again it tells the settings that an agent keeps in memory. It sends nothing else, since the user may
// have changed the files inside that the other settings are written to.
func (n *Node) greetAgent(ctx context.Context, b *instance, spec sandbox.Spec, was about) error {
	hello := agentapi.InitRequest{AccessToken: b.record.Token}
	if was.Kept == sandbox.KeepFiles {
		hello.Env, hello.DefaultUser, hello.DefaultWorkdir = spec.Env, spec.User, spec.Workdir
	}
	return n.renew(ctx, b, was, hello)
}

// introduce tells an agent that it belongs to another sandbox now: its token, its host name, and
// the environment, user and directory of later commands.
func (n *Node) introduce(ctx context.Context, b *instance, spec sandbox.Spec, was about) error {
	return n.renew(ctx, b, was, agentapi.InitRequest{AccessToken: b.record.Token, Env: spec.Env,
		DefaultUser: spec.User, DefaultWorkdir: spec.Workdir, Hostname: hostname(spec.ID)})
}

// renew sends init to a restored agent, which still has the key of the former instance.
func (n *Node) renew(ctx context.Context, b *instance, was about, hello agentapi.InitRequest) error {
	if strings.Join(was.Nameservers, " ") != strings.Join(n.cfg.Nameservers, " ") {
		hello.Nameservers = n.cfg.Nameservers
	}
	if err := n.agents.Init(ctx, b.target(), hello); err != nil {
		return fmt.Errorf("giving the agent its new key: %w", err)
	}
	b.agentKnows(b.record.Token)
	return nil
}

// verification reads and verifies the memory of one checkpoint, once for all sandboxes that were
// restored from it before the reading began.
type verification struct {
	dir      string
	pages    *checkpoint.Opened
	distrust func() error
	wanted   chan struct{} // receives when a caller waits for the result
	done     chan struct{} // closed when err is set
	err      error

	ctx    context.Context // ends when no sandbox needs the result any more
	cancel context.CancelFunc

	mu sync.Mutex
	// +checklocks:mu
	instances []*instance // guarded by mu
	// +checklocks:mu
	alive int // of instances; guarded by mu
}

// verifyAfter is the delay between a restore and the verification of its memory, if no caller waits
// for that. Earlier, the verification competes for the machine with the sandbox's kernel, which
// reads the same file, and with the user that woke the sandbox.
const verifyAfter = 5 * time.Second

// verify verifies, in the background, the memory that a sandbox was restored with, and ends the
// sandbox if the memory is damaged: it must not go on with memory that is not its own. The
// checkpoint may be removed meanwhile, since verify holds the pages open, as the sandbox's kernel
// does.
func (n *Node) verify(b *instance, c *checkpoint.Checkpoint) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if v := n.verifications[c.Dir]; v != nil && v.join(b) {
		return nil
	}
	pages, err := c.Open(isPages)
	if errors.Is(err, fs.ErrNotExist) {
		// The checkpoint was removed. The only copy of its memory is in the sandbox now.
		n.log.WarnContext(b.ctx, "a checkpoint is gone while its sandbox runs", "sandbox", b.record.ID, "checkpoint", c.Dir)
		return nil
	}
	if err != nil {
		return err
	}
	v := &verification{dir: c.Dir, pages: pages, distrust: c.Distrust,
		wanted: make(chan struct{}, 1), done: make(chan struct{})}
	v.ctx, v.cancel = context.WithCancel(n.ctx)
	v.join(b)
	n.verifications[c.Dir] = v
	n.watches.Go(func() { n.verified(v) })
	return nil
}

// join adds a sandbox to the verification. It returns false if no sandbox needed the verification
// any more.
func (v *verification) join(b *instance) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ctx.Err() != nil {
		return false
	}
	b.verified = v
	v.instances, v.alive = append(v.instances, b), v.alive+1
	context.AfterFunc(b.ctx, func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.alive--; v.alive == 0 {
			v.cancel()
		}
	})
	return true
}

// verified does a verification when its time has come, and ends the sandboxes if the memory is
// damaged.
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
	delete(n.verifications, v.dir) // a later restore may read pages after they are verified
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
	instances := v.instances
	v.mu.Unlock()
	for _, b := range instances {
		if b.ctx.Err() != nil {
			continue
		}
		if err := n.groups.Group(n.groupPath(b.record.ID)).Kill(n.ctx); err != nil && n.ctx.Err() == nil {
			n.log.ErrorContext(n.ctx, "ending a sandbox", "sandbox", b.record.ID, "error", err)
		}
	}
}

// sound waits until the memory that the sandbox was restored with is verified. Before that no
// checkpoint may replace the one that the sandbox was restored from.
func (b *instance) sound(ctx context.Context) error {
	if b.verified == nil {
		return nil // it was booted
	}
	select {
	case b.verified.wanted <- struct{}{}:
	default: // another caller waits already
	}
	select {
	case <-b.verified.done:
		return b.verified.err
	case <-ctx.Done():
		return fmt.Errorf("waiting for the memory of %s to be verified: %w", b.record.ID, ctx.Err())
	}
}
