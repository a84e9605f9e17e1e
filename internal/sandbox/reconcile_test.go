package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// TestDecide holds the whole product of rows and facts.
func TestDecide(t *testing.T) {
	point := &sandbox.Point{Run: "before"}
	facts := map[string]*sandbox.Fact{
		"nothing":     nil,
		"alive":       {Run: "now", Alive: true, Remains: true},
		"dead":        {Run: "now", Remains: true},
		"other":       {Run: "before", Alive: true, Remains: true}, // an earlier life's processes
		"part":        {Remains: true},                             // the node cannot tell which life it is of
		"alive+point": {Run: "now", Alive: true, Remains: true, Point: point},
		"dead+point":  {Run: "now", Remains: true, Point: point},
		"other+point": {Run: "before", Alive: true, Remains: true, Point: point},
		"part+point":  {Remains: true, Point: point},
		"point":       {Point: point},
		"directory":   {}, // neither a life nor a point
	}
	all := func(a sandbox.Action) map[string]sandbox.Action {
		m := map[string]sandbox.Action{}
		for name := range facts {
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
	withPoint := []string{"dead+point", "other+point", "part+point", "point"}
	want := map[sandbox.State]map[string]sandbox.Action{
		"":                 but(all(sandbox.Remove), sandbox.Leave, "nothing"),
		sandbox.Creating:   all(sandbox.Abandon),
		sandbox.Running:    but(but(all(sandbox.Lose), sandbox.Adopt, "alive", "alive+point"), sandbox.Fall, withPoint...),
		sandbox.Suspending: but(but(all(sandbox.Lose), sandbox.Resume, "alive", "alive+point"), sandbox.Rest, withPoint...),
		sandbox.Suspended:  but(all(sandbox.Clear), sandbox.Leave, "nothing", "point", "directory"),
		sandbox.Waking:     all(sandbox.Rest),
		sandbox.Destroying: all(sandbox.Finish),
		sandbox.Destroyed:  but(all(sandbox.Remove), sandbox.Leave, "nothing"),
		sandbox.Failed:     but(all(sandbox.Remove), sandbox.Leave, "nothing"),
	}
	for _, state := range append(sandbox.States(), "") {
		for name, fact := range facts {
			var row *sandbox.Sandbox
			if state != "" {
				row = &sandbox.Sandbox{State: state, Run: "now"}
			}
			if got := sandbox.Decide(row, fact); got != want[state][name] {
				t.Errorf("row %q, host %s: got %s, want %s", state, name, got, want[state][name])
			}
		}
	}
}

func TestRestartAbandonsAnInterruptedCreate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHouse(t)
		// A row that a dying server left in its claim, with something on the host.
		box := sandbox.Sandbox{ID: sandbox.NewID(), OrgID: org, Mode: sandbox.Ephemeral, State: sandbox.Creating, Run: "r",
			CreatedAt: time.Now().UTC(), Source: sandbox.Cold, Egress: sandbox.Egress{Mode: sandbox.AllowAll}}
		if _, _, err := h.db.Insert(context.Background(), box, sandbox.Quota{}, sandbox.Once{}); err != nil {
			t.Fatal(err)
		}
		h.node.Put(sandbox.Fact{ID: box.ID, Run: "r", Alive: true})
		stranger := sandbox.NewID()
		h.node.Put(sandbox.Fact{ID: stranger})
		h.crash()
		h.start()
		h.wantState(box.ID, sandbox.Failed, sandbox.BootFailed)
		if facts, _ := h.node.List(context.Background()); len(facts) > 0 {
			t.Errorf("the host still has %v", facts)
		}
	})
}

// TestRandomLives drives random operations, faults, deaths and restarts, and holds
// after each that rows and host agree and that nothing is stuck.
func TestRandomLives(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		steps := rapid.SliceOfN(rapid.IntRange(0, 99), 1, 25).Draw(rt, "steps")
		var failure string
		synctest.Test(t, func(t *testing.T) { failure = randomLife(newHouse(t), steps) })
		if failure != "" {
			rt.Fatal(failure)
		}
	})
}

// randomLife plays the steps and says what was wrong, if anything.
func randomLife(h *house, steps []int) string {
	ctx := context.Background()
	var ids []sandbox.ID
	pick := func(n int) sandbox.ID { return ids[n%len(ids)] }
	fail := errors.New("injected")
	for i, n := range steps {
		h.node.OnCreate, h.node.OnDestroy = nil, nil
		switch {
		case n < 30 || len(ids) == 0:
			box, err := h.create(sandbox.Request{Timeout: ptr(time.Duration(1+n) * time.Second)})
			if err != nil {
				return fmt.Sprintf("step %d: create: %v", i, err)
			}
			ids = append(ids, box.ID)
		case n < 40:
			h.node.OnCreate = func(context.Context, sandbox.Spec) error { return fail }
			if _, err := h.create(sandbox.Request{}); err == nil {
				return fmt.Sprintf("step %d: a failing create succeeded", i)
			}
		case n < 55:
			if err := h.Destroy(ctx, org, pick(n)); err != nil {
				return fmt.Sprintf("step %d: destroy: %v", i, err)
			}
		case n < 60:
			h.node.OnDestroy = func(context.Context, sandbox.ID) error { return fail }
			_ = h.Destroy(ctx, org, pick(n)) // fails if it was alive; reconcile finishes it
		case n < 70:
			_, err := h.Keepalive(ctx, org, pick(n), ptr(time.Minute))
			if err != nil && !fault.Is(err, fault.Conflict) {
				return fmt.Sprintf("step %d: keepalive: %v", i, err)
			}
		case n < 80:
			if h.get(pick(n)).State == sandbox.Running {
				h.node.Die(pick(n))
			}
		case n < 90:
			h.crash()
			h.start()
		default:
			time.Sleep(time.Duration(n) * time.Second)
		}
		synctest.Wait()
	}
	h.node.OnCreate, h.node.OnDestroy = nil, nil
	time.Sleep(time.Minute) // longer than the reconciler needs
	synctest.Wait()
	return agree(h)
}

// agree says where rows and host differ.
func agree(h *house) string {
	rows, err := h.db.Unfinished(context.Background())
	if err != nil {
		return err.Error()
	}
	facts, _ := h.node.List(context.Background())
	running := map[sandbox.ID]bool{}
	for _, row := range rows {
		if row.State != sandbox.Running {
			return fmt.Sprintf("sandbox %s is stuck in %s", row.ID, row.State)
		}
		if !row.ExpiresAt.After(time.Now()) {
			return fmt.Sprintf("sandbox %s outlived its time", row.ID)
		}
		running[row.ID] = true
	}
	for _, f := range facts {
		if !running[f.ID] || !f.Alive {
			return fmt.Sprintf("the host has %+v without a living row", f)
		}
		delete(running, f.ID)
	}
	for id := range running {
		return fmt.Sprintf("sandbox %s is running and the host has nothing", id)
	}
	return ""
}
