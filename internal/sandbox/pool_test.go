package sandbox_test

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

var twoOfEach = sandbox.PoolConfig{Enabled: true, Target: 2, MaxPooled: 6}

// fixed returns a configuration with target pooled sandboxes of the template python from the start.
func fixed(target int) sandbox.PoolConfig {
	return sandbox.PoolConfig{Enabled: true, MaxPooled: 10,
		Templates: []sandbox.PoolTemplate{{Template: "python", Target: target}}}
}

// settled waits until the pool has no more work and returns the rows of its pooled sandboxes.
func (h *fixture) settled() []sandbox.Pooled {
	h.t.Helper()
	pass(15 * time.Second)
	pooled, err := h.db.ListPooled(context.Background())
	if err != nil {
		h.t.Fatal(err)
	}
	return pooled
}

// wantWhole checks that rows own everything on the host.
func (h *fixture) wantWhole() {
	h.t.Helper()
	l := scenario{fixture: h}
	if wrong := l.agree(); wrong != "" {
		h.t.Error(wrong)
	}
}

func TestWarmCreateIsLikeACold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolFixture(t, twoOfEach)
		if len(h.settled()) > 0 {
			t.Fatal("pooled sandboxes without a demand")
		}
		if cold := h.mustCreate(sandbox.Request{}); cold.Source != sandbox.Cold {
			t.Fatalf("source %s of the first", cold.Source)
		}
		pooled := h.settled()
		if len(pooled) != 2 {
			t.Fatalf("%d pooled sandboxes, want 2", len(pooled))
		}
		var claimed sandbox.Spec
		h.node.OnClaim = func(_ context.Context, spec sandbox.Spec) error { claimed = spec; return nil }
		policy := sandbox.Egress{Mode: sandbox.DenyAll}
		sbx := h.mustCreate(sandbox.Request{Mode: "persistent", Env: map[string]string{"B": "request"},
			Metadata: map[string]string{"k": "v"}, Egress: &policy})
		if sbx.Source != sandbox.Warm || sbx.ID != pooled[0].ID || sbx.Run != pooled[0].Run ||
			sbx.Token != pooled[0].Token {
			t.Errorf("got %+v of the pooled sandbox %+v", sbx, pooled[0])
		}
		if claimed.Env["A"] != "template" || claimed.Env["B"] != "request" || !claimed.Egress.Equal(policy) {
			t.Errorf("claimed with %+v", claimed)
		}
		row := h.get(sbx.ID)
		if row.Mode != sandbox.Persistent || row.Metadata["k"] != "v" || row.IdleTimeout != sandbox.DefaultIdleTimeout ||
			row.Env["B"] != "request" || !row.Egress.Equal(policy) || row.StartedAt.IsZero() {
			t.Errorf("row %+v", row)
		}
		events, _, err := h.Events(context.Background(), org, sbx.ID, 10, "")
		if err != nil || len(events) != 2 || events[0].To != sandbox.Running || events[0].From != sandbox.Creating ||
			events[1].To != sandbox.Creating {
			t.Errorf("events are %+v, %v", events, err)
		}
		h.wantState(sbx.ID, sandbox.Running, "")
		short := h.mustCreate(sandbox.Request{Timeout: ptr(20 * time.Second)})
		if short.Source != sandbox.Warm || !short.ExpiresAt.Equal(short.StartedAt.Add(20*time.Second)) {
			t.Errorf("%+v", short)
		}
		if n := len(h.settled()); n != 2 {
			t.Errorf("%d pooled sandboxes after the claims, want 2", n)
		}
		pass(10 * time.Second)
		h.wantState(short.ID, sandbox.Destroyed, sandbox.Expired)
		if got := h.Pool(); len(got) != 1 || got[0] != (sandbox.PoolStatus{Template: "python", Version: 1, Size: "small",
			Ready: 2, Claimed: 2, Target: 2}) {
			t.Errorf("the pool is %+v", got)
		}
		if got := h.PoolCounts(); got != (sandbox.PoolCounts{Ready: 2, Warm: 2, Cold: 1}) {
			t.Errorf("counts %+v", got)
		}
		h.wantWhole()
	})
}

func TestClaimsAreExclusive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolFixture(t, fixed(4))
		h.settled()
		var mu sync.Mutex
		sources := map[sandbox.Source]int{}
		ids := map[sandbox.ID]bool{}
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				sbx, err := h.create(sandbox.Request{})
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				sources[sbx.Source]++
				ids[sbx.ID] = true
			})
		}
		wg.Wait()
		if len(ids) != 10 || sources[sandbox.Warm] < 4 {
			t.Errorf("%d sandboxes, %v", len(ids), sources)
		}
		h.settled()
		h.wantWhole()
	})
}

// TestOnlyTheSameIsWarm checks that a create gets a cold start if a pooled sandbox would serve it
// differently.
func TestOnlyTheSameIsWarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pool := fixed(2)
		pool.Templates = append(pool.Templates, sandbox.PoolTemplate{Template: "python", Size: "big", Target: 1})
		h := newPoolFixture(t, pool)
		h.settled()
		for name, c := range map[string]struct {
			r    sandbox.Request
			want sandbox.Source
		}{
			"plain":      {sandbox.Request{}, sandbox.Warm},
			"disk":       {sandbox.Request{DiskSizeMB: ptr(100)}, sandbox.Cold},
			"same disk":  {sandbox.Request{DiskSizeMB: ptr(2048)}, sandbox.Warm},
			"other size": {sandbox.Request{Size: "big"}, sandbox.Warm},
		} {
			if sbx := h.mustCreate(c.r); sbx.Source != c.want {
				t.Errorf("%s: source %s", name, sbx.Source)
			}
			h.settled()
		}
	})
	synctest.Test(t, func(t *testing.T) { // with a start command that has run
		h := newPoolFixture(t, sandbox.PoolConfig{Enabled: true, Target: 1, MaxPooled: 2})
		var prepared sandbox.Spec
		h.node.OnPrepare = func(_ context.Context, spec sandbox.Spec) error { prepared = spec; return nil }
		h.mustCreate(sandbox.Request{Template: "service"})
		h.settled()
		if prepared.Start.Command != service.Command || prepared.Env["A"] != "template" ||
			prepared.Egress.Mode != sandbox.AllowAll {
			t.Errorf("prepared %+v", prepared)
		}
		for _, c := range []struct {
			r    sandbox.Request
			want sandbox.Source
		}{
			{sandbox.Request{Env: map[string]string{"C": "1"}}, sandbox.Cold},
			{sandbox.Request{Egress: &sandbox.Egress{Mode: sandbox.DenyAll}}, sandbox.Cold},
			{sandbox.Request{Metadata: map[string]string{"k": "v"}, Mode: "persistent"}, sandbox.Warm},
			{sandbox.Request{User: "somebody"}, sandbox.Warm}, // does not change the command's user
		} {
			c.r.Template = "service"
			if sbx := h.mustCreate(c.r); sbx.Source != c.want {
				t.Errorf("%+v: source %s", c.r, sbx.Source)
			}
			h.settled()
		}
	})
}

// TestClaimFails checks that after a failed claim the create is a cold one and nothing is left of
// the pooled sandbox.
func TestClaimFails(t *testing.T) {
	for name, spoil := range map[string]func(*fixture){
		"host": func(h *fixture) { h.node.OnClaim = func(context.Context, sandbox.Spec) error { return errInjected } },
		"slow": func(h *fixture) {
			h.node.OnClaim = func(ctx context.Context, _ sandbox.Spec) error { <-ctx.Done(); return ctx.Err() }
		},
		"dead": func(h *fixture) {
			h.node.OnClaim = func(_ context.Context, spec sandbox.Spec) error { h.node.Kill(spec.ID); return nil }
		},
		"database": func(h *fixture) {
			var once sync.Once
			h.gate.breakTransitions(func(sandbox.State) (broken bool) { once.Do(func() { broken = true }); return broken })
		},
		"no row": func(h *fixture) {
			h.node.OnClaim = func(ctx context.Context, spec sandbox.Spec) error { return h.db.DropPooled(ctx, spec.ID) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newPoolFixture(t, fixed(1))
				pooledRow := h.settled()[0]
				spoil(h)
				sbx := h.mustCreate(sandbox.Request{})
				if sbx.Source != sandbox.Cold || sbx.ID == pooledRow.ID {
					t.Errorf("got %+v", sbx)
				}
				h.wantState(sbx.ID, sandbox.Running, "")
				if observed, _ := h.node.Inspect(context.Background(), pooledRow.ID); observed != nil {
					t.Errorf("left of the pooled sandbox: %+v", observed)
				}
				h.node.OnClaim = nil
				h.settled()
				if sbx := h.mustCreate(sandbox.Request{}); sbx.Source != sandbox.Warm {
					t.Errorf("the next is %s", sbx.Source)
				}
				h.settled()
				h.wantWhole()
			})
		})
	}
}

func TestRefusedCreatesSpendNoPooled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolFixture(t, fixed(2))
		before := h.settled()
		once := sandbox.Once{Key: "k", Hash: "h"}
		first, err := h.Create(context.Background(), h.caller(), sandbox.Request{Template: "python"}, once, true)
		if err != nil || first.Source != sandbox.Warm {
			t.Fatal(first, err)
		}
		again, err := h.Create(context.Background(), h.caller(), sandbox.Request{Template: "python"}, once, true)
		if err != nil || again.ID != first.ID {
			t.Errorf("again: %+v, %v", again, err)
		}
		h.quota = sandbox.Quota{Sandboxes: 1}
		_, err = h.create(sandbox.Request{})
		wantCode(t, err, fault.Exhausted, "quota_exceeded")
		if pooled := h.settled(); !slices.ContainsFunc(pooled, func(m sandbox.Pooled) bool {
			return m.ID == before[1].ID
		}) {
			t.Errorf("pooled sandbox %s was spent: %+v", before[1].ID, pooled)
		}
		h.wantWhole()
	})
}

// TestRepeatedClaimsAtOnce checks that two creates with one key that both found a pooled sandbox return one
// sandbox.
func TestRepeatedClaimsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolFixture(t, fixed(2))
		h.settled()
		var both sync.WaitGroup
		both.Add(2)
		h.node.OnClaim = func(context.Context, sandbox.Spec) error { both.Done(); both.Wait(); return nil }
		ids := make(chan sandbox.ID, 2)
		for range 2 {
			go func() {
				sbx, err := h.Create(context.Background(), h.caller(), sandbox.Request{Template: "python"},
					sandbox.Once{Key: "k", Hash: "h"}, true)
				if err != nil {
					t.Error(err)
				}
				ids <- sbx.ID
			}()
		}
		if a, b := <-ids, <-ids; a != b {
			t.Errorf("two sandboxes: %s and %s", a, b)
		}
		h.node.OnClaim = nil
		h.settled()
		h.wantWhole()
	})
}

// TestServerDiesWithItsPool kills the server during each operation of the pool.
func TestServerDiesWithItsPool(t *testing.T) {
	for name, at := range map[string]func(h *fixture, crash func()){
		"preparing": func(h *fixture, crash func()) {
			h.node.OnPrepare = func(ctx context.Context, spec sandbox.Spec) error {
				h.node.Put(sandbox.Observed{ID: spec.ID, Run: spec.Run, Alive: true, Remains: true, Warm: true})
				crash()
				<-ctx.Done()
				return ctx.Err()
			}
		},
		"prepared": func(h *fixture, crash func()) {
			h.node.OnPrepare = func(context.Context, sandbox.Spec) error { crash(); return nil }
		},
		"claiming": func(h *fixture, crash func()) {
			h.node.OnClaim = func(ctx context.Context, _ sandbox.Spec) error { crash(); <-ctx.Done(); return ctx.Err() }
		},
		"claimed": func(h *fixture, crash func()) {
			h.node.OnClaim = func(context.Context, sandbox.Spec) error { crash(); return nil }
		},
		"discarding": func(h *fixture, crash func()) {
			h.node.OnClaim = func(context.Context, sandbox.Spec) error { return errInjected }
			h.node.OnDestroy = func(context.Context, sandbox.ID) error { crash(); return errDead }
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newPoolFixture(t, fixed(2))
				before := h.settled()
				var once sync.Once
				at(h, func() { once.Do(h.gate.shut) })
				sbx, err := h.create(sandbox.Request{})
				if made := err == nil; made != (name == "preparing" || name == "prepared") {
					t.Errorf("the create: %v", err)
				}
				pass(time.Second)
				h.crash()
				h.node.OnPrepare, h.node.OnClaim, h.node.OnDestroy = nil, nil, nil
				h.start()
				after := h.settled()
				if len(after) != 2 || !slices.ContainsFunc(after, func(m sandbox.Pooled) bool { return m.ID == before[1].ID }) {
					t.Errorf("pooled sandboxes were %+v, are %+v", before, after)
				}
				if err == nil {
					h.wantState(sbx.ID, sandbox.Running, "")
				} else if rows, _ := h.db.Unfinished(context.Background()); len(rows) > 0 {
					t.Errorf("rows of a create that returned no sandbox: %+v", rows)
				}
				h.wantWhole()
			})
		})
	}
}

func TestRestartKeepsThePool(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolFixture(t, twoOfEach)
		h.mustCreate(sandbox.Request{})
		before := h.settled()
		h.crash()
		h.start()
		if sbx := h.mustCreate(sandbox.Request{}); sbx.Source != sandbox.Warm || sbx.ID != before[0].ID {
			t.Errorf("after the restart %+v", sbx)
		}
		if after := h.settled(); len(after) != 2 || after[0].ID != before[1].ID {
			t.Errorf("pooled sandboxes %+v, were %+v", after, before)
		}
		h.crash()
		h.pool = sandbox.PoolConfig{}
		h.start()
		if left := h.settled(); len(left) > 0 {
			t.Errorf("a pool that is off has %+v", left)
		}
		if sbx := h.mustCreate(sandbox.Request{}); sbx.Source != sandbox.Cold {
			t.Errorf("source %s of a pool that is off", sbx.Source)
		}
		h.wantWhole()
	})
}

// versions implements a template whose version changes.
type versions struct {
	oneTemplate
	mu      sync.Mutex
	version int
	gone    bool
}

func (v *versions) Ready(ctx context.Context, orgID, name string) (sandbox.TemplateVersion, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.gone {
		return sandbox.TemplateVersion{}, fault.New(fault.NotFound, "template_not_found", "gone")
	}
	t, err := v.oneTemplate.Ready(ctx, orgID, "python")
	t.Version = v.version
	return t, err
}

func (v *versions) set(version int, gone bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.version, v.gone = version, gone
}

func TestPoolFollowsTheTemplate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolFixture(t, twoOfEach)
		h.crash()
		v := &versions{version: 1}
		h.what = v
		h.start()
		h.mustCreate(sandbox.Request{})
		h.settled()
		v.set(2, false)
		if sbx := h.mustCreate(sandbox.Request{}); sbx.Source != sandbox.Cold || sbx.TemplateVersion != 2 {
			t.Errorf("with pooled sandboxes of the old version: %+v", sbx)
		}
		for _, m := range h.settled() {
			if m.TemplateVersion != 2 {
				t.Errorf("still has %+v", m)
			}
		}
		v.set(3, false) // noticed even without a create
		pooled := h.settled()
		for _, m := range pooled {
			if m.TemplateVersion != 3 {
				t.Errorf("still has %+v", m)
			}
		}
		if len(pooled) != 2 {
			t.Errorf("%d pooled sandboxes", len(pooled))
		}
		v.set(3, true)
		if left := h.settled(); len(left) > 0 {
			t.Errorf("of a template that is gone: %+v", left)
		}
		h.wantWhole()
	})
}

func TestUnusedPooledGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolFixture(t, twoOfEach)
		h.mustCreate(sandbox.Request{})
		pass(3 * time.Hour)
		if n := len(h.settled()); n != 2 {
			t.Errorf("%d pooled sandboxes after 3 h", n)
		}
		pass(2 * time.Hour)
		if n := len(h.settled()); n != 0 {
			t.Errorf("%d pooled sandboxes after 5 h", n)
		}
		h.wantWhole()
	})
}

// TestTargetFollowsDemand checks that frequent creates raise the target up to the bound, and that
// it falls without creates.
func TestTargetFollowsDemand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolFixture(t, twoOfEach)
		most := 0
		for range 60 { // 1 per second
			h.mustCreate(sandbox.Request{Timeout: ptr(5 * time.Second)})
			pass(time.Second)
			pooled, err := h.db.ListPooled(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			most = max(most, len(pooled))
		}
		if most != 6 {
			t.Errorf("%d pooled sandboxes at the most, want 6", most)
		}
		pass(2 * time.Minute)
		if n := len(h.settled()); n != 2 {
			t.Errorf("%d pooled sandboxes afterwards, want 2", n)
		}
		h.wantWhole()
	})
}

// TestPooledGiveWay checks that pooled sandboxes never cause a create to be refused.
func TestPooledGiveWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolFixture(t, fixed(3))
		h.node.SetMost(8)
		if n := len(h.settled()); n != 3 {
			t.Fatalf("%d pooled sandboxes", n)
		}
		for i := range 8 {
			if _, err := h.create(sandbox.Request{DiskSizeMB: ptr(100)}); err != nil {
				t.Errorf("create %d: %v", i, err)
			}
		}
		_, err := h.create(sandbox.Request{DiskSizeMB: ptr(100)})
		wantCode(t, err, fault.Unavailable, "no_capacity")
		if left := h.settled(); len(left) > 0 {
			t.Errorf("pooled sandboxes beside a machine that is full: %+v", left)
		}
		h.wantWhole()
	})
	synctest.Test(t, func(t *testing.T) { // a pooled sandbox in preparation, too
		h := newPoolFixture(t, sandbox.PoolConfig{})
		h.crash()
		h.pool = fixed(1)
		h.node.OnPrepare = func(ctx context.Context, spec sandbox.Spec) error {
			h.node.SetFull(true)
			<-ctx.Done()
			h.node.SetFull(false)
			return context.Cause(ctx)
		}
		h.start()
		pass(time.Second)
		if _, err := h.create(sandbox.Request{DiskSizeMB: ptr(100)}); err != nil {
			t.Error(err)
		}
		h.node.OnPrepare = nil
	})
	synctest.Test(t, func(t *testing.T) { // memory that other processes take
		h := newPoolFixture(t, fixed(3))
		h.settled()
		h.node.SetMost(4)
		if left := h.settled(); len(left) != 2 { // room for one is left after the first eviction, for two after the second
			t.Errorf("%d pooled sandboxes when there is hardly room", len(left))
		}
		h.node.SetFull(true)
		pass(time.Minute)
		if left := h.settled(); len(left) > 0 {
			t.Errorf("%d pooled sandboxes when there is no room", len(left))
		}
	})
}

func TestDeadPooledAreReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolFixture(t, fixed(2))
		before := h.settled()
		h.node.Die(before[0].ID)
		after := h.settled()
		if len(after) != 2 || after[0].ID != before[1].ID {
			t.Errorf("pooled sandboxes %+v, were %+v", after, before)
		}
		mute := before[1].ID
		h.node.OnCheck = func(_ context.Context, id sandbox.ID) error {
			if id == mute {
				return errors.New("no answer")
			}
			return nil
		}
		pass(time.Minute)
		after = h.settled()
		if len(after) != 2 || slices.ContainsFunc(after, func(m sandbox.Pooled) bool { return m.ID == mute }) {
			t.Errorf("pooled sandboxes %+v, one of which does not answer", after)
		}
		h.wantWhole()
	})
}

// TestPreparingIsPaced checks that pooled sandboxes are prepared one at a time, not while a caller waits for
// a sandbox, and not at once again after a failure.
func TestPreparingIsPaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newPoolFixture(t, fixed(2))
		h.settled()
		release := make(chan struct{})
		h.node.OnCreate = func(context.Context, sandbox.Spec) error { <-release; return nil }
		for _, r := range []sandbox.Request{{}, {DiskSizeMB: ptr(100)}} { // a warm create and a cold one
			go func() {
				if _, err := h.create(r); err != nil {
					t.Error(err)
				}
			}()
		}
		prepares := func() int {
			return len(slices.DeleteFunc(h.node.Calls(), func(c string) bool { return !strings.HasPrefix(c, "prepare ") }))
		}
		pass(time.Second)
		if n := prepares(); n != 2 {
			t.Errorf("%d pooled sandboxes prepared while a caller waits", n)
		}
		close(release)
		pass(time.Second)
		if n := prepares(); n != 3 {
			t.Errorf("%d pooled sandboxes prepared, want one more", n)
		}
		h.node.OnPrepare = func(context.Context, sandbox.Spec) error { return errInjected }
		h.mustCreate(sandbox.Request{})
		pass(50 * time.Second)
		if n := prepares(); n != 4 {
			t.Errorf("%d tries in a minute of failures", n-3)
		}
		h.node.OnPrepare = nil
		pass(time.Minute)
		if n := len(h.settled()); n != 2 {
			t.Errorf("%d pooled sandboxes when it works again", n)
		}
	})
	synctest.Test(t, func(t *testing.T) { // the pool does not wait for ever
		h := newPoolFixture(t, fixed(1))
		h.crash()
		h.node.OnCreate = func(ctx context.Context, _ sandbox.Spec) error { <-ctx.Done(); return ctx.Err() }
		h.start()
		go func() { _, _ = h.create(sandbox.Request{DiskSizeMB: ptr(100)}) }() // is cancelled
		if n := len(h.settled()); n != 1 {
			t.Errorf("%d pooled sandboxes beside a create that does not end", n)
		}
		h.node.OnCreate = nil
	})
}

// TestSharesAreFair checks that a template in use has pooled sandboxes even though other templates want all
// that are allowed.
func TestSharesAreFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pool := fixed(6)
		pool.MaxPooled = 4
		pool.Templates = append(pool.Templates, sandbox.PoolTemplate{Template: "python", Size: "big", Target: 6})
		h := newPoolFixture(t, pool)
		sizes := map[string]int{}
		for _, m := range h.settled() {
			sizes[m.Size.Name]++
		}
		if want := map[string]int{"small": 2, "big": 2}; !maps.Equal(sizes, want) {
			t.Errorf("pooled sandboxes %v, want %v", sizes, want)
		}
	})
}
