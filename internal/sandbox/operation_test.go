package sandbox_test

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// asks has a call for each operation that has a rule.
var asks = map[string]func(f *fixture, id sandbox.ID) error{
	"suspend": func(f *fixture, id sandbox.ID) error {
		_, err := f.Suspend(context.Background(), org, id, sandbox.KeepAll)
		return err
	},
	"wake": func(f *fixture, id sandbox.ID) error {
		lease, err := f.Connect(context.Background(), f.caller(), id, sandbox.ForCommand)
		if err == nil {
			lease.Release()
		}
		return err
	},
	"checkpoint": func(f *fixture, id sandbox.ID) error {
		_, err := f.Checkpoint(context.Background(), org, id)
		return err
	},
	"drop_memory": func(f *fixture, id sandbox.ID) error {
		_, err := f.DropMemory(context.Background(), f.caller(), id)
		return err
	},
	"egress": func(f *fixture, id sandbox.ID) error {
		_, err := f.SetEgress(context.Background(), org, id, sandbox.Egress{Mode: sandbox.DenyAll})
		return err
	},
	"snapshot": func(f *fixture, id sandbox.ID) error {
		_, err := f.SaveSnapshot(context.Background(), org, id, "")
		return err
	},
	"fork": func(f *fixture, id sandbox.ID) error {
		_, err := f.Fork(context.Background(), f.caller(), id, sandbox.ForkRequest{Count: 1})
		return err
	},
}

// outcome names what the machine does when an operation asks it to work.
type outcome string

const (
	works    outcome = "works"
	fails    outcome = "fails"     // with an error, and the sandbox goes on
	dies     outcome = "dies"      // with an error, and the sandbox is dead
	destroys outcome = "destroyed" // a destroy interrupts the work
)

// onMachine makes the fake node do what the outcome says for the next calls about the sandbox. It
// calls during first, with the state of the row.
func (h *fixture) onMachine(what outcome, id sandbox.ID, during func(sandbox.State)) {
	do := func(ctx context.Context) error {
		during(h.get(id).State)
		switch what {
		case fails:
			return errors.New("the machine is broken")
		case dies:
			h.node.Kill(id)
			return errors.New("the machine is broken")
		case destroys:
			go func() { _ = h.Destroy(context.Background(), org, id) }()
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}
	byID := func(ctx context.Context, _ sandbox.ID) error { return do(ctx) }
	h.node.OnSuspend, h.node.OnCheckpoint, h.node.OnSetEgress, h.node.OnSnapshot = byID, byID, byID, byID
	h.node.OnWake = func(ctx context.Context, _ sandbox.Spec) error { return do(ctx) }
}

// left puts a persistent sandbox into a state, as a server that died there leaves it: with a
// recovery point, and alive unless it is suspended or over.
func (h *fixture) left(state sandbox.State) sandbox.ID {
	h.t.Helper()
	now := time.Now().UTC().Truncate(time.Microsecond)
	sbx := sandbox.Sandbox{ID: sandbox.NewID(), OrgID: org, Mode: sandbox.Persistent, State: sandbox.Creating, Run: "r",
		CreatedAt: now, LastActivityAt: now, Source: sandbox.Cold,
		Shape: sandbox.Shape{Size: sandbox.Size{Name: "small", VCPUs: 1, MemoryMB: 512}, DiskMB: 64, Image: "abc",
			Egress: sandbox.Egress{Mode: sandbox.AllowAll}}}
	if _, _, err := h.db.Insert(context.Background(), sbx, sandbox.Quota{}, sandbox.Once{}); err != nil {
		h.t.Fatal(err)
	}
	if state != sandbox.Creating {
		c := sandbox.Change{ID: sbx.ID, From: []sandbox.State{sandbox.Creating}, To: state, At: now}
		if state == sandbox.Suspended || state == sandbox.Waking {
			c.SuspendedAt = &now
		}
		if _, err := h.db.Transition(context.Background(), c); err != nil {
			h.t.Fatal(err)
		}
	}
	checkpoint := &sandbox.Checkpoint{At: now, Size: 1, Run: "r"}
	switch {
	case state.Over():
	case state == sandbox.Suspended:
		h.node.Put(sandbox.Observed{ID: sbx.ID, Checkpoint: checkpoint})
	default:
		h.node.Put(sandbox.Observed{ID: sbx.ID, Run: "r", Alive: true, Remains: true, Egress: sbx.Egress,
			Checkpoint: checkpoint})
	}
	return sbx.ID
}

// settled maps each state to the one that a claim is settled to, as left puts it.
var settled = map[sandbox.State]sandbox.State{
	sandbox.Creating: sandbox.Failed, sandbox.Running: sandbox.Running, sandbox.Suspending: sandbox.Running,
	sandbox.Suspended: sandbox.Suspended, sandbox.Waking: sandbox.Suspended, sandbox.Destroying: sandbox.Destroyed,
	sandbox.Destroyed: sandbox.Destroyed, sandbox.Failed: sandbox.Failed,
}

// TestOperations asks for each operation in each state, with each outcome on the machine, and expects
// what the table of operations says.
func TestOperations(t *testing.T) {
	if names := sandbox.Operations(); len(names) != len(asks) {
		t.Fatalf("the test asks for %d operations of %q", len(asks), names)
	}
	for name, ask := range asks {
		for _, state := range sandbox.States() {
			for _, what := range []outcome{works, fails, dies, destroys} {
				t.Run(name+"/"+string(state)+"/"+string(what), func(t *testing.T) {
					t.Parallel()
					synctest.Test(t, func(t *testing.T) { testOperation(t, name, ask, state, what) })
				})
			}
		}
	}
}

func testOperation(t *testing.T, name string, ask func(*fixture, sandbox.ID) error, state sandbox.State, what outcome) {
	h := newFixture(t)
	id := h.left(state)
	rule, from := sandbox.RuleOf(name), settled[state]
	h.onMachine(what, id, func(now sandbox.State) {
		if want := cmp.Or(rule.Claim, from); now != want {
			t.Errorf("while the machine works the sandbox is %s, want %s", now, want)
		}
	})
	err := ask(h, id)
	synctest.Wait()
	after := h.get(id)
	refused := func() {
		t.Helper()
		wantCode(t, err, fault.Conflict, "sandbox_not_running")
	}
	done := cmp.Or(rule.Done, from)
	switch {
	case !slices.Contains(rule.Asked, state):
		refused()
		if after.State != state {
			t.Errorf("a refused call changed the sandbox from %s to %s", state, after.State)
		}
	case !slices.Contains(rule.Acts, from):
		refused()
		if after.State != from {
			t.Errorf("the sandbox is %s, want it settled as %s", after.State, from)
		}
	case err == nil:
		if after.State != done {
			t.Errorf("after success the sandbox is %s, want %s", after.State, done)
		}
	case what == works:
		t.Errorf("the operation failed: %v", err)
	case what == destroys:
		refused()
		pass(time.Second)
		h.wantState(id, sandbox.Destroyed, sandbox.Requested)
	case after.State != from && !slices.Contains(rule.Failed, after.State):
		t.Errorf("after %v the sandbox is %s, want %s or one of %s", err, after.State, from, rule.Failed)
	}
	h.onMachine(works, id, func(sandbox.State) {})
	if err := h.Reconcile(context.Background()); err != nil {
		t.Error(err)
	}
	synctest.Wait()
	if wrong := (&scenario{fixture: h}).agree(); wrong != "" {
		t.Error(wrong)
	}
}

// TestMoves checks that each state can be reached and left as the table of moves says: what is over
// stays over, a claim leads on, and a sandbox that is not over can be destroyed.
func TestMoves(t *testing.T) {
	reached := map[sandbox.State]bool{sandbox.Creating: true}
	for _, from := range sandbox.States() {
		for _, to := range sandbox.Moves(from) {
			reached[to] = true
			if to == sandbox.Creating {
				t.Errorf("%s leads back to creating", from)
			}
		}
		if over := len(sandbox.Moves(from)) == 0; over != from.Over() {
			t.Errorf("%s has no way on: %v", from, over)
		}
		ends := from.Over() || from == sandbox.Destroying
		if !ends && !slices.Contains(sandbox.Moves(from), sandbox.Destroying) {
			t.Errorf("a sandbox that is %s cannot be destroyed", from)
		}
	}
	if len(reached) != len(sandbox.States()) {
		t.Errorf("only %v can be reached", reached)
	}
}
