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
	"github.com/cayhq/cay/internal/hostfile"
	"github.com/cayhq/cay/internal/runsc"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/trace"
)

const (
	// overhead is the memory in bytes for the sandbox's own kernel, its gofer and the agent, in
	// addition to the memory that the size promises. An idle sandbox uses about 20 MB of it; the rest
	// is for page tables, sockets and open files. Too little kills commands below the promised size.
	overhead = 64 << 20
	// reserve is the distance in bytes between the memory guard's limit and the kernel's, which gives
	// the guard the time to end a process, and the size of the loans beyond that. With too little,
	// processes reach the kernel's limit before the guard has ended one.
	reserve = 64 << 20
	// bootMemory is the memory in bytes that a sandbox takes until its agent answers. With too little,
	// Reserve admits sandboxes that leave less than Config.MinHostMemory.
	bootMemory = 64 << 20
	// madeMemory is the memory in bytes that is kept for a sandbox which is being made beside another: what
	// it has when its agent answers, and some for its first command. With less, sandboxes that are made at
	// once leave less than Config.MinHostMemory; with more, some are refused that have room.
	madeMemory = 32 << 20
	// hostPIDs is the number of host tasks that a sandbox may have for each task inside, and
	// hostPIDsBase the number in addition: systrap runs every address space in two processes, keeps
	// those of ended ones for a while, and the sentry has threads. The limit is only the last resort,
	// since a sentry that reaches it dies; the agent limits the tasks inside.
	hostPIDs, hostPIDsBase = 12, 1024
	// agentPath is the directory of the agent inside a sandbox.
	agentPath = "/.cay"
)

// recordFile names the file in a sandbox's directory that holds its record.
const recordFile = "life.json"

// record holds what a later process of the server must know to adopt the sandbox. Org, Warm and the
// policy in Shape change while the sandbox runs, and the rest of Shape when a pooled sandbox is claimed.
// Only the sandbox's one operation changes them. It holds node.mu then, and reads them without; other
// goroutines hold node.mu while they read them.
type record struct {
	ID sandbox.ID `json:"id"`
	// Org is the organization that owns the sandbox; "" for a pooled sandbox, and for one of a server
	// that did not record it.
	Org   string `json:"org,omitempty"`
	Run   string `json:"run"`
	Token string `json:"token"` // the agent's key; secret: the file is 0600
	// Handshake reports whether the agent and the host prove to each other that they know Token. In an
	// instance that began before there was a handshake the host sends Token with each request; see
	// agentapi.Client.Bearer.
	Handshake bool `json:"handshake,omitempty"`
	// Reboots reports whether the programs can save the sandbox's files alone and boot it with them.
	Reboots bool   `json:"reboots,omitempty"`
	Slot    int    `json:"slot"`
	UID     uint32 `json:"uid,omitempty"` // of its processes on the host; 0 if a version without user ids started it
	// Shape holds what the sandbox was made from; its policy may not be in force yet.
	Shape sandbox.Shape `json:"shape"`
	// Programs and Flags are those that first started the sandbox; its checkpoints need them.
	Programs embedded.Version `json:"programs"`
	Flags    []string         `json:"flags"`
	// Warm describes what a pooled sandbox was made with, see Node.make; "" if the sandbox is not
	// pooled or is being claimed.
	Warm string `json:"warm,omitempty"`
	// From is the snapshot that this instance was made from; "" if there is none.
	From string `json:"from,omitempty"`
}

// step names one part of a create and does it. Destroy undoes it, working from what it finds.
type step struct {
	name string
	do   func(context.Context) error
}

// Create makes a sandbox. It returns when the agent answers and knows its token, and the start
// command, if there is one, is ready.
func (n *Node) Create(ctx context.Context, spec sandbox.Spec) error {
	b, steps, err := n.making(ctx, spec)
	if err != nil {
		return err
	}
	return n.take(ctx, b, steps, n.Destroy)
}

// newInstance returns the instance of a sandbox that is to be booted.
func (n *Node) newInstance(spec sandbox.Spec) *instance {
	return n.instanceOf(record{ID: spec.ID, Org: spec.OrgID, Run: spec.Run, Token: spec.Token, Handshake: true,
		Reboots: true, Shape: spec.Shape, Programs: n.cfg.Programs.Version, Flags: runsc.Flags(n.cfg.Platform)})
}

// bootSteps returns the steps that boot a new sandbox.
func (n *Node) bootSteps(b *instance, spec sandbox.Spec) []step {
	steps := n.steps(b, spec, func(ctx context.Context, image string) (int, error) {
		return b.runtime().Run(ctx, n.container(b, spec, image))
	}, func(ctx context.Context) error { return n.initAgent(ctx, b, spec) })
	return append(steps, n.commandStep(b, spec.Start)...)
}

// commandStep returns the step that starts a start command, or none if there is no command.
func (n *Node) commandStep(b *instance, s sandbox.Start) []step {
	if s.None() {
		return nil
	}
	return []step{{"command", func(ctx context.Context) error { return n.startCommand(ctx, b, s) }}}
}

// take registers the instance of a sandbox that has none on this machine and makes it step by
// step. It calls undo when a step fails.
func (n *Node) take(ctx context.Context, b *instance, steps []step, undo func(context.Context, sandbox.ID) error,
) error {
	if err := n.admit(b); err != nil {
		return err
	}
	defer func() {
		n.mu.Lock()
		n.booting--
		n.mu.Unlock()
	}()
	return n.walk(ctx, b, steps, undo)
}

// walk does the steps one after the other. It calls undo when one fails.
func (n *Node) walk(ctx context.Context, b *instance, steps []step, undo func(context.Context, sandbox.ID) error,
) error {
	id := b.record.ID
	for _, s := range steps {
		began := time.Now()
		end := trace.Start(ctx, s.name)
		err := s.do(ctx)
		end()
		if err == nil {
			err = n.passed(s.name)
		}
		if err != nil {
			b.releaseStartSlot()
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

// steps returns the steps that make an instance: start boots or restores gVisor, and meet tells the
// agent what is new to it.
func (n *Node) steps(b *instance, spec sandbox.Spec, start func(ctx context.Context, image string) (pid int, err error),
	meet func(context.Context) error) []step {
	var image string
	return []step{
		{"image", func(ctx context.Context) (err error) {
			image, err = n.images.Path(ctx, spec.Image)
			return err
		}},
		// Server-Timing shows the name turn to callers, so it stays.
		{"turn", func(ctx context.Context) error { return n.awaitStartSlot(ctx, b, spec.OrgID) }},
		{"directory", func(context.Context) error { return os.Mkdir(n.dir(spec.ID), 0o700) }},
		{"network", func(ctx context.Context) (err error) {
			if b.slot, err = n.net.Acquire(ctx); err != nil {
				return err
			}
			b.record.Slot = b.slot.Index
			return n.takeUID(b)
		}},
		{"record", func(context.Context) error { return b.writeRecord() }},
		{"policy", b.applyPolicy},
		{"start", func(ctx context.Context) (err error) {
			b.pid, err = start(ctx, image)
			return err
		}},
		{"watch", func(context.Context) error { return b.watch() }},
		{"agent", func(ctx context.Context) error {
			defer b.releaseStartSlot()
			return n.awaitAgent(ctx, b)
		}},
		{"favour", func(ctx context.Context) error { // Server-Timing shows the name to callers, so it stays
			b.hurry.settle()
			if err := n.groups.Group(n.groupPath(spec.ID)).Renice(); err != nil {
				// The host does not permit it. The sandbox works, but its processes can slow down its kernel.
				n.log.WarnContext(ctx, "the sandbox's kernel runs with the weight of its processes",
					"sandbox", spec.ID, "error", err)
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

// undoTimeout limits the clean-up after a failed create or wake, which continues after the
// operation's own deadline.
const undoTimeout = 30 * time.Second

// container returns the sandbox that gVisor boots, with the agent as the first process.
func (n *Node) container(b *instance, spec sandbox.Spec, image string) runsc.Container {
	quota := int64(0)
	if spec.Size.Dedicated {
		quota = int64(spec.Size.VCPUs) * runsc.CPUPeriod
	}
	memory := int64(spec.Size.MemoryMB) << 20
	pids := min(n.cfg.MaxPIDs, tasksFor(spec.Size.MemoryMB))
	c := b.container()
	c.Spec = runsc.NewSpec(runsc.SandboxSpec{
		Hostname:  hostname(spec.ID),
		Root:      runsc.Root{Image: image, Overlay: n.dir(spec.ID), MaxBytes: int64(spec.DiskMB) << 20},
		Binds:     binds(n.cfg.Programs),
		Args:      []string{filepath.Join(agentPath, "cay-agent")},
		Env:       []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", fmt.Sprintf("CAY_PIDS_MAX=%d", pids)},
		Namespace: b.slot.Namespace,
		Limits: runsc.Limits{
			CgroupsPath: n.groupPath(spec.ID),
			// The sandbox sees this as its memory. The guard sets the limit that the host enforces, which is
			// higher by the need of the sandbox's kernel.
			MemoryBytes: memory,
			PauseBytes:  cgroup.Near(memory + overhead),
			CPUShares:   b.bootShares(), // until a program other than the agent runs
			CPUQuota:    quota,
			PIDs:        int64(pids)*hostPIDs + hostPIDsBase,
		},
		ShmBytes: memory / 2, // as Linux does
		HostUID:  b.record.UID,
	})
	return c
}

// binds returns the directories of the host that a sandbox sees.
func binds(p embedded.Programs) []runsc.Bind {
	return []runsc.Bind{{From: p.AgentDir, To: agentPath}}
}

// tasksFor returns how many tasks a sandbox with so much memory may have inside: one for each 2 MiB
// up to 256, and one for each 4 MiB in a larger one.
//
// An idle process costs the host 0.6 MiB: two processes, their page tables and stacks, and the
// memory that it touches. A shell costs twice that, and a fork bomb also the memory that dead
// processes have not returned yet. With this limit no number of processes comes near the memory
// limit, where the sandbox's kernel could not start another process and would die. The agent, which
// has to end a fork bomb, does so in 2 s among 256 processes and in 6 s among 512, measured on 2
// CPUs.
func tasksFor(memoryMB int) int { return max(min(memoryMB/2, 256), memoryMB/4) }

// hostname returns the sandbox's host name: its ID without the prefix, whose underscore a host name
// may not have.
func hostname(id sandbox.ID) string { return strings.TrimPrefix(string(id), "sbx_") }

const (
	// agentPoll is the pause between two tries to reach a starting agent. The agent answers about 100
	// ms after its start; a try costs the sandbox's network stack some tens of microseconds. A longer
	// pause makes every start slower.
	agentPoll = 4 * time.Millisecond
	// agentTry limits one try. A packet that comes before the sandbox's network stack is up is lost,
	// and TCP sends it again only after a second.
	agentTry = 250 * time.Millisecond
)

// awaitAgent waits until the agent answers. It returns an error when the sandbox has died or ctx
// has ended.
func (n *Node) awaitAgent(ctx context.Context, b *instance) error {
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

// meetTimeout limits the call that tells an agent about its sandbox. The call takes 3 ms; a sandbox
// that dies during it never answers.
const meetTimeout = 15 * time.Second

func (n *Node) initAgent(ctx context.Context, b *instance, spec sandbox.Spec) error {
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

// startCommand starts the sandbox's start command and waits until it is ready. The call is separate
// from init, which a wake makes too: a wake with memory finds the command as it was and must not start it.
func (n *Node) startCommand(ctx context.Context, b *instance, s sandbox.Start) error {
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
		return fault.New(fault.Internal, fault.CodeBootFailed,
			"the sandbox's kernel ended before its start command was ready").Because(err)
	}
	return fmt.Errorf("starting its start command: %w", err)
}

// writeRecord writes the record, completely or not at all.
func (b *instance) writeRecord() error {
	data, err := json.Marshal(b.record)
	if err != nil {
		return fmt.Errorf("encoding the record of %s: %w", b.record.ID, err)
	}
	path := filepath.Join(b.node.dir(b.record.ID), recordFile)
	// The file is not synced: after a crash of the machine no sandbox runs that could be adopted.
	if err := hostfile.Replace(path, data, 0o600); err != nil {
		return fmt.Errorf("writing the record of %s: %w", b.record.ID, err)
	}
	return nil
}

// readRecord returns the record in a sandbox's directory. It fails with NotFound if there is no
// record or an incomplete one.
func readRecord(dir string) (record, error) {
	var l record
	data, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err == nil {
		err = json.Unmarshal(data, &l)
	}
	if err == nil && l.Shape.Size.MemoryMB == 0 {
		err = readOld(data, &l.Shape)
	}
	if err != nil {
		return record{}, fault.New(fault.NotFound, "", "no record in %s", dir).Because(err)
	}
	return l, nil
}

// readOld reads what a record of a version without shapes has of one.
func readOld(data []byte, s *sandbox.Shape) error {
	var old struct {
		MemoryMB  int            `json:"memory_mb"`
		CPUWeight int64          `json:"cpu_weight"`
		Egress    sandbox.Egress `json:"egress"`
	}
	if err := json.Unmarshal(data, &old); err != nil {
		return err
	}
	*s = sandbox.Shape{Egress: old.Egress,
		Size: sandbox.Size{MemoryMB: old.MemoryMB, VCPUs: int(old.CPUWeight / weightPerCPU)}}
	return nil
}
