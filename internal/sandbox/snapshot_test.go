package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

func (h *fixture) save(id sandbox.ID, name string) sandbox.Snapshot {
	h.t.Helper()
	snap, err := h.SaveSnapshot(context.Background(), org, id, name)
	if err != nil {
		h.t.Fatal(err)
	}
	return snap
}

// wantSnapshots checks the organization's snapshots, and that the node has the same.
func (h *fixture) wantSnapshots(want ...sandbox.SnapshotID) {
	h.t.Helper()
	there, _ := h.node.Snapshots(context.Background())
	rows, _, err := h.ListSnapshots(context.Background(), sandbox.SnapshotFilter{OrgID: org, Limit: 200})
	if err != nil || len(rows) != len(want) || len(there) != len(want) {
		h.t.Errorf("rows %v, the node %v, want %v; %v", rows, there, want, err)
	}
	if unready, err := h.db.UnreadySnapshots(context.Background()); err != nil || len(unready) > 0 {
		h.t.Errorf("not ready: %+v, %v", unready, err)
	}
}

// TestDropsSnapshot checks recovery of snapshots in every state after a crash.
func TestDropsSnapshot(t *testing.T) {
	if !sandbox.DropsSnapshot(nil) {
		t.Error("one without a row stays")
	}
	for state, want := range map[sandbox.SnapshotState]bool{sandbox.SnapshotCreating: true, sandbox.SnapshotReady: false,
		sandbox.SnapshotDeleting: true} {
		if got := sandbox.DropsSnapshot(&sandbox.Snapshot{State: state}); got != want {
			t.Errorf("%s: dropped %v", state, got)
		}
	}
}

func TestSnapshotOfBothModesAndStates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ephemeral := h.mustCreate(sandbox.Request{Env: map[string]string{"B": "its own"}, DiskSizeMB: ptr(100), Size: "big",
			Egress: &sandbox.Egress{Mode: sandbox.DenyAll}})
		first := h.save(ephemeral.ID, "first")
		if first.State != sandbox.SnapshotReady || first.SandboxID != ephemeral.ID || first.Size.Name != "big" ||
			first.DiskMB != 100 || first.Bytes == 0 || first.Image != "abc" {
			t.Errorf("the snapshot is %+v", first)
		}
		if e := h.latest(ephemeral.ID); e.Reason != "snapshot_made" || e.From != e.To ||
			e.Detail != string(first.ID)+" first" {
			t.Errorf("its event is %+v", e)
		}
		if n := h.calls("suspend", ephemeral.ID) + h.calls("destroy", ephemeral.ID); n > 0 {
			t.Errorf("the sandbox was ended: %v", h.node.Calls())
		}
		id := h.persistent(time.Hour)
		running := h.save(id, "")
		h.mustSuspend(id)
		asleep := h.save(id, "")
		h.wantState(id, sandbox.Suspended, "") // SaveSnapshot did not wake it
		h.wantSnapshots(first.ID, running.ID, asleep.ID)
		// The snapshot outlives its sandbox.
		if err := h.Destroy(context.Background(), org, ephemeral.ID); err != nil {
			t.Fatal(err)
		}
		sbx := h.mustCreate(sandbox.Request{Snapshot: "first", Env: map[string]string{"C": "new"},
			Metadata: map[string]string{"m": "1"}})
		if sbx.Size.Name != "big" || sbx.DiskMB != 100 || sbx.Egress.Mode != sandbox.DenyAll ||
			sbx.Source != sandbox.Restored || sbx.Origin != string(first.ID) ||
			fmt.Sprint(sbx.Env) != "map[A:template B:its own C:new]" || sbx.Timeout != sandbox.DefaultTimeout ||
			sbx.Template != "python" || sbx.TemplateVersion != 1 {
			t.Errorf("the sandbox is %+v", sbx)
		}
		h.wantState(sbx.ID, sandbox.Running, "")
		events, _, err := h.Events(context.Background(), org, sbx.ID, 10, "")
		if err != nil || len(events) != 2 || events[1].Reason != "snapshot" || events[1].Detail != string(first.ID) {
			t.Errorf("its events are %+v, %v", events, err)
		}
		again := h.mustCreate(sandbox.Request{Snapshot: string(asleep.ID), Mode: "persistent", Size: "small",
			Egress: &sandbox.Egress{Mode: sandbox.AllowAll}})
		if again.Mode != sandbox.Persistent || again.IdleTimeout != sandbox.DefaultIdleTimeout ||
			again.Egress.Mode != sandbox.AllowAll {
			t.Errorf("the sandbox is %+v", again)
		}
		if images, err := h.db.Images(context.Background()); err != nil || len(images) != 1 {
			t.Errorf("images %v, %v", images, err)
		}
	})
}

func TestSnapshotRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		sbx := h.mustCreate(sandbox.Request{Timeout: ptr(time.Hour)})
		snap := h.save(sbx.ID, "taken")
		for _, name := range []string{"snap_mine", "-a", ".a", "a/b", "a b", strings.Repeat("a", 64)} {
			_, err := h.SaveSnapshot(ctx, org, sbx.ID, name)
			wantCode(t, err, fault.Invalid, "invalid_name")
			if _, err := h.GetSnapshot(ctx, org, name); !fault.Is(err, fault.NotFound) {
				t.Errorf("%q is found: %v", name, err)
			}
		}
		_, err := h.SaveSnapshot(ctx, org, sbx.ID, "taken")
		wantCode(t, err, fault.Conflict, "snapshot_exists")
		if n := h.calls("snapshot", sbx.ID); n != 1 {
			t.Errorf("the node was asked %d times", n)
		}
		for _, other := range []string{"taken", string(snap.ID)} {
			_, err := h.GetSnapshot(ctx, "org_b", other)
			wantCode(t, err, fault.NotFound, "snapshot_not_found")
			wantCode(t, h.DeleteSnapshot(ctx, "org_b", other), fault.NotFound, "snapshot_not_found")
			_, err = h.Create(ctx, sandbox.Caller{OrgID: "org_b"}, sandbox.Request{Snapshot: other}, sandbox.Once{}, true)
			wantCode(t, err, fault.NotFound, "snapshot_not_found")
		}
		for field, r := range map[string]sandbox.Request{
			"snapshot":     {Template: "python", Snapshot: "taken"},
			"template":     {},
			"size":         {Snapshot: "taken", Size: "big"},
			"disk_size_mb": {Snapshot: "taken", DiskSizeMB: ptr(100)},
			"timeout":      {Snapshot: "taken", Mode: "persistent", Timeout: ptr(time.Minute)},
		} {
			_, err := h.Create(ctx, h.caller(), r, sandbox.Once{}, true)
			if f := fault.As(err); f == nil || f.Kind != fault.Invalid || f.Field != field {
				t.Errorf("%s: %v", field, err)
			}
		}
		h.quota = sandbox.Quota{Sandboxes: 1}
		_, err = h.Create(ctx, h.caller(), sandbox.Request{Snapshot: "taken"}, sandbox.Once{}, true)
		wantCode(t, err, fault.Exhausted, "quota_exceeded")
		h.node.SetFull(true)
		h.quota = sandbox.Quota{}
		_, err = h.Create(ctx, h.caller(), sandbox.Request{Snapshot: "taken"}, sandbox.Once{}, true)
		wantCode(t, err, fault.Unavailable, "no_capacity")
		h.node.SetFull(false)
		h.node.OnSnapshot = func(context.Context, sandbox.ID) error { return fault.New(fault.NoSpace, "disk_full", "full") }
		_, err = h.SaveSnapshot(ctx, org, sbx.ID, "")
		wantCode(t, err, fault.NoSpace, "disk_full")
		h.node.OnSnapshot = func(context.Context, sandbox.ID) error { return errInjected }
		_, err = h.SaveSnapshot(ctx, org, sbx.ID, "")
		wantCode(t, err, fault.Internal, "snapshot_failed")
		h.wantState(sbx.ID, sandbox.Running, "")
		h.wantSnapshots(snap.ID)
		if err := h.Destroy(ctx, org, sbx.ID); err != nil {
			t.Fatal(err)
		}
		_, err = h.SaveSnapshot(ctx, org, sbx.ID, "")
		wantCode(t, err, fault.Conflict, "sandbox_not_running")
	})
}

// TestDeleteWhileCreating deletes a snapshot while a sandbox is made from it. The sandbox is made,
// no other caller finds the snapshot, and its files are removed afterwards.
func TestDeleteWhileCreating(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		snap := h.save(h.mustCreate(sandbox.Request{Timeout: ptr(time.Hour)}).ID, "mine")
		h.node.OnCreate = func(context.Context, sandbox.Spec) error { time.Sleep(time.Minute); return nil }
		made := make(chan error, 1)
		go func() {
			_, err := h.create(sandbox.Request{Snapshot: "mine"})
			made <- err
		}()
		synctest.Wait()
		if err := h.DeleteSnapshot(ctx, org, "mine"); err != nil {
			t.Fatal(err)
		}
		_, err := h.create(sandbox.Request{Snapshot: string(snap.ID)})
		wantCode(t, err, fault.NotFound, "snapshot_not_found")
		wantCode(t, h.DeleteSnapshot(ctx, org, string(snap.ID)), fault.NotFound, "snapshot_not_found")
		if there, _ := h.node.Snapshots(ctx); len(there) != 1 {
			t.Error("its files are gone")
		}
		if err := <-made; err != nil {
			t.Errorf("the sandbox was not made: %v", err)
		}
		synctest.Wait()
		h.wantSnapshots()
	})
}

// TestCrashWithSnapshots crashes at every point of making and deleting a snapshot.
func TestCrashWithSnapshots(t *testing.T) {
	for _, when := range []string{"saving", "saved", "deleting", "forking", "children"} {
		t.Run(when, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFixture(t)
				ctx := context.Background()
				sbx := h.mustCreate(sandbox.Request{Timeout: ptr(time.Hour)})
				kept := h.save(sbx.ID, "kept")
				hang := func(ctx context.Context, _ sandbox.ID) error { <-ctx.Done(); return ctx.Err() }
				done := make(chan error, 1)
				switch when {
				case "saving", "forking":
					h.node.OnSnapshot = hang
				case "children":
					h.node.OnCreate = func(ctx context.Context, s sandbox.Spec) error { return hang(ctx, s.ID) }
				case "deleting":
					h.node.OnDrop = func(ctx context.Context, id sandbox.SnapshotID) error { return hang(ctx, "") }
				}
				go func() {
					var err error
					switch when {
					case "saving":
						_, err = h.SaveSnapshot(ctx, org, sbx.ID, "")
					case "deleting":
						err = h.DeleteSnapshot(ctx, org, "kept")
					case "forking", "children":
						_, err = h.Fork(ctx, h.caller(), sbx.ID, sandbox.ForkRequest{Count: 3})
					}
					done <- err
				}()
				synctest.Wait()
				if when == "saved" { // its row was never made ready
					snap := sandbox.Snapshot{ID: sandbox.NewSnapshotID(), OrgID: org, State: sandbox.SnapshotCreating,
						CreatedAt: time.Now().UTC()}
					if err := h.db.AddSnapshot(ctx, snap, 0); err != nil {
						t.Fatal(err)
					}
					if _, err := h.node.Snapshot(ctx, sbx.ID, snap.ID); err != nil {
						t.Fatal(err)
					}
				}
				h.crash()
				h.node.OnSnapshot, h.node.OnCreate, h.node.OnDrop = nil, nil, nil
				h.start()
				<-done
				pass(time.Minute)
				h.wantState(sbx.ID, sandbox.Running, "")
				if when == "deleting" {
					h.wantSnapshots()
				} else {
					h.wantSnapshots(kept.ID)
				}
				found, _ := h.node.List(ctx)
				if len(found) != 1 {
					t.Errorf("the host has %+v", found)
				}
			})
		})
	}
}

func TestDestroyInterruptsASnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{})
		h.node.OnSnapshot = func(ctx context.Context, _ sandbox.ID) error { <-ctx.Done(); return ctx.Err() }
		for _, f := range []func() error{
			func() error { _, err := h.SaveSnapshot(context.Background(), org, sbx.ID, ""); return err },
			func() error {
				_, err := h.Fork(context.Background(), h.caller(), sbx.ID, sandbox.ForkRequest{})
				return err
			},
		} {
			failed := make(chan error, 1)
			go func() { failed <- f() }()
			synctest.Wait()
			if err := h.Destroy(context.Background(), org, sbx.ID); err != nil {
				t.Error(err)
			}
			wantCode(t, <-failed, fault.Conflict, "sandbox_not_running")
			h.wantSnapshots()
			sbx = h.mustCreate(sandbox.Request{})
		}
	})
}

func TestFork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		sbx := h.mustCreate(sandbox.Request{Timeout: ptr(time.Hour), Metadata: map[string]string{"a": "b"},
			Egress: &sandbox.Egress{Mode: sandbox.DenyAll}})
		tokens := map[string]bool{sbx.Token: true}
		lease := h.mustConnect(sbx.ID)
		h.node.OnCreate = func(_ context.Context, spec sandbox.Spec) error {
			if spec.From == "" || spec.Image != "abc" || spec.Egress.Mode != sandbox.DenyAll || spec.Env["X"] != "y" ||
				spec.Env["A"] != "template" {
				t.Errorf("made with %+v", spec)
			}
			time.Sleep(time.Second)
			return nil
		}
		children, err := h.Fork(ctx, h.caller(), sbx.ID,
			sandbox.ForkRequest{Count: 10, Request: sandbox.Request{Env: map[string]string{"X": "y"}}})
		if err != nil || len(children) != 10 {
			t.Fatalf("%d children, %v", len(children), err)
		}
		for _, c := range children {
			if c.Err != nil || tokens[c.Sandbox.Token] || c.Sandbox.Timeout != time.Hour ||
				c.Sandbox.Source != sandbox.Forked || c.Sandbox.Origin != string(sbx.ID) || c.Sandbox.Metadata["a"] != "b" {
				t.Errorf("a child is %+v, %v", c.Sandbox, c.Err)
			}
			tokens[c.Sandbox.Token] = true
			h.wantState(c.Sandbox.ID, sandbox.Running, "")
		}
		lease.Release()
		if n := h.calls("snapshot", sbx.ID); n != 1 {
			t.Errorf("it was saved %d times", n)
		}
		h.wantSnapshots()
		if e := h.latest(sbx.ID); e.Reason != "forked" {
			t.Errorf("its event is %+v", e)
		}
		h.node.OnCreate = nil
		// Children may have another mode and other times.
		id := h.persistent(time.Hour)
		for _, c := range []struct {
			r    sandbox.Request
			want sandbox.Mode
		}{{sandbox.Request{}, sandbox.Persistent}, {sandbox.Request{Mode: "ephemeral", Timeout: ptr(time.Minute),
			Metadata: map[string]string{}}, sandbox.Ephemeral}} {
			children, err := h.Fork(ctx, h.caller(), id, sandbox.ForkRequest{Request: c.r})
			if err != nil || len(children) != 1 || children[0].Err != nil || children[0].Sandbox.Mode != c.want {
				t.Fatalf("children %+v, %v", children, err)
			}
			if child := children[0].Sandbox; c.want == sandbox.Persistent && child.IdleTimeout != time.Hour ||
				c.want == sandbox.Ephemeral && child.Timeout != time.Minute {
				t.Errorf("the child is %+v", child)
			}
		}
		h.mustSuspend(id)
		_, err = h.Fork(ctx, h.caller(), id, sandbox.ForkRequest{})
		wantCode(t, err, fault.Conflict, "sandbox_not_running")
		for field, r := range map[string]sandbox.ForkRequest{"count": {Count: 101},
			"idle_timeout": {Request: sandbox.Request{IdleTimeout: ptr(time.Hour)}},
			"env.A B":      {Request: sandbox.Request{Env: map[string]string{"A B": ""}}}} {
			_, err := h.Fork(ctx, h.caller(), sbx.ID, r)
			if f := fault.As(err); f == nil || f.Kind != fault.Invalid || f.Field != field {
				t.Errorf("%s: %v", field, err)
			}
		}
	})
}

// TestForkInPart forks with room and quota for some of the children, of which one fails.
func TestForkInPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		sbx := h.mustCreate(sandbox.Request{Timeout: ptr(time.Hour)})
		count := func(children []sandbox.Child) string {
			n := map[string]int{}
			for _, c := range children {
				if c.Err == nil {
					n["made"]++
				} else if f := fault.As(c.Err); f != nil {
					n[f.Code]++
				}
			}
			return fmt.Sprint(n)
		}
		h.quota = sandbox.Quota{Sandboxes: 4}
		children, err := h.Fork(ctx, h.caller(), sbx.ID, sandbox.ForkRequest{Count: 5})
		if got := count(children); err != nil || got != "map[made:3 quota_exceeded:2]" {
			t.Errorf("%s, %v", got, err)
		}
		n := h.calls("snapshot", sbx.ID)
		_, err = h.Fork(ctx, h.caller(), sbx.ID, sandbox.ForkRequest{Count: 5})
		wantCode(t, err, fault.Exhausted, "quota_exceeded")
		h.quota = sandbox.Quota{}
		h.node.SetMost(6)
		children, err = h.Fork(ctx, h.caller(), sbx.ID, sandbox.ForkRequest{Count: 1})
		if got := count(children); err != nil || got != "map[made:1]" {
			t.Errorf("%s, %v", got, err)
		}
		h.node.SetMost(5)
		_, err = h.Fork(ctx, h.caller(), sbx.ID, sandbox.ForkRequest{Count: 2})
		wantCode(t, err, fault.Unavailable, "no_capacity")
		if got := h.calls("snapshot", sbx.ID); got != n+1 {
			t.Errorf("saved %d times though there was no room", got-n-1)
		}
		h.node.SetMost(0)
		failed := false
		h.node.OnCreate = func(context.Context, sandbox.Spec) error {
			if !failed {
				failed = true
				return errors.New("injected")
			}
			return nil
		}
		children, err = h.Fork(ctx, h.caller(), sbx.ID, sandbox.ForkRequest{Count: 3})
		if got := count(children); err != nil || got != "map[boot_failed:1 made:2]" {
			t.Errorf("%s, %v", got, err)
		}
		h.wantSnapshots()
	})
}

// TestForkGoesOnWhenTheCallerLeaves checks that all children are made after the caller has left.
func TestForkGoesOnWhenTheCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{Timeout: ptr(time.Hour)})
		h.node.OnCreate = func(context.Context, sandbox.Spec) error { time.Sleep(time.Second); return nil }
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		if _, err := h.Fork(ctx, h.caller(), sbx.ID, sandbox.ForkRequest{
			Count: 9}); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		pass(10 * time.Second)
		sandboxes, _, err := h.List(context.Background(),
			sandbox.Filter{OrgID: org, States: []sandbox.State{sandbox.Running}, Limit: 100})
		if err != nil || len(sandboxes) != 10 {
			t.Errorf("%d sandboxes run, %v", len(sandboxes), err)
		}
		h.wantSnapshots()
	})
}

// unrecorded is a store that cannot record that a snapshot is ready.
type unrecorded struct{ sandbox.Store }

func (unrecorded) ReadySnapshot(context.Context, sandbox.SnapshotID, time.Time, int64,
	sandbox.Event) (sandbox.Snapshot, error) {
	return sandbox.Snapshot{}, errors.New("the database is full")
}

// TestUnrecordedSnapshot checks that a snapshot that is written but not recorded is removed, by its own
// ID, and nothing else.
func TestUnrecordedSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		id := h.mustCreate(sandbox.Request{}).ID
		kept, err := h.SaveSnapshot(context.Background(), org, id, "kept")
		if err != nil {
			t.Fatal(err)
		}
		service := sandbox.New(sandbox.Config{Sizes: h.Sizes(), DefaultSize: "small"}, unrecorded{h.db}, h.node, h.what,
			slog.New(slog.DiscardHandler), nil)
		if _, err := service.SaveSnapshot(context.Background(), org, id, "lost"); err == nil {
			t.Fatal("a snapshot without a row is ready")
		}
		if there, err := h.node.Snapshots(context.Background()); err != nil || !slices.Equal(there,
			[]sandbox.SnapshotID{kept.ID}) {
			t.Errorf("the machine has %v, %v", there, err)
		}
		for _, call := range h.node.Calls() {
			if what, id, _ := strings.Cut(call, " "); strings.HasPrefix(what, "drop") && !sandbox.SnapshotID(id).Valid() {
				t.Errorf("the machine was asked to %q", call)
			}
		}
	})
}
