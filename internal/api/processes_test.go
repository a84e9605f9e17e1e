package api

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	cay "github.com/cayhq/cay/sdk/go"
)

func clientProcesses(t *testing.T, ctx context.Context, c *cay.Client, h *testServer, id string, fatal func(error)) {
	var out []cay.Output
	on := func(o cay.Output) error { out = append(out, o); return nil }
	exit, err := c.ExecuteStream(ctx, id, cay.ExecuteRequest{Command: new("echo 42")}, on)
	fatal(err)
	want := []cay.Output{{PID: 7}, {Stream: cay.StreamStdout, Data: []byte("42\n")}}
	if diff := cmp.Diff(want, out); diff != "" || exit.ExitCode != 0 || exit.StdoutTruncated == nil {
		t.Errorf("streamed (- want):\n%s\nexit %+v", diff, exit)
	}
	p, err := c.StartProcess(ctx, id, cay.StartProcessRequest{Args: []string{"cat"}, Tag: new("cat"), Stdin: new(true),
		Timeout: new("1h")})
	fatal(err)
	if p.Status != cay.ProcessStatusRunning || !p.StdinOpen || *p.Tag != "cat" {
		t.Errorf("started %+v", p)
	}
	n, err := c.WriteProcessStdin(ctx, id, "cat", strings.NewReader("typed"), false)
	fatal(err)
	now, err := c.ProcessOutput(ctx, id, "cat", 2)
	fatal(err)
	if n != 5 || len(now.Output) != 1 || now.Output[0].Data != "ped" || now.NextOffset != 5 || *now.Output[0].Offset != 2 {
		t.Errorf("%d bytes were taken, output %+v", n, now)
	}
	p, err = c.WaitProcess(ctx, id, "cat", 0)
	fatal(err)
	_, err = c.WriteProcessStdin(ctx, id, "cat", nil, true)
	fatal(err)
	out = nil
	exit, err = c.FollowProcess(ctx, id, "cat", 1, on)
	fatal(err)
	output := []cay.Output{{Stream: cay.StreamStdout, Offset: 1, Data: []byte("yped")}}
	if diff := cmp.Diff(output, out); diff != "" || p.Exit != nil || exit.DurationMs != 1 {
		t.Errorf("followed (- want):\n%s\nexit %+v after %+v", diff, exit, p)
	}
	p, err = c.GetProcess(ctx, id, "cat")
	fatal(err)
	if err := c.SignalProcess(ctx, id, "cat", "TERM"); !cay.HasCode(err, "process_ended") ||
		p.Status != cay.ProcessStatusExited {
		t.Errorf("signalling an ended process: %v, %+v", err, p)
	}
	all, err := c.ListProcesses(ctx, id)
	fatal(err)
	fatal(c.KillProcess(ctx, id, "cat"))
	if _, err := c.GetProcess(ctx, id, "cat"); !cay.HasCode(err, "process_not_found") || len(all) != 1 {
		t.Errorf("after the kill: %v; %d processes before it", err, len(all))
	}
	clientTerminal(t, ctx, c, h, id, fatal)
}

func clientTerminal(t *testing.T, ctx context.Context, c *cay.Client, h *testServer, id string, fatal func(error)) {
	term, err := c.OpenTerminal(ctx, id, cay.TerminalOptions{Cols: 100, Rows: 30, Command: "cat", User: "user",
		Workdir: "/tmp", Term: "vt100", Grace: 5 * time.Second})
	fatal(err)
	p, err := h.agent.find(procName(term.PID))
	fatal(err)
	r := p.request
	if *r.Terminal != (agentapi.TerminalSize{Cols: 100, Rows: 30}) || r.GraceMs != 5000 || r.Env["TERM"] != "vt100" ||
		r.User != "user" || r.Workdir != "/tmp" || r.Args[2] != "cat" {
		t.Errorf("the terminal was started with %+v", r)
	}
	_, err = term.Write([]byte("hello"))
	fatal(err)
	b := make([]byte, 5)
	_, err = io.ReadFull(term, b)
	fatal(err)
	fatal(term.Resize(ctx, 120, 40))
	fatal(term.Close())
	if string(b) != "hello" || term.Offset() != 5 {
		t.Errorf("it shows %q to %d", b, term.Offset())
	}
	again, err := c.OpenTerminal(ctx, id, cay.TerminalOptions{Process: procName(term.PID), Offset: new(int64(2))})
	fatal(err)
	defer again.Close()
	_, err = io.ReadFull(again, b[:3])
	fatal(err)
	fatal(c.ResizeProcessTerminal(ctx, id, procName(term.PID), cay.TerminalSize{Cols: 7, Rows: 8}))
	fatal(c.SignalProcess(ctx, id, procName(term.PID), "15"))
	if _, err := again.Read(b); err != io.EOF || again.Exit() == nil || again.Exit().ExitCode != 143 ||
		*again.Exit().Signal != "SIGTERM" || string(b[:3]) != "llo" {
		t.Errorf("the end is %v, %+v after %q", err, again.Exit(), b)
	}
	if diff := cmp.Diff([]agentapi.TerminalSize{{Cols: 120, Rows: 40}, {Cols: 80, Rows: 24}, {Cols: 7, Rows: 8}},
		h.agent.sizes); diff != "" {
		t.Errorf("sizes (- want):\n%s", diff)
	}
	_, err = c.OpenTerminal(ctx, id, cay.TerminalOptions{Process: "nobody"})
	if !cay.HasCode(err, "process_not_found") {
		t.Errorf("joining an unknown process: %v", err)
	}
}

func procName(pid int) string { return string(rune('0' + pid)) }

// eventsOf returns a function that reads the next event of a stream, as "name: data".
func eventsOf(t *testing.T, body io.Reader) func() string {
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, 64<<20)
	return func() string {
		t.Helper()
		name, data := "", ""
		for lines.Scan() {
			if v, ok := strings.CutPrefix(lines.Text(), "event: "); ok {
				name = v
			}
			if v, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
				data = v
			}
			if lines.Text() == "" && name != "" {
				return name + ": " + data
			}
		}
		return ""
	}
}

func (h *testServer) stream(t *testing.T, ctx context.Context, method, path, body string) *http.Response {
	t.Helper()
	r, err := http.NewRequestWithContext(ctx, method, h.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	r.Header.Set("Authorization", "Bearer "+h.key)
	r.Header.Set("Accept", eventStream)
	resp, err := h.http.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

// playing makes the agent emit the events that are sent to say, and return err after say is closed.
func (h *testServer) playing(err error) (say chan agentapi.ExecuteEvent, ended chan error) {
	say, ended = make(chan agentapi.ExecuteEvent), make(chan error, 1)
	h.agent.stream = func(ctx context.Context, emit func(agentapi.ExecuteEvent) error) (agentapi.ExecuteResult, error) {
		result := agentapi.ExecuteResult{ExitCode: 137, Signal: 9, StderrTruncated: true, Duration: time.Second}
		for {
			select {
			case e, more := <-say:
				if !more {
					ended <- err
					return result, err
				}
				if err := emit(e); err != nil {
					ended <- err
					return result, err
				}
			case <-ctx.Done():
				ended <- ctx.Err()
				return result, ctx.Err()
			}
		}
	}
	return say, ended
}

func TestStreamedExecution(t *testing.T) {
	h := newTestServer(t)
	path := "/v1/sandboxes/" + h.newSandbox(t).ID + "/execute"
	say, _ := h.playing(nil)
	go func() { say <- agentapi.ExecuteEvent{PID: 9} }()
	next := eventsOf(t, h.stream(t, t.Context(), "POST", path, `{"command":"x"}`).Body)
	step := func(e agentapi.ExecuteEvent, want ...string) {
		t.Helper()
		if e.Data != nil {
			say <- e
		}
		for _, want := range want {
			if got := next(); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		}
	}
	out := func(s string) agentapi.ExecuteEvent {
		return agentapi.ExecuteEvent{Stream: agentapi.Stdout, Data: []byte(s)}
	}
	errs := func(s string) agentapi.ExecuteEvent {
		return agentapi.ExecuteEvent{Stream: agentapi.Stderr, Data: []byte(s)}
	}
	step(agentapi.ExecuteEvent{}, `started: {"pid":9}`)
	step(out("one\n"), `stdout: {"data":"one\n"}`)
	step(out("\xe2\x82"))
	step(errs("E"), `stderr: {"data":"E"}`)
	step(out("\xac."), `stdout: {"data":"€."}`)
	step(out("\xff\x00"), `stdout: {"data":"/wA=","encoding":"base64"}`)
	step(errs("\xc3"))
	close(say)
	step(agentapi.ExecuteEvent{}, `stderr: {"data":"ww==","encoding":"base64"}`,
		`exit: {"duration_ms":1000,"exit_code":137,"oom_killed":false,"signal":"SIGKILL",`+
			`"stderr_truncated":true,"stdout_truncated":false,"timed_out":false}`, "")
}

func TestStreamedExecutionFails(t *testing.T) {
	h := newTestServer(t)
	path := "/v1/sandboxes/" + h.newSandbox(t).ID + "/execute"
	gone := fault.New(fault.Unavailable, fault.CodeSandboxUnreachable, "the sandbox does not answer")

	say, _ := h.playing(gone)
	close(say)
	r := h.send(t, "POST", path, h.key, `{"command":"x"}`, header("Accept", eventStream))
	if r.status != 503 || r.problem.Code != "sandbox_unreachable" {
		t.Errorf("an error before the first event: %d %s", r.status, r.body)
	}
	say, _ = h.playing(gone)
	go func() { say <- agentapi.ExecuteEvent{PID: 9}; close(say) }()
	resp := h.stream(t, t.Context(), "POST", path, `{"command":"x"}`)
	next := eventsOf(t, resp.Body)
	next()
	if got := next(); !strings.HasPrefix(got, "error: ") || !strings.Contains(got, `"code":"sandbox_unreachable"`) ||
		!strings.Contains(got, `"status":503`) {
		t.Errorf("an error after the first event: %q", got)
	}
	if line := h.log.line(t, resp.Header.Get("X-Request-Id")); line["code"] != "sandbox_unreachable" {
		t.Errorf("the log has %v", line)
	}
	for body, field := range map[string]string{`{"command":"x","detach":true}`: "detach",
		`{"command":"x","detach":true,"timeout":"25h"}`: "timeout"} {
		edit := header("Accept", "application/json")
		if field != "detach" {
			edit = header("Accept", eventStream)
		}
		if r := h.send(t, "POST", path, h.key, body, edit); r.status != 400 || deref(r.problem.Field) != field {
			t.Errorf("%s: %d %s", body, r.status, r.body)
		}
	}
}

// TestStreamedExecutionReaders checks that a slow reader does not delay the command, and that the
// command is killed when its reader leaves.
func TestStreamedExecutionReaders(t *testing.T) {
	notForwarded(t, "the node's log has the reason")
	h := newTestServer(t)
	path := "/v1/sandboxes/" + h.newSandbox(t).ID + "/execute"
	say, ended := h.playing(nil)
	go func() { say <- agentapi.ExecuteEvent{PID: 9} }()
	ctx, cancel := context.WithCancel(t.Context())
	resp := h.stream(t, ctx, "POST", path, `{"command":"x"}`)
	piece := []byte(strings.Repeat("x", 32<<10))
	for range 2 * agentapi.DefaultMaxOutput / len(piece) {
		select {
		case say <- agentapi.ExecuteEvent{Stream: agentapi.Stdout, Data: append([]byte(nil), piece...)}:
		case <-time.After(10 * time.Second):
			t.Fatal("a reader that does not read delays the command")
		}
	}
	next := eventsOf(t, resp.Body)
	if next(); !strings.HasPrefix(next(), "stdout: ") {
		t.Error("there is no output")
	}
	cancel()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("the command ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the command was not killed after its reader left")
	}
	if line := h.log.line(t, resp.Header.Get("X-Request-Id")); line["status"] != 499.0 {
		t.Errorf("the log has %v", line)
	}
}

func TestOutboxIsBounded(t *testing.T) {
	sbx := newOutbox(nil, maxWaiting)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	n := 0
	for ; ctx.Err() == nil; n++ {
		s := agentapi.Stdout + agentapi.Stream(n%2)
		if !sbx.tryPut(agentapi.ExecuteEvent{Stream: s, Data: []byte("x")}) {
			break
		}
	}
	if n > maxWaiting/waitingCost {
		t.Errorf("%d pieces wait", n)
	}
	done := make(chan error, 1)
	go func() { done <- sbx.put(ctx, agentapi.ExecuteEvent{PID: 1}) }()
	signal(sbx.more)
	took := 0
	for took < n {
		some := sbx.take()
		if len(some)*waitingCost > piece+waitingCost {
			t.Fatalf("%d pieces are sent at once", len(some))
		}
		took += len(some)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	sbx.close()
	for some := sbx.take(); len(some) > 0; some = sbx.take() {
		took += len(some)
	}
	if took != n+1 {
		t.Errorf("%d pieces of %d were taken", took, n+1)
	}
}

// TestOutboxWithoutMemory checks that a command waits for its reader when its output has no room,
// and that reading makes room again.
func TestOutboxWithoutMemory(t *testing.T) {
	b := budget.New(40<<10, 40<<10)
	var account, other budget.Account
	if err := errors.Join(account.Open(b, "a", 0), other.Open(b, "a", 10<<10)); err != nil {
		t.Fatal(err)
	}
	defer account.Close()
	sbx := newOutbox(&account, maxWaiting)
	piece := agentapi.ExecuteEvent{Stream: agentapi.Stdout, Data: make([]byte, mergeBelow)}
	if !sbx.tryPut(piece) {
		t.Fatal("the outbox took no piece at all")
	}
	if sbx.tryPut(piece) {
		t.Fatal("the outbox took a piece for which there is no memory")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- sbx.put(ctx, piece) }()
	signal(sbx.more)
	for range 2 {
		if len(sbx.take()) != 1 {
			t.Error("took nothing")
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	other.Close()
	if !sbx.tryPut(piece) {
		t.Error("the outbox takes no piece although there is memory")
	}
}

func TestDetachedExecution(t *testing.T) {
	h := newTestServer(t)
	path := "/v1/sandboxes/" + h.newSandbox(t).ID
	ctx, cancel := context.WithCancel(t.Context())
	resp := h.stream(t, ctx, "POST", path+"/execute", `{"command":"x","stdin":"in","detach":true,"timeout":"2h"}`)
	next := eventsOf(t, resp.Body)
	if got := next(); got != `started: {"pid":1}` {
		t.Errorf("first %q", got)
	}
	if got := next(); got != `stdout: {"data":"in","offset":0}` {
		t.Errorf("then %q", got)
	}
	cancel()
	h.log.line(t, resp.Header.Get("X-Request-Id"))
	p := as[Process](t, 200, h.send(t, "GET", path+"/processes/1", h.key, ""))
	if p.Status != ProcessStatusRunning || h.agent.all[0].request.TimeoutMs != 7_200_000 {
		t.Errorf("after its caller left the process is %+v", p)
	}
}

func TestFollowingEndsWithTheServer(t *testing.T) {
	notForwarded(t, "a replica breaks streams, and cannot say why")
	stopping, stop := context.WithCancel(t.Context())
	h := newTestServer(t, func(_ *auth.Config, _ *sandbox.Config, c *Config) { c.Stopping = stopping })
	path := "/v1/sandboxes/" + h.newSandbox(t).ID
	as[Process](t, 201, h.send(t, "POST", path+"/processes", h.key, `{"command":"x"}`))
	next := eventsOf(t, h.stream(t, t.Context(), "GET", path+"/processes/1/output", "").Body)
	waited := make(chan reply, 1)
	go func() { waited <- h.send(t, "GET", path+"/processes/1/wait?timeout=5m", h.key, "") }()
	conn := h.dialTerminal(t, path+"/terminal", h.key)
	if _, b, err := conn.Read(t.Context()); err != nil || string(b) != `{"type":"started","pid":2,"offset":0}` {
		t.Fatalf("%s, %v", b, err)
	}
	stop()
	if got := next(); !strings.Contains(got, `"code":"stopping"`) || next() != "" {
		t.Errorf("the stream ends with %q", got)
	}
	if r := <-waited; r.status != 503 || r.problem.Code != "stopping" {
		t.Errorf("waiting ends with %d %s", r.status, r.body)
	}
	_, b, err := conn.Read(t.Context())
	if err != nil || !strings.HasPrefix(string(b), `{"type":"error","code":"stopping"`) {
		t.Errorf("the terminal ends with %s, %v", b, err)
	}
	if _, _, err := conn.Read(t.Context()); websocket.CloseStatus(err) != websocket.StatusGoingAway {
		t.Errorf("the connection ends with %v", err)
	}
	h.server.Hijacked.Wait()
}

// dialTerminal opens a WebSocket as a browser does, with the key in a subprotocol.
func (h *testServer) dialTerminal(t *testing.T, path, key string) *websocket.Conn {
	t.Helper()
	conn, resp, err := websocket.Dial(t.Context(), h.url+path, &websocket.DialOptions{
		Subprotocols: []string{terminalProtocol, keyProtocol + key}, HTTPHeader: http.Header{"Origin": {"https://elsewhere.example"}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.CloseNow() }) // the test may have closed it already
	if conn.Subprotocol() != terminalProtocol || strings.Contains(resp.Header.Get("Sec-WebSocket-Protocol"), key) {
		t.Errorf("the subprotocol is %q", resp.Header.Get("Sec-WebSocket-Protocol"))
	}
	return conn
}

func TestTerminalOfABrowser(t *testing.T) {
	h := newTestServer(t)
	path := "/v1/sandboxes/" + h.newSandbox(t).ID + "/terminal"
	conn := h.dialTerminal(t, path+"?cols=90", h.key)
	if _, _, err := conn.Read(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := conn.Write(t.Context(), websocket.MessageBinary, []byte{0xff, 'a'}); err != nil {
		t.Fatal(err)
	}
	if kind, b, err := conn.Read(t.Context()); err != nil || kind != websocket.MessageBinary || string(b) != "\xffa" {
		t.Errorf("it shows %q, %v", b, err)
	}
	if err := conn.Write(t.Context(), websocket.MessageText, []byte(`{"type":"resize","cols":0,"rows":24}`)); err != nil {
		t.Fatal(err)
	}
	if _, b, err := conn.Read(t.Context()); err != nil ||
		!strings.HasPrefix(string(b), `{"type":"error","code":"invalid_cols"`) {
		t.Errorf("a wrong size: %s, %v", b, err)
	}
	if _, _, err := conn.Read(t.Context()); websocket.CloseStatus(err) != websocket.StatusPolicyViolation {
		t.Errorf("the connection ends with %v", err)
	}
	for name, c := range map[string]struct {
		protocols []string
		edit      func(http.Header)
		status    int
		code      string
	}{
		"no key":        {[]string{terminalProtocol}, nil, 401, "unauthenticated"},
		"a wrong key":   {[]string{terminalProtocol, keyProtocol + "cay_x"}, nil, 401, "unauthenticated"},
		"another's key": {[]string{terminalProtocol, keyProtocol + h.other}, nil, 403, notYours},
		"a wrong header beside a right key": {[]string{terminalProtocol, keyProtocol + h.key},
			func(head http.Header) { head.Set("Authorization", "Bearer cay_x") }, 401, "unauthenticated"},
	} {
		head := http.Header{}
		if c.edit != nil {
			c.edit(head)
		}
		_, resp, err := websocket.Dial(t.Context(), h.url+path,
			&websocket.DialOptions{Subprotocols: c.protocols, HTTPHeader: head})
		if err == nil || resp == nil || resp.StatusCode != c.status {
			t.Errorf("%s: %v, %v", name, resp, err)
			continue
		}
		if b, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(b), c.code) {
			t.Errorf("%s: %s, %v", name, b, err)
		}
	}
	// Other routes do not accept the key in a subprotocol.
	if r := h.send(t, "GET", strings.TrimSuffix(path, "/terminal"), "", "",
		header("Sec-WebSocket-Protocol", keyProtocol+h.key)); r.status != 401 {
		t.Errorf("a key as a subprotocol of another call: %d", r.status)
	}
	if strings.Contains(h.log.String(), h.key) {
		t.Error("the log shows the key")
	}
}

func TestProcessesRefused(t *testing.T) {
	h := newTestServer(t)
	sbx := "/v1/sandboxes/" + h.newSandbox(t).ID
	upgrade := func(r *http.Request) {
		for name, value := range map[string]string{"Connection": "keep-alive, Upgrade", "Upgrade": "websocket",
			"Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "MDEyMzQ1Njc4OTAxMjM0NQ=="} {
			r.Header.Set(name, value)
		}
	}
	for _, c := range []struct{ method, path, body, code, field string }{
		{"POST", "/processes", `{}`, "missing_command", "command"},
		{"POST", "/processes", `{"command":"x","args":["y"]}`, "invalid_command", "command"},
		{"POST", "/processes", `{"command":"x","tag":"7"}`, "invalid_tag", "tag"},
		{"POST", "/processes", `{"command":"x","tag":""}`, "invalid_tag", "tag"},
		{"POST", "/processes", `{"command":"x","timeout":"25h"}`, "invalid_timeout", "timeout"},
		{"POST", "/processes", `{"command":"x","timeout":"10ms"}`, "invalid_timeout", "timeout"},
		{"POST", "/processes", `{"command":"x","pty":{"cols":0,"rows":1}}`, "invalid_pty", "pty.cols"},
		{"POST", "/processes", `{"command":"x","pty":{"cols":1,"rows":70000}}`, "invalid_pty", "pty.rows"},
		{"POST", "/processes", `{"command":"x","workdir":"tmp"}`, "invalid_workdir", "workdir"},
		{"POST", "/processes", `{"command":"x","detach":true}`, "unknown_field", "detach"},
		{"GET", "/processes/-1", "", "invalid_process", "process"},
		{"GET", "/processes/1/output?offset=-1", "", "invalid_offset", "offset"},
		{"GET", "/processes/1/output?offset=x", "", "invalid_offset", "offset"},
		{"GET", "/processes/1/wait?timeout=6m", "", "invalid_timeout", "timeout"},
		{"GET", "/processes/1/wait?timeout=7", "", "invalid_timeout", "timeout"},
		{"POST", "/processes/1/signal", `{"signal":"NOPE"}`, "invalid_signal", "signal"},
		{"POST", "/processes/1/signal", `{"signal":"65"}`, "invalid_signal", "signal"},
		{"POST", "/processes/1/resize", `{"cols":80}`, "invalid_rows", "rows"},
		{"GET", "/terminal?cols=0", "", "invalid_cols", "cols"},
		{"GET", "/terminal?command=", "", "invalid_command", "command"},
		{"GET", "/terminal?grace=2h", "", "invalid_grace", "grace"},
		{"GET", "/terminal?workdir=x", "", "invalid_workdir", "workdir"},
		{"GET", "/terminal?offset=1", "", "invalid_offset", "offset"},
		{"GET", "/terminal?process=1&user=x", "", "invalid_user", "user"},
		{"GET", "/terminal?process=1&offset=-1", "", "invalid_offset", "offset"},
		{"GET", "/terminal?process=/", "", "invalid_process", "process"},
	} {
		r := h.send(t, c.method, sbx+c.path, h.key, c.body, upgrade)
		if r.status != 400 || r.problem.Code != c.code || deref(r.problem.Field) != c.field {
			t.Errorf("%s %s %s: %d %s, want %s in %s", c.method, c.path, c.body, r.status, r.body, c.code, c.field)
		}
	}
	if r := h.send(t, "GET", sbx+"/terminal", h.key, ""); r.status != 400 || r.problem.Code != "not_a_websocket" {
		t.Errorf("a terminal without a WebSocket: %d %s", r.status, r.body)
	}
	if r := h.send(t, "GET", sbx+"/processes/1/output", h.key, "", header("Last-Event-ID", "x"),
		header("Accept", eventStream)); r.status != 400 || deref(r.problem.Field) != "Last-Event-ID" {
		t.Errorf("a wrong id: %d %s", r.status, r.body)
	}
	for name, want := range map[string]int{"TERM": 15, "sigint": 2, "9": 9, "SIGRTMIN": 34, "rtmin+1": 35, "64": 64} {
		if n, err := signalNumber(name); err != nil || n != want {
			t.Errorf("signal %s is %d, %v", name, n, err)
		}
	}
	if len(h.agent.all) != 0 {
		t.Errorf("%d processes were started", len(h.agent.all))
	}
	as[Process](t, 201, h.send(t, "POST", sbx+"/processes", h.key, `{"command":"x"}`))
	if r := h.send(t, "POST", sbx+"/processes/1/stdin", h.key, strings.Repeat("x", maxInput+1)); r.status != 413 {
		t.Errorf("input over the limit: %d %.100s", r.status, r.body)
	}
	if r := h.send(t, "POST", sbx+"/processes/1/resize", h.key, `{"cols":1,"rows":1}`); r.status != 409 ||
		r.problem.Code != "no_terminal" {
		t.Errorf("resizing a process without a terminal: %d %s", r.status, r.body)
	}
}
