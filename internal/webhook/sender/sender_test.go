package sender

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/webhook"
)

// anywhere permits every address.
func anywhere(netip.AddrPort) error { return nil }

// post sends a request with a Sender of its own.
func post(t *testing.T, cfg Config, url string) (webhook.Answer, error) {
	t.Helper()
	if cfg.Permit == nil {
		cfg.Permit = anywhere
	}
	s := New(cfg)
	defer s.Close()
	return s.Send(t.Context(), url, map[string]string{"x-test": "yes"}, []byte("{}"))
}

func serve(t *testing.T, f http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(f)
	t.Cleanup(s.Close)
	return s
}

// raw starts a server that answers each connection with text and then does as end says.
func raw(t *testing.T, text string, end func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				head := make([]byte, 4096)
				if _, err := c.Read(head); err != nil {
					return
				}
				if _, err := io.WriteString(c, text); err != nil {
					return
				}
				end(c)
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return "http://" + l.Addr().String()
}

func TestSend(t *testing.T) {
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // a test compares what came
		w.Header().Set("Retry-After", "7")
		w.Header().Set("Set-Cookie", "a=b")
		w.WriteHeader(http.StatusTooManyRequests)
		fmt.Fprint(w, r.Method, " ", r.URL, " ", r.Header.Get("X-Test"), " ", r.Header.Get("User-Agent"), " ",
			r.Header.Get("Content-Type"), " ", r.Header.Get("Cookie"), " ", string(body))
	})
	cfg := Config{UserAgent: "cay/1", Permit: anywhere}
	both := New(cfg)
	defer both.Close()
	for range 2 {
		got, err := both.Send(t.Context(), s.URL+"/a?b=c", map[string]string{"x-test": "yes"}, []byte("{}"))
		want := webhook.Answer{Status: 429, RetryAfter: 7 * time.Second, Text: "POST /a?b=c yes cay/1 application/json  {}"}
		if err != nil || got != want {
			t.Errorf("got %+v, %v", got, err)
		}
	}
}

// TestAddresses checks that no connection is made to an address that is not permitted, under whatever name, and that an
// error tells nothing about it.
func TestAddresses(t *testing.T) {
	var calls atomic.Int64
	s := serve(t, func(http.ResponseWriter, *http.Request) { calls.Add(1) })
	_, port, err := net.SplitHostPort(s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	var asked []netip.AddrPort
	cfg := Config{Permit: func(to netip.AddrPort) error {
		if asked = append(asked, to); to.Addr().IsLoopback() || !to.Addr().IsGlobalUnicast() {
			return errors.New("never 127.0.0.1")
		}
		return nil
	}}
	for _, host := range []string{"127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "[::]"} {
		url := "http://" + host + ":" + port + "/"
		_, err := post(t, cfg, url)
		if !errors.Is(err, webhook.ErrDenied) || err.Error() != webhook.ErrDenied.Error() {
			t.Errorf("%s: %v", host, err)
		}
		if err := New(cfg).CheckURL(url); (err != nil) != (host != "localhost") {
			t.Errorf("%s as a URL: %v", host, err)
		}
	}
	if err := New(cfg).CheckURL("https://192.0.2.1/"); err != nil {
		t.Errorf("a permitted address as a URL: %v", err)
	}
	// A receiver of which one address is permitted is down, not forbidden.
	s.Close()
	cfg.Permit = func(to netip.AddrPort) error {
		if to.Addr().Is6() {
			return errors.New("no IPv6")
		}
		return nil
	}
	if _, err := post(t, cfg, "http://localhost:"+port+"/"); err == nil || errors.Is(err, webhook.ErrDenied) {
		t.Errorf("a receiver that is down: %v", err)
	}
	for _, a := range asked {
		if a.Addr().Is4In6() || a.Addr().Zone() != "" {
			t.Errorf("asked about %s", a)
		}
	}
	if calls.Load() != 0 {
		t.Errorf("%d requests arrived", calls.Load())
	}
}

// TestRedirectsAreNotFollowed checks that a receiver cannot lead a request elsewhere.
func TestRedirectsAreNotFollowed(t *testing.T) {
	var calls atomic.Int64
	other := serve(t, func(http.ResponseWriter, *http.Request) { calls.Add(1) })
	for _, status := range []int{301, 302, 303, 307, 308} {
		s := serve(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, other.URL, status) })
		if got, err := post(t, Config{}, s.URL); err != nil || got.Status != status {
			t.Errorf("%d: got %+v, %v", status, got, err)
		}
	}
	if calls.Load() != 0 {
		t.Errorf("%d redirects were followed", calls.Load())
	}
}

// TestProxiesAreNotUsed checks that the environment does not choose where requests go.
func TestProxiesAreNotUsed(t *testing.T) {
	var calls atomic.Int64
	proxy := serve(t, func(http.ResponseWriter, *http.Request) { calls.Add(1) })
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"} {
		t.Setenv(name, proxy.URL)
	}
	if os.Getenv("NO_PROXY") != "" {
		t.Setenv("NO_PROXY", "")
	}
	if _, err := post(t, Config{}, "http://receiver.invalid/"); err == nil {
		t.Error("a name that does not exist answered")
	}
	if calls.Load() != 0 {
		t.Error("the proxy was used")
	}
}

// TestHostileAnswers checks that no receiver makes the sender read or keep more than it wants.
func TestHostileAnswers(t *testing.T) {
	packed := &bytes.Buffer{}
	z := gzip.NewWriter(packed)
	if _, err := z.Write(bytes.Repeat([]byte("a"), 1<<20)); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	var sent atomic.Int64
	long := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		piece := bytes.Repeat([]byte("x"), 1<<16)
		for range 1000 {
			n, err := w.Write(piece)
			if sent.Add(int64(n)); err != nil {
				return
			}
		}
	})
	got, err := post(t, Config{}, long.URL)
	if err != nil || got.Status != 200 || got.Text != strings.Repeat("x", 1024) {
		t.Errorf("a long answer is %d with %d bytes, %v", got.Status, len(got.Text), err)
	}
	if n := sent.Load(); n > 16<<20 {
		t.Errorf("the receiver could send %d bytes", n)
	}
	bomb := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Accept-Encoding") != "" {
			t.Errorf("the sender accepts %s", r.Header.Get("Accept-Encoding"))
		}
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = w.Write(packed.Bytes()) // the sender may go before the end
	})
	if got, err := post(t, Config{}, bomb.URL); err != nil || len(got.Text) > 3*1024 ||
		strings.Contains(got.Text, "aaaa") {
		t.Errorf("a packed answer is %q, %v", got.Text, err)
	}
	odd := serve(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "a\x1b[2J\x00\xff\r\n\tü\u202e") })
	if got, err := post(t, Config{}, odd.URL); err != nil || got.Text != "a\uFFFD[2J\uFFFD\uFFFD\uFFFD\n\tü\uFFFD" {
		t.Errorf("an odd answer is %q, %v", got.Text, err)
	}
	cut := serve(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, strings.Repeat("x", 1023), "üü") })
	if got, err := post(t, Config{}, cut.URL); err != nil || got.Text != strings.Repeat("x", 1023) {
		t.Errorf("a cut answer ends with %q, %v", got.Text[1000:], err)
	}
	close := func(net.Conn) {}
	for name, text := range map[string]string{
		"no HTTP":        "SSH-2.0-OpenSSH_9.2\r\n",
		"nothing":        "",
		"a huge head":    "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("y", 1<<20) + "\r\n\r\n",
		"many 1xx":       strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: "+strings.Repeat("z", 1000)+"\r\n\r\n", 1000),
		"a short body":   "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc",
		"a broken chunk": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
	} {
		if got, err := post(t, Config{}, raw(t, text, close)); err == nil || strings.Contains(err.Error(), "127.") {
			t.Errorf("%s: got %+v, %v", name, got, err)
		}
	}
}

// TestPatience checks, with the clock of a bubble and connections in memory, that an attempt ends after 15 seconds:
// also one whose receiver sends a byte now and then.
func TestPatience(t *testing.T) {
	for name, answer := range map[string]func(net.Conn){
		"silence":     func(net.Conn) {},
		"a slow head": func(c net.Conn) { trickle(c, "HTTP/1.1 200 OK\r\n"+strings.Repeat("X: y\r\n", 1000)) },
		"a slow answer": func(c net.Conn) {
			trickle(c, "HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"+strings.Repeat("x", 999))
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			here, there := net.Pipe()
			var wg sync.WaitGroup
			wg.Go(func() { asked(there, &wg, answer) })
			s := New(Config{Permit: anywhere})
			s.transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return here, nil }
			began := time.Now()
			got, err := s.Send(t.Context(), "http://receiver.invalid/", nil, []byte("{}"))
			if took := time.Since(began); took != webhook.Patience || err == nil ||
				err.Error() != "the receiver did not answer within 15s" {
				t.Errorf("%s: got %+v, %v after %s", name, got, err, took)
			}
			there.Close()
			s.Close()
			wg.Wait()
		})
	}
}

// TestSwitchedProtocols lets a receiver answer 101 and then be silent, with the connection open. The attempt must end,
// although the connection is the body of such an answer.
func TestSwitchedProtocols(t *testing.T) {
	here, there := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() {
		asked(there, &wg, func(c net.Conn) {
			_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
		})
	})
	s := New(Config{Permit: anywhere})
	s.transport.DialContext = func(context.Context, string, string) (net.Conn, error) { return here, nil }
	sent := make(chan webhook.Answer, 1)
	go func() {
		got, _ := s.Send(t.Context(), "http://receiver.invalid/", nil, []byte("{}"))
		sent <- got
	}()
	select {
	case got := <-sent:
		if got.Status != http.StatusSwitchingProtocols {
			t.Errorf("got %+v", got)
		}
	case <-time.After(2 * webhook.Patience):
		t.Error("the attempt does not end")
	}
	there.Close()
	s.Close()
	wg.Wait()
}

// asked calls answer when a request comes, and reads the connection to its end. An answer to no request would close it.
func asked(c net.Conn, wg *sync.WaitGroup, answer func(net.Conn)) {
	if _, err := c.Read(make([]byte, 1)); err != nil {
		return
	}
	wg.Go(func() { answer(c) })
	_, _ = io.Copy(io.Discard, c)
}

// trickle writes a byte a second until the connection is closed.
func trickle(c net.Conn, text string) {
	for i := range text {
		if _, err := c.Write([]byte{text[i]}); err != nil {
			return
		}
		time.Sleep(time.Second)
	}
}

// TestCertificates checks that a certificate is verified, and that HTTP/2 works.
func TestCertificates(t *testing.T) {
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Proto)
	}))
	s.EnableHTTP2 = true
	s.StartTLS()
	defer s.Close()
	if got, err := post(t, Config{}, s.URL); err == nil || err.Error() != "the certificate of the receiver is not valid" {
		t.Errorf("an unknown authority: %+v, %v", got, err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	if got, err := post(t, Config{Roots: roots}, s.URL); err != nil || got.Text != "HTTP/2.0" {
		t.Errorf("a known authority: %+v, %v", got, err)
	}
	wrong := strings.Replace(s.URL, "127.0.0.1", "localhost", 1)
	if got, err := post(t, Config{Roots: roots}, wrong); err == nil ||
		err.Error() != "the certificate of the receiver is not valid" {
		t.Errorf("another name: %+v, %v", got, err)
	}
}

// TestErrorsTellNothing checks that errors name no address, which a tenant could learn names of this network from.
func TestErrorsTellNothing(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := "http://" + l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for url, want := range map[string]string{
		refused:                 "the receiver refused the connection",
		"http://name.invalid/":  "the name of the receiver cannot be resolved",
		"http://127.0.0.1:bad/": "the URL cannot be called",
	} {
		if _, err := post(t, Config{}, url); err == nil || err.Error() != want {
			t.Errorf("%s: %v", url, err)
		}
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]time.Duration{
		"": 0, "0": 0, "30": 30 * time.Second, "-1": 0, "1.5": 0, "99999999999999999999": 0, "x": 0,
		"Fri, 01 May 2026 12:01:00 GMT": time.Minute, "Fri, 01 May 2026 11:00:00 GMT": 0,
	} {
		if got := retryAfter(text, now); got != want {
			t.Errorf("%q is %s, want %s", text, got, want)
		}
	}
}
