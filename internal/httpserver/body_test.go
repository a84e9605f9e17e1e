package httpserver

import (
	"bufio"
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

	"github.com/cayhq/cay/internal/fault"
)

// frontServer serves do behind a Front whose callers must not stall for longer than 50 ms. It counts
// the requests.
func frontServer(t *testing.T, do func(*Front, *Recorder, *http.Request) error) (addr string, requests *atomic.Int32) {
	t.Helper()
	requests = &atomic.Int32{}
	const short = 50 * time.Millisecond
	f := New(Config{Log: slog.New(slog.DiscardHandler), PiecewiseBodies: true,
		Patience: Patience{Body: short, Stall: short, Drain: short},
		Failed:   func(string) error { return nil },
		Problem: func(w http.ResponseWriter, r *http.Request, err error) {
			f := fault.As(err)
			RefuseJSON(w, r, f.Kind.Status(), f.Code, "application/json", f.Code)
		}})
	srv := httptest.NewUnstartedServer(nil)
	srv.Config = Server("", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		f.Serve(w, r, func(w *Recorder, r *http.Request) error { return do(f, w, r) })
	}), slog.New(slog.DiscardHandler))
	srv.Start()
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String(), requests
}

// TestRestOfBodyIsNoRequest sends half a body, waits for the answer, and then sends a request where
// the other half should be. The server must close the connection instead of answering that.
func TestRestOfBodyIsNoRequest(t *testing.T) {
	for name, do := range map[string]func(*Front, *Recorder, *http.Request) error{
		"refused before the body": func(f *Front, w *Recorder, r *http.Request) error {
			return fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "no")
		},
		"refused within the body": func(f *Front, w *Recorder, r *http.Request) error {
			_, _ = r.Body.Read(make([]byte, 1))
			return fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "no")
		},
		"refused as too large": func(f *Front, w *Recorder, r *http.Request) error {
			_, err := ReadBody(w, r, 1)
			return err
		},
		"read as JSON": func(f *Front, w *Recorder, r *http.Request) error {
			_, err := ReadBody(w, r, 1<<20)
			return err
		},
		"answered within the body": func(f *Front, w *Recorder, r *http.Request) error {
			_ = w.control.EnableFullDuplex()
			w.Header().Set("Content-Length", "2")
			_, _ = io.WriteString(w, "ok")
			_ = w.control.Flush()
			_, _ = io.Copy(io.Discard, r.Body)
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			addr, requests := frontServer(t, do)
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf")
			in := bufio.NewReader(conn)
			resp, err := http.ReadResponse(in, nil)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := io.ReadAll(resp.Body); len(b) == 0 || err != nil {
				t.Errorf("the answer is %q, %v", b, err)
			}
			time.Sleep(150 * time.Millisecond)                        // longer than the server waits for the body
			fmt.Fprint(conn, "GET /next HTTP/1.1\r\nHost: x\r\n\r\n") // may fail, since the connection is closed
			if b, _ := io.ReadAll(in); len(b) > 0 {
				t.Errorf("then it answered %q", b)
			}
			if n := requests.Load(); n != 1 {
				t.Errorf("the server took it for %d requests", n)
			}
		})
	}
}

// TestRefusedBodyKeepsTheConnection checks that a refused call whose body comes whole does not cost
// the connection.
func TestRefusedBodyKeepsTheConnection(t *testing.T) {
	addr, requests := frontServer(t, func(f *Front, w *Recorder, r *http.Request) error {
		return fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "no")
	})
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(conn)
	for range 3 {
		fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n%s", strings.Repeat("x", 500_000))
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(resp.Body); resp.StatusCode != 409 || resp.Close || len(b) == 0 || err != nil {
			t.Errorf("%d, close %v, %q, %v", resp.StatusCode, resp.Close, b, err)
		}
	}
	if n := requests.Load(); n != 3 {
		t.Errorf("%d requests", n)
	}
}
