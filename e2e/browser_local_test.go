package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
)

// TestLocalHostNames opens a page of a sandbox below localhost in a real browser, on a server whose
// domain is localhost. The page has an origin and a site of its own, which its neighbours and the API do not
// share.
func TestLocalHostNames(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	s.web(id)
	for _, port := range []int{webPort, openPort} {
		if p, err := s.api().SetPortPublic(t.Context(), id, port, true); err != nil ||
			!strings.HasPrefix(p.URL, s.url+"/v1/") { // not every client resolves names below localhost
			t.Fatalf("%s, %v", jsonOf(p), err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	b := openPage(t, ctx, "about:blank")
	_, port, _ := strings.Cut(strings.TrimPrefix(s.url, "http://"), ":")
	host := func(inside int) string {
		return fmt.Sprintf("http://%d-%s.localhost:%s", inside, strings.TrimPrefix(id, "sbx_"), port)
	}
	own, sibling, api := host(webPort), host(openPort), "http://localhost:"+port
	for _, address := range []string{s.url, api} {
		b.call("Network.setCookie", object{"url": address, "name": "session", "value": "ours"}, &object{})
	}
	s.serve(id, "own",
		"<!doctype html><script>localStorage.x = 'kept'; document.cookie = 'tossed=1; domain=localhost'</script>",
		[2]string{"Content-Type", "text/html"}, [2]string{"Set-Cookie", "own=1; Path=/; Domain=localhost"})
	b.open(own + "/page?own")
	if got := b.run("self.origin + localStorage.x"); got != own+"kept" {
		t.Errorf("a page at its own origin gives %s", got)
	}
	for address, want := range map[string]string{own: "own=1", sibling: "", api: "session=ours", s.url: "session=ours"} {
		if got := strings.Join(b.cookies(address), " "); got != want {
			t.Errorf("%s has the cookies %q, want %q", address, got, want)
		}
	}
	b.open(sibling + "/page?own")
	if got := b.run("Object.keys(localStorage).length + document.cookie"); got != "1own=1" {
		t.Errorf("the neighbour has %s", got) // only what its own page set
	}
	read := "await (await fetch('" + api + "/v1/sandboxes', {credentials: 'include'})).text()"
	if got := b.run(thrown(read)); got != "TypeError" {
		t.Errorf("a page reads the API: %s", got)
	}
}
