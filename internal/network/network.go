// Package network gives every sandbox a network namespace of its own, joined to the host by a
// veth pair, an address out of the instance's range, and the rules that keep it away from the
// host, from its neighbours and from what the operator forbids. It speaks netlink only and starts
// no program. It knows slots, not sandboxes: the caller knows which sandbox has a slot.
//
// # What a slot may do
//
// A slot is a /31 of the range: the even address is the gateway, on the host's end of the veth
// pair; the odd one is the sandbox's. Whatever else is installed on the host, a sandbox
//   - can send only with its own address and from its own link;
//   - reaches no address of the host, even one that the host gets later. The host accepts only
//     packets from the agent's port on connections that the host opened;
//   - reaches no other slot, nothing in 169.254.0.0/16, no multicast or broadcast address and
//     nothing in [Config.AlwaysDeny], or in the list by which [Network.Deny] has replaced it;
//   - has no IPv6, and no ARP towards the host (both ends know each other by permanent entries);
//   - can be reached from the host on the agent's port alone, and from other machines not at all.
//     Only answers to what it sent come in.
//
// Everything else goes out with the host's address (masquerade). One way to the host cannot be
// seen from here: a public address that a cloud's router translates to this host. An operator
// with such an address lists it in AlwaysDeny.
//
// The rules are one nftables table, "inet cay-<instance>", whose chains only drop: no verdict
// depends on the policy of another firewall's chain, and none of those is changed. The reverse
// does not hold: another firewall that drops unknown packets in FORWARD drops sandboxes' traffic
// too, which [Probe] reports.
//
// # Concurrency and errors
//
// A [Network] is safe for concurrent use. Handing out a ready slot never waits for one that is
// being made. No thread of the process stays in another namespace: work inside one is done on
// threads that end with it. An error of [Network.Acquire] leaves nothing of the slot;
// [Network.Release] goes on after errors, joins them, and keeps what it could not remove out of
// circulation until [Network.Sweep] or another Release succeeds.
//
// # What is left on the host
//
// Slots in use and their rules outlive the process, and the next process takes them over
// ([Network.Adopt]). Names carry the instance, so that several instances on one machine do not
// conflict: namespaces "cay-<instance>-<slot>" in /run/netns, links "cay<instance>-<slot>", locks
// in /run/cay/network. net.ipv4.ip_forward stays on.
package network

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// capacityRetry is the time after which a caller should try again when the range is used up:
	// about as long as it takes to remove a slot, rounded up to a whole second. A shorter time
	// makes callers try in vain.
	capacityRetry = time.Second

	// closeTimeout bounds the time that Close waits for the lock of the claims, which other
	// processes hold for milliseconds. After it the files stay, unlocked.
	closeTimeout = 5 * time.Second
)

var errClosed = errors.New("the network is closed")

// Config configures a Network. It must not change after Open.
type Config struct {
	// Instance distinguishes this server's names on the host: 6 characters of a-z and 0-9.
	Instance string
	// Range holds the addresses, two per slot: IPv4, /15 to /30. The zero value takes the first
	// free block of Candidates.
	Range netip.Prefix
	// AlwaysDeny are destinations that no sandbox may reach, at most MaxDeny, until [Network.Deny]
	// replaces them. IPv6 prefixes are accepted and have no effect, since there is no IPv6.
	AlwaysDeny []netip.Prefix
	// Ready is the number of slots that the pool keeps ready; 0 makes each on demand.
	Ready int
	// MTU is the links' MTU in bytes; 0 takes that of the default route's link.
	MTU int
	// AgentPort is the only TCP port inside that the host may connect to. It must not change
	// while slots are in use, also across a restart.
	AgentPort uint16
	// Services are the host's ports that answer sandboxes.
	Services Services
	// Flows bounds the connections of slots.
	Flows Flows
	// MaxRanges bounds the ranges of all policies together; 0 is DefaultMaxRanges.
	MaxRanges int
}

// DefaultMaxRanges allows 20 policies of the greatest length, which take about 70 MiB of the
// kernel's memory.
const DefaultMaxRanges = 200_000

// Slot is a namespace with its link and address. Its fields do not change.
type Slot struct {
	Index     int
	Namespace string     // path of the namespace, in /run/netns
	Addr      netip.Addr // the sandbox's address
	Gateway   netip.Addr // the host's address
	Link      string     // the host's end of the veth pair
}

// Network manages the slots of one instance. Safe for concurrent use.
type Network struct {
	layout layout
	agent  uint16
	ready  int // the pool's target
	mtu    int
	log    *slog.Logger
	claim  *claim

	stop context.CancelFunc // stops the background goroutines
	done sync.WaitGroup     // waits for them
	fill chan struct{}      // wakes the pool, capacity 1

	rules *table
	// Locks are taken in this order: denying, slotRules.mu, long, installing, rulesMu. None of them
	// is taken with mu held.

	denying forbidding // held for a whole Deny

	// installing is held for writing while the table is installed or compared as a whole, and for
	// reading while one transaction of a slot is sent or a decision rests on the table as it is.
	installing sync.RWMutex
	installed  atomic.Uint64 // counts installations
	long       sync.Mutex    // held for each transaction of changes that need many
	checking   sync.Mutex    // held for a whole Check
	expiring   chan struct{} // sent to when addresses were opened, capacity 1
	maxRanges  int           // in all policies together

	// rulesMu guards the knowledge of the table. It is never held while waiting for the kernel,
	// and no other lock is taken with it.
	rulesMu sync.Mutex
	// +checklocks:rulesMu
	ruled map[int]*slotRules // the slots in the table, by index
	// +checklocks:rulesMu
	making int // ranges that are being put in force
	// +checklocks:rulesMu
	shape shape // the table without slots, as the kernel listed it after installing
	// +checklocks:rulesMu
	foreign uint32 // the number of others' changes of the host's rules when this table was last as it should be
	// +checklocks:rulesMu
	counted counts // the counters as last read
	// +checklocks:rulesMu
	repairs int

	denials *denials

	mu sync.Mutex
	// +checklocks:mu
	closed bool
	next   int   // indices from here on were never used
	freed  []int // indices used before, longest free first
	// +checklocks:mu
	idle []*Slot // made and not handed out, oldest first
	// +checklocks:mu
	used map[int]*Slot // handed out or adopted
	left map[int]*Slot // left by a predecessor, or not wholly removed
}

// Open claims the range, installs the rules and starts the pool. Slots that a predecessor of the
// same instance left keep their rules until Adopt or Sweep decide about them; those outside of
// the range are removed. After an error only the rules and ip_forward are changed.
func Open(ctx context.Context, c Config, log *slog.Logger) (*Network, error) {
	if err := checkDeny(c.AlwaysDeny); err != nil {
		return nil, err
	}
	if c.AgentPort == 0 {
		return nil, fault.InField(fault.CodeInvalidPort, "agent_port", "the agent's port is not set")
	}
	c.MaxRanges = cmp.Or(c.MaxRanges, DefaultMaxRanges)
	claim, block, err := take(ctx, c.Instance, c.Range)
	if err != nil {
		return nil, fmt.Errorf("claiming addresses: %w", err)
	}
	n := &Network{
		layout: layout{instance: c.Instance, block: block},
		agent:  c.AgentPort, ready: c.Ready, mtu: c.MTU, log: log, claim: claim,
		fill:     make(chan struct{}, 1),
		expiring: make(chan struct{}, 1), maxRanges: c.MaxRanges,
		ruled: map[int]*slotRules{}, used: map[int]*Slot{}, left: map[int]*Slot{},
	}
	n.rules = newTable(n.layout, c)
	n.denials = newDenials(n.SlotOf)
	if n.rules.log, err = n.denials.listen(); err != nil {
		log.Warn("the kernel does not report refused packets; policies are enforced, and denials are not recorded",
			"error", err)
	}
	if err := n.prepare(); err != nil {
		return nil, errors.Join(err, n.denials.close(), n.rules.sockets.close(), n.giveUpClaim(false))
	}
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	n.stop = stop
	n.done.Go(func() { n.refill(background) })
	n.done.Go(func() { n.watch(background) })
	n.done.Go(func() { n.expire(background) })
	n.done.Go(func() { n.denials.run(background) })
	log.Info("network is ready", "instance", c.Instance, "range", block.String(), "slots", n.layout.capacity(),
		"mtu", n.mtu, "left_by_predecessor", len(n.left))
	return n, nil
}

// prepare makes the host ready. It lists what is there, then installs the rules, and only then
// turns forwarding on.
func (n *Network) prepare() error {
	if n.mtu == 0 {
		var err error
		if n.mtu, err = defaultMTU(); err != nil {
			return err
		}
	}
	if err := shareDir(netnsDir); err != nil {
		return fmt.Errorf("making the directory of namespaces: %w", err)
	}
	all, err := remains()
	if err != nil {
		return err
	}
	for index := range all[n.layout.instance] {
		s, err := n.leftover(index)
		if err != nil {
			return err
		}
		if s != nil {
			n.left[index] = s
			r := &slotRules{slot: s}
			r.now.Store(&entry{slot: s})
			n.rulesMu.Lock()
			n.ruled[index] = r
			n.rulesMu.Unlock()
		}
		// After a restart new slots come after the old ones: the longer an address is unused, the
		// better.
		n.next = max(n.next, index+1)
	}
	n.next = min(n.next, n.layout.capacity())
	for i := range n.next {
		if n.left[i] == nil {
			n.freed = append(n.freed, i)
		}
	}
	n.installing.Lock()
	defer n.installing.Unlock()
	if err := n.install(); err != nil {
		return err
	}
	return enableForwarding()
}

// leftover returns the slot of an index that a predecessor left something of. It removes a slot
// of another range, and returns nil for it.
func (n *Network) leftover(index int) (*Slot, error) {
	if index < n.layout.capacity() {
		s := n.layout.slot(index)
		if has, err := s.elsewhere(); err != nil || !has {
			return s, err
		}
	}
	n.log.Warn("removing a slot of another address range", "link", n.layout.link(index))
	return nil, demolish(n.layout.instance, index)
}

// Range returns the block in use, chosen or configured.
func (n *Network) Range() netip.Prefix { return n.layout.block }

// Acquire hands out a ready slot, or makes one. If the range is used up it gives Unavailable,
// code "no_capacity".
func (n *Network) Acquire(ctx context.Context) (*Slot, error) {
	s, made, err := n.take()
	if err != nil {
		return nil, err
	}
	n.wakePool()
	if made {
		return s, nil
	}
	if err := ctx.Err(); err != nil {
		n.putBack(s.Index)
		return nil, fmt.Errorf("making a slot: %w", err)
	}
	if err := n.build(s); err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.used[s.Index] = s
	return s, nil
}

// take hands out a ready slot (made is true), or else reserves an index for a new one.
func (n *Network) take() (s *Slot, made bool, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return nil, false, errClosed
	}
	if len(n.idle) > 0 {
		s, n.idle = n.idle[0], n.idle[1:]
		n.used[s.Index] = s
		return s, true, nil
	}
	index, ok := n.reserveLocked()
	if !ok {
		return nil, false, fault.New(fault.Unavailable, fault.CodeNoCapacity,
			"all %d addresses of this machine's range are in use", n.layout.capacity()).After(capacityRetry)
	}
	return n.layout.slot(index), false, nil
}

// reserveLocked takes an index out of circulation: one that was never used, or else the one that
// was free the longest.
func (n *Network) reserveLocked() (int, bool) {
	switch {
	case n.next < n.layout.capacity():
		n.next++
		return n.next - 1, true
	case len(n.freed) > 0:
		index := n.freed[0]
		n.freed = n.freed[1:]
		return index, true
	}
	return 0, false
}

func (n *Network) putBack(index int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.left, index)
	n.freed = append(n.freed, index)
}

// build makes a reserved slot, its rules first. After an error nothing of it is left, or it is in
// n.left.
func (n *Network) build(s *Slot) error {
	err := n.admit(s)
	if err == nil {
		err = s.build(n.mtu)
	}
	if err == nil {
		return nil
	}
	return errors.Join(fmt.Errorf("making slot %s: %w", s.Link, err), n.dismantle(context.Background(), s))
}

// dismantle removes a slot that is in none of the lists any more, and frees its index. A slot
// that it could not remove goes to n.left.
func (n *Network) dismantle(ctx context.Context, s *Slot) error {
	// Most of the time is spent waiting in the kernel, so links and rules are removed at the same
	// time. Connections are forgotten once the rules let no new ones begin.
	var parts error
	var group sync.WaitGroup
	group.Go(func() { parts = removeParts(s.Link, s.Namespace) })
	err := errors.Join(n.expel(s), forgetConnections(ctx, &n.rules.sockets, s.Addr))
	group.Wait()
	if err := errors.Join(err, parts); err != nil {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.left[s.Index] = s
		return fmt.Errorf("removing slot %s: %w", s.Link, err)
	}
	n.putBack(s.Index)
	return nil
}

// Release removes a slot. Releasing a slot again is no error.
func (n *Network) Release(ctx context.Context, s *Slot) error {
	n.mu.Lock()
	// The index may belong to a newer slot by now, so compare the slot itself.
	switch {
	case n.used[s.Index] == s:
		delete(n.used, s.Index)
	case n.left[s.Index] == s:
		delete(n.left, s.Index)
	default:
		n.mu.Unlock()
		return nil
	}
	n.mu.Unlock()
	defer n.wakePool()
	return n.dismantle(ctx, s)
}

// Adopt takes over the slot of a sandbox that outlived the server. A slot that is missing or
// incomplete gives NotFound, code "slot_not_found"; Sweep removes the rest of it.
func (n *Network) Adopt(index int) (*Slot, error) {
	n.mu.Lock()
	s := n.left[index]
	delete(n.left, index)
	n.mu.Unlock()
	missing := fault.New(fault.NotFound, fault.CodeSlotNotFound, "there is no slot %d to take over", index)
	if s == nil {
		return nil, missing
	}
	err := s.whole()
	n.mu.Lock()
	defer n.mu.Unlock()
	if err != nil {
		n.left[index] = s
		return nil, missing.Because(err)
	}
	n.used[index] = s
	return s, nil
}

// Slots returns the slots handed out or adopted, by index.
func (n *Network) Slots() []*Slot {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []*Slot
	for _, s := range n.used {
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b *Slot) int { return a.Index - b.Index })
	return out
}

// Sweep removes slots that a predecessor left and that were not adopted, except the indices in
// keep, and slots that a failed Release left. It never touches slots that this Network handed
// out. After an error it goes on, and returns all errors joined.
func (n *Network) Sweep(keep map[int]bool) error {
	n.mu.Lock()
	var out []*Slot
	for index, s := range n.left {
		if !keep[index] {
			out = append(out, s)
			delete(n.left, index)
		}
	}
	n.mu.Unlock()
	defer n.wakePool()
	var errs []error
	for _, s := range out {
		errs = append(errs, n.dismantle(context.Background(), s))
	}
	return errors.Join(errs...)
}

// Dial connects from the host to a TCP port in the slot. The rules let only
// [Config.AgentPort] through.
func (n *Network) Dial(ctx context.Context, s *Slot, port uint16) (net.Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp4", net.JoinHostPort(s.Addr.String(), strconv.Itoa(int(port))))
	if err != nil {
		return nil, fmt.Errorf("dialing slot %d: %w", s.Index, err)
	}
	return c, nil
}

// Close stops the pool and removes idle slots. Slots in use stay, and so do the rules; with none
// in use nothing is left but net.ipv4.ip_forward. A second Close does nothing.
func (n *Network) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	n.mu.Unlock()
	n.stop()
	n.done.Wait()

	n.mu.Lock()
	idle := n.idle
	n.idle = nil
	n.mu.Unlock()
	var errs []error
	for _, s := range idle {
		errs = append(errs, n.dismantle(context.Background(), s))
	}
	n.mu.Lock()
	busy := len(n.used)+len(n.left) > 0
	n.mu.Unlock()
	n.denying.mu.Lock() // a Deny that has begun would install the table anew
	defer n.denying.mu.Unlock()
	if !busy {
		n.installing.Lock()
		errs = append(errs, n.rules.remove())
		n.installing.Unlock()
	}
	return errors.Join(append(errs, n.rules.sockets.close(), n.giveUpClaim(busy))...)
}

// giveUpClaim lets the next process claim what this one had. The files stay if slots do; they
// mean nothing without their locks.
func (n *Network) giveUpClaim(keepFiles bool) error {
	if keepFiles {
		return n.claim.close()
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	unlock, err := lockClaims(ctx)
	if err != nil {
		return errors.Join(err, n.claim.close())
	}
	defer unlock()
	return n.claim.release()
}
