package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/fault"
)

// within fails the test if f does not return before the deadline.
func within(t *testing.T, what string, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("%s waits for another slot", what)
	}
}

// TestChangesOfOneSlotDelayNoOther checks that no lock of all slots is held while one slot is
// being changed.
func TestChangesOfOneSlotDelayNoOther(t *testing.T) {
	c := newConfig()
	c.Services = Services{DNS: 5301, Proxy: 5302}
	n := open(t, c)
	busy, other := acquire(t, n), acquire(t, n)
	setPolicy(t, n, other, Policy{Names: true})
	r, err := n.rulesOf(busy)
	if err != nil {
		t.Fatal(err)
	}
	r.mu.Lock() // as in the middle of a change of many transactions
	n.long.Lock()
	defer func() {
		n.long.Unlock()
		r.mu.Unlock()
	}()
	within(t, "another policy", func() error {
		return n.SetPolicy(t.Context(), other, Policy{Names: true, Allow: prefixes("203.0.113.0/24")})
	})
	within(t, "another answer", func() error { return n.Resolve(other, []netip.Addr{farAddr}, time.Hour) })
	within(t, "a slot", func() error {
		s, err := n.Acquire(t.Context())
		return errors.Join(err, n.Release(t.Context(), s))
	})
	within(t, "counting", func() error { _, err := n.Counters(busy); return err })
	runNFT(t, "add table inet foreign; delete table inet foreign") // otherwise Check has nothing to compare
	within(t, "a check", func() error {
		repaired, err := n.Check(t.Context())
		return errors.Join(err, map[bool]error{true: errors.New("it repaired")}[repaired])
	})
}

// TestCountingWaitsForNoListing checks that the counters of a slot are read while the rules of all slots, or tracked
// connections, are listed.
func TestCountingWaitsForNoListing(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	udpRoundTrip(t, s)
	sockets := &n.rules.sockets
	sockets.lists.mu.Lock()
	defer sockets.lists.mu.Unlock()
	sockets.tracked.mu.Lock()
	defer sockets.tracked.mu.Unlock()
	within(t, "counting", func() error {
		if c, err := n.Counters(s); err != nil || c.AllowedPackets == 0 || c.AllowedBytes == 0 || c.DeniedPackets != 0 {
			return fmt.Errorf("counted %+v, %w", c, err)
		}
		return nil
	})
}

// sent returns the number of successful transactions.
func sent(n *Network) uint32 {
	n.rules.sockets.changes.mu.Lock()
	defer n.rules.sockets.changes.mu.Unlock()
	return n.rules.sockets.changes.sent
}

// TestAnswersAreBatched checks that answers that come together are one transaction, and that
// addresses that are already open cause none.
func TestAnswersAreBatched(t *testing.T) {
	c := newConfig()
	c.Services = Services{DNS: 5301, Proxy: 5302}
	n := open(t, c)
	s := acquire(t, n)
	setPolicy(t, n, s, Policy{Names: true})
	answer := func(i int) (addrs []netip.Addr) {
		for k := range 10 {
			addrs = append(addrs, addrOf(30<<24+uint32(10*i+k)))
		}
		return addrs
	}
	r, err := n.rulesOf(s)
	if err != nil {
		t.Fatal(err)
	}
	const answers = 50
	before := sent(n)
	r.mu.Lock()
	var group sync.WaitGroup
	for i := range answers {
		group.Go(func() {
			if err := n.Resolve(s, answer(i), time.Hour); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, func() error {
		r.opening.mu.Lock()
		defer r.opening.mu.Unlock()
		if r.opening.batch == nil || len(r.opening.batch.until) < 10*answers {
			return errors.New("not all answers wait")
		}
		return nil
	})
	r.mu.Unlock()
	group.Wait()
	if got := sent(n) - before; got != 1 {
		t.Errorf("%d answers were %d transactions, want 1", answers, got)
	}
	keys, err := n.rules.keys(n.rules.resolved(s))
	if err != nil || len(keys) != 10*answers {
		t.Errorf("%d addresses are open, %v, want %d", len(keys), err, 10*answers)
	}
	before = sent(n)
	for i := range answers {
		if err := n.Resolve(s, answer(i), 2*time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	if got := sent(n) - before; got != 0 {
		t.Errorf("answers that were there before were %d transactions, want none", got)
	}
	if left := time.Until(inForce(t, n, s).resolved[addrOf(30<<24)]); left < time.Hour {
		t.Errorf("what was answered again is open for %v only", left)
	}
}

// TestResolvedIsBounded checks that a slot has at most maxResolved addresses open, and that those
// that expire last stay.
func TestResolvedIsBounded(t *testing.T) {
	c := newConfig()
	c.Services = Services{DNS: 5301, Proxy: 5302}
	n := open(t, c)
	s := acquire(t, n)
	setPolicy(t, n, s, Policy{Names: true})
	for i := range 3 {
		var addrs []netip.Addr
		for k := range maxResolved {
			addrs = append(addrs, addrOf(30<<24+uint32(i*maxResolved+k)))
		}
		if err := n.Resolve(s, addrs, time.Hour+time.Duration(i)*time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	keys, err := n.rules.keys(n.rules.resolved(s))
	if err != nil || len(keys) != maxResolved {
		t.Fatalf("%d addresses are open, %v, want %d", len(keys), err, maxResolved)
	}
	if got := binary.BigEndian.Uint32(keys[0]); got != 30<<24+2*maxResolved {
		t.Errorf("the first is %s, want the last answer's", addrOf(got))
	}
	if repaired, err := n.Check(t.Context()); repaired || err != nil {
		t.Errorf("repaired %v, %v", repaired, err)
	}
}

// heard counts the elements of each transaction on a table, from the kernel's own notices. stop
// returns the most of one transaction and the number of transactions.
func heard(t *testing.T, table string) (stop func() (most, transactions int)) {
	t.Helper()
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(c.SetReadBuffer(256<<20), c.JoinGroup(unix.NFNLGRP_NFTABLES)); err != nil {
		t.Fatal(err)
	}
	var most, transactions, now int
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			messages, err := c.Receive()
			if err != nil {
				return
			}
			for _, m := range messages {
				switch m.Header.Type & 0xff {
				case unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
					now += elementsOf(m.Data, table)
				case unix.NFT_MSG_NEWGEN:
					transactions++
					most, now = max(most, now), 0
				}
			}
		}
	}()
	return func() (int, int) {
		time.Sleep(100 * time.Millisecond) // for the last notices; without it fewer are counted
		c.Close()
		<-done
		return most, transactions
	}
}

func elementsOf(data []byte, table string) (count int) {
	d, err := netlink.NewAttributeDecoder(data[headerLength:])
	if err != nil {
		return 0
	}
	ours := false
	for d.Next() {
		switch d.Type() {
		case unix.NFTA_SET_ELEM_LIST_TABLE:
			ours = d.String() == table
		case unix.NFTA_SET_ELEM_LIST_ELEMENTS:
			d.Nested(func(d *netlink.AttributeDecoder) error {
				for d.Next() {
					count++
				}
				return nil
			})
		}
	}
	if !ours {
		return 0
	}
	return count
}

// TestTransactionsAreSmall checks that a long policy is put in force in transactions of bounded
// size, so that others come between.
func TestTransactionsAreSmall(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	stop := heard(t, n.rules.table.Name)
	p := longPolicy(10_000)
	p.Deny = prefixes("20.0.0.0/25")
	setPolicy(t, n, s, p)
	most, transactions := stop()
	if most > elementsPerChange || most < elementsPerChange/2 {
		t.Errorf("a transaction has %d elements, want at most %d", most, elementsPerChange)
	}
	if least := 2 * 10_000 / elementsPerChange; transactions < least {
		t.Errorf("%d transactions were heard, want at least %d: the test proves nothing", transactions, least)
	}
}

// TestRangesAreBounded checks that the kernel's memory for ranges is bounded for all slots
// together.
func TestRangesAreBounded(t *testing.T) {
	c := newConfig()
	c.MaxRanges = 100
	n := open(t, c)
	one, two := acquire(t, n), acquire(t, n)
	setPolicy(t, n, one, longPolicy(60))
	setPolicy(t, n, one, longPolicy(100)) // its own ranges are replaced
	if err := n.SetPolicy(t.Context(), two, longPolicy(1)); !fault.Is(err, fault.Unavailable) {
		t.Errorf("over the bound: %v, want Unavailable", err)
	}
	udpRoundTrip(t, two) // the old policy is in force
	setPolicy(t, n, two, Policy{})
	setPolicy(t, n, one, longPolicy(50))
	setPolicy(t, n, two, longPolicy(50))
	if err := n.Release(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	setPolicy(t, n, two, longPolicy(100))
}

// TestChangesAtOnce changes, makes and releases slots at once, while another program changes
// other rules of the host. Nothing counts as damage. If the table is removed meanwhile, all of it
// comes back.
func TestChangesAtOnce(t *testing.T) {
	for name, disturb := range map[string]string{
		"others' rules": "add table inet foreign; delete table inet foreign",
		"our rules":     "flush ruleset",
	} {
		t.Run(name, func(t *testing.T) {
			c := newConfig()
			c.Services = Services{DNS: 5301, Proxy: 5302}
			n := open(t, c)
			ctx, cancel := context.WithCancel(t.Context())
			var group sync.WaitGroup
			var slots []*Slot
			for i := range 3 {
				s := acquire(t, n)
				slots = append(slots, s)
				group.Go(func() {
					for k := 0; ctx.Err() == nil; k++ {
						p := longPolicy(k % 3 * 450)
						p.Names = k%2 == 0
						p.Deny = prefixes("203.0.113.128/25")
						if err := n.SetPolicy(t.Context(), s, p); err != nil {
							t.Errorf("slot %d, change %d: %v", i, k, err)
						}
					}
				})
				group.Go(func() {
					for k := 0; ctx.Err() == nil; k++ {
						addrs := []netip.Addr{addrOf(30<<24 + uint32(k)), addrOf(31<<24 + uint32(k%7))}
						if err := n.Resolve(s, addrs, time.Duration(k%5)*50*time.Millisecond); err != nil {
							t.Errorf("slot %d, answer %d: %v", i, k, err)
						}
						time.Sleep(time.Millisecond)
					}
				})
			}
			group.Go(func() {
				for ctx.Err() == nil {
					s, err := n.Acquire(t.Context())
					if err == nil {
						err = n.Release(t.Context(), s)
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
			for range 10 {
				runNFT(t, disturb)
				if _, err := n.Check(t.Context()); err != nil {
					t.Error(err)
				}
				time.Sleep(100 * time.Millisecond) // a change is tried a few times only
			}
			cancel()
			group.Wait()
			if got := n.Repairs(); (got > 0) != (name == "our rules") {
				t.Errorf("%d repairs", got)
			}
			if _, err := n.Check(t.Context()); err != nil {
				t.Error(err)
			}
			if found, err := n.difference(); found != "" || err != nil {
				t.Errorf("at last %s, %v", found, err)
			}
			for _, s := range slots {
				setPolicy(t, n, s, Policy{Allow: prefixes("203.0.113.0/24")})
				if e := inForce(t, n, s); e.shape == nil {
					t.Error("a policy without a shape")
				}
				udpRoundTrip(t, s)
			}
			if t.Failed() {
				t.Log(fmt.Sprint(listTable(t, n.rules.table.Name)))
			}
		})
	}
}
