package sandbox_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// TestDropMemory checks what a suspended sandbox keeps after its memory was to be dropped, and that one
// that runs goes on.
func TestDropMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		drop := func(id sandbox.ID) (string, error) {
			before := len(h.node.Calls())
			_, err := h.DropMemory(ctx, h.caller(), id)
			return strings.ReplaceAll(strings.Join(h.node.Calls()[before:], ", "), " "+string(id), ""), err
		}
		id := h.left(sandbox.Suspended)
		if calls, err := drop(id); err != nil || calls != "wake, suspend" {
			t.Errorf("the machine did %q, %v", calls, err)
		}
		if s := h.get(id); s.State != sandbox.Suspended || s.Kept != sandbox.KeepFiles {
			t.Errorf("it is %s and keeps %q", s.State, s.Kept)
		}
		if calls, err := drop(id); err != nil || calls != "" {
			t.Errorf("without memory the machine did %q, %v", calls, err)
		}
		if woken, err := h.Wake(ctx, h.caller(), id); err != nil || woken.State != sandbox.Running {
			t.Errorf("it is %s, %v", woken.State, err)
		}
		if calls, err := drop(id); err != nil || calls != "" || h.get(id).State != sandbox.Running {
			t.Errorf("of a sandbox that runs the machine did %q, %v", calls, err)
		}

		// If its files cannot be kept alone, it goes on where it was.
		id = h.left(sandbox.Suspended)
		h.node.OnSuspend = func(context.Context, sandbox.ID) error {
			h.node.OnSuspend = nil
			return fault.New(fault.NoSpace, fault.CodeDiskFull, "too many files")
		}
		calls, err := drop(id)
		wantCode(t, err, fault.NoSpace, fault.CodeDiskFull)
		if s := h.get(id); calls != "wake, suspend, suspend" || s.State != sandbox.Suspended || s.Kept != sandbox.KeepAll {
			t.Errorf("the machine did %q, and it is %s and keeps %q", calls, s.State, s.Kept)
		}

		// A crash after the files were kept leaves a claim, which is settled to what the machine has.
		id = h.left(sandbox.Waking)
		checkpoint := &sandbox.Checkpoint{At: time.Now(), Size: 1, Run: "r", Kept: sandbox.KeepFiles}
		h.node.Put(sandbox.Observed{ID: id, Checkpoint: checkpoint})
		if err := h.Reconcile(ctx); err != nil {
			t.Error(err)
		}
		if s := h.get(id); s.State != sandbox.Suspended || s.Kept != sandbox.KeepFiles {
			t.Errorf("after a crash it is %s and keeps %q", s.State, s.Kept)
		}
	})
}
