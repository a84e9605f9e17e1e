package sandbox_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// TestCordon checks that a cordoned machine refuses everything that would put another sandbox on it, keeps no pooled
// sandboxes, and lets those that run be used, until the cordon ends.
func TestCordon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		h := newPoolFixture(t, twoOfEach)
		running, asleep := h.persistent(0), h.suspended()
		snap := h.save(running, "")
		if n := len(h.settled()); n != 2 {
			t.Fatalf("%d pooled sandboxes, want 2", n)
		}
		h.SetCordon(true, 0)
		if n := len(h.settled()); n != 0 {
			t.Errorf("a cordoned machine keeps %d pooled sandboxes", n)
		}
		before, err := h.db.Living(ctx)
		if err != nil {
			t.Fatal(err)
		}
		create := func(r sandbox.Request) func() error {
			return func() error { _, err := h.create(r); return err }
		}
		for name, call := range map[string]func() error{
			"create":         create(sandbox.Request{}),
			"another create": create(sandbox.Request{Env: map[string]string{"A": "b"}}),
			"create from":    create(sandbox.Request{Snapshot: string(snap.ID)}),
			"fork": func() error {
				_, err := h.Fork(ctx, h.caller(), running, sandbox.ForkRequest{Count: 2})
				return err
			},
			"wake":            func() error { _, err := h.Wake(ctx, h.caller(), asleep); return err },
			"wake for a call": func() error { _, err := h.Connect(ctx, h.caller(), asleep, sandbox.ForCommand); return err },
		} {
			err := call()
			wantCode(t, err, fault.Unavailable, fault.CodeNoCapacity)
			if e := fault.As(err); e == nil || e.Detail != "this machine is cordoned" || e.RetryAfter == 0 {
				t.Errorf("%s: %v", name, err)
			}
		}
		h.call(running)
		pass(time.Hour)
		h.wantState(running, sandbox.Running, "")
		h.wantState(asleep, sandbox.Suspended, "")
		if after, err := h.db.Living(ctx); err != nil || len(after) != len(before) {
			t.Errorf("there are %d sandboxes and were %d, %v", len(after), len(before), err)
		}
		h.wantWhole()

		h.SetCordon(false, 0)
		h.mustWake(asleep)
		h.mustCreate(sandbox.Request{})
		if n := len(h.settled()); n != 2 {
			t.Errorf("%d pooled sandboxes after the cordon, want 2", n)
		}
		h.wantWhole()
	})
}

// TestCordonBeforeWarmClaim has the pool full when the machine is cordoned: a create gets none of its sandboxes, also
// before the pool has given them back.
func TestCordonBeforeWarmClaim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolFixture(t, fixed(2))
		h.settled()
		h.node.OnDestroy = func(context.Context, sandbox.ID) error { time.Sleep(time.Minute); return nil }
		h.SetCordon(true, 0)
		_, err := h.create(sandbox.Request{})
		wantCode(t, err, fault.Unavailable, fault.CodeNoCapacity)
	})
}

// TestCordonRepeatedCreate checks that a create whose answer was lost finds its sandbox with the same key, with and
// without a pool, and that another key makes none.
func TestCordonRepeatedCreate(t *testing.T) {
	for name, policy := range map[string]sandbox.PoolConfig{"pool": fixed(2), "no pool": {}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newPoolFixture(t, policy)
				h.settled()
				create := func(key string) (sandbox.Sandbox, error) {
					return h.Create(context.Background(), h.caller(), sandbox.Request{Template: "python"},
						sandbox.Once{Key: key, Hash: "body"}, true)
				}
				first, err := create("a")
				if err != nil {
					t.Fatal(err)
				}
				h.SetCordon(true, 0)
				again, err := create("a")
				if err != nil || again.ID != first.ID {
					t.Errorf("the repeated create gave %s, %v, not %s", again.ID, err, first.ID)
				}
				_, err = create("b")
				wantCode(t, err, fault.Unavailable, fault.CodeNoCapacity)
			})
		})
	}
}

// TestDrainFails checks that a drain tries a sandbox that cannot be suspended once a minute, since each try may pause
// it, and suspends the others.
func TestDrainFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		stuck, other := h.persistent(0), h.persistent(0)
		var tries atomic.Int64
		h.node.OnSuspend = func(_ context.Context, id sandbox.ID) error {
			if id != stuck {
				return nil
			}
			tries.Add(1)
			return errors.New("injected: the disk is full")
		}
		h.SetCordon(true, time.Hour)
		pass(10 * time.Minute)
		h.wantState(other, sandbox.Suspended, "")
		h.wantState(stuck, sandbox.Running, "")
		if n := tries.Load(); n < 5 || n > 11 {
			t.Errorf("tried %d times in ten minutes", n)
		}
	})
}

// TestDrain drains a machine: persistent sandboxes are suspended, four at a time, each when no call uses it, until the
// deadline. Ephemeral ones run to their ends.
func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		var all []sandbox.ID
		for range 10 {
			all = append(all, h.persistent(0))
		}
		used, busy := h.persistent(0), h.persistent(0)
		ephemeral := h.mustCreate(sandbox.Request{Timeout: ptr(10 * time.Minute)}).ID
		short, long := h.mustConnect(used), h.mustConnect(busy)
		var now, most atomic.Int64
		h.node.OnSuspend = func(context.Context, sandbox.ID) error {
			if n := now.Add(1); n > most.Load() {
				most.Store(n)
			}
			time.Sleep(time.Second)
			now.Add(-1)
			return nil
		}
		h.SetCordon(true, 5*time.Minute)
		pass(30 * time.Second)
		for _, id := range all {
			h.wantState(id, sandbox.Suspended, "")
			h.wantEvent(id, sandbox.Suspending, sandbox.Suspended, "requested", "")
			if h.get(id).Kept != sandbox.KeepAll {
				t.Errorf("sandbox %s keeps %q", id, h.get(id).Kept)
			}
		}
		if n := most.Load(); n < 2 || n > 4 { // those in use have up to two of the four turns
			t.Errorf("suspended %d at a time, want at most 4", n)
		}
		h.wantState(used, sandbox.Running, "")
		h.wantState(busy, sandbox.Running, "")
		h.wantState(ephemeral, sandbox.Running, "")
		short.Release()
		pass(15 * time.Second)
		h.wantState(used, sandbox.Suspended, "")

		pass(5 * time.Minute) // the deadline is over
		long.Release()
		pass(time.Minute)
		h.wantState(busy, sandbox.Running, "")
		h.wantState(ephemeral, sandbox.Running, "")
		pass(5 * time.Minute)
		h.wantState(ephemeral, sandbox.Destroyed, sandbox.Expired)
		_, err := h.Wake(context.Background(), h.caller(), used)
		wantCode(t, err, fault.Unavailable, fault.CodeNoCapacity)
		h.wantWhole()
	})
}

// TestDrainEnds ends a drain while sandboxes wait for their turn: these run on. A drain of a machine whose database is
// away goes on when it is back.
func TestDrainEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		for range 12 {
			h.persistent(0)
		}
		h.node.OnSuspend = func(context.Context, sandbox.ID) error { time.Sleep(time.Minute); return nil }
		h.SetCordon(true, time.Hour)
		pass(10 * time.Second)
		h.SetCordon(false, 0)
		pass(10 * time.Minute)
		suspended := func() (n int) {
			all, err := h.db.Unfinished(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			for _, sbx := range all {
				if sbx.State == sandbox.Suspended {
					n++
				}
			}
			return n
		}
		if n := suspended(); n != 4 {
			t.Errorf("%d sandboxes are suspended, want the 4 that had begun", n)
		}
		h.gate.away.Store(true)
		h.SetCordon(true, time.Hour)
		pass(time.Minute)
		h.gate.away.Store(false)
		pass(10 * time.Minute)
		if n := suspended(); n != 12 {
			t.Errorf("%d sandboxes are suspended, want 12", n)
		}
	})
}
