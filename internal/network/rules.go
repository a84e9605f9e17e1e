package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// neverRanges are destinations that no sandbox may reach, whatever is configured: this host and
// network, loopback, link-local with the metadata service of every cloud, multicast, and the
// reserved block with the limited broadcast address.
var neverRanges = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("240.0.0.0/4"),
}

// Priorities of the base chains, relative to those of the kernel and other firewalls. pieces
// comes before fragments are reassembled (-400), raw before connection tracking (-200), guard
// after it and before destinations are rewritten (-100), redirect before others that rewrite
// them, the rest at the usual places of filters and source NAT. An accept here never overrides a
// drop elsewhere, nor the reverse.
const (
	piecesPriority   = -450
	rawPriority      = -300
	guardPriority    = -150
	redirectPriority = -110
	filterPriority   = 0
	natPriority      = 100
)

const (
	// elementsPerMessage is the number of set elements (about 70 bytes each) in a message. It
	// keeps the message under the 64 KiB that an attribute can hold.
	elementsPerMessage = 400
)

// table builds the rules of one instance for the kernel. It builds the same structure for every
// installation, so that the rules in the kernel can be compared with it.
//
// The sets: "never-" and a number has the forbidden destinations (forbidden.go); "slots" pairs each
// link with its only address; "allowed" and "denied" have the same pairs and count their packets;
// "policies" gives the verdict on a slot's traffic to the outside, and "named" the chain that
// redirects the traffic of slots whose policy has names to the services. A packet costs the same however many
// slots there are. Each policy has a chain and sets of its own (policy.go). A link that is in no
// set is dropped, so removing a slot closes it, and so does a slot without an element in
// "policies".
type table struct {
	layout   layout
	agent    uint16
	services Services
	log      uint16 // the group of the netfilter log; 0: nothing is logged

	sockets sockets
	table   *nftables.Table
	// never has the forbidden destinations in force. It is replaced with Network.denying held, and Network.installing
	// held for reading.
	never atomic.Pointer[forbidden]
	// asideNever has those that are being made or removed, so that any part of their set may be in the table.
	asideNever atomic.Pointer[forbidden]

	slots    *nftables.Set
	allowed  *nftables.Set
	denied   *nftables.Set
	policies *nftables.Set
	named    *nftables.Set
	rates    *nftables.Set
	flows    flows
}

func newTable(l layout, c Config) *table {
	t := &nftables.Table{Family: nftables.TableFamilyINet, Name: l.table()}
	set := func(name string) *nftables.Set {
		return &nftables.Set{Table: t, Name: name,
			KeyType: nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIPAddr), Concatenation: true}
	}
	out := &table{
		layout: l, agent: c.AgentPort, services: c.Services, table: t,
		slots: set("slots"), allowed: set("allowed"), denied: set("denied"),
		policies: set("policies"), named: set("named"), rates: set("rates"), flows: newFlows(t, l, c.Flows),
	}
	out.never.Store(out.forbid(1, c.AlwaysDeny))
	out.allowed.Counter, out.denied.Counter = true, true
	for _, m := range []*nftables.Set{out.policies, out.named} {
		m.IsMap, m.DataType = true, nftables.TypeVerdict
	}
	out.rates.Dynamic, out.rates.HasTimeout, out.rates.Timeout, out.rates.Size = true, true, ratesTimeout,
		uint32(l.capacity())
	return out
}

// Names of the chains. The regular ones are reached only by packets of slots' links.
const (
	chainRaw      = "raw"      // from a sandbox, before anything else
	chainGuard    = "guard"    // from a sandbox, before destinations are rewritten
	chainRedirect = "redirect" // from a sandbox, to the services
	chainInput    = "input"    // from a sandbox to the host
	chainForward  = "forward"  // from or to a sandbox, through the host
	chainOutput   = "output"   // from the host to a sandbox
	chainNAT      = "nat"      // from a sandbox, leaving the host
	chainOut      = "leaving"  // regular: from a sandbox to the outside
	chainIn       = "arriving"
	chainAllow    = "allow"     // regular: bounds flows, counts and accepts; the whole policy of an open slot
	chainRefuse   = "refuse"    // regular: counts, logs and drops
	chainForbid   = "forbidden" // regular: to a destination that no slot may reach
)

// change sends what f adds to the kernel as one transaction: all or nothing.
func (t *table) change(doing string, f func(*nftables.Conn) error) error {
	if err := t.sockets.transact(f); err != nil {
		return fmt.Errorf("%s nftables table %s: %w", doing, t.table.Name, err)
	}
	return nil
}

// install replaces the table in one transaction; connections continue. Counters continue from
// was.
func (t *table) install(entries []*entry, was counts) error {
	return t.change("installing", func(c *nftables.Conn) error {
		// Deleting needs a table; adding one that exists changes nothing.
		c.AddTable(t.table)
		c.DelTable(t.table)
		c.AddTable(t.table)
		if err := t.addSets(c); err != nil {
			return err
		}
		t.addTotals(c, was)
		t.addTimes(c)
		for _, name := range []string{chainFlows, chainExcess, chainErrors, chainAllow, chainRefuse, chainForbid, chainOut,
			chainIn} {
			c.AddChain(t.regular(name))
		}
		for _, r := range t.rules() {
			c.AddRule(r)
		}
		for len(entries) > 0 {
			n := min(len(entries), elementsPerMessage)
			if err := t.addSlots(c, entries[:n], was); err != nil {
				return err
			}
			for _, e := range entries[:n] {
				if err := t.addPolicy(c, e); err != nil {
					return err
				}
			}
			entries = entries[n:]
		}
		for _, b := range t.bases() {
			c.AddChain(b.chain)
			for _, e := range b.rules {
				c.AddRule(&nftables.Rule{Table: t.table, Chain: b.chain, Exprs: e})
			}
		}
		return nil
	})
}

func (t *table) addSets(c *nftables.Conn) error {
	for _, set := range append(t.flows.sets(), t.slots, t.allowed, t.denied, t.policies, t.named, t.rates) {
		if err := c.AddSet(set, nil); err != nil {
			return fmt.Errorf("encoding set %s: %w", set.Name, err)
		}
	}
	never := t.never.Load()
	return addSet(c, never.set, never.elements())
}

// addSet adds a set with any number of elements.
func addSet(c *nftables.Conn, set *nftables.Set, elements []nftables.SetElement) error {
	if err := c.AddSet(set, nil); err != nil {
		return fmt.Errorf("encoding set %s: %w", set.Name, err)
	}
	return addElements(c, set, elements)
}

func addElements(c *nftables.Conn, set *nftables.Set, elements []nftables.SetElement) error {
	for part := range slices.Chunk(elements, elementsPerMessage) {
		if err := c.SetAddElements(set, part); err != nil {
			return fmt.Errorf("encoding elements of set %s: %w", set.Name, err)
		}
	}
	return nil
}

func deleteElements(c *nftables.Conn, set *nftables.Set, elements []nftables.SetElement) error {
	for part := range slices.Chunk(elements, elementsPerMessage) {
		if err := c.SetDeleteElements(set, part); err != nil {
			return fmt.Errorf("encoding elements of set %s: %w", set.Name, err)
		}
	}
	return nil
}

// addSlots adds at most elementsPerMessage slots, closed: until they have a policy only the
// agent's answers pass.
func (t *table) addSlots(c *nftables.Conn, entries []*entry, was counts) error {
	var known, allowed, denied []nftables.SetElement
	for _, e := range entries {
		key, before := slotKey(e.slot), was.slots[string(slotKey(e.slot))]
		known = append(known, nftables.SetElement{Key: key})
		allowed = append(allowed, nftables.SetElement{Key: key,
			Comment: tally{before.AllowedPackets, before.AllowedBytes}.comment()})
		denied = append(denied, nftables.SetElement{Key: key,
			Comment: tally{before.DeniedPackets, before.DeniedBytes}.comment()})
	}
	return errors.Join(c.SetAddElements(t.slots, known), c.SetAddElements(t.allowed, allowed),
		c.SetAddElements(t.denied, denied))
}

// removeSlot stops a slot's traffic and removes all of the slot. If a part of it is missing, the
// transaction fails with an error for which isGone is true, and removes nothing.
func (t *table) removeSlot(c *nftables.Conn, e *entry) error {
	key := []nftables.SetElement{{Key: slotKey(e.slot)}}
	err := errors.Join(t.unfollow(c, e), c.SetDeleteElements(t.slots, key),
		c.SetDeleteElements(t.allowed, key), c.SetDeleteElements(t.denied, key))
	t.removeOwn(c, nil, e)
	return err
}

// present returns err, or nil if err says that something does not exist.
func present(err error) error {
	if isGone(err) {
		return nil
	}
	return err
}

// remove deletes the table, if it exists.
func (t *table) remove() error {
	return present(t.change("deleting", func(c *nftables.Conn) error { c.DelTable(t.table); return nil }))
}

func (t *table) regular(name string) *nftables.Chain {
	return &nftables.Chain{Table: t.table, Name: name}
}

// base is a chain that the kernel calls, with its rules.
type base struct {
	chain *nftables.Chain
	rules [][]expr.Any
}

// rules returns the rules of the regular chains.
func (t *table) rules() []*nftables.Rule {
	var out []*nftables.Rule
	add := func(chain string, e ...[]expr.Any) {
		out = append(out, &nftables.Rule{Table: t.table, Chain: t.regular(chain), Exprs: join(e...)})
	}
	for _, r := range t.flowRules() {
		add(chainFlows, r)
	}
	for _, r := range t.excessRules() {
		add(chainExcess, r)
	}
	for _, r := range t.errorRules() {
		add(chainErrors, r)
	}
	add(chainAllow, isNew(), jumpTo(chainFlows))
	// Looking a slot up counts the packet; the look-up always succeeds.
	add(chainAllow, isIPv4(), linkAnd(incoming, source), inSet(t.allowed), count(totalAllowed), accept())
	add(chainRefuse, isIPv4(), linkAnd(incoming, source), inSet(t.denied), count(totalDenied))
	if t.log != 0 {
		add(chainRefuse, isIPv4(), linkAnd(incoming, source), withinRate(t.rates), logTo(t.log))
	}
	add(chainRefuse, drop())

	if t.services.Metadata != 0 {
		add(chainForbid, isIPv4(), load(destination), equals(metadataAddr.AsSlice()), tcpPort(destination, metadataPort),
			accept())
	}
	add(chainForbid, gotoChain(chainRefuse))

	// This is checked again, although raw and guard did, since the destination may have been
	// rewritten.
	add(chainOut, notIPv4(), drop())
	add(chainOut, linkIs(outgoing, t.layout.links()), drop())
	add(chainOut, t.neverRule(chainOut, t.never.Load()))
	add(chainOut, addressTypeIsNot(unix.RTN_UNICAST), drop())
	add(chainOut, state(expr.CtStateBitINVALID|expr.CtStateBitUNTRACKED), drop())
	add(chainOut, isIPv4(), linkAnd(incoming, source), verdictOf(t.policies))
	add(chainOut, gotoChain(chainRefuse))

	// An answer, or an error about what was sent, travels in the direction of replies. Expected
	// connections that a tracking helper would let in do not.
	add(chainIn, isIPv4(), state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), isReply(), accept())
	add(chainIn, drop())
	return out
}

// bases returns the chains that the kernel calls. They let packets pass that are neither from nor
// to a slot's link, except packets to the ports of the services.
func (t *table) bases() []base {
	fromUs, toUs := linkIs(incoming, t.layout.links()), linkIs(outgoing, t.layout.links())
	chain := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority int32) *nftables.Chain {
		policy := nftables.ChainPolicyAccept
		return &nftables.Chain{Table: t.table, Name: name, Type: kind, Hooknum: hook,
			Priority: nftables.ChainPriorityRef(nftables.ChainPriority(priority)), Policy: &policy}
	}
	filter := nftables.ChainTypeFilter
	return []base{
		{chain(chainPieces, filter, nftables.ChainHookPrerouting, piecesPriority), t.fragmentRules(fromUs)},
		{chain(chainRaw, filter, nftables.ChainHookPrerouting, rawPriority), [][]expr.Any{
			join(fromUs, notIPv4(), drop()),
			join(fromUs, isIPv4(), linkAnd(incoming, source), notInSet(t.slots), drop()),
			join(fromUs, isIPv4(), isICMP(), jumpTo(chainErrors)),
			// Destinations of the host are decided by guard, since answers to the host go there.
			join(fromUs, addressTypeIs(unix.RTN_LOCAL), accept()),
			join(fromUs, addressTypeIsNot(unix.RTN_UNICAST), gotoChain(chainRefuse)),
			t.neverRule(chainRaw, t.never.Load()),
		}},
		// This comes before another firewall's port forwarding can rewrite the host's address.
		{chain(chainGuard, filter, nftables.ChainHookPrerouting, guardPriority), [][]expr.Any{
			join(fromUs, addressTypeIs(unix.RTN_LOCAL), state(expr.CtStateBitESTABLISHED), isReply(), accept()),
			join(fromUs, addressTypeIs(unix.RTN_LOCAL), gotoChain(chainForbid)),
		}},
		{chain(chainRedirect, nftables.ChainTypeNAT, nftables.ChainHookPrerouting, redirectPriority), t.redirects(fromUs)},
		{chain(chainInput, filter, nftables.ChainHookInput, filterPriority), append(t.serviceInput(fromUs),
			join(fromUs, isIPv4(), tcpPort(source, t.agent), state(expr.CtStateBitESTABLISHED), isReply(), accept()),
			join(fromUs, drop()),
		)},
		{chain(chainForward, filter, nftables.ChainHookForward, filterPriority), [][]expr.Any{
			join(fromUs, gotoChain(chainOut)),
			join(toUs, gotoChain(chainIn)),
		}},
		{chain(chainOutput, filter, nftables.ChainHookOutput, filterPriority), append([][]expr.Any{
			join(toUs, isIPv4(), linkAnd(outgoing, destination), notInSet(t.slots), drop()),
			join(toUs, isIPv4(), tcpPort(destination, t.agent), accept()),
			// These are errors that the host itself sends about the sandbox's traffic: too big,
			// unreachable, time exceeded. They carry what was sent, nothing else.
			join(toUs, isIPv4(), isICMP(), state(expr.CtStateBitRELATED), accept())},
			append(t.serviceOutput(toUs), join(toUs, drop()))...,
		)},
		{chain(chainNAT, nftables.ChainTypeNAT, nftables.ChainHookPostrouting, natPriority), [][]expr.Any{
			join(isIPv4(), sourceIn(t.layout.block), linkIsNot(outgoing, t.layout.links()), masquerade()),
		}},
	}
}

// slotKey returns the element of a set keyed by link and address.
func slotKey(s *Slot) []byte {
	a := s.Addr.As4()
	return append(linkName(s.Link), a[:]...)
}

// linkName returns a name as the kernel compares it: 16 bytes, zero-filled.
func linkName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// intervalElements encodes intervals: the start of each, and the address after its end. There is
// none after the end of the address space.
func intervalElements(in []interval) []nftables.SetElement {
	out := make([]nftables.SetElement, 0, 2*len(in))
	for _, i := range in {
		out = append(out, nftables.SetElement{Key: binaryutil.BigEndian.PutUint32(i.first)})
		if end := i.last + 1; end != 0 {
			out = append(out, nftables.SetElement{Key: binary.BigEndian.AppendUint32(nil, end), IntervalEnd: true})
		}
	}
	return out
}
