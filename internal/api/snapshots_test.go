package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

func TestSnapshots(t *testing.T) {
	h := newTestServer(t)
	sbx := as[Sandbox](t, 201, h.send(t, "POST", "/v1/sandboxes", h.key,
		`{"template":"python","timeout":"1h","env":{"A":"1"},"size":"performance-1x","egress":{"mode":"deny_all"}}`))
	path := "/v1/sandboxes/" + sbx.ID
	r := h.send(t, "POST", path+"/snapshots", h.key, `{"name":"after-setup"}`)
	snap := as[Snapshot](t, 201, r)
	if r.header.Get("Location") != "/v1/snapshots/"+snap.ID || *snap.Name != "after-setup" || snap.SandboxID != sbx.ID ||
		snap.Template != "python" || snap.TemplateVersion != 3 ||
		snap.MemoryMB != 2048 || snap.Env["A"] != "1" || snap.Egress.Mode != EgressModeDenyAll || !snap.Memory ||
		snap.SizeBytes == 0 || snap.CreatedAt.Before(sbx.CreatedAt) {
		t.Errorf("made %s", r.body)
	}
	for _, ref := range []string{"after-setup", snap.ID} {
		if got := as[Snapshot](t, 200, h.send(t, "GET", "/v1/snapshots/"+ref, h.key, "")); got.ID != snap.ID {
			t.Errorf("%s is %+v", ref, got)
		}
	}
	for range 2 {
		as[Snapshot](t, 201, h.send(t, "POST", path+"/snapshots", h.key, "{}"))
	}
	for query, want := range map[string]int{"": 3, "?name=after-setup": 1, "?sandbox=" + sbx.ID: 3,
		"?sandbox=sbx_none": 0, "?name=none": 0} {
		if l := as[SnapshotList](t, 200, h.send(t, "GET", "/v1/snapshots"+query, h.key, "")); len(l.Snapshots) != want {
			t.Errorf("%q lists %d, want %d", query, len(l.Snapshots), want)
		}
	}
	page := as[SnapshotList](t, 200, h.send(t, "GET", "/v1/snapshots?limit=2", h.key, ""))
	rest := as[SnapshotList](t, 200, h.send(t, "GET", "/v1/snapshots?limit=2&cursor="+*page.NextCursor, h.key, ""))
	if len(rest.Snapshots) != 1 || rest.Snapshots[0].ID != snap.ID || rest.NextCursor != nil {
		t.Errorf("the second page is %+v", rest)
	}
	made := as[Sandbox](t, 201, h.send(t, "POST", "/v1/sandboxes", h.key,
		`{"template":null,"snapshot":"after-setup","env":{"B":"2"}}`)) // null is as absent
	if made.Size != "performance-1x" || made.Env["A"] != "1" || made.Env["B"] != "2" ||
		made.Egress.Mode != EgressModeDenyAll || *made.Source != SandboxSourceSnapshot || *made.Origin != snap.ID {
		t.Errorf("made %+v", made)
	}
	if r := h.send(t, "DELETE", "/v1/snapshots/after-setup", h.key, ""); r.status != 204 || len(r.body) != 0 {
		t.Errorf("delete: %d %s", r.status, r.body)
	}
	again := h.send(t, "DELETE", "/v1/snapshots/"+snap.ID, h.key, "")
	if again.status != 404 || again.problem.Code != "snapshot_not_found" {
		t.Errorf("delete again: %d %s", again.status, again.body)
	}
}

func TestSnapshotsRefused(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	path := "/v1/sandboxes/" + sbx.ID
	as[Snapshot](t, 201, h.send(t, "POST", path+"/snapshots", h.key, `{"name":"taken"}`))
	snapshot := func(name, body string, status int, code, field string) refusal {
		return refusal{"snapshot " + name, "POST", path + "/snapshots", body, nil, status, code, field}
	}
	fork := func(name, body string, status int, code, field string) refusal {
		return refusal{"fork " + name, "POST", path + "/fork", body, nil, status, code, field}
	}
	create := func(name, body string, code, field string) refusal {
		return refusal{"create " + name, "POST", "/v1/sandboxes", body, nil, 400, code, field}
	}
	list := func(query, code, field string) refusal {
		return refusal{"list " + query, "GET", "/v1/snapshots?" + query, "", nil, 400, code, field}
	}
	h.check(t, []refusal{
		snapshot("unknown field", `{"nmae":"a"}`, 400, "unknown_field", "nmae"),
		snapshot("name empty", `{"name":""}`, 400, "invalid_name", "name"),
		snapshot("name with a slash", `{"name":"a/b"}`, 400, "invalid_name", "name"),
		snapshot("name like an id", `{"name":"snap_a"}`, 400, "invalid_name", "name"),
		snapshot("name too long", fmt.Sprintf(`{"name":%q}`, strings.Repeat("a", 64)), 400, "invalid_name", "name"),
		snapshot("name of another type", `{"name":7}`, 400, "invalid_name", "name"),
		snapshot("name taken", `{"name":"taken"}`, 409, "snapshot_exists", ""),
		{"snapshot of nothing", "POST", "/v1/sandboxes/sbx_aaaaaaaaaaaaaaaaaaaa/snapshots", "", nil, 404, "sandbox_not_found", ""},
		fork("unknown field", `{"cuont":2}`, 400, "unknown_field", "cuont"),
		fork("count 0", `{"count":0}`, 400, "invalid_count", "count"),
		fork("count below 0", `{"count":-1}`, 400, "invalid_count", "count"),
		fork("count 101", `{"count":101}`, 400, "invalid_count", "count"),
		fork("count of another type", `{"count":"2"}`, 400, "invalid_count", "count"),
		fork("timeout", `{"timeout":"25h"}`, 400, "invalid_timeout", "timeout"),
		fork("idle timeout", `{"idle_timeout":"1h"}`, 400, "invalid_idle_timeout", "idle_timeout"),
		fork("mode", `{"mode":"forever"}`, 400, "invalid_mode", "mode"),
		fork("env", `{"env":{"A B":""}}`, 400, "invalid_env", "env.A B"),
		fork("egress", `{"egress":{"mode":"never"}}`, 400, "invalid_egress", "egress.mode"),
		fork("size", `{"size":"shared-cpu-1x"}`, 400, "unknown_field", "size"),
		{"fork of nothing", "POST", "/v1/sandboxes/sbx_aaaaaaaaaaaaaaaaaaaa/fork", "", nil, 404, "sandbox_not_found", ""},
		create("both", `{"template":"python","snapshot":"taken"}`, "invalid_snapshot", "snapshot"),
		create("neither", `{}`, "invalid_template", "template"),
		create("another size", `{"snapshot":"taken","size":"performance-1x"}`, "invalid_size", "size"),
		create("another disk", `{"snapshot":"taken","disk_size_mb":64}`, "invalid_disk_size_mb", "disk_size_mb"),
		{"create from nothing", "POST", "/v1/sandboxes", `{"snapshot":"none"}`, nil, 404, "snapshot_not_found", ""},
		{"get nothing", "GET", "/v1/snapshots/none", "", nil, 404, "snapshot_not_found", ""},
		{"get what is no name", "GET", "/v1/snapshots/a%2Fb", "", nil, 404, "snapshot_not_found", ""},
		list("name=", "invalid_name", "name"),
		list("sandbox=", "invalid_sandbox", "sandbox"),
		list("limit=0", "invalid_limit", "limit"),
		list("cursor=x", "invalid_cursor", "cursor"),
		list("nmae=a", "unknown_parameter", "nmae"),
	})
	if r := h.send(t, "DELETE", path, h.key, ""); r.status != 204 {
		t.Fatal(r.status)
	}
	h.check(t, []refusal{
		snapshot("of what is over", "", 409, "sandbox_not_running", ""),
		fork("of what is over", "", 409, "sandbox_not_running", ""),
	})
}

// TestForkFails checks which errors of the machine callers are told when a snapshot could not be
// written or children could not be created.
func TestForkFails(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	path := "/v1/sandboxes/" + sbx.ID
	for _, c := range []struct {
		err    error
		status int
		code   string
	}{
		{fault.New(fault.NoSpace, "disk_full", "a checkpoint needs 20 MiB and 3 are left"), 507, "disk_full"},
		{errors.New("writing /var/lib/secret: EIO"), 500, "snapshot_failed"},
	} {
		h.node.OnSnapshot = func(context.Context, sandbox.ID) error { return c.err }
		for _, verb := range []string{"/snapshots", "/fork"} {
			r := h.send(t, "POST", path+verb, h.key, "")
			if r.status != c.status || r.problem.Code != c.code || bytes.Contains(r.body, []byte("secret")) {
				t.Errorf("%s: %d %s, want %d %s", verb, r.status, r.body, c.status, c.code)
			}
		}
	}
	h.node.OnSnapshot = nil
	// Create some of the children, then none.
	var n atomic.Int32
	h.node.OnCreate = func(context.Context, sandbox.Spec) error {
		switch n.Add(1) {
		case 1:
			return nil
		case 2:
			return errors.New("mounting /var/lib/secret: EIO")
		}
		return fault.New(fault.Unavailable, "no_capacity", "this machine is full").After(5e9)
	}
	for _, want := range []string{"", "boot_failed"} {
		r := h.send(t, "POST", path+"/fork", h.key, `{"count":1}`)
		if want == "" {
			if made := as[ForkResult](t, 201, r); len(made.Children) != 1 || made.Children[0].Sandbox == nil ||
				made.Children[0].Error != nil {
				t.Errorf("made %s", r.body)
			}
		} else if r.status != 500 || r.problem.Code != want || bytes.Contains(r.body, []byte("secret")) {
			t.Errorf("%d %s, want 500 %s", r.status, r.body, want)
		}
	}
	r := h.send(t, "POST", path+"/fork", h.key, `{"count":3}`)
	if r.status != 503 || r.problem.Code != "no_capacity" || r.header.Get("Retry-After") != "5" {
		t.Errorf("a fork without room for any child: %d %s %v", r.status, r.body, r.header)
	}
	n.Store(0)
	r = h.send(t, "POST", path+"/fork", h.key, `{"count":3}`)
	made := as[ForkResult](t, 201, r)
	sandboxes, refused := 0, 0
	for _, c := range made.Children {
		if c.Sandbox != nil {
			sandboxes++
		} else if (c.Error.Status == 503 && c.Error.Code == "no_capacity" || c.Error.Status == 500 &&
			c.Error.Code == "boot_failed") && c.Error.Detail != "" {
			refused++
		}
	}
	if sandboxes != 1 || refused != 2 || bytes.Contains(r.body, []byte("secret")) {
		t.Errorf("made %s", r.body)
	}
}
