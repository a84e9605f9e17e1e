package agentapi

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// serve returns a client for which one test server is every sandbox, and a count of its dials.
func serve(t *testing.T, h http.HandlerFunc) (*Client, *atomic.Int64) {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	dials := &atomic.Int64{}
	c := NewClient(func(ctx context.Context, _ string) (net.Conn, error) {
		dials.Add(1)
		var d net.Dialer
		return d.DialContext(ctx, "tcp", srv.Listener.Addr().String())
	})
	t.Cleanup(c.CloseIdle)
	return c, dials
}

// TestOnCall checks that OnCall is told when each answer was read or each request failed.
func TestOnCall(t *testing.T) {
	c, _ := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/health" {
			w.WriteHeader(http.StatusNotFound)
		}
	})
	began, ended := map[string]int{}, map[string]int{}
	c.OnCall = func(id string) func() {
		began[id]++
		return func() { ended[id]++ }
	}
	if err := c.Health(t.Context(), Target{SandboxID: "sbx_1", Run: "r"}); err != nil {
		t.Error(err)
	}
	if _, err := c.Stat(t.Context(), Target{SandboxID: "sbx_2", Run: "r"}, "/x", ""); err == nil {
		t.Error("what the agent refuses succeeds")
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Health(gone, Target{SandboxID: "sbx_3", Run: "r"}); err == nil {
		t.Error("a call that is given up succeeds")
	}
	for _, id := range []string{"sbx_1", "sbx_2", "sbx_3"} {
		if began[id] != 1 || ended[id] != 1 {
			t.Errorf("%s began %d times and ended %d times", id, began[id], ended[id])
		}
	}
}

// countedConn counts what is written to it.
type countedConn struct {
	net.Conn
	writes atomic.Int64
}

func (c *countedConn) Write(b []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(b)
}

// TestShortRequestsAreSentWhole checks that a short request is one write: a command and another call.
func TestShortRequestsAreSentWhole(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if b, err := io.ReadAll(r.Body); err != nil || len(b) == 0 {
			t.Errorf("the body is %q, %v", b, err)
		}
		w.WriteHeader(http.StatusNoContent)
	}))
	defer srv.Close()
	var conn *countedConn
	c := NewClient(func(ctx context.Context, _ string) (net.Conn, error) {
		var d net.Dialer
		inner, err := d.DialContext(ctx, "tcp", srv.Listener.Addr().String())
		conn = &countedConn{Conn: inner}
		return conn, err
	})
	defer c.CloseIdle()
	target := Target{SandboxID: "sbx_a", Run: "1"}
	if err := c.Init(t.Context(), target, InitRequest{Hostname: "a"}); err != nil {
		t.Fatal(err)
	}
	if n := conn.writes.Load(); n != 1 {
		t.Errorf("an init was %d writes", n)
	}
	conn = nil
	// The server does not speak Connect, so the call fails after its request was sent.
	command := ExecuteRequest{Args: []string{"true"}}
	if _, err := c.Execute(t.Context(), Target{SandboxID: "sbx_b", Run: "1"}, command); err == nil {
		t.Error("executed by a server that cannot")
	}
	if n := conn.writes.Load(); n != 1 {
		t.Errorf("a command was %d writes", n)
	}
}

func TestConnectionsBelongToOneRun(t *testing.T) {
	c, dials := serve(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	for i, step := range []struct {
		target Target
		dials  int64
	}{
		{Target{SandboxID: "sbx_a", Run: "1"}, 1}, {Target{SandboxID: "sbx_a", Run: "1"}, 1},
		{Target{SandboxID: "sbx_a", Run: "2"}, 2}, {Target{SandboxID: "sbx_b", Run: "1"}, 3},
		{Target{SandboxID: "sbx_a", Run: "2"}, 3},
	} {
		if err := c.Health(t.Context(), step.target); err != nil {
			t.Fatal(err)
		}
		if got := dials.Load(); got != step.dials {
			t.Errorf("step %d: %d dials, want %d", i, got, step.dials)
		}
	}
	c.Drop("sbx_a")
	c.mu.Lock()
	left := len(c.conns)
	c.mu.Unlock()
	if left != 1 {
		t.Errorf("connections to %d sandboxes are left, want 1", left)
	}
	if err := c.Health(t.Context(), Target{SandboxID: "sbx_a", Run: "2"}); err != nil || dials.Load() != 4 {
		t.Errorf("after Drop: %v, %d dials", err, dials.Load())
	}
}

func TestDropBreaksCalls(t *testing.T) {
	entered, release := make(chan bool), make(chan bool)
	c, _ := serve(t, func(http.ResponseWriter, *http.Request) { entered <- true; <-release })
	defer close(release)
	over := make(chan error)
	go func() { over <- c.Health(t.Context(), Target{SandboxID: "sbx_a"}) }()
	<-entered
	c.Drop("sbx_a")
	if err := <-over; !fault.Is(err, fault.Unavailable) {
		t.Errorf("got %v, want Unavailable", err)
	}
}

func TestErrorsOfDialAndContext(t *testing.T) {
	gone := fault.New(fault.Conflict, "sandbox_not_running", "it is gone")
	for name, c := range map[string]struct {
		dial error
		kind fault.Kind
		code string
	}{
		"of the node": {gone, fault.Conflict, "sandbox_not_running"},
		"any other":   {errors.New("refused"), fault.Unavailable, fault.CodeSandboxUnreachable},
	} {
		client := NewClient(func(context.Context, string) (net.Conn, error) { return nil, c.dial })
		_, execErr := client.Execute(t.Context(), Target{SandboxID: "sbx_a"}, ExecuteRequest{Command: "true"})
		for _, err := range []error{client.Health(t.Context(), Target{SandboxID: "sbx_a"}), execErr} {
			if f := fault.As(err); f == nil || f.Kind != c.kind || f.Code != c.code {
				t.Errorf("%s: %v, want %v %s", name, err, c.kind, c.code)
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	client, _ := serve(t, func(http.ResponseWriter, *http.Request) {})
	if err := client.Health(ctx, Target{SandboxID: "sbx_a"}); !errors.Is(err, context.Canceled) || fault.As(err) != nil {
		t.Errorf("cancelled: %v", err)
	}
}

// TestHostileAnswers checks that a program that answers in the agent's place cannot make the host hold
// much memory or follow a redirect.
func TestHostileAnswers(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	for name, h := range map[string]http.HandlerFunc{
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://127.0.0.1:1/", http.StatusFound)
		},
		"long error": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set(CodeHeader, fault.CodeInvalidPath)
			w.WriteHeader(400)
			_, _ = io.WriteString(w, `{"message":"`+long+`"}`)
		},
		"long header": func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", long) },
		"unknown code": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set(CodeHeader, "made_up")
			w.WriteHeader(400)
		},
		"endless line": func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, long) },
		"not connect": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/plain")
			_, _ = io.WriteString(w, "hello")
		},
		"empty entries": func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, strings.Repeat("{}\n", MaxEntries+1))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := serve(t, h)
			target := Target{SandboxID: "sbx_a"}
			listErr := c.List(t.Context(), target, "/", "", 1, func(Entry) error { return nil })
			_, execErr := c.Execute(t.Context(), target, ExecuteRequest{Command: "true", Timeout: time.Second})
			for _, err := range []error{listErr, execErr} {
				if err == nil {
					t.Error("was taken for an answer")
				} else if len(err.Error()) > 3*maxErrorText {
					t.Errorf("an error of %d bytes", len(err.Error()))
				}
			}
		})
	}
}

func TestUploadReportsTheBodysError(t *testing.T) {
	c, _ := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	broken := errors.New("broken")
	body := io.MultiReader(strings.NewReader("x"), errReader{broken})
	err := c.Upload(t.Context(), Target{SandboxID: "sbx_a"}, UploadRequest{Path: "/x", Body: body, Size: -1})
	if !errors.Is(err, broken) {
		t.Errorf("got %v, want the body's error", err)
	}
}

type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }

func TestCheckPath(t *testing.T) {
	for p, want := range map[string][2]bool{ // CheckPath, CheckFilePath
		"/": {true, false}, "//": {true, false}, "/./": {true, false}, "/a": {true, true}, "/a/": {true, false},
		"/a/.": {true, false}, "/a//b": {true, true},
		"": {}, "a": {}, "./a": {}, "/..": {}, "/a/../b": {}, "/a/..": {}, "/a\x00": {},
		"/...": {true, true}, "/a..b": {true, true}, "~/a": {},
		"/" + strings.Repeat("a", 4094): {true, true}, "/" + strings.Repeat("a", 4095): {},
	} {
		for i, err := range []error{CheckPath(p), CheckFilePath(p)} {
			if (err == nil) != want[i] {
				t.Errorf("%.20q, check %d: %v", p, i, err)
			}
			f := fault.As(err)
			if err != nil && (f == nil || f.Kind != fault.Invalid || f.Field != "path" || f.Code != fault.CodeInvalidPath) {
				t.Errorf("%.20q: %v is not Invalid in path", p, err)
			}
		}
	}
}

func FuzzCheckPath(f *testing.F) {
	for _, p := range []string{"/", "/a/b", "/a/../b", "a", "", "/a\x00b", "//..//"} {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, p string) {
		if CheckFilePath(p) == nil && CheckPath(p) != nil {
			t.Errorf("%q is a file's path but no path", p)
		}
		if CheckPath(p) != nil {
			return
		}
		// A path that is let through stays below the root however it is joined.
		if p[0] != '/' || strings.Contains(p, "\x00") || strings.Contains("/"+p+"/", "/../") {
			t.Errorf("%q was let through", p)
		}
	})
}

func FuzzExecuteRequest(f *testing.F) {
	f.Add("true", "", "", "A", "b", "/tmp", int64(1))
	f.Add("", "echo", "x y", "", "", "", int64(0))
	f.Add("a\x00b", "c", "d", "=", "\x00", "\x00", int64(-1))
	f.Fuzz(func(t *testing.T, command, arg0, arg1, name, value, workdir string, timeout int64) {
		r := ExecuteRequest{Command: command, Env: map[string]string{name: value}, Workdir: workdir,
			Timeout: time.Duration(timeout)}
		if arg0 != "" || arg1 != "" {
			r.Args = []string{arg0, arg1}
		}
		err := r.Check()
		if err != nil {
			if f := fault.As(err); f == nil || f.Kind != fault.Invalid || f.Field == "" {
				t.Fatalf("%v is not Invalid in a field", err)
			}
			return
		}
		m := r.message(true)
		for _, s := range append([]string{m.Process.Cmd, m.Process.GetCwd(), name + value}, m.Process.Args...) {
			if strings.Contains(s, "\x00") {
				t.Errorf("a NUL got through in %q", s)
			}
		}
		if m.Process.Cmd == "" || name == "" || strings.Contains(name, "=") {
			t.Errorf("got through: %v", m)
		}
		if timeout > 0 && m.Execute.TimeoutMs == 0 {
			t.Error("a short time limit became none")
		}
	})
}
