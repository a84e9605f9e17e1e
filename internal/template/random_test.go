package template

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/cayhq/cay/internal/fault"
)

// TestRandomRuns makes random calls, with restarts and crashes of the server in between, and
// then lets everything come to its end.
func TestRandomRuns(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		steps := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) step {
			return step{
				what: rapid.SampledFrom([]string{"create", "create", "rebuild", "again", "cancel", "delete", "want", "fail", "hold",
					"release", "release", "stop", "crash", "lose", "sleep"}).Draw(t, "what"),
				org:   rapid.IntRange(0, 1).Draw(t, "org"),
				name:  rapid.IntRange(0, 3).Draw(t, "name"),
				image: rapid.IntRange(0, 2).Draw(t, "image"),
			}
		}), 1, 40).Draw(rt, "steps")
		var failure string
		synctest.Test(t, func(t *testing.T) {
			w := &world{t: t, store: newMemory(), builder: newBuilder(), versions: map[string]int{}}
			failure = w.play(steps)
		})
		if failure != "" {
			rt.Fatal(failure)
		}
	})
}

type step struct {
	what             string
	org, name, image int
}

type world struct {
	t        *testing.T
	store    *memory
	builder  *builder
	harness  *harness
	release  func() // nil while nothing is held
	versions map[string]int
}

func (w *world) begin() {
	w.harness = life(w.t, w.store, w.builder, func(c *Config) { c.Concurrent, c.MaxTemplates = 2, 3 })
}

func (w *world) play(steps []step) string {
	// Templates named t3 are made from the built-in one, which is built for them.
	w.builder.from = map[string]string{"t3": "lazy"}
	w.begin()
	defer func() { w.harness.stop() }()
	for i, s := range steps {
		if failure := w.do(s); failure != "" {
			return fmt.Sprintf("step %d %+v: %s", i, s, failure)
		}
		if failure := w.look(); failure != "" {
			return fmt.Sprintf("after step %d %+v: %s", i, s, failure)
		}
	}
	return w.end()
}

// do makes one step. Only errors that such a call may have are allowed.
func (w *world) do(s step) string {
	h := w.harness
	c := Caller{OrgID: fmt.Sprint("org", s.org)}
	name, r := fmt.Sprint("t", s.name), of("", fmt.Sprint("image", s.image))
	var err error
	switch s.what {
	case "create":
		r.Name = name
		_, err = h.Create(w.t.Context(), c, r, nil)
	case "rebuild":
		_, err = h.Rebuild(w.t.Context(), c, name, &r, nil)
	case "again":
		_, err = h.Rebuild(w.t.Context(), c, name, nil, nil)
	case "cancel":
		_, err = h.Cancel(w.t.Context(), c, name)
	case "delete":
		if err = h.Delete(w.t.Context(), c, name, true); err == nil {
			delete(w.versions, c.OrgID+name)
		}
	case "want":
		_, err = h.Ready(w.t.Context(), c.OrgID, name)
	case "fail":
		var failure error
		if s.image == 0 {
			failure = errors.New("no")
		}
		w.builder.fails(name, failure)
	case "hold":
		if w.release == nil {
			w.release = w.builder.hold()
		}
	case "release":
		w.let()
	case "stop":
		h.stop()
		w.begin()
	case "crash":
		// A crash leaves rows as they were while builds ran.
		before := w.store.choose(func(Template) bool { return true })
		h.stop()
		for _, row := range before {
			w.store.mu.Lock()
			w.store.rows[row.ID] = row
			w.store.mu.Unlock()
		}
		w.begin()
	case "lose":
		w.builder.mu.Lock()
		image := fmt.Sprintf("image of %s image%d", name, s.image)
		w.builder.gone[image] = true
		w.builder.mu.Unlock()
		h.Recheck(image)
	case "sleep":
		time.Sleep(time.Minute)
	}
	synctest.Wait()
	switch f := fault.As(err); {
	case err == nil:
	case f != nil && (f.Kind == fault.Conflict || f.Kind == fault.NotFound || f.Kind == fault.Exhausted):
	default:
		return err.Error()
	}
	return ""
}

func (w *world) let() {
	if w.release != nil {
		w.release()
		w.release = nil
	}
}

// look checks the invariants.
func (w *world) look() string {
	if most := w.builder.most.Load(); most > 2 {
		return fmt.Sprintf("%d builds at once", most)
	}
	for _, row := range w.store.choose(func(Template) bool { return true }) {
		key := row.OrgID + row.Name
		if row.Version < w.versions[key] {
			return fmt.Sprintf("version of %s went from %d to %d", key, w.versions[key], row.Version)
		}
		w.versions[key] = row.Version
		if row.Status == Ready && (row.Queued() || !row.usable() || row.BuildError != nil) ||
			row.Status == Failed && (row.Queued() || row.BuildError == nil) ||
			row.Status == Building && !row.Queued() {
			return fmt.Sprintf("row %+v is contradictory", row)
		}
	}
	return ""
}

// end lets every build come to its end. Then none may wait or run any more.
func (w *world) end() string {
	w.let()
	time.Sleep(3 * time.Hour) // retries of the built-in one included
	synctest.Wait()
	if failure := w.look(); failure != "" {
		return failure
	}
	for _, row := range w.store.choose(func(Template) bool { return true }) {
		if row.Queued() || row.Status == Building || row.Status == Pending && !row.Builtin() {
			return fmt.Sprintf("in the end %s of %s is %s (queued %t)", row.Name, row.OrgID, row.Status, row.Queued())
		}
		if b, err := w.store.GetBuild(w.t.Context(), row.ID, ""); row.Status == Ready && !row.Builtin() &&
			(err != nil || row.Inputs != b.Definition.inputs(b.Context)) {
			return fmt.Sprintf("%s is ready, and not from what was asked for last: %v", row.Name, err)
		}
	}
	h := w.harness
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.queue.orders)+len(h.runs)+len(h.running)+len(h.parked)+len(h.secrets) > 0 {
		return fmt.Sprintf("left over: queue %v, runs %v, running %v, parked %v", h.queue.orders, h.runs, h.running, h.parked)
	}
	if n := w.builder.running.Load(); n > 0 {
		return fmt.Sprintf("%d builds still run", n)
	}
	return ""
}
