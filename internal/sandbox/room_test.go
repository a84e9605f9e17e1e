package sandbox_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// wantNothingElse checks that there are only so many rows, each with a sandbox on the machine, and no reservation.
func (h *fixture) wantNothingElse(rows int) {
	h.t.Helper()
	all, _, err := h.List(context.Background(), sandbox.Filter{OrgID: org, Limit: 200})
	if err != nil || len(all) != rows {
		h.t.Errorf("%d rows, %v, want %d", len(all), err, rows)
	}
	for _, sbx := range all {
		if sbx.State == sandbox.Failed {
			h.t.Errorf("%s has failed: %s", sbx.ID, sbx.Error)
		}
	}
	if n := h.node.Reserved(); n != 0 {
		h.t.Errorf("%d reservations are left", n)
	}
}

// TestLastRoom makes 100 sandboxes at once with room for 7. Those that are refused leave no row, no event and no
// reservation.
func TestLastRoom(t *testing.T) {
	for _, wait := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			h := newFixture(t)
			const all, fit = 100, 7
			h.node.SetMost(fit)
			h.node.OnCreate = func(context.Context, sandbox.Spec) error { time.Sleep(time.Second); return nil }
			errs := make([]error, all)
			var creating sync.WaitGroup
			for i := range errs {
				creating.Go(func() {
					_, errs[i] = h.Create(context.Background(), h.caller(), sandbox.Request{Template: "python"}, sandbox.Once{}, wait)
				})
			}
			creating.Wait()
			pass(time.Minute)
			made := 0
			for _, err := range errs {
				if err == nil {
					made++
				} else {
					wantCode(t, err, fault.Unavailable, "no_capacity")
				}
			}
			if made != fit {
				t.Errorf("%d were made, want %d", made, fit)
			}
			h.wantNothingElse(fit)
			if n := len(h.node.Calls()); n != fit {
				t.Errorf("the machine was called %d times", n)
			}
			h.wantWhole()
		})
	}
}

// TestRoomIsGivenBack takes the only room that there is with calls that fail in different ways, after each of which a
// create finds it.
func TestRoomIsGivenBack(t *testing.T) {
	for name, fails := range map[string]func(h *fixture) error{
		"a quota": func(h *fixture) error {
			h.quota = sandbox.Quota{VCPUs: 1}
			_, err := h.create(sandbox.Request{Size: "big"})
			return err
		},
		"a create that fails": func(h *fixture) error {
			h.node.OnCreate = func(context.Context, sandbox.Spec) error { return errInjected }
			_, err := h.create(sandbox.Request{})
			return err
		},
		"a wake over quota": func(h *fixture) error {
			id := h.mustCreate(sandbox.Request{Mode: "persistent", Size: "big"}).ID
			h.mustSuspend(id)
			h.quota = sandbox.Quota{VCPUs: 1}
			_, err := h.Wake(context.Background(), h.caller(), id)
			return err
		},
		"a wake that fails": func(h *fixture) error {
			id := h.suspended()
			h.node.OnWake = func(context.Context, sandbox.Spec) error { return errInjected }
			_, err := h.Wake(context.Background(), h.caller(), id)
			return err
		},
		"dropping the memory": func(h *fixture) error {
			id := h.suspended()
			h.node.OnWake = func(context.Context, sandbox.Spec) error { return errInjected }
			_, err := h.DropMemory(context.Background(), h.caller(), id)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFixture(t)
				h.node.SetMost(1)
				if fails(h) == nil {
					t.Error("it did not fail")
				}
				if n := h.node.Reserved(); n != 0 {
					t.Errorf("%d reservations are left", n)
				}
				h.node.OnCreate, h.node.OnWake, h.quota = nil, nil, sandbox.Quota{}
				h.mustCreate(sandbox.Request{})
			})
		})
	}
}

// TestForkGivesRoomBack forks with room for one child, whose save fails at first.
func TestForkGivesRoomBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{})
		h.node.SetMost(2)
		h.node.OnSnapshot = func(context.Context, sandbox.ID) error {
			_, err := h.create(sandbox.Request{})
			wantCode(t, err, fault.Unavailable, "no_capacity") // the room is the first child's
			return errInjected
		}
		if _, err := h.Fork(context.Background(), h.caller(), sbx.ID, sandbox.ForkRequest{}); !errors.Is(err, errInjected) {
			t.Errorf("the fork gives %v", err)
		}
		h.wantNothingElse(1)
		h.node.OnSnapshot = nil
		children, err := h.Fork(context.Background(), h.caller(), sbx.ID, sandbox.ForkRequest{})
		if err != nil || children[0].Err != nil {
			t.Errorf("a fork with room for its child: %v, %+v", err, children)
		}
		h.wantNothingElse(2)
	})
}

// TestRepeatedCreatesTakeOneRoom repeats a create with its key many times at once, with room for one more sandbox. All
// get the sandbox, and a create that comes at the same time gets the room that is left.
func TestRepeatedCreatesTakeOneRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		create := func(key string) (sandbox.Sandbox, error) {
			return h.Create(context.Background(), h.caller(), sandbox.Request{Template: "python"},
				sandbox.Once{Key: key, Hash: "body"}, true)
		}
		h.node.SetMost(1)
		ids, errs := make([]sandbox.ID, 20), make([]error, 20)
		var creating sync.WaitGroup
		for i := range ids {
			creating.Go(func() {
				sbx, err := create("a")
				ids[i], errs[i] = sbx.ID, err
			})
		}
		creating.Wait()
		for i, err := range errs {
			if err != nil || ids[i] != ids[0] {
				t.Errorf("a repeated create gave %s, %v, not %s", ids[i], err, ids[0])
			}
		}
		h.wantNothingElse(1)

		h.node.SetMost(2)
		var other error
		for range 20 {
			creating.Go(func() {
				if _, err := create("a"); err != nil {
					t.Errorf("repeated: %v", err)
				}
			})
		}
		creating.Go(func() { _, other = create("b") })
		creating.Wait()
		if other != nil {
			t.Errorf("beside repeated creates another one gets %v", other)
		}
		h.wantNothingElse(2)
	})
}

// TestWakesTakeTheLastRoom wakes many sandboxes at once with room for two.
func TestWakesTakeTheLastRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		var asleep []sandbox.ID
		for range 8 {
			asleep = append(asleep, h.suspended())
		}
		events := map[sandbox.ID]sandbox.Event{}
		for _, id := range asleep {
			events[id] = h.latest(id)
		}
		h.node.SetMost(2)
		errs := make([]error, len(asleep))
		var waking sync.WaitGroup
		for i, id := range asleep {
			waking.Go(func() { _, errs[i] = h.Wake(context.Background(), h.caller(), id) })
		}
		waking.Wait()
		woken := 0
		for i, err := range errs {
			if err == nil {
				woken++
				continue
			}
			wantCode(t, err, fault.Unavailable, "no_capacity")
			if e := h.latest(asleep[i]); e != events[asleep[i]] {
				t.Errorf("a wake without room leaves the event %+v", e)
			}
		}
		if woken != 2 {
			t.Errorf("%d are woken, want 2", woken)
		}
		h.wantNothingElse(len(asleep))
	})
}

// TestNoImageLeavesNothing asks for sandboxes whose image the machine cannot have now.
func TestNoImageLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		once := sandbox.Once{Key: "k", Hash: "h"}
		first, err := h.Create(ctx, h.caller(), sandbox.Request{Template: "python"}, once, true)
		if err != nil {
			t.Fatal(err)
		}
		snap, err := h.SaveSnapshot(ctx, org, first.ID, "taken")
		if err != nil {
			t.Fatal(err)
		}
		asleep := h.suspended()
		event, calls := h.latest(asleep), len(h.node.Calls())
		h.node.OnFindImage = func(_ context.Context, image string) error {
			if image != first.Image {
				t.Errorf("asked for the image %q, want %q", image, first.Image)
			}
			return fault.New(fault.Unavailable, "image_unavailable", "away").After(time.Second)
		}
		for name, call := range map[string]func() error{
			"create": func() error { _, err := h.create(sandbox.Request{}); return err },
			"create at once": func() error {
				_, err := h.Create(ctx, h.caller(), sandbox.Request{Template: "python"}, sandbox.Once{}, false)
				return err
			},
			"create with a key": func() error {
				_, err := h.Create(ctx, h.caller(), sandbox.Request{Template: "python"}, sandbox.Once{Key: "l", Hash: "h"}, true)
				return err
			},
			"restore": func() error { _, err := h.create(sandbox.Request{Snapshot: string(snap.ID)}); return err },
			"fork":    func() error { _, err := h.Fork(ctx, h.caller(), first.ID, sandbox.ForkRequest{}); return err },
			"wake":    func() error { _, err := h.Wake(ctx, h.caller(), asleep); return err },
		} {
			t.Log(name)
			wantCode(t, call(), fault.Unavailable, "image_unavailable")
		}
		again, err := h.Create(ctx, h.caller(), sandbox.Request{Template: "python"}, once, true)
		if err != nil || again.ID != first.ID {
			t.Errorf("a repeated create gave %s, %v, not %s", again.ID, err, first.ID)
		}
		h.wantNothingElse(2)
		if e := h.latest(asleep); e != event {
			t.Errorf("the wake leaves the event %+v", e)
		}
		if n := len(h.node.Calls()) - calls; n != 0 {
			t.Errorf("the machine was called %d times", n)
		}
		h.node.OnFindImage = nil
		h.mustWake(asleep)
	})
}
