package network

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Policy tells what a slot may reach, beside the destinations that no slot reaches.
type Policy struct {
	Open  bool           // allows everything; the lists are empty
	Allow []netip.Prefix // IPv4
	Deny  []netip.Prefix // IPv4; takes precedence over Allow and names
	Ports []uint16       // restricts Allow to TCP to these ports; empty allows every protocol
	Names bool           // the services decide by name; what they allow is reached through them only
}

func (p Policy) check() error {
	if p.Open && (len(p.Allow)+len(p.Deny)+len(p.Ports) > 0 || p.Names) {
		return errors.New("an open policy has no lists and no names")
	}
	for _, list := range [][]netip.Prefix{p.Allow, p.Deny} {
		for _, r := range list {
			if !r.IsValid() || !r.Addr().Is4() {
				return fmt.Errorf("%v is not an IPv4 range", r)
			}
		}
	}
	if slices.Contains(p.Ports, 0) {
		return errors.New("0 is not a port")
	}
	return nil
}

// compiled is a policy as the rules need it.
type compiled struct {
	open, names bool
	allow, deny []interval
	ports       []uint16 // sorted, without duplicates
}

func compile(p Policy) *compiled {
	ports := slices.Clone(p.Ports)
	slices.Sort(ports)
	return &compiled{open: p.Open, names: p.Names, allow: merge(p.Allow), deny: merge(p.Deny),
		ports: slices.Compact(ports)}
}

// allows reports whether the rules allow a packet that goes out directly.
func (r *compiled) allows(protocol byte, to netip.AddrPort) bool {
	switch {
	case r.open:
		return true
	case contains(r.deny, to.Addr()) || !contains(r.allow, to.Addr()):
		return false
	case len(r.ports) == 0:
		return true
	}
	return protocol == unix.IPPROTO_TCP && slices.Contains(r.ports, to.Port())
}

// contains reports whether sorted, disjoint intervals contain an address.
func contains(in []interval, a netip.Addr) bool {
	b := a.As4()
	n := binary.BigEndian.Uint32(b[:])
	i, exact := slices.BinarySearchFunc(in, n, func(i interval, n uint32) int { return cmp.Compare(i.first, n) })
	return exact || i > 0 && n <= in[i-1].last
}

// entry describes what the table has of a slot. It is replaced, not changed.
type entry struct {
	slot     *Slot
	policy   *compiled                // nil: closed
	version  int                      // counts policies; part of the names of its chains and sets
	fresh    bool                     // made by this process, so without a policy it has no connections
	resolved map[netip.Addr]time.Time // open through the proxy, and until when
	soonest  time.Time                // when the first of them ends; zero if there is none
	shape    shape                    // of its chains
}

// name returns the name of a chain or set. It carries the slot's index and the policy's version,
// so that those of the next policy exist beside the present ones until one element of "policies"
// changes.
func (e *entry) name(kind string) string {
	return fmt.Sprintf("%s-%d-%d", kind, e.slot.Index, e.version)
}

func (e *entry) policyChain() string { return e.name("policy") }
func (e *entry) namesChain() string  { return e.name("names") }

// chains returns the names of the chains that only the entry has.
func (e *entry) chains(t *table) []string {
	var out []string
	if e.policy != nil && !e.policy.open {
		out = append(out, e.policyChain())
	}
	if t.decidesNames(e) {
		out = append(out, e.namesChain())
	}
	return out
}

// elements returns the sets of the entry's policy, except the resolved addresses, which come and
// go.
func (e *entry) elements(t *table) []filled {
	if e.policy == nil || e.policy.open {
		return nil
	}
	var out []filled
	add := func(kind string, key nftables.SetDatatype, interval bool, elements []nftables.SetElement) {
		if len(elements) > 0 {
			out = append(out, filled{kind, &nftables.Set{Table: t.table, Name: e.name(kind), KeyType: key, Interval: interval},
				elements})
		}
	}
	add(kindDeny, nftables.TypeIPAddr, true, intervalElements(e.policy.deny))
	add(kindAllow, nftables.TypeIPAddr, true, intervalElements(e.policy.allow))
	var ports []nftables.SetElement
	for _, p := range e.policy.ports {
		ports = append(ports, nftables.SetElement{Key: binaryutil.BigEndian.PutUint16(p)})
	}
	add(kindPorts, nftables.TypeInetService, false, ports)
	return out
}

// filled is a set with its elements.
type filled struct {
	kind     string
	set      *nftables.Set
	elements []nftables.SetElement
}

const (
	kindDeny  = "deny"
	kindAllow = "allow"
	kindPorts = "ports"
)

// decidesNames reports whether the services see some of the entry's traffic.
func (t *table) decidesNames(e *entry) bool {
	return e.policy != nil && e.policy.names && (t.services.DNS != 0 || t.services.Proxy != 0)
}

// proxies reports whether the entry has a set of resolved addresses.
func (t *table) proxies(e *entry) bool { return t.decidesNames(e) && t.services.Proxy != 0 }

// resolved returns the set of addresses that are reached through the proxy. It outlives a policy.
// Its elements have no timeouts: not every kernel can extend one, and without them a repeated
// answer changes nothing in the kernel.
func (t *table) resolved(s *Slot) *nftables.Set {
	return &nftables.Set{Table: t.table, Name: fmt.Sprintf("resolved-%d", s.Index), KeyType: nftables.TypeIPAddr}
}

// parts divides the entry's elements into those of the first transaction and those of the further
// ones, in order.
func (e *entry) parts(t *table) (first, rest []filled) {
	room := elementsPerChange
	for _, f := range e.elements(t) {
		all := f.elements
		f.elements = all[:min(len(all), room)]
		room -= len(f.elements)
		first = append(first, f)
		for part := range slices.Chunk(all[len(f.elements):], elementsPerChange) {
			rest = append(rest, filled{f.kind, f.set, part})
		}
	}
	return first, rest
}

// addPolicy opens a known slot as its policy says. Without a policy it stays closed.
func (t *table) addPolicy(c *nftables.Conn, e *entry) error {
	return errors.Join(t.addOwn(c, e, e.elements(t), nil), t.follow(c, e))
}

// addOwn makes the entry's chains and sets, with some of its elements, beside those of the entry
// in force, if there is one. No packet reaches them yet. Denied ranges are added first, so that a
// packet that met a part of the sets would meet the denied ranges.
func (t *table) addOwn(c *nftables.Conn, e *entry, with []filled, beside *entry) error {
	if e.policy == nil {
		return nil
	}
	sets := map[string]*nftables.Set{}
	for _, f := range with {
		if err := addSet(c, f.set, f.elements); err != nil {
			return err
		}
		sets[f.kind] = f.set
	}
	if !e.policy.open {
		t.addChain(c, e.policyChain(), decide(sets, gotoChain(chainRefuse), gotoChain(chainAllow)))
	}
	if t.decidesNames(e) {
		return t.addNames(c, e, sets, beside != nil && t.proxies(beside))
	}
	return nil
}

// follow leads the slot's packets to the entry's chains.
func (t *table) follow(c *nftables.Conn, e *entry) error {
	if e.policy == nil {
		return nil
	}
	verdict := expr.Verdict{Kind: expr.VerdictGoto, Chain: chainAllow}
	if !e.policy.open {
		// A jump returns to the rule that refuses everything.
		verdict = expr.Verdict{Kind: expr.VerdictJump, Chain: e.policyChain()}
	}
	err := c.SetAddElements(t.policies, []nftables.SetElement{{Key: slotKey(e.slot), VerdictData: &verdict}})
	if t.decidesNames(e) {
		err = errors.Join(err, c.SetAddElements(t.named, []nftables.SetElement{{Key: slotKey(e.slot),
			VerdictData: &expr.Verdict{Kind: expr.VerdictJump, Chain: e.namesChain()}}}))
	}
	return err
}

// unfollow closes the slot.
func (t *table) unfollow(c *nftables.Conn, e *entry) error {
	if e.policy == nil {
		return nil
	}
	key := []nftables.SetElement{{Key: slotKey(e.slot)}}
	err := c.SetDeleteElements(t.policies, key)
	if t.decidesNames(e) {
		err = errors.Join(err, c.SetDeleteElements(t.named, key))
	}
	return err
}

// removeOwn removes what addOwn made of the entry gone, except what the entry stays has too.
func (t *table) removeOwn(c *nftables.Conn, stays, gone *entry) {
	for _, name := range gone.chains(t) {
		c.DelChain(t.regular(name))
	}
	for _, f := range gone.elements(t) {
		c.DelSet(f.set)
	}
	if t.proxies(gone) && (stays == nil || !t.proxies(stays)) {
		c.DelSet(t.resolved(gone.slot))
	}
}

// addNames makes the chain that redirects traffic to the services. there reports that the set of
// resolved addresses exists.
func (t *table) addNames(c *nftables.Conn, e *entry, sets map[string]*nftables.Set, there bool) error {
	var rules [][]expr.Any
	if port := t.services.DNS; port != 0 {
		for _, protocol := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			rules = append(rules, join(portOf(protocol, destination, dnsPort), redirectTo(port)))
		}
	}
	if port := t.services.Proxy; port != 0 {
		resolved := t.resolved(e.slot)
		if !there {
			if err := addSet(c, resolved, addressElements(slices.Collect(maps.Keys(e.resolved)))); err != nil {
				return err
			}
		}
		// What the lists decide needs no proxy.
		rules = append(rules, decide(sets, leave(), leave())...)
		rules = append(rules, join(protocolIs(unix.IPPROTO_TCP), isIPv4(), load(destination), inSet(resolved),
			redirectTo(port)))
	}
	t.addChain(c, e.namesChain(), rules)
	return nil
}

// decide returns the rules for a policy's lists.
func decide(sets map[string]*nftables.Set, denied, allowed []expr.Any) [][]expr.Any {
	var out [][]expr.Any
	if s := sets[kindDeny]; s != nil {
		out = append(out, join(isIPv4(), load(destination), inSet(s), denied))
	}
	if s := sets[kindAllow]; s != nil {
		var ports []expr.Any
		if p := sets[kindPorts]; p != nil {
			ports = join(protocolIs(unix.IPPROTO_TCP), loadPort(destination), inSet(p))
		}
		out = append(out, join(isIPv4(), load(destination), inSet(s), ports, allowed))
	}
	return out
}

func (t *table) addChain(c *nftables.Conn, name string, rules [][]expr.Any) {
	chain := c.AddChain(t.regular(name))
	for _, r := range rules {
		c.AddRule(&nftables.Rule{Table: t.table, Chain: chain, Exprs: r})
	}
}

// SetPolicy replaces the slot's policy in one step, and cuts the connections that the new one
// does not allow; the others continue. The services cut connections through them, unless the new
// policy has no names. A slot that is not handed out or adopted, or was released, gives NotFound,
// code "slot_not_found". After an error of the rules the old policy is in force; after an error
// of cutting the new one is, and calling again tries again.
func (n *Network) SetPolicy(ctx context.Context, s *Slot, p Policy) error {
	if err := p.check(); err != nil {
		return fmt.Errorf("setting the policy of slot %d: %w", s.Index, err)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("setting the policy of slot %d: %w", s.Index, err)
	}
	old, next, err := n.replacePolicy(s, compile(p))
	if err != nil {
		return err
	}
	if old.policy == nil && old.fresh || n.openedNone(s) {
		return nil
	}
	return cutConnections(ctx, &n.rules.sockets, s, next.policy, n.rules.never.Load())
}

// SlotOf returns the slot with the sandbox's address, if it is handed out or adopted.
func (n *Network) SlotOf(a netip.Addr) (*Slot, bool) {
	index, ok := n.layout.index(a)
	if !ok {
		return nil, false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s, ok := n.used[index]
	return s, ok
}
