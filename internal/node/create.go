package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/cgroup"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/runsc"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/trace"
)

const (
	// overhead is what the sandbox's own kernel, its gofer and the agent need beside
	// the memory that the size promises, in bytes. An idle sandbox has about 20 MB of
	// it; the rest is for page tables, sockets and open files. Too little kills
	// commands below the promised size.
	overhead = 64 << 20
	// reserve is what the kernel's limit stands above what the memory guard keeps to, so that it has the time
	// to have somebody ended, and what it lends beyond that.
	reserve = 64 << 20
	// bootMemory is what a sandbox takes until its agent answers.
	bootMemory = 64 << 20
	// hostPIDs is how many host tasks a sandbox may have for each task inside, and
	// hostPIDsBase how many beside them: systrap runs every address space in two
	// processes, keeps those of ended ones for a while, and the sentry has threads. It is
	// the last line only: a sentry that runs into it dies. The agent bounds what is inside.
	hostPIDs, hostPIDsBase = 12, 1024
	// agentPath is where sandboxes find the agent.
	agentPath = "/.cay"
)

// lifeFile holds the record of a sandbox's life in its directory.
const lifeFile = "life.json"

// life is what a later process of the server must know to adopt the sandbox.
type life struct {
	ID sandbox.ID `json:"id"`
	// Org is the organization whose it is; "" for a member of the pool, and for a sandbox of
	// a server that did not record it. Guarded by node.mu, as Egress.
	Org   string `json:"org,omitempty"`
	Run   string `json:"run"`
	Token string `json:"token"` // the agent's key; secret: the file is 0600
	// Handshake says that the agent and the host prove to each other that they know Token. Lives
	// that began before there was that send it with each request; see agentapi.Client.Bearer.
	Handshake bool   `json:"handshake,omitempty"`
	Slot      int    `json:"slot"`
	UID       uint32 `json:"uid,omitempty"` // of its processes on the host; 0 is one of a version without
	MemoryMB  int    `json:"memory_mb"`
	// CPUWeight is of the sandbox's group while it is not called; 0 is one of a version that did not record it.
	CPUWeight int64 `json:"cpu_weight,omitempty"`
	// What the sandbox was first started with, and its checkpoints need.
	Programs embedded.Version `json:"programs"`
	Flags    []string         `json:"flags"`
	// Warm says what a member of the pool was made with, see Node.make. "" is no member, or
	// one that is being claimed. Guarded by node.mu, as Egress.
	Warm string `json:"warm,omitempty"`
	// Egress is the policy that is wanted. It changes while the sandbox runs.
	Egress sandbox.Egress `json:"egress"`
	// From is the snapshot that this life was made from; "" is none.
	From string `json:"from,omitempty"`
}

// step is one part of a create. What it did is undone by Destroy, which works
// from what it finds.
type step struct {
	name string
	do   func(context.Context) error
}

// Create makes a sandbox and returns when its agent answers and knows its token, and its
// start command, if it has one, is ready.
func (n *Node) Create(ctx context.Context, spec sandbox.Spec) error {
	b, steps, err := n.making(ctx, spec)
	if err != nil {
		return err
	}
	return n.take(ctx, b, steps, n.Destroy)
}

// newBox returns a sandbox that is to be booted.
func (n *Node) newBox(spec sandbox.Spec) *box {
	return n.boxOf(life{ID: spec.ID, Org: spec.OrgID, Run: spec.Run, Token: spec.Token, Handshake: true, MemoryMB: spec.Size.MemoryMB,
		CPUWeight: cpuWeight(spec), Egress: spec.Egress,
		Programs: n.cfg.Programs.Version, Flags: runsc.Flags(n.cfg.Platform)})
}

// creation is how it is.
func (n *Node) creation(b *box, spec sandbox.Spec) []step {
	steps := n.steps(b, spec, func(ctx context.Context, image string) (int, error) {
		return b.runtime().Run(ctx, n.container(b, spec, image))
	}, func(ctx context.Context) error { return n.initAgent(ctx, b, spec) })
	if !spec.Start.None() {
		steps = append(steps, step{"command", func(ctx context.Context) error { return n.startCommand(ctx, b, spec.Start) }})
	}
	return steps
}

// take makes a life of a sandbox that has none, step by step, and undoes it when one fails.
func (n *Node) take(ctx context.Context, b *box, steps []step, undo func(context.Context, sandbox.ID) error) error {
	id := b.life.ID
	n.mu.Lock()
	if n.boxes[id] != nil {
		n.mu.Unlock()
		return fmt.Errorf("sandbox %s is on this machine already", id)
	}
	n.boxes[id] = b
	n.mu.Unlock()
	return n.walk(ctx, b, steps, undo)
}

// walk takes the steps one after the other, and undoes all when one fails.
func (n *Node) walk(ctx context.Context, b *box, steps []step, undo func(context.Context, sandbox.ID) error) error {
	id := b.life.ID
	for _, s := range steps {
		began := time.Now()
		end := trace.Start(ctx, s.name)
		err := s.do(ctx)
		end()
		if err == nil {
			err = n.passed(s.name)
		}
		if err != nil {
			b.turnOver()
			cause := fmt.Errorf("making sandbox %s, step %s: %w", id, s.name, err)
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
			defer cancel()
			if err := undo(ctx, id); err != nil {
				return errors.Join(cause, fmt.Errorf("undoing: %w", err))
			}
			return cause
		}
		n.log.DebugContext(ctx, "made a step", "sandbox", id, "step", s.name, "took", time.Since(began))
	}
	return nil
}

// steps is how a life is made: start boots or restores gVisor, meet tells the agent
// what is new to it.
func (n *Node) steps(b *box, spec sandbox.Spec, start func(ctx context.Context, image string) (pid int, err error), meet func(context.Context) error) []step {
	var image string
	return []step{
		{"image", func(ctx context.Context) (err error) {
			image, err = n.images.Path(ctx, spec.Image)
			return err
		}},
		{"turn", func(ctx context.Context) error { return n.turn(ctx, b, spec.OrgID) }},
		{"directory", func(context.Context) error { return os.Mkdir(n.dir(spec.ID), 0o700) }},
		{"network", func(ctx context.Context) (err error) {
			if b.slot, err = n.net.Acquire(ctx); err != nil {
				return err
			}
			b.life.Slot = b.slot.Index
			return n.takeUID(b)
		}},
		{"record", func(context.Context) error { return b.record() }},
		{"policy", b.applyPolicy},
		{"start", func(ctx context.Context) (err error) {
			b.pid, err = start(ctx, image)
			return err
		}},
		{"watch", func(context.Context) error { return b.watch() }},
		{"agent", func(ctx context.Context) error {
			defer b.turnOver()
			return n.awaitAgent(ctx, b)
		}},
		{"favour", func(ctx context.Context) error {
			b.hurry.settle()
			if err := n.groups.Group(n.groupPath(spec.ID)).Renice(); err != nil {
				// A host that does not let us: the sandbox works, and is easier to overrun.
				n.log.WarnContext(ctx, "the sandbox's kernel runs with the weight of its processes", "sandbox", spec.ID, "error", err)
			}
			return nil
		}},
		{"init", func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, meetTimeout)
			defer cancel()
			return meet(ctx)
		}},
	}
}

// undoTimeout bounds the clean-up after a failed create or wake, which goes on when the
// operation's own time is over.
const undoTimeout = 30 * time.Second

// container is what gVisor boots: the agent as the first process.
func (n *Node) container(b *box, spec sandbox.Spec, image string) runsc.Container {
	quota := int64(0)
	if spec.Size.Dedicated {
		quota = int64(spec.Size.VCPUs) * runsc.CPUPeriod
	}
	memory := int64(spec.Size.MemoryMB) << 20
	pids := min(n.cfg.MaxPIDs, tasksFor(spec.Size.MemoryMB))
	c := b.container()
	c.Spec = runsc.NewSpec(runsc.Box{
		Hostname:  hostname(spec.ID),
		Root:      runsc.Root{Image: image, Overlay: n.dir(spec.ID), MaxBytes: int64(spec.DiskMB) << 20},
		Binds:     binds(n.cfg.Programs),
		Args:      []string{filepath.Join(agentPath, "cay-agent")},
		Env:       []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", fmt.Sprintf("CAY_PIDS_MAX=%d", pids)},
		Namespace: b.slot.Namespace,
		Limits: runsc.Limits{
			CgroupsPath: n.groupPath(spec.ID),
			// What the sandbox sees as its memory; the guard sets what the host
			// enforces, which is more by what the sandbox's kernel needs.
			MemoryBytes: memory,
			PauseBytes:  cgroup.Near(memory + overhead),
			CPUShares:   uint64(hurried * b.life.CPUWeight), // until something else than the agent runs, see hurry.settle
			CPUQuota:    quota,
			PIDs:        int64(pids)*hostPIDs + hostPIDsBase,
		},
		ShmBytes: memory / 2, // as Linux does
		HostUID:  b.life.UID,
	})
	return c
}

// binds are the directories of the host that a sandbox sees.
func binds(p embedded.Programs) []runsc.Bind {
	return []runsc.Bind{{From: p.AgentDir, To: agentPath}}
}

// tasksFor is how many tasks a sandbox with so much memory may have inside: one for
// each 2 MiB up to 256, and one for each 4 MiB in a larger one.
//
// An idle process costs the host 0.6 MiB (two processes, their page tables and stacks, and
// what it touches), a shell twice that, and a bomb of them also what the dead have not given
// back yet. With this no number of them comes near the limit, where the sandbox's kernel
// could not start another and would die of it; and the agent, which has to end the bomb,
// does so in 2 s among 256 and in 6 s among 512, measured on 2 CPUs.
func tasksFor(memoryMB int) int { return max(min(memoryMB/2, 256), memoryMB/4) }

// hostname is the name a sandbox has for itself: its ID without the prefix, whose
// underscore no host name may have.
func hostname(id sandbox.ID) string { return strings.TrimPrefix(string(id), "sbx_") }

const (
	// agentPoll is how long to wait between two tries to reach a starting agent. It
	// answers about 100 ms after its start; a try costs the sandbox's network
	// stack some tens of microseconds.
	agentPoll = 4 * time.Millisecond
	// agentTry bounds one try, since a packet that comes before the sandbox's
	// network stack is up is lost, and TCP sends it again after a second only.
	agentTry = 250 * time.Millisecond
)

// awaitAgent returns when the agent answers, or with an error when the sandbox died
// or ctx ended.
func (n *Node) awaitAgent(ctx context.Context, b *box) error {
	for {
		try, cancel := context.WithTimeout(ctx, agentTry)
		err := n.agents.Health(try, b.target())
		cancel()
		if err == nil {
			return nil
		}
		if b.dead() {
			return errors.New("the sandbox died before its agent answered")
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the agent: %w", errors.Join(ctx.Err(), err))
		case <-time.After(agentPoll):
		}
	}
}

// meetTimeout bounds telling an agent that answers about its sandbox. It takes 3 ms; a
// sandbox that dies just then says nothing more.
const meetTimeout = 15 * time.Second

func (n *Node) initAgent(ctx context.Context, b *box, spec sandbox.Spec) error {
	err := n.agents.Init(ctx, b.target(), agentapi.InitRequest{
		AccessToken: spec.Token, Env: spec.Env, DefaultUser: spec.User, DefaultWorkdir: spec.Workdir,
		Hostname: hostname(spec.ID), Nameservers: n.cfg.Nameservers,
	})
	if err != nil {
		return fmt.Errorf("telling the agent about its sandbox: %w", err)
	}
	b.agentKnows(spec.Token)
	return nil
}

// startCommand starts the sandbox's start command and waits until it is ready. It is a call
// beside init, which a wake makes too and must not start anything: a wake finds the
// command as it was.
func (n *Node) startCommand(ctx context.Context, b *box, s sandbox.Start) error {
	ctx, cancel := context.WithTimeout(ctx, meetTimeout+s.Patience())
	defer cancel()
	req := agentapi.StartRequest{Command: s.Command, Args: s.Args, User: s.User}
	if r := s.Ready; r != nil {
		req.Ready = &agentapi.Ready{Port: r.Port, Command: r.Command, TimeoutMs: s.Patience().Milliseconds()}
		if r.HTTP != nil {
			req.Ready.HTTP = &agentapi.ReadyHTTP{Port: r.HTTP.Port, Path: r.HTTP.Path}
		}
	}
	err := n.agents.Start(ctx, b.target(), req)
	switch {
	case err == nil:
		return nil
	case b.dead():
		return fault.New(fault.Internal, "boot_failed", "the sandbox's kernel ended before its start command was ready").Because(err)
	}
	return fmt.Errorf("starting its start command: %w", err)
}

// record writes the life file, whole or not at all.
func (b *box) record() error {
	data, err := json.Marshal(b.life)
	if err != nil {
		return fmt.Errorf("encoding the record of %s: %w", b.life.ID, err)
	}
	path := filepath.Join(b.node.dir(b.life.ID), lifeFile)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return fmt.Errorf("writing the record of %s: %w", b.life.ID, err)
	}
	// Not synced: after a crash of the machine no sandbox runs that could be adopted.
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("writing the record of %s: %w", b.life.ID, err)
	}
	return nil
}

// readLife reads the record of a sandbox's directory. None, or one that is not
// whole, is NotFound.
func readLife(dir string) (life, error) {
	var l life
	data, err := os.ReadFile(filepath.Join(dir, lifeFile))
	if err == nil {
		err = json.Unmarshal(data, &l)
	}
	if err != nil {
		return life{}, fault.New(fault.NotFound, "", "no record in %s", dir).Because(err)
	}
	return l, nil
}
