package api

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// invalid fails the test unless err is nil or blames the caller.
func invalid(t *testing.T, err error) {
	t.Helper()
	if err != nil && !fault.Is(err, fault.Invalid) {
		t.Fatalf("%v is not Invalid", err)
	}
}

// FuzzBody checks that decoding any body gives a request or an error that blames the caller.
func FuzzBody(f *testing.F) {
	for _, seed := range []string{
		``, `{}`, `null`, `[1]`, `{"template":"python","egress":{"mode":"deny_all","allow_cidrs":["10.0.0.0/8",null],"allow_ports":[1e400]}}`,
		`{"template":"a","env":{"A":"1","A":"2"},"metadata":{"0":[]},"disk_size_mb":-0.0}`, `{"command":"\ud800","args":[{}],"timeout":"1h"}`,
		"{\"name\":\"\xff\"}", `{"quota":{"vcpus":9223372036854775808}}`, strings.Repeat(`{"egress":`, 200), `{"scopes":["exec"],"expires_in":"-1ns"}`,
		`{"template":"a","mode":"persistent","idle_timeout":0,"recovery_interval":"0"}`, `{"idle_timeout":-0,"recovery_interval":0e9}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var create CreateSandboxRequest
		err := decode(b, &create)
		invalid(t, err)
		if err == nil {
			_, err = requestOf(create)
			invalid(t, err)
			r := httptest.NewRequest("POST", "/", nil)
			r.Header.Set("Idempotency-Key", "k")
			once, err := onceOf(r, b)
			if err != nil || len(once.Hash) != 64 {
				t.Fatalf("hashing a decoded body: %q, %v", once.Hash, err)
			}
			padded, err := onceOf(r, append([]byte(" \n"), b...))
			if err != nil || padded != once {
				t.Fatalf("white space changes the hash: %v, %v", padded, err)
			}
		}
		var execute ExecuteRequest
		if err = decode(b, &execute); err == nil {
			_, err = commandOf(execute)
		}
		invalid(t, err)
		for _, dst := range []any{new(KeepaliveRequest), new(Egress), new(CreateAPIKeyRequest), new(CreateOrgRequest),
			new(nothing)} {
			invalid(t, decode(b, dst))
		}
	})
}

func FuzzDuration(f *testing.F) {
	for _, seed := range []string{"", "0", "30s", "1h30m", "-5m", "1e3s", "9999999999h", "١s", " 1s", "1.5h", ".s"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		d, err := duration("timeout", &text)
		invalid(t, err)
		if err == nil {
			if again, err := duration("timeout", new(d.String())); err != nil || *again != *d {
				t.Fatalf("%q is %s, which reads as %v, %v", text, d, again, err)
			}
			if *d > 0 && seconds(*d) < 1 {
				t.Fatalf("%s shows as %d seconds", d, seconds(*d))
			}
		}
	})
}

func FuzzFileParameters(f *testing.F) {
	f.Add("/a/b", "0644")
	f.Add("/a/../b", "7777")
	f.Add("", "-1")
	f.Add("/\x00", "0o17")
	f.Add("/./.", "00000")
	f.Fuzz(func(t *testing.T, path, mode string) {
		m, err := fileMode(mode)
		invalid(t, err)
		if err == nil && m.Perm() != m {
			t.Fatalf("mode %q is %o", mode, m)
		}
		err = checkNotRoot(path)
		invalid(t, err)
		if err == nil && (path[0] != '/' || strings.ContainsRune(path, 0) || strings.Contains(path+"/", "/../") ||
			strings.Trim(path, "/.") == "" && !strings.Contains(path, "...")) {
			t.Fatalf("path %q passes", path)
		}
	})
}

// FuzzRequest checks that no query, path or body causes an internal error, and that every answer is
// a success or a problem.
func FuzzRequest(f *testing.F) {
	h := newTestServer(f)
	h.agent.fail = fault.New(fault.NotFound, fault.CodeFileNotFound, "no such file")
	handler := New(Config{Rows: h.sandboxes, Sandboxes: h.sandboxes, Auth: h.auth, Agent: h.agent,
		Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry(), Version: "fuzz"})
	sbx := as[Sandbox](f, http.StatusCreated,
		h.send(f, "POST", "/v1/sandboxes", h.key, `{"template":"python","mode":"persistent"}`)).ID
	for i, seed := range []string{
		"limit=5&cursor=x", "status=running&status=x", "metadata.=x&metadata.a%00=%ff", "path=/a&mode=0644", "path=%2f..%2f&depth=3", "wait=1;wait=2",
		"cursor=" + url.QueryEscape("c1_AAAA"), "%zz", "a=b&&&=", "path=/a&recursive=TRUE",
	} {
		f.Add(uint8(i), seed, "", `{"template":"python"}`)
		f.Add(uint8(i+7), seed, "/files/../%2e", `{"command":"id"}`)
	}
	methods := []string{"GET", "POST", "PUT", "DELETE", "HEAD", "PATCH"}
	suffixes := []string{"", "/files", "/files/list", "/events", "/execute", "/keepalive", "/egress", "/suspend", "/wake",
		"/checkpoint"}
	f.Fuzz(func(t *testing.T, which uint8, query, path, body string) {
		target := "/v1/sandboxes/" + sbx + suffixes[int(which)%len(suffixes)]
		if which&1 == 0 {
			target = "/v1/sandboxes"
		}
		u := &url.URL{Path: target + path, RawQuery: query}
		r := httptest.NewRequest(methods[int(which/8)%len(methods)], "/", strings.NewReader(body))
		r.URL = u
		r.Header.Set("Authorization", "Bearer "+h.key)
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		if w.Code >= 500 && w.Code != http.StatusNotImplemented {
			t.Fatalf("%s %s: %d %s", r.Method, u, w.Code, w.Body)
		}
		if w.Code >= 400 && w.Header().Get("Content-Type") != "application/problem+json" {
			t.Fatalf("%s %s: the answer %d %s is not a problem", r.Method, u, w.Code, w.Body)
		}
		if w.Code == http.StatusCreated { // destroy it, so that the quota does not end the test
			if err := h.sandboxes.Destroy(t.Context(), h.org.Org.ID,
				sandbox.ID(strings.TrimPrefix(w.Header().Get("Location"), "/v1/sandboxes/"))); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func FuzzCursor(f *testing.F) {
	h := newTestServer(f)
	sbx := h.newSandbox(f).ID
	f.Add("")
	f.Add("x")
	page, next, err := h.auth.ListOrgs(f.Context(), h.org, 1, "")
	if err != nil || len(page) != 1 {
		f.Fatal(page, err)
	}
	f.Add(next)
	f.Fuzz(func(t *testing.T, cursor string) {
		q := "?" + url.Values{"cursor": {cursor}}.Encode()
		for _, path := range []string{"/v1/sandboxes", "/v1/sandboxes/" + sbx + "/events", "/v1/templates", "/v1/api-keys",
			"/v1/orgs"} {
			if r := h.send(t, "GET", path+q, h.key, ""); r.status != 200 && r.status != 400 {
				t.Fatalf("%s%s: %d %s", path, q, r.status, r.body)
			}
		}
	})
}
