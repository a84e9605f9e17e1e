package api

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
)

// TestStrangersAreLimited tries all calls without a valid key from one address. A caller with a
// valid key at the same address must not be limited.
func TestStrangersAreLimited(t *testing.T) {
	const burst = 8
	for name, try := range map[string]func(h *testServer, sbx Sandbox) reply{
		"no key":        func(h *testServer, _ Sandbox) reply { return h.send(t, "GET", "/v1/me", "", "") },
		"a made-up key": func(h *testServer, _ Sandbox) reply { return h.send(t, "GET", "/v1/me", aKey, "") },
		"no such route": func(h *testServer, _ Sandbox) reply { return h.send(t, "GET", "/v1/nothing", "", "") },
		"a private port": func(h *testServer, sbx Sandbox) reply {
			return h.visit(t, "GET", hostOf(sbx.ID, 8080)+"/")
		},
		"a made-up signature": func(h *testServer, sbx Sandbox) reply {
			return h.visit(t, "GET", portproxy.Path(sbx.ID, 8080)+"/?cay_token=cays_x")
		},
		"the document": func(h *testServer, _ Sandbox) reply { return h.send(t, "GET", "/openapi.yaml", "", "") },
	} {
		h := newTestServer(t, func(a *auth.Config, _ *sandbox.Config, c *Config) {
			a.FailedRate, a.FailedBurst = 0.01, burst
			c.Names = portproxy.Names{Domain: testDomain, Scheme: "http"}
		})
		sbx := h.newSandbox(t)
		for i := range burst {
			if r := try(h, sbx); r.status != 401 && r.status != 200 {
				t.Fatalf("%s, %d: %d %s", name, i, r.status, r.body)
			}
		}
		r := try(h, sbx)
		if r.status != 429 || !strings.Contains(string(r.body), fault.CodeTooManyAttempts) ||
			r.header.Get("Retry-After") == "" {
			t.Errorf("%s: beyond the burst %d %v %s", name, r.status, r.header, r.body)
		}
		if r := h.send(t, "GET", "/v1/me", h.key, ""); r.status != 200 {
			t.Errorf("%s: a key from the same address: %d %s", name, r.status, r.body)
		}
		signed := hostOf(sbx.ID, 8080) + "/?cay_token=" + h.server.Signer.Sign(sbx.ID, 8080, time.Now().Add(time.Hour))
		if r := h.visit(t, "GET", signed); r.status != 303 {
			t.Errorf("%s: a signature from the same address: %d %s", name, r.status, r.body)
		}
		if r := h.send(t, "GET", "/healthz", "", ""); r.status != 200 {
			t.Errorf("%s: healthz: %d", name, r.status)
		}
	}
}

const aKey = "cay_0123456789abcdef0123456789abcdef01234567"

// TestStrangersBodies checks how much the server reads from callers without a key that send without
// end.
func TestStrangersBodies(t *testing.T) {
	h := newTestServer(t)
	conn, err := net.Dial("tcp", strings.TrimPrefix(h.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "PUT /v1/sandboxes/sbx_aaaaaaaaaaaaaaaaaaaa/files?path=/a HTTP/1.1\r\n"+
		"Host: x\r\nContent-Length: %d\r\n\r\n", 100<<20)
	sent := 0
	for piece := make([]byte, 64<<10); sent < 100<<20; {
		n, err := conn.Write(piece)
		if sent += n; err != nil {
			break
		}
	}
	// The server reads 1 MiB. The kernel's buffers at both ends hold some more.
	if sent > 1<<20+32<<20 {
		t.Errorf("%d bytes were read from a caller without a key", sent)
	}
}

// TestHeadersAreBounded sends a head that is larger than any call needs.
func TestHeadersAreBounded(t *testing.T) {
	h := newTestServer(t)
	for path, want := range map[string]int{strings.Repeat("x", 57<<10): 431, strings.Repeat("x", 20<<10): 401} {
		r := h.visit(t, "GET", "/v1/"+path)
		if r.status != want {
			t.Errorf("a path of %d bytes: %d", len(path), r.status)
		}
	}
	if n := len(h.log.String()); n > 4000 {
		t.Errorf("the log has %d bytes of it", n)
	}
}

// TestOwnAnswersAreNoPages checks that answers on the API's origin with content that strangers
// wrote have types and policies under which no browser runs them.
func TestOwnAnswersAreNoPages(t *testing.T) {
	h := newTestServer(t)
	sbx := h.newSandbox(t)
	if r := h.send(t, "PUT", "/v1/sandboxes/"+sbx.ID+"/files?path=/page.html", h.key,
		"<script>1</script>"); r.status != 204 {
		t.Fatalf("upload: %d %s", r.status, r.body)
	}
	for _, path := range []string{"/v1/sandboxes/" + sbx.ID, "/v1/sandboxes/" + sbx.ID + "/files?path=/page.html",
		"/v1/sandboxes/" + sbx.ID + "/events",
		"/v1/templates/python/logs", "/v1/nothing", "/openapi.yaml"} {
		r := h.send(t, "GET", path, h.key, "")
		if p := r.header.Get("Content-Security-Policy"); !strings.HasPrefix(p, "default-src 'none'") ||
			!strings.HasSuffix(p, "sandbox") ||
			r.header.Get("X-Content-Type-Options") != "nosniff" || r.header.Get("Referrer-Policy") != "no-referrer" ||
			strings.Contains(r.header.Get("Content-Type"), "html") {
			t.Errorf("%s: %d %v", path, r.status, r.header)
		}
		if strings.Contains(path, "page.html") && (r.status != 200 || r.header.Get("Content-Disposition") != "attachment") {
			t.Errorf("%s: %d %v", path, r.status, r.header)
		}
	}
}

// TestPortByPathIsConfined checks the answers of ports through the whole server. The tests of
// portproxy check what the proxy removes from answers.
func TestPortByPathIsConfined(t *testing.T) {
	h := newPortServer(t)
	sbx := h.newSandbox(t)
	key := header("Authorization", "Bearer "+h.key)
	if r := h.visit(t, "GET", portproxy.Path(sbx.ID, 8080)+"/",
		key); !strings.HasPrefix(r.header.Get("Content-Security-Policy"), "sandbox ") ||
		len(r.header.Values("Content-Security-Policy")) != 1 {
		t.Errorf("by path: %d %v", r.status, r.header)
	}
	if r := h.visit(t, "GET", hostOf(sbx.ID, 8080)+"/",
		key); r.header.Get("Content-Security-Policy")+r.header.Get("Referrer-Policy") != "" {
		t.Errorf("by host: %d %v", r.status, r.header)
	}
	for target, want := range map[string]string{
		portproxy.Path(sbx.ID, 8080) + "/sw.js":                  "403 service_worker_refused",
		portproxy.Path(sbx.ID, 8080) + "/a/" + aKey:              "400 secret_in_path",
		hostOf(sbx.ID, 8080) + "/" + aKey[:4] + "%30" + aKey[5:]: "400 secret_in_path",
	} {
		r := h.visit(t, "GET", target, key, func(r *http.Request) {
			if strings.HasSuffix(target, "sw.js") {
				r.Header.Set("Service-Worker", "script")
			}
		})
		if status, code, _ := strings.Cut(want, " "); fmt.Sprint(r.status) != status ||
			!strings.Contains(string(r.body), code) || r.header.Get("X-Request-Id") == "" {
			t.Errorf("%s: %d %s, want %s", target, r.status, r.body, want)
		}
	}
	h.released(t)
}
