package sandbox_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// TestDecide checks every combination of rows and observed states.
func TestDecide(t *testing.T) {
	checkpoint := &sandbox.Checkpoint{Run: "before"}
	found := map[string]*sandbox.Observed{
		"nothing":          nil,
		"alive":            {Run: "now", Alive: true, Remains: true},
		"dead":             {Run: "now", Remains: true},
		"other":            {Run: "before", Alive: true, Remains: true}, // processes of an earlier instance
		"part":             {Remains: true},                             // the node cannot tell which run it belongs to
		"alive+checkpoint": {Run: "now", Alive: true, Remains: true, Checkpoint: checkpoint},
		"dead+checkpoint":  {Run: "now", Remains: true, Checkpoint: checkpoint},
		"other+checkpoint": {Run: "before", Alive: true, Remains: true, Checkpoint: checkpoint},
		"part+checkpoint":  {Remains: true, Checkpoint: checkpoint},
		"checkpoint":       {Checkpoint: checkpoint},
		"directory":        {}, // neither an instance nor a checkpoint
		// Pooled sandboxes.
		"warm":       {Run: "now", Alive: true, Remains: true, Warm: true},
		"warm dead":  {Run: "now", Remains: true, Warm: true},
		"warm other": {Run: "before", Alive: true, Remains: true, Warm: true},
	}
	all := func(a sandbox.Action) map[string]sandbox.Action {
		m := map[string]sandbox.Action{}
		for name := range found {
			m[name] = a
		}
		return m
	}
	but := func(m map[string]sandbox.Action, a sandbox.Action, names ...string) map[string]sandbox.Action {
		for _, name := range names {
			m[name] = a
		}
		return m
	}
	withCheckpoint := []string{"dead+checkpoint", "other+checkpoint", "part+checkpoint", "checkpoint"}
	want := map[sandbox.State]map[string]sandbox.Action{
		"":                 but(all(sandbox.Remove), sandbox.Leave, "nothing"),
		sandbox.Creating:   all(sandbox.Abandon),
		sandbox.Running:    but(but(all(sandbox.Lose), sandbox.Adopt, "alive", "alive+checkpoint"), sandbox.Fall, withCheckpoint...),
		sandbox.Suspending: but(but(all(sandbox.Lose), sandbox.Resume, "alive", "alive+checkpoint"), sandbox.Rest, withCheckpoint...),
		sandbox.Suspended:  but(all(sandbox.Clear), sandbox.Leave, "nothing", "checkpoint", "directory"),
		sandbox.Waking:     all(sandbox.Rest),
		sandbox.Destroying: all(sandbox.Finish),
		sandbox.Destroyed:  but(all(sandbox.Remove), sandbox.Leave, "nothing"),
		sandbox.Failed:     but(all(sandbox.Remove), sandbox.Leave, "nothing"),
	}
	for _, state := range append(sandbox.States(), "") {
		for name, observed := range found {
			var row *sandbox.Sandbox
			if state != "" {
				row = &sandbox.Sandbox{State: state, Run: "now"}
			}
			if got := sandbox.Decide(row, nil, observed); got != want[state][name] {
				t.Errorf("row %q, host %s: got %s, want %s", state, name, got, want[state][name])
			}
			pooledRow := &sandbox.Pooled{Run: "now"}
			want := want[state][name] // a sandbox's row takes precedence over a pool's
			switch {
			case row == nil && name == "warm":
				want = sandbox.Keep
			case row == nil:
				want = sandbox.Discard
			}
			if got := sandbox.Decide(row, pooledRow, observed); got != want {
				t.Errorf("row %q, the row of a pooled sandbox, host %s: got %s, want %s", state, name, got, want)
			}
		}
	}
}

func TestRestartAbandonsAnInterruptedCreate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		// A dying server left this row in its claim, with something on the host.
		sbx := sandbox.Sandbox{ID: sandbox.NewID(), OrgID: org, Mode: sandbox.Ephemeral, State: sandbox.Creating, Run: "r",
			CreatedAt: time.Now().UTC(), Source: sandbox.Cold,
			Shape: sandbox.Shape{Egress: sandbox.Egress{Mode: sandbox.AllowAll}}}
		if _, _, err := h.db.Insert(context.Background(), sbx, sandbox.Quota{}, sandbox.Once{}); err != nil {
			t.Fatal(err)
		}
		h.node.Put(sandbox.Observed{ID: sbx.ID, Run: "r", Alive: true})
		stranger := sandbox.NewID()
		h.node.Put(sandbox.Observed{ID: stranger})
		h.crash()
		h.start()
		h.wantState(sbx.ID, sandbox.Failed, sandbox.BootFailed)
		if found, _ := h.node.List(context.Background()); len(found) > 0 {
			t.Errorf("the host still has %v", found)
		}
	})
}

// TestRowsOfAnotherNode checks that what the host has of another node's rows stays, and that no call acts on it.
func TestRowsOfAnotherNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		session := func(node string) {
			if _, err := h.db.StartSession(ctx, node, false); err != nil {
				t.Fatal(err)
			}
		}
		session("other")
		sbx := sandbox.Sandbox{ID: sandbox.NewID(), OrgID: org, Mode: sandbox.Ephemeral, State: sandbox.Creating, Run: "r",
			CreatedAt: time.Now().UTC(), Source: sandbox.Cold,
			Shape: sandbox.Shape{Egress: sandbox.Egress{Mode: sandbox.AllowAll}}}
		if _, _, err := h.db.Insert(ctx, sbx, sandbox.Quota{}, sandbox.Once{}); err != nil {
			t.Fatal(err)
		}
		snap := sandbox.Snapshot{ID: sandbox.NewSnapshotID(), OrgID: org, State: sandbox.SnapshotCreating, SandboxID: sbx.ID,
			CreatedAt: time.Now().UTC()}
		if err := h.db.AddSnapshot(ctx, snap, 0); err != nil {
			t.Fatal(err)
		}
		h.node.Put(sandbox.Observed{ID: sbx.ID, Run: "r", Alive: true})
		stranger := sandbox.NewID()
		h.node.Put(sandbox.Observed{ID: stranger})
		session("mine")
		h.crash()
		h.name = "mine"
		h.start()
		stays := func() {
			t.Helper()
			if got := h.get(sbx.ID); got.State != sandbox.Creating {
				t.Errorf("the sandbox is %s", got.State)
			}
			if s, err := h.db.GetSnapshot(ctx, snap.ID); err != nil || s.State != sandbox.SnapshotCreating {
				t.Errorf("the snapshot is %s, %v", s.State, err)
			}
			if found, err := h.node.List(ctx); err != nil || len(found) != 1 || found[0].ID != sbx.ID {
				t.Errorf("the host has %v, %v", found, err)
			}
		}
		stays()
		if err := h.Destroy(ctx, org, sbx.ID); !fault.Is(err, fault.Unavailable) {
			t.Errorf("destroying the sandbox of another node: %v", err)
		}
		stays()
	})
}
