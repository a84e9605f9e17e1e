package portproxy

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"slices"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/fault"
)

// originHeaders are headers with an effect beyond the pages of the server that sends them.
var originHeaders = map[string]string{
	"Set-Cookie": "a=b; Path=/", "Set-Cookie2": "a=b", "Service-Worker-Allowed": "/", "Clear-Site-Data": `"*"`,
	"Strict-Transport-Security": "max-age=31536000; includeSubDomains", "Alt-Svc": `h3=":666"`, "Public-Key-Pins": "x", "Expect-CT": "x",
	"NEL": `{"report_to":"a","max_age":9,"include_subdomains":true}`, "Report-To": `{"group":"a"}`, "Reporting-Endpoints": `a="https://x/"`,
	"Access-Control-Allow-Credentials": "true", "WWW-Authenticate": "Negotiate", "Proxy-Authenticate": "Basic", "Accept-CH": "x",
	"Origin-Agent-Cluster": "?1", "Use-As-Dictionary": `match="/*"`, "Secure-Session-Registration": "x", "Set-Login": "logged-in",
}

// apart lists the headers that stay if the port has an origin of its own; a cookie loses its
// Domain.
var apart = []string{"Set-Cookie", "Service-Worker-Allowed", "Reporting-Endpoints", "Access-Control-Allow-Credentials",
	"WWW-Authenticate",
	"Accept-CH", "Origin-Agent-Cluster", "Use-As-Dictionary", "Secure-Session-Registration", "Set-Login", "Proxy-Authenticate"}

// wild answers with all originHeaders, before, in and after its answer.
func wild(w http.ResponseWriter, _ *http.Request) {
	for name, value := range originHeaders {
		w.Header().Set(name, value)
	}
	w.WriteHeader(http.StatusEarlyHints)
	w.Header().Set("Content-Type", "text/html")
	w.Header().Set("Content-Security-Policy", "default-src *")
	w.Header().Set("Referrer-Policy", "unsafe-url")
	w.Header().Set("Trailer", "Set-Cookie, X-Sum")
	fmt.Fprint(w, "<p>")
	w.Header().Set("Set-Cookie", "late=1; Domain=example.com")
	w.Header().Set("X-Sum", "1")
	for name, value := range originHeaders {
		w.Header().Set(http.TrailerPrefix+name, value)
	}
}

// heads holds the parts of an answer other than its body.
type heads struct {
	early, final, late http.Header
}

func (d *door) heads(t *testing.T, path string) heads {
	t.Helper()
	var got heads
	r, err := http.NewRequest("GET", d.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r = r.WithContext(httptrace.WithClientTrace(t.Context(),
		&httptrace.ClientTrace{Got1xxResponse: func(_ int, h textproto.MIMEHeader) error {
			got.early = http.Header(h)
			return nil
		}}))
	resp, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatal(err)
	}
	got.final, got.late = resp.Header, resp.Trailer
	return got
}

// TestSharedOrigin has a server inside that answers with every header that speaks for an origin.
func TestSharedOrigin(t *testing.T) {
	d := newDoor(t, http.HandlerFunc(wild), Destination{Path: "/", Prefix: "/out", Shared: true})
	got := d.heads(t, "/out/")
	for name := range originHeaders {
		for where, h := range map[string]http.Header{"early": got.early, "final": got.final, "late": got.late} {
			if v := h.Get(name); v != "" {
				t.Errorf("%s: %s: %s passes", where, name, v)
			}
		}
	}
	policies := got.final.Values("Content-Security-Policy")
	if len(policies) != 2 || policies[0] != "default-src *" || !strings.HasPrefix(policies[1], "sandbox ") ||
		strings.Contains(policies[1], "allow-same-origin") {
		t.Errorf("the policies are %q", policies)
	}
	if got.final.Get("Referrer-Policy") != "no-referrer" || got.late.Get("X-Sum") != "1" {
		t.Errorf("the answer has %v, and after it %v", got.final, got.late)
	}
	for name, edit := range map[string]func(*http.Request){
		"service worker": func(r *http.Request) { r.Header.Set("Service-Worker", "script") },
		"destination":    func(r *http.Request) { r.Header.Set("Sec-Fetch-Dest", "serviceworker") },
	} {
		if resp, _ := d.get(t, "/out/sw.js", edit); resp.StatusCode != http.StatusTeapot {
			t.Errorf("%s: %s", name, resp.Status)
		} else if err := <-d.errs; !fault.Is(err, fault.Denied) || fault.As(err).Code != fault.CodeServiceWorkerRefused {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestOwnOrigin has the same server at a host name of the port's own.
func TestOwnOrigin(t *testing.T) {
	d := newDoor(t, http.HandlerFunc(wild), Destination{})
	got := d.heads(t, "/")
	for name := range originHeaders {
		for where, h := range map[string]http.Header{"early": got.early, "final": got.final, "late": got.late} {
			if where == "final" && slices.Contains(apart, name) && name != "Proxy-Authenticate" { // it concerns one hop only
				if h.Get(name) == "" {
					t.Errorf("%s is gone", name)
				}
			} else if v := h.Get(name); v != "" && !slices.Contains(apart, name) {
				t.Errorf("%s: %s: %s passes", where, name, v)
			}
		}
	}
	if v := got.late.Get("Set-Cookie"); strings.Contains(strings.ToLower(v), "domain") {
		t.Errorf("a cookie for others comes late: %s", v)
	}
	if len(got.final.Values("Content-Security-Policy")) != 1 || got.final.Get("Referrer-Policy") != "unsafe-url" {
		t.Errorf("the answer has %v", got.final)
	}
	if signed := d.heads(t, "/?"+TokenParam+"=x"); signed.final.Get("Referrer-Policy") != "no-referrer" {
		t.Errorf("at a signed address the answer has %v", signed.final)
	}
	if resp, _ := d.get(t, "/sw.js",
		func(r *http.Request) { r.Header.Set("Service-Worker", "script") }); resp.StatusCode != 200 {
		t.Errorf("a service worker of its own origin: %s", resp.Status)
	}
}

// TestUpgradesAreCleaned has an upgrade answered with all originHeaders.
func TestUpgradesAreCleaned(t *testing.T) {
	d := newDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		var head bytes.Buffer
		for name, value := range originHeaders {
			fmt.Fprintf(&head, "%s: %s\r\n", name, value)
		}
		fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n%s\r\n", &head)
	}), Destination{Shared: true})
	conn, err := net.Dial("tcp", strings.TrimPrefix(d.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%+v, %v", resp, err)
	}
	for name := range originHeaders {
		if v := resp.Header.Get(name); v != "" {
			t.Errorf("%s: %s passes", name, v)
		}
	}
}

func TestCookiesAreForOneHost(t *testing.T) {
	for cookie, want := range map[string]string{
		"a=b": "a=b",
		"a=b; Path=/x; Domain=example.com; Secure; HttpOnly; SameSite=Lax": "a=b; Path=/x; Secure; HttpOnly; SameSite=Lax",
		"a=b;domain=.example.com":                        "a=b",
		"a=b; \tDOMAIN \t= example.com ;Max-Age=5":       "a=b; Max-Age=5",
		"a=Domain=x; Expires=Thu, 01 Jan 2037 0:0:0 GMT": "a=Domain=x; Expires=Thu, 01 Jan 2037 0:0:0 GMT",
		"a=b; \"Domain\"=x; Unknown; Partitioned":        "a=b; Partitioned",
		"":          "",
		";Domain=x": "",
	} {
		if got := hostOnly(cookie); got != want {
			t.Errorf("%q becomes %q, want %q", cookie, got, want)
		}
	}
}
