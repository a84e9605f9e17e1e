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
	// maxResolved bounds how many resolved addresses a slot has open: about 0.1 MiB in
	// the kernel, which no limit of a sandbox counts. More need a program that asks for
	// names to fill memory; the ones that end first go.
	maxResolved = 1024

	// expireEvery is how often addresses whose time is over are closed, at most: they
	// are open for so much longer than was said. The gate, which knows the name of each,
	// lets nothing on to them meanwhile.
	expireEvery = time.Second
)

// opening gathers the answers of a slot that come while its rules are being changed, so
// that all of them become one change.
type opening struct {
	mu sync.Mutex
	// +checklocks:mu
	batch *batch
}

// batch is a set of addresses that are to be opened together.
type batch struct {
	until map[netip.Addr]time.Time // not changed any more once it is taken
	done  chan struct{}            // closed when they are open, or err says why not
	err   error
}

// join adds addresses to the batch that waits, or begins one: then the caller carries it
// out. Addresses over what a slot may have are left out.
func (o *opening) join(addrs []netip.Addr, until time.Time) (b *batch, first bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.batch == nil {
		o.batch, first = &batch{until: map[netip.Addr]time.Time{}, done: make(chan struct{})}, true
	}
	for _, a := range addrs {
		if a = a.Unmap(); a.Is4() && (len(o.batch.until) < maxResolved || !o.batch.until[a].IsZero()) && o.batch.until[a].Before(until) {
			o.batch.until[a] = until
		}
	}
	return o.batch, first
}

// take ends the batch that waits: what comes from now on begins another.
func (o *opening) take() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.batch = nil
}

// Resolve makes addresses reachable through the proxy for ttl, or as long as they
// already are if that is longer. It changes nothing for a slot whose policy has
// no names. IPv6 addresses and those that no slot reaches are left out. What is open
// already costs the kernel nothing, and answers that come together are one change.
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
	default: // it will look
	}
	return b.err
}

// openResolved opens addresses until their time, and closes those whose time is over.
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

// merged returns what is open and is to be, without what is over.
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
	have := map[netip.Addr]time.Time{} // what stays, with its new time
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
	// The kernel knows of no times: what is only open for longer is no change to it.
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

// forgetSoonest leaves at most count addresses, those that last longest.
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

// expire closes addresses whose time is over, until ctx ends.
func (n *Network) expire(ctx context.Context) {
	var next <-chan time.Time // nil: nothing is open
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.expiring:
			if next != nil {
				continue // it will be seen then
			}
		case <-next:
		}
		next = nil
		if soonest := n.expireDue(time.Now()); !soonest.IsZero() {
			next = time.After(max(expireEvery, min(time.Until(soonest), checkInterval)))
		}
	}
}

// expireDue closes what is due and returns when the next is.
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
