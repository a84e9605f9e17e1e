package e2b

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
)

// toEnvd returns the headers of a call to the agent.
func toEnvd(id, token string) []string {
	return []string{idHeader, id, portHeader, "49983", agentapi.TokenHeader, token}
}

func TestTraffic(t *testing.T) {
	h := newHarness(t)
	id, token := h.create(`{"templateID":"base"}`)
	_, otherToken := h.create(`{"templateID":"base"}`)
	sb := h.row(id)
	h.play(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Set-Cookie", "a=b")
		fmt.Fprint(w, "from inside")
	})
	r := h.send("POST", "/process.Process/List", `{}`,
		append(toEnvd(id, token), "X-API-Key", h.key, "Cookie", "c=d", "Authorization", "Basic dXNlcjo=")...)
	if r.status != 200 || r.body != "from inside" || r.header.Get("Set-Cookie") != "" {
		t.Errorf("answered %d %q %v", r.status, r.body, r.header)
	}
	seen := h.reached()
	if len(seen) != 1 {
		t.Fatalf("%d requests reached the agent", len(seen))
	}
	in := seen[0].Header
	if in.Get(agentapi.TokenHeader) != "" || in.Get("X-Api-Key") != "" || in.Get("Cookie") != "" ||
		in.Get(idHeader) != "" || in.Get("Authorization") == "" {
		t.Errorf("the agent sees %v", in)
	}
	if r := h.send("GET", "/envs", "", append(toEnvd(id, token), "Authorization", "Bearer "+h.key)...); r.status != 200 ||
		h.reached()[1].Header.Get("Authorization") != "" {
		t.Errorf("a key that went astray: %d %v", r.status, h.reached()[1].Header)
	}
	if token == sb.Token || strings.Contains(h.log.String(), token) || strings.Contains(h.log.String(), sb.Token) {
		t.Error("the token is the agent's, or in the log")
	}

	h.play(nil)
	for name, c := range map[string]struct {
		method, path string
		heads        []string
		status       int
	}{
		"host-only: init":            {"POST", "/init", toEnvd(id, token), 404},
		"host-only: start":           {"POST", "/start", toEnvd(id, token), 404},
		"host-only: memory":          {"POST", "/memory/relieve", toEnvd(id, token), 404},
		"host-only: busy":            {"GET", "/busy", toEnvd(id, token), 404},
		"host-only: tunnel":          {"GET", "/tunnel?port=1", toEnvd(id, token), 404},
		"host-only: hidden in dots":  {"POST", "/files/%2e%2e/init", toEnvd(id, token), 404},
		"with the agent's own token": {"GET", "/envs", toEnvd(id, sb.Token), 401},
		"with another's token":       {"GET", "/envs", toEnvd(id, otherToken), 401},
		"without a token":            {"GET", "/envs", []string{idHeader, id, portHeader, "49983"}, 401},
		"files without a token":      {"GET", "/files?path=x", []string{idHeader, id, portHeader, "49983"}, 401},
		"no such sandbox":            {"GET", "/health", toEnvd("nosuchsandboxanywhere", token), 502},
	} {
		if r := h.send(c.method, c.path, "", c.heads...); r.status != c.status || r.json["code"] != float64(c.status) {
			t.Errorf("%s: %d %s, want %d", name, r.status, r.body, c.status)
		}
	}
	if seen := h.reached(); len(seen) > 0 {
		t.Errorf("%s reached the agent", seen[0].URL)
	}
	for name, heads := range map[string][]string{
		"headers": {idHeader, id, portHeader, "49983"}, // a health check needs no token
		"host":    {"Host", "49983-" + id + ".anything.example"},
	} {
		if r := h.send("GET", "/health", "", heads...); r.status != 204 {
			t.Errorf("health by %s: %d %s", name, r.status, r.body)
		}
	}
	if r := h.send("GET", "/v1/sandboxes", ""); r.status != http.StatusTeapot {
		t.Errorf("v1: %d", r.status)
	}
	if r := h.send("GET", "/healthz", ""); r.status != http.StatusTeapot {
		t.Errorf("healthz: %d", r.status)
	}
}

// TestAnswersFromInside has root inside answer instead of the agent, with headers and a page that
// try to take over the API's origin, before, in and after its answer.
func TestAnswersFromInside(t *testing.T) {
	h := newHarness(t)
	id, token := h.create(`{"templateID":"base"}`)
	grabs := map[string]string{"Set-Cookie": "a=b; Path=/", "Service-Worker-Allowed": "/", "Clear-Site-Data": `"*"`,
		"Strict-Transport-Security": "max-age=9", "Alt-Svc": "clear", "Nel": "{}",
		"Access-Control-Allow-Credentials": "true", "Www-Authenticate": "Negotiate"}
	h.play(func(w http.ResponseWriter, r *http.Request) {
		for name, value := range grabs {
			w.Header().Set(name, value)
		}
		w.WriteHeader(http.StatusEarlyHints)
		w.Header().Set("Content-Type", "text/html")
		w.Header().Set("Content-Security-Policy", "sandbox allow-scripts allow-same-origin")
		w.Header().Set("Referrer-Policy", "unsafe-url")
		fmt.Fprint(w, "<script>1</script>")
		for name, value := range grabs {
			w.Header().Set(http.TrailerPrefix+name, value)
		}
	})
	for _, path := range []string{"/files?path=x", "/envs", "/process.Process/List"} {
		var early http.Header
		r, err := http.NewRequestWithContext(httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
			Got1xxResponse: func(_ int, h textproto.MIMEHeader) error { early = http.Header(h); return nil },
		}), "GET", h.url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		heads := toEnvd(id, token)
		for i := 0; i < len(heads); i += 2 {
			r.Header.Set(heads[i], heads[i+1])
		}
		r.Header.Set("Referer", "https://x/?cay_token=secret")
		resp, err := http.DefaultTransport.RoundTrip(r)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 {
			t.Fatalf("%s: %s, %v", path, resp.Status, err)
		}
		for name := range grabs {
			if early.Get(name)+resp.Header.Get(name)+resp.Trailer.Get(name) != "" {
				t.Errorf("%s: %s passes", path, name)
			}
		}
		if p := resp.Header.Values("Content-Security-Policy"); len(p) != 1 || !strings.Contains(p[0], "default-src 'none'") ||
			!strings.HasSuffix(p[0], "sandbox") {
			t.Errorf("%s: the policy is %q", path, p)
		}
		if resp.Header.Get("Referrer-Policy") != "no-referrer" || resp.Header.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: the answer has %v", path, resp.Header)
		}
	}
	for _, r := range h.reached() {
		if r.Header.Get("Referer") != "" {
			t.Errorf("inside came %v", r.Header)
		}
	}
}

// TestOlderTokens uses the token that an older server gave for the sandbox, without its mark.
func TestOlderTokens(t *testing.T) {
	h := newHarness(t)
	id, token := h.create(`{"templateID":"base"}`)
	older := strings.TrimPrefix(token, tokenMark)
	h.play(nil)
	if r := h.send("GET", "/envs", "", toEnvd(id, older)...); len(older) != 40 || r.status != 204 {
		t.Errorf("%s: %d %s", older, r.status, r.body)
	}
	q := url.Values{"path": {"x"}}
	q.Set("signature", agentapi.Signature("GET", q, older))
	if r := h.send("GET", "/files?"+q.Encode(), "", idHeader, id, portHeader, "49983"); r.status != 204 {
		t.Errorf("signed: %d %s", r.status, r.body)
	}
	// Clients send it to every port; the program there must not get it.
	if r := h.send("GET", "/", "", idHeader, id, portHeader, "8080", agentapi.TokenHeader, older); r.status != 202 {
		t.Fatalf("a port: %d %s", r.status, r.body)
	}
	if seen := h.reached(); seen[len(seen)-1].Header.Get(agentapi.TokenHeader) != "" {
		t.Errorf("inside came %v", seen[len(seen)-1].Header)
	}
	if !h.carried[0].Shared {
		t.Error("what is found by headers is not known to come from a shared origin")
	}
	if r := h.send("GET", "/", "", "Host", "8080-"+id+".anything.example"); r.status != 202 || h.carried[1].Shared {
		t.Errorf("by host: %d, %+v", r.status, h.carried[1])
	}
}

func TestSignedURLsFindTheirSandbox(t *testing.T) {
	h := newHarness(t)
	h.create(`{"templateID":"base"}`)
	id, token := h.create(`{"templateID":"base"}`)
	h.create(`{"templateID":"base"}`)
	sign := func(method, path, until string) string {
		q := url.Values{"path": {path}}
		if until != "" {
			q.Set("signature_expiration", until)
		}
		q.Set("signature", agentapi.Signature(method, q, token))
		return "/files?" + q.Encode()
	}
	h.play(nil)
	if r := h.send("GET", sign("GET", "a+b c", ""), ""); r.status != 204 {
		t.Fatalf("%d %s", r.status, r.body)
	}
	seen := h.reached()
	if q := seen[0].URL.Query(); seen[0].Header.Get(agentapi.TokenHeader) != "" || q.Get("path") != "a+b c" ||
		q.Has("signature") {
		t.Errorf("the agent sees %s", seen[0].URL)
	}
	for name, c := range map[string]struct {
		method, path, text string
		status             int
	}{
		"expired":        {"GET", sign("GET", "x", "1000"), "signature is already expired", 401},
		"forged":         {"GET", "/files?path=x&signature=v1_abc", "invalid signature", 401},
		"of a read":      {"POST", sign("GET", "x", ""), "invalid signature", 401},
		"not signed":     {"GET", "/files?path=x", "", 400},
		"another method": {"DELETE", sign("DELETE", "x", ""), "", 404},
	} {
		if r := h.send(c.method, c.path, ""); r.status != c.status || c.text != "" && r.json["message"] != c.text {
			t.Errorf("%s: %d %s", name, r.status, r.body)
		}
	}
	if r := h.control("POST", "/sandboxes/"+id+"/pause", ""); r.status != 204 {
		t.Fatalf("pause: %d %s", r.status, r.body)
	}
	if r := h.send("GET", sign("GET", "x", ""), ""); r.status != 502 {
		t.Errorf("of a paused one: %d %s", r.status, r.body)
	}
}

// TestSearchesAreLimited sends signatures without a sandbox, wrong and right ones, as fast as
// possible.
func TestSearchesAreLimited(t *testing.T) {
	h := newHarness(t)
	id, token := h.create(`{"templateID":"base"}`)
	h.play(nil)
	q := url.Values{"path": {"x"}}
	q.Set("signature", agentapi.Signature("GET", q, strings.Repeat("0", 45)))
	var searched, refused int
	for range 4 * searchesOfOneAtOnce {
		switch r := h.send("GET", "/files?"+q.Encode(), ""); r.status {
		case 401:
			searched++
		case 429:
			refused++
			if r.header.Get("Retry-After") == "" || !strings.Contains(r.body, "49983") {
				t.Fatalf("%v %s", r.header, r.body)
			}
		default:
			t.Fatalf("%d %s", r.status, r.body)
		}
	}
	if refused == 0 || searched < searchesOfOneAtOnce {
		t.Errorf("%d were looked for, %d refused", searched, refused)
	}
	// A text that has not the form of a signature starts no search, nor does a request that names
	// its sandbox.
	if r := h.send("GET", "/files?path=x&signature=v1_x", ""); r.status != 401 {
		t.Errorf("no signature: %d %s", r.status, r.body)
	}
	q.Set("signature", agentapi.Signature("GET", q, token))
	if r := h.send("GET", "/files?"+q.Encode(), "", "Host", "49983-"+id+".anything.example"); r.status != 204 {
		t.Errorf("with the sandbox's name: %d %s", r.status, r.body)
	}
}

// TestStrangersAreLimited calls the control API and a sandbox from one address, without a key or
// token.
func TestStrangersAreLimited(t *testing.T) {
	h := newHarness(t)
	id, token := h.create(`{"templateID":"base"}`)
	h.handler.Auth = exhausted{h.auth}
	for name, heads := range map[string][]string{"the control API": nil, "the agent": toEnvd(id, "cayt_x")} {
		if r := h.send("GET", "/sandboxes", "", heads...); len(heads) == 0 &&
			(r.status != 429 || r.json["error_code"] != fault.CodeTooManyAttempts || r.header.Get("Retry-After") == "") {
			t.Errorf("%s: %d %v %s", name, r.status, r.header, r.body)
		}
		if r := h.send("GET", "/envs", "", heads...); len(heads) > 0 && r.status != 429 {
			t.Errorf("%s: %d %s", name, r.status, r.body)
		}
	}
	h.play(nil)
	if r := h.send("GET", "/envs", "", toEnvd(id, token)...); r.status != 204 {
		t.Errorf("with a token: %d %s", r.status, r.body)
	}
	if r := h.control("GET", "/sandboxes", ""); r.status != 200 {
		t.Errorf("with a key: %d %s", r.status, r.body)
	}
}

// exhausted is an Auth that has no attempts left for any address.
type exhausted struct{ Auth }

func (exhausted) Failed(string) error {
	return fault.New(fault.Exhausted, fault.CodeTooManyAttempts, "no").After(time.Second)
}

// stream opens a stream to the agent, which answers one line and then waits.
func (h *harness) stream(id, token string) *bufio.Reader {
	h.t.Helper()
	h.play(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		fmt.Fprintln(w, "started")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})
	r, err := http.NewRequestWithContext(h.t.Context(), "POST", h.url+"/process.Process/Start", strings.NewReader("{}"))
	if err != nil {
		h.t.Fatal(err)
	}
	heads := toEnvd(id, token)
	for i := 0; i < len(heads); i += 2 {
		r.Header.Set(heads[i], heads[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { resp.Body.Close() })
	out := bufio.NewReader(resp.Body)
	if line, err := out.ReadString('\n'); err != nil || line != "started\n" {
		h.t.Fatalf("the stream begins %q, %v", line, err)
	}
	return out
}

// TestStreamsBreak checks that the streams of a sandbox that goes away break, and do not end in
// order, after the row says that it has gone.
func TestStreamsBreak(t *testing.T) {
	h := newHarness(t)
	for name, end := range map[string]func(id string){
		"kill": func(id string) {
			if r := h.control("DELETE", "/sandboxes/"+id, ""); r.status != 204 {
				t.Errorf("kill: %d", r.status)
			}
		},
		"pause": func(id string) {
			if r := h.control("POST", "/sandboxes/"+id+"/pause", `{"memory":true}`); r.status != 204 {
				t.Errorf("pause: %d %s", r.status, r.body)
			}
		},
		"the end of its time": func(id string) {
			if r := h.control("POST", "/sandboxes/"+id+"/timeout", `{"timeout":0}`); r.status != 204 {
				t.Errorf("timeout: %d %s", r.status, r.body)
			}
		},
		"shutdown": func(string) { h.handler.Hangup() }, // must be the last
	} {
		if name == "shutdown" {
			continue
		}
		id, token := h.create(`{"templateID":"base"}`)
		out := h.stream(id, token)
		gone := make(chan answer, 1)
		broke := make(chan error, 1)
		go func() {
			_, err := io.ReadAll(out)
			broke <- err
			gone <- h.send("GET", "/health", "", toEnvd(id, token)...)
		}()
		end(id)
		select {
		case err := <-broke:
			if !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s: the stream ended with %v", name, err)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: the stream goes on", name)
		}
		if r := <-gone; r.status != 502 || r.json["sandboxId"] != id {
			t.Errorf("%s: health is %d %s", name, r.status, r.body)
		}
	}
	id, token := h.create(`{"templateID":"base"}`)
	out := h.stream(id, token)
	h.handler.Hangup()
	if _, err := io.ReadAll(out); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("shutdown: the stream ended with %v", err)
	}
}

// TestCallersThatLeave checks that a call whose caller leaves, or never finishes sending, ends and
// releases its lease.
func TestCallersThatLeave(t *testing.T) {
	h := newHarness(t)
	id, token := h.create(`{"templateID":"base"}`)
	begun, left := make(chan struct{}, 1), make(chan struct{}, 1)
	h.play(func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
			t.Error(err)
		}
		fmt.Fprintln(w, "started")
		_ = http.NewResponseController(w).Flush()
		begun <- struct{}{}
		_, _ = io.Copy(io.Discard, r.Body) // half a message, and then the end of the connection
		<-r.Context().Done()
		left <- struct{}{}
	})
	conn, err := net.Dial("tcp", strings.TrimPrefix(h.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST /process.Process/Start HTTP/1.1\r\nHost: x\r\n%s: %s\r\n%s: 49983\r\nX-Access-Token: %s\r\n"+
		"Transfer-Encoding: chunked\r\n\r\n3\r\n\x00\x00\x00\r\n", idHeader, id, portHeader, token)
	<-begun
	if n := h.sandboxes.InUse(); n != 1 {
		t.Errorf("%d leases while a call goes on", n)
	}
	conn.Close()
	<-left
	for end := time.Now().Add(10 * time.Second); h.sandboxes.InUse() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the lease is held for ever")
		}
	}
}

// TestIncompleteBodies checks that a caller that does not send its announced body gets an
// error about that, not an internal one.
func TestIncompleteBodies(t *testing.T) {
	h := newHarness(t)
	id, token := h.create(`{"templateID":"base"}`)
	h.play(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		panic(http.ErrAbortHandler)
	})
	for name, head := range map[string]string{
		"to the agent":       fmt.Sprintf("POST /files?path=x HTTP/1.1\r\nHost: x\r\n%s: %s\r\n%s: 49983\r\nX-Access-Token: %s\r\n", idHeader, id, portHeader, token),
		"to the control API": "POST /v2/sandboxes HTTP/1.1\r\nHost: x\r\nX-API-Key: " + h.key + "\r\n",
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(h.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "%sContent-Length: 100\r\n\r\n{\"templateID\":", head)
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != 400 {
			t.Errorf("%s: %+v, %v", name, resp, err)
		}
		conn.Close()
	}
}

func TestTrafficWakes(t *testing.T) {
	h := newHarness(t)
	ctx := context.Background()
	id, token := h.create(`{"templateID":"base","autoPause":true,"autoResume":{"enabled":true}}`)
	quiet, quietToken := h.create(`{"templateID":"base","autoPause":true}`)
	for _, id := range []string{id, quiet} {
		if r := h.control("POST", "/sandboxes/"+id+"/pause", `{}`); r.status != 204 {
			t.Fatalf("pause: %d", r.status)
		}
	}
	if r := h.send("GET", "/health", "", toEnvd(id, token)...); r.status != 502 {
		t.Errorf("health: %d", r.status)
	}
	if r := h.send("GET", "/envs", "", toEnvd(id, "wrong")...); r.status != 401 || h.row(id).State != sandbox.Suspended {
		t.Errorf("without a token: %d, %s", r.status, h.row(id).State)
	}
	if r := h.send("GET", "/envs", "", toEnvd(id, token)...); r.status != 204 || h.row(id).State != sandbox.Running {
		t.Errorf("with one: %d %s, %s", r.status, r.body, h.row(id).State)
	}
	for _, c := range []struct {
		path, port string
		use        sandbox.Cause
	}{
		{"/process.Process/List", "49983", sandbox.ForProcess},
		{"/filesystem.Filesystem/Stat", "49983", sandbox.ForFiles},
		{"/", "8080", sandbox.ForPort},
	} {
		if r := h.control("POST", "/sandboxes/"+id+"/pause", `{}`); r.status != 204 {
			t.Fatalf("pause: %d", r.status)
		}
		h.send("GET", c.path, "", append(toEnvd(id, token), portHeader, c.port)...)
		last, _, err := h.sandboxes.Events(ctx, h.org.Org.ID, sandbox.ID(idPrefix+id), 1, "")
		if err != nil || last[0].To != sandbox.Running || last[0].Reason != string(c.use) {
			t.Errorf("GET %s wakes with the event %+v, %v, want the reason %s", c.path, last, err, c.use)
		}
	}
	if r := h.send("GET", "/envs", "", toEnvd(quiet, quietToken)...); r.status != 502 ||
		h.row(quiet).State != sandbox.Suspended {
		t.Errorf("one that is not to wake: %d, %s", r.status, h.row(quiet).State)
	}
	// A persistent sandbox of the v1 API wakes for any call, as it does there. An ephemeral one
	// keeps its settings, and needs a token.
	sb, err := h.sandboxes.Create(ctx, sandbox.Caller{OrgID: h.org.Org.ID},
		sandbox.Request{Template: "base", Mode: "persistent"}, sandbox.Once{}, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.sandboxes.Suspend(ctx, h.org.Org.ID, sb.ID, sandbox.KeepAll); err != nil {
		t.Fatal(err)
	}
	if r := h.send("GET", "/envs", "", toEnvd(shown(sb.ID), h.handler.token(envdToken, sb.ID))...); r.status != 204 {
		t.Errorf("a persistent one: %d %s", r.status, r.body)
	}
	if r := h.control("POST", "/sandboxes/"+shown(sb.ID)+"/timeout", `{"timeout":10}`); r.status != 409 {
		t.Errorf("the timeout of a persistent one: %d %s", r.status, r.body)
	}
	if r := h.control("POST", "/v2/sandboxes/"+shown(sb.ID)+"/connect", `{}`); r.status != 200 {
		t.Errorf("connecting to a persistent one: %d %s", r.status, r.body)
	}
}

func TestBrowsersMayCall(t *testing.T) {
	h := newHarness(t)
	id, _ := h.create(`{"templateID":"base"}`)
	for name, heads := range map[string][]string{
		"by headers": {"Access-Control-Request-Headers", "e2b-sandbox-id,e2b-sandbox-port,x-access-token"},
		"by host":    {"Host", "49983-" + id + ".example.com"},
	} {
		r := h.send("OPTIONS", "/process.Process/List", "",
			append(heads, "Origin", "https://page.example", "Access-Control-Request-Method", "POST")...)
		if r.status != 204 || r.header.Get("Access-Control-Allow-Origin") != "*" {
			t.Errorf("%s: %d %v", name, r.status, r.header)
		}
	}
	if r := h.send("OPTIONS", "/v1/sandboxes", "", "Origin", "https://page.example", "Access-Control-Request-Method",
		"POST"); r.status != http.StatusTeapot {
		t.Errorf("v1 is the other handler's: %d", r.status)
	}
}

// BenchmarkSearchOfASignature searches ten thousand living sandboxes for one whose token made a signature,
// and finds none.
func BenchmarkSearchOfASignature(b *testing.B) {
	db, err := store.Open(b.Context(), filepath.Join(b.TempDir(), "cay.db"))
	if err != nil {
		b.Fatal(err)
	}
	defer db.Close()
	const living = 10_000
	for i := range living {
		sb := sandbox.Sandbox{ID: sandbox.ID(fmt.Sprintf("sbx_%020d", i)), OrgID: "org", State: sandbox.Creating,
			Mode: sandbox.Ephemeral, CreatedAt: time.Now(), AtEnd: sandbox.EndDestroys}
		if _, _, err := db.Insert(b.Context(), sb, sandbox.Quota{}, sandbox.Once{}); err != nil {
			b.Fatal(err)
		}
	}
	s := &Handler{Config: Config{Secret: []byte("0123456789abcdef")}}
	q := url.Values{"path": {"/home/user/x"}, "username": {"user"}}
	q.Set("signature", agentapi.Signature("GET", q, strings.Repeat("0", 45)))
	for b.Loop() {
		signed, err := agentapi.ReadSigned("GET", q)
		if err != nil {
			b.Fatal(err)
		}
		ids, err := db.Living(b.Context())
		if err != nil || len(ids) != living {
			b.Fatal(len(ids), err)
		}
		if id, found := s.signer(signed, ids); found {
			b.Fatal(id)
		}
	}
}
