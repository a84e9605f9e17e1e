package template

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

var me = Caller{OrgID: "org"}

// life starts a service without built-in templates except "lazy", which is not built in advance.
func life(t *testing.T, store *memory, b *builder, change ...func(*Config)) *harness {
	t.Helper()
	cfg := Config{Builtins: []Definition{definition("lazy")}}
	for _, c := range change {
		c(&cfg)
	}
	h := startWith(t, cfg, store, b, newShelf())
	synctest.Wait() // for the first collection: the shelf keeps nothing for being new
	return h
}

// of returns a request for a template from an image.
func of(name, image string) Request { return Request{Definition: Definition{Name: name, Image: image}} }

func (h *harness) create(t *testing.T, c Caller, r Request) Template {
	t.Helper()
	tpl, err := h.Create(t.Context(), c, r, nil)
	if err != nil {
		t.Fatal(err)
	}
	return tpl
}

func (h *harness) rebuild(t *testing.T, name string, r *Request) Template {
	t.Helper()
	tpl, err := h.Rebuild(t.Context(), me, name, r, nil)
	if err != nil {
		t.Fatal(err)
	}
	return tpl
}

func wantCode(t *testing.T, err error, code string) {
	t.Helper()
	if f := fault.As(err); f == nil || f.Code != code {
		t.Errorf("error is %v, want %s", err, code)
	}
}

func TestTemplateOfAnOrganization(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var results []string
		h := life(t, newMemory(), newBuilder(), func(c *Config) {
			c.Observe = func(result string, _ time.Duration) { results = append(results, result) }
		})
		r := of("app", "a:1")
		r.Env, r.Egress = map[string]string{"A": "mine"}, &sandbox.Egress{Mode: sandbox.DenyAll}
		first := h.create(t, me, r)
		if first.Status != Pending || first.Version != 0 || first.Env["A"] != "mine" {
			t.Errorf("created %+v", first)
		}
		h.wantBuilt(t, "app")
		got := h.wantStatus(t, "app", Ready, 1)
		want := Template{ID: first.ID, OrgID: "org", Name: "app", Status: Ready, BuildID: first.BuildID, Version: 1,
			Shape: sandbox.Shape{Image: "image of app a:1", Env: map[string]string{"A": "mine", "B": "image"}, User: "app",
				Workdir: "/srv", Start: sandbox.Start{Args: []string{"serve"}}, Egress: sandbox.Egress{Mode: sandbox.DenyAll}},
			ImageSize: 7, Source: "from a:1", Inputs: got.Inputs, ReadyBuild: first.BuildID, CreatedAt: got.CreatedAt, UpdatedAt: got.UpdatedAt, BuiltAt: got.BuiltAt}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("ready (-want +got):\n%s", diff)
		}
		if v, err := h.Ready(t.Context(), "org", "app"); err != nil || !cmp.Equal(v.Start, want.Start) {
			t.Errorf("Ready gives %+v, %v", v, err)
		}
		if _, err := h.Ready(t.Context(), "other", "app"); !fault.Is(err, fault.NotFound) {
			t.Errorf("another organization gets %v", err)
		}
		_, err := h.Create(t.Context(), me, of("app", "b"), nil)
		wantCode(t, err, "template_exists")
		_, err = h.Create(t.Context(), me, of("lazy", "b"), nil)
		wantCode(t, err, "template_exists")

		again := r
		again.Egress = nil
		h.rebuild(t, "app", &again) // the same inputs do nothing
		h.wantBuilt(t)
		h.rebuild(t, "app", nil) // unless a new look-up is requested
		h.wantBuilt(t, "app")
		if !h.builder.jobs[len(h.builder.jobs)-1].Refresh {
			t.Error("the job does not say so")
		}
		h.wantStatus(t, "app", Ready, 1)
		h.builder.fails("app", &BuildError{Step: "RUN x", ExitCode: 3, Tail: []string{"no"}, Message: "it failed"})
		h.rebuild(t, "app", new(of("", "a:2")))
		h.wantBuilt(t, "app")
		failed := h.wantStatus(t, "app", Failed, 1)
		if diff := cmp.Diff(&BuildError{Step: "RUN x", ExitCode: 3, Tail: []string{"no"}, Message: "it failed"},
			failed.BuildError); diff != "" || failed.Image != got.Image {
			t.Errorf("failed with %+v", failed)
		}
		h.builder.fails("app", nil)
		h.rebuild(t, "app", new(of("", "a:2"))) // a failed one is tried again
		h.wantBuilt(t, "app")
		second := h.wantStatus(t, "app", Ready, 2)
		if second.Env["A"] != "image" || second.Egress.Mode != sandbox.DenyAll || second.BuildError != nil {
			t.Errorf("version 2 is %+v", second)
		}
		if diff := cmp.Diff([]string{"ready", "ready", "failed", "ready"}, results); diff != "" {
			t.Error(diff)
		}
	})
}

func TestVersionCountsWhatSandboxesGet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		h.create(t, me, of("app", "a"))
		for i, change := range []func(*Request){
			func(r *Request) { r.Description = "no difference" },
			func(r *Request) { r.Env = map[string]string{"C": "d"} },
			func(r *Request) { r.StartCommand = new("") },
			func(r *Request) { r.User = "me" },
		} {
			synctest.Wait()
			r := of("", "a")
			change(&r)
			h.rebuild(t, "app", &r)
			h.wantStatus(t, "app", Ready, []int{1, 2, 3, 4}[i])
		}
	})
}

// TestTimesAreNoVersion builds an image that differs from the one before in its times alone.
func TestTimesAreNoVersion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, builds := newBuilder(), 0
		b.made = func(Definition) string { builds++; return fmt.Sprintf("image@%d", builds) }
		h := life(t, newMemory(), b)
		h.create(t, me, of("app", "a"))
		synctest.Wait()
		for range 2 {
			h.rebuild(t, "app", nil)
			h.wantStatus(t, "app", Ready, 1)
			if got := h.get(t, "app").Image; got != "image@1" {
				t.Errorf("the image is %s", got)
			}
		}
		if builds != 3 {
			t.Errorf("%d builds", builds)
		}
	})
}

// TestRestartDuringABuild checks that a service continues from any state that the last one ended
// in.
func TestRestartDuringABuild(t *testing.T) {
	for name, c := range map[string]struct {
		leave func(*Template) // the row that a crash left
		want  Status
		built []string
	}{
		"pending":            {func(r *Template) {}, Ready, []string{"app"}},
		"building":           {func(r *Template) { r.Status, r.Progress, r.Tries = Building, "half way", 1 }, Ready, []string{"app"}},
		"killing the server": {func(r *Template) { r.Status, r.Tries = Building, maxTries }, Failed, nil},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, b := newMemory(), newBuilder()
				release := b.hold()
				h := life(t, store, b)
				h.create(t, me, of("app", "a"))
				h.wantBuilt(t, "app")
				h.stop()
				if row := h.get(t, "app"); row.Status != Pending || row.Progress != "" || row.Tries != 0 || !row.Queued() {
					t.Errorf("after a stop the row is %+v", row)
				}
				store.set(t, "app", c.leave)
				release()
				h = life(t, store, b)
				h.wantBuilt(t, c.built...)
				row := h.wantStatus(t, "app", c.want, map[Status]int{Ready: 1}[c.want])
				if row.Queued() || row.Tries != 0 {
					t.Errorf("row is %+v", row)
				}
				if c.want == Failed {
					h.rebuild(t, "app", nil) // a user may try it again
					h.wantBuilt(t, "app")
				}
			})
		})
	}
}

func TestTriesAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, b := newMemory(), newBuilder()
		release := b.hold()
		defer release()
		h := life(t, store, b)
		h.create(t, me, of("app", "a"))
		synctest.Wait()
		if row := h.get(t, "app"); row.Tries != 1 || row.Status != Building {
			t.Errorf("row is %+v", row)
		}
	})
}

func TestCredentialsAreNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, b := newMemory(), newBuilder()
		release := b.hold()
		h := life(t, store, b)
		r := of("app", "a")
		r.Credentials = &Credentials{Username: "u", Password: "hush"}
		h.create(t, me, r)
		h.wantBuilt(t, "app")
		if c := b.jobs[0].Credentials; c == nil || *c != *r.Credentials {
			t.Errorf("the builder got %+v", c)
		}
		if text := fmt.Sprintf("%+v %+v %+v", store.rows, store.builds, store.logs); strings.Contains(text, "hush") {
			t.Error("the store has the password")
		}
		h.stop()
		release()
		h = life(t, store, b)
		row := h.wantStatus(t, "app", Failed, 0)
		if row.BuildError == nil || !strings.Contains(row.BuildError.Message, "restarted") {
			t.Errorf("after the restart: %+v", row.BuildError)
		}
		h.wantBuilt(t)
		h.rebuild(t, "app", &Request{Credentials: r.Credentials}) // the same inputs with credentials
		h.wantBuilt(t, "app")
		if j := b.jobs[1]; j.Credentials == nil || j.Definition.Image != "a" {
			t.Errorf("the job is %+v", j)
		}
		h.wantStatus(t, "app", Ready, 1)
		h.mu.Lock()
		defer h.mu.Unlock()
		if len(h.secrets) > 0 {
			t.Errorf("the service still has %d secrets", len(h.secrets))
		}
	})
}

func TestEqualBuildsShareARun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		release := h.builder.hold()
		one := of("one", "a")
		one.Env = map[string]string{"A": "one"}
		h.create(t, me, one)
		synctest.Wait()
		h.create(t, me, of("two", "a"))
		h.create(t, me, of("three", "b"))
		h.create(t, Caller{OrgID: "other"}, of("one", "a")) // nothing is shared with another organization
		h.wantBuilt(t, "one")
		h.wantStatus(t, "two", Building, 0)
		if _, err := h.Cancel(t.Context(), me, "one"); err != nil { // the run continues for the other template
			t.Error(err)
		}
		h.wantStatus(t, "one", Failed, 0)
		release()
		h.wantBuilt(t, "one", "three")
		two := h.wantStatus(t, "two", Ready, 1)
		if two.Image != "image of one a" || two.Env["A"] != "image" {
			t.Errorf("two is %+v", two)
		}
		lines, err := h.Log(t.Context(), "org", "two")
		if err != nil || len(lines) < 2 || lines[0].Text != "building template two" {
			t.Errorf("log of the one that joined: %v, %v", lines, err)
		}
		h.wantStatus(t, "one", Failed, 0)
	})
}

func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		release := h.builder.hold()
		h.create(t, me, of("runs", "a"))
		h.create(t, me, of("waits", "b"))
		h.wantBuilt(t, "runs")
		_, err := h.Rebuild(t.Context(), me, "runs", new(of("", "c")), nil)
		wantCode(t, err, "build_in_progress")
		for _, name := range []string{"waits", "runs"} {
			got, err := h.Cancel(t.Context(), me, name)
			if err != nil || got.Status != Failed || got.BuildError == nil || got.Queued() {
				t.Errorf("cancelled %+v, %v", got, err)
			}
			_, err = h.Cancel(t.Context(), me, name)
			wantCode(t, err, "no_build")
		}
		_, err = h.Cancel(t.Context(), me, "lazy")
		wantCode(t, err, "template_builtin")
		h.wantBuilt(t)
		h.wantStatus(t, "runs", Failed, 0) // nothing of the run comes later
		if n := h.builder.running.Load(); n != 0 {
			t.Errorf("%d builds run on", n)
		}
		h.rebuild(t, "waits", nil)
		h.wantBuilt(t, "waits")
		release()
		h.wantStatus(t, "waits", Ready, 1)
	})
}

func TestDelete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		release := h.builder.hold()
		h.create(t, me, of("runs", "a"))
		h.create(t, me, of("waits", "b"))
		h.wantBuilt(t, "runs")
		for _, name := range []string{"waits", "runs"} {
			if err := h.Delete(t.Context(), me, name, false); err != nil {
				t.Error(err)
			}
		}
		wantCode(t, h.Delete(t.Context(), me, "runs", false), "template_not_found")
		wantCode(t, h.Delete(t.Context(), me, "lazy", true), "template_builtin")
		h.create(t, me, of("runs", "a")) // the name is free again, its old build has ended
		h.wantBuilt(t, "runs")
		release()
		h.wantStatus(t, "runs", Ready, 1)
		if n := h.builder.running.Load(); n != 0 {
			t.Errorf("%d builds run on", n)
		}
		used := h.create(t, me, of("used", "c"))
		synctest.Wait()
		h.store.mu.Lock()
		h.store.inUse[used.ID] = true
		h.store.mu.Unlock()
		wantCode(t, h.Delete(t.Context(), me, "used", false), "template_in_use")
		if err := h.Delete(t.Context(), me, "used", true); err != nil {
			t.Error(err)
		}
	})
}

func TestBuildsAreFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		release := h.builder.hold()
		for i := range 4 {
			h.create(t, Caller{OrgID: "greedy"}, of(fmt.Sprint("g", i), fmt.Sprint("a", i)))
			synctest.Wait() // the first one begins
		}
		h.create(t, me, of("first", "a"))
		h.create(t, me, of("second", "b"))
		h.create(t, Caller{OrgID: "third"}, of("third", "a"))
		// Users wait for the last one of the greedy organization, and for a built-in one.
		for org, name := range map[string]string{"greedy": "g3", "org": "lazy"} {
			if _, err := h.Ready(t.Context(), org, name); !fault.Is(err, fault.Conflict) {
				t.Errorf("%s is ready: %v", name, err)
			}
		}
		release()
		h.wantBuilt(t, "g0", "lazy", "first", "third", "g3", "second", "g1", "g2")
		if most := h.builder.most.Load(); most != 1 {
			t.Errorf("%d builds at once", most)
		}
	})
}

func TestBuildsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder(), func(c *Config) { c.Concurrent, c.PerOrg = 3, 2 })
		release := h.builder.hold()
		for i := range 5 {
			h.create(t, me, of(fmt.Sprint("t", i), fmt.Sprint("a", i)))
			synctest.Wait()
		}
		h.wantBuilt(t, "t0", "t1")
		for _, org := range []string{"b", "c"} {
			h.create(t, Caller{OrgID: org}, of(org, org))
		}
		h.wantBuilt(t, "b")
		release()
		synctest.Wait()
		if most := h.builder.most.Load(); most != 3 {
			t.Errorf("%d builds at once", most)
		}
	})
}

func TestLazyBuiltin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, b := newMemory(), newBuilder()
		h := life(t, store, b)
		h.wantBuilt(t)
		if row := h.wantStatus(t, "lazy", Pending, 0); row.Progress == "" || row.Queued() {
			t.Errorf("row is %+v", row)
		}
		time.Sleep(3 * collectEvery)
		h.wantBuilt(t)
		release := b.hold()
		_, err := h.Ready(t.Context(), "org", "lazy")
		wantCode(t, err, "template_not_ready")
		h.wantBuilt(t, "lazy")
		h.stop() // the request is not lost
		release()
		h = life(t, store, b)
		h.wantBuilt(t, "lazy")
		if row := h.wantStatus(t, "lazy", Ready, 1); !row.Start.None() {
			t.Errorf("its start command is %+v", row.Start)
		}
		// Only the operator may have it rebuilt.
		_, err = h.Rebuild(t.Context(), me, "lazy", nil, nil)
		wantCode(t, err, "template_builtin")
		if _, err := h.Rebuild(t.Context(), Caller{OrgID: "org", Operator: true}, "lazy", nil, nil); err != nil {
			t.Error(err)
		}
		h.wantBuilt(t, "lazy")
		if !b.jobs[len(b.jobs)-1].Refresh {
			t.Error("it is not looked up anew")
		}
		h.wantStatus(t, "lazy", Ready, 1)
	})
}

func TestFromATemplateThatIsNotReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBuilder()
		b.from = map[string]string{"app": "mid", "mid": "lazy"}
		h := life(t, newMemory(), b)
		release := b.hold()
		h.create(t, me, of("app", "a"))
		h.create(t, me, of("mid", "m"))
		release()
		synctest.Wait()
		h.wantStatus(t, "app", Ready, 1)
		h.wantStatus(t, "mid", Ready, 1)
		h.wantStatus(t, "lazy", Ready, 1)
		if got := b.take(); got[len(got)-1] != "app" || len(got) > 6 {
			t.Errorf("built %v", got)
		}

		// A template whose base fails does too, and names the base.
		b.mu.Lock()
		b.from["late"], b.fail["bad"] = "bad", errors.New("no")
		b.mu.Unlock()
		release = b.hold()
		h.create(t, me, of("late", "l"))
		h.create(t, me, of("bad", "b"))
		release()
		late := h.wantStatus(t, "late", Failed, 0)
		if late.BuildError == nil || !strings.Contains(late.BuildError.Error(), `template "bad" is failed`) {
			t.Errorf("late failed with %v", late.BuildError)
		}

		// Two that wait for each other fail.
		b.mu.Lock()
		b.from["x"], b.from["y"] = "y", "x"
		b.mu.Unlock()
		release = b.hold()
		h.create(t, me, of("x", "1"))
		h.create(t, me, of("y", "2"))
		release()
		synctest.Wait()
		for _, name := range []string{"x", "y"} {
			if row := h.get(t, name); row.Status != Failed {
				t.Errorf("%s is %+v", name, row)
			}
		}
	})
}

func TestCancelBuildThatWaitsForATemplate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBuilder()
		b.from = map[string]string{"app": "base"}
		h := life(t, newMemory(), b)
		release := b.hold()
		h.create(t, me, of("app", "a"))
		h.create(t, me, of("base", "b"))
		synctest.Wait()
		b.mu.Lock()
		held := b.block
		b.mu.Unlock()
		held <- struct{}{} // app continues, and waits for base
		if app := h.wantStatus(t, "app", Pending, 0); app.Progress != "waiting for template base" || app.Tries != 0 {
			t.Errorf("app is %+v", app)
		}
		if _, err := h.Cancel(t.Context(), me, "app"); err != nil {
			t.Error(err)
		}
		release()
		h.wantStatus(t, "base", Ready, 1)
		h.wantStatus(t, "app", Failed, 0)
		if got := b.take(); !slices.Equal(got, []string{"app", "base"}) {
			t.Errorf("built %v", got)
		}
	})
}

func TestBuildThatTakesTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		release := h.builder.hold()
		defer release()
		h.create(t, me, of("app", "a"))
		time.Sleep(DefaultTimeout - time.Second)
		h.wantStatus(t, "app", Building, 0)
		time.Sleep(time.Second)
		row := h.wantStatus(t, "app", Failed, 0)
		if row.BuildError == nil || row.BuildError.Message != "it was not done within 30m0s" {
			t.Errorf("failed with %+v", row.BuildError)
		}
	})
}

// TestTimeToWriteTheImage has builds whose steps are done just in time: what is left to do has a time of its own.
func TestTimeToWriteTheImage(t *testing.T) {
	for name, c := range map[string]struct {
		steps, writes time.Duration
		want          Status
		message       string
	}{
		"both in time":            {DefaultTimeout - time.Second, DefaultTimeout - time.Second, Ready, ""},
		"the steps take too long": {DefaultTimeout + time.Second, 0, Failed, "it was not done within 30m0s"},
		"the image takes too long": {DefaultTimeout - time.Second, DefaultTimeout + time.Second, Failed,
			"its steps were done, but its image was not written within 30m0s"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := life(t, newMemory(), newBuilder())
				h.builder.takes = []time.Duration{c.steps, c.writes}
				h.create(t, me, of("app", "a"))
				time.Sleep(3 * DefaultTimeout)
				synctest.Wait()
				row := h.get(t, "app")
				message := ""
				if row.BuildError != nil {
					message = row.BuildError.Message
				}
				if row.Status != c.want || message != c.message {
					t.Errorf("%s, %q", row.Status, message)
				}
			})
		})
	}
}

func TestContextOfABuild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder(), func(c *Config) { c.ContextLimit = 2048 })
		r := Request{Definition: Definition{Name: "app", Dockerfile: "Dockerfile"}}
		tar := strings.Repeat("\x00", 1024)
		if _, err := h.Create(t.Context(), me, r, strings.NewReader(tar)); err != nil {
			t.Fatal(err)
		}
		h.wantBuilt(t, "app")
		if j := h.builder.jobs[0]; j.Context != "/shelf/"+digest(tar) {
			t.Errorf("the builder got the context %q", j.Context)
		}
		again := Request{Definition: Definition{Dockerfile: "Dockerfile"}}
		for _, c := range []struct {
			tar   string
			built []string
		}{{tar, nil}, {tar + tar, []string{"app"}}} {
			if _, err := h.Rebuild(t.Context(), me, "app", &again, strings.NewReader(c.tar)); err != nil {
				t.Fatal(err)
			}
			h.wantBuilt(t, c.built...)
		}
		_, err := h.Rebuild(t.Context(), me, "app", &again, strings.NewReader(tar+tar+tar))
		wantCode(t, err, "context_too_large")
		_, err = h.Rebuild(t.Context(), me, "app", &again, strings.NewReader("FROM x"))
		wantCode(t, err, "invalid_context")
		if _, _, err := h.Collect(t.Context()); err != nil {
			t.Fatal(err)
		}
		if last := h.shelf.kept[len(h.shelf.kept)-1]; !slices.Equal(last, []string{digest(tar + tar)}) {
			t.Errorf("kept %v", last)
		}
		failsWith := func(message string) {
			t.Helper()
			h.rebuild(t, "app", nil)
			if row := h.wantStatus(t, "app", Failed, 1); !strings.Contains(row.BuildError.Message, message) {
				t.Errorf("without its context it failed with %+v, want %q", row.BuildError, message)
			}
		}
		h.shelf.mu.Lock()
		h.shelf.away = fault.New(fault.NoSpace, fault.CodeDiskFull, "there is no room to fetch it")
		h.shelf.mu.Unlock()
		failsWith("try again later")
		h.shelf.mu.Lock()
		clear(h.shelf.files)
		h.shelf.mu.Unlock()
		failsWith("context is gone")
	})
}

func TestImageOfATemplateIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		h.create(t, me, of("app", "a"))
		h.wantBuilt(t, "app")
		image := h.get(t, "app").Image
		h.Recheck(image)
		h.wantBuilt(t)
		h.builder.mu.Lock()
		h.builder.gone[image] = true
		h.builder.mu.Unlock()
		h.Recheck(image)
		h.wantBuilt(t, "app")
		h.wantStatus(t, "app", Ready, 1)
	})
}

// TestSlowChecks checks images whose copies a slow bucket sends. Neither builds nor other checks wait for one, and Run
// ends without it.
func TestSlowChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		images, fetched := map[string]string{}, make(chan struct{})
		for _, name := range []string{"slow", "gone"} {
			h.create(t, me, of(name, "a"+name))
			h.wantBuilt(t, name)
			images[name] = h.get(t, name).Image
		}
		set := func(fetching map[string]chan struct{}, gone ...string) {
			h.builder.mu.Lock()
			defer h.builder.mu.Unlock()
			h.builder.fetching = fetching
			for _, name := range gone {
				h.builder.gone[images[name]] = true
			}
		}
		set(map[string]chan struct{}{images["slow"]: fetched}, "slow", "gone")
		h.Recheck(images["slow"])
		h.wantBuilt(t)
		h.create(t, me, of("another", "b"))
		h.Recheck(images["gone"])
		h.Recheck(images["slow"]) // as each create does meanwhile
		synctest.Wait()
		got := h.builder.take()
		if slices.Sort(got); !slices.Equal(got, []string{"another", "gone"}) {
			t.Errorf("built beside a slow check: %v", got)
		}
		close(fetched)
		h.wantBuilt(t, "slow")
		set(map[string]chan struct{}{images["slow"]: make(chan struct{})})
		h.Recheck(images["slow"])
		synctest.Wait()
		h.stop()
	})
}

// TestUserThatTheImageLacks checks that the build fails, and that a number needs no account.
func TestUserThatTheImageLacks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		for user, want := range map[string]Status{"nobody-has-it": Failed, "app": Ready, "1234": Ready, "root": Ready} {
			r := of("for-"+user, "a")
			r.User = user
			h.create(t, me, r)
			h.wantBuilt(t, r.Name)
			if got := h.get(t, r.Name); got.Status != want ||
				want == Failed && !strings.Contains(got.BuildError.Message, `no user "nobody-has-it"`) {
				t.Errorf("%s: %s, %v", user, got.Status, got.BuildError)
			}
		}
	})
}

// TestStoreThatFails checks that failed writes are tried again, and that nothing hangs.
func TestStoreThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newMemory()
		h := life(t, store, newBuilder())
		fail := func(err error) {
			store.mu.Lock()
			defer store.mu.Unlock()
			store.fail = err
		}
		release := h.builder.hold()
		h.create(t, me, of("app", "a"))
		synctest.Wait()
		fail(errors.New("disk full"))
		release()
		synctest.Wait()
		fail(nil)
		time.Sleep(2 * retryFirst)
		h.wantStatus(t, "app", Ready, 1)
		h.wantBuilt(t, "app", "app")
	})
}

func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := life(t, newMemory(), newBuilder())
		release := h.builder.hold()
		h.create(t, me, of("app", "a"))
		type end struct {
			t   Template
			err error
		}
		var mu sync.Mutex
		var got []string
		ended := make(chan end, 1)
		go func() {
			tpl, err := h.Follow(t.Context(), "org", "app", "", 0, func(_ string, lines []LogLine) error {
				mu.Lock()
				defer mu.Unlock()
				for _, l := range lines {
					got = append(got, l.Text)
				}
				return nil
			})
			ended <- end{tpl, err}
		}()
		time.Sleep(2 * flushEvery)
		synctest.Wait()
		mu.Lock()
		if !slices.Equal(got, []string{"building template app", "working on app"}) {
			t.Errorf("while it is built: %q", got)
		}
		mu.Unlock()
		release()
		e := <-ended
		if e.err != nil || e.t.Status != Ready || len(got) != 4 || got[2] != "done with app" {
			t.Errorf("ended with %+v after %q", e, got)
		}
		no := errors.New("enough")
		if _, err := h.Follow(t.Context(), "org", "app", "", 0, func(string, []LogLine) error { return no }); !errors.Is(err,
			no) {
			t.Errorf("error is %v", err)
		}
		if _, err := h.Follow(t.Context(), "other", "app", "", 0, nil); !fault.Is(err, fault.NotFound) {
			t.Errorf("error is %v", err)
		}
		if tpl, err := h.Follow(t.Context(), "org", "lazy", "", 0, nil); err != nil || tpl.Status != Pending {
			t.Errorf("one that nobody asked for: %+v, %v", tpl, err)
		}
		release = h.builder.hold()
		defer release()
		h.rebuild(t, "app", nil)
		h.Hangup()
		_, err := h.Follow(t.Context(), "org", "app", "", 0, func(string, []LogLine) error { return nil })
		wantCode(t, err, "stopping")
	})
}

// TestJournalIsBounded checks that a log stays below its limit by dropping older lines of the
// step with the most output.
func TestJournalIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newMemory()
		if err := store.InsertTemplate(t.Context(), Template{ID: "t"}, nil, 0); err != nil {
			t.Fatal(err)
		}
		j := newJournal(t.Context(), nil, func(ctx context.Context, c LogChange,
			_ string) error {
			return store.ChangeTemplateLog(ctx, "t", c)
		}, func(err error) { t.Error(err) })
		j.say(Progress{Step: 1, Steps: 2, Name: "RUN quiet", Cached: true})
		j.say(Progress{Step: 1, Text: "quiet"})
		j.say(Progress{Step: 2, Steps: 2, Name: "RUN chatty", Line: 17})
		const many = 200_000
		for i := range many {
			j.say(Progress{Step: 2, Text: fmt.Sprintf("line %d\n", i)})
		}
		j.say(Progress{Step: 2, Text: strings.Repeat("x", 2*maxLogLine)})
		tail := j.close()
		if len(tail) != tailLines || tail[tailLines-2] != fmt.Sprint("line ", many-1) {
			t.Errorf("the tail is %q", tail[len(tail)-2])
		}
		size, last := 0, int64(0)
		lines := store.logs["t"]
		for _, l := range lines {
			if want := map[int]int{1: 0, 2: 17}[l.Step]; l.Line != want {
				t.Fatalf("line %d of step %d is of line %d of the Dockerfile, want %d", l.Seq, l.Step, l.Line, want)
			}
			size += len(l.Text) + lineCost
			if l.Seq <= last {
				t.Fatalf("line %d comes after %d", l.Seq, last)
			}
			last = l.Seq
		}
		if size > maxLog || len(lines) < 10_000 {
			t.Errorf("the log has %d lines of %d bytes", len(lines), size)
		}
		for i, want := range []string{"step 1 of 2: RUN quiet (cached)", "quiet", "step 2 of 2: RUN chatty"} {
			if lines[i].Text != want {
				t.Errorf("line %d is %q, want %q", i, lines[i].Text, want)
			}
		}
		// The note has the number of missing lines: two of step 1, and the heading, the note
		// itself and the long line of step 2, are there.
		if want := fmt.Sprintf("… %d lines left out …", many-(len(lines)-5)); lines[3].Text != want {
			t.Errorf("the note says %q, want %q", lines[3].Text, want)
		}
	})
}

func TestIsTar(t *testing.T) {
	for _, text := range []string{"", "FROM x", strings.Repeat("FROM x\n", 100), "\x1f"} {
		if isTar([]byte(text)) {
			t.Errorf("%.20q is one", text)
		}
	}
	if !isTar([]byte{0x1f, 0x8b}) || !isTar(make([]byte, 512)) {
		t.Error("gzip and an empty one are none")
	}
}

func FuzzRequest(f *testing.F) {
	f.Add("app", "alpine", "", "", "", false)
	f.Add("app", "", "FROM python\nRUN x", "", "/srv", false)
	f.Add("app", "", "../Dockerfile", "", "", true)
	f.Add("app", "", "", "git=1:2~3", "", false)
	f.Fuzz(func(t *testing.T, name, image, dockerfile, pkg, workdir string, withContext bool) {
		r := Request{Definition: Definition{Name: name, Image: image, Dockerfile: dockerfile, Workdir: workdir}}
		if pkg != "" {
			r.Debian = &Debian{Packages: []string{pkg}}
		}
		err := r.check(Config{}, withContext)
		if err != nil {
			if !fault.Is(err, fault.Invalid) {
				t.Errorf("error is %v", err)
			}
			return
		}
		if err := r.check(Config{}, withContext); err != nil {
			t.Errorf("accepted and then refused: %v", err)
		}
		if strings.ContainsAny(pkg, ", \n") || strings.HasPrefix(pkg, "-") ||
			withContext && !filepath.IsLocal(image+dockerfile) {
			t.Errorf("accepted %+v", r)
		}
	})
}
