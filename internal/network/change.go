package network

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/google/nftables"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// elementsPerChange is the largest number of elements of one slot that a transaction adds or
	// removes. The kernel takes about 6 ms for it, and makes no other change meanwhile. Fewer
	// make a long policy slower; more make other slots wait longer.
	elementsPerChange = 2 * elementsPerMessage

	// installAttempts is the number of times that a change is tried again on a table that was
	// installed anew. If another program keeps removing the table, the change fails in the end.
	installAttempts = 5
)

// slotRules holds what the table has of one slot, and the lock for its changes. Changes of two
// slots wait for each other only during one transaction.
type slotRules struct {
	slot *Slot

	// mu is held for a whole change, however many transactions it takes.
	mu sync.Mutex
	// version counts policies, also those that were not put in force.
	// +checklocks:mu
	version int

	// now is the entry in force. It is replaced with mu held and Network.installing held for
	// reading, or with Network.installing held for writing.
	now atomic.Pointer[entry]
	// aside is an entry that is being made or removed, so any part of it may be in the table. The
	// same locks guard it.
	aside atomic.Pointer[entry]

	opening opening

	// since is the number of the installation of the table to which the slot was added, 0 if the slot is
	// a predecessor's. It does not change once the slot is in Network.ruled.
	since uint64
}

// rulesOf returns the rules of a slot that is in use.
func (n *Network) rulesOf(s *Slot) (*slotRules, error) {
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	if r := n.ruled[s.Index]; r != nil && r.slot == s {
		return r, nil
	}
	return nil, fault.New(fault.NotFound, fault.CodeSlotNotFound, "slot %d is no longer in use", s.Index)
}

// current returns an error once the slot of r was released.
func (n *Network) current(r *slotRules) error {
	_, err := n.rulesOf(r.slot)
	return err
}

// allRules returns the rules of all slots, by index.
func (n *Network) allRules() []*slotRules {
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	return sortedRules(n.ruled)
}

// step sends one transaction. After it succeeded, step calls follow to update the package's
// state, before the table can be compared or installed anew.
func (n *Network) step(doing string, f func(*nftables.Conn) error, follow func()) error {
	n.installing.RLock()
	defer n.installing.RUnlock()
	err := n.rules.change(doing, f)
	if err == nil && follow != nil {
		follow()
	}
	return err
}

// longStep sends one of many transactions of a long change. Of all long changes only one
// transaction at a time competes with the short ones.
func (n *Network) longStep(doing string, f func(*nftables.Conn) error) error {
	n.long.Lock()
	defer n.long.Unlock()
	return n.step(doing, f, nil)
}

// attempt makes a change, and makes it again if the table was removed meanwhile.
func (n *Network) attempt(change func() error) error {
	for try := 1; ; try++ {
		installed := n.installed.Load()
		if again, err := n.again(try, installed, change()); !again {
			return err
		}
	}
}

// again reports whether to make a change again, because the table was gone and has been installed
// anew. Otherwise it returns the error.
func (n *Network) again(try int, installed uint64, err error) (bool, error) {
	if !isGone(err) || try == installAttempts {
		return false, err
	}
	if err := n.reinstall(installed, "it was gone"); err != nil {
		return false, err
	}
	return true, nil
}

// reinstall installs the table anew, unless that was done since n.installed had the value since.
func (n *Network) reinstall(since uint64, why string) error {
	n.installing.Lock()
	defer n.installing.Unlock()
	if n.installed.Load() != since {
		return nil
	}
	n.rulesMu.Lock()
	n.repairs++
	n.rulesMu.Unlock()
	n.log.Warn("installing the nftables table anew", "table", n.rules.table.Name, "why", why)
	return n.install()
}

// admit adds a slot to the table, closed.
func (n *Network) admit(s *Slot) error {
	r := &slotRules{slot: s}
	r.now.Store(&entry{slot: s, fresh: true})
	return n.attempt(func() error {
		return n.step("adding "+s.Link+" to", func(c *nftables.Conn) error {
			return n.rules.addSlots(c, []*entry{r.now.Load()}, counts{})
		}, func() {
			n.rulesMu.Lock()
			defer n.rulesMu.Unlock()
			r.since = n.installed.Load()
			n.ruled[s.Index] = r
			delete(n.counted.slots, string(slotKey(s)))
		})
	})
}

// expel removes a slot from the table. If the slot is not in it, it does nothing.
func (n *Network) expel(s *Slot) error {
	r, err := n.rulesOf(s)
	if err != nil {
		return nil //nolint:nilerr // there is nothing to do
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if n.current(r) != nil {
		return nil
	}
	return n.attempt(func() error {
		return n.step("removing "+s.Link+" from", func(c *nftables.Conn) error {
			return n.rules.removeSlot(c, r.now.Load())
		}, func() {
			n.rulesMu.Lock()
			defer n.rulesMu.Unlock()
			delete(n.ruled, s.Index)
			delete(n.counted.slots, string(slotKey(s)))
		})
	})
}

// replacePolicy replaces the policy in force. It makes the new chains and sets in as many
// transactions as they need, while no packet reaches them. Then one transaction that does nothing
// else leads packets to them, so that each packet meets either the old or the new policy. What a
// transaction adds or removes can be visible in part for some microseconds, so this must be a
// transaction of its own.
func (n *Network) replacePolicy(s *Slot, policy *compiled) (old, next *entry, err error) {
	r, err := n.rulesOf(s)
	if err != nil {
		return nil, nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := n.current(r); err != nil {
		return nil, nil, err
	}
	release, err := n.reserve(r, policy)
	if err != nil {
		return nil, nil, err
	}
	defer release()
	for try := 1; ; try++ {
		installed := n.installed.Load()
		old = r.now.Load()
		r.version++
		next = &entry{slot: s, policy: policy, version: r.version, fresh: old.fresh}
		if policy.names {
			next.resolved, next.soonest = old.resolved, old.soonest
		}
		if again, err := n.again(try, installed, n.putInForce(r, old, next)); !again {
			return old, next, err
		}
	}
}

// putInForce makes next's chains and sets, leads the slot's packets to them, and removes those of
// old.
//
// +checklocks:r.mu
func (n *Network) putInForce(r *slotRules, old, next *entry) error {
	t, doing := n.rules, "changing the policy of "+r.slot.Link+" in"
	r.aside.Store(next)
	defer r.aside.Store(nil)
	err := n.makeOwn(old, next, doing)
	if err == nil {
		next.shape, err = t.shapeOf(next)
	}
	if err == nil {
		err = n.step(doing, func(c *nftables.Conn) error {
			return errors.Join(t.unfollow(c, old), t.follow(c, next))
		}, func() {
			// The order matters: each name must be known in one of the two places.
			r.aside.Store(old)
			r.now.Store(next)
		})
	}
	if err != nil {
		n.removeUnused(doing, old, next)
		return err
	}
	n.removeUnused(doing, next, old)
	return nil
}

// removeUnused removes the chains and sets of an entry that no packet reaches, except those that
// the entry in force has too. If the table was installed anew they are gone already.
func (n *Network) removeUnused(doing string, inForce, unused *entry) {
	if len(unused.owns(n.rules)) == 0 {
		return
	}
	err := present(n.step(doing, func(c *nftables.Conn) error { n.rules.removeOwn(c, inForce, unused); return nil }, nil))
	if err == nil {
		return
	}
	// They only take memory. The next check finds them.
	n.log.Warn("removing unused rules", "error", err)
	n.compareSoon()
}

// makeOwn makes the chains and sets that next has and old has not. A small policy takes one
// transaction.
func (n *Network) makeOwn(old, next *entry, doing string) error {
	if len(next.owns(n.rules)) == 0 {
		return nil
	}
	first, rest := next.parts(n.rules)
	add := func(c *nftables.Conn) error { return n.rules.addOwn(c, next, first, old) }
	if len(rest) == 0 {
		return n.step(doing, add, nil)
	}
	if err := n.longStep(doing, add); err != nil {
		return err
	}
	for _, part := range rest {
		if err := n.longStep(doing,
			func(c *nftables.Conn) error { return addElements(c, part.set, part.elements) }); err != nil {
			return err
		}
	}
	return nil
}

// reserve counts the ranges of a policy that is to be put in force. It refuses the policy if all
// slots together would have too many: the kernel takes about 360 bytes for each, which no limit
// of a sandbox counts.
func (n *Network) reserve(r *slotRules, next *compiled) (release func(), err error) {
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	total := n.making + next.ranges()
	for _, other := range n.ruled {
		if now := other.now.Load(); other != r && now.policy != nil {
			total += now.policy.ranges()
		}
	}
	if total > n.maxRanges && next.ranges() > 0 {
		return nil, fault.New(fault.Unavailable, fault.CodeNoEgressCapacity,
			"the policies of this machine would have %d ranges in all, and may have %d", total, n.maxRanges).After(capacityRetry)
	}
	n.making += next.ranges()
	return func() {
		n.rulesMu.Lock()
		defer n.rulesMu.Unlock()
		n.making -= next.ranges()
	}, nil
}

func (r *compiled) ranges() int { return len(r.allow) + len(r.deny) }
