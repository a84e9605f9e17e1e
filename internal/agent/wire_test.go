package agent_test

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/cayhq/cay/internal/agentapi/filesystem"
	"github.com/cayhq/cay/internal/agentapi/process"
)

// clients returns clients that call as E2B's do, with a user unless it is "".
func (s *sandbox) clients(user string) (process.ProcessClient, filesystem.FilesystemClient) {
	transport := roundTripper(func(r *http.Request) (*http.Response, error) {
		if user != "" {
			r.SetBasicAuth(user, "")
		}
		return s.transport.RoundTrip(r)
	})
	c, url := &http.Client{Transport: transport}, "http://"+s.addr
	return process.NewProcessClient(c, url, connect.WithProtoJSON()), filesystem.NewFilesystemClient(c, url)
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// events reads the events of a Start or Connect, one at a time.
type events struct {
	t       *testing.T
	receive func() (*process.ProcessEvent, error)
}

func (e events) next() *process.ProcessEvent {
	e.t.Helper()
	ev, err := e.receive()
	if err != nil {
		e.t.Fatalf("the stream ended: %v", err)
	}
	return ev
}

// until reads output until it contains a text, or to the end if it is "".
func (e events) until(text string) (output string, end *process.EndEvent) {
	e.t.Helper()
	for {
		ev := e.next()
		d := ev.GetData()
		output += string(d.GetStdout()) + string(d.GetStderr()) + string(d.GetPty())
		if end := ev.GetEnd(); end != nil {
			return output, end
		}
		if text != "" && strings.Contains(output, text) {
			return output, nil
		}
	}
}

func (s *sandbox) start(
	t *testing.T, ctx context.Context, c process.ProcessClient, req *process.StartRequest,
) (events, uint32) {
	t.Helper()
	stream, err := c.Start(ctx, connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	e := events{t, func() (*process.ProcessEvent, error) {
		if !stream.Receive() {
			return nil, fmt.Errorf("end of stream: %w", stream.Err())
		}
		return stream.Msg().GetEvent(), nil
	}}
	return e, e.next().GetStart().GetPid()
}

func byPID(pid uint32) *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: pid}}
}

func shell(command string) *process.ProcessConfig {
	return &process.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", command}}
}

func wantCode(t *testing.T, err error, code connect.Code) {
	t.Helper()
	if connect.CodeOf(err) != code || err == nil {
		t.Errorf("got %v, want %v", err, code)
	}
}

func TestE2BProcess(t *testing.T) {
	s := startSandbox(t, options{})
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	c, _ := s.clients("user")

	t.Run("input, list, second listener, end", func(t *testing.T) {
		tag := "a tag"
		e, pid := s.start(t, ctx, c, &process.StartRequest{Process: shell("id -un; cat; exit 5"), Tag: &tag})
		e.until("user\n")
		list, err := c.List(ctx, connect.NewRequest(&process.ListRequest{}))
		if err != nil || len(list.Msg.Processes) != 1 || list.Msg.Processes[0].GetPid() != pid ||
			list.Msg.Processes[0].GetTag() != tag {
			t.Errorf("list: %v, %v", list, err)
		}
		byTag := &process.ProcessSelector{Selector: &process.ProcessSelector_Tag{Tag: tag}}
		second, err := c.Connect(ctx, connect.NewRequest(&process.ConnectRequest{Process: byTag}))
		if err != nil {
			t.Fatal(err)
		}
		other := events{t, func() (*process.ProcessEvent, error) {
			if !second.Receive() {
				return nil, second.Err()
			}
			return second.Msg().GetEvent(), nil
		}}
		if got := other.next().GetStart().GetPid(); got != pid {
			t.Errorf("connected to %d, want %d", got, pid)
		}
		input := &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: []byte("typed\n")}}
		if _, err := c.SendInput(ctx,
			connect.NewRequest(&process.SendInputRequest{Process: byPID(pid), Input: input})); err != nil {
			t.Error(err)
		}
		empty := &process.ProcessInput{Input: &process.ProcessInput_Stdin{}}
		if _, err := c.SendInput(ctx,
			connect.NewRequest(&process.SendInputRequest{Process: byPID(pid), Input: empty})); err != nil {
			t.Error(err)
		}
		e.until("typed\n")
		in := c.StreamInput(ctx)
		for _, m := range []*process.StreamInputRequest{
			{Event: &process.StreamInputRequest_Start{Start: &process.StreamInputRequest_StartEvent{Process: byPID(pid)}}},
			{Event: &process.StreamInputRequest_Data{Data: &process.StreamInputRequest_DataEvent{Input: &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: []byte("streamed\n")}}}}},
		} {
			if err := in.Send(m); err != nil {
				t.Error(err)
			}
		}
		if _, err := in.CloseAndReceive(); err != nil {
			t.Error(err)
		}
		e.until("streamed\n")
		terminal := &process.ProcessInput{Input: &process.ProcessInput_Pty{Pty: []byte("x")}}
		_, err = c.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: byPID(pid), Input: terminal}))
		wantCode(t, err, connect.CodeInternal)
		if _, err := c.CloseStdin(ctx, connect.NewRequest(&process.CloseStdinRequest{Process: byPID(pid)})); err != nil {
			t.Error(err)
		}
		for name, e := range map[string]events{"first": e, "second": other} {
			_, end := e.until("")
			if end.GetExitCode() != 5 || !end.GetExited() || end.GetStatus() != "exit status 5" {
				t.Errorf("%s listener: %v", name, end)
			}
		}
		late, err := c.Connect(ctx, connect.NewRequest(&process.ConnectRequest{Process: byPID(pid)}))
		if err != nil || !late.Receive() || late.Msg().GetEvent().GetStart() == nil || !late.Receive() ||
			late.Msg().GetEvent().GetEnd().GetExitCode() != 5 {
			t.Errorf("late listener: %v", err)
		}
	})

	t.Run("kill", func(t *testing.T) {
		e, pid := s.start(t, ctx, c, &process.StartRequest{Process: shell("setsid sleep 500 & sleep 501")})
		if _, err := c.SendSignal(ctx, connect.NewRequest(&process.SendSignalRequest{Process: byPID(pid),
			Signal: process.Signal_SIGNAL_SIGKILL})); err != nil {
			t.Error(err)
		}
		if got := s.sh(fmt.Sprintf("kill -0 %d 2>/dev/null && echo alive || echo gone", pid)); got != "gone" {
			t.Errorf("after the kill the process is %s", got)
		}
		_, end := e.until("")
		if end.GetExitCode() != -1 || end.GetExited() || end.GetStatus() != "signal: killed" ||
			end.GetError() != "signal: killed" {
			t.Errorf("end: %v", end)
		}
		_, err := c.SendSignal(ctx, connect.NewRequest(&process.SendSignalRequest{Process: byPID(pid),
			Signal: process.Signal_SIGNAL_SIGKILL}))
		wantCode(t, err, connect.CodeNotFound)
	})

	t.Run("terminal", func(t *testing.T) {
		e, pid := s.start(t, ctx, c, &process.StartRequest{
			Process: &process.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-i"}, Envs: map[string]string{"PS1": "> "}},
			Pty:     &process.PTY{Size: &process.PTY_Size{Cols: 100, Rows: 40}},
		})
		typing := func(text string) {
			t.Helper()
			in := &process.ProcessInput{Input: &process.ProcessInput_Pty{Pty: []byte(text)}}
			if _, err := c.SendInput(ctx,
				connect.NewRequest(&process.SendInputRequest{Process: byPID(pid), Input: in})); err != nil {
				t.Error(err)
			}
		}
		typing("stty size; tty\n")
		e.until("40 100\r\n/dev/pts/")
		size := &process.PTY{Size: &process.PTY_Size{Cols: 80, Rows: 24}}
		if _, err := c.Update(ctx, connect.NewRequest(&process.UpdateRequest{Process: byPID(pid), Pty: size})); err != nil {
			t.Error(err)
		}
		typing("stty size\n")
		e.until("24 80\r\n")
		typing("exit 7\n")
		if _, end := e.until(""); end.GetExitCode() != 7 {
			t.Errorf("end: %v", end)
		}
	})

	t.Run("time limit", func(t *testing.T) {
		limited, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		stream, err := c.Start(limited,
			connect.NewRequest(&process.StartRequest{Process: shell("setsid sleep 601 & sleep 602")}))
		if err != nil {
			t.Fatal(err)
		}
		for stream.Receive() {
		}
		wantCode(t, stream.Err(), connect.CodeDeadlineExceeded)
		s.eventually("the command is gone", func() bool { return s.sh("ps | grep -c '[s]leep 60[12]' || true") == "0" })
	})

	t.Run("going away leaves the command", func(t *testing.T) {
		short, leave := context.WithCancel(ctx)
		_, pid := s.start(t, short, c, &process.StartRequest{Process: shell("sleep 2; echo still >/tmp/still; sleep 500")})
		leave()
		s.eventually("the command went on", func() bool { return s.sh("cat /tmp/still 2>/dev/null || true") == "still" })
		s.sh(fmt.Sprint("kill -9 -", pid))
	})

	t.Run("refused", func(t *testing.T) {
		for name, c2 := range map[string]struct {
			req  *process.StartRequest
			user string
			code connect.Code
		}{
			"missing directory": {&process.StartRequest{Process: &process.ProcessConfig{Cmd: "true", Cwd: new("/nosuch")}}, "user", connect.CodeInvalidArgument},
			"unknown user":      {&process.StartRequest{Process: shell("true")}, "nosuch", connect.CodeUnauthenticated},
			"no such program":   {&process.StartRequest{Process: &process.ProcessConfig{Cmd: "nosuch"}}, "user", connect.CodeInvalidArgument},
		} {
			client, _ := s.clients(c2.user)
			stream, err := client.Start(ctx, connect.NewRequest(c2.req))
			if err != nil {
				t.Fatal(err)
			}
			if stream.Receive() {
				t.Errorf("%s: got %v", name, stream.Msg())
			}
			if connect.CodeOf(stream.Err()) != c2.code {
				t.Errorf("%s: %v, want %v", name, stream.Err(), c2.code)
			}
		}
		_, err := c.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: byPID(99999)}))
		wantCode(t, err, connect.CodeNotFound)
	})
}

// TestE2BFraming exchanges the bytes of a whole command, as E2B's JavaScript client sends and expects them.
func TestE2BFraming(t *testing.T) {
	s := startSandbox(t, options{})
	body := []byte(`{"process":{"cmd":"/bin/sh","args":["-c","echo hey"],"envs":{"X":"y"},"cwd":"/tmp"},"stdin":false}`)
	frame := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
	status, h, text := s.request("POST", "/process.Process/Start", http.Header{
		"Content-Type": {"application/connect+json"}, "Connect-Protocol-Version": {"1"},
		"Keepalive-Ping-Interval": {"50"}, "Connect-Timeout-Ms": {"60000"},
	}, strings.NewReader(string(frame)))
	if status != 200 || h.Get("Content-Type") != "application/connect+json" {
		t.Fatalf("%d %v", status, h)
	}
	r, hey := bufio.NewReader(strings.NewReader(text)), base64.StdEncoding.EncodeToString([]byte("hey\n"))
	var got []map[string]any
	for {
		var head [5]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			break
		}
		payload := make([]byte, binary.BigEndian.Uint32(head[1:]))
		if _, err := io.ReadFull(r, payload); err != nil {
			t.Fatal(err)
		}
		var m map[string]any
		if err := json.Unmarshal(payload, &m); err != nil {
			t.Fatalf("%q: %v", payload, err)
		}
		if want := map[bool]byte{true: 2}[len(got) == 3]; head[0] != want {
			t.Errorf("flags of %q are %d, want %d", payload, head[0], want)
		}
		got = append(got, m)
	}
	if len(got) != 4 {
		t.Fatalf("%d messages: %v", len(got), got)
	}
	event := func(i int, kind string) map[string]any {
		ev, _ := got[i]["event"].(map[string]any)
		m, _ := ev[kind].(map[string]any)
		return m
	}
	end := event(2, "end")
	if event(0, "start")["pid"] == nil || event(1, "data")["stdout"] != hey || end["exited"] != true ||
		end["status"] != "exit status 0" || len(got[3]) != 0 {
		t.Errorf("got %v", got)
	}
}

func TestE2BFilesystem(t *testing.T) {
	s := startSandbox(t, options{})
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	_, c := s.clients("user")
	makeDir := func(p string) error {
		_, err := c.MakeDir(ctx, connect.NewRequest(&filesystem.MakeDirRequest{Path: p}))
		return err
	}
	if err := makeDir("d/e"); err != nil {
		t.Error(err)
	}
	wantCode(t, makeDir("/home/user/d/e"), connect.CodeAlreadyExists)
	wantCode(t, makeDir("/etc/passwd"), connect.CodeInvalidArgument)
	s.sh("cd /home/user/d; echo x >f; ln -s f good; ln -s nowhere bad; ln -s e dirlink")
	stat := func(p string) (*filesystem.EntryInfo, error) {
		r, err := c.Stat(ctx, connect.NewRequest(&filesystem.StatRequest{Path: p}))
		if err != nil {
			return nil, err
		}
		return r.Msg.GetEntry(), nil
	}
	for _, want := range []struct {
		path, target, owner string
		kind                filesystem.FileType
		mode                uint32
	}{
		{"d", "", "user", filesystem.FileType_FILE_TYPE_DIRECTORY, 0o755},
		{"d/f", "", "root", filesystem.FileType_FILE_TYPE_FILE, 0o644},
		{"~/d/good", "/home/user/d/f", "root", filesystem.FileType_FILE_TYPE_FILE, 0o644},
		{"d/bad", "nowhere", "root", filesystem.FileType_FILE_TYPE_UNSPECIFIED, 0o777},
	} {
		e, err := stat(want.path)
		if err != nil || e.GetType() != want.kind || e.GetMode() != want.mode || e.GetOwner() != want.owner ||
			e.GetSymlinkTarget() != want.target || e.GetSize() <= 0 {
			t.Errorf("stat %s: %v, %v", want.path, e, err)
		}
	}
	_, err := stat("nosuch")
	wantCode(t, err, connect.CodeNotFound)
	list, err := c.ListDir(ctx, connect.NewRequest(&filesystem.ListDirRequest{Path: "/home/user", Depth: 2}))
	var names []string
	for _, e := range list.Msg.GetEntries() {
		names = append(names, strings.TrimPrefix(e.GetPath(), "/home/user/"))
	}
	if got := strings.Join(names, " "); err != nil || got != "d d/bad d/dirlink d/e d/f d/good" {
		t.Errorf("list: %q, %v", got, err)
	}
	_, err = c.ListDir(ctx, connect.NewRequest(&filesystem.ListDirRequest{Path: "d/f"}))
	wantCode(t, err, connect.CodeInvalidArgument)
	r, err := c.Move(ctx, connect.NewRequest(&filesystem.MoveRequest{Source: "d/f", Destination: "new/place/f"}))
	if err != nil || r.Msg.GetEntry().GetPath() != "/home/user/new/place/f" {
		t.Errorf("move: %v, %v", r, err)
	}
	_, err = c.Move(ctx, connect.NewRequest(&filesystem.MoveRequest{Source: "d/f", Destination: "g"}))
	wantCode(t, err, connect.CodeNotFound)
	for range 2 { // removing what does not exist succeeds
		if _, err := c.Remove(ctx, connect.NewRequest(&filesystem.RemoveRequest{Path: "d"})); err != nil {
			t.Error(err)
		}
	}
	s.sh("test ! -e /home/user/d")
}

func TestWatch(t *testing.T) {
	s := startSandbox(t, options{})
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	_, c := s.clients("")
	s.sh("mkdir -p /tmp/w/sub; echo old >/tmp/w/f")
	watching, stop := context.WithCancel(ctx)
	stream, err := c.WatchDir(watching,
		connect.NewRequest(&filesystem.WatchDirRequest{Path: "/tmp/w", Recursive: true, IncludeEntry: true}))
	if err != nil || !stream.Receive() || stream.Msg().GetStart() == nil {
		t.Fatalf("no start: %v, %v", err, stream.Err())
	}
	polled, err := c.CreateWatcher(ctx, connect.NewRequest(&filesystem.CreateWatcherRequest{Path: "/tmp/w"}))
	if err != nil {
		t.Fatal(err)
	}
	s.sh("cd /tmp/w; echo new >>f; chmod 600 f; mv f g; rm g; mkdir -p deep/er; echo x >deep/er/file; echo y >sub/file")
	want := map[string]bool{"f WRITE": true, "f CHMOD": true, "f RENAME": true, "g CREATE": true, "g REMOVE": true,
		"deep CREATE": true, "deep/er CREATE": true, "deep/er/file CREATE": true, "sub/file CREATE": true,
		"sub/file WRITE": true}
	timer := time.AfterFunc(20*time.Second, stop)
	defer timer.Stop()
	for len(want) > 0 && stream.Receive() {
		ev := stream.Msg().GetFilesystem()
		kind := strings.TrimPrefix(ev.GetType().String(), "EVENT_TYPE_")
		delete(want, ev.GetName()+" "+kind)
		if ev.GetName() == "sub/file" && kind == "WRITE" && ev.GetEntry().GetPath() != "/tmp/w/sub/file" {
			t.Errorf("the entry of %v", ev)
		}
	}
	if len(want) > 0 {
		t.Errorf("did not come: %v (%v)", want, stream.Err())
	}
	stop()
	var polledNames []string
	s.eventually("events are collected", func() bool {
		r, err := c.GetWatcherEvents(ctx,
			connect.NewRequest(&filesystem.GetWatcherEventsRequest{WatcherId: polled.Msg.GetWatcherId()}))
		if err != nil {
			t.Fatal(err)
		}
		for _, ev := range r.Msg.GetEvents() {
			polledNames = append(polledNames, ev.GetName())
		}
		return strings.Contains(strings.Join(polledNames, " "), "deep")
	})
	if got := strings.Join(polledNames, " "); strings.Contains(got, "file") {
		t.Errorf("not recursive, but %q", got)
	}
	remove := connect.NewRequest(&filesystem.RemoveWatcherRequest{WatcherId: polled.Msg.GetWatcherId()})
	if _, err := c.RemoveWatcher(ctx, remove); err != nil {
		t.Error(err)
	}
	_, err = c.RemoveWatcher(ctx, remove)
	wantCode(t, err, connect.CodeNotFound)
	_, err = c.CreateWatcher(ctx, connect.NewRequest(&filesystem.CreateWatcherRequest{Path: "/nosuch"}))
	wantCode(t, err, connect.CodeNotFound)
	_, err = c.CreateWatcher(ctx, connect.NewRequest(&filesystem.CreateWatcherRequest{Path: "/etc/passwd"}))
	wantCode(t, err, connect.CodeInvalidArgument)
}
