package network

import (
	"context"
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
)

func choose(t *testing.T, instance string, want netip.Prefix) string {
	t.Helper()
	p, err := Choose(t.Context(), instance, want)
	if err != nil {
		t.Fatal(err)
	}
	return p.String()
}

func TestChoose(t *testing.T) {
	caytest.RequireRoot(t)
	none := netip.Prefix{}
	if got := choose(t, "choose", none); got != "10.64.0.0/18" {
		t.Errorf("got %s, want the first candidate", got)
	}
	addAddress(t, "", uplink, "10.64.63.255/32")
	addRoute(t, "", uplink, "10.64.64.0/20", outsideAddr)
	if got := choose(t, "choose", none); got != "10.64.128.0/18" {
		t.Errorf("got %s, want the first block without an address or a route", got)
	}
	addRoute(t, "", uplink, "10.64.0.0/10", outsideAddr)
	if got := choose(t, "choose", none); got != "198.18.0.0/18" {
		t.Errorf("got %s, want a block outside of the routed network", got)
	}
	// A configured block may be part of a routed network, but must not contain addresses in use.
	if got := choose(t, "choose", netip.MustParsePrefix("10.70.0.0/18")); got != "10.70.0.0/18" {
		t.Errorf("got %s", got)
	}
	if _, err := Choose(t.Context(), "choose", netip.MustParsePrefix("10.64.0.0/16")); !isFault(err, "range_in_use") {
		t.Errorf("got %v, want range_in_use", err)
	}
}

func isFault(err error, code string) bool {
	f := fault.As(err)
	return f != nil && f.Code == code
}

func TestClaims(t *testing.T) {
	caytest.RequireRoot(t)
	first, block, err := take(t.Context(), "claim1", netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	second, other, err := take(t.Context(), "claim2", netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	if block.Overlaps(other) {
		t.Errorf("both have %s", block)
	}
	for want, p := range map[string]netip.Prefix{
		"range_in_use":    block,
		"instance_in_use": {},
	} {
		name := "claim3"
		if want == "instance_in_use" {
			name = "claim1"
		}
		if _, _, err := take(t.Context(), name, p); !isFault(err, want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
	if _, _, err := take(t.Context(), "claim3", netip.PrefixFrom(block.Addr(), 24)); !isFault(err, "range_in_use") {
		t.Errorf("a part of a claimed block: got %v, want range_in_use", err)
	}
	// One process ends as in a crash: its files stay and mean nothing.
	if err := first.close(); err != nil {
		t.Fatal(err)
	}
	if got := choose(t, "claim3", netip.Prefix{}); got != block.String() {
		t.Errorf("got %s, want the block that became free, %s", got, block)
	}
	unlock, err := lockClaims(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	err = second.release()
	unlock()
	if err != nil {
		t.Fatal(err)
	}
	if err := Purge("claim1"); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(lockDir + "/*")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) > 0 {
		t.Errorf("files of claims are left: %v", files)
	}
}

// TestLockOfRemovedFile checks that a process that waits for the lock while its file is removed
// gets a lock that excludes others.
func TestLockOfRemovedFile(t *testing.T) {
	unlock, err := lockClaims(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan func(), 1)
	go func() {
		next, err := lockClaims(t.Context())
		if err != nil {
			t.Error(err)
		}
		got <- next
	}()
	unlock() // removes the file, since there are no claims
	next := <-got
	defer next()
	if f, err := tryLock(claimLockName); err != nil || f != nil {
		t.Errorf("a third gets the lock too: %v, %v", f, err)
	}
}

// TestChooseOwnBlock checks that an instance with live sandboxes gets its block again.
func TestChooseOwnBlock(t *testing.T) {
	caytest.RequireRoot(t)
	c := newConfig()
	c.Range = netip.Prefix{}
	var first *Network
	t.Run("with the first candidate taken", func(t *testing.T) {
		addAddress(t, "", uplink, "10.64.0.1/32")
		var err error
		if first, err = Open(context.Background(), c, testLog(t)); err != nil {
			t.Fatal(err)
		}
		acquire(t, first)
		crash(t, first)
	})
	if first == nil {
		return
	}
	// No other instance gets the block meanwhile.
	if _, err := Choose(t.Context(), "others", first.Range()); !isFault(err, "range_in_use") {
		t.Errorf("a block with living slots: got %v, want range_in_use", err)
	}
	n := open(t, c)
	if n.Range() != first.Range() {
		t.Errorf("got %s, want the predecessor's %s", n.Range(), first.Range())
	}
	if _, err := n.Adopt(0); err != nil {
		t.Error(err)
	}
}

func TestLockClaimsWaits(t *testing.T) {
	caytest.RequireRoot(t)
	unlock, err := lockClaims(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*lockPoll)
	defer cancel()
	if _, err := lockClaims(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want to wait until the deadline", err)
	}
	time.AfterFunc(2*lockPoll, unlock)
	again, err := lockClaims(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	again()
}

func TestProbe(t *testing.T) {
	caytest.RequireRoot(t)
	bad := func() (out []string) {
		for _, f := range Probe() {
			if f.Detail == "" || f.OK != (f.Fix == "") {
				t.Errorf("finding %+v: want a detail, and what to do exactly if it is not OK", f)
			}
			if !f.OK {
				out = append(out, f.Name)
			}
		}
		return out
	}
	if got := bad(); len(got) != 0 {
		t.Errorf("%v are not OK here", got)
	}
	for hook, want := range map[string]string{"forward": "other firewalls, forwarding",
		"input": "other firewalls, input"} {
		runNFT(t, "table ip filter { chain C { type filter hook "+hook+" priority filter; policy drop; }; }")
		got := bad()
		runNFT(t, "delete table ip filter")
		if !slices.Equal(got, []string{want}) {
			t.Errorf("%v are not OK with another firewall's policy, want %s alone", got, want)
		}
	}
	left, err := Instances()
	if err != nil || len(left) != 0 {
		t.Errorf("instances after probing: %v, %v", left, err)
	}
}
