package egressproxy

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// redirectTo makes l the destination of the proxy's connections. With another port in to, the
// proxy believes that port, but calls the real one, since tests cannot have port 443.
func (r *rig) redirectTo(l net.Listener) {
	r.set(func() { r.to = netip.MustParseAddrPort(l.Addr().String()) })
}

// refused checks that the connection ends, without data, before the deadline.
func refused(t *testing.T, c net.Conn) {
	t.Helper()
	b, err := io.ReadAll(c)
	if len(b) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("not refused: %q, %v", b, err)
	}
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("still not: %s", what)
		}
	}
}

// TestTLS has an HTTPS server that serves any name, as a shared address does.
func TestTLS(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.TLS.ServerName)
	}))
	defer server.Close()
	r := newRig(t, 0)
	r.redirectTo(server.Listener)
	for name, want := range map[string]bool{
		"allowed.example": true, "ALLOWED.example": true, "a.wild.example": true,
		"other.example": false, "wild.example": false, "sub.allowed.example": false, "": false,
	} {
		c := tls.Client(dial(t, r.proxy), &tls.Config{ServerName: name, InsecureSkipVerify: true})
		err := c.Handshake()
		if ok := err == nil; ok != want {
			t.Errorf("TLS to %q: %v, want to pass: %v", name, err, want)
		}
		if err != nil {
			continue
		}
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		answer, err := io.ReadAll(c)
		if err != nil || !strings.HasSuffix(string(answer), name) {
			t.Errorf("%q was answered %q, %v", name, answer, err)
		}
	}
	if !slices.Contains(r.denials(), "tcp other.example") {
		t.Errorf("not reported: %v", r.denials())
	}
}

// clientHello returns the ClientHello that crypto/tls sends for a name.
func clientHello(name string) []byte {
	ours, theirs := net.Pipe()
	go func() {
		_ = tls.Client(theirs, &tls.Config{ServerName: name, InsecureSkipVerify: true}).Handshake()
		_ = theirs.Close()
	}()
	defer ours.Close()
	header := make([]byte, recordHeader)
	if _, err := io.ReadFull(ours, header); err != nil {
		panic(err)
	}
	body := make([]byte, int(header[3])<<8+int(header[4]))
	if _, err := io.ReadFull(ours, body); err != nil {
		panic(err)
	}
	return append(header, body...)
}

// records splits a handshake into records of size bytes.
func records(handshake []byte, size int) []byte {
	var out []byte
	for part := range slices.Chunk(handshake, size) {
		out = append(append(out, recordHandshake, 3, 1, byte(len(part)>>8), byte(len(part))), part...)
	}
	return out
}

func TestHelloInPieces(t *testing.T) {
	got := make(chan []byte, 1)
	l := listen(t)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b, _ := io.ReadAll(c)
			_ = c.Close()
			got <- b
		}
	}()
	r := newRig(t, 0)
	r.redirectTo(l)
	hello := clientHello("allowed.example")
	for _, size := range []int{1, 2, 3, 5, 100, 16000} {
		said := append(records(hello[recordHeader:], size), "and what follows"...)
		c := dial(t, r.proxy)
		for part := range slices.Chunk(said, 97) { // one segment each
			if _, err := c.Write(part); err != nil {
				t.Fatal(err)
			}
		}
		_ = c.CloseWrite()
		select {
		case b := <-got:
			if !bytes.Equal(b, said) {
				t.Errorf("in records of %d bytes: the server got %d bytes, not the %d said", size, len(b), len(said))
			}
		case <-time.After(deadline):
			t.Fatalf("in records of %d bytes: the server got nothing", size)
		}
	}
	bad := clientHello("other.example")
	for what, said := range map[string][]byte{
		"in pieces":     records(bad[recordHeader:], 3),
		"after alert":   append([]byte{21, 3, 1, 0, 2, 1, 90}, bad...),
		"after nothing": append([]byte{22, 3, 1, 0, 0}, bad...),
		"too long":      records(append([]byte{messageClientHello, 1, 0, 0}, make([]byte, 1<<16)...), 16000),
		"SSL 2":         {0x80, 0x2e, 1, 3, 1, 0, 3},
		"no hello":      {22, 3, 1, 0, 4, 2, 0, 0, 0},
	} {
		c := dial(t, r.proxy)
		_, _ = c.Write(said)
		refused(t, c)
		select {
		case b := <-got:
			if len(b) > 0 {
				t.Errorf("%s: the server got %d bytes", what, len(b))
			}
		default:
		}
	}
}

// web is an HTTP server that answers with the request's host, and records it.
type web struct {
	*httptest.Server
	mu    sync.Mutex
	hosts []string
}

func newWeb(t *testing.T) *web {
	w := &web{}
	w.Server = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.hosts = append(w.hosts, r.Host)
		w.mu.Unlock()
		body, _ := io.ReadAll(r.Body)
		if r.Header.Get("Upgrade") == "websocket" {
			c, rest, err := rw.(http.Hijacker).Hijack()
			if err != nil {
				panic(err)
			}
			defer c.Close()
			_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
			_, _ = io.Copy(c, rest)
			return
		}
		_, _ = fmt.Fprintf(rw, "%s %s%s %q upgrade=%q", r.Method, r.Host, r.URL.RequestURI(), body, r.Header.Get("Upgrade"))
	}))
	t.Cleanup(w.Close)
	return w
}

func (w *web) askedFor() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.hosts)
}

func TestHTTP(t *testing.T) {
	const good = "GET /1 HTTP/1.1\r\nHost: allowed.example\r\n\r\n"
	for what, tc := range map[string]struct {
		said string
		want []string // the bodies of the answers, in order
	}{
		"one":               {good, []string{`GET allowed.example/1 ""`}},
		"with a port":       {"GET / HTTP/1.1\r\nHost: allowed.example:80\r\n\r\n", []string{`GET allowed.example:80/ ""`}},
		"old":               {"GET / HTTP/1.0\r\nHost: a.wild.example\r\n\r\n", []string{`GET a.wild.example/ ""`}},
		"two":               {good + strings.Replace(good, "/1", "/2?a;b", 1), []string{"/1", "/2?a;b"}},
		"body":              {"POST / HTTP/1.1\r\nHost: allowed.example\r\nContent-Length: 3\r\n\r\nabc" + good, []string{`POST allowed.example/ "abc"`, "/1"}},
		"chunks":            {"POST / HTTP/1.1\r\nHost: allowed.example\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + good, []string{`"abc"`, "/1"}},
		"absolute":          {"GET http://allowed.example/x HTTP/1.1\r\nHost: allowed.example\r\n\r\n", []string{"GET allowed.example/x"}},
		"absolute, hides":   {"GET http://allowed.example/x HTTP/1.1\r\nHost: other.example\r\n\r\n", []string{"GET allowed.example/x"}},
		"no HTTP/2":         {"GET / HTTP/1.1\r\nHost: allowed.example\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n", []string{`upgrade=""`}},
		"two upgrades":      {"GET / HTTP/1.1\r\nHost: allowed.example\r\nConnection: Upgrade\r\nUpgrade: websocket, h2c\r\n\r\n", []string{`upgrade=""`}},
		"other":             {"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"second other":      {good + "GET / HTTP/1.1\r\nHost: other.example\r\n\r\n", []string{"/1"}},
		"absolute other":    {"GET http://other.example/ HTTP/1.1\r\nHost: allowed.example\r\n\r\n", nil},
		"no host":           {"GET / HTTP/1.1\r\n\r\n", nil},
		"no host, old":      {"GET / HTTP/1.0\r\n\r\n", nil},
		"two hosts":         {"GET / HTTP/1.1\r\nHost: allowed.example\r\nHost: other.example\r\n\r\n", nil},
		"two names":         {"GET / HTTP/1.1\r\nHost: allowed.example, other.example\r\n\r\n", nil},
		"user":              {"GET / HTTP/1.1\r\nHost: allowed.example@other.example\r\n\r\n", nil},
		"port of words":     {"GET / HTTP/1.1\r\nHost: allowed.example:@other.example\r\n\r\n", nil},
		"address":           {"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", nil},
		"folded":            {"GET / HTTP/1.1\r\nHost: allowed.example\r\n other.example\r\n\r\n", nil},
		"folded first":      {"GET / HTTP/1.1\r\n Host: other.example\r\nHost: allowed.example\r\n\r\n", nil},
		"space in name":     {"GET / HTTP/1.1\r\nHost : other.example\r\nHost: allowed.example\r\n\r\n", nil},
		"CONNECT":           {"CONNECT allowed.example:80 HTTP/1.1\r\nHost: allowed.example\r\n\r\n", nil},
		"HTTP/2":            {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", nil},
		"newlines before":   {"\r\n\r\nGET / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"lower case":        {"get / http/1.1\nhost: other.example\n\n", nil},
		"tab":               {"GET\t/\tHTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"vertical tab":      {"\x0bGET / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"NUL":               {"\x00\x00GET / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"byte order mark":   {"\xef\xbb\xbfGET / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"high bytes":        {"\x80\x80\x02\x03GET / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"like a record":     {"\x16GET / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"odd line before":   {"\x0b\r\n\x0c\nGET / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"odd method":        {"\"GET\" / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"colon":             {"GET: / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"bare CR":           {"GET / HTTP/1.1\rHost: other.example\r\r", nil},
		"bare CR, odd":      {"\x0bGET / HTTP/1.1\rHost: other.example\r\r", nil},
		"no version":        {"GET /\r\nHost: other.example\r\n\r\n", nil},
		"no version, odd":   {"\x0bGET http://other.example/\r\n\r\n", nil},
		"no version or end": {"GET /", nil},
		"PROXY":             {"PROXY TCP4 192.0.2.1 192.0.2.2 1 80\r\nGET / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"PROXY 2":           {"\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00GET / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"dot at the end":    {"GET / HTTP/1.1\r\nHost: allowed.example.\r\n\r\n", []string{`GET allowed.example./ ""`}},
		"upper case":        {"GET / HTTP/1.1\r\nHOST: ALLOWED.EXAMPLE\r\n\r\n", []string{`GET ALLOWED.EXAMPLE/ ""`}},
		"not in ASCII":      {"GET / HTTP/1.1\r\nHost: b\xc3\xbccher.wild.example\r\n\r\n", nil},
		"user in target":    {"GET http://allowed.example@other.example/ HTTP/1.1\r\nHost: allowed.example\r\n\r\n", nil},
		"NUL in host":       {"GET / HTTP/1.1\r\nHost: other.example\x00.wild.example\r\n\r\n", nil},
		"slash in host":     {"GET / HTTP/1.1\r\nHost: other.example/.wild.example\r\n\r\n", nil},
		"CL and TE":         {"POST / HTTP/1.1\r\nHost: allowed.example\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\nHost: other.example\r\n\r\n", []string{`POST allowed.example/ ""`}},
		"two lengths":       {"POST / HTTP/1.1\r\nHost: allowed.example\r\nContent-Length: 0\r\nContent-Length: 44\r\n\r\nGET / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"odd TE":            {"POST / HTTP/1.1\r\nHost: allowed.example\r\nTransfer-Encoding: xchunked\r\nContent-Length: 40\r\n\r\nGET / HTTP/1.1\r\nHost: other.example\r\n\r\n", nil},
		"smuggled in chunk": {"POST / HTTP/1.1\r\nHost: allowed.example\r\nTransfer-Encoding: chunked\r\n\r\n27\r\nGET / HTTP/1.1\r\nHost: other.example\r\n\r\n\r\n0\r\n\r\n", []string{`"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n"`}},
		"host in trailer":   {"POST / HTTP/1.1\r\nHost: allowed.example\r\nTransfer-Encoding: chunked\r\nTrailer: Host\r\n\r\n0\r\nHost: other.example\r\n\r\n", []string{`POST allowed.example/ ""`}},
	} {
		t.Run(what, func(t *testing.T) {
			server := newWeb(t)
			r := newRig(t, 0)
			r.redirectTo(server.Listener)
			c := dial(t, r.proxy)
			if _, err := io.WriteString(c, tc.said); err != nil {
				t.Fatal(err)
			}
			in := bufio.NewReader(c)
			for _, want := range tc.want {
				resp, err := http.ReadResponse(in, nil)
				if err != nil {
					// A reset for the second request may overtake the first answer.
					if what != "second other" {
						t.Errorf("no answer: %v, want %q", err, want)
					}
					break
				}
				body, err := io.ReadAll(resp.Body)
				if err != nil || !strings.Contains(string(body), want) {
					t.Errorf("answered %q, %v, want %q", body, err, want)
				}
			}
			if tc.want != nil {
				_ = c.CloseWrite()
			}
			for {
				resp, err := http.ReadResponse(in, nil)
				if err != nil {
					if errors.Is(err, os.ErrDeadlineExceeded) {
						t.Error("the connection stays open")
					}
					break
				}
				if resp.StatusCode < 400 {
					t.Errorf("one more answer: %s", resp.Status)
				}
				_, _ = io.Copy(io.Discard, resp.Body)
			}
			for _, host := range server.askedFor() {
				if !strings.HasPrefix(strings.ToLower(host), "allowed.example") && host != "a.wild.example" {
					t.Errorf("the server was asked for %q", host)
				}
			}
		})
	}
}

// TestHTTPBehindSomethingElse checks that HTTP after other bytes does not reach the server, in
// any pieces, and that bytes without HTTP pass in the same pieces.
func TestHTTPBehindSomethingElse(t *testing.T) {
	got := make(chan []byte, 1)
	l := listen(t)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b, _ := io.ReadAll(c)
			_ = c.Close()
			got <- b
		}
	}()
	r := newRig(t, 0)
	r.redirectTo(l)
	const request = "GET / HTTP/1.1\r\nHost: other.example\r\n\r\n"
	for _, tc := range []struct {
		pieces []string
		passes bool
	}{
		{[]string{"\x0b", request}, false},
		{[]string{"\x05\x01\x00", "GET / HT", "TP/1.1\r\n\r\n"}, false},
		{[]string{"\x80\x80\x80\x80", "\r\n", "get / http", "/1.0\r\n\r\n"}, false},
		{[]string{"\x00\n\n", "\x00", request}, false},
		{[]string{"\x0b", "GET /", "\r\nHost: other.example\r\n\r\n"}, false},
		{[]string{"\x05\x01\x00", "\x05\x01\x00\x03\x07example\x00\x50", "HTTP is not all", "\nHTTP/1.1"}, true},
		{[]string{"\x80\x80", strings.Repeat("x", maxLine), "HTTP/1.1"}, true},
	} {
		c := dial(t, r.proxy)
		_ = c.SetNoDelay(true)
		said := ""
		for _, piece := range tc.pieces {
			if _, err := io.WriteString(c, piece); err != nil && tc.passes {
				t.Fatal(err)
			}
			said += piece
			time.Sleep(5 * time.Millisecond) // so that pieces arrive one by one; no result depends on it
		}
		_ = c.CloseWrite()
		b := <-got
		if whole := string(b) == said; whole != tc.passes ||
			!tc.passes && strings.Contains(strings.ToUpper(string(b)), "HTTP/") {
			t.Errorf("%q: the server got %q, want all of it: %v", tc.pieces, b, tc.passes)
		}
	}
	if !slices.Contains(r.denials(), "tcp ") {
		t.Errorf("not reported: %v", r.denials())
	}
}

func TestWebSocket(t *testing.T) {
	server := newWeb(t)
	r := newRig(t, 0)
	r.redirectTo(server.Listener)
	c := dial(t, r.proxy)
	if _, err := io.WriteString(c,
		"GET / HTTP/1.1\r\nHost: allowed.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(c)
	resp, err := http.ReadResponse(in, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v %v", resp, err)
	}
	for _, word := range []string{"frame one\n", "GET / HTTP/1.1\n"} {
		if _, err := io.WriteString(c, word); err != nil {
			t.Fatal(err)
		}
		if got, err := in.ReadString('\n'); got != word {
			t.Fatalf("echo of %q: %q, %v", word, got, err)
		}
	}
}

// echo starts a server that sends a greeting first, if it has one, as SSH and SMTP do, and then
// repeats what it receives.
func echo(t *testing.T, greeting string) net.Listener {
	l := listen(t)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.WriteString(c, greeting)
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return l
}

func TestOtherProtocols(t *testing.T) {
	r := newRig(t, 0)
	for _, tc := range []struct{ greeting, said string }{
		{"login: ", "l"},
		{"220 mail\r\n", "EHLO me\r\n"},
		{"", "\x00\x00\x00\x08\x04\xd2\x16\x2f"}, // PostgreSQL asks for TLS
		{"", "PING\r\n"},
		{"", "NICK me\r\n"},
		{"", "word"},
		{"", "\x16"},
		{"", "\x80\x80"},
	} {
		r.redirectTo(echo(t, tc.greeting))
		c := dial(t, r.proxy)
		if tc.greeting != "" {
			b := make([]byte, len(tc.greeting))
			if _, err := io.ReadFull(c, b); err != nil || string(b) != tc.greeting {
				t.Errorf("the server's %q came as %q, %v", tc.greeting, b, err)
			}
		}
		if _, err := io.WriteString(c, tc.said); err != nil {
			t.Fatal(err)
		}
		_ = c.CloseWrite()
		if got, err := io.ReadAll(c); string(got) != tc.said {
			t.Errorf("echo of %q: %q, %v", tc.said, got, err)
		}
	}
	// The proxy must have called the server by now, and yet no unchecked byte reaches it.
	for _, said := range map[string]string{
		"late TLS":  string(clientHello("other.example")),
		"late HTTP": "GET / HTTP/1.1\r\nHost: other.example\r\n\r\n",
	} {
		called := make(chan net.Conn, 1)
		l := listen(t)
		go func() {
			if c, err := l.Accept(); err == nil {
				called <- c
			}
		}()
		r.redirectTo(l)
		c := dial(t, r.proxy)
		server := <-called
		_, _ = io.WriteString(c, said)
		refused(t, c)
		_ = server.SetDeadline(time.Now().Add(deadline))
		refused(t, server)
		_ = server.Close()
	}
	// HTTP that begins late is checked as HTTP.
	web := newWeb(t)
	r.redirectTo(web.Listener)
	c := dial(t, r.proxy)
	eventually(t, "the server is called before the client spoke", func() bool {
		r.Proxy.mu.Lock()
		defer r.Proxy.mu.Unlock()
		for s := range r.sessions {
			s.mu.Lock()
			called := s.server != nil && s.from == source(c) // the only open session
			s.mu.Unlock()
			if called {
				return true
			}
		}
		return false
	})
	_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: allowed.example\r\nConnection: close\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != 200 {
		t.Errorf("late HTTP: %v, %v", resp, err)
	}
}

// TestPorts checks that only TLS and HTTP pass on their ports, and that the server is not called
// for anything else.
func TestPorts(t *testing.T) {
	r := newRig(t, 0)
	for _, port := range []uint16{80, 443} {
		r.set(func() { r.to = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port) })
		for _, said := range []string{"SSH-2.0-x\r\n", "PING\r\n", "\x00\x01", string(clientHello("other.example")),
			"GET / HTTP/1.1\r\nHost: other.example\r\n\r\n"} {
			before := len(r.denials())
			c := dial(t, r.proxy)
			_, _ = io.WriteString(c, said)
			refused(t, c)
			if after := r.denials(); len(after) != before+1 {
				t.Errorf("port %d, %q: reported %v", port, said, after[before:])
			}
		}
	}
}

func TestRefusedAddresses(t *testing.T) {
	local := netip.MustParseAddr("127.0.0.1")
	for what, change := range map[string]func(r *rig){
		"a stranger":              func(r *rig) { r.gone = true },
		"an address not given":    func(r *rig) { r.to = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), r.to.Port()) },
		"an address not for it":   func(r *rig) { r.handle = 2 },
		"an address never":        func(r *rig) { r.banned = []netip.Addr{local} },
		"the name is not allowed": func(r *rig) { r.sandbox = Sandbox{Domains: []string{"elsewhere.example"}} },
	} {
		server := newWeb(t)
		r := newRig(t, 0)
		r.redirectTo(server.Listener)
		r.set(func() { change(r) })
		c, err := net.Dial("tcp4", r.proxy)
		if err != nil {
			continue // it was reset at once
		}
		_ = c.SetDeadline(time.Now().Add(deadline))
		_, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: allowed.example\r\n\r\n")
		refused(t, c)
		_ = c.Close()
		if n := len(server.askedFor()); n != 0 {
			t.Errorf("%s: the server was asked", what)
		}
	}
}

func TestRecheck(t *testing.T) {
	r := newRig(t, 0)
	r.redirectTo(echo(t, "hello"))
	c := dial(t, r.proxy)
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	local := netip.MustParseAddr("127.0.0.1")
	r.Recheck(local)
	_, _ = io.WriteString(c, "still")
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "still" {
		t.Fatalf("after a check that changes nothing: %q, %v", b, err)
	}
	r.set(func() { r.sandbox = Sandbox{Domains: []string{"elsewhere.example"}} })
	r.Recheck(local)
	refused(t, c)
}

func TestIdle(t *testing.T) {
	r := newRig(t, time.Second)
	r.redirectTo(echo(t, "hello"))
	c := dial(t, r.proxy)
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	refused(t, c)
}

// TestSlowLoris checks that the proxy does not wait for a client that sends byte by byte.
func TestSlowLoris(t *testing.T) {
	r := newRig(t, 0)
	web := newWeb(t)
	for what, said := range map[string]string{
		"a ClientHello": string(clientHello("allowed.example")),
		"a line":        "GET /" + strings.Repeat("a", 4096),
		"a header":      "GET / HTTP/1.1\r\nHost: allowed.example\r\nX: " + strings.Repeat("a", 4096),
	} {
		r.redirectTo(web.Listener)
		c := dial(t, r.proxy)
		for i := 0; ; i++ {
			if i == len(said) {
				t.Errorf("%s: all of it was waited for", what)
				break
			}
			if _, err := io.WriteString(c, said[i:i+1]); err != nil {
				break
			}
			time.Sleep(5 * time.Millisecond) // the test is about slowness
		}
	}
	if n := len(web.askedFor()); n != 0 {
		t.Errorf("the server was asked %d times", n)
	}
}
