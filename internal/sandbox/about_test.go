package sandbox_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// wantAbout checks that the description of a sandbox is the one of its row.
func (h *fixture) wantAbout(id sandbox.ID) {
	h.t.Helper()
	row := h.get(id)
	want := sandbox.About{ID: id, Template: row.Template, Mode: row.Mode, Metadata: row.Metadata, ExpiresAt: row.ExpiresAt}
	got, err := h.About(context.Background(), id)
	if err != nil {
		h.t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		h.t.Errorf("the description differs from the row (-row +got):\n%s", diff)
	}
}

// mustKeep gives a sandbox a new lifetime.
func (h *fixture) mustKeep(id sandbox.ID, lifetime time.Duration) {
	h.t.Helper()
	if _, err := h.Keepalive(context.Background(), org, id, &lifetime); err != nil {
		h.t.Error(err)
	}
}

// TestAbout follows the description of a sandbox through its states, and reads it without the store.
func TestAbout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		minute := time.Minute
		id := h.mustCreate(sandbox.Request{Timeout: &minute, AtEnd: sandbox.EndSuspends,
			Metadata: map[string]string{"a": "b"}}).ID
		h.wantAbout(id)
		pass(time.Second)
		h.mustKeep(id, time.Hour)
		h.wantAbout(id)
		if _, err := h.SetTimeout(context.Background(), org, id, 2*time.Hour, true); err != nil {
			t.Error(err)
		}
		h.wantAbout(id)
		h.mustPause(id)
		h.wantAbout(id)
		h.mustWake(id)
		h.wantAbout(id)
		h.crash()
		h.start()
		h.wantAbout(id)
		persistent := h.mustCreate(sandbox.Request{Mode: string(sandbox.Persistent)}).ID
		h.wantAbout(persistent)
		if _, err := h.About(context.Background(), sandbox.NewID()); !fault.Is(err, fault.NotFound) {
			t.Errorf("a sandbox that is not there: %v", err)
		}

		h.gate.shut()
		for _, id := range []sandbox.ID{id, persistent} {
			if about, err := h.About(context.Background(), id); err != nil || about.ID != id {
				t.Errorf("without the store: %+v, %v", about, err)
			}
		}
	})
}

// TestAboutAfterAFailedChange checks that a change whose result is unknown makes the description
// follow the row.
func TestAboutAfterAFailedChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.mustCreate(sandbox.Request{}).ID
		h.gate.loseAnswer(true)
		hour := time.Hour
		if _, err := h.Keepalive(context.Background(), org, id, &hour); !errors.Is(err, errBroken) {
			t.Fatal(err)
		}
		h.gate.loseAnswer(false)
		if left := time.Until(h.get(id).ExpiresAt); left != hour {
			t.Fatalf("the write did not happen: %s are left", left)
		}
		h.wantAbout(id)
	})
}

// TestKeepalivesAtOnce moves the end of a sandbox while another call does, and while the sandbox
// begins to run. The end of the row is the one that programs inside are told and that ends the sandbox.
func TestKeepalivesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.mustCreate(sandbox.Request{}).ID
		h.gate.afterWrite(func() { h.mustKeep(id, 10*time.Second) })
		h.mustKeep(id, time.Hour) // overtaken by the other one
		h.wantAbout(id)
		pass(10 * time.Second)
		h.wantState(id, sandbox.Destroyed, sandbox.Expired)
	})
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		h.node.OnCreate = func(_ context.Context, spec sandbox.Spec) error {
			h.gate.afterWrite(func() { // its row says that it runs
				go h.mustKeep(spec.ID, 10*time.Second)
				synctest.Wait()
			})
			return nil
		}
		id := h.mustCreate(sandbox.Request{}).ID
		synctest.Wait()
		h.wantAbout(id)
		pass(10 * time.Second)
		h.wantState(id, sandbox.Destroyed, sandbox.Expired)
	})
}
