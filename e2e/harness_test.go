// Package e2e tests the real binary on the real host: the README's story, hostile commands,
// crashes, and that nothing is left behind.
//
// The tests need root and bin/cay (make build). One server serves most of them; tests that kill
// servers start their own. Every server has a data directory, an instance and a range of addresses
// of its own.
//
// Parallel tests have a server of their own, or look only at their own sandboxes on a shared one. A
// test that counts what a shared server or the host has is not parallel, and so runs before them.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	cay "github.com/cayhq/cay/sdk/go"
)

// patience limits every wait for an event that normally takes milliseconds. Other tests may keep
// the machine busy.
const patience = 90 * time.Second

// templatePatience limits the first preparation of a template without a cache.
const templatePatience = 20 * time.Minute

// parallelTests limits how many tests run at once, unless -parallel says otherwise, beside one other
// package. With fewer the processors of CI are idle while tests wait; with more, programs inside that
// must get on within seconds get too little of them on a slow machine.
const parallelTests = "2"

func cayBinary(t testing.TB) string {
	t.Helper()
	path, err := filepath.Abs("../bin/cay")
	if err != nil {
		t.Fatal(err)
	}
	return caytest.RequireProgram(t, path)
}

// server is a cay server in a process of its own.
type server struct {
	t       testing.TB
	binary  string
	dataDir string
	url     string
	key     string
	env     []string
	args    []string

	*process
}

// process is the server's process while it runs.
type process struct {
	mu     sync.Mutex
	cmd    *exec.Cmd
	exited chan struct{} // closed when cmd has ended
	name   string        // the server instance, once it is known
}

// onOneStore skips a test whose result does not depend on where the records are, if they are in PostgreSQL: `make test`
// runs the tests on SQLite, and then those of records on PostgreSQL too. CAY_TEST_ALL=1 runs all of them there.
func onOneStore(t *testing.T) {
	t.Helper()
	if os.Getenv("CAY_TEST_STORE") == "postgres" && os.Getenv("CAY_TEST_ALL") == "" {
		t.Skip("it does not depend on where the records are")
	}
}

// newServer returns a server that is not started. At the end of the test it is purged, and things
// that it left on the host fail the test.
func newServer(t testing.TB, env ...string) *server {
	t.Helper()
	caytest.RequireRoot(t)
	caytest.RequireProgram(t, "mmdebstrap")
	dir, err := os.MkdirTemp("", "cay-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, binary: cayBinary(t), dataDir: filepath.Join(dir, "data"), process: &process{}}
	// Pooled sandboxes would disturb most tests; the tests of the pool turn it on.
	// Each further template costs every server a copy of its image: base has 761 MB.
	s.env = append(os.Environ(), "CAY_POOL_ENABLED=false", "CAY_TEMPLATES_PREPARE=python")
	if os.Getenv("CAY_TEST_STORE") == "postgres" {
		s.env = append(s.env, "CAY_STORE_URL="+newDatabase(t))
	}
	s.env = append(s.env, env...)
	s.url = "http://" + freeAddress(t)
	t.Cleanup(func() {
		s.stop(syscall.SIGTERM)
		s.purge()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return s
}

// postgres is the PostgreSQL server of all tests. It is started for the first test that needs it.
var postgres struct {
	once      sync.Once
	server    *caytest.Postgres
	err       error
	databases atomic.Int64
}

// newDatabase returns the address of an empty database in PostgreSQL.
func newDatabase(t testing.TB) string {
	t.Helper()
	postgres.once.Do(func() { postgres.server, postgres.err = caytest.NewPostgres() })
	if postgres.err != nil {
		caytest.Missing(t, postgres.err.Error())
	}
	url, err := postgres.server.Create(fmt.Sprint("e2e", postgres.databases.Add(1)), "")
	if err != nil {
		t.Fatal(err)
	}
	return url
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (s *server) logFile() string { return filepath.Join(filepath.Dir(s.dataDir), "server.log") }

// start runs the server and waits until it is ready.
func (s *server) start() {
	s.t.Helper()
	log, err := os.OpenFile(s.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	args := append([]string{"server", "--data-dir", s.dataDir, "--listen", strings.TrimPrefix(s.url, "http://"),
		"--log-level", "debug"}, s.args...)
	cmd := exec.Command(s.binary, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = s.env, log, log
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(exited) }() // its state says how it ended
	s.mu.Lock()
	s.cmd, s.exited = cmd, exited
	s.mu.Unlock()
	s.waitReady()
	key, err := os.ReadFile(filepath.Join(s.dataDir, "api-key"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.key = strings.TrimSpace(string(key))
}

func (s *server) waitReady() {
	s.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		resp, err := http.Get(s.url + "/readyz")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return
			}
		}
		select {
		case <-s.exited:
			s.t.Fatalf("the server ended while starting:\n%s", s.lastLog())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the server is not ready after %s: %v\n%s", patience, err, s.lastLog())
		}
	}
}

func (s *server) lastLog() string {
	data, err := os.ReadFile(s.logFile())
	if err != nil {
		return err.Error()
	}
	return string(data[max(0, len(data)-6000):])
}

// stop signals the server and waits for its end. It does nothing if the server does not run.
func (s *server) stop(signal syscall.Signal) {
	s.t.Helper()
	s.mu.Lock()
	cmd, exited := s.cmd, s.exited
	s.cmd = nil
	s.mu.Unlock()
	if cmd == nil {
		return
	}
	if err := cmd.Process.Signal(signal); err != nil && err != os.ErrProcessDone {
		s.t.Error(err)
	}
	select {
	case <-exited:
	case <-time.After(patience):
		s.t.Errorf("the server did not end on %s:\n%s", signal, s.lastLog())
		_ = cmd.Process.Kill() // it may end at this moment
		<-exited
	}
}

// instance returns the name of the server's things on the host.
func (s *server) instance() string {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.name == "" {
		s.name = s.recordedInstance()
	}
	return s.name
}

// recordedInstance returns the instance that the server recorded on the host, "" if it never ran.
func (s *server) recordedInstance() string {
	s.t.Helper()
	records, err := filepath.Glob("/run/cay/servers/*.json")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, path := range records {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // of a server of another test, which has ended
		}
		var record struct {
			Instance string `json:"instance"`
			DataDir  string `json:"data_dir"`
		}
		if json.Unmarshal(data, &record) == nil && record.DataDir == s.dataDir {
			return record.Instance
		}
	}
	return ""
}

// purge removes the server from the host and fails the test for things that it leaves.
func (s *server) purge() {
	s.t.Helper()
	instance := s.instance()
	out, err := exec.Command(s.binary, "server", "--data-dir", s.dataDir, "--purge").CombinedOutput()
	if err != nil {
		s.t.Errorf("purging: %v: %s", err, out)
	}
	if instance != "" {
		for _, left := range caytest.Leftovers(s.t, instance, s.dataDir) {
			s.t.Errorf("left on the host: %s", left)
		}
	}
	if s.t.Failed() {
		s.t.Logf("end of the server's log:\n%s", s.lastLog())
	}
}

// needTemplate waits until a template is ready.
func (s *server) needTemplate(name string) {
	s.t.Helper()
	deadline := time.Now().Add(templatePatience)
	for {
		template, err := s.api().GetTemplate(context.Background(), name)
		if err != nil {
			s.t.Fatalf("reading template %s: %v", name, err)
		}
		switch template.Status {
		case cay.TemplateStatusReady:
			return
		case cay.TemplateStatusFailed:
			s.t.Fatalf("template %s: %s", name, jsonOf(template))
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("template %s is not ready after %s: %s", name, templatePatience, jsonOf(template))
		}
		time.Sleep(100 * time.Millisecond) // a poll with a deadline
	}
}

// call makes one request with the server's first key. A body that is not a reader is sent as JSON. Tests use the client
// of [server.api]; they use call for requests that it cannot make, for the status of an answer, and for its bytes.
func (s *server) call(method, path string, body any) (int, []byte) {
	s.t.Helper()
	status, answer, err := s.try(context.Background(), method, path, body)
	if err != nil {
		s.t.Fatal(err)
	}
	return status, answer
}

func (s *server) try(ctx context.Context, method, path string, body any) (int, []byte, error) {
	_, status, answer, err := s.tryHeader(ctx, method, path, body)
	return status, answer, err
}

// tryHeader is try, and returns the header of the answer too.
func (s *server) tryHeader(ctx context.Context, method, path string, body any) (http.Header, int, []byte, error) {
	switch b := body.(type) {
	case nil:
		return s.ask(ctx, method, path, "", nil)
	case io.Reader:
		return s.ask(ctx, method, path, "application/octet-stream", b)
	default:
		data, err := json.Marshal(b)
		if err != nil {
			return nil, 0, nil, err
		}
		return s.ask(ctx, method, path, "application/json", bytes.NewReader(data))
	}
}

// send makes one request with a body of any type.
func (s *server) send(method, path, contentType string, body io.Reader) (int, []byte) {
	s.t.Helper()
	status, answer, err := s.request(context.Background(), method, path, contentType, body)
	if err != nil {
		s.t.Fatal(err)
	}
	return status, answer
}

func (s *server) request(ctx context.Context, method, path, contentType string, body io.Reader) (int, []byte, error) {
	_, status, answer, err := s.ask(ctx, method, path, contentType, body)
	return status, answer, err
}

// ask makes one request with the server's first key.
func (s *server) ask(ctx context.Context, method, path, contentType string, body io.Reader) (http.Header, int, []byte,
	error) {
	req, err := http.NewRequestWithContext(ctx, method, s.url+path, body)
	if err != nil {
		return nil, 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+s.key)
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, 0, nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	return resp.Header, resp.StatusCode, answer, err
}

// create makes a sandbox of the template python.
func (s *server) create(more object) string {
	s.t.Helper()
	request := requestOf[cay.CreateSandboxRequest](s.t, object{"template": "python", "timeout": "10m"}, more)
	return s.createdAs(request).ID
}

// createdAs makes a sandbox, which must run.
func (s *server) createdAs(request cay.CreateSandboxRequest) *cay.Sandbox {
	s.t.Helper()
	sandbox, err := s.api().CreateSandbox(context.Background(), request, cay.CreateOptions{})
	if err != nil {
		s.t.Fatalf("create: %v", err)
	}
	if sandbox.Status != cay.SandboxStatusRunning {
		s.t.Fatalf("create: the sandbox is %s: %s", sandbox.Status, jsonOf(sandbox))
	}
	return sandbox
}

// destroy destroys a sandbox and returns when nothing of it is left.
func (s *server) destroy(id string) {
	s.t.Helper()
	if err := s.api().DestroySandbox(context.Background(), id); err != nil {
		s.t.Errorf("destroy: %v", err)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) { // a poll with a deadline
		switch state, reason := s.state(id); {
		case state == "destroyed" || state == "failed":
			return
		case state != "destroying" || time.Now().After(deadline):
			s.t.Errorf("the destroyed sandbox is %s, reason %q", state, reason)
			return
		}
	}
}

// result has the fields of cay.ExecuteResult without pointers, so that it can be printed.
type result struct {
	ExitCode        int    `json:"exit_code"`
	Stdout          string `json:"stdout"`
	Stderr          string `json:"stderr"`
	StdoutTruncated bool   `json:"stdout_truncated"`
	StderrTruncated bool   `json:"stderr_truncated"`
	StdoutEncoding  string `json:"stdout_encoding"`
	DurationMS      int64  `json:"duration_ms"`
	TimedOut        bool   `json:"timed_out"`
	OOMKilled       bool   `json:"oom_killed"`
	Signal          string `json:"signal"`
}

// resultOf returns the result of a command.
func resultOf(r *cay.ExecuteResult) result {
	return result{ExitCode: r.ExitCode, Stdout: r.Stdout, Stderr: r.Stderr, StdoutTruncated: r.StdoutTruncated,
		StderrTruncated: r.StderrTruncated, StdoutEncoding: orZero(r.StdoutEncoding), DurationMS: r.DurationMs,
		TimedOut: r.TimedOut, OOMKilled: r.OOMKilled, Signal: orZero(r.Signal)}
}

// exec runs a command line that may fail.
func (s *server) exec(id, command string, more ...object) result {
	s.t.Helper()
	// A busy machine may need longer than the 30 s that a command has by default.
	request := requestOf[cay.ExecuteRequest](s.t, append([]object{{"command": command, "timeout": "2m"}}, more...)...)
	r, err := s.api().Execute(context.Background(), id, request)
	if err != nil {
		s.t.Fatalf("execute %q: %v", command, err)
	}
	return resultOf(r)
}

// want runs a command line that must succeed and returns its output.
func (s *server) want(id, command string, more ...object) string {
	s.t.Helper()
	r := s.exec(id, command, more...)
	if r.ExitCode != 0 {
		s.t.Errorf("%q ended with %d: %s%s", command, r.ExitCode, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// alive checks that a sandbox still works.
func (s *server) alive(id string) {
	s.t.Helper()
	if got := s.want(id, "echo alive"); got != "alive" {
		s.t.Errorf("the sandbox answers %q", got)
	}
}

// state returns the exact state of a sandbox and the reason why it was destroyed.
func (s *server) state(id string) (state, reason string) {
	s.t.Helper()
	sandbox := s.get(id)
	return string(sandbox.State), orZero(sandbox.DestroyReason)
}

// get returns a sandbox.
func (s *server) get(id string) *cay.Sandbox {
	s.t.Helper()
	sandbox, err := s.api().GetSandbox(context.Background(), id)
	if err != nil {
		s.t.Fatalf("get: %v", err)
	}
	return sandbox
}

// waitState polls until the sandbox is in the state.
func (s *server) waitState(id, want string) string {
	s.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		state, reason := s.state(id)
		if state == want {
			return reason
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("sandbox %s is %s after %s, want %s", id, state, patience, want)
		}
		time.Sleep(20 * time.Millisecond) // a poll with a deadline
	}
}

// command returns a run of the command line against the server, not started.
func (s *server) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.binary, args...)
	cmd.Env = append(slices.Clone(s.env), "CAY_API_URL="+s.url, "CAY_API_KEY="+s.key)
	return cmd
}

// cli runs the command line against the server.
func (s *server) cli(stdin string, args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd := s.command(ctx, args...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if ctx.Err() != nil {
		s.t.Fatalf("cay %s did not end", strings.Join(args, " "))
	}
	if err != nil && cmd.ProcessState == nil {
		s.t.Fatal(err)
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// sharedServer serves most tests. The first test that needs it starts it.
var (
	sharedOnce   sync.Once
	sharedServer *server
)

// shared returns the shared server with the template python ready.
func shared(t *testing.T) *server {
	t.Helper()
	caytest.RequireRoot(t)
	sharedOnce.Do(func() {
		s := newServer(suite, "CAY_PROXY_DOMAIN=localhost") // the names are an addition: URLs stay by path
		s.start()
		s.needTemplate("python")
		sharedServer = s
	})
	if sharedServer == nil {
		t.Fatal("the shared server did not start")
	}
	own := *sharedServer // the same process, but failures are reported to this test
	own.t = t
	return &own
}

// suite stands for the whole run where a helper needs a test.
var suite = &suiteTB{}

type suiteTB struct {
	testing.TB
	mu       sync.Mutex
	failed   bool
	cleanups []func()
}

func (s *suiteTB) Helper() {}
func (s *suiteTB) Cleanup(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cleanups = append(s.cleanups, f)
}
func (s *suiteTB) Failed() bool                      { s.mu.Lock(); defer s.mu.Unlock(); return s.failed }
func (s *suiteTB) Log(args ...any)                   { fmt.Println(args...) }
func (s *suiteTB) Logf(format string, args ...any)   { fmt.Printf(format+"\n", args...) }
func (s *suiteTB) fail()                             { s.mu.Lock(); defer s.mu.Unlock(); s.failed = true }
func (s *suiteTB) Error(args ...any)                 { s.fail(); fmt.Println(args...) }
func (s *suiteTB) Errorf(format string, args ...any) { s.fail(); s.Logf(format, args...) }
func (s *suiteTB) Fatal(args ...any)                 { s.Error(args...); panic("the suite cannot go on") }
func (s *suiteTB) Fatalf(format string, args ...any) {
	s.Errorf(format, args...)
	panic("the suite cannot go on")
}
func (s *suiteTB) Skipf(format string, args ...any) {
	s.Logf(format, args...)
	panic("the suite was skipped after it began")
}

func TestMain(m *testing.M) {
	if beHonestClient() {
		return
	}
	if err := flag.Set("test.parallel", parallelTests); err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	code := m.Run() // parses the flags
	for i := len(suite.cleanups) - 1; i >= 0; i-- {
		suite.cleanups[i]()
	}
	if suite.Failed() && code == 0 {
		code = 1
	}
	if postgres.server != nil {
		if err := postgres.server.Remove(); err != nil {
			fmt.Println("removing PostgreSQL:", err)
			code = 1
		}
	}
	os.Exit(code)
}
