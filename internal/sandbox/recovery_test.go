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

func (h *fixture) mustCheckpoint(id sandbox.ID) sandbox.Checkpoint {
	h.t.Helper()
	checkpoint, err := h.Checkpoint(context.Background(), org, id)
	if err != nil || checkpoint.Size == 0 || checkpoint.At.IsZero() {
		h.t.Fatalf("%+v, %v", checkpoint, err)
	}
	return checkpoint
}

func TestCheckpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(0)
		lease := h.mustConnect(id) // calls in flight do not prevent it
		h.node.OnCheckpoint = func(context.Context, sandbox.ID) error { time.Sleep(3 * time.Second); return nil }
		made := make(chan sandbox.Checkpoint, 3)
		for range cap(made) {
			go func() { made <- h.mustCheckpoint(id) }()
		}
		synctest.Wait()
		began := time.Now()
		h.call(id) // and it does not block calls
		h.mustWake(id)
		if d := time.Since(began); d != 0 {
			t.Errorf("a call waited %s for a checkpoint", d)
		}
		lease.Release()
		// A suspend waits for the checkpoint and then continues.
		h.mustSuspend(id)
		if d := time.Since(began); d != 3*time.Second {
			t.Errorf("suspended after %s", d)
		}
		first := <-made
		for range cap(made) - 1 {
			if p := <-made; p != first {
				t.Errorf("recovery points %+v and %+v", first, p)
			}
		}
		if n := h.calls("checkpoint", id); n != 1 {
			t.Errorf("%d checkpoints", n)
		}
		events, _, err := h.Events(context.Background(), org, id, 10, "")
		if err != nil || len(events) != 4 { // creating, running, suspending, suspended
			t.Errorf("events are %+v, %v", events, err)
		}
	})
}

func TestCheckpointThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		id := h.persistent(0)
		checkpoint := h.mustCheckpoint(id)
		h.node.OnCheckpoint = func(context.Context, sandbox.ID) error { return diskFull }
		_, err := h.Checkpoint(ctx, org, id)
		wantCode(t, err, fault.NoSpace, "disk_full")
		h.wantState(id, sandbox.Running, "")
		pass(time.Minute)
		h.node.OnCheckpoint = func(context.Context, sandbox.ID) error { h.node.Kill(id); return errors.New("injected") }
		_, err = h.Checkpoint(ctx, org, id)
		wantCode(t, err, fault.Internal, "checkpoint_failed")
		h.wantState(id, sandbox.Suspended, "")
		h.wantEvent(id, sandbox.Running, sandbox.Suspended, "lost",
			"fell back to the recovery point of "+checkpoint.At.Format(time.RFC3339))
	})
}

func TestRecoveryPoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.mustCreate(sandbox.Request{Mode: "persistent", IdleTimeout: ptr(time.Duration(0)),
			RecoveryInterval: ptr(time.Minute)}).ID
		off := h.persistent(0)
		want := func(n int) {
			t.Helper()
			if got := h.calls("checkpoint", id); got != n {
				t.Errorf("%d recovery points, want %d", got, n)
			}
		}
		pass(5*time.Second - time.Millisecond)
		want(0)
		pass(time.Millisecond)
		want(1) // even without use: it had no recovery point at all
		pass(10 * time.Minute)
		want(1) // no change
		h.call(id)
		pass(time.Minute)
		want(2)
		pass(10 * time.Minute)
		want(2)
		lease := h.mustConnect(id) // a call in flight may change things all the time
		pass(3 * time.Minute)
		want(5)
		lease.Release()
		pass(time.Minute)
		want(6)
		var busy atomic.Bool
		h.node.OnBusy = func(context.Context, sandbox.ID) (bool, error) { return busy.Load(), nil }
		pass(2 * time.Minute)
		want(6)
		busy.Store(true)
		pass(2 * time.Minute)
		want(8)
		h.node.OnBusy = func(context.Context, sandbox.ID) (bool, error) { return false, errors.New("injected") }
		pass(time.Minute)
		want(9) // if the node cannot tell, it may have changed
		h.node.OnBusy = nil
		h.node.OnCheckpoint = func(context.Context, sandbox.ID) error { return diskFull }
		h.call(id)
		pass(2 * time.Minute)
		want(11) // a failed one is tried again, an interval later
		h.node.OnCheckpoint = nil
		pass(time.Minute)
		want(12)
		pass(5 * time.Minute)
		want(12)
		pass(30 * time.Second)
		h.call(id)
		h.mustCheckpoint(id) // a requested one counts
		pass(time.Minute)
		want(13)
		if n := h.calls("checkpoint", off); n != 0 {
			t.Errorf("%d recovery points of one that wants none", n)
		}
		h.mustSuspend(id)
		pass(10 * time.Minute)
		want(13)
		h.mustWake(id)
		pass(10 * time.Minute)
		want(13) // no change after the wake
	})
}

// TestRecoveryPointsAfterARestart checks that intervals continue, and that many recovery points that are due
// do not use the disk together.
// TestSilentAgentsDelayNoRecoveryPoints checks that sandboxes whose agents do not say whether they are busy
// delay the recovery points of no other sandbox.
func TestSilentAgentsDelayNoRecoveryPoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		made := func() sandbox.ID {
			return h.mustCreate(sandbox.Request{Mode: "persistent", IdleTimeout: ptr(time.Duration(0)),
				RecoveryInterval: ptr(time.Minute)}).ID
		}
		honest := made()
		h.node.OnBusy = func(ctx context.Context, id sandbox.ID) (bool, error) {
			if id == honest {
				return false, nil
			}
			<-ctx.Done()
			return false, ctx.Err()
		}
		for range 16 {
			made()
		}
		const minutes = 10
		for range minutes {
			h.call(honest)
			pass(time.Minute)
		}
		if n := h.calls("checkpoint", honest); n < minutes {
			t.Errorf("%d recovery points in %d minutes, want one a minute", n, minutes)
		}
	})
}

func TestRecoveryPointsAfterARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		for range 10 {
			h.mustCreate(sandbox.Request{Mode: "persistent", IdleTimeout: ptr(time.Duration(0)),
				RecoveryInterval: ptr(time.Minute)})
		}
		pass(30 * time.Second)
		h.crash()
		h.start()
		var now, most, all atomic.Int64
		h.node.OnCheckpoint = func(context.Context, sandbox.ID) error {
			most.Store(max(most.Load(), now.Add(1)))
			all.Add(1)
			time.Sleep(time.Second)
			now.Add(-1)
			return nil
		}
		pass(35*time.Second - time.Millisecond) // after the first recovery points, at 5 s
		if all.Load() != 0 {
			t.Errorf("%d recovery points before they were due", all.Load())
		}
		pass(10 * time.Second)
		if all.Load() != 10 || most.Load() != 2 {
			t.Errorf("%d recovery points, %d at a time", all.Load(), most.Load())
		}
	})
}

func TestLostFallsBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(time.Hour)
		checkpoint := h.mustCheckpoint(id)
		pass(90 * time.Second)
		lease := h.mustConnect(id)
		h.node.Die(id)
		synctest.Wait()
		h.wantState(id, sandbox.Suspended, "")
		h.wantEvent(id, sandbox.Running, sandbox.Suspended, "lost",
			"fell back to the recovery point of "+checkpoint.At.Format(time.RFC3339))
		if sbx := h.get(id); sbx.Error != "" || !sbx.SuspendedAt.Equal(checkpoint.At.Truncate(time.Microsecond)) ||
			!sbx.LastActivityAt.Equal(time.Now().UTC()) {
			t.Errorf("the row is %+v", sbx)
		}
		again := h.mustConnect(id) // wakes it
		lease.Release()            // of the previous run
		if again.Sandbox.Run == lease.Sandbox.Run {
			t.Error("the run did not change")
		}
		pass(2 * time.Hour)
		h.wantState(id, sandbox.Running, "") // the old lease did not affect the new instance
		again.Release()
		pass(time.Hour)
		h.wantState(id, sandbox.Suspended, "")
	})
}

func TestLostWhileTheServerWasAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		with, without := h.persistent(0), h.persistent(0)
		h.mustCheckpoint(with)
		h.crash()
		h.node.Kill(with)
		h.node.Kill(without)
		h.start()
		h.wantState(with, sandbox.Suspended, "")
		h.wantState(without, sandbox.Destroyed, sandbox.Lost)
		h.mustWake(with)
	})
}

func TestLostThatCannotBeCleared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(0)
		h.mustCheckpoint(id)
		h.node.OnRest = func(context.Context, sandbox.ID) error { return errors.New("device busy") }
		h.node.Die(id)
		synctest.Wait()
		if s := h.get(id).State; s != sandbox.Running {
			t.Errorf("sandbox is %s", s)
		}
		if _, err := h.Connect(context.Background(), h.caller(), id, sandbox.ForCommand); err == nil {
			t.Error("a dead instance was leased")
		}
		h.node.OnRest = nil
		pass(time.Minute)
		h.wantState(id, sandbox.Suspended, "")
	})
}

// TestLostDuringAnOperation checks that an operation under way does not hide the end of the
// processes.
func TestLostDuringAnOperation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(0)
		h.mustCheckpoint(id)
		lease := h.mustConnect(id)
		suspended := make(chan error)
		go func() { _, err := h.Suspend(context.Background(), org, id, sandbox.KeepAll); suspended <- err }()
		synctest.Wait()
		h.node.Die(id)
		wantCode(t, <-suspended, fault.Conflict, "sandbox_in_use")
		synctest.Wait()
		h.wantState(id, sandbox.Suspended, "") // at once, before Reconcile runs
		lease.Release()
	})
}

// TestRestartInTheMiddle crashes the server during suspend and wake, and checks how the next server
// settles what the host has.
func TestRestartInTheMiddle(t *testing.T) {
	type left func(h *fixture, id sandbox.ID)
	dead := func(h *fixture, id sandbox.ID) { h.node.Kill(id) }
	for name, tt := range map[string]struct {
		wake  bool
		left  left
		state sandbox.State
	}{
		"suspend, alive":           {false, func(*fixture, sandbox.ID) {}, sandbox.Running},
		"suspend, dead":            {false, dead, sandbox.Suspended},
		"suspend, only checkpoint": {false, func(h *fixture, id sandbox.ID) { dead(h, id); _ = h.node.Rest(context.Background(), id) }, sandbox.Suspended},
		"wake, nothing begun":      {true, func(*fixture, sandbox.ID) {}, sandbox.Suspended},
		"wake, begun and dead":     {true, func(h *fixture, id sandbox.ID) { wakeBehind(h, id); dead(h, id) }, sandbox.Suspended},
		"wake, done":               {true, wakeBehind, sandbox.Suspended},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFixture(t)
				id := h.persistent(time.Hour)
				h.mustCheckpoint(id)
				if tt.wake {
					h.mustSuspend(id)
				}
				h.node.OnSuspend = func(ctx context.Context, _ sandbox.ID) error { <-ctx.Done(); return ctx.Err() }
				h.node.OnWake = func(ctx context.Context, _ sandbox.Spec) error { <-ctx.Done(); return ctx.Err() }
				go func() {
					if tt.wake {
						_, _ = h.Wake(context.Background(), h.caller(), id)
					} else {
						_, _ = h.Suspend(context.Background(), org, id, sandbox.KeepAll)
					}
				}()
				synctest.Wait()
				if row, _ := h.db.Get(context.Background(), id); !row.State.Claim() {
					t.Fatalf("the row is %s", row.State)
				}
				h.crash()
				h.node.OnSuspend, h.node.OnWake = nil, nil
				tt.left(h, id)
				h.start()
				h.wantState(id, tt.state, "")
				if e := h.latest(id); e.Reason != "interrupted" {
					t.Errorf("latest event is %+v", e)
				}
				h.call(id)
				h.wantState(id, sandbox.Running, "")
			})
		})
	}
}

// wakeBehind makes the node wake the sandbox as the dead server had requested.
func wakeBehind(h *fixture, id sandbox.ID) {
	row, err := h.db.Get(context.Background(), id)
	if err == nil {
		err = h.node.Wake(context.Background(), sandbox.Spec{ID: id, Run: row.Run})
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// TestSuspendedWithRemains checks that leftovers of an instance are removed and the recovery point
// stays. A sandbox whose recovery point is gone stays suspended and reports why it does not wake.
func TestSuspendedWithRemains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.suspended()
		observed, _ := h.node.Inspect(context.Background(), id)
		h.node.Put(sandbox.Observed{ID: id, Run: "r", Remains: true, Checkpoint: observed.Checkpoint})
		pass(time.Minute)
		h.wantState(id, sandbox.Suspended, "")
		if err := h.node.Destroy(context.Background(), id); err != nil {
			t.Fatal(err)
		}
		pass(time.Minute)
		_, err := h.Wake(context.Background(), h.caller(), id)
		wantCode(t, err, fault.Internal, "wake_failed")
		if sbx := h.get(id); sbx.State != sandbox.Suspended || sbx.Error != "the sandbox has no recovery point" {
			t.Errorf("the row is %+v", sbx)
		}
		if err := h.Destroy(context.Background(), org, id); err != nil {
			t.Fatal(err)
		}
		h.wantState(id, sandbox.Destroyed, sandbox.Requested)
	})
}

// TestReconcileRereads checks that a sandbox that was made between the reading of the host and that
// of the rows does not count as lost.
func TestReconcileRereads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		var made sandbox.ID
		h.gate.onUnfinished(func() { made = h.mustCreate(sandbox.Request{}).ID })
		if err := h.Reconcile(ctx); err != nil {
			t.Error(err)
		}
		if made == "" {
			t.Fatal("nothing was made in between")
		}
		h.wantState(made, sandbox.Running, "")
	})
}
