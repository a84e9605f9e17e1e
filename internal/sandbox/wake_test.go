package sandbox_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

func TestWakeIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(time.Hour)
		before := h.get(id)
		pass(time.Minute)
		h.mustSuspend(id)
		h.node.OnWake = func(_ context.Context, spec sandbox.Spec) error {
			if spec.Run == before.Run || spec.Token == before.Token || spec.Token == "" || spec.Image != before.Image ||
				spec.Size != before.Size {
				t.Errorf("woken with %+v", spec)
			}
			time.Sleep(time.Second)
			return nil
		}
		runs := make(chan string, 50)
		for i := range cap(runs) {
			go func() {
				if i%2 == 0 {
					sbx, err := h.Wake(context.Background(), h.caller(), id)
					if err != nil || sbx.State != sandbox.Running {
						t.Errorf("%s, %v", sbx.State, err)
					}
					runs <- sbx.Run
					return
				}
				lease, err := h.Connect(context.Background(), h.caller(), id, sandbox.ForCommand)
				if err != nil {
					t.Error(err)
					runs <- ""
					return
				}
				runs <- lease.Sandbox.Run
				lease.Release()
			}()
		}
		first := <-runs
		for range cap(runs) - 1 {
			if run := <-runs; run != first {
				t.Errorf("lives %s and %s", first, run)
			}
		}
		if n := h.calls("wake", id); n != 1 {
			t.Errorf("woken %d times", n)
		}
		sbx := h.get(id)
		if !sbx.SuspendedAt.IsZero() || !sbx.StartedAt.Equal(before.StartedAt) ||
			!sbx.LastActivityAt.Equal(time.Now().UTC()) || h.InUse() != 0 {
			t.Errorf("woken as %+v, %d leases", sbx, h.InUse())
		}
		pass(time.Hour)
		h.wantState(id, sandbox.Suspended, "") // its idle timer is set again
	})
}

func TestCallWhileSuspendingWaitsAndWakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(10 * time.Second)
		h.node.OnSuspend = func(context.Context, sandbox.ID) error { time.Sleep(3 * time.Second); return nil }
		pass(11 * time.Second)
		if s := h.get(id).State; s != sandbox.Suspending {
			t.Fatalf("sandbox is %s", s)
		}
		began := time.Now()
		lease := h.mustConnect(id)
		if d := time.Since(began); d != 2*time.Second || lease.Sandbox.State != sandbox.Running {
			t.Errorf("connected after %s to one that is %s", d, lease.Sandbox.State)
		}
		lease.Release()
		if h.calls("suspend", id) != 1 || h.calls("wake", id) != 1 {
			t.Errorf("the node was called: %v", h.node.Calls())
		}
	})
}

func TestWakeGoesOnWhenTheCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.suspended()
		h.node.OnWake = func(context.Context, sandbox.Spec) error { time.Sleep(time.Second); return nil }
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		if _, err := h.Connect(ctx, h.caller(), id, sandbox.ForCommand); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		pass(time.Second)
		h.wantState(id, sandbox.Running, "")
		if h.InUse() != 0 {
			t.Errorf("a caller who left holds %d leases", h.InUse())
		}
	})
}

func TestRoomAndQuotaLeaveOneSuspended(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.suspended()
		h.persistent(0)
		want, event := h.get(id), h.latest(id)
		same := func() {
			t.Helper()
			if got := h.get(id); got.State != sandbox.Suspended || got.Run != want.Run || got.Token != want.Token ||
				got.Error != "" || h.latest(id) != event {
				t.Errorf("the row is %+v, its latest event %+v", got, h.latest(id))
			}
		}
		h.quota = sandbox.Quota{VCPUs: 1}
		_, err := h.Wake(context.Background(), h.caller(), id)
		wantCode(t, err, fault.Exhausted, "quota_exceeded")
		same()
		h.quota = sandbox.Quota{VCPUs: 2, Sandboxes: 2}
		h.node.SetFull(true)
		_, err = h.Connect(context.Background(), h.caller(), id, sandbox.ForCommand)
		wantCode(t, err, fault.Unavailable, "no_capacity")
		same()
		h.node.SetFull(false)
		h.mustWake(id)
	})
}

func TestWakeThatFails(t *testing.T) {
	for name, tt := range map[string]struct {
		err  error
		code string
		text string // of the row's error and the event; "" means none in the row
	}{
		"the checkpoint": {fault.New(fault.Internal, "wake_failed", "its memory file is damaged"), "wake_failed", "its memory file is damaged"},
		"a plain error":  {errors.New("secret path /etc/x"), "wake_failed", "the sandbox did not wake; the server's log has the cause"},
		"no room":        {fault.New(fault.Unavailable, "no_capacity", "full"), "no_capacity", ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFixture(t)
				id := h.suspended()
				slept := h.get(id).SuspendedAt
				h.node.OnWake = func(context.Context, sandbox.Spec) error { time.Sleep(time.Second); return tt.err }
				errs := make(chan error, 5)
				for range cap(errs) {
					go func() { _, err := h.Connect(context.Background(), h.caller(), id, sandbox.ForCommand); errs <- err }()
				}
				for range cap(errs) {
					if e := fault.As(<-errs); e == nil || e.Code != tt.code || strings.Contains(e.Detail, "secret") {
						t.Errorf("told %v", e)
					}
				}
				h.wantState(id, sandbox.Suspended, "")
				if sbx := h.get(id); sbx.Error != tt.text || !sbx.SuspendedAt.Equal(slept) {
					t.Errorf("the row is %+v", sbx)
				}
				if e := h.latest(id); e.From != sandbox.Waking || e.Reason != "wake_failed" ||
					tt.text != "" && e.Detail != tt.text {
					t.Errorf("latest event is %+v", e)
				}
				h.node.OnWake = nil
				if sbx := h.mustWake(id); sbx.Error != "" || !sbx.SuspendedAt.IsZero() {
					t.Errorf("woken as %+v", sbx)
				}
			})
		})
	}
}

// TestWakeThatCannotBeCleared checks that the claim stays, and that the next call settles it
// without waiting for Reconcile.
func TestWakeThatCannotBeCleared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.suspended()
		h.node.OnWake = func(context.Context, sandbox.Spec) error { return errors.New("injected") }
		h.node.OnRest = func(context.Context, sandbox.ID) error { return errors.New("device busy") }
		_, err := h.Wake(context.Background(), h.caller(), id)
		wantCode(t, err, fault.Internal, "wake_failed")
		if s := h.get(id).State; s != sandbox.Waking {
			t.Errorf("sandbox is %s", s)
		}
		h.node.OnWake, h.node.OnRest = nil, nil
		h.mustWake(id)
	})
}

func TestWakeThatCannotBeWrittenDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.suspended()
		h.gate.breakTransitions(func(to sandbox.State) bool { return to == sandbox.Running })
		if _, err := h.Wake(context.Background(), h.caller(), id); !errors.Is(err, errBroken) {
			t.Errorf("got %v", err)
		}
		h.wantState(id, sandbox.Suspended, "") // the unused instance is gone, its checkpoint is not
		h.gate.breakTransitions(nil)
		h.mustWake(id)
	})
}

func TestDestroyWins(t *testing.T) {
	for name, begin := range map[string]func(h *fixture, id sandbox.ID) error{
		"suspend": func(h *fixture, id sandbox.ID) error {
			_, err := h.Suspend(context.Background(), org, id, sandbox.KeepAll)
			return err
		},
		"suspend that waits for a call": func(h *fixture, id sandbox.ID) error {
			h.mustConnect(id)
			_, err := h.Suspend(context.Background(), org, id, sandbox.KeepAll)
			return err
		},
		"wake": func(h *fixture, id sandbox.ID) error {
			block := h.node.OnSuspend
			h.node.OnSuspend = nil
			h.mustSuspend(id)
			h.node.OnSuspend = block
			_, err := h.Connect(context.Background(), h.caller(), id, sandbox.ForCommand)
			return err
		},
		"checkpoint": func(h *fixture, id sandbox.ID) error {
			_, err := h.Checkpoint(context.Background(), org, id)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFixture(t)
				id := h.persistent(0)
				block := func(ctx context.Context, _ sandbox.ID) error { // takes a second to end
					<-ctx.Done()
					time.Sleep(time.Second)
					return ctx.Err()
				}
				h.node.OnSuspend, h.node.OnCheckpoint = block, block
				h.node.OnWake = func(ctx context.Context, spec sandbox.Spec) error { return block(ctx, spec.ID) }
				interrupted := make(chan error)
				go func() { interrupted <- begin(h, id) }()
				synctest.Wait()
				// The wake continues when its caller leaves.
				ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
				defer cancel()
				before := time.Now()
				if err := h.Destroy(ctx, org, id); err != nil && !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
				wantCode(t, <-interrupted, fault.Conflict, "sandbox_not_running")
				synctest.Wait()
				if d := time.Since(before); d > time.Second {
					t.Errorf("it took %s", d)
				}
				h.wantState(id, sandbox.Destroyed, sandbox.Requested)
				pass(time.Minute)
				h.wantState(id, sandbox.Destroyed, sandbox.Requested)
			})
		})
	}
}

// TestDestroyBetweenPointAndRow destroys a sandbox when the host's part of a suspend is done and
// its row is not written yet.
func TestDestroyBetweenPointAndRow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(0)
		h.node.OnSuspend = func(ctx context.Context, _ sandbox.ID) error {
			<-ctx.Done()
			return nil
		}
		interrupted := make(chan error)
		go func() {
			_, err := h.Suspend(context.Background(), org, id, sandbox.KeepAll)
			interrupted <- err
		}()
		synctest.Wait()
		if err := h.Destroy(context.Background(), org, id); err != nil {
			t.Error(err)
		}
		wantCode(t, <-interrupted, fault.Conflict, "sandbox_not_running")
		h.wantState(id, sandbox.Destroyed, sandbox.Requested)
	})
}

func TestClosing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		asleep, running, going := h.suspended(), h.persistent(0), h.persistent(0)
		h.node.OnSuspend = func(context.Context, sandbox.ID) error { time.Sleep(time.Second); return nil }
		going2 := make(chan error)
		go func() { _, err := h.Suspend(ctx, org, going, sandbox.KeepAll); going2 <- err }()
		synctest.Wait()
		closed := make(chan error)
		go func() { closed <- h.Close(ctx) }()
		synctest.Wait()
		_, err := h.Wake(ctx, h.caller(), asleep)
		wantCode(t, err, fault.Unavailable, "shutting_down")
		_, err = h.Suspend(ctx, org, running, sandbox.KeepAll)
		wantCode(t, err, fault.Unavailable, "shutting_down")
		_, err = h.Checkpoint(ctx, org, running)
		wantCode(t, err, fault.Unavailable, "shutting_down")
		_, err = h.Connect(ctx, h.caller(), going, sandbox.ForCommand)
		wantCode(t, err, fault.Unavailable, "shutting_down")
		if err := errors.Join(<-going2, <-closed); err != nil { // the operation under way is completed
			t.Error(err)
		}
		h.wantState(going, sandbox.Suspended, "")
		h.wantState(asleep, sandbox.Suspended, "")
		if sbx := h.get(asleep); sbx.Error != "" {
			t.Errorf("shutting down is written down: %q", sbx.Error)
		}
	})
}
