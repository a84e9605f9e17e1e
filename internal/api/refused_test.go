package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// refusal describes a request that the contract refuses, and the answer.
type refusal struct {
	name, method, path, body string
	edit                     func(*http.Request)
	status                   int
	code, field              string
}

func (h *testServer) check(t *testing.T, rows []refusal) {
	t.Helper()
	for _, c := range rows {
		t.Run(c.name, func(t *testing.T) {
			var edits []func(*http.Request)
			if c.edit != nil {
				edits = append(edits, c.edit)
			}
			r := h.send(t, c.method, c.path, h.key, c.body, edits...)
			if r.status != c.status || r.problem.Code != c.code {
				t.Fatalf("status %d %s, want %d %s", r.status, r.body, c.status, c.code)
			}
			field := ""
			if r.problem.Field != nil {
				field = *r.problem.Field
			}
			if field != c.field {
				t.Errorf("field %q, want %q: %s", field, c.field, r.body)
			}
			if want := "urn:cay:problem:" + c.code; r.problem.Type != want || r.problem.Title != http.StatusText(c.status) ||
				r.problem.Detail == "" {
				t.Errorf("problem %s: want type %s, a title and a detail", r.body, want)
			}
		})
	}
}

func TestCreateRefused(t *testing.T) {
	h := newTestServer(t)
	create := func(name, body string, status int, code, field string) refusal {
		return refusal{name, "POST", "/v1/sandboxes", body, nil, status, code, field}
	}
	egress := func(name, policy, field string) refusal {
		return create("egress "+name, `{"template":"python","egress":`+policy+`}`, 400, "invalid_egress", field)
	}
	h.check(t, []refusal{
		create("no body", "", 400, "missing_body", ""),
		create("white space only", "  \n", 400, "invalid_json", ""),
		create("not JSON", "template=python", 400, "invalid_json", ""),
		create("cut off", `{"template":"python"`, 400, "invalid_json", ""),
		create("a list", `[]`, 400, "invalid_json", ""),
		create("null", `null`, 400, "invalid_json", ""),
		create("trailing garbage", `{"template":"python"} {}`, 400, "invalid_json", ""),
		create("not UTF-8", "{\"template\":\"\xff\"}", 400, "invalid_json", ""),
		create("twice", `{"template":"python","template":"node"}`, 400, "duplicate_field", "template"),
		create("twice inside", `{"template":"python","env":{"A":"1","A":"2"}}`, 400, "duplicate_field", "env.A"),
		create("unknown field", `{"template":"python","tiemout":"5m"}`, 400, "unknown_field", "tiemout"),
		create("case matters", `{"Template":"python"}`, 400, "unknown_field", "Template"),
		create("unknown field inside", `{"template":"python","egress":{"mode":"allow_all","allow":[]}}`, 400, "unknown_field", "egress.allow"),
		create("template missing", `{}`, 400, "invalid_template", "template"),
		create("template null", `{"template":null}`, 400, "invalid_template", "template"),
		create("template of another type", `{"template":7}`, 400, "invalid_template", "template"),
		create("mode unknown", `{"template":"python","mode":"forever"}`, 400, "invalid_mode", "mode"),
		create("mode empty", `{"template":"python","mode":""}`, 400, "invalid_mode", "mode"),
		create("size unknown", `{"template":"python","size":"huge"}`, 400, "invalid_size", "size"),
		create("size empty", `{"template":"python","size":""}`, 400, "invalid_size", "size"),
		create("timeout a number", `{"template":"python","timeout":300}`, 400, "invalid_timeout", "timeout"),
		create("timeout without a unit", `{"template":"python","timeout":"300"}`, 400, "invalid_timeout", "timeout"),
		create("timeout empty", `{"template":"python","timeout":""}`, 400, "invalid_timeout", "timeout"),
		create("timeout zero", `{"template":"python","timeout":"0"}`, 400, "invalid_timeout", "timeout"),
		create("timeout below", `{"template":"python","timeout":"999ms"}`, 400, "invalid_timeout", "timeout"),
		create("timeout above", `{"template":"python","timeout":"24h1s"}`, 400, "invalid_timeout", "timeout"),
		create("timeout negative", `{"template":"python","timeout":"-5m"}`, 400, "invalid_timeout", "timeout"),
		create("timeout overflowing", `{"template":"python","timeout":"9999999999h"}`, 400, "invalid_timeout", "timeout"),
		create("idle_timeout when ephemeral", `{"template":"python","idle_timeout":"10m"}`, 400, "invalid_idle_timeout", "idle_timeout"),
		create("timeout when persistent", `{"template":"python","mode":"persistent","timeout":"10m"}`, 400, "invalid_timeout", "timeout"),
		create("recovery_interval when ephemeral", `{"template":"python","recovery_interval":"10m"}`, 400, "invalid_recovery_interval", "recovery_interval"),
		create("idle_timeout 0 when ephemeral", `{"template":"python","idle_timeout":0}`, 400, "invalid_idle_timeout", "idle_timeout"),
		create("idle_timeout a number", `{"template":"python","mode":"persistent","idle_timeout":600}`, 400, "invalid_idle_timeout", "idle_timeout"),
		create("idle_timeout a fraction", `{"template":"python","mode":"persistent","idle_timeout":0.5}`, 400, "invalid_idle_timeout", "idle_timeout"),
		create("idle_timeout false", `{"template":"python","mode":"persistent","idle_timeout":false}`, 400, "invalid_idle_timeout", "idle_timeout"),
		create("idle_timeout without a unit", `{"template":"python","mode":"persistent","idle_timeout":"600"}`, 400, "invalid_idle_timeout", "idle_timeout"),
		create("idle_timeout empty", `{"template":"python","mode":"persistent","idle_timeout":""}`, 400, "invalid_idle_timeout", "idle_timeout"),
		create("idle_timeout negative", `{"template":"python","mode":"persistent","idle_timeout":"-10m"}`, 400, "invalid_idle_timeout", "idle_timeout"),
		create("idle_timeout above", `{"template":"python","mode":"persistent","idle_timeout":"24h1s"}`, 400, "invalid_idle_timeout", "idle_timeout"),
		create("idle_timeout below", `{"template":"python","mode":"persistent","idle_timeout":"9s"}`, 400, "invalid_idle_timeout", "idle_timeout"),
		create("recovery_interval below", `{"template":"python","mode":"persistent","recovery_interval":"59s"}`, 400, "invalid_recovery_interval", "recovery_interval"),
		create("recovery_interval above", `{"template":"python","mode":"persistent","recovery_interval":"25h"}`, 400, "invalid_recovery_interval", "recovery_interval"),
		create("recovery_interval a number", `{"template":"python","mode":"persistent","recovery_interval":1}`, 400, "invalid_recovery_interval", "recovery_interval"),
		create("disk a fraction", `{"template":"python","disk_size_mb":100.5}`, 400, "invalid_disk_size_mb", "disk_size_mb"),
		create("disk a text", `{"template":"python","disk_size_mb":"100"}`, 400, "invalid_disk_size_mb", "disk_size_mb"),
		create("disk too small", `{"template":"python","disk_size_mb":0}`, 400, "invalid_disk_size_mb", "disk_size_mb"),
		create("disk too large", `{"template":"python","disk_size_mb":8193}`, 400, "invalid_disk_size_mb", "disk_size_mb"),
		create("disk beyond numbers", `{"template":"python","disk_size_mb":1e400}`, 400, "invalid_disk_size_mb", "disk_size_mb"),
		create("env name", `{"template":"python","env":{"1A":"x"}}`, 400, "invalid_env", "env.1A"),
		create("env value a number", `{"template":"python","env":{"A":1}}`, 400, "invalid_env", "env.A"),
		create("env value null", `{"template":"python","env":{"A":null}}`, 400, "invalid_env", "env.A"),
		create("env with a number for a name", `{"template":"python","env":{"0":null}}`, 400, "invalid_env", "env.0"),
		create("env value with NUL", `{"template":"python","env":{"A":"\u0000"}}`, 400, "invalid_env", "env.A"),
		create("env a list", `{"template":"python","env":["A=1"]}`, 400, "invalid_env", "env"),
		create("metadata key empty", `{"template":"python","metadata":{"":"x"}}`, 400, "invalid_metadata", "metadata"),
		create("metadata value too long", `{"template":"python","metadata":{"a":"`+strings.Repeat("x", 1025)+`"}}`, 400, "invalid_metadata", "metadata.a"),
		create("template not there", `{"template":"cobol"}`, 404, "template_not_found", ""),
		create("template being built", `{"template":"slow"}`, 409, "template_not_ready", ""),
		create("template that failed", `{"template":"broken"}`, 409, "template_not_ready", ""),
		egress("a text", `"allow_all"`, "egress"),
		egress("mode missing", `{}`, "egress.mode"),
		egress("mode unknown", `{"mode":"open"}`, "egress.mode"),
		egress("allow_all with a list", `{"mode":"allow_all","allow_cidrs":["10.0.0.0/8"]}`, "egress.mode"),
		egress("ports without ranges", `{"mode":"deny_all","allow_ports":[443]}`, "egress.allow_ports"),
		egress("no CIDR", `{"mode":"deny_all","allow_cidrs":["10.0.0.0/8","example.com"]}`, "egress.allow_cidrs[1]"),
		egress("host bits", `{"mode":"deny_all","allow_cidrs":["10.0.0.1/8"]}`, "egress.allow_cidrs[0]"),
		egress("a number for a range", `{"mode":"deny_all","allow_cidrs":["10.0.0.0/8",10]}`, "egress.allow_cidrs[1]"),
		egress("null for a range", `{"mode":"deny_all","allow_cidrs":[null]}`, "egress.allow_cidrs[0]"),
		egress("metadata range", `{"mode":"deny_all","deny_cidrs":["169.254.169.254/32"]}`, "egress.deny_cidrs[0]"),
		egress("around the metadata range", `{"mode":"deny_all","deny_cidrs":["169.0.0.0/8"]}`, "egress.deny_cidrs[0]"),
		egress("IPv6", `{"mode":"deny_all","allow_cidrs":["fe80::/10"]}`, "egress.allow_cidrs[0]"),
		egress("port 0", `{"mode":"deny_all","allow_cidrs":["10.0.0.0/8"],"allow_ports":[0]}`, "egress.allow_ports[0]"),
		egress("port 65536", `{"mode":"deny_all","allow_cidrs":["10.0.0.0/8"],"allow_ports":[80,65536]}`, "egress.allow_ports[1]"),
		egress("a text for a port", `{"mode":"deny_all","allow_cidrs":["10.0.0.0/8"],"allow_ports":["80"]}`, "egress.allow_ports[0]"),
		egress("allow_all with domains", `{"mode":"allow_all","allow_domains":["example.com"]}`, "egress.mode"),
		egress("ports with domains alone", `{"mode":"deny_all","allow_domains":["example.com"],"allow_ports":[443]}`, "egress.allow_ports"),
		egress("every domain", `{"mode":"deny_all","allow_domains":["example.com","*"]}`, "egress.allow_domains[1]"),
		egress("an address for a domain", `{"mode":"deny_all","allow_domains":["192.0.2.1"]}`, "egress.allow_domains[0]"),
		egress("a number for a domain", `{"mode":"deny_all","allow_domains":[1]}`, "egress.allow_domains[0]"),
		egress("too many domains", `{"mode":"deny_all","allow_domains":["a.com"`+strings.Repeat(`,"a.com"`, 100)+`]}`, "egress.allow_domains"),
		egress("too many ranges", `{"mode":"deny_all","allow_cidrs":["10.0.0.0/8"`+strings.Repeat(`,"10.0.0.0/8"`, 10_000)+`]}`, "egress.allow_cidrs"),
		egress("too many denies", `{"mode":"deny_all","deny_cidrs":["10.0.0.0/8"`+strings.Repeat(`,"10.0.0.0/8"`, 10_000)+`]}`, "egress.deny_cidrs"),
		egress("too many ports", `{"mode":"deny_all","allow_cidrs":["10.0.0.0/8"],"allow_ports":[1`+strings.Repeat(`,1`, 1000)+`]}`, "egress.allow_ports"),
		create("too large", `{"template":"`+strings.Repeat("x", 1<<20)+`"}`, 413, "body_too_large", ""),
		{"wait not a bool", "POST", "/v1/sandboxes?wait=maybe", `{"template":"python"}`, nil, 400, "invalid_wait", "wait"},
		{"wait twice", "POST", "/v1/sandboxes?wait=true&wait=false", `{"template":"python"}`, nil, 400, "invalid_wait", "wait"},
		{"unknown parameter", "POST", "/v1/sandboxes?async=true", `{"template":"python"}`, nil, 400, "unknown_parameter", "async"},
		{"too large, length unknown", "POST", "/v1/sandboxes", "", chunked(`{"template":"` + strings.Repeat("x", 1<<20) + `"}`), 413, "body_too_large", ""},
		{"a form", "POST", "/v1/sandboxes", `{"template":"python"}`, header("Content-Type", "application/x-www-form-urlencoded"), 415, "unsupported_media_type", "Content-Type"},
		{"another charset", "POST", "/v1/sandboxes", `{"template":"python"}`, header("Content-Type", "application/json; charset=latin1"), 415, "unsupported_media_type", "Content-Type"},
		{"compressed", "POST", "/v1/sandboxes", `{"template":"python"}`, header("Content-Encoding", "gzip"), 415, "unsupported_media_type", "Content-Type"},
		{"idempotency key empty", "POST", "/v1/sandboxes", `{"template":"python"}`, header("Idempotency-Key", ""), 400, "invalid_idempotency_key", "Idempotency-Key"},
		{"idempotency key too long", "POST", "/v1/sandboxes", `{"template":"python"}`, header("Idempotency-Key", strings.Repeat("k", 256)), 400, "invalid_idempotency_key", "Idempotency-Key"},
		{"idempotency key not ASCII", "POST", "/v1/sandboxes", `{"template":"python"}`, header("Idempotency-Key", "é"), 400, "invalid_idempotency_key", "Idempotency-Key"},
	})
	if calls := h.node.Calls(); len(calls) != 0 {
		t.Errorf("the machine was touched: %v", calls)
	}
	if detail := h.send(t, "POST", "/v1/sandboxes", h.key,
		`{"template":"slow"}`).problem.Detail; !strings.Contains(detail, "building") || !strings.Contains(detail, "3 of 9") {
		t.Errorf("409 of a template being built says %q: its state and progress are missing", detail)
	}
}

// chunked sends a body without giving its length in the head.
func chunked(body string) func(*http.Request) {
	return func(r *http.Request) {
		r.Header.Set("Content-Type", "application/json")
		r.Body = io.NopCloser(strings.NewReader(body))
		r.ContentLength = -1
	}
}

const noSandbox = "/v1/sandboxes/sbx_aaaaaaaaaaaaaaaaaaaa"

func TestSandboxCallsRefused(t *testing.T) {
	h := newTestServer(t)
	sbx := "/v1/sandboxes/" + h.newSandbox(t).ID
	creating := "/v1/sandboxes/" + string(h.putSandbox(t, sandbox.Ephemeral, sandbox.Creating))
	gone := "/v1/sandboxes/" + string(h.putSandbox(t, sandbox.Ephemeral, sandbox.Destroyed))
	persistent := "/v1/sandboxes/" + string(h.putSandbox(t, sandbox.Persistent, sandbox.Running))
	asleep := "/v1/sandboxes/" + h.newAsleep(t).ID
	rows := []refusal{
		{"keepalive number", "POST", sbx + "/keepalive", `{"timeout":60}`, nil, 400, "invalid_timeout", "timeout"},
		{"keepalive below", "POST", sbx + "/keepalive", `{"timeout":"0"}`, nil, 400, "invalid_timeout", "timeout"},
		{"keepalive unknown field", "POST", sbx + "/keepalive", `{"ttl":"1m"}`, nil, 400, "unknown_field", "ttl"},
		{"keepalive of a persistent one", "POST", persistent + "/keepalive", "", nil, 409, "sandbox_not_ephemeral", ""},
		{"keepalive while creating", "POST", creating + "/keepalive", "", nil, 409, "sandbox_not_running", ""},
		{"keepalive when gone", "POST", gone + "/keepalive", "", nil, 409, "sandbox_not_running", ""},
		{"wake with a field", "POST", sbx + "/wake", `{"now":true}`, nil, 400, "unknown_field", "now"},
		{"wake while creating", "POST", creating + "/wake", "", nil, 409, "sandbox_not_running", ""},
		{"wake when gone", "POST", gone + "/wake", "", nil, 409, "sandbox_not_running", ""},
		{"suspend ephemeral", "POST", sbx + "/suspend", "", nil, 409, "sandbox_not_persistent", ""},
		{"keepalive when suspended", "POST", asleep + "/keepalive", "", nil, 409, "sandbox_not_ephemeral", ""},
		{"suspend with a field", "POST", persistent + "/suspend", `{"force":true}`, nil, 400, "unknown_field", "force"},
		{"suspend when suspended", "POST", asleep + "/suspend", "", nil, 409, "sandbox_not_running", ""},
		{"suspend while creating", "POST", creating + "/suspend", "", nil, 409, "sandbox_not_running", ""},
		{"suspend when gone", "POST", gone + "/suspend", "", nil, 409, "sandbox_not_running", ""},
		{"checkpoint ephemeral", "POST", sbx + "/checkpoint", "", nil, 409, "sandbox_not_persistent", ""},
		{"checkpoint with a field", "POST", persistent + "/checkpoint", `{"name":"x"}`, nil, 400, "unknown_field", "name"},
		{"checkpoint when suspended", "POST", asleep + "/checkpoint", "", nil, 409, "sandbox_not_running", ""},
		{"checkpoint while creating", "POST", creating + "/checkpoint", "", nil, 409, "sandbox_not_running", ""},
		{"checkpoint when gone", "POST", gone + "/checkpoint", "", nil, 409, "sandbox_not_running", ""},
		{"egress no body", "PUT", sbx + "/egress", "", nil, 400, "missing_body", ""},
		{"egress unknown mode", "PUT", sbx + "/egress", `{"mode":"x"}`, nil, 400, "invalid_egress", "mode"},
		{"egress bad range", "PUT", sbx + "/egress", `{"mode":"deny_all","allow_cidrs":["10.0.0.1/8"]}`, nil, 400, "invalid_egress", "allow_cidrs[0]"},
		{"egress wrong type", "PUT", sbx + "/egress", `{"mode":"deny_all","allow_ports":[true]}`, nil, 400, "invalid_egress", "allow_ports[0]"},
		{"egress unknown field", "PUT", sbx + "/egress", `{"mode":"deny_all","x":1}`, nil, 400, "unknown_field", "x"},
		{"egress bad domain", "PUT", sbx + "/egress", `{"mode":"deny_all","allow_domains":["a..b"]}`, nil, 400, "invalid_egress", "allow_domains[0]"},
		{"egress when gone", "PUT", gone + "/egress", `{"mode":"allow_all"}`, nil, 409, "sandbox_not_running", ""},
		{"execute when gone", "POST", gone + "/execute", `{"command":"id"}`, nil, 409, "sandbox_not_running", ""},
		{"execute while creating", "POST", creating + "/execute", `{"command":"id"}`, nil, 409, "sandbox_not_running", ""},
		{"write when gone", "PUT", gone + "/files?path=/a", "x", nil, 409, "sandbox_not_running", ""},
		{"read when gone", "GET", gone + "/files?path=/a", "", nil, 409, "sandbox_not_running", ""},
		{"remove when gone", "DELETE", gone + "/files?path=/a", "", nil, 409, "sandbox_not_running", ""},
		{"list when gone", "GET", gone + "/files/list?path=/a", "", nil, 409, "sandbox_not_running", ""},
		{"list limit 0", "GET", "/v1/sandboxes?limit=0", "", nil, 400, "invalid_limit", "limit"},
		{"list limit 201", "GET", "/v1/sandboxes?limit=201", "", nil, 400, "invalid_limit", "limit"},
		{"list limit a text", "GET", "/v1/sandboxes?limit=ten", "", nil, 400, "invalid_limit", "limit"},
		{"list cursor", "GET", "/v1/sandboxes?cursor=nonsense", "", nil, 400, "invalid_cursor", "cursor"},
		{"list status", "GET", "/v1/sandboxes?status=running&status=paused", "", nil, 400, "invalid_status", "status"},
		{"list statuses in one", "GET", "/v1/sandboxes?status=running,destroyed", "", nil, 400, "invalid_status", "status"},
		{"list metadata without a key", "GET", "/v1/sandboxes?metadata.=x", "", nil, 400, "invalid_metadata", "metadata."},
		{"list metadata twice", "GET", "/v1/sandboxes?metadata.a=1&metadata.a=2", "", nil, 400, "invalid_metadata", "metadata.a"},
		{"list misspelt", "GET", "/v1/sandboxes?metadat.a=1", "", nil, 400, "unknown_parameter", "metadat.a"},
		{"query that cannot be parsed", "GET", "/v1/sandboxes?limit=%zz", "", nil, 400, "invalid_query", ""},
		{"events limit", "GET", sbx + "/events?limit=-1", "", nil, 400, "invalid_limit", "limit"},
		{"events cursor", "GET", sbx + "/events?cursor=x", "", nil, 400, "invalid_cursor", "cursor"},
		{"template not there", "GET", "/v1/templates/cobol", "", nil, 404, "template_not_found", ""},
		{"log of a template not there", "GET", "/v1/templates/cobol/logs", "", nil, 404, "template_not_found", ""},
		{"templates cursor", "GET", "/v1/templates?cursor=x", "", nil, 400, "invalid_cursor", "cursor"},
		{"key without a name", "POST", "/v1/api-keys", `{"scopes":["exec"]}`, nil, 400, "invalid_name", "name"},
		{"key without scopes", "POST", "/v1/api-keys", `{"name":"x"}`, nil, 400, "invalid_scopes", "scopes"},
		{"key with an unknown scope", "POST", "/v1/api-keys", `{"name":"x","scopes":["root"]}`, nil, 400, "invalid_scopes", "scopes"},
		{"key of an unknown format", "POST", "/v1/api-keys", `{"name":"x","scopes":["exec"],"format":"aws"}`, nil, 400, "invalid_format", "format"},
		{"key of an empty format", "POST", "/v1/api-keys", `{"name":"x","scopes":["exec"],"format":""}`, nil, 400, "invalid_format", "format"},
		{"key expiring at once", "POST", "/v1/api-keys", `{"name":"x","scopes":["exec"],"expires_in":"1ms"}`, nil, 400, "invalid_expires_in", "expires_in"},
		{"key expiring never said", "POST", "/v1/api-keys", `{"name":"x","scopes":["exec"],"expires_in":"never"}`, nil, 400, "invalid_expires_in", "expires_in"},
		{"key not there", "DELETE", "/v1/api-keys/key_aaaaaaaaaaaaaaaaaaaa", "", nil, 404, "api_key_not_found", ""},
		{"keys cursor", "GET", "/v1/api-keys?cursor=x", "", nil, 400, "invalid_cursor", "cursor"},
		{"organization without a name", "POST", "/v1/orgs", `{}`, nil, 400, "invalid_name", "name"},
		{"organization there already", "POST", "/v1/orgs", `{"name":"other"}`, nil, 409, "org_exists", ""},
		{"organization with a negative quota", "POST", "/v1/orgs", `{"name":"n","quota":{"vcpus":-1}}`, nil, 400, "invalid_quota", "quota.vcpus"},
		{"organizations cursor", "GET", "/v1/orgs?cursor=x", "", nil, 400, "invalid_cursor", "cursor"},
	}
	for _, c := range []struct{ method, path, body string }{
		{"GET", "", ""}, {"DELETE", "", ""}, {"POST", "/keepalive", ""}, {"POST", "/wake", ""}, {"POST", "/suspend", ""}, {"POST", "/checkpoint", ""},
		{"PUT", "/egress", `{"mode":"allow_all"}`}, {"GET", "/events", ""}, {"POST", "/execute", `{"command":"id"}`}, {"PUT", "/files?path=/a", "x"},
		{"GET", "/files?path=/a", ""}, {"DELETE", "/files?path=/a", ""}, {"GET", "/files/list?path=/", ""},
	} {
		rows = append(rows,
			refusal{c.method + c.path + " of none", c.method, noSandbox + c.path, c.body, nil, 404, "sandbox_not_found", ""},
			refusal{c.method + c.path + " of no id", c.method, "/v1/sandboxes/%2e%00%ff" + c.path, c.body, nil, 404,
				"sandbox_not_found", ""})
	}
	h.check(t, rows)
	if len(h.agent.targets)+len(h.agent.uploads) > 0 {
		t.Error("the inside of a sandbox was touched")
	}
}

func TestExecuteRefused(t *testing.T) {
	h := newTestServer(t)
	path := "/v1/sandboxes/" + h.newSandbox(t).ID + "/execute"
	execute := func(name, body string, code, field string) refusal {
		return refusal{name, "POST", path, body, nil, 400, code, field}
	}
	h.check(t, []refusal{
		execute("no body", "", "missing_body", ""),
		execute("no command", `{}`, "missing_command", "command"),
		execute("command empty", `{"command":""}`, "missing_command", "command"),
		execute("args empty", `{"args":[]}`, "missing_command", "command"),
		execute("both", `{"command":"id","args":["id"]}`, "invalid_command", "command"),
		execute("both, one empty", `{"command":"","args":["id"]}`, "invalid_command", "command"),
		execute("command with NUL", `{"command":"a\u0000b"}`, "invalid_command", "command"),
		execute("program empty", `{"args":["","x"]}`, "invalid_args", "args[0]"),
		execute("argument with NUL", `{"args":["echo","\u0000"]}`, "invalid_args", "args[1]"),
		execute("argument too long", `{"args":["echo","`+strings.Repeat("x", 128<<10)+`"]}`, "invalid_args", "args[1]"),
		execute("command too long", `{"command":"`+strings.Repeat("x", 128<<10)+`"}`, "invalid_command", "command"),
		execute("another shell", `{"command":"id","shell":"fish"}`, "invalid_shell", "shell"),
		execute("a shell without a command", `{"args":["id"],"shell":"bash"}`, "invalid_shell", "shell"),
		execute("argument a number", `{"args":["echo",1]}`, "invalid_args", "args[1]"),
		execute("args a text", `{"args":"echo"}`, "invalid_args", "args"),
		execute("timeout a number", `{"command":"id","timeout":1}`, "invalid_timeout", "timeout"),
		execute("timeout zero", `{"command":"id","timeout":"0"}`, "invalid_timeout", "timeout"),
		execute("timeout negative", `{"command":"id","timeout":"-1s"}`, "invalid_timeout", "timeout"),
		execute("timeout above", `{"command":"id","timeout":"5m1ms"}`, "invalid_timeout", "timeout"),
		execute("workdir relative", `{"command":"id","workdir":"tmp"}`, "invalid_workdir", "workdir"),
		execute("workdir empty", `{"command":"id","workdir":""}`, "invalid_workdir", "workdir"),
		execute("env name", `{"command":"id","env":{"A=B":"x"}}`, "invalid_env", "env.A=B"),
		execute("user empty", `{"command":"id","user":""}`, "invalid_user", "user"),
		execute("stdin a list", `{"command":"id","stdin":[]}`, "invalid_stdin", "stdin"),
		execute("unknown field", `{"command":"id","cwd":"/"}`, "unknown_field", "cwd"),
		{"too large", "POST", path, `{"command":"id","stdin":"` + strings.Repeat("x", 8<<20) + `"}`, nil, 413, "body_too_large", ""},
	})
	if len(h.agent.targets) != 0 {
		t.Error("the inside of the sandbox was touched")
	}
}

func TestFilesRefused(t *testing.T) {
	h := newTestServer(t)
	sbx := "/v1/sandboxes/" + h.newSandbox(t).ID
	var rows []refusal
	paths := map[string]string{
		"missing": "", "empty": "path=", "relative": "path=a/b", "with ..": "path=/a/../b", "ending in ..": "path=/a/..", "with NUL": "path=/a%00b",
		"too long": "path=/" + strings.Repeat("x", 4096),
	}
	for name, query := range paths {
		for _, c := range []struct{ method, path, body string }{{"PUT", "/files?", "x"}, {"GET", "/files?", ""},
			{"DELETE", "/files?", ""}, {"GET", "/files/list?", ""}} {
			rows = append(rows, refusal{c.method + c.path + name, c.method, sbx + c.path + query, c.body, nil, 400,
				"invalid_path", "path"})
		}
	}
	for _, root := range []string{"/", "//", "/./", "/."} {
		rows = append(rows,
			refusal{"write " + root, "PUT", sbx + "/files?path=" + root, "x", nil, 400, "invalid_path", "path"},
			refusal{"read " + root, "GET", sbx + "/files?path=" + root, "", nil, 400, "invalid_path", "path"},
			refusal{"remove " + root, "DELETE", sbx + "/files?recursive=true&path=" + root, "", nil, 400, "invalid_path",
				"path"})
	}
	h.check(t, append(rows, []refusal{
		{"write a directory", "PUT", sbx + "/files?path=/a/", "x", nil, 400, "invalid_path", "path"},
		{"path twice", "GET", sbx + "/files?path=/a&path=/b", "", nil, 400, "invalid_path", "path"},
		{"mode not octal", "PUT", sbx + "/files?path=/a&mode=0999", "x", nil, 400, "invalid_mode", "mode"},
		{"mode symbolic", "PUT", sbx + "/files?path=/a&mode=u%2Bx", "x", nil, 400, "invalid_mode", "mode"},
		{"mode setuid", "PUT", sbx + "/files?path=/a&mode=4755", "x", nil, 400, "invalid_mode", "mode"},
		{"mode empty", "PUT", sbx + "/files?path=/a&mode=", "x", nil, 400, "invalid_mode", "mode"},
		{"owner empty", "PUT", sbx + "/files?path=/a&owner=", "x", nil, 400, "invalid_owner", "owner"},
		{"depth 0", "GET", sbx + "/files/list?path=/&depth=0", "", nil, 400, "invalid_depth", "depth"},
		{"depth 11", "GET", sbx + "/files/list?path=/&depth=11", "", nil, 400, "invalid_depth", "depth"},
		{"depth a text", "GET", sbx + "/files/list?path=/&depth=all", "", nil, 400, "invalid_depth", "depth"},
		{"recursive", "DELETE", sbx + "/files?path=/a&recursive=yes", "", nil, 400, "invalid_recursive", "recursive"},
		{"read none", "GET", sbx + "/files?path=/none", "", nil, 404, "file_not_found", ""},
		{"remove none", "DELETE", sbx + "/files?path=/none", "", nil, 404, "file_not_found", ""},
		{"too large, asked first", "PUT", sbx + "/files?path=/a", "", oversized(maxFile+1, "100-continue"), 400, "file_too_large", ""},
		{"too large, sent at once", "PUT", sbx + "/files?path=/a", "", oversized(maxFile+1, ""), 400, "file_too_large", ""},
	}...))
	if len(h.agent.uploads) != 0 {
		t.Error("the inside of the sandbox was touched")
	}
}

// oversized sends n bytes. If expect is set, it announces them and waits for the server to ask for
// them.
func oversized(n int64, expect string) func(*http.Request) {
	return func(r *http.Request) {
		r.Body = io.NopCloser(io.LimitReader(zeros{}, n))
		r.ContentLength = n
		if expect != "" {
			r.Header.Set("Expect", expect)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// TestAgentErrors returns every kind of error from inside the sandbox to every call that goes
// there.
func TestAgentErrors(t *testing.T) {
	notForwarded(t, "the node's log has the reason")
	h := newTestServer(t)
	sbx := "/v1/sandboxes/" + h.newSandbox(t).ID
	for _, c := range []struct {
		err    error
		status int
		code   string
	}{
		{fault.New(fault.NoSpace, "disk_full", "the disk is full"), 507, "disk_full"},
		{fault.InField("path_is_directory", "path", "is a directory"), 400, "path_is_directory"},
		{fault.New(fault.Denied, "file_denied", "permission denied"), 403, "file_denied"},
		{fault.New(fault.Unavailable, "sandbox_unreachable", "the sandbox does not answer"), 503, "sandbox_unreachable"},
		{fault.New(fault.Conflict, "sandbox_not_running", "it has ended"), 409, "sandbox_not_running"},
		{errors.New("dial tcp 10.1.2.3:49983: refused"), 500, "internal"},
	} {
		h.agent.fail = c.err
		h.agent.execute = func(context.Context, agentapi.ExecuteRequest) (agentapi.ExecuteResult, error) {
			return agentapi.ExecuteResult{}, fmt.Errorf("running: %w", c.err)
		}
		for _, call := range []struct{ method, path, body string }{
			{"PUT", "/files?path=/a", "x"}, {"GET", "/files?path=/a", ""}, {"DELETE", "/files?path=/a", ""}, {"GET", "/files/list?path=/a", ""}, {"POST", "/execute", `{"command":"id"}`},
		} {
			if c.status == 507 && call.method != "PUT" && call.method != "POST" {
				continue // only writes can fill a disk
			}
			r := h.send(t, call.method, sbx+call.path, h.key, call.body)
			if r.status != c.status || r.problem.Code != c.code || strings.Contains(string(r.body), "10.1.2.3") {
				t.Errorf("%s %s with %v: status %d %s, want %d %s", call.method, call.path, c.err, r.status, r.body, c.status,
					c.code)
			}
			if line := h.log.line(t, r.header.Get("X-Request-Id")); c.status == 500 &&
				!strings.Contains(fmt.Sprint(line["error"]), "10.1.2.3") {
				t.Errorf("the log does not say why: %v", line)
			}
		}
	}
	h.agent.fail = fault.InField("unknown_user", "user", "there is no user x")
	if r := h.send(t, "PUT", sbx+"/files?path=/a&owner=x", h.key, "x"); r.status != 400 || *r.problem.Field != "owner" {
		t.Errorf("unknown owner: %d %s", r.status, r.body)
	}
	h.agent.fail = fault.New(fault.TooLarge, fault.CodeListingTooLarge, "more than 100000 entries")
	if r := h.send(t, "GET", sbx+"/files/list?path=/", h.key, ""); r.status != 400 || *r.problem.Field != "depth" {
		t.Errorf("listing too large: %d %s", r.status, r.body)
	}
	if n := h.sandboxes.InUse(); n != 0 {
		t.Errorf("%d leases are still held", n)
	}
}

func TestNoRoomAndLimits(t *testing.T) {
	h := newTestServer(t, func(a *auth.Config, _ *sandbox.Config, _ *Config) {
		a.Rate, a.Burst, a.Quota.Sandboxes = 0.25, 3, 1
	})
	h.node.SetFull(true)
	if r := h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"python"}`); r.status != 503 ||
		r.problem.Code != "no_capacity" || r.header.Get("Retry-After") != "5" {
		t.Errorf("full: status %d, Retry-After %q: %s", r.status, r.header.Get("Retry-After"), r.body)
	}
	h.node.SetFull(false)
	h.newSandbox(t)
	if r := h.send(t, "POST", "/v1/sandboxes", h.key, `{"template":"python"}`); r.status != 429 ||
		r.problem.Code != "quota_exceeded" {
		t.Errorf("over quota: status %d %s", r.status, r.body)
	}
	r := h.send(t, "GET", "/v1/me", h.key, "")
	if r.status != 429 || r.problem.Code != "rate_limited" || r.header.Get("Retry-After") != "4" {
		t.Errorf("too fast: status %d, Retry-After %q: %s", r.status, r.header.Get("Retry-After"), r.body)
	}
	if r := h.send(t, "GET", "/v1/me", h.other, ""); r.status != 200 {
		t.Errorf("another key: status %d %s", r.status, r.body)
	}
}

// brokenCore returns errors that the real core should not return.
type brokenCore struct {
	Rows
	get func() (sandbox.Sandbox, error)
}

func (b brokenCore) Get(context.Context, string, sandbox.ID) (sandbox.Sandbox, error) { return b.get() }

func TestInternalErrorsStayInside(t *testing.T) {
	notForwarded(t, "it breaks the node's rows")
	var core brokenCore
	h := newTestServer(t, func(_ *auth.Config, _ *sandbox.Config, c *Config) { c.Rows = &core })
	for name, get := range map[string]func() (sandbox.Sandbox, error){
		"an error": func() (sandbox.Sandbox, error) {
			return sandbox.Sandbox{}, errors.New("opening /var/lib/secret: no such file")
		},
		"a panic": func() (sandbox.Sandbox, error) { panic("index 7 of /var/lib/secret") },
		"a kind unknown": func() (sandbox.Sandbox, error) {
			return sandbox.Sandbox{}, fault.New(fault.Internal, "", "/var/lib/secret")
		},
	} {
		core.get = get
		r := h.send(t, "GET", noSandbox, h.key, "", header("X-Request-Id", "trace-me.1"))
		if r.status != 500 || r.problem.Code != "internal" || strings.Contains(string(r.body), "secret") ||
			r.problem.RequestID != "trace-me.1" {
			t.Errorf("%s: status %d %s", name, r.status, r.body)
		}
		line := h.log.line(t, "trace-me.1")
		if !strings.Contains(fmt.Sprint(line["error"]), "/var/lib/secret") || line["level"] != "ERROR" {
			t.Errorf("%s: the log does not say why: %v", name, line)
		}
		if name == "a panic" && !strings.Contains(fmt.Sprint(line["error"]), "refused_test.go") {
			t.Errorf("the log has no stack: %v", line)
		}
		h.log.mu.Lock()
		h.log.buf.Reset()
		h.log.mu.Unlock()
	}
	core.get = func() (sandbox.Sandbox, error) {
		return sandbox.Sandbox{}, fault.New(fault.Internal, "boot_failed",
			"it did not start").Because(errors.New("/var/lib/secret"))
	}
	if r := h.send(t, "GET", noSandbox, h.key, ""); r.status != 500 || r.problem.Code != "boot_failed" ||
		strings.Contains(string(r.body), "secret") {
		t.Errorf("an internal fault with a code: %d %s", r.status, r.body)
	}
}

func TestReady(t *testing.T) {
	h := newTestServer(t)
	if r := h.send(t, "GET", "/readyz", "", ""); r.status != 200 {
		t.Errorf("status %d", r.status)
	}
	for _, c := range []struct {
		err  error
		want string
	}{{errors.New("/var/lib/secret is broken"), "log says why"},
		{fault.New(fault.Unavailable, "starting", "the templates are being read"), "templates are being read"}} {
		h.ready = c.err
		r := h.send(t, "GET", "/readyz", "", "")
		if r.status != 503 || r.problem.Code != "not_ready" || strings.Contains(string(r.body), "secret") ||
			!strings.Contains(r.problem.Detail, c.want) {
			t.Errorf("status %d %s", r.status, r.body)
		}
	}
	if r := h.send(t, "GET", "/healthz", "", ""); as[Health](t, 200, r).Version != "test" {
		t.Errorf("health: %s", r.body)
	}
}

func TestRetryAfterRoundsUp(t *testing.T) {
	h := newTestServer(t)
	sbx := "/v1/sandboxes/" + h.newSandbox(t).ID
	h.agent.fail = fault.New(fault.Unavailable, "later", "later").After(1001 * time.Millisecond)
	if r := h.send(t, "GET", sbx+"/files?path=/a", h.key, ""); r.header.Get("Retry-After") != "2" {
		t.Errorf("Retry-After %q after 1.001 s, want 2", r.header.Get("Retry-After"))
	}
}
