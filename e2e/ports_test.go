package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed testdata/web.py
var webServer string

// Ports of the servers that web starts.
const (
	webPort   = 8080 // on the loopback address
	rawPort   = 8081
	openPort  = 9080 // on all addresses
	openRaw   = 9081
	noPort    = 7777
	portsZone = "boxes.test"
)

// setPublic makes a port public or private.
func (s *server) setPublic(id string, port int, public bool) {
	s.t.Helper()
	if _, err := s.api().SetPortPublic(context.Background(), id, port, public); err != nil {
		s.t.Fatalf("making port %d public, %v: %v", port, public, err)
	}
}

// web starts the test's web server in a sandbox, on the loopback address and on all addresses.
func (s *server) web(id string) {
	s.t.Helper()
	s.upload(id, "/opt/web.py", webServer)
	s.want(id, fmt.Sprintf(`rm -f /tmp/ready-*; nohup python3 /opt/web.py 127.0.0.1 %d %d >/tmp/web.log 2>&1 &
		nohup python3 /opt/web.py 0.0.0.0 %d %d >>/tmp/web.log 2>&1 &
		for i in $(seq 400); do [ -e /tmp/ready-%d ] && [ -e /tmp/ready-%d ] && exit 0; sleep 0.05; done; cat /tmp/web.log; exit 1`,
		webPort, rawPort, openPort, openRaw, webPort, openPort))
}

// portsServer has host names for ports. All tests of ports share it.
var portsServer = sync.OnceValue(func() *server {
	s := newServer(suite, "CAY_PROXY_DOMAIN="+portsZone, "CAY_PROXY_SCHEME=http", "CAY_TEMPLATES_PREPARE=python")
	s.start()
	s.needTemplate("python")
	return s
})

func sharedPorts(t *testing.T) *server {
	t.Helper()
	own := *portsServer()
	own.t = t
	return &own
}

func portPath(id string, port int) string { return fmt.Sprintf("/v1/sandboxes/%s/ports/%d", id, port) }

func portHost(id string, port int) string {
	return fmt.Sprintf("%d-%s.%s", port, strings.TrimPrefix(id, "sbx_"), portsZone)
}

// visit requests a port, by path or by host name, with a key unless an edit removes it.
func (s *server) visit(ctx context.Context, method, target string, body io.Reader,
	edits ...func(*http.Request)) (*http.Response, error) {
	host := ""
	if u, err := url.Parse(target); err == nil && u.Host != "" {
		host, target = u.Host, u.RequestURI()
	}
	r, err := http.NewRequestWithContext(ctx, method, s.url+target, body)
	if err != nil {
		return nil, err
	}
	r.Host = host
	r.Header.Set("Authorization", "Bearer "+s.key)
	for _, e := range edits {
		e(r)
	}
	return (&http.Client{CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}).Do(r)
}

// page calls visit and reads the answer.
func (s *server) page(method, target string, body io.Reader, edits ...func(*http.Request)) (*http.Response, []byte) {
	s.t.Helper()
	resp, err := s.visit(context.Background(), method, target, body, edits...)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatalf("%s %s: %v after %d bytes", method, target, err, len(b))
	}
	return resp, b
}

func withoutKey(r *http.Request) { r.Header.Del("Authorization") }

// seen describes a request as the web server inside got it.
type seen struct {
	Method, Path, SHA256 string
	Size                 int
	Headers              [][2]string
}

func (s seen) header(name string) string {
	var all []string
	for _, h := range s.Headers {
		if strings.EqualFold(h[0], name) {
			all = append(all, h[1])
		}
	}
	return strings.Join(all, " | ")
}

// asked makes a request to the web server inside and returns its answer.
func (s *server) asked(method, target string, body io.Reader, edits ...func(*http.Request)) seen {
	s.t.Helper()
	resp, b := s.page(method, target, body, edits...)
	var v seen
	if resp.StatusCode != 200 || json.Unmarshal(b, &v) != nil {
		s.t.Fatalf("%s %s: %s %s", method, target, resp.Status, b)
	}
	return v
}

func TestPorts(t *testing.T) {
	onOneStore(t)
	s := sharedPorts(t)
	id := s.create(nil)
	defer s.destroy(id)
	s.web(id)

	t.Run("HTTP", func(t *testing.T) {
		s.t = t
		for _, port := range []int{webPort, openPort} {
			for _, base := range []string{portPath(id, port), "http://" + portHost(id, port)} {
				for _, method := range []string{"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} {
					if v := s.asked(method, base+"/a%2Fb/%C3%BC?x=1&y=%20", nil); v.Method != method ||
						v.Path != "/a%2Fb/%C3%BC?x=1&y=%20" {
						t.Errorf("%s %s: the server inside got %+v", method, base, v)
					}
				}
				resp, b := s.page("HEAD", base+"/", nil)
				if resp.StatusCode != 200 || len(b) != 0 || resp.ContentLength <= 0 {
					t.Errorf("HEAD %s: %s, %d bytes of %d", base, resp.Status, len(b), resp.ContentLength)
				}
			}
		}
		// On a sandbox's own host name, paths of the API go to the application.
		for _, path := range []string{"/v1/me", "/healthz", "/metrics", "/files?path=/etc/passwd", "/sandboxes",
			"/v2/sandboxes", "/health", "/openapi.yaml"} {
			if v := s.asked("GET", "http://"+portHost(id, webPort)+path, nil); v.Path != path {
				t.Errorf("%s: the server inside got %+v", path, v)
			}
		}
		v := s.asked("GET", "http://"+portHost(id, webPort)+"/", nil,
			func(r *http.Request) { r.Header.Set("X-Forwarded-Proto", "https") })
		if v.header("Host") != portHost(id, webPort) || v.header("X-Forwarded-Host") != portHost(id, webPort) ||
			v.header("X-Forwarded-Proto") != "https" || v.header("X-Forwarded-For") != "127.0.0.1" {
			t.Errorf("the server inside got %+v", v)
		}
		if v := s.asked("GET", portPath(id, webPort)+"/", nil); v.header("X-Forwarded-Prefix") != portPath(id, webPort) {
			t.Errorf("the server inside got %+v", v)
		}
	})
	t.Run("keys stay outside", func(t *testing.T) {
		s.t = t
		for name, edit := range map[string]func(*http.Request){
			"bearer": func(*http.Request) {},
			"own header": func(r *http.Request) {
				r.Header.Set("X-Cay-Api-Key", s.key)
				r.Header.Set("Authorization", "Bearer theirs")
			},
			"all ways": func(r *http.Request) {
				r.Header.Add("Authorization", "Bearer "+s.key)
				r.Header.Set("Authorization", "Bearer "+s.key)
				r.Header.Set("X-Api-Key", s.key)
				r.Header.Set("Proxy-Authorization", "Bearer "+s.key)
				r.Header.Set("Cookie", "cay_token="+s.key)
				r.Header.Set("X-Cay-Api-Key", s.key)
			},
		} {
			if v := s.asked("GET", portPath(id, webPort)+"/", nil, edit); strings.Contains(fmt.Sprint(v), s.key[4:]) ||
				(v.header("Authorization") == "Bearer theirs") != (name == "own header") {
				t.Errorf("%s: the server inside got %+v", name, v)
			}
		}
	})
	t.Run("large bodies", func(t *testing.T) { s.t = t; s.largeBodies(id) })
	t.Run("WebSocket", func(t *testing.T) { s.t = t; s.webSocket(id) })
	t.Run("server-sent events", func(t *testing.T) { s.t = t; s.eventStream(id) })
	t.Run("HTTP/2", func(t *testing.T) {
		protocols := new(http.Protocols)
		protocols.SetUnencryptedHTTP2(true)
		c := &http.Client{Transport: &http.Transport{Protocols: protocols}}
		defer c.CloseIdleConnections()
		r, err := http.NewRequest("POST", s.url+portPath(id, webPort)+"/x", strings.NewReader("hello"))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+s.key)
		resp, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var v seen
		if err := json.NewDecoder(resp.Body).Decode(&v); err != nil || resp.ProtoMajor != 2 || v.Size != 5 {
			t.Errorf("%s: %+v, %v", resp.Proto, v, err)
		}
	})
	t.Run("nothing listens", func(t *testing.T) {
		s.t = t
		resp, b := s.page("GET", portPath(id, noPort)+"/", nil)
		if resp.StatusCode != 502 || text(b, "code") != "port_closed" ||
			resp.Header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s %v %s", resp.Status, resp.Header, b)
		}
		resp, b = s.page("GET", "http://"+portHost(id, noPort)+"/", nil,
			func(r *http.Request) { r.Header.Set("Accept", "text/html") })
		if resp.StatusCode != 502 || !strings.Contains(resp.Header.Get("Content-Type"), "text/html") ||
			!strings.Contains(string(b), "nothing listens on port 7777") {
			t.Errorf("%s %v %s", resp.Status, resp.Header, b)
		}
		// A server that listens and speaks another protocol.
		if resp, b := s.page("GET", portPath(id, rawPort)+"/", nil); resp.StatusCode != 502 ||
			text(b, "code") != "port_no_answer" {
			t.Errorf("%s %s", resp.Status, b)
		}
		if resp, b := s.page("GET", portPath(id, 49983)+"/health", nil); resp.StatusCode != 400 {
			t.Errorf("the agent's own port: %s %s", resp.Status, b)
		}
	})
	t.Run("many at once", func(t *testing.T) { s.t = t; s.manyAtOnce(id) })
	s.alive(id)
}

func sumOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func (s *server) largeBodies(id string) {
	const size = 150_000_000 // larger than a file of the API may be, and than all buffers
	resp, err := s.visit(context.Background(), "GET", portPath(id, webPort)+fmt.Sprintf("/big?%d", size), nil)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, resp.Body)
	if err != nil || n != size || resp.ContentLength != size {
		s.t.Fatalf("down: %d bytes of %d, %v", n, resp.ContentLength, err)
	}
	whole := bytes.Repeat(bytes.Repeat(allBytes(), 4096), size>>20+1)[:size]
	if got := hex.EncodeToString(sum.Sum(nil)); got != sumOf(whole) {
		s.t.Error("the download differs from what the server sent")
	}
	for name, body := range map[string]io.Reader{"with a length": bytes.NewReader(whole),
		"in chunks": io.MultiReader(bytes.NewReader(whole))} {
		if v := s.asked("PUT", portPath(id, openPort)+"/up", body); v.Size != size || v.SHA256 != sumOf(whole) {
			s.t.Errorf("up %s: %d bytes arrived", name, v.Size)
		}
	}
	if v := s.asked("POST", portPath(id, webPort)+"/asked-first", bytes.NewReader(whole[:1000]),
		func(r *http.Request) { r.Header.Set("Expect", "100-continue") }); v.Size != 1000 {
		s.t.Errorf("with Expect: %+v", v)
	}
	// A caller that leaves in the middle of an upload ends the request inside.
	s.want(id, "rm -f /tmp/big-broken")
	ctx, cancel := context.WithCancel(context.Background())
	resp, err = s.visit(ctx, "GET", portPath(id, webPort)+"/big?10000000000", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, resp.Body, 1<<20); err != nil {
		s.t.Error(err)
	}
	cancel()
	resp.Body.Close()
	s.want(id, "for i in $(seq 400); do [ -e /tmp/big-broken ] && exit 0; sleep 0.05; done; exit 1")
}

func allBytes() []byte {
	var b []byte
	for i := range 256 {
		b = append(b, byte(i))
	}
	return b
}

// dialled opens a connection to the server, sends a request on it and reads the head of the answer.
func (s *server) dialled(request string) (net.Conn, *bufio.Reader, *http.Response) {
	s.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience)) // a new connection accepts it
	if _, err := io.WriteString(conn, request); err != nil {
		s.t.Fatal(err)
	}
	in := bufio.NewReader(conn)
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return conn, in, resp
}

// openWebSocket makes the handshake of a WebSocket by host name.
func (s *server) openWebSocket(id string) (net.Conn, *bufio.Reader) {
	s.t.Helper()
	conn, in, resp := s.dialled(fmt.Sprintf("GET /ws HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\n"+
		"Connection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", portHost(id, webPort), s.key))
	if resp.StatusCode != 101 || resp.Header.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
		s.t.Fatalf("handshake: %s %v", resp.Status, resp.Header)
	}
	return conn, in
}

// shout sends a text message and expects it back in capitals.
func (s *server) shout(conn net.Conn, in *bufio.Reader, message string) {
	s.t.Helper()
	frame := []byte{0x81, 0x80 | byte(len(message)), 0, 0, 0, 0} // a mask of zeros changes nothing
	if len(message) >= 126 {
		frame = []byte{0x81, 0x80 | 126, byte(len(message) >> 8), byte(len(message)), 0, 0, 0, 0}
	}
	if _, err := conn.Write(append(frame, message...)); err != nil {
		s.t.Fatal(err)
	}
	back := make([]byte, len(frame)-4+len(message))
	if _, err := io.ReadFull(in, back); err != nil || string(back[len(frame)-4:]) != strings.ToUpper(message) {
		s.t.Fatalf("sent %d bytes, got %.40q, %v", len(message), back, err)
	}
}

func (s *server) webSocket(id string) {
	conn, in := s.openWebSocket(id)
	for _, message := range []string{"hello", "", strings.Repeat("long ", 10_000), "again"} {
		s.shout(conn, in, message)
	}
	s.want(id, "rm -f /tmp/websocket-left")
	conn.Close()
	s.want(id, "for i in $(seq 400); do [ -e /tmp/websocket-left ] && exit 0; sleep 0.05; done; exit 1")
}

func (s *server) eventStream(id string) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	resp, err := s.visit(ctx, "GET", "http://"+portHost(id, webPort)+"/events", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	in := bufio.NewReader(resp.Body)
	began := time.Now()
	for n := range 10 {
		line, err := in.ReadString('\n')
		if want := fmt.Sprintf("data: %d\n", n); err != nil || line != want {
			s.t.Fatalf("event %q, %v, want %q", line, err, want)
		}
		if _, err := in.ReadString('\n'); err != nil {
			s.t.Fatal(err)
		}
	}
	if took := time.Since(began); took < 300*time.Millisecond {
		s.t.Errorf("ten events, each 50 ms after the other, came within %s", took)
	}
	s.want(id, "rm -f /tmp/events-left")
	cancel()
	s.want(id, "for i in $(seq 400); do [ -e /tmp/events-left ] && exit 0; sleep 0.05; done; exit 1")
}

func (s *server) manyAtOnce(id string) {
	var wg sync.WaitGroup
	errs := make(chan error, 200)
	for i := range 200 {
		wg.Go(func() {
			body := bytes.Repeat([]byte{byte(i)}, 10_000+i)
			resp, err := s.visit(context.Background(), "POST", portPath(id, openPort)+"/", bytes.NewReader(body))
			if err != nil {
				errs <- err
				return
			}
			defer resp.Body.Close()
			var v seen
			if err := json.NewDecoder(resp.Body).Decode(&v); err != nil || v.Size != len(body) || v.SHA256 != sumOf(body) {
				errs <- fmt.Errorf("request %d: %s, %d bytes arrived, %v", i, resp.Status, v.Size, err)
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		s.t.Error(err)
	}
}

func TestPortAccess(t *testing.T) {
	onOneStore(t)
	s := sharedPorts(t)
	id := s.create(nil)
	defer s.destroy(id)
	s.web(id)
	byHost, byPath := "http://"+portHost(id, webPort)+"/x", portPath(id, webPort)+"/x"
	private := func(when string) {
		t.Helper()
		for _, target := range []string{byHost, byPath} {
			if resp, b := s.page("GET", target, nil, withoutKey); resp.StatusCode != 401 {
				t.Errorf("%s: %s is %s %s", when, target, resp.Status, b)
			}
		}
	}
	private("in the beginning")
	s.setPublic(id, webPort, true)
	for _, target := range []string{byHost, byPath} {
		if v := s.asked("GET", target, nil, withoutKey); v.Path != "/x" {
			t.Errorf("public: %+v", v)
		}
	}
	if resp, _ := s.page("GET", portPath(id, openPort)+"/", nil, withoutKey); resp.StatusCode != 401 {
		t.Errorf("another port is %s", resp.Status)
	}
	s.setPublic(id, webPort, false)
	private("private again")

	out, errOut, code := s.cli("", "sandbox", "port-url", id, fmt.Sprint(webPort), "--expires-in", "3s")
	if code != 0 {
		t.Fatalf("port-url: %d %s", code, errOut)
	}
	signed := strings.TrimSpace(out)
	resp, _ := s.page("GET", signed, nil, withoutKey)
	cookies := resp.Cookies()
	if resp.StatusCode != 303 || resp.Header.Get("Location") != "/" || len(cookies) != 1 || !cookies[0].HttpOnly ||
		cookies[0].Domain != "" {
		t.Fatalf("the exchange: %s %v", resp.Status, resp.Header)
	}
	withCookie := func(r *http.Request) {
		withoutKey(r)
		r.AddCookie(cookies[0])
		r.AddCookie(&http.Cookie{Name: "a", Value: "b"})
	}
	if v := s.asked("GET", byHost, nil, withCookie); v.header("Cookie") != "a=b" {
		t.Errorf("with the cookie the server inside got %+v", v)
	}
	u, err := url.Parse(signed)
	if err != nil {
		t.Fatal(err)
	}
	if v := s.asked("GET", byPath+"?"+u.RawQuery, nil, withoutKey); v.Path != "/x" {
		t.Errorf("by signed path the server inside got %+v", v)
	}
	if resp, _ := s.page("GET", portPath(id, openPort)+"/?"+u.RawQuery, nil, withoutKey); resp.StatusCode != 401 {
		t.Errorf("on another port the signature gives %s", resp.Status)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) { // a poll with a deadline
		resp, b := s.page("GET", byPath+"?"+u.RawQuery, nil, withoutKey)
		if resp.StatusCode == 401 && text(b, "code") == "signature_expired" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the signature does not expire: %s %s", resp.Status, b)
		}
	}
	if resp, _ := s.page("GET", byHost, nil, withCookie); resp.StatusCode != 401 {
		t.Errorf("the cookie after its expiry: %s", resp.Status)
	}
}

// TestPortWakes checks that a request wakes a sandbox and keeps it running while it lasts, and that
// a public port stays public after a restart of the server.
func TestPortWakes(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it looks only at its own sandboxes
	s := sharedPorts(t)
	id := s.persistent(object{"idle_timeout": "10s"})
	defer s.destroy(id)
	s.web(id)
	s.setPublic(id, webPort, true)
	s.page("GET", portPath(id, webPort)+"/", nil) // leaves an idle connection
	s.suspend(id)
	for _, left := range s.onHost(id) {
		t.Errorf("while suspended the host has %s", left)
	}
	s.stop(syscall.SIGTERM)
	s.start()
	if v := s.asked("GET", "http://"+portHost(id, webPort)+"/awake", nil, withoutKey); v.Path != "/awake" {
		t.Errorf("the server inside got %+v", v)
	}
	if state, _ := s.state(id); state != "running" {
		t.Errorf("after the request the sandbox is %s", state)
	}
	if _, err := s.api().Suspend(t.Context(), id); err != nil {
		t.Fatalf("suspend: %v", err)
	}
	// An open WebSocket counts as use, so the sandbox is not suspended.
	conn, in := s.openWebSocket(id)
	s.shout(conn, in, "hello")
	began := time.Now()
	for time.Since(began) < 12*time.Second {
		if state, _ := s.state(id); state != "running" {
			t.Fatalf("with an open WebSocket the sandbox is %s", state)
		}
		time.Sleep(time.Second) // between two looks, until the idle time is over
	}
	s.shout(conn, in, "still there")
	conn.Close()
	s.waitState(id, "suspended")
}

// TestPortForward checks that port-forward carries raw TCP, and each direction ends for itself.
func TestPortForward(t *testing.T) {
	s := sharedPorts(t)
	id := s.create(nil)
	defer s.destroy(id)
	s.web(id)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := s.command(ctx, "sandbox", "port-forward", id, fmt.Sprintf("0:%d", rawPort), fmt.Sprintf("0:%d", noPort))
	var errOut bytes.Buffer
	cmd.Stderr = &errOut
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(out)
	addresses := map[int]string{}
	for range 2 {
		line, err := lines.ReadString('\n')
		var address string
		var port int
		if _, scanned := fmt.Sscanf(line, "forwarding %s to port %d", &address, &port); err != nil || scanned != nil {
			t.Fatalf("it says %q, %v", line, err)
		}
		addresses[port] = address
	}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			body := bytes.Repeat([]byte{byte(i)}, i*100_000)
			if got, err := halfClosed(addresses[rawPort], body); err != nil ||
				got != fmt.Sprintf("hello\n%d %s\n", len(body), sumOf(body)) {
				t.Errorf("connection %d: %q, %v", i, got, err)
			}
		})
	}
	wg.Wait()
	if got, err := halfClosed(addresses[noPort], nil); got != "" {
		t.Errorf("a closed port gives %q, %v", got, err)
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if _ = cmd.Wait(); cmd.ProcessState.ExitCode() != 130 || !strings.Contains(errOut.String(),
		"nothing listens on port 7777") {
		t.Errorf("port-forward ended with %d: %s", cmd.ProcessState.ExitCode(), &errOut)
	}
	s.alive(id)
}

// halfClosed sends a body, closes its direction, and reads to the end.
func halfClosed(address string, body []byte) (string, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience)) // a new connection accepts it
	if _, err := conn.Write(body); err != nil {
		return "", err
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(conn)
	return string(b), err
}

// TestPortsEndWithTheSandbox checks that open connections end with their sandbox and leave nothing.
func TestPortsEndWithTheSandbox(t *testing.T) {
	s := sharedPorts(t)
	id := s.create(nil)
	s.web(id)
	ws, wsIn := s.openWebSocket(id)
	s.shout(ws, wsIn, "hello")
	tunnel, tunnelIn, resp := s.dialled(fmt.Sprintf("POST /v1/sandboxes/%s/tunnel?port=%d HTTP/1.1\r\nHost: x\r\n"+
		"Authorization: Bearer %s\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n", id, rawPort, s.key))
	if line, err := tunnelIn.ReadString('\n'); resp.StatusCode != 101 || line != "hello\n" {
		t.Fatalf("%s, %q, %v", resp.Status, line, err)
	}
	big, err := s.visit(context.Background(), "GET", portPath(id, webPort)+"/big?100000000000", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer big.Body.Close()
	slow := make(chan string, 1)
	go func() {
		resp, err := s.visit(context.Background(), "GET", portPath(id, webPort)+"/slow?300", nil)
		if err != nil {
			slow <- err.Error()
			return
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		slow <- fmt.Sprint(resp.StatusCode, " ", text(b, "code"))
	}()
	s.want(id, "for i in $(seq 400); do [ -e /tmp/slow-began ] && exit 0; sleep 0.05; done; exit 1")
	s.destroy(id)
	for name, r := range map[string]io.Reader{"WebSocket": wsIn, "tunnel": tunnelIn} {
		if n, err := io.Copy(io.Discard, r); n > 100 || isTimeout(err) {
			t.Errorf("%s: %d bytes more, %v", name, n, err)
		}
	}
	tunnel.Close()
	if _, err := io.Copy(io.Discard, big.Body); err == nil {
		t.Error("a body that was cut off looks complete")
	}
	if got := <-slow; got != "502 port_no_answer" {
		t.Errorf("a request that was waiting got %s", got)
	}
	for _, left := range s.onHost(id) {
		t.Errorf("left: %s", left)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) { // a poll with a deadline
		if strings.Contains(s.metrics(), "\ncay_sandbox_leases 0\n") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("leases are left")
		}
	}
	if resp, b := s.page("GET", portPath(id, webPort)+"/", nil); resp.StatusCode != 409 {
		t.Errorf("afterwards: %s %s", resp.Status, b)
	}
}

func isTimeout(err error) bool {
	n, ok := err.(net.Error)
	return ok && n.Timeout()
}

// TestPortsEndWithTheServer checks that a server that stops does not wait for upgraded connections.
func TestPortsEndWithTheServer(t *testing.T) {
	onOneStore(t)
	s := sharedPorts(t)
	id := s.create(nil)
	defer s.destroy(id)
	s.web(id)
	conn, in := s.openWebSocket(id)
	s.shout(conn, in, "hello")
	events, err := s.visit(context.Background(), "GET", portPath(id, webPort)+"/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer events.Body.Close()
	began := time.Now()
	s.stop(unix.SIGTERM)
	if took := time.Since(began); took > 20*time.Second { // the shutdown timeout is 30 s
		t.Errorf("the server took %s to end", took)
	}
	if n, err := io.Copy(io.Discard, in); n > 100 || isTimeout(err) {
		t.Errorf("the WebSocket: %d bytes more, %v", n, err)
	}
	s.start()
	if v := s.asked("GET", portPath(id, webPort)+"/", nil); v.Method != "GET" {
		t.Errorf("after a restart: %+v", v)
	}
}
