package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// talk sends raw bytes and returns the statuses and bodies of the answers, until the server closes
// the connection or sends nothing for a while.
func (s *server) talk(send string) (answers []string) {
	s.t.Helper()
	conn := s.dial(send)
	defer conn.Close()
	in := bufio.NewReader(conn)
	for len(answers) < 10 {
		_ = conn.SetReadDeadline(time.Now().Add(time.Second)) // a later answer is missed, and fails no test
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			return answers
		}
		b, _ := io.ReadAll(resp.Body) // the part that was read counts
		resp.Body.Close()
		if resp.StatusCode >= 200 {
			answers = append(answers, fmt.Sprintf("%d %s", resp.StatusCode, b))
		}
	}
	return answers
}

// TestSmuggling sends requests to a port whose end two servers could see at different places. Other
// clients use the same port over kept connections and must get only their own answers.
func TestSmuggling(t *testing.T) {
	onOneStore(t)
	s := attacked(t)
	id := s.create(nil)
	defer s.destroy(id)
	s.web(id)
	base := portPath(id, webPort)
	// smuggled is the request that an attacker wants the server inside to see as a separate one.
	const smuggled = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
	head := "POST " + base + "/evil HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + s.key + "\r\n"
	attacks := map[string]string{
		"CL and TE":               head + fmt.Sprintf("Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n%s", len(smuggled)+5, smuggled),
		"TE and CL":               head + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n5c\r\n" + smuggled + "\r\n0\r\n\r\n",
		"two lengths":             head + "Content-Length: 0\r\nContent-Length: 38\r\n\r\n" + smuggled,
		"a list of lengths":       head + "Content-Length: 0, 38\r\n\r\n" + smuggled,
		"a length with a sign":    head + "Content-Length: +0\r\n\r\n" + smuggled,
		"TE of two":               head + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + smuggled,
		"TE unknown":              head + "Transfer-Encoding: xchunked\r\nContent-Length: 0\r\n\r\n" + smuggled,
		"TE before the colon":     head + "Transfer-Encoding : chunked\r\nContent-Length: 38\r\n\r\n0\r\n\r\n" + smuggled,
		"TE with a tab":           head + "Transfer-Encoding:\tchunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + smuggled,
		"TE folded":               head + "Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n" + smuggled,
		"TE by Connection":        head + "Connection: Transfer-Encoding, Content-Length\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled,
		"a bare LF":               head + "X: y\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled,
		"a bare CR":               head + "X: y\rTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled,
		"chunks with a bare LF":   head + "Transfer-Encoding: chunked\r\n\r\n0\n\n" + smuggled,
		"a chunk size too large":  head + "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + smuggled,
		"a chunk size with 0x":    head + "Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n" + smuggled,
		"a long chunk extension":  head + "Transfer-Encoding: chunked\r\n\r\n1;" + strings.Repeat("a", 20_000) + "\r\nx\r\n0\r\n\r\n" + smuggled,
		"a trailer with a length": head + "Transfer-Encoding: chunked\r\nTrailer: Content-Length\r\n\r\n0\r\nContent-Length: 38\r\n\r\n" + smuggled,
		"a line in the path":      "GET " + base + "/a%0d%0aX:%20y HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + s.key + "\r\n\r\n",
		"a line in a header":      head + "X: a\r\n\tb: c\r\nContent-Length: 0\r\n\r\n",
		"GET with a body":         strings.Replace(head, "POST", "GET", 1) + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(smuggled), smuggled),
		"HTTP/1.0 with chunks":    strings.Replace(head, "HTTP/1.1", "HTTP/1.0", 1) + "Transfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n0\r\n\r\n" + smuggled,
		"Expect":                  head + fmt.Sprintf("Expect: 100-continue\r\nContent-Length: %d\r\n\r\n%s", len(smuggled), smuggled),
		"an upgrade to h2c":       head + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\nContent-Length: 0\r\n\r\n" + smuggled,
	}
	stop := make(chan struct{})
	var bystanders sync.WaitGroup
	for who := range 3 {
		bystanders.Go(func() {
			client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 1}}
			defer client.CloseIdleConnections()
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				mark := fmt.Sprintf("/bystander-%d-%d", who, n)
				r, err := http.NewRequest("GET", s.url+base+mark, nil)
				if err != nil {
					t.Error(err)
					return
				}
				r.Header.Set("Authorization", "Bearer "+s.key)
				resp, err := client.Do(r)
				if err != nil {
					t.Errorf("%s: %v", mark, err)
					return
				}
				b, _ := io.ReadAll(resp.Body) // the part that was read counts
				resp.Body.Close()
				if resp.StatusCode != 200 || text(b, "path") != mark {
					t.Errorf("%s is answered %d %s", mark, resp.StatusCode, b)
				}
			}
		})
	}
	var attackers sync.WaitGroup
	for name, attack := range attacks {
		attackers.Go(func() {
			for range 2 {
				for i, answer := range s.talk(attack) {
					// A request that the attacker put behind the first one goes to this server, which refuses it
					// without a key.
					if strings.Contains(answer, `"path": "/smuggled"`) || i > 0 && strings.HasPrefix(answer, "200") {
						t.Errorf("%s: answer %d is %.300s", name, i+1, answer)
					}
				}
			}
		})
	}
	attackers.Wait()
	close(stop)
	bystanders.Wait()
	// A server inside sends more than the answer. The rest that is left on the connection must reach
	// no other client.
	s.want(id, `cat >/tmp/liar.py <<'END'
import socket, threading
l = socket.socket(); l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); l.bind(("127.0.0.1", 8090)); l.listen(50)
def serve(c):
    while True:
        d = c.recv(65536)
        if not d: return
        path = d.split(b" ")[1]
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(path), path)
        c.sendall(answer + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
while True: threading.Thread(target=serve, args=(l.accept()[0],), daemon=True).start()
END
nohup python3 /tmp/liar.py >/dev/null 2>&1 & sleep 1`)
	at(8, func(who int) {
		for n := range 20 {
			mark := fmt.Sprintf("/asked-%d-%d", who, n)
			if resp, b := s.page("GET", portPath(id, 8090)+mark, nil); resp.StatusCode == 200 && string(b) != mark {
				t.Errorf("%s is answered %s", mark, b)
			}
		}
	})
	// Python's http.server does not read the body of a GET, and takes it for the next request.
	s.want(id, `mkdir -p /srv/naive/own && cd /srv/naive && echo theirs >smuggled && for i in 0 1 2 3; do echo $i >own/$i; done
		nohup python3 -m http.server --protocol HTTP/1.1 8091 >/dev/null 2>&1 & sleep 1`)
	at(8, func(who int) {
		for range 25 {
			if who%2 == 0 {
				// The result does not matter: the server inside may reset the connection because of the unread
				// body.
				_, _, _ = s.request(context.Background(), "GET", portPath(id, 8091)+"/own/0", "", strings.NewReader(smuggled))
				continue
			}
			if resp, b := s.page("GET", fmt.Sprintf("%s/own/%d", portPath(id, 8091), who/2), nil); resp.StatusCode == 200 &&
				string(b) != fmt.Sprintln(who/2) {
				t.Errorf("/own/%d is answered %s", who/2, b)
			}
		}
	})
}

// TestConfusedPaths names another organization's sandbox in every way that two readers of a request
// could understand differently.
func TestConfusedPaths(t *testing.T) {
	onOneStore(t)
	s := attacked(t)
	victim := s.create(nil)
	defer s.destroy(victim)
	s.want(victim, fmt.Sprintf("mkdir /srv/web; echo treasure | tee /tmp/treasure >/srv/web/treasure; cd /srv/web; "+
		"nohup python3 -u -m http.server %d >/tmp/web.log 2>&1 & sleep 1; curl -sf http://127.0.0.1:%d/treasure", webPort,
		webPort))
	h := s.tenant("confused", nil)
	own := h.create(nil)
	defer h.destroy(own)
	h.web(own)
	ownID, victimID := strings.TrimPrefix(own, "sbx_"), strings.TrimPrefix(victim, "sbx_")
	file := "/files?path=/tmp/treasure"
	targets := []string{
		"//v1/sandboxes/" + victim + file, "/v1//sandboxes/" + victim + file, "/v1/sandboxes/" + own + "/../" + victim + file,
		"/v1/sandboxes/" + own + "/%2e%2e/" + victim + file, "/v1/sandboxes/" + own + "%2f..%2f" + victim + file,
		"/v1/sandboxes/" + own + "%2F" + victim + file, "/v1/sandboxes/" + own + ";/../" + victim + file, "/v1/sandboxes/" + victim + "%00" + file,
		"/v1/sandboxes/" + own + "%0d%0a" + file, "/v1/sandboxes/" + strings.ToUpper(victim) + file, "/V1/sandboxes/" + victim + file,
		"/v1/sandboxes/" + own + "\\..\\" + victim + file, "/v1/sandboxes/" + victim + "/./" + file, "/v1/sandboxes/" + victim + file + "&path=/etc/passwd",
		portPath(own, webPort) + "/../../../" + victim + "/ports/8080/treasure", portPath(own, webPort) + "/..%2f..%2f..%2f" + victim + "/ports/8080/treasure",
		portPath(own, webPort) + "/%2e%2e/%2e%2e/" + victim + "/files", portPath(victim, webPort) + "/treasure", portPath(victim, webPort) + "//treasure",
		"/v1/sandboxes/" + own + "/ports/8080%2f..%2f..%2f" + victim, "/v1/sandboxes/" + victim + "/ports/0x1f90/", "/v1/sandboxes/" + victim + "/ports/008080/treasure",
		"/v1/sandboxes/" + victim + "/ports/8080/url", "/sandboxes/" + victimID, "/sandboxes/" + ownID + "%2f..%2f" + victimID, "//sandboxes/" + victimID,
		"/v2/../v1/sandboxes/" + victim, "/sandboxes/../v1/sandboxes/" + victim + file, "/v1/../sandboxes/" + victimID,
	}
	hosts := []string{"x", portHost(own, webPort), portHost(victim, webPort), portHost(victim, webPort) + ".",
		strings.ToUpper(portHost(victim, webPort)),
		portHost(victim, webPort) + ":80", portHost(victim, webPort) + "." + portsZone, portHost(own, webPort) + "," + portHost(victim, webPort), "x@" + portHost(victim, webPort)}
	wrong := func(what, answer string) {
		t.Helper()
		// An answer that names a sandbox must name the caller's own, and no answer may have the treasure.
		if strings.Contains(answer, "treasure\n") || strings.HasPrefix(answer, "200") && strings.Contains(answer, victimID) &&
			!strings.Contains(answer, ownID) {
			t.Errorf("%s is answered %.400s", what, answer)
		}
	}
	for _, target := range targets {
		for _, host := range hosts {
			for _, more := range []string{"", "E2b-Sandbox-Id: " + victimID + "\r\nE2b-Sandbox-Port: 8080\r\n",
				"X-Forwarded-Host: " + portHost(victim, webPort) + "\r\nX-Original-URL: /v1/sandboxes/" + victim + file + "\r\n"} {
				request := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nX-API-Key: %s\r\n"+
					"%sConnection: close\r\n\r\n", target, host, h.key, h.key, more)
				for _, answer := range s.talk(request) {
					wrong(fmt.Sprintf("%s at %s with %q", target, host, more), answer)
				}
			}
		}
	}
	for _, line := range []string{
		"GET http://" + portHost(victim, webPort) + "/treasure HTTP/1.1\r\nHost: " + portHost(own, webPort),
		"GET http://" + portHost(own, webPort) + "/x HTTP/1.1\r\nHost: " + portHost(victim, webPort),
		"CONNECT " + portHost(victim, webPort) + ":8080 HTTP/1.1\r\nHost: x",
		"OPTIONS * HTTP/1.1\r\nHost: " + portHost(victim, webPort),
		"GET /x HTTP/1.1\r\nHost: " + portHost(own, webPort) + "\r\nHost: " + portHost(victim, webPort),
	} {
		for _, answer := range s.talk(line + "\r\nAuthorization: Bearer " + h.key + "\r\nConnection: close\r\n\r\n") {
			wrong(line, answer)
		}
	}
	// No request has reached the server inside the victim.
	if got := s.want(victim, "grep -c GET /tmp/web.log"); got != "1" { // the test's own
		t.Errorf("%s requests reached the victim: %s", got, s.want(victim, "cat /tmp/web.log"))
	}
}
