package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// MaxDeny is the largest number of ranges that [Network.Deny] and [Config.AlwaysDeny] take: 100,000 of the settings,
// and the addresses of names, 1,024 each. They need about 39 MiB of the kernel's memory, and as much again while they
// are replaced.
const MaxDeny = 110_000

// forbidden is a list of destinations that no slot may reach, beside the host's addresses, with the set that the table
// has for them. It is replaced, not changed.
type forbidden struct {
	intervals []interval
	set       *nftables.Set
}

// forbid returns the destinations that are always forbidden together with more. The version is a part of the set's
// name, so that the sets of two lists can exist beside each other.
func (t *table) forbid(version int, more []netip.Prefix) *forbidden {
	all := slices.Concat([]netip.Prefix{t.layout.block}, neverRanges, more)
	return &forbidden{intervals: merge(all), set: &nftables.Set{Table: t.table, Name: "never-" + strconv.Itoa(version),
		KeyType: nftables.TypeIPAddr, Interval: true}}
}

func (f *forbidden) elements() []nftables.SetElement { return intervalElements(f.intervals) }

// covers reports whether a connection of the slot goes to a forbidden destination: the one that it was opened to, or
// the one that another firewall led it to. Only a connection that was led to a service has the gateway at its other
// end.
func (f *forbidden) covers(s *Slot, c connection) bool {
	if c.to == netip.AddrPortFrom(metadataAddr, metadataPort) {
		return false // this is the metadata service, which the rules allow
	}
	return contains(f.intervals, c.to.Addr()) || c.end.Addr() != s.Gateway && contains(f.intervals, c.end.Addr())
}

// neverRule returns the rule of a chain, chainRaw or chainOut, that refuses forbidden destinations.
func (t *table) neverRule(chain string, f *forbidden) []expr.Any {
	to := join(isIPv4(), load(destination), inSet(f.set))
	if chain == chainRaw {
		return join(linkIs(incoming, t.layout.links()), to, gotoChain(chainForbid))
	}
	return join(to, gotoChain(chainRefuse))
}

// placedRule is a rule in the kernel.
type placedRule struct {
	chain  string
	handle uint64
}

// neverRules finds the rules that use the set of f. If one is missing, isGone is true for the error.
func (t *table) neverRules(f *forbidden) (out []placedRule, err error) {
	uses := func(e expr.Any) bool {
		l, ok := e.(*expr.Lookup)
		return ok && l.SetName == f.set.Name
	}
	err = t.sockets.list(func(c *nftables.Conn) error {
		for _, chain := range []string{chainRaw, chainOut} {
			rules, err := c.GetRules(t.table, t.regular(chain))
			if err != nil {
				return fmt.Errorf("listing nftables rules of %s: %w", chain, err)
			}
			i := slices.IndexFunc(rules, func(r *nftables.Rule) bool { return slices.ContainsFunc(r.Exprs, uses) })
			if i < 0 {
				return fmt.Errorf("looking for the rule with %s in %s: %w", f.set.Name, chain, unix.ENOENT)
			}
			out = append(out, placedRule{chain, rules[i].Handle})
		}
		return nil
	})
	return out, err
}

// forbidding serialises the changes of the forbidden destinations.
type forbidding struct {
	mu sync.Mutex
	// version counts the lists after the one of Open, also those that were not put in force.
	// +checklocks:mu
	version int
	// uncut reports that connections to destinations of the list in force may be left.
	// +checklocks:mu
	uncut bool
}

// Deny replaces the destinations of [Config.AlwaysDeny], which no slot may reach whatever its policy says, and cuts the
// connections to the new ones, also those through the services. The services must end the connections that they made
// for slots themselves. Destinations that are on both lists stay closed at every moment. What other lists and policies
// allow is not touched. It returns once all of that is done. At most [MaxDeny] ranges are taken; they are checked as
// those of AlwaysDeny. If they are the same as before it does nothing. After an error of the rules the old list is in
// force; after an error of cutting the new one is, and calling again tries again.
func (n *Network) Deny(ctx context.Context, all []netip.Prefix) error {
	if err := checkDeny(all); err != nil {
		return err
	}
	n.denying.mu.Lock()
	defer n.denying.mu.Unlock()
	if err := n.replaceForbidden(ctx, all); err != nil {
		return fmt.Errorf("replacing the forbidden destinations: %w", err)
	}
	if !n.denying.uncut {
		return nil
	}
	if err := n.cutForbidden(ctx); err != nil {
		return fmt.Errorf("cutting connections to forbidden destinations: %w", err)
	}
	n.denying.uncut = false
	return nil
}

// replaceForbidden puts a list in force, unless it is.
//
// +checklocks:n.denying.mu
func (n *Network) replaceForbidden(ctx context.Context, all []netip.Prefix) error {
	n.mu.Lock()
	closed := n.closed
	n.mu.Unlock()
	if closed {
		return errClosed
	}
	for try := 1; ; try++ {
		installed := n.installed.Load()
		old := n.rules.never.Load()
		n.denying.version++
		next := n.rules.forbid(n.denying.version+1, all)
		if slices.Equal(old.intervals, next.intervals) {
			return ctx.Err()
		}
		if again, err := n.again(try, installed, n.putForbidden(ctx, old, next)); !again {
			n.denying.uncut = n.denying.uncut || err == nil
			return err
		}
	}
}

// putForbidden makes the set of next in as many transactions as it needs, while no packet meets it. Then one
// transaction leads the packets to it, and another removes the set of old. On kernels without commit 7e43e0a1141d of
// 2026, elements that a transaction adds to a set of intervals or removes from it can hide others for as long as it
// takes, so that a destination of both lists could be reached meanwhile.
func (n *Network) putForbidden(ctx context.Context, old, next *forbidden) error {
	const doing = "changing the forbidden destinations in"
	t := n.rules
	t.asideNever.Store(next)
	defer t.asideNever.Store(nil)
	err := n.makeForbidden(ctx, next, doing)
	if err == nil {
		err = n.leadToForbidden(old, next, doing)
	}
	gone := old
	if err != nil {
		gone = next
	}
	removing := present(n.step(doing, func(c *nftables.Conn) error { c.DelSet(gone.set); return nil }, nil))
	if removing != nil {
		n.log.Warn("removing unused rules", "error", removing)
		n.compareSoon()
	}
	return err
}

// makeForbidden makes the set of next.
func (n *Network) makeForbidden(ctx context.Context, next *forbidden, doing string) error {
	add := addSet
	for part := range slices.Chunk(next.elements(), elementsPerChange) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := n.longStep(doing, func(c *nftables.Conn) error { return add(c, next.set, part) }); err != nil {
			return err
		}
		add = addElements
	}
	return nil
}

// leadToForbidden makes the rules use the set of next instead of that of old. Each packet meets one of the two.
func (n *Network) leadToForbidden(old, next *forbidden, doing string) error {
	n.installing.RLock()
	defer n.installing.RUnlock()
	t := n.rules
	placed, err := t.neverRules(old)
	if err != nil {
		return err
	}
	if err := t.change(doing, func(c *nftables.Conn) error {
		for _, r := range placed {
			c.ReplaceRule(&nftables.Rule{Table: t.table, Chain: t.regular(r.chain), Handle: r.handle,
				Exprs: t.neverRule(r.chain, next)})
		}
		return nil
	}); err != nil {
		return err
	}
	// The order matters: each set must be known in one of the two places.
	t.asideNever.Store(old)
	t.never.Store(next)
	if err := n.describeForbidden(placed, old, next); err != nil {
		n.log.Warn("comparing the nftables table", "error", err)
		n.compareSoon()
	}
	return nil
}

// describeForbidden changes n.shape as the rules were changed, in which the placed rules may have got new handles. It
// gives an error if another program has changed their chains too.
func (n *Network) describeForbidden(placed []placedRule, old, next *forbidden) error {
	t := n.rules
	n.rulesMu.Lock()
	lines := make([]string, len(placed))
	for i, r := range placed {
		lines[i] = n.shape[chainName(r.chain)]
	}
	n.rulesMu.Unlock()
	for i, r := range placed {
		var handles string
		if err := t.sockets.list(func(c *nftables.Conn) (err error) {
			handles, err = t.rulesOf(c, r.chain)
			return err
		}); err != nil {
			return err
		}
		line, ok := renumbered(lines[i], r.handle, handles)
		if !ok {
			return fmt.Errorf("chain %s was changed by another program", r.chain)
		}
		lines[i] = line
	}
	var keys [][]byte
	for _, e := range next.elements() {
		keys = append(keys, e.Key)
	}
	slices.SortFunc(keys, bytes.Compare)
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	for i, r := range placed {
		n.shape[chainName(r.chain)] = lines[i]
	}
	delete(n.shape, setName(old.set.Name))
	n.shape[setName(next.set.Name)] = fmt.Sprintf("%x", keys)
	return nil
}

// renumbered returns the line of a chain whose rule was has been replaced. The chain has the handles now; not every
// kernel gives the rule another one. It returns false if another rule differs.
func renumbered(line string, was uint64, now string) (string, bool) {
	fields, handles := strings.Fields(line), strings.Fields(now)
	if len(fields) < len(handles) {
		return "", false
	}
	changed := 0
	rules := fields[len(fields)-len(handles):]
	for i, h := range handles {
		if rules[i] == h {
			continue
		}
		if rules[i] != strconv.FormatUint(was, 10) {
			return "", false
		}
		rules[i] = h
		changed++
	}
	return strings.Join(fields, " "), changed <= 1
}

// compareSoon makes the next check compare the table with what it should be.
func (n *Network) compareSoon() {
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	n.foreign--
}

// cutForbidden forgets the connections of all slots to forbidden destinations. Their packets are refused already; this
// stops those of the other side. After an error it goes on with the next slot.
func (n *Network) cutForbidden(ctx context.Context) error {
	never := n.rules.never.Load()
	var errs []error
	for _, r := range n.allRules() {
		if ctx.Err() != nil {
			return errors.Join(append(errs, ctx.Err())...)
		}
		if n.openedNone(r.slot) {
			continue
		}
		errs = append(errs, forget(ctx, &n.rules.sockets, r.slot.Addr, attrTupleOrig,
			func(c connection) bool { return never.covers(r.slot, c) }))
	}
	return errors.Join(errs...)
}
