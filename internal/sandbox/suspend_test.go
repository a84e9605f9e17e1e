package sandbox_test

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/nodetest"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
)

func TestSuspendOnRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(time.Hour)
		h.node.OnSuspend = func(context.Context, sandbox.ID) error { time.Sleep(time.Second); return nil }
		pass(1500 * time.Millisecond)
		h.call(id)
		used := time.Now().UTC().Truncate(time.Microsecond)
		errs := make(chan error, 5) // concurrent callers share the answer
		for range cap(errs) {
			go func() {
				sbx, err := h.Suspend(context.Background(), org, id, sandbox.KeepAll)
				if err == nil && (sbx.State != sandbox.Suspended || !sbx.LastActivityAt.Equal(used)) {
					t.Errorf("answered with %+v", sbx)
				}
				errs <- err
			}()
		}
		for range cap(errs) {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		h.wantState(id, sandbox.Suspended, "")
		h.wantEvent(id, sandbox.Suspending, sandbox.Suspended, "requested", "")
		if n := h.calls("suspend", id); n != 1 {
			t.Errorf("suspended %d times", n)
		}
		_, err := h.Suspend(context.Background(), org, id, sandbox.KeepAll)
		wantCode(t, err, fault.Conflict, "sandbox_not_running")
	})
}

func TestSuspendWaitsForCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(time.Hour)
		lease := h.mustConnect(id)
		began := time.Now()
		time.AfterFunc(3*time.Second, lease.Release)
		time.AfterFunc(2*time.Second, func() { h.call(id) }) // served meanwhile
		h.mustSuspend(id)
		if d := time.Since(began); d != 3*time.Second {
			t.Errorf("suspended after %s", d)
		}
		if n := h.calls("wake", id); n != 0 {
			t.Errorf("woken %d times", n)
		}

		first, second := h.mustConnect(id), h.mustConnect(id)
		began = time.Now()
		_, err := h.Suspend(context.Background(), org, id, sandbox.KeepAll)
		wantCode(t, err, fault.Conflict, "sandbox_in_use")
		if e := fault.As(err); e != nil && !strings.Contains(e.Detail, "calls in flight: 2") {
			t.Errorf("told %q", e.Detail)
		}
		if d := time.Since(began); d != 5*time.Second {
			t.Errorf("gave up after %s", d)
		}
		h.wantState(id, sandbox.Running, "")
		first.Release()
		second.Release()
		h.mustSuspend(id)
	})
}

var diskFull = fault.New(fault.NoSpace, "disk_full", "the checkpoint needs 100 MiB")

func TestFullDiskKeepsItRunning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(10 * time.Second)
		h.node.OnSuspend = func(context.Context, sandbox.ID) error { return diskFull }
		began := time.Now()
		pass(10 * time.Second)
		h.wantState(id, sandbox.Running, "")
		h.wantEvent(id, sandbox.Suspending, sandbox.Running, "suspend_failed", diskFull.Detail)
		pass(time.Minute - time.Millisecond)
		if n := h.calls("suspend", id); n != 1 {
			t.Errorf("tried %d times within a minute", n)
		}
		pass(time.Millisecond)
		if n := h.calls("suspend", id); n != 2 {
			t.Errorf("tried %d times in %s", n, time.Since(began))
		}
		lease := h.mustConnect(id) // the sandbox can be used
		_, err := h.Suspend(context.Background(), org, id, sandbox.KeepAll)
		wantCode(t, err, fault.Conflict, "sandbox_in_use")
		lease.Release()
		_, err = h.Suspend(context.Background(), org, id, sandbox.KeepAll)
		wantCode(t, err, fault.NoSpace, "disk_full")
		h.wantState(id, sandbox.Running, "")
		h.node.OnSuspend = nil
		pass(time.Minute)
		h.wantState(id, sandbox.Suspended, "")
	})
}

// TestSuspendThatFails simulates the states that a failing node may leave.
func TestSuspendThatFails(t *testing.T) {
	broken := errors.New("secret path /etc/x")
	for name, tt := range map[string]struct {
		before bool // whether there is an earlier checkpoint
		left   func(h *fixture, id sandbox.ID)
		state  sandbox.State
		reason sandbox.Reason
		event  string
		fell   bool // whether the event tells of the earlier checkpoint
		ok     bool // whether the caller gets success
	}{
		"runs on":                  {false, nil, sandbox.Running, "", "suspend_failed", false, false},
		"runs on, with checkpoint": {true, nil, sandbox.Running, "", "suspend_failed", false, false},
		"dead":                     {false, func(h *fixture, id sandbox.ID) { h.node.Kill(id) }, sandbox.Destroyed, sandbox.Lost, "lost", false, false},
		"dead, with checkpoint":    {true, func(h *fixture, id sandbox.ID) { h.node.Kill(id) }, sandbox.Suspended, "", "suspend_failed", true, false},
		"dead, new checkpoint": {true, func(h *fixture, id sandbox.ID) {
			_, _ = h.node.Checkpoint(context.Background(), id)
			h.node.Kill(id)
		}, sandbox.Suspended, "", "suspend_failed", true, true},
		"nothing left": {true, func(h *fixture, id sandbox.ID) { _ = h.node.Destroy(context.Background(), id) }, sandbox.Destroyed, sandbox.Lost, "lost", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFixture(t)
				id := h.persistent(0)
				if tt.before {
					if _, err := h.Checkpoint(context.Background(), org, id); err != nil {
						t.Fatal(err)
					}
				}
				pass(time.Minute)
				h.node.OnSuspend = func(_ context.Context, id sandbox.ID) error {
					if tt.left != nil {
						tt.left(h, id)
					}
					return broken
				}
				_, err := h.Suspend(context.Background(), org, id, sandbox.KeepAll)
				if tt.ok && err != nil {
					t.Error(err)
				}
				if !tt.ok {
					wantCode(t, err, fault.Internal, "suspend_failed")
				}
				h.wantState(id, tt.state, tt.reason)
				e := h.latest(id)
				if e.Reason != tt.event || strings.Contains(e.Detail, "secret") ||
					strings.Contains(e.Detail, "at its recovery point of 20") != tt.fell {
					t.Errorf("latest event is %+v", e)
				}
				h.node.OnSuspend = nil
				if tt.state != sandbox.Destroyed {
					h.mustWake(id)
				}
			})
		})
	}
}

func TestSuspendThatCannotBeWrittenDown(t *testing.T) {
	for name, tt := range map[string]struct {
		broken sandbox.State
		state  sandbox.State // of the row while the database is broken
	}{
		"the claim":   {sandbox.Suspending, sandbox.Running},
		"the outcome": {sandbox.Suspended, sandbox.Suspending},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFixture(t)
				id := h.persistent(10 * time.Second)
				h.gate.breakTransitions(func(to sandbox.State) bool { return to == tt.broken })
				_, err := h.Suspend(context.Background(), org, id, sandbox.KeepAll)
				if !errors.Is(err, errBroken) {
					t.Errorf("got %v", err)
				}
				if s := h.get(id).State; s != tt.state {
					t.Errorf("sandbox is %s", s)
				}
				h.gate.breakTransitions(nil)
				h.call(id) // the call does not wait for Reconcile
				h.wantState(id, sandbox.Running, "")
				pass(2 * time.Minute)
				h.wantState(id, sandbox.Suspended, "")
			})
		})
	}
}

// TestCallJustBeforeSuspend checks that a lease prevents a suspend that has begun, if it is granted
// before the suspend ends the use of the sandbox.
func TestCallJustBeforeSuspend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(10 * time.Second)
		var lease *sandbox.Lease
		h.gate.afterGet(func() { lease = h.mustConnect(id) })
		pass(time.Minute)
		if lease == nil {
			t.Fatal("the suspend did not look")
		}
		h.wantState(id, sandbox.Running, "")
		if n := h.calls("suspend", id); n != 0 {
			t.Errorf("suspended %d times in use", n)
		}
		lease.Release()
		pass(10*time.Second - time.Millisecond)
		h.wantState(id, sandbox.Running, "")
		pass(time.Millisecond)
		h.wantState(id, sandbox.Suspended, "")
	})
}

// TestCallWithAnOldReading checks that a call that read the row before a suspend and a wake gets
// the present run and token.
func TestCallWithAnOldReading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.persistent(time.Hour)
		h.gate.afterGet(func() { h.mustSuspend(id); h.mustWake(id) })
		lease := h.mustConnect(id)
		defer lease.Release()
		if now, _ := h.db.Get(context.Background(), id); lease.Sandbox.Run != now.Run || lease.Sandbox.Token != now.Token {
			t.Errorf("leased run %s, it is in %s", lease.Sandbox.Run, now.Run)
		}
	})
}

// TestNoSandboxIsSuspendedInUse races real calls with suspends. It checks that no sandbox is suspended
// while a lease is held, and that no call fails.
func TestNoSandboxIsSuspendedInUse(t *testing.T) {
	db, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "cay.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	node := nodetest.NewFake()
	s := sandbox.New(sandbox.Config{Sizes: []sandbox.Size{{Name: "small", VCPUs: 1, MemoryMB: 512}},
		DefaultSize: "small", DefaultDisk: 64, MaxDisk: 64},
		db, node, oneTemplate{}, slog.New(slog.DiscardHandler), nil)
	caller := sandbox.Caller{OrgID: org}
	sbx, err := s.Create(t.Context(), caller, sandbox.Request{Template: "python", Mode: "persistent"},
		sandbox.Once{}, true)
	if err != nil {
		t.Fatal(err)
	}
	var held, suspends, calls atomic.Int64
	check := func(context.Context, sandbox.ID) error {
		if n := held.Load(); n > 0 {
			t.Errorf("suspended while %d calls use it", n)
		}
		suspends.Add(1)
		return nil
	}
	node.OnSuspend = check
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			for range 250 {
				lease, err := s.Connect(t.Context(), caller, sbx.ID, sandbox.ForCommand)
				if err != nil {
					t.Error(err)
					return
				}
				held.Add(1)
				if observed, _ := node.Inspect(t.Context(), sbx.ID); observed == nil || !observed.Alive ||
					observed.Run != lease.Sandbox.Run {
					t.Errorf("a lease of run %s, the node has %+v", lease.Sandbox.Run, observed)
				}
				held.Add(-1)
				lease.Release()
				calls.Add(1)
				if rand.IntN(4) == 0 {
					_, _ = s.Checkpoint(t.Context(), org, sbx.ID)
				}
			}
		})
	}
	var suspender sync.WaitGroup
	suspender.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := s.Suspend(t.Context(), org, sbx.ID, sandbox.KeepAll); err != nil && !fault.Is(err, fault.Conflict) {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	close(stop)
	suspender.Wait()
	if err := s.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if suspends.Load() == 0 || calls.Load() != 1000 || s.InUse() != 0 {
		t.Errorf("%d calls and %d suspends, %d leases are left", calls.Load(), suspends.Load(), s.InUse())
	}
	t.Logf("%d calls, %d suspends", calls.Load(), suspends.Load())
}
