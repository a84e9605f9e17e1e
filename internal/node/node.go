// Package node puts sandboxes together on this machine and takes them apart: a
// network slot, a root file system, a control group, gVisor, and the agent inside.
//
// It owns the order of the steps and the directory of each sandbox (0700, with the
// bundle, the writable layer and a record of its life), and adopts what a former
// process of the same server left running. It decides nothing about sandboxes:
// states, lifetimes and rows are the sandbox room's.
//
// A [Node] is safe for concurrent use for different sandboxes; calls for one sandbox
// are made one at a time by the sandbox room. After an error of [Node.Create] nothing
// of the sandbox is left, except what the error says could not be removed; a Destroy
// later removes that too. Sandboxes outlive the process.
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
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/cgroup"
	"github.com/cayhq/cay/internal/checkpoint"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/runsc"
	"github.com/cayhq/cay/internal/sandbox"
)

// AgentPort is where the agent listens inside: the port E2B's clients know.
const AgentPort = 49983

// Images finds root file systems. Implemented by the image room.
type Images interface {
	// Path returns the verified EROFS file with that content hash.
	Path(ctx context.Context, digest string) (string, error)
}

// Config says where a Node keeps things and how much it takes on.
type Config struct {
	Instance string            // names this server's things on the host
	Dir      string            // one directory a sandbox; on disk, holds the writable layers
	RunDir   string            // runsc's state; on a tmpfs, and short: see [runsc.Runtime]
	Platform string            // gVisor platform
	Programs embedded.Programs // what new sandboxes start with
	// ProgramsDir holds Programs, and those that older sandboxes and checkpoints need.
	ProgramsDir string
	Checkpoints string // one directory a sandbox that has any; on disk

	Nameservers []string // what sandboxes resolve names with

	// PolicyChanged, if not nil, is told the address of a sandbox that has another policy
	// now, or has gone: what was decided for it before does not hold. It must not wait
	// for this Node.
	PolicyChanged func(addr netip.Addr)

	MaxSandboxes int // beyond it Room says no
	// MinHostMemory and MinDisk are what must stay free for the machine itself, in
	// bytes; below that Room says no.
	MinHostMemory, MinDisk int64
	// FirstUID begins the range of [UIDs] user and group ids that sandboxes have on the host.
	FirstUID uint32
	// MaxPIDs is how many tasks a sandbox may have inside at the most; see tasksFor
	// for what a small one may have.
	MaxPIDs int
	// AnswerTimeout is how long an agent may be silent; 0 is agentapi's default.
	AnswerTimeout time.Duration
}

// Node is this machine.
type Node struct {
	cfg     Config
	log     *slog.Logger
	net     *network.Network
	images  Images
	groups  *cgroup.Hierarchy
	moves   io.Closer      // keeps moves into control groups quick; nil where the kernel cannot
	state   *runsc.Runtime // for what runsc keeps below RunDir
	standby *runsc.Standby // of the programs that new sandboxes are made with
	agents  *agentapi.Client
	lost    chan sandbox.Fact
	denials chan sandbox.Denial
	ctx     context.Context // of the watches; ends with Close
	stop    context.CancelFunc
	watches sync.WaitGroup

	checkpoints *checkpoint.Store
	contention  contention
	turns       *turns
	verifying   sync.Mutex // held while pages are verified: one at a time, since it is the disk's time

	// after, when set, is called after each step of an operation; its error fails the
	// step. Tests break operations everywhere with it.
	after func(step string) error

	mu            sync.Mutex
	boxes         map[sandbox.ID]*box      // everything that has a directory; guarded by mu
	verifications map[string]*verification // that have not begun, by the checkpoint's directory; guarded by mu
	guests        map[*network.Slot]*box   // those whose slot has its policy; guarded by mu
	uids          map[uint32]*box          // by the user id on the host that they have; guarded by mu
}

// Open makes a Node and adopts the sandboxes that still run. What is left of dead
// ones shows in [Node.List] until it is destroyed.
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
		state: &runsc.Runtime{Root: cfg.RunDir},
		turns: newTurns(max(2, startsPerCPU*runtime.NumCPU())),
		lost:  make(chan sandbox.Fact), denials: make(chan sandbox.Denial, denialsHeld),
		boxes: map[sandbox.ID]*box{}, verifications: map[string]*verification{}, guests: map[*network.Slot]*box{}, uids: map[uint32]*box{}}
	n.agents = agentapi.NewClient(func(ctx context.Context, id string) (net.Conn, error) {
		return n.reach(ctx, sandbox.ID(id))
	})
	n.agents.Bearer, n.agents.OnCall = n.bearer, n.hurry
	n.agents.Patience = cmp.Or(cfg.AnswerTimeout, agentapi.DefaultPatience)
	var interrupted []string
	if n.checkpoints, interrupted, err = checkpoint.Open(cfg.Checkpoints, cfg.MinDisk); err != nil {
		return nil, err
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
		if b := n.box(sandbox.ID(name)); b != nil && !b.dead() {
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

// Agents is the client that talks to the agents of this node's sandboxes.
func (n *Node) Agents() *agentapi.Client { return n.agents }

// Lost yields sandboxes whose processes ended without being asked to.
func (n *Node) Lost() <-chan sandbox.Fact { return n.lost }

// Close stops watching. Sandboxes go on running.
func (n *Node) Close() {
	n.stop()
	n.agents.CloseIdle()
	n.watches.Wait()
	n.standby.Close()
	if n.moves != nil {
		_ = n.moves.Close() // as the end of this process would
	}
}

const codeNoCapacity = "no_capacity"

// retryRoom is when a caller who found no room should come back: sandboxes end all
// the time, so soon, but not at once.
const retryRoom = 5 * time.Second

// Room says whether one more sandbox of the size can be made now.
func (n *Node) Room(_ context.Context, size sandbox.Size) error {
	n.mu.Lock()
	count := len(n.boxes)
	n.mu.Unlock()
	if count >= n.cfg.MaxSandboxes {
		return fault.New(fault.Unavailable, codeNoCapacity, "this machine has its %d sandboxes", n.cfg.MaxSandboxes).After(retryRoom)
	}
	free, err := availableMemory()
	if err != nil {
		return err
	}
	// A new sandbox takes about 20 MB and grows to its size only if it is used that
	// way; what is checked is that it can start without hurting the machine.
	if free < n.cfg.MinHostMemory+bootMemory {
		return fault.New(fault.Unavailable, codeNoCapacity, "this machine has no memory for a sandbox of size %s", size.Name).After(retryRoom)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(n.cfg.Dir, &st); err != nil {
		return fmt.Errorf("looking at the free space below %s: %w", n.cfg.Dir, err)
	}
	if int64(st.Bavail)*st.Bsize < n.cfg.MinDisk {
		return fault.New(fault.Unavailable, codeNoCapacity, "this machine's disk is full").After(retryRoom)
	}
	return nil
}

// Dial connects to the agent of a running sandbox.
func (n *Node) Dial(ctx context.Context, id sandbox.ID) (net.Conn, error) {
	b := n.box(id)
	if b == nil || b.slot == nil || b.dead() {
		return nil, fault.New(fault.Conflict, "sandbox_not_running", "sandbox %s has no agent on this machine", id)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(b.ctx, cancel)() // a dead sandbox does not refuse, it is silent
	return n.net.Dial(ctx, b.slot, AgentPort)
}

// List says what the machine has of each sandbox of this instance: those with a
// directory or a checkpoint, and those that only a control group or a state file of
// runsc is left of.
func (n *Node) List(ctx context.Context) ([]sandbox.Fact, error) {
	names, err := n.groups.Group(n.groupPath("")).Children()
	if err != nil {
		return nil, err
	}
	states, err := n.state.IDs()
	if err != nil {
		return nil, err
	}
	points, err := n.checkpoints.Names()
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
	for id := range n.boxes {
		names = append(names, string(id))
	}
	n.mu.Unlock()
	names = slices.Concat(names, states, points)
	slices.Sort(names)
	var facts []sandbox.Fact
	for _, name := range slices.Compact(names) {
		if !sandbox.ID(name).Valid() { // a name of somebody else's is not ours to remove
			continue
		}
		fact, err := n.Inspect(ctx, sandbox.ID(name))
		if err != nil {
			return nil, err
		}
		if fact != nil { // it may have gone meanwhile
			facts = append(facts, *fact)
		}
	}
	return facts, nil
}

// Inspect says what the machine has of one sandbox, nil if nothing.
func (n *Node) Inspect(_ context.Context, id sandbox.ID) (*sandbox.Fact, error) {
	fact := &sandbox.Fact{ID: id}
	b := n.box(id)
	if b != nil {
		fact.Run, fact.Alive, fact.Warm, fact.Egress = b.life.Run, !b.dead(), b.warm(), b.policy()
	}
	_, err := os.Stat(n.dir(id))
	fact.Remains = b != nil || err == nil || n.state.Knows(string(id)) || n.groups.Group(n.groupPath(id)).Exists()
	if fact.Point, err = n.point(id); err != nil {
		return nil, err
	}
	if !fact.Remains && fact.Point == nil && !n.checkpoints.Has(string(id)) {
		return nil, nil
	}
	return fact, nil
}

func (n *Node) box(id sandbox.ID) *box {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.boxes[id]
}

func (n *Node) dir(id sandbox.ID) string { return filepath.Join(n.cfg.Dir, string(id)) }

// groupPath is the control group of a sandbox, and of "" the one that holds all.
func (n *Node) groupPath(id sandbox.ID) string {
	return filepath.Join(GroupRoot(n.cfg.Instance), string(id))
}

// ServerGroup is the control group of the server itself.
func ServerGroup(instance string) string { return GroupRoot(instance) + serverSuffix }

const serverSuffix = "-server"

// GroupRoot is the control group that holds all sandboxes of an instance.
func GroupRoot(instance string) string { return "/cay-" + instance }

// Destroy removes everything of the sandbox from the machine. It works from what is
// there, so it also finishes what a crash interrupted and undoes a create that
// failed at any step. It goes on after errors and joins them.
func (n *Node) Destroy(ctx context.Context, id sandbox.ID) error {
	if err := n.Rest(ctx, id); err != nil {
		return err // the checkpoint may be all that can be used of it
	}
	if err := n.checkpoints.Remove(string(id)); err != nil {
		return err
	}
	return n.collect()
}

// Rest removes everything of the sandbox but its checkpoint, as Destroy does.
func (n *Node) Rest(ctx context.Context, id sandbox.ID) error {
	b := n.box(id)
	if b != nil {
		b.end() // from here on its death is wanted
	}
	n.agents.Drop(string(id))
	group := n.groups.Group(n.groupPath(id))
	var errs []error
	if err := group.Kill(ctx); err != nil {
		// With processes left nothing else may go: they use it.
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
		return err // the directory, with its record of the slot, goes last
	}
	if err := os.RemoveAll(n.dir(id)); err != nil {
		return fmt.Errorf("removing the directory of %s: %w", id, err)
	}
	n.mu.Lock()
	delete(n.boxes, id)
	n.mu.Unlock()
	return nil
}
