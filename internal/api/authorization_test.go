package api

import (
	"crypto/sha256"
	"encoding/json"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/sandbox"
)

// sample describes a request that would change or return something if it were allowed. The matrix
// fails for an operation of openapi.yaml without a sample.
type sample struct {
	query string
	body  string
	// others and othersCode are the status and the code that a key of another organization gets.
	others     int
	othersCode string
}

const notYours = "not_your_sandbox"

// expectOf changes what another organization gets if a replica answers, which looks for the sandbox before the request.
func (s *sample) expectOf(at place) {
	if throughReplica && at == holder {
		s.others, s.othersCode = 403, notYours
	}
}

var samples = map[string]sample{
	"createSandbox":     {body: `{"template":"python"}`, others: 201},
	"listSandboxes":     {others: 200},
	"getSandbox":        {others: 403, othersCode: notYours},
	"destroySandbox":    {others: 403, othersCode: notYours},
	"keepaliveSandbox":  {body: `{"timeout":"1h"}`, others: 403, othersCode: notYours},
	"wakeSandbox":       {others: 403, othersCode: notYours},
	"suspendSandbox":    {others: 403, othersCode: notYours},
	"checkpointSandbox": {others: 403, othersCode: notYours},
	"createSnapshot":    {body: `{"name":"theirs"}`, others: 403, othersCode: notYours},
	"forkSandbox":       {body: `{"count":2}`, others: 403, othersCode: notYours},
	"listSnapshots":     {others: 200},
	"getSnapshot":       {others: 404, othersCode: "snapshot_not_found"},
	"deleteSnapshot":    {others: 404, othersCode: "snapshot_not_found"},
	"setEgress":         {body: `{"mode":"deny_all"}`, others: 403, othersCode: notYours},
	"listEvents":        {others: 403, othersCode: notYours},
	"openTunnel":        {query: "port=80", others: 426, othersCode: "upgrade_required"}, // TestPortCallsRefused checks the rest
	"listPorts":         {others: 403, othersCode: notYours},
	"getPort":           {others: 403, othersCode: notYours},
	"setPort":           {body: `{"public":true}`, others: 403, othersCode: notYours},
	"createPortURL":     {others: 403, othersCode: notYours},

	"resizeProcessTerminal": {body: `{"cols":80,"rows":24}`, others: 403, othersCode: notYours},

	"executeCommand":    {body: `{"command":"id"}`, others: 403, othersCode: notYours},
	"startProcess":      {body: `{"command":"id"}`, others: 403, othersCode: notYours},
	"listProcesses":     {others: 403, othersCode: notYours},
	"getProcess":        {others: 403, othersCode: notYours},
	"killProcess":       {others: 403, othersCode: notYours},
	"waitProcess":       {query: "timeout=0", others: 403, othersCode: notYours},
	"getProcessOutput":  {others: 403, othersCode: notYours},
	"writeProcessStdin": {body: "x", others: 403, othersCode: notYours},
	"signalProcess":     {body: `{"signal":"TERM"}`, others: 403, othersCode: notYours},
	"openTerminal":      {others: 400, othersCode: "not_a_websocket"},
	"writeFile":         {query: "path=/tmp/a", body: "x", others: 403, othersCode: notYours},
	"readFile":          {query: "path=/tmp/a", others: 403, othersCode: notYours},
	"removeFile":        {query: "path=/tmp/a", others: 403, othersCode: notYours},
	"listFiles":         {query: "path=/tmp", others: 403, othersCode: notYours},
	"statFile":          {query: "path=/tmp/a", others: 403, othersCode: notYours},
	"makeDirectory":     {body: `{"path":"/tmp/d"}`, others: 403, othersCode: notYours},
	"renameFile":        {body: `{"from":"/tmp/a","to":"/tmp/b"}`, others: 403, othersCode: notYours},
	"watchFiles":        {query: "path=/tmp", others: 403, othersCode: notYours},
	"downloadTree":      {query: "path=/tmp", others: 403, othersCode: notYours},
	"uploadTree":        {query: "path=/tmp", body: "x", others: 403, othersCode: notYours},
	"listTemplates":     {others: 200},
	"createTemplate":    {body: `{"name":"theirs","image":"alpine"}`, others: 202},
	"getTemplate":       {others: 404, othersCode: "template_not_found"},
	"deleteTemplate":    {others: 404, othersCode: "template_not_found"},
	"rebuildTemplate":   {others: 404, othersCode: "template_not_found"},

	"cancelTemplateBuild": {others: 404, othersCode: "template_not_found"},
	"getTemplateLogs":     {others: 404, othersCode: "template_not_found"},
	"readFeed":            {others: 200},
	"createWebhook":       {body: `{"url":"https://example.com/"}`, others: 201},
	"listWebhooks":        {others: 200},
	"getWebhook":          {others: 404, othersCode: "webhook_not_found"},
	"updateWebhook":       {body: `{"enabled":false}`, others: 404, othersCode: "webhook_not_found"},
	"deleteWebhook":       {others: 404, othersCode: "webhook_not_found"},
	"testWebhook":         {others: 404, othersCode: "webhook_not_found"},
	"replayWebhook":       {body: `{"after":"evt_0000000000000"}`, others: 404, othersCode: "webhook_not_found"},
	"listSizes":           {others: 200},

	"listWebhookDeliveries": {others: 404, othersCode: "webhook_not_found"},
	"getPool":               {others: 403, othersCode: "not_the_operator"},
	"listNodes":             {others: 403, othersCode: "not_the_operator"},
	"getNode":               {others: 403, othersCode: "not_the_operator"},
	"removeNode":            {others: 403, othersCode: "not_the_operator"},
	"createNodeToken":       {body: `{"name":"theirs"}`, others: 403, othersCode: "not_the_operator"},
	"cordonNode":            {others: 403, othersCode: "not_the_operator"},
	"uncordonNode":          {others: 403, othersCode: "not_the_operator"},
	"drainNode":             {body: `{"timeout":"1m"}`, others: 403, othersCode: "not_the_operator"},
	"getMe":                 {others: 200},
	"createAPIKey":          {body: `{"name":"k","scopes":["exec"]}`, others: 201},
	"listAPIKeys":           {others: 200},
	"revokeAPIKey":          {others: 404, othersCode: "api_key_not_found"},
	"createOrg":             {body: `{"name":"third"}`, others: 403, othersCode: "not_the_operator"},
	"listOrgs":              {others: 403, othersCode: "not_the_operator"},
	"getMetrics":            {others: 403, othersCode: "not_the_operator"},
	"getHealth":             {others: 200},
	"getReady":              {others: 200},
	"getOpenAPI":            {others: 200},
}

// cover maps each scope to the scopes that grant it.
var cover = map[auth.Scope][]auth.Scope{
	auth.SandboxesRead:  {auth.SandboxesRead, auth.SandboxesWrite, auth.Admin},
	auth.SandboxesWrite: {auth.SandboxesWrite, auth.Admin},
	auth.Exec:           {auth.Exec, auth.Admin},
	auth.Files:          {auth.Files, auth.Admin},
	auth.TemplatesRead:  {auth.TemplatesRead, auth.TemplatesWrite, auth.Admin},
	auth.TemplatesWrite: {auth.TemplatesWrite, auth.Admin},
	auth.Admin:          {auth.Admin},
}

// TestAuthorizationMatrix sends every operation of openapi.yaml in every way that is not allowed.
func TestAuthorizationMatrix(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	h.agent.files["/tmp/a"] = []byte("private")
	revoked, revokedSecret := h.newKey(t, 0, auth.Admin)
	if err := h.auth.RevokeKey(t.Context(), h.org, revoked.ID); err != nil {
		t.Fatal(err)
	}
	expired := h.expiredKey(t)
	victim, _ := h.newKey(t, 0, auth.Exec)
	unknown := "cay_" + strings.Repeat("0123456789", 4)

	refused := map[string]func(*http.Request){
		"no key":            func(*http.Request) {},
		"unknown key":       header("Authorization", "Bearer "+unknown),
		"revoked key":       header("Authorization", "Bearer "+revokedSecret),
		"expired key":       header("Authorization", "Bearer "+expired),
		"no scheme":         header("Authorization", h.key),
		"another scheme":    header("Authorization", "Basic "+h.key),
		"nothing after it":  header("Authorization", "Bearer"),
		"an empty key":      header("Authorization", "Bearer "),
		"more after it":     header("Authorization", "Bearer "+h.key+" x"),
		"a longer key":      header("Authorization", "Bearer "+h.key+"0"),
		"a shorter key":     header("Authorization", "Bearer "+h.key[:len(h.key)-1]),
		"an upper-case key": header("Authorization", "Bearer "+strings.ToUpper(h.key)),
		"another header":    header("X-API-Key", h.key),
		"two headers": func(r *http.Request) {
			r.Header["Authorization"] = []string{"Bearer " + h.key, "Bearer " + unknown}
		},
		"in the query": func(r *http.Request) { r.URL.RawQuery += "&access_token=" + h.key },
	}
	snap := as[Snapshot](t, 201, h.send(t, "POST", "/v1/sandboxes/"+sbx.ID+"/snapshots", h.key, ""))
	hook := as[Webhook](t, 201, h.send(t, "POST", "/v1/webhooks", h.key, samples["createWebhook"].body))
	replace := strings.NewReplacer("{id}", sbx.ID, "{port}", "80", "{snapshot}", snap.ID, "{template}", "mine",
		"{process}", "7", "{key}", victim.ID, "{webhook}", hook.ID, "{node}", nodeName)
	operations(h.spec, func(pattern, path string, op *openapi3.Operation, _ openapi3.Parameters) {
		s, known := samples[op.OperationID]
		if !known {
			t.Errorf("%s (%s) is not in the matrix: add a sample", pattern, op.OperationID)
			return
		}
		method, _, _ := strings.Cut(pattern, " ")
		target := replace.Replace(path) + "?" + s.query
		t.Run(op.OperationID, func(t *testing.T) {
			if op.Security != nil && len(*op.Security) == 0 {
				if r := h.send(t, method, target, "", s.body); r.status != 200 {
					t.Errorf("without a key: status %d, want 200", r.status)
				}
				return
			}
			for name, edit := range refused {
				r := h.send(t, method, target, "", s.body, edit)
				if r.status != 401 || r.problem.Code != "unauthenticated" || r.header.Get("WWW-Authenticate") != "Bearer" {
					t.Errorf("%s: status %d %s, want 401 unauthenticated with WWW-Authenticate", name, r.status, r.body)
				}
			}
			h.checkScopes(t, method, target, s, auth.Scope(op.Extensions["x-cay-scope"].(string)))
			s.expectOf(routes[pattern].at)
			if r := h.send(t, method, target, h.other, s.body); r.status != s.others || r.problem.Code != s.othersCode {
				t.Errorf("another organization: status %d %s, want %d %s", r.status, r.body, s.others, s.othersCode)
			} else if strings.Contains(string(r.body), h.org.Org.ID) || r.problem.Code == "" &&
				strings.Contains(string(r.body), sbx.ID) {
				t.Errorf("the answer to another organization tells about ours: %s", r.body)
			}
		})
	})

	// None of the requests changed anything.
	h.isUnchanged(t, sbx)
	as[Snapshot](t, 200, h.send(t, "GET", "/v1/snapshots/"+snap.ID, h.key, ""))
	as[Webhook](t, 200, h.send(t, "GET", "/v1/webhooks/"+hook.ID, h.key, ""))
	if n := as[Node](t, 200, h.send(t, "GET", "/v1/nodes/"+nodeName, h.key, "")); n.Status != NodeStatusReady {
		t.Errorf("the node is %s", n.Status)
	}
	orgs := as[OrgList](t, 200, h.send(t, "GET", "/v1/orgs", h.key, ""))
	if len(orgs.Orgs) != 2 {
		t.Errorf("%d organizations, want 2", len(orgs.Orgs))
	}
}

// isUnchanged checks that a sandbox and its inside are as they were.
func (h *testServer) isUnchanged(t *testing.T, sbx Sandbox) {
	t.Helper()
	after := as[Sandbox](t, 200, h.send(t, "GET", "/v1/sandboxes/"+sbx.ID, h.key, ""))
	if after.Status != "running" || !after.ExpiresAt.Equal(*sbx.ExpiresAt) {
		t.Errorf("the sandbox is %s until %s, was running until %s", after.Status, after.ExpiresAt, sbx.ExpiresAt)
	}
	if string(h.agent.files["/tmp/a"]) != "private" || len(h.agent.targets) != 0 {
		t.Error("the inside of the sandbox was touched")
	}
}

// checkScopes calls an operation with a key that has every scope but those that grant the needed
// one, and with keys that have only one of those.
func (h *testServer) checkScopes(t *testing.T, method, target string, s sample, needed auth.Scope) {
	var without []auth.Scope
	for _, scope := range auth.Scopes() {
		if scope != auth.Admin && !slices.Contains(cover[needed], scope) {
			without = append(without, scope)
		}
	}
	_, poor := h.newKey(t, 0, without...)
	if needed == "" && !strings.HasPrefix(target, "/v1/api-keys/") {
		if r := h.send(t, method, target, poor, s.body); r.status != 200 {
			t.Errorf("no scope is needed, but status %d: %s", r.status, r.body)
		}
		return
	}
	want := needed
	if want == "" {
		want = auth.Admin // needed for a key other than the caller's own
	}
	r := h.send(t, method, target, poor, s.body)
	if r.status != 403 || r.problem.Code != "scope_missing" || !strings.Contains(r.problem.Detail, string(want)) {
		t.Errorf("without %s: status %d %s, want 403 scope_missing that names it", want, r.status, r.body)
	}
	if method != http.MethodGet {
		return // the operation would be carried out if it were allowed
	}
	for _, scope := range cover[needed] {
		_, enough := h.newKey(t, 0, scope)
		if r := h.send(t, method, target, enough, s.body); r.status == 401 || r.status == 403 {
			t.Errorf("with %s: status %d %s", scope, r.status, r.body)
		}
	}
}

// expiredKey stores a key that has expired.
func (h *testServer) expiredKey(t *testing.T) string {
	t.Helper()
	secret := "cay_" + strings.Repeat("9876543210", 4)
	hash := sha256.Sum256([]byte(secret))
	err := h.db.PutKey(t.Context(), auth.Key{ID: "key_" + strings.Repeat("e", 20), OrgID: h.org.Org.ID, Name: "expired",
		Hash: hash[:], Prefix: secret[:12], Scopes: []auth.Scope{auth.Admin},
		CreatedAt: time.Now().Add(-time.Hour), ExpiresAt: time.Now().Add(-time.Minute)}, 0)
	if err != nil {
		t.Fatal(err)
	}
	return secret
}

// TestUnknownPaths checks that requests for unknown paths need a key too, so that strangers cannot
// find out which routes exist.
func TestUnknownPaths(t *testing.T) {
	h := newTestServer(t)
	for _, path := range []string{"/", "/v1", "/v2/sandboxes", "/v1/sandboxes/", "/v1//sandboxes", "/v1/sandboxes/../me",
		"/v1/sandboxes/x/nope", "/debug/pprof/"} {
		if r := h.send(t, "GET", path, "", ""); r.status != 401 {
			t.Errorf("%s without a key: status %d, want 401", path, r.status)
		}
		if r := h.send(t, "GET", path, h.key, ""); r.status != 404 || r.problem.Code != "no_such_route" {
			t.Errorf("%s: status %d %s, want 404 no_such_route", path, r.status, r.body)
		}
	}
	for _, c := range []struct{ method, path, allow string }{
		{"PATCH", "/v1/sandboxes", "GET, HEAD, POST"},
		{"GET", "/v1/sandboxes/sbx_aaaaaaaaaaaaaaaaaaaa/execute", "POST"},
		{"POST", "/healthz", "GET, HEAD"},
		{"PROPFIND", "/v1/me", "GET, HEAD"},
	} {
		r := h.send(t, c.method, c.path, h.key, "")
		if r.status != 405 || r.problem.Code != "method_not_allowed" || r.header.Get("Allow") != c.allow {
			t.Errorf("%s %s: status %d, Allow %q: %s", c.method, c.path, r.status, r.header.Get("Allow"), r.body)
		}
	}
}

func TestKeysAndOrganizations(t *testing.T) {
	h := newTestServer(t)
	made := as[NewAPIKey](t, 201, h.send(t, "POST", "/v1/api-keys", h.key,
		`{"name":"ci","scopes":["exec","files"],"expires_in":"1h"}`))
	if d := time.Until(*made.ExpiresAt); d < 59*time.Minute || d > time.Hour {
		t.Errorf("expires in %s, want an hour", d)
	}
	me := as[Me](t, 200, h.send(t, "GET", "/v1/me", made.APIKey, ""))
	if me.APIKey.ID != made.ID || me.Org.ID != h.org.Org.ID ||
		!slices.Equal(me.APIKey.Scopes, []Scope{ScopeExec, ScopeFiles}) {
		t.Errorf("me is %+v", me)
	}
	for _, body := range []string{string(h.send(t, "GET", "/v1/api-keys", h.key, "").body),
		string(h.send(t, "GET", "/v1/me", made.APIKey, "").body), h.log.String()} {
		if strings.Contains(body, made.APIKey) || strings.Contains(body, h.key) {
			t.Errorf("a secret is shown: %s", body)
		}
	}
	if r := h.send(t, "DELETE", "/v1/api-keys/"+made.ID, made.APIKey, ""); r.status != 204 {
		t.Errorf("a key that revokes itself: status %d %s", r.status, r.body)
	}
	if r := h.send(t, "GET", "/v1/me", made.APIKey, ""); r.status != 401 {
		t.Errorf("revoked key: status %d", r.status)
	}
	if r := h.send(t, "DELETE", "/v1/api-keys/"+made.ID, h.key, ""); r.status != 204 {
		t.Errorf("revoking again: status %d %s", r.status, r.body)
	}

	// A key in E2B's format is valid here too.
	foreign := as[NewAPIKey](t, 201, h.send(t, "POST", "/v1/api-keys", h.key,
		`{"name":"sdk","scopes":["exec"],"format":"e2b"}`))
	if !regexp.MustCompile(`^e2b_[0-9a-f]{40}$`).MatchString(foreign.APIKey) ||
		!strings.HasPrefix(foreign.Prefix, "e2b_") {
		t.Errorf("the key is %+v", foreign)
	}
	if me := as[Me](t, 200, h.send(t, "GET", "/v1/me", foreign.APIKey, "")); me.APIKey.ID != foreign.ID {
		t.Errorf("me is %+v", me)
	}

	org := as[NewOrg](t, 201, h.send(t, "POST", "/v1/orgs", h.key, `{"name":"acme","quota":{"sandboxes":1}}`))
	if org.Quota.Sandboxes != 1 {
		t.Errorf("quota %+v", org.Quota)
	}
	h.send(t, "POST", "/v1/sandboxes", org.APIKey, `{"template":"python"}`)
	if r := h.send(t, "POST", "/v1/sandboxes", org.APIKey, `{"template":"python"}`); r.status != 429 ||
		r.problem.Code != "quota_exceeded" {
		t.Errorf("over quota: status %d %s", r.status, r.body)
	}
	page := as[OrgList](t, 200, h.send(t, "GET", "/v1/orgs?limit=2", h.key, ""))
	if len(page.Orgs) != 2 || page.Orgs[0].Name != "acme" || page.NextCursor == nil {
		t.Fatalf("first page %+v", page)
	}
	page = as[OrgList](t, 200, h.send(t, "GET", "/v1/orgs?cursor="+url.QueryEscape(*page.NextCursor), h.key, ""))
	if len(page.Orgs) != 1 || page.Orgs[0].Name != auth.OperatorOrg || page.NextCursor != nil {
		t.Errorf("second page %+v", page)
	}
}

// TestTokensStayInside checks that no answer and no log line shows the token of a sandbox, which
// gives access to its inside.
func TestTokensStayInside(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	h.send(t, "POST", "/v1/sandboxes/"+sbx.ID+"/execute", h.key, `{"command":"id"}`)
	row, err := h.sandboxes.Get(t.Context(), h.org.Org.ID, sandbox.ID(sbx.ID))
	if err != nil || row.Token == "" {
		t.Fatalf("the row has token %q, %v", row.Token, err)
	}
	token := row.Token
	for _, path := range []string{"/v1/sandboxes", "/v1/sandboxes/" + sbx.ID, "/v1/sandboxes/" + sbx.ID + "/events"} {
		if r := h.send(t, "GET", path, h.key, ""); strings.Contains(string(r.body), token) {
			t.Errorf("%s shows the token", path)
		}
	}
	if strings.Contains(h.log.String(), token) {
		t.Error("the log shows the token")
	}
	if b, err := json.Marshal(new(server).sandboxOf(row)); err != nil || strings.Contains(string(b), token) {
		t.Errorf("encoded: %s, %v", b, err)
	}
}
