package e2b

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// TestEveryRouteNeedsAKey calls every route without a key, with one of another organization, and
// with one that lacks the scopes. None is answered.
func TestEveryRouteNeedsAKey(t *testing.T) {
	h := newHarness(t)
	id, _ := h.create(`{"templateID":"base"}`)
	before := h.row(id)
	weak, weaker := h.newKey(auth.TemplatesWrite), h.newKey(auth.SandboxesWrite)
	for pattern, route := range h.handler.table() {
		method, path, ok := strings.Cut(pattern, " ")
		if !ok {
			method, path = "GET", pattern
		}
		path = strings.NewReplacer("{id}", id, "{ref}", "base", "{alias}", "base", "{rest...}", "x", "{build}",
			"y", "{hash}", strings.Repeat("0", 64)).Replace(path)
		for name, key := range map[string]string{"none": "", "unknown": "e2b_" + strings.Repeat("0", 40),
			"no key": "Bearer"} {
			if r := h.send(method, path, `{}`, "X-API-Key", key); r.status != 401 || r.json["code"] != float64(401) ||
				r.json["message"] == "" {
				t.Errorf("%s with key %s: %d %s", pattern, name, r.status, r.body)
			}
		}
		if len(route.scopes) > 0 && route.scopes[0] != auth.TemplatesRead {
			lacks := weak
			if route.scopes[0] == auth.TemplatesWrite {
				lacks = weaker
			}
			if r := h.send(method, path, `{}`, "X-API-Key", lacks); r.status != 403 {
				t.Errorf("%s with a weak key: %d %s", pattern, r.status, r.body)
			}
		}
		if strings.Contains(pattern, "{id}") {
			body := `{"timeout":10}`
			if strings.Contains(pattern, "/network") || strings.Contains(pattern, "/pause") ||
				strings.Contains(pattern, "/snapshots") || strings.Contains(pattern, "/refreshes") {
				body = `{}`
			}
			if r := h.send(method, path, body, "X-API-Key", h.other); r.status != 404 || r.json["code"] != float64(404) {
				t.Errorf("%s of another organization: %d %s", pattern, r.status, r.body)
			}
		}
	}
	if after := h.row(id); after.State != before.State || !after.ExpiresAt.Equal(before.ExpiresAt) {
		t.Errorf("the sandbox is %+v", after)
	}
	if r := h.send("GET", "/v2/no/such/thing", ""); r.status != 401 {
		t.Errorf("an unknown path without a key: %d", r.status)
	}
	if r := h.control("GET", "/v2/no/such/thing", ""); r.status != 404 {
		t.Errorf("an unknown path: %d", r.status)
	}
	if r := h.send("GET", "/health", ""); r.status != 200 {
		t.Errorf("health: %d", r.status)
	}
}

// TestKeysOfEitherKind checks that a key of the v1 API is valid here.
func TestKeysOfEitherKind(t *testing.T) {
	h := newHarness(t)
	for _, key := range []string{h.key, h.other} {
		if r := h.send("GET", "/v2/sandboxes", "", "X-API-Key", key); r.status != 200 || r.body != "[]\n" {
			t.Errorf("key %.4s…: %d %s", key, r.status, r.body)
		}
	}
	// Only keys with the scopes to use a sandbox get its token.
	id, _ := h.create(`{"templateID":"base"}`)
	reader := h.newKey(auth.SandboxesRead)
	if r := h.send("GET", "/sandboxes/"+id, "", "X-API-Key", reader); r.status != 200 || r.json["envdAccessToken"] != nil {
		t.Errorf("a reader: %d %s", r.status, r.body)
	}
	if r := h.control("GET", "/sandboxes/"+id, ""); r.json["envdAccessToken"] == nil {
		t.Errorf("a user: %s", r.body)
	}
	if r := h.send("POST", "/v2/sandboxes", `{"templateID":"base"}`, "X-API-Key",
		h.newKey(auth.SandboxesWrite)); r.status != 403 {
		t.Errorf("a caller that may not use what it makes: %d %s", r.status, r.body)
	}
}

func TestCreate(t *testing.T) {
	h := newHarness(t)
	id, token := h.create(`{"templateID":"base","metadata":{"a":"b"},"envVars":{"X":"y"},"timeout":77,` +
		`"allow_internet_access":false,"autoPause":true}`)
	sb := h.row(id)
	if token == "" || sb.User != "user" || sb.Timeout.Seconds() != 77 || sb.AtEnd != sandbox.EndSuspends ||
		sb.Egress.Mode != sandbox.DenyAll ||
		sb.Env["X"] != "y" || sb.Metadata["a"] != "b" || sb.Mode != sandbox.Ephemeral {
		t.Errorf("the row is %+v", sb)
	}
	detail := h.control("GET", "/sandboxes/"+id, "").json
	if detail["allowInternetAccess"] != false || detail["state"] != "running" ||
		fmt.Sprint(detail["lifecycle"]) != "map[autoResume:false onTimeout:pause]" || detail["alias"] != "base" {
		t.Errorf("the detail is %v", detail)
	}
	mine, _ := h.create(`{"templateID":"mine"}`)
	if user := h.row(mine).User; user != "root" {
		t.Errorf("in a template of one's own commands run as %s", user)
	}
	if r := h.control("POST", "/v2/sandboxes", ``); r.status != 201 {
		t.Errorf("an empty body: %d %s", r.status, r.body)
	}
	open := h.control("POST", "/sandboxes", `{"templateID":"base","secure":false}`)
	openID, _ := open.json["sandboxID"].(string)
	if open.json["envdAccessToken"] != nil {
		t.Errorf("an open one has a token: %s", open.body)
	}
	if r := h.send("GET", "/envs", "", idHeader, openID, portHeader, "49983"); r.status != 204 {
		t.Errorf("an open one without a token: %d %s", r.status, r.body)
	}
	if r := h.control("POST", "/v2/sandboxes",
		`{"templateID":"base","network":{"allowPublicTraffic":false}}`); r.json["trafficAccessToken"] == nil {
		t.Errorf("one whose ports are not public: %s", r.body)
	}
	for body, status := range map[string]int{
		`{"templateID":"none"}`: 404, `{"templateID":"base:v1"}`: 404, `{"templateID":"base","timeout":86401}`: 400,
		`{"templateID":"base","timeout":9223372036854775807}`: 400, `{"templateID":"base","timeout":-1}`: 400,
		`{"templateID":"base","metadata":{"":"x"}}`: 400, `{"templateID":"base","envVars":{"=":"x"}}`: 400,
		`{"templateID":"base","volumeMounts":[{}]}`: 400, `{"templateID":"base","iam":{}}`: 400, `{"templateID":"base","new":1}`: 501,
		`{"templateID":"base","autoPause":true,"autoPauseMemory":false,"autoResume":{"enabled":true}}`: 400,
		`{"templateID":"base","network":{"rules":{"a":[{}]}}}`:                                         501, `[]`: 400, `{`: 400, `{} {}`: 400,
		`{"templateID":"base","metadata":{"a":"` + strings.Repeat("x", maxBody) + `"}}`: 413,
	} {
		if r := h.control("POST", "/v2/sandboxes", body); r.status != status || r.json["code"] != float64(status) {
			t.Errorf("%.80s: %d %s, want %d", body, r.status, r.body, status)
		}
	}
}

func TestSetNetwork(t *testing.T) {
	h := newHarness(t)
	id, _ := h.create(`{"templateID":"base","network":{"allowPublicTraffic":false,"denyOut":["10.0.0.0/8"]}}`)
	for body, mode := range map[string]sandbox.EgressMode{
		`{"allow_internet_access":false}`: sandbox.DenyAll,
		`{}`:                              sandbox.AllowAll,
		`{"denyOut":["0.0.0.0/0"]}`:       sandbox.DenyAll,
	} {
		r := h.control("PUT", "/sandboxes/"+id+"/network", body)
		if sb := h.row(id); r.status != http.StatusNoContent || sb.Egress.Mode != mode || optionsOf(sb).public() {
			t.Errorf("%s: %d %s, %+v, %s", body, r.status, r.body, sb.Egress, sb.FrontData)
		}
	}
	if r := h.control("PUT", "/sandboxes/"+id+"/network", `{"denyOut":["x"]}`); r.status != 400 {
		t.Errorf("%d %s", r.status, r.body)
	}
}

// TestReferencesAreEscaped checks that an escaped slash in a reference does not split the path.
func TestReferencesAreEscaped(t *testing.T) {
	h := newHarness(t)
	for path, status := range map[string]int{
		"/templates/team%2Fname%3Adefault": 404, "/templates/base": 403, "/templates/snap_aaaaaaaaaaaaaaaaaaaa": 404,
	} {
		if r := h.control("DELETE", path, ""); r.status != status || r.json["code"] != float64(status) {
			t.Errorf("%s: %d %s, want %d", path, r.status, r.body, status)
		} else if status == 404 && !strings.Contains(r.body, "template") {
			t.Errorf("%s: %s does not speak of a template", path, r.body)
		}
	}
}

// TestLogLines checks that each line of GET /sandboxes/{id}/logs is a JSON text with the fields
// that E2B's CLI prints.
func TestLogLines(t *testing.T) {
	h := newHarness(t)
	id, _ := h.create(`{"templateID":"base"}`)
	r := h.control("GET", "/sandboxes/"+id+"/logs", "")
	var answer struct {
		Logs []struct{ Line string }
	}
	if err := json.Unmarshal([]byte(r.body), &answer); err != nil || len(answer.Logs) == 0 {
		t.Fatalf("%d %s: %v", r.status, r.body, err)
	}
	for _, l := range answer.Logs {
		var line struct{ Level, Message, Logger string }
		if err := json.Unmarshal([]byte(l.Line), &line); err != nil || line.Level == "" || line.Message == "" ||
			line.Logger == "" {
			t.Errorf("the line %q is %+v: %v", l.Line, line, err)
		}
	}
}

func TestConnectAndPause(t *testing.T) {
	h := newHarness(t)
	id, token := h.create(`{"templateID":"base","timeout":600}`)
	path := "/v2/sandboxes/" + id + "/connect"
	before := h.row(id).ExpiresAt
	if r := h.control("POST", path, `{"timeout":5}`); r.status != 200 || r.json["envdAccessToken"] != token ||
		!h.row(id).ExpiresAt.Equal(before) {
		t.Errorf("to one that runs: %d %s", r.status, r.body)
	}
	for range 2 {
		for i, want := range []int{204, 409} {
			if r := h.control("POST", "/sandboxes/"+id+"/pause", ``); r.status != want {
				t.Errorf("pause %d: %d %s", i, r.status, r.body)
			}
		}
		if r := h.control("GET", "/sandboxes/"+id, ""); r.json["state"] != "paused" {
			t.Errorf("it is %s", r.body)
		}
		if r := h.control("POST", path, `{"timeout":60}`); r.status != 201 || r.json["envdAccessToken"] != token {
			t.Errorf("to one that is paused: %d %s", r.status, r.body)
		}
	}
	if r := h.control("POST", "/sandboxes/"+id+"/pause", `{"memory":false}`); r.status != 204 ||
		h.row(id).Kept != sandbox.KeepFiles {
		t.Errorf("without memory: %d, keeps %q", r.status, h.row(id).Kept)
	}
	if r := h.control("POST", path, `{"memory":false}`); r.status != 201 {
		t.Errorf("to one that is paused without memory: %d %s", r.status, r.body)
	}
	// A reboot of one that has its memory, and of one that runs.
	h.control("POST", "/sandboxes/"+id+"/pause", ``)
	for _, want := range []int{201, 200} {
		if r := h.control("POST", path, `{"memory":false}`); r.status != want {
			t.Errorf("a reboot: %d %s, want %d", r.status, r.body, want)
		}
	}
	if calls := strings.Join(h.node.Calls(), " "); !strings.HasSuffix(calls,
		strings.Join([]string{"suspend", "wake", "suspend", "wake"}, " sbx_"+id+" ")+" sbx_"+id) {
		t.Errorf("the reboot was %s", calls)
	}
	// A reboot that fails leaves it paused, with its memory.
	h.control("POST", "/sandboxes/"+id+"/pause", ``)
	h.node.OnSuspend = func(context.Context, sandbox.ID) error {
		h.node.OnSuspend = nil
		return fault.New(fault.NoSpace, fault.CodeDiskFull, "too many files")
	}
	if r := h.control("POST", path, `{"memory":false}`); r.json["error_code"] != fault.CodeDiskFull {
		t.Errorf("a reboot that fails: %d %s", r.status, r.body)
	}
	if sb := h.row(id); sb.State != sandbox.Suspended || sb.Kept != sandbox.KeepAll {
		t.Errorf("after a reboot that failed it is %s and keeps %q", sb.State, sb.Kept)
	}
	for i, want := range []int{204, 404} {
		if r := h.control("DELETE", "/sandboxes/"+id, ""); r.status != want {
			t.Errorf("kill %d: %d", i, r.status)
		}
	}
	for _, call := range []string{"POST " + path, "POST /sandboxes/" + id + "/pause", "GET /sandboxes/" + id,
		"POST /sandboxes/" + id + "/refreshes"} {
		method, path, _ := strings.Cut(call, " ")
		if r := h.control(method, path, ``); r.status != 404 || r.json["code"] != float64(404) {
			t.Errorf("%s of a killed one: %d %s", call, r.status, r.body)
		}
	}
}

// noTemplates fails every call.
type noTemplates struct{ TemplateRows }

func (noTemplates) Get(context.Context, string, string) (template.Template, error) {
	return template.Template{}, errors.New("the template is read by the core")
}

// TestCreateReadsTheTemplateOnce creates sandboxes from a built-in template, from one of the
// organization and from a snapshot, while this package cannot read templates itself.
func TestCreateReadsTheTemplateOnce(t *testing.T) {
	h := newHarness(t)
	h.handler.TemplateRows = noTemplates{}
	user := func(body string) string {
		t.Helper()
		id, _ := h.create(body)
		return h.row(id).User
	}
	if got := user(`{"templateID":"base"}`); got != defaultUser {
		t.Errorf("a built-in template runs as %q", got)
	}
	if got := user(`{"templateID":"mine"}`); got != "root" {
		t.Errorf("the organization's own template runs as %q", got)
	}
	id, _ := h.create(`{"templateID":"mine"}`)
	r := h.control("POST", "/sandboxes/"+id+"/snapshots", `{"name":"saved"}`)
	if r.status != http.StatusCreated {
		t.Fatalf("snapshot: %d %s", r.status, r.body)
	}
	if got := user(`{"templateID":"saved"}`); got != "root" {
		t.Errorf("the snapshot runs as %q", got)
	}
	if r := h.control("POST", "/v2/sandboxes", `{"templateID":"none"}`); r.status != 404 ||
		r.json["error_code"] != fault.CodeTemplateNotFound {
		t.Errorf("neither a template nor a snapshot: %d %s", r.status, r.body)
	}
}

// TestShapeIsCarried fails if a field of the shape, also one that is added later, is lost or changed between a template
// and the machine by a create of this API that does not set it.
func TestShapeIsCarried(t *testing.T) {
	h := newHarness(t)
	v := template.Template{ID: "tpl_" + strings.Repeat("s", 20), OrgID: h.org.Org.ID, Name: "shaped",
		Status: template.Ready, Version: 1, CreatedAt: time.Now().UTC()}
	caytest.Fill(&v.Shape, 7)
	v.Size, v.Start.User = sandbox.Size{Name: "small"}, "" // templates have no more of either
	if err := h.db.InsertTemplate(t.Context(), v, nil, 0); err != nil {
		t.Fatal(err)
	}
	want := v.Shape
	want.Size = sandbox.Size{Name: "small", VCPUs: 1, MemoryMB: 512}
	var made sandbox.Shape
	h.node.OnCreate = func(_ context.Context, spec sandbox.Spec) error {
		made = spec.Shape
		return nil
	}
	id, _ := h.create(`{"templateID":"shaped"}`)
	for what, got := range map[string]sandbox.Shape{"the machine": made, "the row": h.row(id).Shape} {
		if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
			t.Errorf("%s has another shape (-template +got):\n%s", what, diff)
		}
	}
}

// slowGet calls after when it has read a row, once.
type slowGet struct {
	Rows
	after func()
}

func (s *slowGet) Get(ctx context.Context, orgID string, id sandbox.ID) (sandbox.Sandbox, error) {
	sb, err := s.Rows.Get(ctx, orgID, id)
	if f := s.after; f != nil {
		s.after = nil
		f()
	}
	return sb, err
}

// TestRebootEndsNoOthersUse lets a client connect to a paused sandbox after another one, which is to reboot it, has
// found it paused. The sandbox must go on for the first client.
func TestRebootEndsNoOthersUse(t *testing.T) {
	if throughReplica {
		t.Skip("not through a replica: it delays a read of the node's rows")
	}
	h := newHarness(t)
	id, _ := h.create(`{"templateID":"base","timeout":600}`)
	path := "/v2/sandboxes/" + id + "/connect"
	h.control("POST", "/sandboxes/"+id+"/pause", ``)
	run := ""
	h.handler.Rows = &slowGet{h.handler.Rows, func() {
		if r := h.control("POST", path, `{"timeout":60}`); r.status != 201 {
			t.Errorf("the first client: %d %s", r.status, r.body)
		}
		run = h.row(id).Run
	}}
	if r := h.control("POST", path, `{"memory":false}`); r.status != 201 {
		t.Errorf("the reboot: %d %s", r.status, r.body)
	}
	if sb := h.row(id); sb.State != sandbox.Running || sb.Run != run || run == "" {
		t.Errorf("it is %s in run %q, and the first client uses run %q", sb.State, sb.Run, run)
	}
}

// TestCallsNameTheirSandbox calls every route of a sandbox, and the sandbox itself without a key, and
// checks that the log has the sandbox and the organization that the call is for.
func TestCallsNameTheirSandbox(t *testing.T) {
	if throughReplica {
		t.Skip("not through a replica: both servers write to the log")
	}
	h := newHarness(t)
	calls := 0
	check := func(what, sandbox, org string) {
		t.Helper()
		calls++
		var lines []string
		for deadline := time.Now().Add(5 * time.Second); len(lines) < calls && time.Now().Before(deadline); {
			lines = nil
			for line := range strings.Lines(h.log.String()) {
				if strings.Contains(line, " msg=request ") {
					lines = append(lines, line)
				}
			}
			time.Sleep(time.Millisecond) // between two polls, until the deadline
		}
		if len(lines) != calls {
			t.Fatalf("%s: the log has %d calls, want %d", what, len(lines), calls)
		}
		line := strings.ReplaceAll(lines[calls-1], "\n", " ")
		if !strings.Contains(line, " sandbox="+sandbox+" ") || strings.Contains(line, " org=") != (org != "") ||
			!strings.Contains(line, " org="+org) && org != "" {
			t.Errorf("%s: the log has %s", what, line)
		}
	}
	id, token := h.create(`{"templateID":"base"}`)
	sbx := idPrefix + id
	check("a create", sbx, h.org.Org.ID)
	for pattern := range h.handler.table() {
		method, path, _ := strings.Cut(pattern, " ")
		if strings.Contains(path, "sandboxes/{id}") && method != http.MethodDelete {
			path = strings.Replace(path, "{id}", id, 1)
			h.send(method, path, "nonsense")
			check(pattern+" without a key", sbx, "")
			h.control(method, path, "nonsense")
			check(pattern, sbx, h.org.Org.ID)
		}
	}
	h.send("GET", "/envs", "", toEnvd(id, token)...)
	check("a call of the agent", sbx, h.org.Org.ID)
	h.send("GET", "/", "", idHeader, id, portHeader, "8080")
	check("a port", sbx, h.org.Org.ID)
	h.control("DELETE", "/sandboxes/"+id, "")
	check("a kill", sbx, h.org.Org.ID)
}
