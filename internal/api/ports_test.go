package api

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
)

// fakePorts fakes the ports of all sandboxes. Each port leads to a server of the test.
type fakePorts struct {
	mu sync.Mutex
	// +checklocks:mu
	addrs map[int]string
	// +checklocks:mu
	dialled []agentapi.Target
}

func (f *fakePorts) DialPort(ctx context.Context, t agentapi.Target, port int) (net.Conn, error) {
	f.mu.Lock()
	addr, ok := f.addrs[port]
	f.dialled = append(f.dialled, t)
	f.mu.Unlock()
	if !ok {
		return nil, fault.New(fault.Upstream, fault.CodePortClosed, "nothing listens on port %d", port)
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", addr)
}

func (f *fakePorts) open(port int, addr string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.addrs[port] = addr
}

const testDomain = "boxes.test"

// newPortServer returns a testServer with host names for ports. On port 8080 of every sandbox a server
// answers with the request that it got.
func newPortServer(t *testing.T) *testServer {
	t.Helper()
	h := newTestServer(t, func(_ *auth.Config, _ *sandbox.Config, c *Config) {
		c.Names = portproxy.Names{Domain: testDomain, Scheme: "http"}
	})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain")
		w.Header().Set("X-Request-Id", "theirs")
		_ = r.Write(w)
	}))
	t.Cleanup(srv.Close)
	h.ports.open(8080, srv.Listener.Addr().String())
	return h
}

// visit sends a request to a port as a browser or curl would.
func (h *testServer) visit(t *testing.T, method, target string, edits ...func(*http.Request)) reply {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(t.Context(), method, h.url+u.RequestURI(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if u.Host != "" {
		r.Host = u.Host
	}
	for _, e := range edits {
		e(r)
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{status: resp.StatusCode, header: resp.Header, body: b}
}

func hostOf(id string, port int) string {
	return fmt.Sprintf("http://%d-%s.%s", port, strings.TrimPrefix(id, "sbx_"), testDomain)
}

func TestPortByPathAndHost(t *testing.T) {
	h := newPortServer(t)
	sbx := h.newSandbox(t)
	withKey := header("Authorization", "Bearer "+h.key)
	for target, asked := range map[string]string{
		portproxy.Path(sbx.ID, 8080) + "/a%2Fb//c/../d?x=1": "GET /a%2Fb//c/../d?x=1 HTTP/1.1\r\nHost: localhost:8080\r\n",
		portproxy.Path(sbx.ID, 8080) + "/url":               "GET /url HTTP/1.1\r\n",
		portproxy.Path(sbx.ID, 8080) + "/v1/sandboxes":      "GET /v1/sandboxes HTTP/1.1\r\n",
		hostOf(sbx.ID, 8080) + "/v1/sandboxes?a":            "GET /v1/sandboxes?a HTTP/1.1\r\nHost: 8080-" + sbx.ID[4:] + "." + testDomain + "\r\n",
		hostOf(sbx.ID, 8080) + "/healthz":                   "GET /healthz HTTP/1.1\r\n",
	} {
		for name, edit := range map[string]func(*http.Request){"key": withKey, "own header": func(r *http.Request) {
			r.Header.Set(portproxy.KeyHeader, h.key)
			r.Header.Set("Authorization", "Bearer theirs")
		}} {
			r := h.visit(t, "GET", target, edit)
			if r.status != 200 || !strings.HasPrefix(string(r.body), asked) {
				t.Errorf("%s with %s: %d %q", target, name, r.status, r.body)
			}
			if strings.Contains(string(r.body), h.key) || strings.Contains(string(r.body), "theirs") != (name == "own header") {
				t.Errorf("%s with %s: the port received %q", target, name, r.body)
			}
			if ids := r.header.Values("X-Request-Id"); len(ids) != 1 || ids[0] != "theirs" ||
				r.header.Get("X-Content-Type-Options") != "" {
				t.Errorf("%s: the answer's head is %v", target, r.header)
			}
		}
	}
	h.released(t)
}

// released waits until no lease is held, because a call may end shortly after its answer.
func (h *testServer) released(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); h.sandboxes.InUse() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d leases are left", h.sandboxes.InUse())
		}
	}
}

func TestPortRefused(t *testing.T) {
	h := newPortServer(t)
	sbx := h.newSandbox(t)
	_, poor := h.newKey(t, 0, auth.SandboxesWrite, auth.Files)
	key := func(k string) func(*http.Request) { return header("Authorization", "Bearer "+k) }
	none := func(*http.Request) {}
	for name, c := range map[string]struct {
		target string
		edit   func(*http.Request)
		status int
		code   string
	}{
		"no key":                {hostOf(sbx.ID, 8080) + "/", none, 401, "unauthenticated"},
		"no key, by path":       {portproxy.Path(sbx.ID, 8080) + "/", none, 401, "unauthenticated"},
		"no key, no sandbox":    {hostOf("sbx_aaaaaaaaaaaaaaaaaaaa", 8080) + "/", none, 401, "unauthenticated"},
		"no key, no such id":    {"/v1/sandboxes/x/ports/80/", none, 401, "unauthenticated"},
		"the application's key": {hostOf(sbx.ID, 8080) + "/", key("theirs"), 401, "unauthenticated"},
		"another's key":         {hostOf(sbx.ID, 8080) + "/", key(h.other), 403, notYours},
		"no such key":           {hostOf(sbx.ID, 8080) + "/", key("cay_0123456789abcdef0123456789abcdef01234567"), 401, "unauthenticated"},
		"without the scope":     {portproxy.Path(sbx.ID, 8080) + "/", key(poor), 403, "scope_missing"},
		"no sandbox":            {hostOf("sbx_aaaaaaaaaaaaaaaaaaaa", 8080) + "/", key(h.key), 404, "sandbox_not_found"},
		"nothing listens":       {hostOf(sbx.ID, 8081) + "/", key(h.key), 502, "port_closed"},
		"port 0":                {portproxy.Path(sbx.ID, 0) + "/", key(h.key), 400, "invalid_port"},
		"port 70000":            {portproxy.Path(sbx.ID, 70000) + "/", key(h.key), 400, "invalid_port"},
		"the agent's":           {hostOf(sbx.ID, agentapi.Port) + "/health", key(h.key), 400, "invalid_port"},
		"a made-up signature":   {hostOf(sbx.ID, 8080) + "/?cay_token=a.b", none, 401, "invalid_signature"},
		"one of another port":   {hostOf(sbx.ID, 8080) + "/?cay_token=" + h.server.Signer.Sign(sbx.ID, 8081, time.Now().Add(time.Hour)), none, 401, "invalid_signature"},
		"an expired one":        {hostOf(sbx.ID, 8080) + "/?cay_token=" + h.server.Signer.Sign(sbx.ID, 8080, time.Now().Add(-time.Second)), none, 401, "signature_expired"},
		"a made-up cookie":      {hostOf(sbx.ID, 8080) + "/", header("Cookie", "cay_token=a.b"), 401, "unauthenticated"},
		"a cookie by path": {portproxy.Path(sbx.ID, 8080) + "/",
			header("Cookie", "cay_token="+h.server.Signer.Sign(sbx.ID, 8080, time.Now().Add(time.Hour))), 401, "unauthenticated"},
	} {
		r := h.visit(t, "GET", c.target, c.edit)
		if r.status != c.status || !strings.Contains(string(r.body), `"code":"`+c.code+`"`) ||
			r.header.Get("X-Request-Id") == "" {
			t.Errorf("%s: %d %s, want %d %s", name, r.status, r.body, c.status, c.code)
		}
		r = h.visit(t, "GET", c.target, c.edit, header("Accept", "text/html,*/*;q=0.8"))
		if r.status != c.status || !strings.Contains(r.header.Get("Content-Type"), "text/html") ||
			!strings.Contains(string(r.body), c.code) || strings.Contains(string(r.body), "<script") {
			t.Errorf("%s, as a page: %d %v %s", name, r.status, r.header, r.body)
		}
	}
	if n := len(h.agent.targets); n != 0 {
		t.Errorf("%d calls inside", n)
	}
	if r := h.send(t, "GET", "/v1/sandboxes/"+sbx.ID+"/ports/80", h.key, ""); r.status != 200 {
		t.Errorf("settings: %d", r.status)
	}
}

func TestPortPublic(t *testing.T) {
	h := newPortServer(t)
	sbx := h.newAsleep(t)
	target := hostOf(sbx.ID, 8080) + "/x"
	p := as[Port](t, 200, h.send(t, "PUT", "/v1/sandboxes/"+sbx.ID+"/ports/8080", h.key, `{"public":true}`))
	if !p.Public || p.Port != 8080 || p.URL != hostOf(sbx.ID, 8080)+"/" {
		t.Errorf("port %+v", p)
	}
	if l := as[PortList](t, 200, h.send(t, "GET", "/v1/sandboxes/"+sbx.ID+"/ports", h.key, "")); len(l.Ports) != 1 ||
		l.Ports[0] != p {
		t.Errorf("ports %+v", l)
	}
	if b := as[Sandbox](t, 200, h.send(t, "GET", "/v1/sandboxes/"+sbx.ID, h.key, "")); b.Status != "suspended" {
		t.Errorf("changing a port woke the sandbox: %s", b.Status)
	}
	for _, target := range []string{target, portproxy.Path(sbx.ID, 8080) + "/x"} {
		if r := h.visit(t, "POST", target); r.status != 200 {
			t.Errorf("public, %s: %d %s", target, r.status, r.body)
		}
	}
	if b := as[Sandbox](t, 200, h.send(t, "GET", "/v1/sandboxes/"+sbx.ID, h.key, "")); b.Status != "running" {
		t.Errorf("a request to the port did not wake the sandbox: %s", b.Status)
	}
	if r := h.visit(t, "GET", hostOf(sbx.ID, 8081)); r.status != 401 {
		t.Errorf("another port: %d", r.status)
	}
	if r := h.visit(t, "GET", target, header("Cookie", "cay_token=a.b")); r.status != 200 {
		t.Errorf("public, with an old cookie: %d", r.status)
	}
	if p := as[Port](t, 200,
		h.send(t, "PUT", "/v1/sandboxes/"+sbx.ID+"/ports/8080", h.key, `{"public":false}`)); p.Public {
		t.Errorf("port %+v", p)
	}
	if r := h.visit(t, "GET", target); r.status != 401 {
		t.Errorf("private again: %d", r.status)
	}
}

func TestPortSigned(t *testing.T) {
	h := newPortServer(t)
	sbx := h.newSandbox(t)
	u := as[PortURL](t, 201, h.send(t, "POST", "/v1/sandboxes/"+sbx.ID+"/ports/8080/url", h.key, `{"expires_in":"90s"}`))
	if left := time.Until(u.ExpiresAt); left < 80*time.Second || left > 92*time.Second ||
		!strings.HasPrefix(u.URL, hostOf(sbx.ID, 8080)+"/?cay_token=") {
		t.Fatalf("URL %+v", u)
	}
	signed, err := url.Parse(u.URL)
	if err != nil {
		t.Fatal(err)
	}
	signed.Path, signed.RawPath, signed.RawQuery = "//evil/a/path", "//evil/a%2Fpath", "a=1;2&"+signed.RawQuery+"&b=%20"
	r := h.visit(t, "GET", signed.String())
	if r.status != 303 || r.header.Get("Location") != "/evil/a%2Fpath?a=1;2&b=%20" ||
		r.header.Get("Referrer-Policy") != "no-referrer" {
		t.Fatalf("the exchange: %d %v", r.status, r.header)
	}
	cookie := r.header.Get("Set-Cookie")
	for _, want := range []string{"HttpOnly", "Path=/;", "SameSite=Lax", "Expires="} {
		if !strings.Contains(cookie, want) || strings.Contains(cookie, "Domain") || strings.Contains(cookie, "Secure") {
			t.Errorf("cookie %q", cookie)
		}
	}
	if r := h.visit(t, "GET", signed.String(),
		header("X-Forwarded-Proto", "https")); !strings.Contains(r.header.Get("Set-Cookie"), "Secure") {
		t.Errorf("over TLS the cookie is %q", r.header.Get("Set-Cookie"))
	}
	pair, _, _ := strings.Cut(cookie, ";")
	r = h.visit(t, "GET", hostOf(sbx.ID, 8080)+"/a", header("Cookie", "mine=1; "+pair))
	if r.status != 200 || strings.Contains(string(r.body), "cay_token") || !strings.Contains(string(r.body), "mine=1") {
		t.Errorf("with the cookie: %d %s", r.status, r.body)
	}
	// Requests that cannot be redirected are served directly.
	for name, edit := range map[string]func(*http.Request){"POST": func(r *http.Request) { r.Method = "POST" },
		"WebSocket": header("Upgrade", "websocket")} {
		if r := h.visit(t, "GET", u.URL, edit); r.status != 200 || strings.Contains(string(r.body), "cay_token") {
			t.Errorf("%s: %d %s", name, r.status, r.body)
		}
	}
	byPath := portproxy.Path(sbx.ID, 8080) + "/?" + signed.RawQuery
	if r := h.visit(t, "GET", byPath); r.status != 200 || strings.Contains(string(r.body), "cay_token") ||
		r.header.Get("Set-Cookie") != "" {
		t.Errorf("by path: %d %s", r.status, r.body)
	}
	if l := h.log.String(); strings.Contains(l, signed.Query().Get("cay_token")) {
		t.Error("the log shows a signature")
	}
}

func TestPortCallsRefused(t *testing.T) {
	h := newPortServer(t)
	sbx := h.newSandbox(t)
	gone := h.putSandbox(t, sandbox.Ephemeral, sandbox.Destroyed)
	base := "/v1/sandboxes/" + sbx.ID
	upgrade := func(r *http.Request) {
		r.Header.Set("Connection", "Upgrade")
		r.Header.Set("Upgrade", "tcp")
	}
	h.check(t, []refusal{
		{"no upgrade", "POST", base + "/tunnel?port=80", "", nil, 426, "upgrade_required", "Upgrade"},
		{"another upgrade", "POST", base + "/tunnel?port=80", "", func(r *http.Request) { upgrade(r); r.Header.Set("Upgrade", "websocket") }, 426, "upgrade_required", "Upgrade"},
		{"tunnel without a port", "POST", base + "/tunnel", "", upgrade, 400, "invalid_port", "port"},
		{"tunnel to port 0", "POST", base + "/tunnel?port=0", "", upgrade, 400, "invalid_port", "port"},
		{"tunnel to the agent", "POST", base + "/tunnel?port=49983", "", upgrade, 400, "invalid_port", "port"},
		{"tunnel to a closed port", "POST", base + "/tunnel?port=81", "", upgrade, 502, "port_closed", ""},
		{"tunnel to what is destroyed", "POST", "/v1/sandboxes/" + string(gone) + "/tunnel?port=80", "", upgrade, 409, "sandbox_not_running", ""},
		{"tunnel with another's key", "POST", base + "/tunnel?port=80", "", func(r *http.Request) { upgrade(r); r.Header.Set("Authorization", "Bearer "+h.other) }, 403, notYours, ""},
		{"port 0", "GET", base + "/ports/0", "", nil, 400, "invalid_port", "port"},
		{"port x", "GET", base + "/ports/x", "", nil, 400, "invalid_port", "port"},
		{"nothing to set", "PUT", base + "/ports/80", "{}", nil, 400, "invalid_public", "public"},
		{"public, a text", "PUT", base + "/ports/80", `{"public":"yes"}`, nil, 400, "invalid_public", "public"},
		{"of what is destroyed", "PUT", "/v1/sandboxes/" + string(gone) + "/ports/80", `{"public":true}`, nil, 409, "sandbox_not_running", ""},
		{"URL of what is destroyed", "POST", "/v1/sandboxes/" + string(gone) + "/ports/80/url", "", nil, 409, "sandbox_not_running", ""},
		{"URL for too long", "POST", base + "/ports/80/url", `{"expires_in":"24h1s"}`, nil, 400, "invalid_expires_in", "expires_in"},
		{"URL for no time", "POST", base + "/ports/80/url", `{"expires_in":"0s"}`, nil, 400, "invalid_expires_in", "expires_in"},
		{"URL for a number", "POST", base + "/ports/80/url", `{"expires_in":60}`, nil, 400, "invalid_expires_in", "expires_in"},
	})
}

// TestTunnel checks that a tunnel carries both directions, closes each separately, and holds a
// lease meanwhile.
func TestTunnel(t *testing.T) {
	h := newPortServer(t)
	sbx := h.newSandbox(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h.ports.open(5432, l.Addr().String())
	conn, err := net.Dial("tcp", strings.TrimPrefix(h.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /v1/sandboxes/%s/tunnel?port=5432 HTTP/1.1\r\nHost: x\r\n"+
		"Authorization: Bearer %s\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n", sbx.ID, h.key)
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out := bufio.NewReader(conn)
	resp, err := http.ReadResponse(out, nil)
	if err != nil || resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "tcp" ||
		resp.Header.Get("X-Request-Id") == "" {
		t.Fatalf("%+v, %v", resp, err)
	}
	if n := h.sandboxes.InUse(); n != 1 {
		t.Errorf("%d leases while the tunnel is open", n)
	}
	fmt.Fprint(conn, "ping")
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(in); err != nil || string(b) != "ping" {
		t.Errorf("inside: %q, %v", b, err)
	}
	fmt.Fprint(in, "pong")
	in.Close()
	if b, err := io.ReadAll(out); err != nil || string(b) != "pong" {
		t.Errorf("outside: %q, %v", b, err)
	}
	if line := h.log.line(t, resp.Header.Get("X-Request-Id")); line["status"] != 101.0 {
		t.Errorf("logged %v", line)
	}
	h.released(t)
}

// TestCallsNameTheirSandbox calls every route of a sandbox, and a port of one without a key, and checks
// that the log has the sandbox and the organization that the call is for.
func TestCallsNameTheirSandbox(t *testing.T) {
	h := newPortServer(t)
	sbx := h.newSandbox(t)
	calls := 0
	call := func(method, target, key, body string, id string, org any) reply {
		t.Helper()
		calls++
		request := fmt.Sprint("call-", calls)
		r := h.send(t, method, target, key, body, header("X-Request-Id", request))
		if line := h.log.line(t, request); id != "" && line["sandbox"] != id || line["org"] != org {
			t.Errorf("%s %s: status %d, the log has %v", method, target, r.status, line)
		}
		return r
	}
	made := as[Sandbox](t, 201, call("POST", "/v1/sandboxes", h.key, `{"template":"python"}`, "", h.org.Org.ID)).ID
	if line := h.log.line(t, "call-1"); line["sandbox"] != made {
		t.Errorf("a create: the log has %v", line)
	}
	call("GET", "/v1/sandboxes/nonsense", h.key, "", "", h.org.Org.ID)
	if line := h.log.line(t, "call-2"); line["sandbox"] != nil {
		t.Errorf("a text that is no id: the log has %v", line)
	}
	parameter := regexp.MustCompile(`\{[a-z]+\}`)
	for pattern := range routes {
		method, path, _ := strings.Cut(pattern, " ")
		if rest, ok := strings.CutPrefix(path, "/v1/sandboxes/{id}"); ok {
			path = "/v1/sandboxes/" + sbx.ID + parameter.ReplaceAllString(rest, "1")
			call(method, path, "", "", sbx.ID, nil)
			if method != "DELETE" {
				call(method, path, h.key, "", sbx.ID, h.org.Org.ID)
			}
		}
	}
	call("PUT", "/v1/sandboxes/"+sbx.ID+"/ports/8080", h.key, `{"public":true}`, sbx.ID, h.org.Org.ID)
	call("GET", portproxy.Path(sbx.ID, 8080)+"/", "", "", sbx.ID, h.org.Org.ID)
	h.visit(t, "GET", hostOf(sbx.ID, 8080)+"/", header("X-Request-Id", "by-host"))
	if line := h.log.line(t, "by-host"); line["sandbox"] != sbx.ID || line["org"] != h.org.Org.ID {
		t.Errorf("a public port by its host name: the log has %v", line)
	}
}
