package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/cgroup"
	cay "github.com/cayhq/cay/sdk/go"
)

// evilServer is a server with an honest sandbox of one organization and a sandbox of another whose
// agent is e2e/evil.
type evilServer struct {
	*server
	honest   *server // with the key of the honest organization
	honestID string
	evilID   string
	token    string   // token of the evil sandbox, for E2B's clients
	evils    []string // names of the evils that the agent knows
}

// evilPatience is the time for which an agent on that server may be silent.
const evilPatience = 2 * time.Second

// maxServerMemory limits the server's memory under every attack, bytes.
const maxServerMemory = 512 << 20

func newEvilServer(t *testing.T) *evilServer {
	t.Helper()
	s := newServer(t, "CAY_SANDBOX_ANSWER_TIMEOUT="+evilPatience.String(), "CAY_RATE_LIMIT_PER_SECOND=100000",
		"CAY_RATE_LIMIT_BURST=100000",
		"CAY_TEMPLATES_PREPARE=python")
	s.args = []string{"--log-level", "info"}
	program := filepath.Join(t.TempDir(), "cay-agent")
	if err := caytest.Build(program, "./evil"); err != nil {
		t.Fatal(err)
	}
	evils, err := exec.Command(program, "evils").Output()
	if err != nil {
		t.Fatal(err)
	}
	s.start()
	s.needTemplate("python")
	e := &evilServer{server: s, evils: strings.Fields(string(evils))}

	e.honest = s.tenant("honest", nil)
	e.honestID = e.honest.create(nil)

	// The server does not check a program that is in place already, and the honest sandbox keeps
	// running its own.
	agents, err := filepath.Glob(filepath.Join(s.dataDir, "programs", "*", "cay-agent"))
	if err != nil || len(agents) != 1 {
		t.Fatalf("the agent's program is %v, %v", agents, err)
	}
	data, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(agents[0]+".new", data, 0o755),
		os.Rename(agents[0]+".new", agents[0])); err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequest("POST", s.url+"/sandboxes",
		strings.NewReader(`{"templateID":"python","timeout":600,"secure":true}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-API-Key", s.key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 201 {
		t.Fatalf("creating the evil sandbox: %d %s, %v", resp.StatusCode, body, err)
	}
	e.evilID, e.token = "sbx_"+text(body, "sandboxID"), text(body, "envdAccessToken")
	return e
}

// evilCall is a way on which the host calls an agent. In its texts EVIL stands for the name of an
// evil, and ID for the sandbox.
type evilCall struct {
	method, path string
	headers      []string
	body         string
}

// evilCalls returns all ways on which the host calls an agent, by name.
func (e *evilServer) evilCalls() map[string]evilCall {
	sse := []string{"Accept", "text/event-stream"}
	upgrade := func(to string, more ...string) []string {
		return append([]string{"Connection", "Upgrade", "Upgrade", to}, more...)
	}
	e2b := func(more ...string) []string {
		return append([]string{"E2b-Sandbox-Id", strings.TrimPrefix(e.evilID, "sbx_"), "E2b-Sandbox-Port", "49983",
			"X-Access-Token", e.token}, more...)
	}
	connect := e2b("Content-Type", "application/connect+proto", "Connect-Protocol-Version", "1")
	base := "/v1/sandboxes/ID"
	return map[string]evilCall{
		"execute":        {"POST", base + "/execute", nil, `{"command":"evil-EVIL","timeout":"1s"}`},
		"execute stream": {"POST", base + "/execute", sse, `{"command":"evil-EVIL","timeout":"1s"}`},
		"execute detach": {"POST", base + "/execute", sse, `{"command":"evil-EVIL","detach":true}`},
		"read file":      {"GET", base + "/files?path=/evil-EVIL", nil, ""},
		"write file":     {"PUT", base + "/files?path=/evil-EVIL", nil, "content"},
		"write large":    {"PUT", base + "/files?path=/evil-EVIL", nil, strings.Repeat("x", 3<<20)},
		"remove file":    {"DELETE", base + "/files?path=/evil-EVIL", nil, ""},
		"list":           {"GET", base + "/files/list?path=/evil-EVIL", nil, ""},
		"stat":           {"GET", base + "/files/stat?path=/evil-EVIL", nil, ""},
		"mkdir":          {"POST", base + "/files/mkdir", nil, `{"path":"/evil-EVIL"}`},
		"rename":         {"POST", base + "/files/rename", nil, `{"from":"/evil-EVIL","to":"/x"}`},
		"watch":          {"GET", base + "/files/watch?path=/evil-EVIL", sse, ""},
		"read tree":      {"GET", base + "/files/tar?path=/evil-EVIL", nil, ""},
		"write tree":     {"PUT", base + "/files/tar?path=/evil-EVIL", nil, strings.Repeat("x", 100<<10)},
		"start":          {"POST", base + "/processes", nil, `{"command":"evil-EVIL"}`},
		"processes":      {"GET", base + "/processes", nil, ""}, // one evil after the other
		"process":        {"GET", base + "/processes/evil-EVIL", nil, ""},
		"kill":           {"DELETE", base + "/processes/evil-EVIL", nil, ""},
		"wait":           {"GET", base + "/processes/evil-EVIL/wait?timeout=1s", nil, ""},
		"output":         {"GET", base + "/processes/evil-EVIL/output", nil, ""},
		"follow":         {"GET", base + "/processes/evil-EVIL/output", sse, ""},
		"stdin":          {"POST", base + "/processes/evil-EVIL/stdin", nil, "typed"},
		"signal":         {"POST", base + "/processes/evil-EVIL/signal", nil, `{"signal":"TERM"}`},
		"resize":         {"POST", base + "/processes/evil-EVIL/resize", nil, `{"cols":80,"rows":24}`},
		"terminal": {"GET", base + "/terminal?process=evil-EVIL",
			upgrade("websocket", "Sec-WebSocket-Version", "13", "Sec-WebSocket-Key", "MDEyMzQ1Njc4OWFiY2RlZg=="), ""},
		"tunnel":         {"POST", base + "/tunnel?port=PORT", upgrade("tcp"), ""},
		"port":           {"GET", base + "/ports/PORT/evil-EVIL", nil, ""},
		"port websocket": {"GET", base + "/ports/PORT/evil-EVIL", upgrade("websocket"), ""},
		"e2b read":       {"GET", "/files?path=/evil-EVIL", e2b(), ""},
		"e2b write":      {"POST", "/files?path=/evil-EVIL", e2b(), "content"},
		"e2b upgrade":    {"GET", "/files?path=/evil-EVIL", e2b("Connection", "Upgrade", "Upgrade", "tcp"), ""},
		"e2b metrics":    {"GET", "/metrics?evil-EVIL", e2b(), ""},
		"e2b list":       {"POST", "/process.Process/List?evil-EVIL", e2b("Content-Type", "application/json"), "{}"},
		"e2b start":      {"POST", "/process.Process/Start?evil-EVIL", connect, "\x00\x00\x00\x00\x00"},
		"e2b watch":      {"POST", "/filesystem.Filesystem/WatchDir?evil-EVIL", connect, "\x00\x00\x00\x00\x00"},
	}
}

// neverEnd are the calls that may be silent for ever: they carry a stream of a program inside, and
// only the caller knows how long it may be silent.
var neverEnd = map[string]bool{"tunnel": true, "port": true, "port websocket": true, "e2b start": true,
	"e2b watch": true}

// evilTry makes one call and returns an error that says in what way it ended wrongly.
func (e *evilServer) evilTry(ctx context.Context, name string, c evilCall, evil string) error {
	index := 0
	for i, other := range e.evils {
		if other == evil {
			index = i + 10*len(e.evils) // a port, from which the agent takes the evil
		}
	}
	fill := strings.NewReplacer("EVIL", evil, "ID", e.evilID, "PORT", strconv.Itoa(index))
	// Fifteen times its patience is longer than every wait of the server.
	ctx, cancel := context.WithTimeout(ctx, 15*evilPatience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, c.method, e.url+fill.Replace(c.path),
		strings.NewReader(fill.Replace(c.body)))
	if err != nil {
		return err
	}
	if strings.HasPrefix(c.path, "/v1/") {
		req.Header.Set("Authorization", "Bearer "+e.key)
	}
	for i := 0; i < len(c.headers); i += 2 {
		req.Header.Set(c.headers[i], c.headers[i+1])
	}
	if neverEnd[name] {
		// The caller leaves when it has waited long enough.
		time.AfterFunc(2*evilPatience, cancel)
	}
	resp, err := evilClient.Do(req)
	if err != nil {
		if neverEnd[name] || !errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			return nil // the server breaks off an answer that it cannot complete
		}
		return fmt.Errorf("no answer: %w", err)
	}
	defer resp.Body.Close()
	// net/http leaves a connection of another protocol alone
	defer context.AfterFunc(ctx, func() { _ = resp.Body.Close() })()
	// The caller of an endless answer leaves after so many bytes.
	const enough = 256 << 10
	start := time.Now()
	b, err := io.ReadAll(io.LimitReader(resp.Body, enough))
	switch {
	case ctx.Err() != nil && !neverEnd[name]:
		return fmt.Errorf("status %d, and %d bytes in %s without an end", resp.StatusCode, len(b), time.Since(start))
	case resp.StatusCode == http.StatusInternalServerError && !bringsItsOwn(name):
		return fmt.Errorf("status 500: %.200q", b)
	case resp.StatusCode >= 400 && len(b) == 0 && err == nil && !bringsItsOwn(name):
		return fmt.Errorf("status %d with an empty body", resp.StatusCode)
	case resp.StatusCode >= 400 && !bringsItsOwn(name):
		var problem struct{ Code, Detail, Message any }
		if err := json.Unmarshal(b, &problem); err != nil {
			return fmt.Errorf("status %d with %.200q", resp.StatusCode, b)
		}
		if text := fmt.Sprint(problem.Detail, problem.Message); strings.ContainsFunc(text, func(r rune) bool {
			return r != '\n' && r != '\t' && !unicode.IsPrint(r)
		}) || len(text) > 8<<10 {
			return fmt.Errorf("status %d with the detail %.200q", resp.StatusCode, text)
		}
	}
	return nil
}

// bringsItsOwn reports whether a call's statuses and errors may be the agent's.
func bringsItsOwn(name string) bool {
	return strings.HasPrefix(name, "e2b") || strings.HasPrefix(name, "port")
}

var evilClient = &http.Client{
	Transport:     &http.Transport{DisableKeepAlives: true, DisableCompression: true},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// spent is the server's use of the host's resources.
type spent struct{ peak, files, goroutines int64 }

func (s *server) spent() spent {
	s.t.Helper()
	s.mu.Lock()
	pid := s.cmd.Process.Pid
	s.mu.Unlock()
	var u spent
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			if err != nil {
				s.t.Fatal(err)
			}
			u.peak = kib << 10
		}
	}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		s.t.Fatal(err)
	}
	u.files = int64(len(files))
	u.goroutines = int64(s.metric("go_goroutines"))
	return u
}

// beHonest executes commands in the honest sandbox, one after the other, until stop is called. Each
// must succeed. stop returns how many there were and the longest duration.
func (e *evilServer) beHonest() (stop func() (n int, longest time.Duration)) {
	done := make(chan struct{})
	var n int
	var longest time.Duration
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			start := time.Now()
			r, err := e.honest.api().Execute(context.Background(), e.honestID,
				cay.ExecuteRequest{Command: new("echo fine")})
			if err != nil || r.Stdout != "fine\n" {
				e.t.Errorf("the honest command %d ended with %.300s, %v", n, jsonOf(r), err)
				return
			}
			n, longest = n+1, max(longest, time.Since(start))
		}
	})
	return func() (int, time.Duration) { close(done); wg.Wait(); return n, longest.Round(time.Millisecond) }
}

// settled waits until the server uses hardly more of the host than before.
func (e *evilServer) settled(before spent) {
	e.t.Helper()
	const slack = 40 // idle connections, and others that come and go by themselves
	var now spent
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) { // a poll with a deadline
		if now = e.spent(); now.files <= before.files+slack && now.goroutines <= before.goroutines+slack &&
			e.metric("cay_calls_memory_bytes") < 1<<20 {
			return
		}
		if time.Now().After(deadline) {
			e.t.Errorf("before %+v, after %+v, and calls hold %v bytes", before, now, e.metric("cay_calls_memory_bytes"))
			return
		}
	}
}

// TestEvilAgent checks that for every answer of an agent to every call of the host, the call ends
// with an error that says which side is at fault, calls of another organization succeed meanwhile,
// and the server keeps nothing of it. Under a thousand concurrent calls that make it hold as much
// as they can, it stays under its limit.
func TestEvilAgent(t *testing.T) {
	onOneStore(t)
	e := newEvilServer(t)
	e.confined()
	t.Run("each answer to each call", func(t *testing.T) { e.of(t).eachAnswer() })
	t.Run("a thousand calls", func(t *testing.T) { e.of(t).manyCalls() })
	e.checkLog()
}

// confined checks that the server is in a control group of its own, with the limit that it was
// given.
func (e *evilServer) confined() {
	e.t.Helper()
	e.mu.Lock()
	pid := e.cmd.Process.Pid
	e.mu.Unlock()
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		e.t.Fatal(err)
	}
	group := "/cay-" + e.instance() + "-server"
	if !strings.Contains(string(groups), group+"\n") {
		e.t.Errorf("the server is not in %s:\n%s", group, groups)
	}
	h, err := cgroup.Detect()
	if err != nil {
		e.t.Fatal(err)
	}
	if limit, err := h.Group(group).MemoryLimit(); err != nil || limit != 1<<30 {
		e.t.Errorf("the limit of %s is %d, %v", group, limit, err)
	}
}

// of returns the server for a part of the test.
func (e *evilServer) of(t *testing.T) *evilServer {
	own, honest, all := *e.server, *e.honest, *e
	own.t, honest.t = t, t
	all.server, all.honest = &own, &honest
	return &all
}

func (e *evilServer) eachAnswer() {
	t := e.t
	before := e.spent()
	type one struct{ name, evil string }
	calls := e.evilCalls()
	var all []one
	for name := range calls {
		for _, evil := range e.evils {
			all = append(all, one{name, evil})
		}
	}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	stop := e.beHonest()
	var wg sync.WaitGroup
	var most atomic.Int64
	work := make(chan one)
	for range 300 {
		wg.Go(func() {
			for c := range work {
				start := time.Now()
				if err := e.evilTry(t.Context(), c.name, calls[c.name], c.evil); err != nil {
					t.Errorf("%s, %s: %v", c.name, c.evil, err)
				}
				if took := int64(time.Since(start)); took > most.Load() {
					most.Store(took)
				}
			}
		})
	}
	start := time.Now()
	for _, c := range all {
		work <- c
	}
	close(work)
	wg.Wait()
	honest, slowest := stop()
	after := e.spent()
	t.Logf("%d calls in %s, the longest %s; %d honest commands, the longest %s; the server took %d MiB at the most",
		len(all), time.Since(start).Round(time.Second),
		time.Duration(most.Load()).Round(time.Millisecond), honest, slowest, after.peak>>20)
	if honest == 0 {
		t.Error("no honest command ended meanwhile")
	}
	if after.peak > maxServerMemory {
		t.Errorf("the server took %d MiB", after.peak>>20)
	}
	e.settled(before)
}

// checkLog fails for log lines that an agent must not be able to cause.
func (e *evilServer) checkLog() {
	e.t.Helper()
	f, err := os.Open(e.logFile())
	if err != nil {
		e.t.Fatal(err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if line := lines.Text(); len(line) > 8<<10 || strings.ContainsFunc(line, unicode.IsControl) {
			e.t.Errorf("the log has a line of %d bytes: %.300q", len(line), line)
		}
		if line := lines.Text(); strings.Contains(line, "panic") {
			e.t.Errorf("the log has %.600q", line)
		}
	}
	if err := lines.Err(); err != nil {
		e.t.Error(err)
	}
}

// manyCalls makes a thousand concurrent calls that make the server hold as much as each can, and
// whose callers read nothing.
func (e *evilServer) manyCalls() {
	t := e.t
	before := e.spent()
	stop := e.beHonest()
	const calls = 1000
	raw := func(method, path, body string, headers ...string) string {
		return fmt.Sprintf("%s %s HTTP/1.1\r\nHost: cay\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n%s\r\n%s",
			method, path, e.key, len(body), strings.Join(headers, ""), body)
	}
	base := "/v1/sandboxes/" + e.evilID
	sse, unsent := "Accept: text/event-stream\r\n", "X: "+strings.Repeat("x", 30<<10)+"\r\n"
	kinds := []string{
		raw("POST", base+"/execute", `{"command":"evil-full","timeout":"20s"}`),
		raw("POST", base+"/execute", `{"command":"evil-full","timeout":"20s"}`, sse),
		raw("POST", base+"/execute", `{"command":"evil-flood","timeout":"20s"}`),
		raw("POST", base+"/execute", `{"command":"evil-half","timeout":"20s"}`, unsent),
		raw("GET", base+"/files/list?path=/evil-longnames", ""),
		raw("GET", base+"/files?path=/evil-endless", ""),
		raw("GET", base+"/processes/evil-controls/output", "", sse),
		raw("GET", base+"/processes/evil-controls/output", ""),
		raw("POST", base+"/execute", `{"command":"evil-silence","timeout":"20s","stdin":"`+strings.Repeat("s", 1<<20)+`"}`),
		raw("POST", base+"/execute", strings.Repeat(" ", 2<<20)+`{`)[:1<<20], // the rest of the body never comes
	}
	statuses := map[string]int{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range calls {
		wg.Go(func() {
			conn, err := net.Dial("tcp", strings.TrimPrefix(e.url, "http://"))
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(6 * time.Second))
			// The server may refuse the request while it is being sent.
			_, _ = io.WriteString(conn, kinds[i%len(kinds)])
			status := make([]byte, len("HTTP/1.1 200"))
			_, err = io.ReadFull(conn, status)
			mu.Lock()
			if statuses[string(status)]++; err != nil {
				statuses["none"]++
			}
			mu.Unlock()
			time.Sleep(4 * time.Second) // a caller that does not read on
		})
	}
	wg.Wait()
	honest, slowest := stop()
	after := e.spent()
	t.Logf("answers %v; %d honest commands, the longest %s; the server took %d MiB at the most", statuses, honest, slowest,
		after.peak>>20)
	if honest == 0 {
		t.Error("no honest command ended meanwhile")
	}
	if after.peak > maxServerMemory {
		t.Errorf("the server took %d MiB", after.peak>>20)
	}
	if statuses["HTTP/1.1 429"] == 0 {
		t.Error("no call was refused: the load is too small to test the limit")
	}
	e.settled(before)
}
