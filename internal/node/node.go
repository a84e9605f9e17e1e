// Package node builds sandboxes on this machine and removes them: a network slot, a root file
// system, a control group, gVisor, and the agent inside.
//
// It owns the order of the steps and the directory of each sandbox (0700, with the bundle, the
// writable layer and a record for adoption). It adopts sandboxes that a former process of the same
// server left running. It decides nothing about sandboxes: the sandbox room owns their states,
// lifetimes and rows.
//
// A [Node] is safe for concurrent use for different sandboxes; the sandbox room makes the calls for
// one sandbox one at a time. After an error of [Node.Create] nothing of the sandbox is left, except
// what the error says could not be removed; a later Destroy removes that too. Sandboxes outlive the
// process.
package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/cgroup"
	"github.com/cayhq/cay/internal/checkpoint"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/runsc"
	"github.com/cayhq/cay/internal/sandbox"
)

// AgentPort is the agent's TCP port inside a sandbox: the port that E2B's clients know.
const AgentPort = 49983

// Images finds root file systems. The image room implements it.
type Images interface {
	// Path returns the verified EROFS file with that content hash.
	Path(ctx context.Context, digest string) (string, error)
	// Find returns the error that Path is known to give, without reading or fetching the file.
	Find(ctx context.Context, digest string) error
}

// Config says where a Node keeps its files and how many sandboxes it takes.
type Config struct {
	Instance string            // names everything of this server on the host
	Dir      string            // one directory for each sandbox; on disk, holds the writable layers
	RunDir   string            // runsc's state; on a tmpfs, and short: see [runsc.Runtime]
	Platform string            // gVisor platform
	Programs embedded.Programs // programs of new sandboxes
	// ProgramsDir holds Programs, and the programs that older sandboxes and checkpoints need.
	ProgramsDir string
	Checkpoints string // one directory for each sandbox that has a checkpoint; on disk

	Nameservers []string // of sandboxes

	// PolicyChanged, if not nil, is called with the address of a sandbox whose policy has changed or
	// that has gone: earlier decisions for that address do not hold any more. It must not wait for
	// this Node.
	PolicyChanged func(addr netip.Addr)

	// Saved, if not nil, is called with the name of a new checkpoint, which is the ID of its sandbox or snapshot, and its
	// size. It must not wait.
	Saved func(name string, bytes int64)

	MaxSandboxes int // at this number Reserve refuses another
	// MinHostMemory and MinDisk are the bytes that must stay free for the machine itself. Reserve refuses
	// a sandbox when less is free.
	MinHostMemory, MinDisk int64
	// FirstUID begins the range of [UIDs] user and group ids that sandboxes have on the host.
	FirstUID uint32
	// MaxPIDs limits the tasks inside a sandbox; see tasksFor for the lower limit of a small one.
	MaxPIDs int
	// AnswerTimeout limits the silence of an agent; 0 is the default of agentapi.
	AnswerTimeout time.Duration
}

// Node builds, changes and removes sandboxes on this machine. Open makes one.
type Node struct {
	cfg     Config
	log     *slog.Logger
	net     *network.Network
	images  Images
	groups  *cgroup.Hierarchy
	moves   io.Closer      // keeps moves into control groups quick; nil where the kernel cannot
	state   *runsc.Runtime // reads and removes the state of runsc below RunDir
	standby *runsc.Standby // of the programs of new sandboxes
	agents  *agentapi.Client
	lost    chan sandbox.Observed
	denials chan sandbox.Denial
	ctx     context.Context // of the watches; ends with Close
	stop    context.CancelFunc
	watches sync.WaitGroup

	checkpoints *checkpoint.Store
	cpuClass    string // of this machine
	contention  contention
	startSlots  *startSlots
	verifying   sync.Mutex // held while pages are verified, which keeps the disk busy: one at a time

	// after, when set, is called after each step of an operation; its error fails the step. Tests use
	// it to make operations fail after any step.
	after func(step string) error
	// freeMemory returns how many bytes of memory the machine can give. Tests set it.
	freeMemory func() (int64, error)

	admitting sync.Mutex // held from the look for room for another sandbox until it counts; taken before mu

	mu sync.Mutex
	// booting is the number of sandboxes whose steps are not done.
	// +checklocks:mu
	booting int
	// reserved has the sandboxes for which room is kept and that have no instance yet, each with the number of its
	// reservation.
	// +checklocks:mu
	reserved map[sandbox.ID]uint64
	// reservations counts those that were made.
	// +checklocks:mu
	reservations uint64
	// instances has all sandboxes with a directory.
	// +checklocks:mu
	instances map[sandbox.ID]*instance
	// verifications has those not begun, by the checkpoint's directory.
	// +checklocks:mu
	verifications map[string]*verification
	// guests has the sandboxes whose slot has their policy.
	// +checklocks:mu
	guests map[*network.Slot]*instance
	// uids has the sandboxes by their user id on the host.
	// +checklocks:mu
	uids map[uint32]*instance
}

// Open makes a Node and adopts the sandboxes that still run. [Node.List] reports the remains of
// dead ones until they are destroyed.
func Open(cfg Config, slots *network.Network, images Images, log *slog.Logger) (*Node, error) {
	groups, err := cgroup.Detect()
	if err != nil {
		return nil, err
	}
	if cfg.FirstUID == 0 {
		return nil, errors.New("a node needs a range of user ids: without it sandboxes would run as root")
	}
	for _, dir := range []string{cfg.Dir, cfg.RunDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("making the directory for sandboxes: %w", err)
		}
	}
	n := &Node{cfg: cfg, log: log, net: slots, images: images, groups: groups,
		state:      &runsc.Runtime{Root: cfg.RunDir},
		startSlots: newStartSlots(max(2, startsPerCPU*runtime.NumCPU())),
		freeMemory: availableMemory,
		lost:       make(chan sandbox.Observed), denials: make(chan sandbox.Denial, denialsHeld),
		reserved: map[sandbox.ID]uint64{}, instances: map[sandbox.ID]*instance{}, verifications: map[string]*verification{},
		guests: map[*network.Slot]*instance{}, uids: map[uint32]*instance{}}
	n.agents = agentapi.NewClient(func(ctx context.Context, id string) (net.Conn, error) {
		return n.reach(ctx, sandbox.ID(id))
	})
	n.agents.Bearer, n.agents.OnCall = n.bearer, n.hurry
	n.agents.Patience = cmp.Or(cfg.AnswerTimeout, agentapi.DefaultPatience)
	var interrupted []string
	if n.checkpoints, interrupted, err = checkpoint.Open(cfg.Checkpoints, cfg.MinDisk); err != nil {
		return nil, err
	}
	if n.cpuClass, err = cpuClass(); err != nil {
		n.log.Warn("checkpoints are recorded without the class of the processor", "error", err)
	}
	if err := n.unlimitProcesses(); err != nil {
		return nil, fmt.Errorf("lifting the limit of processes of a user: %w", err)
	}
	n.ctx, n.stop = context.WithCancel(context.Background())
	if err := n.adopt(); err != nil {
		n.stop()
		return nil, err
	}
	for _, name := range interrupted {
		if b := n.instance(sandbox.ID(name)); b != nil && !b.dead() {
			n.watches.Go(func() { n.revive(b) })
		}
	}
	n.watches.Go(n.reportDenials)
	n.standby = runsc.NewStandby(cfg.Programs.Runsc)
	if n.moves, err = cgroup.QuickMoves("cay-" + cfg.Instance); err != nil {
		log.Info("sandboxes start some milliseconds later on this kernel", "error", err)
	}
	return n, n.collect()
}

// Agents returns the client that talks to the agents of this node's sandboxes.
func (n *Node) Agents() *agentapi.Client { return n.agents }

// UsesImage reports whether a sandbox that is on this node has the image open.
func (n *Node) UsesImage(digest string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, b := range n.instances {
		if b.record.Shape.Image == digest {
			return true
		}
	}
	return false
}

// Lost returns a channel of the sandboxes whose processes ended although their end was not
// intended.
func (n *Node) Lost() <-chan sandbox.Observed { return n.lost }

// Close stops the watches. Sandboxes continue to run.
func (n *Node) Close() {
	n.stop()
	n.agents.CloseIdle()
	n.watches.Wait()
	n.standby.Close()
	if n.moves != nil {
		_ = n.moves.Close() // the end of this process closes it too
	}
}

// Dial connects to the agent of a running sandbox.
func (n *Node) Dial(ctx context.Context, id sandbox.ID) (net.Conn, error) {
	b := n.instance(id)
	if b == nil || b.slot == nil || b.dead() {
		return nil, fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s has no agent on this machine", id)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(b.ctx, cancel)() // a dead sandbox does not refuse connections but never answers
	return n.net.Dial(ctx, b.slot, AgentPort)
}

// List returns the observed state of each sandbox of this instance: those with a directory or a
// checkpoint, and those of which only a control group or a state file of runsc is left.
func (n *Node) List(ctx context.Context) ([]sandbox.Observed, error) {
	names, err := n.groups.Group(n.groupPath("")).Children()
	if err != nil {
		return nil, err
	}
	states, err := n.state.IDs()
	if err != nil {
		return nil, err
	}
	checkpointsOf, err := n.checkpoints.Names()
	if err != nil {
		return nil, err
	}
	dirs, err := os.ReadDir(n.cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("listing the sandboxes' directories: %w", err)
	}
	for _, d := range dirs {
		names = append(names, d.Name())
	}
	n.mu.Lock()
	for id := range n.instances {
		names = append(names, string(id))
	}
	n.mu.Unlock()
	names = slices.Concat(names, states, checkpointsOf)
	slices.Sort(names)
	var found []sandbox.Observed
	for _, name := range slices.Compact(names) {
		if !sandbox.ID(name).Valid() { // it is not a sandbox, and not ours to remove
			continue
		}
		observed, err := n.Inspect(ctx, sandbox.ID(name))
		if err != nil {
			return nil, err
		}
		if observed != nil { // it may have gone meanwhile
			found = append(found, *observed)
		}
	}
	return found, nil
}

// Inspect returns the observed state of one sandbox, nil if the machine has nothing of it.
func (n *Node) Inspect(_ context.Context, id sandbox.ID) (*sandbox.Observed, error) {
	observed := &sandbox.Observed{ID: id}
	b := n.instance(id)
	if b != nil {
		observed.Run, observed.Alive, observed.Warm, observed.Egress = b.record.Run, !b.dead(), b.warm(), b.policy()
	}
	_, err := os.Stat(n.dir(id))
	observed.Remains = b != nil || err == nil || n.state.Knows(string(id)) || n.groups.Group(n.groupPath(id)).Exists()
	if observed.Checkpoint, err = n.latestCheckpoint(id); err != nil {
		return nil, err
	}
	if !observed.Remains && observed.Checkpoint == nil && !n.checkpoints.Has(string(id)) {
		return nil, nil
	}
	return observed, nil
}

func (n *Node) instance(id sandbox.ID) *instance {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.instances[id]
}

func (n *Node) dir(id sandbox.ID) string { return filepath.Join(n.cfg.Dir, string(id)) }

// groupPath returns the path of the control group of a sandbox; for "", of the group that holds
// all.
func (n *Node) groupPath(id sandbox.ID) string {
	return filepath.Join(GroupRoot(n.cfg.Instance), string(id))
}

// ServerGroup returns the path of the control group of the server itself.
func ServerGroup(instance string) string { return GroupRoot(instance) + serverSuffix }

const serverSuffix = "-server"

// GroupRoot returns the path of the control group that holds all sandboxes of an instance.
func GroupRoot(instance string) string { return "/cay-" + instance }

// Destroy removes everything of the sandbox from the machine. It works from what it finds, so it
// also finishes what a crash interrupted and undoes a create that failed at any step. It goes on
// after errors and joins them.
func (n *Node) Destroy(ctx context.Context, id sandbox.ID) error {
	if err := n.Rest(ctx, id); err != nil {
		return err // the checkpoint may be the only usable part of it
	}
	if err := n.checkpoints.Remove(string(id)); err != nil {
		return err
	}
	return n.collect()
}

// Rest removes everything of the sandbox except its checkpoint, in the same way as Destroy.
func (n *Node) Rest(ctx context.Context, id sandbox.ID) error {
	// An empty ID would name the directory and the control group of all sandboxes.
	if id == "" || filepath.Base(string(id)) != string(id) || strings.HasPrefix(string(id), ".") {
		return fmt.Errorf("%q is no ID of a sandbox", id)
	}
	b := n.instance(id)
	if b != nil {
		b.end() // from here on its death is intended
	}
	n.agents.Drop(string(id))
	group := n.groups.Group(n.groupPath(id))
	var errs []error
	if err := group.Kill(ctx); err != nil {
		// The remaining processes use everything else, so nothing else may be removed.
		return err
	}
	errs = append(errs, group.Remove(), n.state.Remove(string(id)))
	if b != nil {
		n.giveUID(b)
	}
	if b != nil && b.slot != nil {
		n.mu.Lock()
		delete(n.guests, b.slot)
		n.mu.Unlock()
		n.policyChanged(b.slot)
		errs = append(errs, n.net.Release(ctx, b.slot))
	}
	if err := errors.Join(errs...); err != nil {
		return err // the directory, with its record of the slot, is removed last
	}
	if err := os.RemoveAll(n.dir(id)); err != nil {
		return fmt.Errorf("removing the directory of %s: %w", id, err)
	}
	n.mu.Lock()
	delete(n.instances, id)
	n.mu.Unlock()
	return nil
}
