package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// neverRanges are destinations that no sandbox reaches whatever is configured:
// this host and network, loopback, link-local with the metadata service of every
// cloud, multicast, and the reserved block with the limited broadcast address.
var neverRanges = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("240.0.0.0/4"),
}

// Priorities of the base chains, relative to what else may hook there: raw is
// before connection tracking (-200), guard after it and before destinations are
// rewritten (-100), the others where filters and source NAT usually are. An
// accept here never overrides a drop elsewhere, nor the reverse.
const (
	rawPriority    = -300
	guardPriority  = -150
	filterPriority = 0
	natPriority    = 100
)

// elementsPerMessage keeps a message of set elements (about 70 bytes each) under
// the 64 KiB an attribute can hold.
const elementsPerMessage = 400

// table is the ruleset of one instance as it is sent to the kernel. The same
// structure is built for every installation, so that what is there can be
// compared with what should be.
//
// Names of sets: "never" are the forbidden destinations; "slots" pairs each link
// with its only address; "policies" gives the verdict on a slot's traffic to the
// outside, so that a policy of one slot is one element and a chain, and packets
// cost the same however many slots there are. A link that is in no set is
// dropped: forgetting a slot closes it.
type table struct {
	layout layout
	deny   []netip.Prefix
	agent  uint16

	table    *nftables.Table
	never    *nftables.Set
	slots    *nftables.Set
	policies *nftables.Set
}

func newTable(l layout, deny []netip.Prefix, agent uint16) *table {
	t := &nftables.Table{Family: nftables.TableFamilyINet, Name: l.table()}
	linkAndAddr := nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIPAddr)
	return &table{
		layout: l, deny: deny, agent: agent, table: t,
		never: &nftables.Set{Table: t, Name: "never", KeyType: nftables.TypeIPAddr, Interval: true},
		slots: &nftables.Set{Table: t, Name: "slots", KeyType: linkAndAddr, Concatenation: true},
		policies: &nftables.Set{Table: t, Name: "policies", KeyType: linkAndAddr, Concatenation: true,
			IsMap: true, DataType: nftables.TypeVerdict},
	}
}

// chain names. The regular ones are reached for packets of our links only.
const (
	chainRaw     = "raw"     // from a sandbox, before anything else
	chainGuard   = "guard"   // from a sandbox, before destinations are rewritten
	chainInput   = "input"   // from a sandbox to the host
	chainForward = "forward" // from or to a sandbox, through the host
	chainOutput  = "output"  // from the host to a sandbox
	chainNAT     = "nat"     // from a sandbox, leaving the host
	chainOut     = "leaving" // regular: from a sandbox to the outside
	chainIn      = "arriving"
	chainAllow   = "allow_all" // regular: the policy of a slot without restrictions
)

// install replaces the table, in one transaction: no packet meets a half-made
// ruleset, and connections live on.
func (t *table) install(slots []*Slot) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	// Deleting needs a table; adding one that exists changes nothing.
	c.AddTable(t.table)
	c.DelTable(t.table)
	c.AddTable(t.table)
	for _, ch := range []*nftables.Chain{t.regular(chainAllow), t.regular(chainOut), t.regular(chainIn)} {
		c.AddChain(ch)
	}
	if err := t.addSets(c, slots); err != nil {
		return err
	}
	for _, r := range t.rules() {
		c.AddRule(r)
	}
	for _, b := range t.bases() {
		c.AddChain(b.chain)
		for _, e := range b.rules {
			c.AddRule(&nftables.Rule{Table: t.table, Chain: b.chain, Exprs: e})
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("installing nftables table %s: %w", t.table.Name, err)
	}
	return nil
}

func (t *table) addSets(c *nftables.Conn, slots []*Slot) error {
	denied := append([]netip.Prefix{t.layout.block}, neverRanges...)
	if err := c.AddSet(t.never, intervalElements(merge(append(denied, t.deny...)))); err != nil {
		return fmt.Errorf("encoding nftables set %s: %w", t.never.Name, err)
	}
	for _, set := range []*nftables.Set{t.slots, t.policies} {
		if err := c.AddSet(set, nil); err != nil {
			return fmt.Errorf("encoding nftables set %s: %w", set.Name, err)
		}
	}
	for len(slots) > 0 {
		n := min(len(slots), elementsPerMessage)
		if err := t.addElements(c, slots[:n]); err != nil {
			return err
		}
		slots = slots[n:]
	}
	return nil
}

func (t *table) addElements(c *nftables.Conn, slots []*Slot) error {
	var known, policies []nftables.SetElement
	for _, s := range slots {
		known = append(known, nftables.SetElement{Key: slotKey(s)})
		policies = append(policies, nftables.SetElement{Key: slotKey(s),
			VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: chainAllow}})
	}
	if err := c.SetAddElements(t.slots, known); err != nil {
		return fmt.Errorf("encoding elements of nftables set %s: %w", t.slots.Name, err)
	}
	if err := c.SetAddElements(t.policies, policies); err != nil {
		return fmt.Errorf("encoding elements of nftables map %s: %w", t.policies.Name, err)
	}
	return nil
}

// addSlot lets a slot's traffic through. The table is there.
func (t *table) addSlot(s *Slot) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	if err := t.addElements(c, []*Slot{s}); err != nil {
		return err
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("adding %s to nftables table %s: %w", s.Link, t.table.Name, err)
	}
	return nil
}

// removeSlot stops a slot's traffic. One that is not in the sets, or a table
// that is not there, is no error.
func (t *table) removeSlot(s *Slot) error {
	err := t.removeElements(s, t.policies, t.slots)
	if isGone(err) {
		// A transaction fails as a whole: one each, so that an element that is
		// missing does not keep the other.
		err = errors.Join(present(t.removeElements(s, t.policies)), present(t.removeElements(s, t.slots)))
	}
	return err
}

// removeElements removes the slot from the sets, in one transaction.
func (t *table) removeElements(s *Slot, sets ...*nftables.Set) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	for _, set := range sets {
		e := nftables.SetElement{Key: slotKey(s)}
		if set.IsMap {
			e.VerdictData = &expr.Verdict{Kind: expr.VerdictGoto, Chain: chainAllow}
		}
		if err := c.SetDeleteElements(set, []nftables.SetElement{e}); err != nil {
			return fmt.Errorf("encoding elements of nftables set %s: %w", set.Name, err)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("removing %s from nftables table %s: %w", s.Link, t.table.Name, err)
	}
	return nil
}

// present drops the error that something was not there.
func present(err error) error {
	if isGone(err) {
		return nil
	}
	return err
}

// remove deletes the table; none is no error.
func (t *table) remove() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("opening nftables: %w", err)
	}
	c.DelTable(t.table)
	if err := present(c.Flush()); err != nil {
		return fmt.Errorf("deleting nftables table %s: %w", t.table.Name, err)
	}
	return nil
}

func (t *table) regular(name string) *nftables.Chain {
	return &nftables.Chain{Table: t.table, Name: name}
}

// base is a chain that the kernel calls, with its rules.
type base struct {
	chain *nftables.Chain
	rules [][]expr.Any
}

// rules are those of the regular chains.
func (t *table) rules() []*nftables.Rule {
	var out []*nftables.Rule
	add := func(chain string, e ...[]expr.Any) {
		out = append(out, &nftables.Rule{Table: t.table, Chain: t.regular(chain), Exprs: join(e...)})
	}
	add(chainAllow, accept())

	// Checked again although raw and guard did: what was addressed may have been
	// rewritten since.
	add(chainOut, notIPv4(), drop())
	add(chainOut, linkIs(outgoing, t.layout.links()), drop())
	add(chainOut, isIPv4(), load(destination), inSet(t.never), drop())
	add(chainOut, addressTypeIsNot(unix.RTN_UNICAST), drop())
	add(chainOut, state(expr.CtStateBitINVALID|expr.CtStateBitUNTRACKED), drop())
	add(chainOut, isIPv4(), linkAnd(incoming, source), verdictOf(t.policies))
	add(chainOut, drop())

	// An answer, or an error about what was sent, travels in the direction of
	// replies. Expected connections that a tracking helper would let in do not.
	add(chainIn, isIPv4(), state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), isReply(), accept())
	add(chainIn, drop())
	return out
}

// bases are the chains the kernel calls. All of them let pass what is not to or
// from one of our links.
func (t *table) bases() []base {
	fromUs, toUs := linkIs(incoming, t.layout.links()), linkIs(outgoing, t.layout.links())
	chain := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, priority int32) *nftables.Chain {
		policy := nftables.ChainPolicyAccept
		return &nftables.Chain{Table: t.table, Name: name, Type: kind, Hooknum: hook,
			Priority: nftables.ChainPriorityRef(nftables.ChainPriority(priority)), Policy: &policy}
	}
	filter := nftables.ChainTypeFilter
	return []base{
		{chain(chainRaw, filter, nftables.ChainHookPrerouting, rawPriority), [][]expr.Any{
			join(fromUs, notIPv4(), drop()),
			join(fromUs, isIPv4(), linkAnd(incoming, source), notInSet(t.slots), drop()),
			// Addresses of the host are guard's business: answers to the host go there.
			join(fromUs, addressTypeIs(unix.RTN_LOCAL), accept()),
			join(fromUs, addressTypeIsNot(unix.RTN_UNICAST), drop()),
			join(fromUs, isIPv4(), load(destination), inSet(t.never), drop()),
		}},
		// Before another firewall's port forwarding can turn the host's address
		// into somebody else's.
		{chain(chainGuard, filter, nftables.ChainHookPrerouting, guardPriority), [][]expr.Any{
			join(fromUs, addressTypeIs(unix.RTN_LOCAL), state(expr.CtStateBitESTABLISHED), isReply(), accept()),
			join(fromUs, addressTypeIs(unix.RTN_LOCAL), drop()),
		}},
		{chain(chainInput, filter, nftables.ChainHookInput, filterPriority), [][]expr.Any{
			join(fromUs, isIPv4(), tcpPort(source, t.agent), state(expr.CtStateBitESTABLISHED), isReply(), accept()),
			join(fromUs, drop()),
		}},
		{chain(chainForward, filter, nftables.ChainHookForward, filterPriority), [][]expr.Any{
			join(fromUs, gotoChain(chainOut)),
			join(toUs, gotoChain(chainIn)),
		}},
		{chain(chainOutput, filter, nftables.ChainHookOutput, filterPriority), [][]expr.Any{
			join(toUs, isIPv4(), linkAnd(outgoing, destination), notInSet(t.slots), drop()),
			join(toUs, isIPv4(), tcpPort(destination, t.agent), accept()),
			// Errors the host itself sends about the sandbox's traffic: too big,
			// unreachable, time exceeded. They carry what was sent, nothing else.
			join(toUs, isIPv4(), isICMP(), state(expr.CtStateBitRELATED), accept()),
			join(toUs, drop()),
		}},
		{chain(chainNAT, nftables.ChainTypeNAT, nftables.ChainHookPostrouting, natPriority), [][]expr.Any{
			join(isIPv4(), sourceIn(t.layout.block), linkIsNot(outgoing, t.layout.links()), masquerade()),
		}},
	}
}

// slotKey is the element of a set keyed by link and address.
func slotKey(s *Slot) []byte {
	a := s.Addr.As4()
	return append(linkName(s.Link), a[:]...)
}

// linkName is a name as the kernel compares it: 16 bytes, zero-filled.
func linkName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// intervalElements encodes intervals: a start each, and the address behind the
// end. At the end of the address space there is none behind.
func intervalElements(in []interval) []nftables.SetElement {
	var out []nftables.SetElement
	for _, i := range in {
		out = append(out, nftables.SetElement{Key: binaryutil.BigEndian.PutUint32(i.first)})
		if end := i.last + 1; end != 0 {
			out = append(out, nftables.SetElement{Key: binary.BigEndian.AppendUint32(nil, end), IntervalEnd: true})
		}
	}
	return out
}
