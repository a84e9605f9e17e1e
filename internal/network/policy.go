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

// Policy is what a slot may reach beside what no slot ever does.
type Policy struct {
	Open  bool           // everything; the lists are empty then
	Allow []netip.Prefix // IPv4
	Deny  []netip.Prefix // IPv4; before Allow and before names
	Ports []uint16       // restrict Allow to TCP to these ports; empty is every protocol
	Names bool           // names are decided by the services: they are the only way to what they allow
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

// ruling is a policy as the rules have it.
type ruling struct {
	open, names bool
	allow, deny []interval
	ports       []uint16 // in order, each once
}

func newRuling(p Policy) *ruling {
	ports := slices.Clone(p.Ports)
	slices.Sort(ports)
	return &ruling{open: p.Open, names: p.Names, allow: merge(p.Allow), deny: merge(p.Deny), ports: slices.Compact(ports)}
}

// allows says what the rules say about a packet that goes straight out.
func (r *ruling) allows(protocol byte, to netip.AddrPort) bool {
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

// contains looks an address up in disjoint intervals in order.
func contains(in []interval, a netip.Addr) bool {
	b := a.As4()
	n := binary.BigEndian.Uint32(b[:])
	i, exact := slices.BinarySearchFunc(in, n, func(i interval, n uint32) int { return cmp.Compare(i.first, n) })
	return exact || i > 0 && n <= in[i-1].last
}

// entry is what the table has of a slot. It is replaced, not changed.
type entry struct {
	slot     *Slot
	ruling   *ruling                  // nil: closed
	turn     int                      // counts rulings: the names of each one's chains and sets carry it
	fresh    bool                     // it was made here, so without a ruling it has no connections
	resolved map[netip.Addr]time.Time // open through the proxy, and until when
	soonest  time.Time                // when the first of them ends, zero: there is none
	shape    shape                    // of its chains
}

// Names of a slot's chains and sets carry the slot's index and the turn, so that
// those of the next policy stand beside the present ones until one element of
// "policies" changes.
func (e *entry) name(kind string) string { return fmt.Sprintf("%s-%d-%d", kind, e.slot.Index, e.turn) }

func (e *entry) policyChain() string { return e.name("policy") }
func (e *entry) namesChain() string  { return e.name("names") }

// chains are the entry's own.
func (e *entry) chains(t *table) []string {
	var out []string
	if e.ruling != nil && !e.ruling.open {
		out = append(out, e.policyChain())
	}
	if t.decidesNames(e) {
		out = append(out, e.namesChain())
	}
	return out
}

// elements are the sets of the entry's policy, but the resolved addresses, which
// come and go.
func (e *entry) elements(t *table) []filled {
	if e.ruling == nil || e.ruling.open {
		return nil
	}
	var out []filled
	add := func(kind string, key nftables.SetDatatype, interval bool, elements []nftables.SetElement) {
		if len(elements) > 0 {
			out = append(out, filled{kind, &nftables.Set{Table: t.table, Name: e.name(kind), KeyType: key, Interval: interval}, elements})
		}
	}
	add(kindDeny, nftables.TypeIPAddr, true, intervalElements(e.ruling.deny))
	add(kindAllow, nftables.TypeIPAddr, true, intervalElements(e.ruling.allow))
	var ports []nftables.SetElement
	for _, p := range e.ruling.ports {
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

// decidesNames reports that the services see some of the entry's traffic.
func (t *table) decidesNames(e *entry) bool {
	return e.ruling != nil && e.ruling.names && (t.services.DNS != 0 || t.services.Proxy != 0)
}

// proxies reports that the entry has a set of resolved addresses.
func (t *table) proxies(e *entry) bool { return t.decidesNames(e) && t.services.Proxy != 0 }

// resolved returns the set of addresses the proxy answers for. It outlives a policy. Its
// elements have no times of their own: not every kernel can lengthen one, and so an answer
// that says again what was said before changes nothing there.
func (t *table) resolved(s *Slot) *nftables.Set {
	return &nftables.Set{Table: t.table, Name: fmt.Sprintf("resolved-%d", s.Index), KeyType: nftables.TypeIPAddr}
}

// parts divides the entry's elements into what is made in the first transaction and what
// is added in further ones, in order.
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

// addPolicy opens a known slot as its ruling says; none leaves it closed.
func (t *table) addPolicy(c *nftables.Conn, e *entry) error {
	return errors.Join(t.addOwn(c, e, e.elements(t), nil), t.follow(c, e))
}

// addOwn makes the entry's chains and sets with some of its elements, which nothing leads
// to yet, beside those of the entry in force, if there is one. What is denied comes first:
// whatever of it a packet could find is less than all of it.
func (t *table) addOwn(c *nftables.Conn, e *entry, with []filled, beside *entry) error {
	if e.ruling == nil {
		return nil
	}
	sets := map[string]*nftables.Set{}
	for _, f := range with {
		if err := addSet(c, f.set, f.elements); err != nil {
			return err
		}
		sets[f.kind] = f.set
	}
	if !e.ruling.open {
		t.addChain(c, e.policyChain(), decide(sets, gotoChain(chainRefuse), gotoChain(chainAllow)))
	}
	if t.decidesNames(e) {
		return t.addNames(c, e, sets, beside != nil && t.proxies(beside))
	}
	return nil
}

// follow leads the slot's packets to the entry's chains.
func (t *table) follow(c *nftables.Conn, e *entry) error {
	if e.ruling == nil {
		return nil
	}
	verdict := expr.Verdict{Kind: expr.VerdictGoto, Chain: chainAllow}
	if !e.ruling.open {
		// A jump comes back to where everything is refused.
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
	if e.ruling == nil {
		return nil
	}
	key := []nftables.SetElement{{Key: slotKey(e.slot)}}
	err := c.SetDeleteElements(t.policies, key)
	if t.decidesNames(e) {
		err = errors.Join(err, c.SetDeleteElements(t.named, key))
	}
	return err
}

// removeOwn removes what addOwn made of an entry, but what the one that stays has too.
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

// addNames hands what names decide about to the services. The set of resolved addresses
// may be there.
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
		// What the lists decide about needs no proxy.
		rules = append(rules, decide(sets, leave(), leave())...)
		rules = append(rules, join(protocolIs(unix.IPPROTO_TCP), isIPv4(), load(destination), inSet(resolved), redirectTo(port)))
	}
	t.addChain(c, e.namesChain(), rules)
	return nil
}

// decide are the rules for a policy's lists.
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

// SetPolicy puts a policy in the place of the slot's present one, in one step,
// and cuts the connections that it does not allow; the others live on. What goes
// through the services is theirs to cut, unless the policy has no names any more.
// A slot that was not handed out or adopted, or was released, is NotFound, code
// "slot_not_found". After an error of the rules the old policy is in force; after
// one of cutting the new one is, and calling again tries again.
func (n *Network) SetPolicy(ctx context.Context, s *Slot, p Policy) error {
	if err := p.check(); err != nil {
		return fmt.Errorf("setting the policy of slot %d: %w", s.Index, err)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("setting the policy of slot %d: %w", s.Index, err)
	}
	old, next, err := n.replacePolicy(s, newRuling(p))
	if err != nil {
		return err
	}
	if old.ruling == nil && old.fresh {
		return nil
	}
	return cutConnections(ctx, &n.rules.sockets, s, next.ruling)
}

// SlotOf is the slot with the sandbox's address, if it is handed out or adopted.
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
