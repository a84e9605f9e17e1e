package network

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
)

const (
	// maxResolved is the number of resolved addresses that a slot may have open, about 0.1 MiB in
	// the kernel, which no limit of a sandbox counts. Only a program that asks for names to fill
	// memory needs more; beyond the limit the addresses that expire first are closed.
	maxResolved = 1024

	// expireEvery is the shortest time between two searches for expired addresses. Addresses may
	// stay open for that much longer; meanwhile the egress proxy, which knows the expiry of each
	// name, lets no connection through to them.
	expireEvery = time.Second
)

// opening gathers the answers of a slot that come while its rules are being changed, so that all
// of them become one change.
type opening struct {
	mu sync.Mutex
	// +checklocks:mu
	batch *batch
}

// batch is a set of addresses that are opened together.
type batch struct {
	until map[netip.Addr]time.Time // not changed any more once the batch is taken
	done  chan struct{}            // closed when they are open, or err is set
	err   error
}

// join adds addresses to the waiting batch. If there is none it begins one, and the caller must
// carry it out. It leaves out addresses beyond the limit of a slot.
func (o *opening) join(addrs []netip.Addr, until time.Time) (b *batch, first bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.batch == nil {
		o.batch, first = &batch{until: map[netip.Addr]time.Time{}, done: make(chan struct{})}, true
	}
	for _, a := range addrs {
		if a = a.Unmap(); a.Is4() && (len(o.batch.until) < maxResolved || !o.batch.until[a].IsZero()) &&
			o.batch.until[a].Before(until) {
			o.batch.until[a] = until
		}
	}
	return o.batch, first
}

// take takes the waiting batch; later answers begin another.
func (o *opening) take() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.batch = nil
}

// Resolve makes addresses reachable through the proxy for ttl, or for as long as they already are
// if that is longer. It changes nothing for a slot whose policy has no names. It leaves out IPv6
// addresses and those that no slot may reach. An address that is already open costs the kernel
// nothing, and answers that come together are one change.
func (n *Network) Resolve(s *Slot, addrs []netip.Addr, ttl time.Duration) error {
	r, err := n.rulesOf(s)
	if err != nil || !n.rules.proxies(r.now.Load()) {
		return err
	}
	b, first := r.opening.join(addrs, time.Now().Add(ttl))
	if !first {
		<-b.done
		return b.err
	}
	defer close(b.done)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.opening.take()
	b.err = n.openResolved(r, b.until)
	select {
	case n.expiring <- struct{}{}:
	default: // a search is due already
	}
	return b.err
}

// openResolved opens addresses until their times, and closes those that have expired.
//
// +checklocks:r.mu
func (n *Network) openResolved(r *slotRules, until map[netip.Addr]time.Time) error {
	if err := n.current(r); err != nil {
		return err
	}
	for try := 1; ; try++ {
		installed := n.installed.Load()
		e := r.now.Load()
		if !n.rules.proxies(e) {
			return nil
		}
		if again, err := n.again(try, installed, n.setResolved(r, merged(e.resolved, until, time.Now()))); !again {
			return err
		}
	}
}

// merged returns the union of open and more, without expired addresses.
func merged(open, more map[netip.Addr]time.Time, now time.Time) map[netip.Addr]time.Time {
	want := map[netip.Addr]time.Time{}
	for _, all := range []map[netip.Addr]time.Time{open, more} {
		for a, t := range all {
			if t.After(now) && want[a].Before(t) {
				want[a] = t
			}
		}
	}
	forgetSoonest(want, maxResolved)
	return want
}

// setResolved makes the open addresses those of want, with their times.
//
// +checklocks:r.mu
func (n *Network) setResolved(r *slotRules, want map[netip.Addr]time.Time) error {
	e := r.now.Load()
	var changes []netip.Addr
	have := map[netip.Addr]time.Time{} // the addresses that stay, with their new times
	for a := range e.resolved {
		if t, ok := want[a]; ok {
			have[a] = t
		} else {
			changes = append(changes, a)
		}
	}
	for a := range want {
		if _, ok := e.resolved[a]; !ok {
			changes = append(changes, a)
		}
	}
	set := n.rules.resolved(r.slot)
	for part := range slices.Chunk(changes, elementsPerChange) {
		var closed, opened []netip.Addr
		for _, a := range part {
			if _, ok := want[a]; ok {
				opened = append(opened, a)
			} else {
				closed = append(closed, a)
			}
		}
		if err := n.step("opening addresses in", func(c *nftables.Conn) error {
			if err := deleteElements(c, set, addressElements(closed)); err != nil {
				return err
			}
			return addElements(c, set, addressElements(opened))
		}, func() {
			next := *r.now.Load()
			next.resolved = maps.Clone(next.resolved)
			if next.resolved == nil {
				next.resolved = map[netip.Addr]time.Time{}
			}
			for _, a := range closed {
				delete(next.resolved, a)
			}
			for _, a := range opened {
				next.resolved[a] = want[a]
			}
			r.now.Store(&next)
		}); err != nil {
			return err
		}
	}
	// The kernel has no times, so an address that only stays open longer changes nothing there.
	n.installing.RLock()
	defer n.installing.RUnlock()
	next := *r.now.Load()
	next.resolved, next.soonest = want, time.Time{}
	for _, t := range want {
		if next.soonest.IsZero() || t.Before(next.soonest) {
			next.soonest = t
		}
	}
	r.now.Store(&next)
	return nil
}

// forgetSoonest leaves at most count addresses, those that expire last.
func forgetSoonest(resolved map[netip.Addr]time.Time, count int) {
	if len(resolved) <= count {
		return
	}
	order := slices.SortedFunc(maps.Keys(resolved), func(a, b netip.Addr) int { return resolved[a].Compare(resolved[b]) })
	for _, a := range order[:len(order)-count] {
		delete(resolved, a)
	}
}

func addressElements(addrs []netip.Addr) []nftables.SetElement {
	out := make([]nftables.SetElement, 0, len(addrs))
	for _, a := range addrs {
		out = append(out, nftables.SetElement{Key: a.AsSlice()})
	}
	return out
}

// expire closes expired addresses until ctx ends.
func (n *Network) expire(ctx context.Context) {
	var next <-chan time.Time // nil: no address is open
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.expiring:
			if next != nil {
				continue // the search at next will find them
			}
		case <-next:
		}
		next = nil
		if soonest := n.expireDue(time.Now()); !soonest.IsZero() {
			next = time.After(max(expireEvery, min(time.Until(soonest), checkInterval)))
		}
	}
}

// expireDue closes expired addresses and returns the time when the next one expires.
func (n *Network) expireDue(now time.Time) (soonest time.Time) {
	for _, r := range n.allRules() {
		e := r.now.Load()
		if !e.soonest.IsZero() && !e.soonest.After(now) {
			if err := n.closeExpired(r); err != nil && n.current(r) == nil {
				n.log.Error("closing addresses", "slot", r.slot.Index, "error", err)
			}
			e = r.now.Load()
		}
		if !e.soonest.IsZero() && (soonest.IsZero() || e.soonest.Before(soonest)) {
			soonest = e.soonest
		}
	}
	return soonest
}

func (n *Network) closeExpired(r *slotRules) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return n.openResolved(r, nil)
}
