package proc

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/agentapi/process"
)

func stdout(text string) *process.ProcessEvent {
	data := &process.DataEvent{Output: &process.DataEvent_Stdout{Stdout: []byte(text)}}
	return &process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: data}}
}

func testLog(t *testing.T) *startLog {
	t.Helper()
	l, err := openStartLog(filepath.Join(t.TempDir(), "var/log/start.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.close() })
	return l
}

func wantFile(t *testing.T, path, want string) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || string(got) != want {
		t.Errorf("%s has %.80q (%d bytes), %v; want %.80q (%d bytes)", path, got, len(got), err, want, len(want))
	}
}

func TestStartLog(t *testing.T) {
	l := testLog(t)
	stderr := &process.DataEvent{Output: &process.DataEvent_Stderr{Stderr: []byte("two")}}
	for _, ev := range []*process.ProcessEvent{
		stdout("one\n"), {Event: &process.ProcessEvent_Data{Data: stderr}}, {Event: &process.ProcessEvent_Keepalive{}},
		{Event: &process.ProcessEvent_End{End: &process.EndEvent{ExitCode: 3, Exited: true}}},
	} {
		if err := l.take(ev); err != nil {
			t.Error(err)
		}
	}
	wantFile(t, l.path, "one\ntwo\ncay: the start command ended with exit code 3\n")
	if got := l.last(); got != "its last output:\none\ntwo" {
		t.Errorf("the last is %q", got)
	}
}

// TestStartLogInTheWay opens a log in whose place the image, or root inside, has put something else.
func TestStartLogInTheWay(t *testing.T) {
	dir := t.TempDir()
	path, precious := filepath.Join(dir, "start.log"), filepath.Join(dir, "precious")
	if err := os.WriteFile(precious, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(precious, path); err != nil {
		t.Fatal(err)
	}
	l, err := openStartLog(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.take(stdout("out\n")); err != nil {
		t.Error(err)
	}
	l.close()
	wantFile(t, path, "out\n")
	wantFile(t, precious, "precious")
	if err := os.MkdirAll(filepath.Join(dir, "full.log/file"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Join(precious, "start.log"), filepath.Join(dir, "full.log")} {
		if _, err := openStartLog(path); err == nil {
			t.Errorf("a log was made at %s", path)
		}
	}
}

func TestStartLogIsBounded(t *testing.T) {
	chunk := strings.Repeat("x", startLogSize/4-1) + "\n"
	t.Run("put aside", func(t *testing.T) {
		l := testLog(t)
		for range 14 {
			_ = l.take(stdout(chunk))
		}
		wantFile(t, l.path+".1", strings.Repeat(chunk, 4))
		wantFile(t, l.path, strings.Repeat(chunk, 2))
		if got := l.last(); len(got) > startTailSize+len("its last output:\n") {
			t.Errorf("the last is %d bytes", len(got))
		}
	})
	t.Run("cannot be put aside", func(t *testing.T) {
		l := testLog(t)
		if err := os.MkdirAll(l.path+".1/file", 0o755); err != nil {
			t.Fatal(err)
		}
		for range 6 {
			_ = l.take(stdout(chunk))
		}
		wantFile(t, l.path, strings.Repeat(chunk, 2))
	})
}

func TestStartLogsLast(t *testing.T) {
	for name, c := range map[string]struct{ give, want string }{
		"nothing":     {"", "it wrote nothing"},
		"white space": {" \n\n", "it wrote nothing"},
		"many lines":  {strings.Repeat("a\n", 100), "its last output:\n" + strings.Repeat("a\n", startTailLines-1) + "a"},
		"long lines":  {strings.Repeat("a", 1500) + "\n" + strings.Repeat("b", 1000) + "\n", "its last output:\n" + strings.Repeat("b", 1000)},
		"one line":    {strings.Repeat("a", 10_000), "its last output:\n" + strings.Repeat("a", startTailSize)},
		"binary":      {"a\xff\xfeb\n", "its last output:\na?b"},
	} {
		l := &startLog{file: os.NewFile(^uintptr(0), "closed")} // the log drops output that it cannot write
		for b := range bytes.Lines([]byte(c.give)) {
			_ = l.take(stdout(string(b)))
		}
		if got := l.last(); got != c.want || !utf8.ValidString(got) {
			t.Errorf("%s: got %q, want %q", name, got, c.want)
		}
	}
}

func TestReadyChecks(t *testing.T) {
	block := make(chan bool)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/moved":
			http.Redirect(w, r, "/nowhere", http.StatusFound)
		case "/ok":
			if r.URL.RawQuery != "a=b" {
				t.Errorf("query %q", r.URL.RawQuery)
			}
			w.WriteHeader(http.StatusNoContent)
		case "/hints":
			w.WriteHeader(http.StatusEarlyHints)
		case "/stream":
			_, _ = io.WriteString(w, "first")
			_ = http.NewResponseController(w).Flush()
			<-block
		case "/block":
			<-block
		default:
			http.Error(w, "no", http.StatusServiceUnavailable)
		}
	}))
	// Listen on another address than 127.0.0.1, like a service that is configured with the sandbox's address.
	own := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}
	l, err := net.ListenTCP("tcp4", own)
	if err != nil {
		t.Fatal(err)
	}
	srv.Listener.Close()
	srv.Listener = l
	srv.Start()
	defer srv.Close()
	defer close(block)
	port := l.Addr().(*net.TCPAddr).Port
	free, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	unused := free.Addr().(*net.TCPAddr).Port
	for name, c := range map[string]struct {
		ready agentapi.Ready
		own   *net.TCPAddr
		want  string // part of the error; "" means no error
	}{
		"port":             {agentapi.Ready{Port: port}, own, ""},
		"only own address": {agentapi.Ready{Port: port}, nil, "nothing listens on port"},
		"no port":          {agentapi.Ready{Port: unused}, own, "nothing listens on port"},
		"http":             {agentapi.Ready{HTTP: &agentapi.ReadyHTTP{Port: port, Path: "/ok?a=b"}}, own, ""},
		"redirect":         {agentapi.Ready{HTTP: &agentapi.ReadyHTTP{Port: port, Path: "/moved"}}, own, ""},
		"endless answer":   {agentapi.Ready{HTTP: &agentapi.ReadyHTTP{Port: port, Path: "/stream"}}, own, ""},
		"early hints":      {agentapi.Ready{HTTP: &agentapi.ReadyHTTP{Port: port, Path: "/hints"}}, own, ""},
		"error":            {agentapi.Ready{HTTP: &agentapi.ReadyHTTP{Port: port, Path: "/"}}, own, "/ answered 503"},
		"nobody answers":   {agentapi.Ready{HTTP: &agentapi.ReadyHTTP{Port: unused, Path: "/"}}, own, "/: nothing listens on port"},
		"no path":          {agentapi.Ready{HTTP: &agentapi.ReadyHTTP{Port: port, Path: ":x"}}, own, "invalid port"},
		"silent":           {agentapi.Ready{HTTP: &agentapi.ReadyHTTP{Port: port, Path: "/block"}}, own, "/block: no answer"},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if name == "silent" {
			cancel()
			ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
		}
		defer cancel()
		err := readyCheck{ready: &c.ready, own: c.own}.do(ctx)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
		if name != "silent" && ctx.Err() != nil {
			t.Errorf("%s: waited until the time limit", name)
		}
	}
}
