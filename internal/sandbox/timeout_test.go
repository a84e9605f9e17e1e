package sandbox_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// pausing creates an ephemeral sandbox that is suspended at its end.
func (h *fixture) pausing(timeout time.Duration) sandbox.ID {
	h.t.Helper()
	return h.mustCreate(sandbox.Request{Timeout: &timeout, AtEnd: sandbox.EndSuspends, FrontData: "kept"}).ID
}

func TestEndSuspends(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.pausing(time.Minute)
		lease := h.mustConnect(id) // a lease does not keep it
		pass(time.Minute)
		h.wantState(id, sandbox.Suspended, "")
		h.wantEvent(id, sandbox.Suspending, sandbox.Suspended, "expired", "")
		lease.Release()
		if sbx := h.get(id); !sbx.ExpiresAt.IsZero() || sbx.FrontData != "kept" || sbx.SuspendedAt.IsZero() ||
			!sbx.LastActivityAt.IsZero() {
			t.Errorf("the row is %+v", sbx)
		}
		pass(48 * time.Hour)
		h.wantState(id, sandbox.Suspended, "")

		// A wake gives it its own timeout, or the requested one.
		sbx := h.mustWake(id)
		if left := time.Until(sbx.ExpiresAt); left != time.Minute {
			t.Errorf("it has %s", left)
		}
		h.mustPause(id)
		sbx, err := h.WakeFor(context.Background(), h.caller(), id, time.Hour)
		if left := time.Until(sbx.ExpiresAt); err != nil || left != time.Hour || sbx.Timeout != time.Hour {
			t.Errorf("it has %s of %s, %v", left, sbx.Timeout, err)
		}
		pass(time.Hour)
		h.wantState(id, sandbox.Suspended, "")
		if err := h.Destroy(context.Background(), org, id); err != nil {
			t.Error(err)
		}
		h.wantState(id, sandbox.Destroyed, sandbox.Requested)
	})
}

func (h *fixture) mustPause(id sandbox.ID) {
	h.t.Helper()
	if sbx, err := h.Pause(context.Background(), org, id, sandbox.KeepAll); err != nil || sbx.State != sandbox.Suspended {
		h.t.Fatalf("pausing: %s, %v", sbx.State, err)
	}
}

func TestPauseOfEitherModeInUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ephemeral := h.mustCreate(sandbox.Request{}).ID
		for _, id := range []sandbox.ID{ephemeral, h.persistent(time.Hour)} {
			lease := h.mustConnect(id)
			h.mustPause(id)
			_, err := h.Pause(context.Background(), org, id, sandbox.KeepAll)
			wantCode(t, err, fault.Conflict, "sandbox_not_running")
			_, err = h.Attach(context.Background(), id)
			wantCode(t, err, fault.Conflict, "sandbox_not_running")
			lease.Release() // late, and without effect
			h.mustWake(id)
			again, err := h.Attach(context.Background(), id)
			if err != nil {
				t.Fatal(err)
			}
			if again.Sandbox.Run == lease.Sandbox.Run {
				t.Error("it was leased in a run that is over")
			}
			again.Release()
		}
		if n := h.InUse(); n != 0 {
			t.Errorf("%d leases are left", n)
		}
		// It behaves as the v1 API promises for an ephemeral sandbox.
		_, err := h.Suspend(context.Background(), org, ephemeral, sandbox.KeepAll)
		wantCode(t, err, fault.Conflict, "sandbox_not_persistent")
		_, err = h.Pause(context.Background(), "org_other", ephemeral, sandbox.KeepAll)
		wantCode(t, err, fault.Denied, "not_your_sandbox")
	})
}

// TestEndThatCannotSuspend checks that the sandbox keeps running, and that its suspend is retried
// after a pause.
func TestEndThatCannotSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.pausing(10 * time.Second)
		h.node.OnSuspend = func(context.Context, sandbox.ID) error { return diskFull }
		pass(10 * time.Second)
		h.wantState(id, sandbox.Running, "")
		h.call(id)
		pass(time.Minute - time.Second)
		if n := h.calls("suspend", id); n != 1 {
			t.Errorf("tried %d times within a minute", n)
		}
		h.node.OnSuspend = nil
		pass(2 * time.Second)
		h.wantState(id, sandbox.Suspended, "")
	})
}

func TestSetTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		set := func(id sandbox.ID, timeout time.Duration, later bool, want time.Duration) {
			t.Helper()
			sbx, err := h.SetTimeout(ctx, org, id, timeout, later)
			if left := time.Until(sbx.ExpiresAt); err != nil || left != want {
				t.Errorf("it has %s, want %s; %v", left, want, err)
			}
		}
		id := h.mustCreate(sandbox.Request{Timeout: ptr(time.Hour)}).ID
		set(id, time.Minute, true, time.Hour)
		set(id, time.Minute, false, time.Minute)
		set(id, 2*time.Minute, true, 2*time.Minute)
		_, err := h.SetTimeout(ctx, org, id, sandbox.MaxTimeout+1, false)
		wantCode(t, err, fault.Invalid, "invalid_timeout")
		_, err = h.SetTimeout(ctx, "org_other", id, time.Minute, false)
		wantCode(t, err, fault.Denied, "not_your_sandbox")
		pass(2*time.Minute - time.Second)
		h.wantState(id, sandbox.Running, "")
		pass(time.Second)
		h.wantState(id, sandbox.Destroyed, sandbox.Expired)
		_, err = h.SetTimeout(ctx, org, id, time.Minute, true)
		wantCode(t, err, fault.Conflict, "sandbox_not_running")

		// A timeout of 0 takes effect at once for every AtEnd.
		now := h.mustCreate(sandbox.Request{Timeout: ptr(time.Hour)}).ID
		set(now, -time.Second, false, 0)
		synctest.Wait()
		h.wantState(now, sandbox.Destroyed, sandbox.Expired)
		asleep := h.pausing(time.Hour)
		set(asleep, 0, false, 0)
		synctest.Wait()
		h.wantState(asleep, sandbox.Suspended, "")
		if sbx := h.mustWake(asleep); time.Until(sbx.ExpiresAt) != time.Hour {
			t.Errorf("woken for %s", time.Until(sbx.ExpiresAt))
		}
		_, err = h.SetTimeout(ctx, org, h.persistent(time.Hour), time.Minute, false)
		wantCode(t, err, fault.Conflict, "sandbox_not_ephemeral")
	})
}

// TestEndAcrossRestarts checks that a server handles the ends that were due before it started, and
// finds a paused sandbox paused.
func TestEndAcrossRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		due, paused, dies := h.pausing(time.Minute), h.pausing(time.Minute), h.pausing(time.Hour)
		h.mustPause(paused)
		h.mustPause(dies)
		h.mustWake(dies)
		h.crash()
		time.Sleep(2 * time.Minute)
		h.node.Kill(dies)
		h.start()
		pass(time.Second)
		h.wantState(due, sandbox.Suspended, "")
		h.wantState(paused, sandbox.Suspended, "")
		// It was paused once, so it falls back to that checkpoint.
		h.wantState(dies, sandbox.Suspended, "")
		for _, id := range []sandbox.ID{due, paused, dies} {
			if sbx := h.mustWake(id); sbx.ExpiresAt.IsZero() {
				t.Errorf("%s never ends", id)
			}
		}
	})
}

func TestEndRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		_, err := h.create(sandbox.Request{AtEnd: "explode"})
		wantCode(t, err, fault.Invalid, "invalid_at_end")
		_, err = h.create(sandbox.Request{Mode: "persistent", AtEnd: sandbox.EndSuspends})
		wantCode(t, err, fault.Invalid, "invalid_at_end")
	})
}

// TestEndSuspendsFiles suspends sandboxes without memory, at their end and by a call. What a suspend keeps
// is in the row, also after a fall back.
func TestEndSuspendsFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		minute := time.Minute
		id := h.mustCreate(sandbox.Request{Timeout: &minute, AtEnd: sandbox.EndSuspendsFiles}).ID
		kept := func(want sandbox.Kept) {
			t.Helper()
			if sbx := h.get(id); sbx.State != sandbox.Suspended || sbx.Kept != want {
				t.Errorf("it is %s and keeps %q, want %q", sbx.State, sbx.Kept, want)
			}
		}
		h.node.Work(id)
		pass(time.Minute)
		kept(sandbox.KeepFiles)
		h.wantEvent(id, sandbox.Suspending, sandbox.Suspended, "expired", "keeps its files alone")
		h.mustWake(id)
		if busy, err := h.node.Busy(context.Background(), id); err != nil || busy {
			t.Errorf("after the boot it is busy: %v, %v", busy, err)
		}
		h.mustPause(id)
		kept(sandbox.KeepAll)
		h.mustWake(id)
		if _, err := h.Pause(context.Background(), org, id, sandbox.KeepFiles); err != nil {
			t.Fatal(err)
		}
		kept(sandbox.KeepFiles)
		h.mustWake(id)
		h.node.Die(id)
		synctest.Wait()
		kept(sandbox.KeepFiles)
		if err := h.Destroy(context.Background(), org, id); err != nil {
			t.Error(err)
		}
	})
}

// TestEndThatCannotKeepFiles ends the timeout of a sandbox whose files cannot be kept alone. It is suspended
// with its memory, and a call that asks for the files alone is an error.
func TestEndThatCannotKeepFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		minute := time.Minute
		id := h.mustCreate(sandbox.Request{Timeout: &minute, AtEnd: sandbox.EndSuspendsFiles}).ID
		h.node.OnSuspend = func(context.Context, sandbox.ID) error {
			h.node.OnSuspend = nil // the next one works
			return diskFull
		}
		_, err := h.Pause(context.Background(), org, id, sandbox.KeepFiles)
		wantCode(t, err, fault.NoSpace, "disk_full")
		h.wantState(id, sandbox.Running, "")
		h.node.OnSuspend = func(context.Context, sandbox.ID) error {
			h.node.OnSuspend = nil
			return diskFull
		}
		pass(time.Minute)
		if sbx := h.get(id); sbx.State != sandbox.Suspended || sbx.Kept != sandbox.KeepAll {
			t.Errorf("it is %s and keeps %q", sbx.State, sbx.Kept)
		}
		h.wantEvent(id, sandbox.Suspending, sandbox.Suspended, "expired",
			"keeps its memory too, since its files alone could not be kept")
		if n := h.calls("suspend", id); n != 3 {
			t.Errorf("tried %d times, want 3", n)
		}
	})
}
