package egressproxy

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// FuzzHello compares the reader of ClientHellos with crypto/tls. Whatever the reader accepts,
// crypto/tls accepts too, with the same name, in records of any size.
func FuzzHello(f *testing.F) {
	hello := clientHello("allowed.example")
	f.Add(hello, byte(7))
	f.Add(records(hello[recordHeader:], 50), byte(200))
	f.Add(clientHello(""), byte(1))
	f.Fuzz(func(t *testing.T, b []byte, size byte) {
		in := bytes.NewReader(b)
		name, err := readHello(in)
		if err != nil {
			return
		}
		if s, sure := classify(b); !sure || s != protocolTLS {
			t.Fatalf("%x is a ClientHello, and not taken for TLS", b)
		}
		if model, err := serverName(b); err != nil || model != name {
			t.Fatalf("%x names %q, to crypto/tls %q, %v", b, name, model, err)
		}
		var handshake []byte
		for rest := b[:len(b)-in.Len()]; len(rest) > 0; {
			n := recordHeader + int(rest[3])<<8 + int(rest[4])
			handshake, rest = append(handshake, rest[recordHeader:n]...), rest[n:]
		}
		again := records(handshake, int(size)+1)
		if got, err := readHello(bytes.NewReader(again)); len(again) <= maxHello && (err != nil || got != name) {
			t.Fatalf("in records of %d bytes: %q, %v, want %q", size+1, got, err, name)
		}
	})
}

// FuzzClassify checks that more bytes never change a sure result, except for another protocol
// that turns out to be HTTP, and that every request of net/http is classified as HTTP.
func FuzzClassify(f *testing.F) {
	for _, s := range []string{"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "\r\n\tGET\t/ http/1.0\n", "PING\r\n", "\x16\x03\x01",
		"\x80\x2e\x01\x03\x01", "\x0bGET / HTTP/1.1\n\n"} {
		f.Add([]byte(s), 5)
	}
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		whole, sure := classify(b)
		if part, first := classify(b[:max(0, min(n, len(b)))]); first &&
			(!sure || part != whole && (part != protocolOther || whole != protocolHTTP)) {
			t.Fatalf("%q is %d, its first %d bytes are %d", b, whole, n, part)
		}
		if _, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b))); err == nil && (!sure || whole != protocolHTTP) {
			t.Fatalf("%q is a request, and taken for %d", b, whole)
		}
	})
}

// pieces is a reader that returns its bytes in two pieces.
type pieces struct{ first, second []byte }

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.first) == 0 {
		p.first, p.second = p.second, nil
	}
	if len(p.first) == 0 {
		return 0, io.EOF
	}
	n := copy(b, p.first)
	p.first = p.first[n:]
	return n, nil
}

// lenient reports whether the most lenient server finds a request in b. Such a server ignores
// bytes that do not print and empty lines, and accepts any line with a version, or with a known
// method before a path.
func lenient(b []byte) bool {
	start := bytes.IndexFunc(b, func(r rune) bool { return r > ' ' && r < 0x7f })
	if start < 0 {
		return false
	}
	line, _, _ := bytes.Cut(b[start:], []byte("\n"))
	words := strings.Fields(strings.ToUpper(string(line)))
	return len(line) < maxLine/2 && (strings.Contains(strings.ToUpper(string(line)), "HTTP/") ||
		len(words) == 2 && (words[0] == "GET" || words[0] == "POST") && words[1][0] == '/')
}

// FuzzLenient checks that what passes as another protocol is no request to a lenient server or to
// net/http, in any two pieces.
func FuzzLenient(f *testing.F) {
	for _, s := range []string{"GET\r/", "GET\x0c/ x", "\x0bGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"\xef\xbb\xbfGET / HTTP/1.1\n\n", "\x00\r\nGET /\r\n", "GET /", "\x80\x80\x80\x80HTTP/1", "PING\r\n"} {
		f.Add([]byte(s), 1)
		f.Add([]byte(s), 7)
	}
	f.Fuzz(func(t *testing.T, b []byte, n int) {
		n = max(0, min(n, len(b)))
		in := &pieces{append([]byte{}, b[:n]...), append([]byte{}, b[n:]...)}
		o := opening{r: in}
		what, err := sniff(&o)
		if err != nil || what != protocolOther {
			return
		}
		// This follows upload.
		var line firstLine
		var passed []byte
		for said := o.take(); ; {
			if line.read(said) {
				return
			}
			passed = append(passed, said...)
			rest := make([]byte, 4<<10)
			count, err := in.Read(rest)
			if err != nil {
				break
			}
			said = rest[:count]
		}
		if !line.over && line.read([]byte{'\n'}) {
			return
		}
		if lenient(passed) {
			t.Fatalf("%q passed in pieces of %d, and is a request to a lenient server", passed, n)
		}
		if _, err := http.ReadRequest(
			bufio.NewReader(bytes.NewReader(bytes.TrimLeft(passed, "\x00\x0b\x0c\r\n\t ")))); err == nil {
			t.Fatalf("%q passed, and is a request to net/http", passed)
		}
	})
}

// recorder keeps the bytes that a server would get.
type recorder struct{ bytes.Buffer }

func (r *recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := req.Write(r); err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: 200, ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Body: http.NoBody,
		Request: req}, nil
}

// FuzzRequest reads the request that leaves the proxy with a reader far simpler than net/http. It
// must be one request, with one allowed Host and one end of its body.
func FuzzRequest(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: allowed.example\r\n\r\n",
		"GET http://a.wild.example:80/x?y HTTP/1.1\r\nHost: other.example\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: allowed.example\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: allowed.example\r\nConnection: Host, Upgrade\r\nUpgrade: h2c\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: allowed.example\r\nX-A: b\r\n folded\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	h := &fakeHost{handle: 1, sandbox: Sandbox{Domains: []string{"allowed.example", "*.wild.example"}},
		opened: map[netip.Addr]time.Duration{}}
	g := New(h, 0, slog.New(slog.NewTextHandler(io.Discard, nil)))
	f.Fuzz(func(t *testing.T, b []byte) {
		h.denied = nil
		in, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(b)))
		if err != nil {
			return
		}
		s := &session{proxy: g, from: netip.MustParseAddr("127.0.0.1"), handle: 1,
			to: netip.MustParseAddrPort("198.51.100.1:80"), dead: true}
		var out recorder
		if !served(t, s.web(&out), in) || out.Len() == 0 {
			return
		}
		head, _, ok := strings.Cut(out.String(), "\r\n\r\n")
		lines := strings.Split(head, "\r\n")
		if !ok || strings.ContainsAny(strings.Join(lines, ""), "\r\n") {
			t.Fatalf("%q became %q", b, out.String())
		}
		if parts := strings.Split(lines[0], " "); len(parts) != 3 || parts[2] != "HTTP/1.1" ||
			parts[1] != "*" && parts[1][0] != '/' {
			t.Fatalf("%q became a request of %q", b, lines[0])
		}
		seen := map[string]int{}
		for _, line := range lines[1:] {
			name, value, ok := strings.Cut(line, ":")
			name, value = strings.ToLower(name), strings.ToLower(strings.TrimSpace(value))
			if !ok || strings.ContainsAny(name, " \t") {
				t.Fatalf("%q became a header with %q", b, line)
			}
			seen[name]++
			switch host, _, _ := strings.Cut(value, ":"); {
			case name == "host" && strings.TrimSuffix(host, ".") != "allowed.example" &&
				!strings.HasSuffix(strings.TrimSuffix(host, "."), ".wild.example"),
				name == "upgrade" && value != "websocket", name == "http2-settings":
				t.Fatalf("%q became a header with %q", b, line)
			}
		}
		if seen["host"] != 1 || seen["content-length"]+seen["transfer-encoding"] > 1 ||
			strings.HasPrefix(lines[0], "CONNECT ") {
			t.Fatalf("%q became %q", b, out.String())
		}
	})
}

// served reports whether the handler returned without a panic.
func served(t *testing.T, h http.Handler, r *http.Request) (ok bool) {
	defer func() {
		if v := recover(); v != nil {
			if err, is := v.(error); !is || !errors.Is(err, http.ErrAbortHandler) {
				t.Fatalf("panic: %v", v)
			}
		}
	}()
	h.ServeHTTP(httptest.NewRecorder(), r)
	return true
}
