package sandbox_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// persistent creates a sandbox with an idle timeout and without recovery points.
func (h *fixture) persistent(idle time.Duration) sandbox.ID {
	h.t.Helper()
	return h.mustCreate(sandbox.Request{Mode: "persistent", IdleTimeout: &idle,
		RecoveryInterval: ptr(time.Duration(0))}).ID
}

// suspended creates a sandbox without timers and suspends it.
func (h *fixture) suspended() sandbox.ID {
	h.t.Helper()
	id := h.persistent(0)
	h.mustSuspend(id)
	return id
}

func (h *fixture) mustSuspend(id sandbox.ID) {
	h.t.Helper()
	sbx, err := h.Suspend(context.Background(), org, id, sandbox.KeepAll)
	if err != nil || sbx.State != sandbox.Suspended {
		h.t.Fatalf("suspending: %s, %v", sbx.State, err)
	}
	h.wantState(id, sandbox.Suspended, "")
}

func (h *fixture) mustWake(id sandbox.ID) sandbox.Sandbox {
	h.t.Helper()
	sbx, err := h.Wake(context.Background(), h.caller(), id)
	if err != nil || sbx.State != sandbox.Running {
		h.t.Fatalf("waking: %s, %v", sbx.State, err)
	}
	h.wantState(id, sandbox.Running, "")
	return sbx
}

func (h *fixture) mustConnect(id sandbox.ID) *sandbox.Lease {
	h.t.Helper()
	lease, err := h.Connect(context.Background(), h.caller(), id, sandbox.ForCommand)
	if err != nil {
		h.t.Fatal(err)
	}
	return lease
}

// call makes a short call of a user.
func (h *fixture) call(id sandbox.ID) {
	h.t.Helper()
	h.mustConnect(id).Release()
}

func (h *fixture) latest(id sandbox.ID) sandbox.Event {
	h.t.Helper()
	events, _, err := h.Events(context.Background(), org, id, 1, "")
	if err != nil || len(events) == 0 {
		h.t.Fatal(events, err)
	}
	return events[0]
}

// wantEvent checks the latest event.
func (h *fixture) wantEvent(id sandbox.ID, from, to sandbox.State, reason, detail string) {
	h.t.Helper()
	if e := h.latest(id); e.From != from || e.To != to || e.Reason != reason || e.Detail != detail {
		h.t.Errorf("latest event is %+v, want %s to %s, %q, %q", e, from, to, reason, detail)
	}
}

// calls returns the number of calls of one kind to the node.
func (h *fixture) calls(what string, id sandbox.ID) (n int) {
	for _, call := range h.node.Calls() {
		if call == what+" "+string(id) {
			n++
		}
	}
	return n
}

// pass waits until the duration has passed on the bubble's clock.
func pass(d time.Duration) {
	barrier()
	time.Sleep(d)
	synctest.Wait()
}

func TestPersistentDefaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{Mode: "persistent"})
		if sbx.Mode != sandbox.Persistent || sbx.IdleTimeout != sandbox.DefaultIdleTimeout ||
			sbx.RecoveryInterval != sandbox.DefaultRecoveryInterval ||
			sbx.Timeout != 0 || !sbx.ExpiresAt.IsZero() || !sbx.LastActivityAt.Equal(sbx.StartedAt) {
			t.Errorf("unexpected sandbox %+v", sbx)
		}
		sbx = h.mustCreate(sandbox.Request{Mode: "persistent", IdleTimeout: ptr(time.Duration(0)),
			RecoveryInterval: ptr(time.Duration(0))})
		if sbx.IdleTimeout != 0 || sbx.RecoveryInterval != 0 {
			t.Errorf("never and off became %s and %s", sbx.IdleTimeout, sbx.RecoveryInterval)
		}
		pass(48 * time.Hour)
		h.wantState(sbx.ID, sandbox.Running, "") // an idle timeout of 0 means never
	})
}

func TestIdleSuspendsToTheMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(10 * time.Second)
		for range 3 { // each use restarts the idle time
			pass(9 * time.Second)
			h.call(id)
		}
		pass(9 * time.Second)
		h.mustWake(id) // a wake of a running sandbox does the same
		used := time.Now().UTC()
		pass(10*time.Second - time.Millisecond)
		h.wantState(id, sandbox.Running, "")
		pass(time.Millisecond)
		h.wantState(id, sandbox.Suspended, "")
		h.wantEvent(id, sandbox.Suspending, sandbox.Suspended, "idle", "")
		sbx := h.get(id)
		if !sbx.LastActivityAt.Equal(used.Truncate(time.Microsecond)) ||
			!sbx.SuspendedAt.Equal(time.Now().Add(0).UTC().Truncate(time.Microsecond)) {
			t.Errorf("last used %s, suspended %s", sbx.LastActivityAt, sbx.SuspendedAt)
		}
	})
}

func TestReadingIsNoActivity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(10 * time.Second)
		made := h.get(id).LastActivityAt
		for range 9 {
			pass(time.Second)
			if got := h.get(id).LastActivityAt; !got.Equal(made) {
				t.Errorf("reading moved the last activity to %s", got)
			}
			if _, _, err := h.List(context.Background(), sandbox.Filter{OrgID: org, Limit: 10}); err != nil {
				t.Fatal(err)
			}
			if _, _, err := h.Events(context.Background(), org, id, 10, ""); err != nil {
				t.Fatal(err)
			}
		}
		pass(time.Second)
		h.wantState(id, sandbox.Suspended, "")
		h.get(id)
		pass(time.Minute)
		h.wantState(id, sandbox.Suspended, "") // it does not wake the sandbox either
	})
}

func TestRunningCommandIsActivity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(10 * time.Second)
		first, second := h.mustConnect(id), h.mustConnect(id)
		pass(time.Hour)
		h.wantState(id, sandbox.Running, "")
		first.Release()
		pass(time.Hour)
		h.wantState(id, sandbox.Running, "")
		if got := h.get(id).LastActivityAt; !got.Equal(time.Now().UTC()) {
			t.Errorf("last activity of one in use is %s", got)
		}
		second.Release()
		pass(9 * time.Second)
		h.wantState(id, sandbox.Running, "")
		all, _, err := h.List(context.Background(), sandbox.Filter{OrgID: org, Limit: 10})
		if err != nil || len(all) != 1 || !all[0].LastActivityAt.Equal(time.Now().UTC().Add(-9*time.Second)) {
			t.Errorf("listed as %+v, %v", all, err)
		}
		pass(time.Second)
		h.wantState(id, sandbox.Suspended, "")
		if h.InUse() != 0 {
			t.Errorf("%d leases are left", h.InUse())
		}
	})
}

// TestCallsDoNotWrite checks that a call to a running sandbox writes nothing to the store, and that
// the activity of all sandboxes is written together, every two seconds.
func TestCallsDoNotWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ids := []sandbox.ID{h.persistent(0), h.persistent(0), h.mustCreate(sandbox.Request{}).ID}
		pass(3 * time.Second)
		before := h.gate.writes.Load()
		for range 1000 {
			for _, id := range ids {
				h.call(id)
			}
		}
		if n := h.gate.writes.Load() - before; n != 0 {
			t.Errorf("3000 calls made %d writes", n)
		}
		pass(2 * time.Second)
		if n := h.gate.writes.Load() - before; n != 1 {
			t.Errorf("the activity of two sandboxes made %d writes", n)
		}
		pass(time.Minute)
		if n := h.gate.writes.Load() - before; n != 1 {
			t.Errorf("doing nothing made %d writes", n-1)
		}
		lease := h.mustConnect(ids[0])
		before = h.gate.writes.Load()
		pass(time.Minute)
		if n := h.gate.writes.Load() - before; n != 30 {
			t.Errorf("a minute in use made %d writes, want one every 2 s", n)
		}
		lease.Release()
	})
}

func TestActivitySurvivesACrash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(10 * time.Second)
		lease := h.mustConnect(id)
		pass(31500 * time.Millisecond)
		used := time.Now()
		h.crash()
		lease.Release() // of the dead server
		pass(2 * time.Second)
		h.start()
		got := h.get(id).LastActivityAt
		if age := used.Sub(got); age < 0 || age > 5*time.Second {
			t.Errorf("after a crash the last activity is %s off", age)
		}
		pass(time.Until(got.Add(10*time.Second)) - time.Millisecond)
		h.wantState(id, sandbox.Running, "")
		pass(time.Millisecond)
		h.wantState(id, sandbox.Suspended, "")
	})
}

func TestCloseWritesActivity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(10 * time.Second)
		pass(2500 * time.Millisecond)
		h.call(id)
		used := time.Now().UTC().Truncate(time.Microsecond)
		if err := h.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
		if sbx, err := h.db.Get(context.Background(), id); err != nil || !sbx.LastActivityAt.Equal(used) {
			t.Errorf("the row says %s, %v; want %s", sbx.LastActivityAt, err, used)
		}
		pass(time.Hour)
		h.wantState(id, sandbox.Running, "") // a closed server suspends no sandbox
	})
}

// TestIdleWhileTheServerWasAway checks that a sandbox that became idle without a server is
// suspended soon, and that the start of the server does not wait for it.
func TestIdleWhileTheServerWasAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(time.Minute)
		h.crash()
		pass(time.Hour)
		h.node.OnSuspend = func(context.Context, sandbox.ID) error { time.Sleep(time.Minute); return nil }
		before := time.Now()
		h.start()
		if d := time.Since(before); d != 0 {
			t.Errorf("the start took %s", d)
		}
		pass(time.Minute)
		h.wantState(id, sandbox.Suspended, "")
	})
}

func TestRefusedWhenNotRunning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		ephemeral, asleep := h.mustCreate(sandbox.Request{}).ID, h.suspended()
		gone := h.persistent(0)
		if err := h.Destroy(ctx, org, gone); err != nil {
			t.Fatal(err)
		}
		h.node.OnCreate = func(context.Context, sandbox.Spec) error { time.Sleep(time.Second); return nil }
		starting, err := h.Create(ctx, h.caller(), sandbox.Request{Template: "python", Mode: "persistent"},
			sandbox.Once{}, false)
		if err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct {
			id   sandbox.ID
			code string
		}{
			{ephemeral, "sandbox_not_persistent"}, {asleep, "sandbox_not_running"}, {gone, "sandbox_not_running"}, {starting.ID, "sandbox_not_running"},
		} {
			_, err := h.Suspend(ctx, org, tt.id, sandbox.KeepAll)
			wantCode(t, err, fault.Conflict, tt.code)
			_, err = h.Checkpoint(ctx, org, tt.id)
			wantCode(t, err, fault.Conflict, tt.code)
		}
		for _, id := range []sandbox.ID{gone, starting.ID} {
			_, err := h.Wake(ctx, h.caller(), id)
			wantCode(t, err, fault.Conflict, "sandbox_not_running")
		}
		_, err = h.SetEgress(ctx, org, gone, sandbox.Egress{Mode: sandbox.AllowAll})
		wantCode(t, err, fault.Conflict, "sandbox_not_running")
		// A call waits for a create under way.
		lease, err := h.Connect(ctx, h.caller(), starting.ID, sandbox.ForCommand)
		if err != nil || lease.Sandbox.State != sandbox.Running {
			t.Fatalf("%v", err)
		}
		lease.Release()
		if sbx := h.mustWake(ephemeral); sbx.Mode != sandbox.Ephemeral {
			t.Errorf("woke %+v", sbx)
		}
		const other = "org_bbbbbbbbbbbbbbbbbbbb"
		_, err = h.Suspend(ctx, other, asleep, sandbox.KeepAll)
		wantCode(t, err, fault.Denied, "not_your_sandbox")
		_, err = h.Checkpoint(ctx, other, asleep)
		wantCode(t, err, fault.Denied, "not_your_sandbox")
		_, err = h.SetEgress(ctx, other, asleep, sandbox.Egress{Mode: sandbox.AllowAll})
		wantCode(t, err, fault.Denied, "not_your_sandbox")
		_, err = h.Wake(ctx, sandbox.Caller{OrgID: other}, asleep)
		wantCode(t, err, fault.Denied, "not_your_sandbox")
		_, err = h.Suspend(ctx, org, sandbox.NewID(), sandbox.KeepAll)
		wantCode(t, err, fault.NotFound, "sandbox_not_found")
	})
}
