package sandbox_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// elsewhere returns a fixture of the node "here", and a sandbox and a snapshot that the node "there" has in the same
// records.
func elsewhere(t *testing.T) (*fixture, sandbox.Sandbox, sandbox.Snapshot) {
	t.Helper()
	h := newFixture(t)
	ctx := context.Background()
	if _, err := h.db.StartSession(ctx, "there", false); err != nil {
		t.Fatal(err)
	}
	h.crash()
	h.name = "there"
	h.start()
	sbx, err := h.Create(ctx, h.caller(), sandbox.Request{Template: "python"}, sandbox.Once{Key: "k", Hash: "h"}, true)
	if err != nil {
		t.Fatal(err)
	}
	snap, err := h.SaveSnapshot(ctx, org, sbx.ID, "saved")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.db.StartSession(ctx, "here", false); err != nil {
		t.Fatal(err)
	}
	h.crash()
	h.name = "here"
	h.start()
	return h, sbx, snap
}

// TestElsewhere asks a node for what another node has. Each call names that node at once, and changes nothing.
func TestElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, sbx, snap := elsewhere(t)
		ctx := context.Background()
		c, id := h.caller(), sbx.ID
		calls := h.node.Calls()
		for name, call := range map[string]func() error{
			"wake":          func() error { _, err := h.Wake(ctx, c, id); return err },
			"wake for":      func() error { _, err := h.WakeFor(ctx, c, id, time.Minute); return err },
			"connect":       func() error { _, err := h.Connect(ctx, c, id, sandbox.ForCommand); return err },
			"attach":        func() error { _, err := h.Attach(ctx, id); return err },
			"suspend":       func() error { _, err := h.Suspend(ctx, org, id, sandbox.KeepAll); return err },
			"pause":         func() error { _, err := h.Pause(ctx, org, id, sandbox.KeepAll); return err },
			"checkpoint":    func() error { _, err := h.Checkpoint(ctx, org, id); return err },
			"drop memory":   func() error { _, err := h.DropMemory(ctx, c, id); return err },
			"egress":        func() error { _, err := h.SetEgress(ctx, org, id, sandbox.Egress{}); return err },
			"keepalive":     func() error { _, err := h.Keepalive(ctx, org, id, nil); return err },
			"timeout":       func() error { _, err := h.SetTimeout(ctx, org, id, time.Minute, false); return err },
			"front data":    func() error { _, err := h.SetFrontData(ctx, org, id, "x"); return err },
			"destroy":       func() error { return h.Destroy(ctx, org, id) },
			"snapshot":      func() error { _, err := h.SaveSnapshot(ctx, org, id, "more"); return err },
			"fork":          func() error { _, err := h.Fork(ctx, c, id, sandbox.ForkRequest{}); return err },
			"traffic":       func() error { _, err := h.Traffic(ctx, sbx); return err },
			"drop snapshot": func() error { return h.DeleteSnapshot(ctx, org, snap.Name) },
			"create from a snapshot": func() error {
				_, err := h.Create(ctx, c, sandbox.Request{Snapshot: string(snap.ID)}, sandbox.Once{}, true)
				return err
			},
			"create again": func() error {
				_, err := h.Create(ctx, c, sandbox.Request{Template: "python"}, sandbox.Once{Key: "k", Hash: "h"}, true)
				return err
			},
		} {
			err := call()
			wantCode(t, err, fault.Unavailable, fault.CodeElsewhere)
			if f := fault.As(err); f != nil && f.Node != "there" {
				t.Errorf("%s: the error names the node %q", name, f.Node)
			}
		}
		if sbx := h.get(id); sbx.State != sandbox.Running || sbx.FrontData != "" {
			t.Errorf("the sandbox is %+v", sbx)
		}
		if _, err := h.GetSnapshot(ctx, org, "saved"); err != nil {
			t.Error(err)
		}
		if now := h.node.Calls(); len(now) != len(calls) {
			t.Errorf("the machine was asked for %q", now[len(calls):])
		}
	})
}

// TestElsewhereIsYours checks that a call for another organization's sandbox does not tell where that sandbox is.
func TestElsewhereIsYours(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, sbx, snap := elsewhere(t)
		ctx := context.Background()
		_, err := h.Connect(ctx, sandbox.Caller{OrgID: "org_other"}, sbx.ID, sandbox.ForCommand)
		wantCode(t, err, fault.Denied, fault.CodeNotYourSandbox)
		err = h.Destroy(ctx, "org_other", sbx.ID)
		wantCode(t, err, fault.Denied, fault.CodeNotYourSandbox)
		err = h.DeleteSnapshot(ctx, "org_other", string(snap.ID))
		wantCode(t, err, fault.NotFound, fault.CodeSnapshotNotFound)
	})
}
