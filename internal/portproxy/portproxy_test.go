package portproxy

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

// inside plays all ports of a sandbox with one server.
type inside struct {
	addr  string // of the server
	fail  error
	dials atomic.Int64
	open  atomic.Int64
}

type counted struct {
	*net.TCPConn
	of   *inside
	once atomic.Bool
}

func (c *counted) Close() error {
	if c.once.CompareAndSwap(false, true) {
		c.of.open.Add(-1)
	}
	return c.TCPConn.Close()
}

func (i *inside) DialPort(ctx context.Context, _ agentapi.Target, _ int) (net.Conn, error) {
	if i.fail != nil {
		return nil, i.fail
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", i.addr)
	if err != nil {
		return nil, err
	}
	i.dials.Add(1)
	i.open.Add(1)
	return &counted{TCPConn: c.(*net.TCPConn), of: i}, nil
}

// door is a server that passes every request on to one port.
type door struct {
	url   string
	proxy *Proxy
	in    *inside
	errs  chan error // of Serve
}

func newDoor(t *testing.T, h http.Handler, to Destination) *door {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	service := httptest.NewUnstartedServer(h)
	service.Config.Protocols = protocols
	service.Start()
	t.Cleanup(service.Close)
	d := &door{in: &inside{addr: service.Listener.Addr().String()}, errs: make(chan error, 100)}
	d.proxy = New(d.in, slog.New(slog.DiscardHandler))
	if to.Target.SandboxID == "" {
		to.Target = agentapi.Target{SandboxID: "sbx_a", Run: "run"}
	}
	if to.Port == 0 {
		to.Port = 8080
	}
	front := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var err error
		if WantsTunnel(r) {
			err = d.proxy.Tunnel(w, r, to.Target, to.Port)
		} else {
			err = d.proxy.Serve(w, r, to)
		}
		if err != nil {
			d.errs <- err
			w.WriteHeader(http.StatusTeapot)
		}
	}))
	front.Config.Protocols = protocols
	front.Start()
	d.url = front.URL
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := d.proxy.Close(ctx); err != nil {
			t.Error(err)
		}
		front.Close()
		// The transport closes a connection that was not idle yet a moment after Close.
		for d.in.open.Load() != 0 && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		if n := d.in.open.Load(); n != 0 {
			t.Errorf("%d connections to ports are left", n)
		}
	})
	return d
}

func (d *door) get(t *testing.T, path string, edit func(*http.Request)) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequest("GET", d.url+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if edit != nil {
		edit(r)
	}
	resp, err := (&http.Client{CheckRedirect: func(*http.Request,
		[]*http.Request) error {
		return http.ErrUseLastResponse
	}}).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

const aKey = "cay_0123456789abcdef0123456789abcdef01234567"

// TestSecretsStayOutside sends keys and signatures in every way that callers use; none reaches
// the sandbox.
func TestSecretsStayOutside(t *testing.T) {
	var seen bytes.Buffer
	d := newDoor(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		seen.Reset()
		_ = r.Write(&seen)
	}), Destination{})
	for name, edit := range map[string]func(*http.Request){
		"bearer":         func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+aKey) },
		"odd bearer":     func(r *http.Request) { r.Header.Set("Authorization", "bEaReR   "+aKey+" ") },
		"second of two":  func(r *http.Request) { r.Header["Authorization"] = []string{"Basic eDp5", "Bearer " + aKey} },
		"own header":     func(r *http.Request) { r.Header.Set(KeyHeader, aKey) },
		"another header": func(r *http.Request) { r.Header.Set("X-Api-Key", "e2b_"+aKey[4:]) },
		"cookie":         func(r *http.Request) { r.Header.Set("Cookie", "a=1; "+TokenCookie+"="+aKey+"; b=2") },
		"query":          func(r *http.Request) { r.URL.RawQuery = "a=1&" + TokenParam + "=" + aKey + "&b=2" },
		"a protocol":     func(r *http.Request) { r.Header.Set("Sec-WebSocket-Protocol", "chat, key."+aKey) },
		"referer":        func(r *http.Request) { r.Header.Set("Referer", "http://x/?key="+aKey+"&b") },
		"odd cookie":     func(r *http.Request) { r.Header.Set("Cookie", "k="+aKey) },
		"odd query":      func(r *http.Request) { r.URL.RawQuery = "a=1&cay%5ftok%65n=" + aKey },
		"proxy":          func(r *http.Request) { r.Header.Set("Proxy-Authorization", "Bearer "+aKey) },
	} {
		if resp, _ := d.get(t, "/", edit); resp.StatusCode != 200 {
			t.Fatalf("%s: %s", name, resp.Status)
		}
		if strings.Contains(seen.String(), aKey[4:]) || strings.Contains(seen.String(), "token") {
			t.Errorf("%s: inside came\n%s", name, &seen)
		}
	}
	d.get(t, "/p?a=1;x&"+TokenParam+"=s&b=%zz", func(r *http.Request) {
		r.Header.Set("Authorization", "Bearer theirs")
		r.Header.Set("Cookie", "a=1; "+TokenCookie+"=x; b=2")
		r.Header.Set("X-Theme", "cay_dark")
	})
	for _, kept := range []string{"GET /p?a=1;x&b=%zz HTTP/1.1", "Authorization: Bearer theirs", "Cookie: a=1; b=2",
		"X-Theme: cay_dark"} {
		if !strings.Contains(seen.String(), kept) {
			t.Errorf("what is the application's is gone: %q is not in\n%s", kept, &seen)
		}
	}
}

func TestWhereItComesFrom(t *testing.T) {
	var got http.Header
	var host, uri string
	h := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got, host, uri = r.Header, r.Host, r.RequestURI
		w.Header().Set("Location", r.URL.Query().Get("to"))
		w.WriteHeader(302)
	})
	d := newDoor(t, h, Destination{Path: "/a%2Fb/%C3%BC", Prefix: "/out", Host: "localhost:8080"})
	resp, _ := d.get(t, "/out/a%2Fb/?to=/there", func(r *http.Request) {
		r.Header.Set("X-Forwarded-For", "192.0.2.1")
		r.Header.Set("X-Forwarded-Proto", "https")
		r.Header.Set("X-Forwarded-Host", "spoofed")
		r.Header.Set("X-Forwarded-Prefix", "spoofed")
	})
	if host != "localhost:8080" || !strings.HasPrefix(uri, "/a%2Fb/") || resp.Header.Get("Location") != "/out/there" {
		t.Errorf("Host %q, URI %q, Location %q", host, uri, resp.Header.Get("Location"))
	}
	for name, want := range map[string]string{"X-Forwarded-For": "192.0.2.1, 127.0.0.1", "X-Forwarded-Proto": "https",
		"X-Forwarded-Host": strings.TrimPrefix(d.url, "http://"), "X-Forwarded-Prefix": "/out"} {
		if got.Get(name) != want {
			t.Errorf("%s is %q, want %q", name, got.Get(name), want)
		}
	}
	for _, to := range []string{"//elsewhere/x", "https://elsewhere/", "sibling"} {
		if resp, _ := d.get(t, "/?to="+to, nil); resp.Header.Get("Location") != to {
			t.Errorf("Location %q became %q", to, resp.Header.Get("Location"))
		}
	}
}

// TestStreams checks that an event arrives when it is sent, not with the next one.
func TestStreams(t *testing.T) {
	next, over := make(chan bool), make(chan error, 1)
	d := newDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := 0; ; i++ {
			fmt.Fprintf(w, "data: %d\n\n", i)
			_ = http.NewResponseController(w).Flush()
			select {
			case <-next:
			case <-r.Context().Done():
				over <- r.Context().Err()
				return
			}
		}
	}), Destination{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, "GET", d.url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	in := bufio.NewReader(resp.Body)
	for i := range 3 {
		if line, err := in.ReadString('\n'); err != nil || line != fmt.Sprintf("data: %d\n", i) {
			t.Fatalf("line %q, %v", line, err)
		}
		_, _ = in.ReadString('\n')
		if i < 2 {
			next <- true
		}
	}
	cancel() // the caller leaves, and the service's request ends
	select {
	case <-over:
	case <-time.After(10 * time.Second):
		t.Error("the service goes on")
	}
}

// TestBothWaysAtOnce checks that an answer may begin before the request has ended, and that both
// go on.
func TestBothWaysAtOnce(t *testing.T) {
	d := newDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		fmt.Fprintln(w, "begun")
		_ = http.NewResponseController(w).Flush()
		for lines := bufio.NewScanner(r.Body); lines.Scan(); {
			fmt.Fprintln(w, lines.Text())
			_ = http.NewResponseController(w).Flush()
		}
	}), Destination{})
	body, out := io.Pipe()
	resp, err := http.Post(d.url, "text/plain", body)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	in := bufio.NewReader(resp.Body)
	for _, line := range []string{"begun\n", "one\n", "two\n"} {
		if line != "begun\n" {
			if _, err := io.WriteString(out, line); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := in.ReadString('\n'); err != nil || got != line {
			t.Fatalf("got %q, %v; want %q", got, err, line)
		}
	}
	out.Close()
	if rest, err := io.ReadAll(in); err != nil || len(rest) != 0 {
		t.Errorf("after the end: %q, %v", rest, err)
	}
}

// TestGRPC checks that gRPC has HTTP/2 on both connections, with trailers.
func TestGRPC(t *testing.T) {
	d := newDoor(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "Grpc-Status")
		_, _ = io.Copy(w, r.Body)
		fmt.Fprint(w, r.Proto)
		w.Header().Set("Grpc-Status", "0")
	}), Destination{})
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	c := &http.Client{Transport: &http.Transport{Protocols: protocols}}
	defer c.CloseIdleConnections()
	for kind, want := range map[string]string{"application/grpc": "xHTTP/2.0", "text/plain": "xHTTP/1.1"} {
		resp, err := c.Post(d.url, kind, strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(b) != want || resp.Trailer.Get("Grpc-Status") != "0" {
			t.Errorf("%s: %q, %v, trailer %v", kind, b, err, resp.Trailer)
		}
	}
}

// upgraded opens a connection and upgrades it to a protocol.
func (d *door) upgraded(t *testing.T, protocol, early string) (net.Conn, *bufio.Reader, string) {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(d.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := fmt.Fprintf(conn,
		"POST / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: %s\r\n\r\n%s", protocol,
		early); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(conn)
	status, err := in.ReadString('\n')
	for line := status; err == nil && line != "\r\n"; {
		line, err = in.ReadString('\n')
	}
	if err != nil {
		t.Fatal(err)
	}
	return conn, in, status
}

func echoUpgraded(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Connection", "Upgrade")
	w.Header().Set("Upgrade", r.Header.Get("Upgrade"))
	w.WriteHeader(http.StatusSwitchingProtocols)
	conn, in, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = io.Copy(conn, in)
}

func TestUpgrade(t *testing.T) {
	d := newDoor(t, http.HandlerFunc(echoUpgraded), Destination{})
	conn, in, status := d.upgraded(t, "websocket", "")
	if status != "HTTP/1.1 101 Switching Protocols\r\n" {
		t.Fatal(status)
	}
	if _, err := io.WriteString(conn, "late"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len("late"))
	if _, err := io.ReadFull(in, got); err != nil || string(got) != "late" {
		t.Errorf("got %q, %v", got, err)
	}
	d.proxy.Hangup()
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := in.ReadByte(); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after the hang-up: %v", err)
	}
	if resp, _ := d.get(t, "/", nil); resp.StatusCode != http.StatusTeapot {
		t.Errorf("after the hang-up: %s", resp.Status)
	}
}

func TestTunnelHalves(t *testing.T) {
	d := newDoor(t, nil, Destination{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d.in.addr = l.Addr().String()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		b, _ := io.ReadAll(c) // until the other half ends
		fmt.Fprintf(c, "%d bytes", len(b))
	}()
	conn, in, status := d.upgraded(t, "TCP", "early ") // the early bytes must not be lost
	if status != "HTTP/1.1 101 Switching Protocols\r\n" {
		t.Fatal(status)
	}
	if _, err := conn.Write(make([]byte, 3<<20)); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(in); err != nil || string(b) != fmt.Sprintf("%d bytes", 3<<20+len("early ")) {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestNoAnswer(t *testing.T) {
	d := newDoor(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_, _ = io.WriteString(conn, "SSH-2.0-x\r\n")
		conn.Close()
	}), Destination{})
	if resp, _ := d.get(t, "/", nil); resp.StatusCode != http.StatusTeapot {
		t.Fatal(resp.Status)
	}
	if err := <-d.errs; !fault.Is(err, fault.Upstream) || fault.As(err).Code != fault.CodePortNoAnswer {
		t.Errorf("no HTTP: %v", err)
	}
	d.in.fail = fault.New(fault.Upstream, fault.CodePortClosed, "closed")
	d.proxy.h1.CloseIdleConnections()
	d.get(t, "/", nil)
	if err := <-d.errs; fault.As(err) == nil || fault.As(err).Code != fault.CodePortClosed {
		t.Errorf("closed: %v", err)
	}
	d.proxy.open["sbx_a"] = maxOpen
	d.get(t, "/", nil)
	if err := <-d.errs; !fault.Is(err, fault.Exhausted) {
		t.Errorf("too many: %v", err)
	}
	if d.proxy.open["sbx_a"] != maxOpen {
		t.Error("what was refused is counted")
	}
	delete(d.proxy.open, "sbx_a")
}

// TestBrokenAnswer checks that the caller does not take a broken answer for a whole one.
func TestBrokenAnswer(t *testing.T) {
	d := newDoor(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(make([]byte, 1<<20))
		panic(http.ErrAbortHandler)
	}), Destination{})
	resp, err := http.Get(d.url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err == nil {
		t.Error("the caller took it for whole")
	}
}

// TestConnectionsOfOneRun checks that a run does not use the connections of another.
func TestConnectionsOfOneRun(t *testing.T) {
	d := newDoor(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), Destination{})
	serve := func(run string, port int) {
		t.Helper()
		r := httptest.NewRequest("GET", "/", nil)
		to := Destination{Target: agentapi.Target{SandboxID: "sbx_a", Run: run}, Port: port}
		if err := d.proxy.Serve(httptest.NewRecorder(), r, to); err != nil {
			t.Fatal(err)
		}
	}
	for i, step := range []struct {
		run   string
		port  int
		dials int64
	}{{"1", 80, 1}, {"1", 80, 1}, {"1", 81, 2}, {"2", 80, 3}, {"2", 80, 3}} {
		serve(step.run, step.port)
		if got := d.in.dials.Load(); got != step.dials {
			t.Errorf("step %d: %d dials, want %d", i, got, step.dials)
		}
	}
}

// TestSurplusReachesNoOtherCaller has servers inside that send more than they were asked for, by
// themselves or because a caller made them. No caller is answered with what another one's request
// caused.
func TestSurplusReachesNoOtherCaller(t *testing.T) {
	answer := func(w io.Writer, body string) {
		fmt.Fprintf(w, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}
	for name, serve := range map[string]func(c net.Conn, in *bufio.Reader, r *http.Request){
		"one that says more": func(c net.Conn, _ *bufio.Reader, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			var b strings.Builder
			answer(&b, r.URL.Path)
			answer(&b, "surplus")
			_, _ = io.WriteString(c, b.String()) // the caller may have left
		},
		"one that does not read bodies": func(c net.Conn, in *bufio.Reader, r *http.Request) {
			answer(c, r.URL.Path)
		},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return // closed
					}
					go func() {
						defer c.Close()
						in := bufio.NewReader(c)
						for {
							r, err := http.ReadRequest(in)
							if err != nil {
								return // the caller has gone
							}
							serve(c, in, r)
							if r.Close {
								return
							}
						}
					}()
				}
			}()
			d := newDoor(t, http.NotFoundHandler(), Destination{})
			d.in.addr = l.Addr().String()
			client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			for i := range 300 {
				path := fmt.Sprintf("/%d", i)
				const smuggled = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
				var body io.Reader
				method := []string{"GET", "DELETE", "HEAD", "OPTIONS"}[i/2%4]
				if i%2 == 0 {
					body = strings.NewReader(smuggled)
				} else {
					method = "GET"
				}
				r, err := http.NewRequest(method, d.url+path, body)
				if err != nil {
					t.Fatal(err)
				}
				resp, err := client.Do(r)
				if err != nil {
					t.Fatal(err)
				}
				b, _ := io.ReadAll(resp.Body) // the bytes that came count
				resp.Body.Close()
				if resp.StatusCode == 200 && method != "HEAD" && string(b) != path {
					t.Fatalf("%s %s is answered %q", method, path, b)
				}
			}
		})
	}
}
