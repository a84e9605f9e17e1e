package sandbox_test

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/nodetest"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
)

const org = "org_aaaaaaaaaaaaaaaaaaaa"

type oneTemplate struct{}

// service holds the start command of the template with the same name.
var service = sandbox.Start{Command: "serve", Ready: &sandbox.Ready{Port: 80, Timeout: 10 * time.Minute}}

func (oneTemplate) Ready(_ context.Context, _, name string) (sandbox.TemplateVersion, error) {
	var egress sandbox.Egress
	if name == "closed" {
		name, egress = "python", sandbox.Egress{Mode: sandbox.DenyAll}
	}
	var start sandbox.Start
	id := "tpl_aaaaaaaaaaaaaaaaaaaa"
	if name == "service" || name == "tpl_bbbbbbbbbbbbbbbbbbbb" {
		id, name, start = "tpl_bbbbbbbbbbbbbbbbbbbb", "python", service
	}
	if name != "python" && name != id {
		return sandbox.TemplateVersion{}, fault.New(fault.NotFound, "template_not_found", "there is no template %q", name)
	}
	return sandbox.TemplateVersion{ID: id, Name: "python", Version: 1, Shape: sandbox.Shape{Image: "abc",
		Egress: egress, Start: start, Env: map[string]string{"A": "template", "B": "template"}}}, nil
}

// fixture holds a Service with a real store and a fake node, for use in a synctest bubble.
type fixture struct {
	*sandbox.Service
	t     *testing.T
	db    *store.DB
	node  *nodetest.Fake
	gate  *gate // of the running server
	quota sandbox.Quota
	pool  sandbox.PoolConfig // for the next start
	what  sandbox.Templates
	stop  context.CancelFunc
	name  string           // of the node, for the next start
	now   func() time.Time // for the next start
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	return newPoolFixture(t, sandbox.PoolConfig{})
}

// onPostgres has the address of an empty database in PostgreSQL for the fixtures of a test, "" for SQLite.
var onPostgres string

func openStore(t *testing.T) (*store.DB, error) {
	if onPostgres != "" {
		return store.OpenPostgres(t.Context(), store.PostgresConfig{URL: onPostgres, MaxConns: 8})
	}
	return store.Open(t.Context(), filepath.Join(t.TempDir(), "cay.db"))
}

func newPoolFixture(t *testing.T, pool sandbox.PoolConfig) *fixture {
	t.Helper()
	db, err := openStore(t)
	if err != nil {
		t.Fatal(err)
	}
	h := &fixture{t: t, db: db, node: nodetest.NewFake(), pool: pool, what: oneTemplate{}}
	h.start()
	t.Cleanup(func() {
		h.crash()
		time.Sleep(time.Minute) // on the bubble's clock: all waits end
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// start runs a Service on the existing rows and node, as a start of the server does.
func (h *fixture) start() {
	h.gate = newGate()
	h.Service = sandbox.New(sandbox.Config{
		Node:        h.name,
		Sizes:       []sandbox.Size{{Name: "small", VCPUs: 1, MemoryMB: 512}, {Name: "big", VCPUs: 4, MemoryMB: 8192, Dedicated: true}},
		DefaultSize: "small", DefaultDisk: 2048, MaxDisk: 20480, KeepDestroyed: time.Hour, Pool: h.pool, Now: h.now,
	}, gatedStore{h.db, h.gate}, gatedNode{h.node, h.gate}, h.what, slog.New(slog.DiscardHandler), nil)
	ctx, stop := context.WithCancel(context.Background())
	h.stop = stop
	if err := h.Reconcile(ctx); err != nil {
		h.t.Error(err)
	}
	go h.Run(ctx)
}

// crash ends the Service as a dying server does: it finishes nothing.
func (h *fixture) crash() {
	h.gate.shut()
	h.stop()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = h.Close(ctx) // operations under way fail at the gate
	synctest.Wait()
}

func (h *fixture) caller() sandbox.Caller { return sandbox.Caller{OrgID: org, Quota: h.quota} }

func (h *fixture) create(r sandbox.Request) (sandbox.Sandbox, error) {
	if r.Template == "" && r.Snapshot == "" {
		r.Template = "python"
	}
	return h.Create(context.Background(), h.caller(), r, sandbox.Once{}, true)
}

func (h *fixture) mustCreate(r sandbox.Request) sandbox.Sandbox {
	h.t.Helper()
	sbx, err := h.create(r)
	if err != nil {
		h.t.Fatal(err)
	}
	return sbx
}

func (h *fixture) get(id sandbox.ID) sandbox.Sandbox {
	h.t.Helper()
	sbx, err := h.Get(context.Background(), org, id)
	if err != nil {
		h.t.Fatal(err)
	}
	return sbx
}

// wantState checks the row, and that the node has the parts of the sandbox that belong to the
// state.
func (h *fixture) wantState(id sandbox.ID, state sandbox.State, reason sandbox.Reason) {
	h.t.Helper()
	if state == sandbox.Destroyed {
		synctest.Wait() // the call may have left work on the host for later
	}
	sbx := h.get(id)
	if sbx.State != state || sbx.DestroyReason != reason {
		h.t.Errorf("sandbox is %s (%s), want %s (%s)", sbx.State, sbx.DestroyReason, state, reason)
	}
	observed, _ := h.node.Inspect(context.Background(), id)
	agree := observed == nil
	switch state {
	case sandbox.Destroying:
		agree = true // all of it or a part
	case sandbox.Running:
		agree = observed != nil && observed.Alive && observed.Run == sbx.Run
	case sandbox.Suspended:
		agree = observed != nil && !observed.Remains && observed.Checkpoint != nil &&
			observed.Checkpoint.At.Truncate(time.Microsecond).Equal(sbx.SuspendedAt)
	}
	if !agree {
		h.t.Errorf("sandbox is %+v; the node has %+v", sbx, observed)
	}
}

func ptr[T any](v T) *T { return &v }

func wantCode(t *testing.T, err error, kind fault.Kind, code string) {
	t.Helper()
	if e := fault.As(err); e == nil || e.Kind != kind || e.Code != code {
		t.Errorf("got error %v, want %s %s", err, kind, code)
	}
}

func TestCreateFillsInAndRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{Env: map[string]string{"B": "request"}, DiskSizeMB: ptr(100)})
		if sbx.State != sandbox.Running || sbx.Size.Name != "small" || sbx.DiskMB != 100 ||
			sbx.Egress.Mode != sandbox.AllowAll {
			t.Errorf("unexpected sandbox %+v", sbx)
		}
		if sbx.Env["A"] != "template" || sbx.Env["B"] != "request" {
			t.Errorf("env is %v", sbx.Env)
		}
		if got := sbx.ExpiresAt.Sub(sbx.StartedAt); got != sandbox.DefaultTimeout {
			t.Errorf("lifetime is %s", got)
		}
		events, _, err := h.Events(context.Background(), org, sbx.ID, 10, "")
		if err != nil || len(events) != 2 || events[0].To != sandbox.Running || events[1].To != sandbox.Creating {
			t.Errorf("events are %+v, %v", events, err)
		}
	})
}

func TestExpiresToTheSecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{Timeout: ptr(10 * time.Second)})
		pass(10*time.Second - time.Millisecond) // on the bubble's clock, not the machine's
		h.wantState(sbx.ID, sandbox.Running, "")
		pass(time.Second)
		h.wantState(sbx.ID, sandbox.Destroyed, sandbox.Expired)
	})
}

func TestKeepalive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		ctx := context.Background()
		sbx := h.mustCreate(sandbox.Request{Timeout: ptr(10 * time.Second)})
		time.Sleep(8 * time.Second)
		got, err := h.Keepalive(ctx, org, sbx.ID, ptr(time.Minute))
		if err != nil || !got.ExpiresAt.Equal(time.Now().UTC().Add(time.Minute)) {
			t.Fatalf("expires at %s, %v", got.ExpiresAt, err)
		}
		pass(59 * time.Second)
		h.wantState(sbx.ID, sandbox.Running, "")
		if got, err = h.Keepalive(ctx, org, sbx.ID, ptr(100*time.Hour)); err != nil ||
			got.ExpiresAt.After(time.Now().Add(sandbox.MaxTimeout)) {
			t.Errorf("above 24 h is not clamped: %s, %v", got.ExpiresAt, err)
		}
		if _, err = h.Keepalive(ctx, org, sbx.ID, ptr(time.Second)); err != nil { // a shorter lifetime is allowed
			t.Fatal(err)
		}
		pass(2 * time.Second)
		h.wantState(sbx.ID, sandbox.Destroyed, sandbox.Expired)
		_, err = h.Keepalive(ctx, org, sbx.ID, nil)
		wantCode(t, err, fault.Conflict, "sandbox_not_running")
		_, err = h.Keepalive(ctx, org, sbx.ID, ptr(time.Millisecond))
		wantCode(t, err, fault.Invalid, "invalid_timeout")
	})
}

func TestDestroyIsSafeToRepeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{})
		errs := make(chan error, 10)
		for range cap(errs) {
			go func() { errs <- h.Destroy(context.Background(), org, sbx.ID) }()
		}
		for range cap(errs) {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		h.wantState(sbx.ID, sandbox.Destroyed, sandbox.Requested)
		if n := strings.Count(strings.Join(h.node.Calls(), ","), "destroy"); n != 1 {
			t.Errorf("the host was touched %d times", n)
		}
	})
}

// TestDestroyAnswersEarly checks that a destroy waits for the row and not for the host, where many
// removals wait for each other.
func TestDestroyAnswersEarly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		h.quota = sandbox.Quota{Sandboxes: 10}
		var ids []sandbox.ID
		for range 10 {
			ids = append(ids, h.mustCreate(sandbox.Request{}).ID)
		}
		var mu sync.Mutex
		busy, most := 0, 0
		h.node.OnDestroy = func(context.Context, sandbox.ID) error {
			mu.Lock()
			busy++
			most = max(most, busy)
			mu.Unlock()
			time.Sleep(time.Second) // on the bubble's clock
			mu.Lock()
			busy--
			mu.Unlock()
			return nil
		}
		began := time.Now()
		for _, id := range ids {
			if err := h.Destroy(context.Background(), org, id); err != nil {
				t.Error(err)
			}
			if got := h.get(id); got.State != sandbox.Destroying || got.State.Status() != sandbox.StatusDestroyed {
				t.Errorf("after the answer it is %s", got.State)
			}
			_, err := h.Connect(context.Background(), h.caller(), id, sandbox.ForCommand)
			wantCode(t, err, fault.Conflict, "sandbox_not_running")
		}
		if took := time.Since(began); took != 0 {
			t.Errorf("ten destroys took %s", took)
		}
		h.mustCreate(sandbox.Request{}) // sandboxes that are being destroyed count against no quota
		time.Sleep(10 * time.Second)
		for _, id := range ids {
			h.wantState(id, sandbox.Destroyed, sandbox.Requested)
		}
		if most != 4 {
			t.Errorf("%d were removed at once", most)
		}
	})
}

func TestDestroyInterruptsCreate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		h.node.OnCreate = func(ctx context.Context, _ sandbox.Spec) error { <-ctx.Done(); return ctx.Err() }
		sbx, err := h.Create(context.Background(), h.caller(), sandbox.Request{Template: "python"}, sandbox.Once{}, false)
		if err != nil || sbx.State != sandbox.Creating {
			t.Fatalf("%+v, %v", sbx, err)
		}
		if err := h.Destroy(context.Background(), org, sbx.ID); err != nil {
			t.Fatal(err)
		}
		h.wantState(sbx.ID, sandbox.Destroyed, sandbox.Requested)
	})
}

func TestCreateGoesOnWhenTheCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		h.node.OnCreate = func(context.Context, sandbox.Spec) error { time.Sleep(time.Second); return nil }
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		defer cancel()
		_, err := h.Create(ctx, h.caller(), sandbox.Request{Template: "python"}, sandbox.Once{}, true)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		pass(2 * time.Second)
		all, _, err := h.List(context.Background(), sandbox.Filter{OrgID: org, Limit: 10})
		if err != nil || len(all) != 1 {
			t.Fatalf("%d sandboxes, %v", len(all), err)
		}
		h.wantState(all[0].ID, sandbox.Running, "")
	})
}

func TestFailedStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		h.node.OnCreate = func(context.Context, sandbox.Spec) error { return errors.New("secret path /etc/x") }
		once := sandbox.Once{Key: "k", Hash: "h"}
		_, err := h.Create(context.Background(), h.caller(), sandbox.Request{Template: "python"}, once, true)
		wantCode(t, err, fault.Internal, "boot_failed")
		all, _, err := h.List(context.Background(),
			sandbox.Filter{OrgID: org, Limit: 10, States: []sandbox.State{sandbox.Failed}})
		if err != nil || len(all) != 1 {
			t.Fatalf("%d failed sandboxes, %v", len(all), err)
		}
		h.wantState(all[0].ID, sandbox.Failed, sandbox.BootFailed)
		if text := all[0].Error; text == "" || strings.Contains(text, "secret") {
			t.Errorf("error text is %q", text)
		}
		// The same key may be used again.
		h.node.OnCreate = nil
		sbx, err := h.Create(context.Background(), h.caller(), sandbox.Request{Template: "python"}, once, true)
		if err != nil || sbx.ID == all[0].ID {
			t.Errorf("the retry gave %s, %v", sbx.ID, err)
		}
	})
}

func TestIdempotentCreate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		h.node.OnCreate = func(context.Context, sandbox.Spec) error { time.Sleep(time.Second); return nil }
		ids := make(chan sandbox.ID, 5)
		for range cap(ids) {
			go func() {
				sbx, err := h.Create(context.Background(), h.caller(), sandbox.Request{Template: "python"},
					sandbox.Once{Key: "k", Hash: "h"}, true)
				if err != nil || sbx.State != sandbox.Running {
					t.Errorf("%s, %v", sbx.State, err)
				}
				ids <- sbx.ID
			}()
		}
		first := <-ids
		for range cap(ids) - 1 {
			if id := <-ids; id != first {
				t.Errorf("one key made %s and %s", first, id)
			}
		}
		_, err := h.Create(context.Background(), h.caller(), sandbox.Request{Template: "python"},
			sandbox.Once{Key: "k", Hash: "other"}, true)
		wantCode(t, err, fault.Conflict, "idempotency_key_reused")
	})
}

func TestCleanupIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{})
		broken := errors.New("device busy")
		h.node.OnDestroy = func(context.Context, sandbox.ID) error { return broken }
		for range 2 { // the second call finds it being destroyed
			if err := h.Destroy(context.Background(), org, sbx.ID); err != nil {
				t.Errorf("got %v", err)
			}
			h.wantState(sbx.ID, sandbox.Destroying, sandbox.Requested)
		}
		h.node.OnDestroy = nil
		pass(time.Minute)
		h.wantState(sbx.ID, sandbox.Destroyed, sandbox.Requested)
	})
}

func TestLostSandbox(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{})
		h.node.Die(sbx.ID)
		synctest.Wait()
		h.wantState(sbx.ID, sandbox.Destroyed, sandbox.Lost)
	})
}

func TestRestartAdopts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{Timeout: ptr(time.Minute)})
		h.crash()
		time.Sleep(30 * time.Second)
		h.start()
		h.wantState(sbx.ID, sandbox.Running, "")
		pass(31 * time.Second)
		h.wantState(sbx.ID, sandbox.Destroyed, sandbox.Expired)
	})
}

func TestExpiredWhileTheServerWasAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{Timeout: ptr(time.Minute)})
		h.crash()
		time.Sleep(time.Hour)
		h.start()
		synctest.Wait()
		h.wantState(sbx.ID, sandbox.Destroyed, sandbox.Expired)
	})
}

// TestExpiredWhileTheStoreWasAway checks that a sandbox whose time is up ends soon after its row can be read again.
func TestExpiredWhileTheStoreWasAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{Timeout: ptr(time.Minute)})
		h.gate.away.Store(true)
		pass(61 * time.Second)
		h.gate.away.Store(false)
		h.wantState(sbx.ID, sandbox.Running, "")
		pass(2 * time.Second)
		h.wantState(sbx.ID, sandbox.Destroyed, sandbox.Expired)
	})
}

func TestRefusals(t *testing.T) {
	long := strings.Repeat("x", sandbox.MaxMetadataValue+1)
	for name, tt := range map[string]struct {
		r     sandbox.Request
		kind  fault.Kind
		field string
	}{
		"no template":             {sandbox.Request{Template: "-"}, fault.NotFound, ""},
		"mode":                    {sandbox.Request{Mode: "forever"}, fault.Invalid, "mode"},
		"idle timeout, ephemeral": {sandbox.Request{IdleTimeout: ptr(time.Minute)}, fault.Invalid, "idle_timeout"},
		"recovery, ephemeral":     {sandbox.Request{RecoveryInterval: ptr(time.Minute)}, fault.Invalid, "recovery_interval"},
		"timeout, persistent":     {sandbox.Request{Mode: "persistent", Timeout: ptr(time.Minute)}, fault.Invalid, "timeout"},
		"idle timeout too short":  {sandbox.Request{Mode: "persistent", IdleTimeout: ptr(time.Second)}, fault.Invalid, "idle_timeout"},
		"recovery too short":      {sandbox.Request{Mode: "persistent", RecoveryInterval: ptr(time.Second)}, fault.Invalid, "recovery_interval"},
		"timeout 0":               {sandbox.Request{Timeout: ptr(time.Duration(0))}, fault.Invalid, "timeout"},
		"timeout too long":        {sandbox.Request{Timeout: ptr(25 * time.Hour)}, fault.Invalid, "timeout"},
		"size":                    {sandbox.Request{Size: "huge"}, fault.Invalid, "size"},
		"disk too small":          {sandbox.Request{DiskSizeMB: ptr(1)}, fault.Invalid, "disk_size_mb"},
		"disk too big":            {sandbox.Request{DiskSizeMB: ptr(1 << 20)}, fault.Invalid, "disk_size_mb"},
		"env name":                {sandbox.Request{Env: map[string]string{"1A": ""}}, fault.Invalid, "env.1A"},
		"env value":               {sandbox.Request{Env: map[string]string{"A": "\x00"}}, fault.Invalid, "env.A"},
		"metadata key":            {sandbox.Request{Metadata: map[string]string{"": "v"}}, fault.Invalid, "metadata"},
		"metadata value":          {sandbox.Request{Metadata: map[string]string{"k": long}}, fault.Invalid, "metadata.k"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := newFixture(t)
				_, err := h.create(tt.r)
				if e := fault.As(err); e == nil || e.Kind != tt.kind || e.Field != tt.field {
					t.Errorf("got %v (field %q), want %s in %q", err, fault.As(err).Field, tt.kind, tt.field)
				}
				if calls := h.node.Calls(); len(calls) > 0 {
					t.Errorf("the host was touched: %v", calls)
				}
			})
		})
	}
}

func TestOwnership(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{})
		ctx := context.Background()
		const other = "org_bbbbbbbbbbbbbbbbbbbb"
		_, err := h.Get(ctx, other, sbx.ID)
		wantCode(t, err, fault.Denied, "not_your_sandbox")
		wantCode(t, h.Destroy(ctx, other, sbx.ID), fault.Denied, "not_your_sandbox")
		_, err = h.Connect(ctx, sandbox.Caller{OrgID: other}, sbx.ID, sandbox.ForCommand)
		wantCode(t, err, fault.Denied, "not_your_sandbox")
		_, err = h.Get(ctx, org, sandbox.NewID())
		wantCode(t, err, fault.NotFound, "sandbox_not_found")
		_, err = h.Get(ctx, org, "sbx_../../etc")
		wantCode(t, err, fault.NotFound, "sandbox_not_found")
	})
}

func TestQuotaAndRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		h.quota = sandbox.Quota{Sandboxes: 1}
		sbx := h.mustCreate(sandbox.Request{})
		_, err := h.create(sandbox.Request{})
		wantCode(t, err, fault.Exhausted, "quota_exceeded")
		if err := h.Destroy(context.Background(), org, sbx.ID); err != nil {
			t.Fatal(err)
		}
		h.mustCreate(sandbox.Request{})
		h.quota = sandbox.Quota{}
		h.node.SetFull(true)
		_, err = h.create(sandbox.Request{})
		wantCode(t, err, fault.Unavailable, "no_capacity")
	})
}

func TestPurge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{})
		if err := h.Destroy(context.Background(), org, sbx.ID); err != nil {
			t.Fatal(err)
		}
		pass(50 * time.Minute)
		h.Purge(context.Background())
		h.get(sbx.ID)
		pass(30 * time.Minute)
		h.Purge(context.Background())
		_, err := h.Get(context.Background(), org, sbx.ID)
		wantCode(t, err, fault.NotFound, "sandbox_not_found")
	})
}

// TestPurgeByOneClock checks that rows are old by the clock that the service is given.
func TestPurgeByOneClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newFixture(t)
		sbx := h.mustCreate(sandbox.Request{})
		if err := h.Destroy(context.Background(), org, sbx.ID); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		h.crash()
		h.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
		h.start()
		h.Purge(context.Background())
		_, err := h.Get(context.Background(), org, sbx.ID)
		wantCode(t, err, fault.NotFound, "sandbox_not_found")
	})
}
