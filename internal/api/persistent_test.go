package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

func TestLifeOfAPersistentSandbox(t *testing.T) {
	h := newTestServer(t)
	r := h.send(t, "POST", "/v1/sandboxes", h.key,
		`{"template":"python","mode":"persistent","idle_timeout":"30m","recovery_interval":"1h"}`)
	sbx := as[Sandbox](t, 201, r)
	if sbx.Mode != "persistent" || sbx.Status != SandboxStatusRunning || *sbx.IdleTimeoutSeconds != 1800 ||
		*sbx.RecoveryIntervalSeconds != 3600 ||
		sbx.LastActivityAt.Before(sbx.CreatedAt) || sbx.StartedAt == nil {
		t.Errorf("created %s", r.body)
	}
	for _, absent := range []string{"timeout_seconds", "expires_at", "suspended_at", "destroyed_at", "error"} {
		if bytes.Contains(r.body, []byte(`"`+absent+`"`)) {
			t.Errorf("the field %s does not apply but is present: %s", absent, r.body)
		}
	}
	path := "/v1/sandboxes/" + sbx.ID
	r = h.send(t, "POST", path+"/checkpoint", h.key, "{}")
	if p := as[RecoveryPoint](t, 200, r); p.SizeBytes != 1<<20 || p.CreatedAt.Before(sbx.CreatedAt) ||
		time.Since(p.CreatedAt) > time.Minute {
		t.Errorf("recovery point %s", r.body)
	}
	asleep := as[Sandbox](t, 200, h.send(t, "POST", path+"/suspend", h.key, ""))
	if asleep.Status != SandboxStatusSuspended || asleep.SuspendedAt.Before(sbx.CreatedAt) || asleep.Error != nil {
		t.Errorf("suspended: %+v", asleep)
	}
	// Reading a sandbox does not wake it.
	if got := as[Sandbox](t, 200, h.send(t, "GET", path, h.key, "")); got.State != "suspended" ||
		!got.LastActivityAt.Equal(*asleep.LastActivityAt) {
		t.Errorf("read: %+v", got)
	}
	h.send(t, "GET", path+"/events", h.key, "")
	listed := as[SandboxList](t, 200, h.send(t, "GET", "/v1/sandboxes?status=suspended", h.key, "")).Sandboxes
	if len(listed) != 1 || listed[0].State != "suspended" {
		t.Errorf("the suspended sandboxes are %+v", listed)
	}
	for range 2 {
		awake := as[Sandbox](t, 200, h.send(t, "POST", path+"/wake", h.key, ""))
		if awake.Status != SandboxStatusRunning || awake.SuspendedAt != nil ||
			!awake.LastActivityAt.After(*asleep.LastActivityAt) {
			t.Errorf("woken: %+v", awake)
		}
	}
	var states []SandboxState
	for _, e := range as[EventList](t, 200, h.send(t, "GET", path+"/events", h.key, "")).Events {
		states = append(states, e.To)
	}
	if want := []SandboxState{"running", "waking", "suspended", "suspending", "running",
		"creating"}; !slices.Equal(states, want) {
		t.Errorf("events %v, want %v", states, want)
	}
	as[Sandbox](t, 200, h.send(t, "POST", path+"/suspend", h.key, ""))
	if r := h.send(t, "DELETE", path, h.key, ""); r.status != 204 {
		t.Errorf("destroying a suspended sandbox: %d %s", r.status, r.body)
	}
	if gone := as[Sandbox](t, 200, h.send(t, "GET", path, h.key, "")); gone.Status != SandboxStatusDestroyed ||
		*gone.DestroyReason != "requested" {
		t.Errorf("destroyed: %+v", gone)
	}
}

// insideCalls lists the calls that need a running sandbox, with their answers.
var insideCalls = []struct {
	method, path, body string
	status             int
	use                sandbox.Cause
}{
	{"POST", "/execute", `{"command":"id"}`, 200, sandbox.ForCommand},
	{"PUT", "/files?path=/new", "x", 204, sandbox.ForFiles},
	{"GET", "/files?path=/a", "", 200, sandbox.ForFiles},
	{"GET", "/files/list?path=/", "", 200, sandbox.ForFiles},
	{"DELETE", "/files?path=/a", "", 204, sandbox.ForFiles},
}

// wantWake checks that the last events of a sandbox are those of a wake, with its cause.
func (h *testServer) wantWake(t *testing.T, id, reason string) {
	t.Helper()
	all := as[EventList](t, 200, h.send(t, "GET", "/v1/sandboxes/"+id+"/events", h.key, "")).Events
	if all[0].To != "running" || all[0].Reason != reason || all[1].To != "waking" || all[1].Reason != reason {
		t.Errorf("the last events are %+v, want a wake with the reason %q", all[:2], reason)
	}
}

// TestUseWakes checks that every call into a suspended sandbox wakes it, does its work in the new
// run, and leaves no lease.
func TestUseWakes(t *testing.T) {
	h := newTestServer(t)
	for _, c := range insideCalls {
		h.agent.files["/a"] = []byte("kept")
		sbx := h.newAsleep(t)
		path := "/v1/sandboxes/" + sbx.ID
		if r := h.send(t, c.method, path+c.path, h.key, c.body); r.status != c.status {
			t.Errorf("%s %s: status %d %s, want %d", c.method, c.path, r.status, r.body, c.status)
		}
		awake := as[Sandbox](t, 200, h.send(t, "GET", path, h.key, ""))
		if awake.Status != SandboxStatusRunning || awake.SuspendedAt != nil || !awake.LastActivityAt.After(*sbx.SuspendedAt) {
			t.Errorf("%s %s leaves it %+v", c.method, c.path, awake)
		}
		if calls := h.node.Calls(); calls[len(calls)-1] != "wake "+sbx.ID {
			t.Errorf("%s %s: the machine was asked %v", c.method, c.path, calls)
		}
		if n := h.sandboxes.InUse(); n != 0 {
			t.Errorf("%s %s: %d leases are still held", c.method, c.path, n)
		}
		h.wantWake(t, sbx.ID, string(c.use))
	}
	for _, c := range []struct {
		method, path string
		use          sandbox.Cause
	}{
		{"GET", "/processes", sandbox.ForProcess},
		{"GET", "/ports/8080/", sandbox.ForPort},
		{"POST", "/wake", sandbox.Cause(sandbox.Requested)},
	} {
		sbx := h.newAsleep(t)
		h.send(t, c.method, "/v1/sandboxes/"+sbx.ID+c.path, h.key, "")
		h.wantWake(t, sbx.ID, string(c.use))
	}
	row, err := h.sandboxes.Get(t.Context(), h.org.Org.ID, sandbox.ID(h.agent.targets[0].SandboxID))
	if err != nil || h.agent.targets[0].Run != row.Run {
		t.Errorf("the agent was called as %+v, the row is %+v, %v", h.agent.targets[0], row, err)
	}
}

func TestZeroIsNever(t *testing.T) {
	h := newTestServer(t)
	for _, zero := range []string{`0`, `"0"`, `"0s"`, `"0h0m"`} {
		body := fmt.Sprintf(`{"template":"python","mode":"persistent","idle_timeout":%s,"recovery_interval":%s}`, zero, zero)
		sbx := as[Sandbox](t, 201, h.send(t, "POST", "/v1/sandboxes", h.key, body))
		if *sbx.IdleTimeoutSeconds != 0 || *sbx.RecoveryIntervalSeconds != 0 {
			t.Errorf("%s is %d s and %d s", zero, *sbx.IdleTimeoutSeconds, *sbx.RecoveryIntervalSeconds)
		}
	}
	for _, absent := range []string{`{"template":"python","mode":"persistent"}`,
		`{"template":"python","mode":"persistent","idle_timeout":null,"recovery_interval":null,"snapshot":null}`} {
		sbx := as[Sandbox](t, 201, h.send(t, "POST", "/v1/sandboxes", h.key, absent))
		if *sbx.IdleTimeoutSeconds != 600 || *sbx.RecoveryIntervalSeconds != 600 {
			t.Errorf("%s is %d s and %d s, want 10m for both", absent, *sbx.IdleTimeoutSeconds, *sbx.RecoveryIntervalSeconds)
		}
	}
	detail := h.send(t, "POST", "/v1/sandboxes", h.key,
		`{"template":"python","mode":"persistent","idle_timeout":5}`).problem.Detail
	if !strings.Contains(detail, "or 0") || !strings.Contains(detail, "30s") {
		t.Errorf("a number is refused with %q", detail)
	}
}

// TestFallsBack checks that a sandbox whose processes died is suspended at its latest checkpoint,
// and that the event tells the time of the checkpoint.
func TestFallsBack(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newAsleep(t)
	path := "/v1/sandboxes/" + sbx.ID
	as[Sandbox](t, 200, h.send(t, "POST", path+"/wake", h.key, ""))
	checkpoint := as[RecoveryPoint](t, 200, h.send(t, "POST", path+"/checkpoint", h.key, ""))
	h.node.Kill(sandbox.ID(sbx.ID))
	if err := h.sandboxes.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	fallen := as[Sandbox](t, 200, h.send(t, "GET", path, h.key, ""))
	// The database keeps times to the microsecond.
	if fallen.Status != SandboxStatusSuspended || fallen.SuspendedAt.Sub(checkpoint.CreatedAt).Abs() > time.Microsecond {
		t.Errorf("suspended at %v, want %v: %+v", fallen.SuspendedAt, checkpoint.CreatedAt, fallen)
	}
	r := h.send(t, "GET", path+"/events", h.key, "")
	events := as[EventList](t, 200, r).Events
	if e := events[0]; e.To != "suspended" || e.Reason != "lost" || e.Detail == nil ||
		!strings.Contains(*e.Detail, checkpoint.CreatedAt.Format(time.RFC3339)) {
		t.Errorf("event %+v of %s", e, r.body)
	}
	if e := events[1]; e.Detail != nil {
		t.Errorf("the event should have no detail: %+v", e)
	}
	as[ExecuteResult](t, 200, h.send(t, "POST", path+"/execute", h.key, `{"command":"id"}`))
}

// TestWakeFailed checks that the error of a checkpoint that cannot be restored is reported, and
// that the checkpoint is kept.
func TestWakeFailed(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newAsleep(t)
	path := "/v1/sandboxes/" + sbx.ID
	h.node.OnWake = func(context.Context, sandbox.Spec) error {
		return fault.New(fault.Internal, "wake_failed", "pages.img is damaged").Because(errors.New("reading /var/lib/secret"))
	}
	for _, c := range insideCalls {
		r := h.send(t, c.method, path+c.path, h.key, c.body)
		if r.status != 500 || r.problem.Code != "wake_failed" || r.problem.Detail != "pages.img is damaged" ||
			bytes.Contains(r.body, []byte("secret")) {
			t.Errorf("%s %s: status %d %s", c.method, c.path, r.status, r.body)
		}
		if line := h.log.line(t, r.header.Get("X-Request-Id")); !strings.Contains(
			fmt.Sprint(line["error"]), "/var/lib/secret") || line["level"] != "ERROR" {
			t.Errorf("the log does not say why: %v", line)
		}
	}
	kept := as[Sandbox](t, 200, h.send(t, "GET", path, h.key, ""))
	if kept.Status != SandboxStatusSuspended || kept.Error == nil || *kept.Error != "pages.img is damaged" {
		t.Errorf("kept as %+v", kept)
	}
	h.node.OnWake = nil
	awake := as[Sandbox](t, 200, h.send(t, "POST", path+"/wake", h.key, ""))
	if awake.Status != SandboxStatusRunning || awake.Error != nil {
		t.Errorf("woken at last: %+v", awake)
	}
}

// TestNoRoomToWake checks that waking a sandbox needs the same capacity as creating one, and is
// refused in the same words.
func TestNoRoomToWake(t *testing.T) {
	h := newTestServer(t, func(a *auth.Config, _ *sandbox.Config, _ *Config) { a.Quota.VCPUs = 1 })
	path := "/v1/sandboxes/" + h.newAsleep(t).ID
	refused := func(status int, code, after string) {
		t.Helper()
		for _, c := range append(slices.Clone(insideCalls), insideCalls[0]) {
			r := h.send(t, c.method, path+c.path, h.key, c.body)
			if r.status != status || r.problem.Code != code || r.header.Get("Retry-After") != after {
				t.Errorf("%s %s: status %d, Retry-After %q: %s, want %d %s", c.method, c.path, r.status,
					r.header.Get("Retry-After"), r.body, status, code)
			}
		}
		if r := h.send(t, "POST", path+"/wake", h.key, ""); r.status != status || r.problem.Code != code {
			t.Errorf("wake: status %d %s, want %d %s", r.status, r.body, status, code)
		}
		if sbx := as[Sandbox](t, 200, h.send(t, "GET", path, h.key, "")); sbx.Status != SandboxStatusSuspended ||
			sbx.Error != nil {
			t.Errorf("refused and %+v", sbx)
		}
	}
	h.node.SetFull(true)
	refused(503, "no_capacity", "5")
	h.node.SetFull(false)
	other := h.newSandbox(t)
	refused(429, "quota_exceeded", "")
	h.send(t, "DELETE", "/v1/sandboxes/"+other.ID, h.key, "")
	as[Sandbox](t, 200, h.send(t, "POST", path+"/wake", h.key, ""))
}

// TestPointNotWritten checks which errors of the machine callers are told when a checkpoint could
// not be written.
func TestPointNotWritten(t *testing.T) {
	h := newTestServer(t)
	sbx := as[Sandbox](t, 201, h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"python","mode":"persistent"}`))
	path := "/v1/sandboxes/" + sbx.ID
	for _, c := range []struct {
		err    error
		status int
		codes  []string // of suspend and of checkpoint, in this order
	}{
		{fault.New(fault.NoSpace, "disk_full", "a checkpoint needs 20 MiB and 3 are left"), 507, []string{"disk_full", "disk_full"}},
		{errors.New("writing /var/lib/secret: EIO"), 500, []string{"suspend_failed", "checkpoint_failed"}},
	} {
		h.node.OnSuspend = func(context.Context, sandbox.ID) error { return c.err }
		h.node.OnCheckpoint = h.node.OnSuspend
		for i, verb := range []string{"/suspend", "/checkpoint"} {
			r := h.send(t, "POST", path+verb, h.key, "")
			if r.status != c.status || r.problem.Code != c.codes[i] || bytes.Contains(r.body, []byte("secret")) {
				t.Errorf("%s with %v: status %d %s, want %d %s", verb, c.err, r.status, r.body, c.status, c.codes[i])
			}
			if got := as[Sandbox](t, 200, h.send(t, "GET", path, h.key, "")); got.Status != SandboxStatusRunning {
				t.Errorf("%s with %v leaves it %s", verb, c.err, got.Status)
			}
		}
	}
}

// TestNoOtherCallerWakes checks that callers without the right to use a suspended sandbox do not wake
// it, and that reading it does not either.
func TestNoOtherCallerWakes(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newAsleep(t)
	_, reader := h.newKey(t, 0, auth.SandboxesRead, auth.TemplatesRead)
	operations(h.spec, func(pattern, path string, op *openapi3.Operation, _ openapi3.Parameters) {
		if !strings.Contains(path, "/sandboxes/{id}") {
			return
		}
		method, _, _ := strings.Cut(pattern, " ")
		s := samples[op.OperationID]
		target := strings.Replace(path, "{id}", sbx.ID, 1) + "?" + s.query
		for _, key := range []string{"", h.other, reader} {
			h.send(t, method, target, key, s.body)
		}
	})
	if got := as[Sandbox](t, 200, h.send(t, "GET", "/v1/sandboxes/"+sbx.ID, h.key, "")); got.State != "suspended" ||
		!got.LastActivityAt.Equal(*sbx.LastActivityAt) {
		t.Errorf("the sandbox is %+v, was %+v", got, sbx)
	}
	if n := slices.Index(h.node.Calls(), "wake "+sbx.ID); n >= 0 {
		t.Errorf("the machine was asked %v", h.node.Calls())
	}
}
