package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"
)

// serve makes the web server inside answer /page?NAME with the body and the headers.
func (s *server) serve(id, name, body string, headers ...[2]string) {
	s.t.Helper()
	text, err := json.Marshal(object{"headers": headers, "body": body})
	if err != nil {
		s.t.Fatal(err)
	}
	s.upload(id, "/tmp/"+name+".json", string(text))
}

// open opens a page in the browser.
func (b *browser) open(page string) {
	b.t.Helper()
	var reply struct {
		Error string `json:"errorText"`
	}
	b.call("Page.navigate", object{"url": page}, &reply)
	if reply.Error != "" {
		b.t.Fatalf("%s: %s", page, reply.Error)
	}
	want, err := json.Marshal(page)
	if err != nil {
		b.t.Fatal(err)
	}
	for b.run(fmt.Sprintf(`location.href === %s && document.readyState === "complete"`, want)) != "true" {
		if b.ctx.Err() != nil {
			b.t.Fatalf("%s did not open; the browser shows %s", page, b.run("location.href"))
		}
		time.Sleep(20 * time.Millisecond) // a poll with a deadline
	}
}

// cookies returns the names of the cookies that the browser would send to an address.
func (b *browser) cookies(address string) []string {
	b.t.Helper()
	var reply struct {
		Cookies []struct{ Name, Value, Domain string } `json:"cookies"`
	}
	b.call("Network.getCookies", object{"urls": []string{address}}, &reply)
	var names []string
	for _, c := range reply.Cookies {
		names = append(names, c.Name+"="+c.Value)
	}
	slices.Sort(names)
	return names
}

// TestPagesOfStrangers opens pages that a sandbox serves in a real browser. By path a page has the
// API's origin and must gain nothing from it. By host name it has an origin of its own, and must
// not reach its neighbours.
func TestPagesOfStrangers(t *testing.T) {
	onOneStore(t)
	s := sharedPorts(t)
	id := s.create(nil)
	defer s.destroy(id)
	s.web(id)
	for _, port := range []int{webPort, openPort} {
		s.setPublic(id, port, true)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	b := openPage(t, ctx, "about:blank", "--host-resolver-rules=MAP *."+portsZone+" 127.0.0.1")
	b.call("Network.setCookie", object{"url": s.url, "name": "session", "value": "ours"}, &object{})
	t.Run("by path", func(t *testing.T) { s.t, b.t = t, t; s.pagesByPath(id, b) })
	t.Run("by host", func(t *testing.T) { s.t, b.t = t, t; s.pagesByHost(id, b) })
	t.Run("files", func(t *testing.T) {
		s.t = t
		s.want(id, "echo '<script>1</script>' > /tmp/page.html")
		resp, _ := s.page("GET", "/v1/sandboxes/"+id+"/files?path=/tmp/page.html", nil)
		h := resp.Header
		if h.Get("Content-Type") != "application/octet-stream" || h.Get("X-Content-Type-Options") != "nosniff" ||
			!strings.HasPrefix(h.Get("Content-Disposition"), "attachment") ||
			!strings.Contains(h.Get("Content-Security-Policy"), "sandbox") {
			t.Errorf("a file comes with %v", h)
		}
	})
}

// grabs are response headers that would give a page power over the whole origin.
var grabs = [][2]string{
	{"Set-Cookie", "theirs=1; Path=/"}, {"Service-Worker-Allowed", "/"}, {"Clear-Site-Data", `"cookies", "storage"`},
	{"Content-Security-Policy", "sandbox allow-scripts allow-same-origin"}, {"Strict-Transport-Security", "max-age=9; includeSubDomains"},
}

func (s *server) pagesByPath(id string, b *browser) {
	base := s.url + portPath(id, webPort) + "/page?"
	s.serve(id, "sw", "self.onfetch = e => e.respondWith(new Response('taken over'))",
		append(grabs[1:2:2], [2]string{"Content-Type", "text/javascript"})...)
	for name, kind := range map[string][2]string{
		"html": {"text/html", "<!doctype html><title>t</title><script>var ran = true</script>"},
		"svg":  {"image/svg+xml", `<svg xmlns="http://www.w3.org/2000/svg"><script>var ran = true</script></svg>`},
		"xml":  {"application/xhtml+xml", `<html xmlns="http://www.w3.org/1999/xhtml"><script>var ran = true</script></html>`},
	} {
		s.serve(id, name, kind[1], append(grabs, [2]string{"Content-Type", kind[0]})...)
		b.open(base + name)
		for script, want := range map[string]string{
			"String(ran)":                    "true", // the page loads and its script runs
			"self.origin":                    "null",
			thrown("document.cookie"):        "SecurityError",
			thrown("localStorage.x = 1"):     "SecurityError",
			thrown("indexedDB.open('x')"):    "SecurityError",
			thrown("await caches.open('x')"): "SecurityError",
			thrown("await (await fetch('/healthz', {credentials: 'include'})).text()"):                           "TypeError",
			thrown("await (await fetch('/openapi.yaml')).text()"):                                                "TypeError",
			thrown("await navigator.serviceWorker.register(" + fmt.Sprintf("%q", base+"sw") + ", {scope: '/'})"): "refused",
		} {
			got := b.run(script)
			if want == "refused" && got != "nothing" {
				got = want
			}
			if got != want {
				s.t.Errorf("%s: %s gives %s, want %s", name, script, got, want)
			}
		}
	}
	if got := b.cookies(s.url); !slices.Equal(got, []string{"session=ours"}) {
		s.t.Errorf("the cookies of the API's origin are %q", got)
	}
	// Even a page of the API's own origin cannot register the script as a service worker.
	resp, body := s.page("GET", portPath(id, webPort)+"/page?sw", nil,
		func(r *http.Request) { r.Header.Set("Service-Worker", "script") })
	if resp.StatusCode != 403 || text(body, "code") != "service_worker_refused" {
		s.t.Errorf("the script of a service worker: %s %s", resp.Status, body)
	}
}

// thrown returns a script whose value is the name of the error that another script throws.
func thrown(script string) string {
	return "(async () => { try { " + script + "; return 'nothing' } catch (e) { return e.name } })()"
}

func (s *server) pagesByHost(id string, b *browser) {
	_, port, _ := strings.Cut(strings.TrimPrefix(s.url, "http://"), ":")
	own, sibling := "http://"+portHost(id, webPort)+":"+port, "http://"+portHost(id, openPort)+":"+port
	s.serve(id, "own", "<!doctype html><script>localStorage.x = 'kept'</script>", [2]string{"Content-Type", "text/html"},
		[2]string{"Set-Cookie", "own=1; Path=/"},
		[2]string{"Set-Cookie", "tossed=1; Path=/; Domain=" + portsZone},
		[2]string{"Set-Cookie", "again=1; path=/ ;  DOMAIN = ." + portsZone})
	b.open(own + "/page?own")
	if got := b.run("self.origin + localStorage.x"); got != own+"kept" {
		s.t.Errorf("a page at its own origin gives %s", got)
	}
	if got := b.cookies(own); !slices.Equal(got, []string{"again=1", "own=1", "tossed=1"}) {
		s.t.Errorf("the page's origin has the cookies %q", got)
	}
	if got := b.cookies(sibling); len(got) != 0 {
		s.t.Errorf("the page's neighbour has the cookies %q", got)
	}
	if got := b.cookies("http://" + portsZone + ":" + port); len(got) != 0 {
		s.t.Errorf("the parent domain has the cookies %q", got)
	}
	// The server inside must not see a signature that the browser sends in other headers.
	link, err := s.api().PortURL(context.Background(), id, openPort, time.Minute)
	if err != nil {
		s.t.Fatal(err)
	}
	signed, err := url.Parse(link.URL)
	if err != nil {
		s.t.Fatal(err)
	}
	v := s.asked("GET", portPath(id, webPort)+"/", nil, func(r *http.Request) {
		r.Header.Set("Referer", s.url+portPath(id, webPort)+"/?"+signed.RawQuery)
		r.Header.Set("X-Orig-Url", "/?"+signed.RawQuery)
	})
	if strings.Contains(fmt.Sprint(v), "cays_") {
		s.t.Errorf("the server inside got %+v", v)
	}
}
