package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// attackedFiles limits the files that the attacked server may have open. A low limit lets a test
// reach it with few connections.
const attackedFiles = 1024

// attackedServer returns the server that most attacks run against. Its limits are small.
var attackedServer = sync.OnceValue(func() *server {
	s := newServer(suite, "CAY_POOL_ENABLED=true", "CAY_POOL_TARGET=1", "CAY_TEMPLATES_PREPARE=python",
		"CAY_TEMPLATES_MAX_PER_ORG=3",
		"CAY_SANDBOX_MAX_SNAPSHOTS=3", "CAY_PROXY_DOMAIN="+portsZone, "CAY_PROXY_SCHEME=http")
	limited := filepath.Join(filepath.Dir(s.dataDir), "cay")
	script := fmt.Sprintf("#!/bin/sh\nulimit -n %d\nexec %s \"$@\"\n", attackedFiles, s.binary)
	if err := os.WriteFile(limited, []byte(script), 0o700); err != nil {
		suite.Fatal(err)
	}
	s.binary = limited
	s.start()
	s.needTemplate("python")
	return s
})

func attacked(t *testing.T) *server {
	t.Helper()
	own := *attackedServer()
	own.t = t
	return &own
}

// works checks that an honest organization gets answers on connections of its own, and that the
// server has not run out of files.
func (s *server) works(id string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	for range 5 {
		// A server at its limit closes idle connections, and a POST on one of them would fail.
		http.DefaultClient.CloseIdleConnections()
		if status, body, err := s.try(ctx, "POST", "/v1/sandboxes/"+id+"/execute",
			object{"args": []string{"true"}}); err != nil || status != 200 {
			s.t.Errorf("during the attack, execute answers %d %s, %v", status, body, err)
		}
	}
	u, err := s.usage()
	if err != nil {
		s.t.Fatal(err)
	}
	if u.files > u.filesMost*9/10 {
		s.t.Errorf("the server has %d of %d files open", u.files, u.filesMost)
	}
}

// dial opens a connection that the test closes at its end.
func (s *server) dial(send string) net.Conn {
	s.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	_, _ = io.WriteString(conn, send) // the server may have closed it
	return conn
}

// TestConnectionFloods opens more connections than the server may have files, of every slow kind.
// An honest organization works on, and the server keeps files for it.
func TestConnectionFloods(t *testing.T) {
	onOneStore(t)
	s := attacked(t)
	id := s.create(nil)
	defer s.destroy(id)
	other := s.tenant("connections", nil)
	const head = "GET /v1/sandboxes HTTP/1.1\r\nHost: x\r\n"
	for name, send := range map[string]string{
		"nothing sent":            "",
		"half a header":           head + "X-Slow: ",
		"at rest, without a key":  head + "\r\n",
		"at rest, with a key":     head + "Authorization: Bearer " + other.key + "\r\n\r\n",
		"a body to come":          "POST /v1/sandboxes HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
		"E2B, a body to come":     "POST /v2/sandboxes HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{",
		"chunks to come":          "PUT /v1/sandboxes/" + id + "/files?path=/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n",
		"HTTP/2 without a stream": http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00",
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			var slow []net.Conn
			for range attackedFiles + 100 {
				slow = append(slow, s.dial(send))
			}
			for range 3 { // a byte now and then keeps a connection from looking dead
				for _, conn := range slow {
					if send != "" && !strings.HasSuffix(send, "\x00") {
						_, _ = io.WriteString(conn, "x") // the server may have closed it
					}
				}
				s.works(id)
			}
			for _, conn := range slow {
				conn.Close()
			}
		})
	}
	if strings.Contains(s.lastLog(), "too many open files") {
		t.Error("the server has run out of files")
	}
}

// TestHTTP2Floods sends the known attacks on HTTP/2. The server ends the connection or answers,
// serves other clients, and frees the memory and the goroutines afterwards.
func TestHTTP2Floods(t *testing.T) {
	onOneStore(t)
	s := attacked(t)
	id := s.create(nil)
	defer s.destroy(id)
	s.works(id)
	h := s.tenant("floods", nil)
	own := h.create(nil)
	defer h.destroy(own)
	goroutines, before := s.metric("go_goroutines"), hostNow(s)
	var block bytes.Buffer
	e := hpack.NewEncoder(&block)
	for _, f := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", "/v1/sandboxes/" + own + "/execute"},
		{":authority", "x"},
		{"authorization", "Bearer " + h.key}, {"content-type", "application/json"}} {
		_ = e.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]}) // a buffer does not fail
	}
	header := func(stream int, end bool) http2.HeadersFrameParam {
		return http2.HeadersFrameParam{StreamID: uint32(2*stream + 1), BlockFragment: block.Bytes(), EndHeaders: end}
	}
	for name, flood := range map[string]func(f *http2.Framer, i int) error{
		"rapid reset": func(f *http2.Framer, i int) error {
			return errors.Join(f.WriteHeaders(header(i, true)), f.WriteRSTStream(uint32(2*i+1), http2.ErrCodeCancel))
		},
		"streams without an end": func(f *http2.Framer, i int) error { return f.WriteHeaders(header(i, true)) },
		"continuations without an end": func(f *http2.Framer, i int) error {
			if i == 0 {
				return f.WriteHeaders(header(0, false))
			}
			return f.WriteContinuation(1, false, bytes.Repeat([]byte("\x00\x01a\x01b"), 2000))
		},
		"empty continuations": func(f *http2.Framer, i int) error {
			if i == 0 {
				return f.WriteHeaders(header(0, false))
			}
			return f.WriteContinuation(1, false, nil)
		},
		"settings": func(f *http2.Framer, i int) error {
			return f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(i)})
		},
		"pings": func(f *http2.Framer, i int) error { return f.WritePing(false, [8]byte{byte(i)}) },
		"empty data": func(f *http2.Framer, i int) error {
			if i == 0 {
				return f.WriteHeaders(header(0, true))
			}
			return f.WriteData(1, false, nil)
		},
		"window updates": func(f *http2.Framer, i int) error { return f.WriteWindowUpdate(0, 1) },
		"a table that is resized": func(f *http2.Framer, i int) error {
			h := header(i, true)
			h.EndStream, h.BlockFragment = true, append([]byte{0x3f, 0xe1, 0x1f, 0x20}, block.Bytes()...)
			return f.WriteHeaders(h)
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			var wg sync.WaitGroup
			for range 4 {
				conn := s.dial(http2.ClientPreface)
				f := http2.NewFramer(conn, conn)
				f.AllowIllegalWrites = true
				wg.Go(func() {
					// The test reads nothing that the server sends; the server must not buffer it without a limit.
					_ = conn.SetWriteDeadline(time.Now().Add(5 * time.Second))
					err := f.WriteSettings()
					for i := 0; err == nil && i < 5_000; i++ {
						err = flood(f, i)
					}
				})
			}
			s.works(id)
			wg.Wait()
			s.works(id)
		})
	}
	s.settlesAt(goroutines+100, before.rssMB+128)
}

// settlesAt waits until the server has at most so many goroutines and so much memory in use.
func (s *server) settlesAt(goroutines, rssMB int) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) { // a poll with a deadline
		n, u := s.metric("go_goroutines"), hostNow(s)
		if n <= goroutines && u.rssMB <= rssMB {
			return
		}
		if time.Now().After(deadline) {
			s.t.Errorf("the server keeps %d goroutines and %d MiB; it should have at most %d and %d", n, u.rssMB, goroutines,
				rssMB)
			return
		}
	}
}

// TestFollowerFlood lets one organization follow one process, watch one directory and open
// terminals hundreds of times. Another organization works on, and everything ends when the
// followers leave.
func TestFollowerFlood(t *testing.T) {
	s := attacked(t)
	honest := s.create(nil)
	defer s.destroy(honest)
	h := s.tenant("followers", object{"sandboxes": 2})
	id := h.create(nil)
	defer h.destroy(id)
	s.works(honest)
	goroutines, before := s.metric("go_goroutines"), hostNow(s)
	_, body := h.call("POST", "/v1/sandboxes/"+id+"/processes",
		object{"command": "while :; do head -c 65536 /dev/zero | tr '\\0' x; sleep 0.1; done"})
	process := fmt.Sprint(s.number(strings.ReplaceAll(string(body), ",", "\n"), `"pid":`))
	head := "GET /v1/sandboxes/" + id + "%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + h.key +
		"\r\nAccept: text/event-stream\r\n\r\n"
	for _, path := range []string{"/processes/" + process + "/output", "/files/watch?path=/tmp&recursive=true",
		"/processes/" + process + "/wait?timeout=1m"} {
		var flood []net.Conn
		for range 150 {
			flood = append(flood, s.dial(fmt.Sprintf(head, path))) // nothing is read from these
		}
		s.works(honest)
		for _, conn := range flood {
			conn.Close()
		}
	}
	ctx, leave := context.WithTimeout(t.Context(), 20*time.Second)
	defer leave()
	var terminals []*websocket.Conn
	for range 20 {
		conn, _, err := websocket.Dial(ctx, strings.Replace(s.url, "http", "ws", 1)+"/v1/sandboxes/"+id+
			"/terminal?grace=1s&command=yes",
			&websocket.DialOptions{Subprotocols: []string{terminalProtocols, "cay.key." + h.key}})
		if err != nil {
			continue // refused by a limit, which may be any
		}
		terminals = append(terminals, conn)
	}
	if len(terminals) == 0 {
		t.Error("no terminal opened")
	}
	s.works(honest)
	for _, conn := range terminals {
		_ = conn.CloseNow() // without a closing handshake
	}
	h.call("DELETE", "/v1/sandboxes/"+id+"/processes/"+process, nil)
	s.noLeases()
	s.settlesAt(goroutines+100, before.rssMB+128)
}

const terminalProtocols = "cay.terminal.v1"

// TestHostileBodies sends bodies that are cheap to write and expensive to read. The server refuses
// each with a reason and keeps no memory for it.
func TestHostileBodies(t *testing.T) {
	onOneStore(t)
	s := attacked(t)
	id := s.create(nil)
	defer s.destroy(id)
	goroutines, before := s.metric("go_goroutines"), hostNow(s)
	key := s.e2bKey()
	for name, body := range map[string]string{
		"deep objects":    strings.Repeat(`{"env":`, 120_000),
		"deep lists":      `{"metadata":` + strings.Repeat("[", 900_000),
		"a huge number":   `{"template":"python","disk_size_mb":1` + strings.Repeat("0", 900_000) + "}",
		"a huge exponent": `{"template":"python","disk_size_mb":1e999999999}`,
		"doubled keys":    `{"template":"python","template":"base"}`,
		"many keys":       `{"template":"python","env":{` + strings.Repeat(`"k":"v",`, 100_000) + `"k":"v"}}`,
		"no UTF-8":        "{\"template\":\"python\",\"metadata\":{\"a\":\"\xff\xfe\"}}",
		"half characters": `{"template":"python","metadata":{"a":"\ud800"}}`,
		"more after it":   `{"template":"python"}{"template":"python"}`,
		"a list":          `[{"template":"python"}]`,
		"NUL":             "{\"template\":\"python\x00\"}",
		"too much":        `{"template":"` + strings.Repeat("x", 9<<20) + `"}`,
	} {
		if status, answer := s.send("POST", "/v1/sandboxes", "application/json", strings.NewReader(body)); status/100 != 4 ||
			text(answer, "code") == "" || len(answer) > 2<<10 {
			t.Errorf("%s: %d %.300s", name, status, answer)
		}
		e2bBody := strings.ReplaceAll(strings.ReplaceAll(body, `"template"`, `"templateID"`), `"env"`, `"envVars"`)
		if status, answer := s.e2bCall(key, "POST", "/v2/sandboxes", e2bBody); status == 201 {
			s.e2bCall(key, "DELETE", "/sandboxes/"+text(answer, "sandboxID"), "")
			if name != "doubled keys" && name != "many keys" && name != "no UTF-8" && name != "half characters" {
				t.Errorf("E2B, %s: %d %.300s", name, status, answer)
			}
		} else if status/100 != 4 && status != 501 || len(answer) > 2<<10 {
			t.Errorf("E2B, %s: %d %.300s", name, status, answer)
		}
	}
	// Forms of thousands of parts, with an endless part header, and without parts.
	part := "--x\r\nContent-Disposition: form-data; name=\"template\"\r\n\r\n{}\r\n"
	for name, body := range map[string]string{
		"many parts":        strings.Repeat(part, 20_000) + "--x--\r\n",
		"an endless header": "--x\r\nX-Long: " + strings.Repeat("a", 4<<20),
		"many headers":      "--x\r\n" + strings.Repeat("X-A: a\r\n", 200_000) + "\r\n\r\n--x--\r\n",
		"no part":           "--x--\r\n",
		"cut":               part[:40],
	} {
		if status, answer := s.send("POST", "/v1/templates", "multipart/form-data; boundary=x",
			strings.NewReader(body)); status/100 != 4 || text(answer, "code") == "" {
			t.Errorf("form, %s: %d %.300s", name, status, answer)
		}
	}
	// An archive that unpacks to a hundred times its size fills the sandbox's own disk, and no other.
	if status, answer := s.send("PUT", "/v1/sandboxes/"+id+"/files/tar?path=/tmp/bomb", "application/x-tar",
		bytes.NewReader(bombContext())); status/100 != 2 && status/100 != 4 && status != 507 {
		t.Errorf("archive: %d %.300s", status, answer)
	}
	s.alive(id)
	s.settlesAt(goroutines+50, before.rssMB+128)
}
