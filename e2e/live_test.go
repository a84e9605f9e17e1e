package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// touch makes a file in the sandbox, for which a command waits.
func (s *server) touch(id, path string) {
	s.t.Helper()
	err := s.api().WriteFile(context.Background(), id, path, strings.NewReader(""), cay.WriteFileOptions{})
	if err != nil {
		s.t.Fatalf("writing %s: %v", path, err)
	}
}

// waitingFor returns a shell loop that ends when the file is there.
func waitingFor(path string) string {
	return "while [ ! -e " + path + " ]; do sleep 0.05; done"
}

// runs waits until as many processes run inside whose command line begins with the words.
func (s *server) runs(id, words string, want int) {
	s.t.Helper()
	count := fmt.Sprintf(`n=0; for f in /proc/[0-9]*/cmdline; `+
		`do [ "$f" = /proc/$$/cmdline ] || ! tr '\0' ' ' <$f 2>/dev/null | grep -q "^%s" || n=$((n+1)); done; echo $n`,
		words[:1]+"["+words[1:2]+"]"+words[2:])
	deadline := time.Now().Add(patience)
	for {
		got := s.want(id, count)
		if got == strconv.Itoa(want) {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%s processes %q run, want %d", got, words, want)
		}
		time.Sleep(50 * time.Millisecond) // a poll with a deadline
	}
}

func TestStreamedOutput(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var got []string
	exit, err := s.api().ExecuteStream(ctx, id, cay.ExecuteRequest{Timeout: new("80s"),
		Command: new("printf 'one \\342\\202'; " + waitingFor("/tmp/a") + "; printf '\\254\\n'; echo two >&2; " + waitingFor("/tmp/b") + "; printf '\\377'; exit 7")},
		func(o cay.Output) error {
			got = append(got, o.Stream+":"+string(o.Data))
			switch string(o.Data) {
			case "one ": // so the line came while the command ran
				s.touch(id, "/tmp/a")
			case "two\n":
				s.touch(id, "/tmp/b")
			}
			return nil
		})
	if err != nil {
		t.Fatal(err)
	}
	// A character that was cut in two arrives whole. The order between the streams is not fixed.
	all := strings.Join(got, "|")
	if exit.ExitCode != 7 || !strings.HasPrefix(all, ":|stdout:one |") || !strings.Contains(all, "stdout:€\n") ||
		!strings.Contains(all, "stderr:two\n") || !strings.HasSuffix(all, "|stdout:\xff") {
		t.Errorf("%q, exit %+v", got, exit)
	}
	exit, err = s.api().ExecuteStream(ctx, id, cay.ExecuteRequest{Args: []string{"/no/such"}},
		func(o cay.Output) error {
			if o.PID != 0 {
				t.Error("a program that does not exist has started")
			}
			return nil
		})
	if err != nil || exit.ExitCode != 127 {
		t.Errorf("%+v, %v", exit, err)
	}
	exit, err = s.api().ExecuteStream(ctx, id, cay.ExecuteRequest{Command: new("echo on; sleep 60"),
		Timeout: new("500ms")}, func(cay.Output) error { return nil })
	if err != nil || !exit.TimedOut || exit.ExitCode != 124 {
		t.Errorf("%+v, %v", exit, err)
	}
}

// TestStreamSlowReader checks that a slow reader does not stop a command, and gets as much output
// as from a plain call.
func TestStreamSlowReader(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	n := 0
	exit, err := s.api().ExecuteStream(ctx, id, cay.ExecuteRequest{Timeout: new("2m"),
		Command: new("head -c 20000000 /dev/zero | tr '\\0' x; touch /tmp/done")}, func(o cay.Output) error {
		if n == 0 && len(o.Data) > 0 {
			s.want(id, waitingFor("/tmp/done"), object{"timeout": "80s"})
		}
		n += len(o.Data)
		return nil
	})
	if err != nil || exit.ExitCode != 0 || n != 8<<20 || !*exit.StdoutTruncated || *exit.StderrTruncated {
		t.Errorf("%d bytes, exit %+v, %v", n, exit, err)
	}
}

// TestStreamReaderLeaves checks that a command ends when its reader leaves, unless it is detached.
func TestStreamReaderLeaves(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	for _, detach := range []bool{false, true} {
		r := cay.ExecuteRequest{Command: new("echo begun; setsid sleep 8642 & sleep 9753; echo over"), Timeout: new("4m"),
			Detach: new(detach)}
		ctx, leave := context.WithCancel(t.Context())
		pid := 0
		_, err := s.api().ExecuteStream(ctx, id, r, func(o cay.Output) error {
			if pid = max(pid, o.PID); len(o.Data) > 0 {
				leave()
			}
			return nil
		})
		if err == nil || pid == 0 {
			t.Fatalf("the stream went on: %d, %v", pid, err)
		}
		if !detach {
			s.runs(id, "sleep 8642", 0)
			s.runs(id, "sleep 9753", 0)
			continue
		}
		s.runs(id, "sleep 9753", 1)
		name := strconv.Itoa(pid)
		p, err := s.api().GetProcess(t.Context(), id, name)
		if err != nil || p.Status != cay.ProcessStatusRunning || *p.OutputTo != 6 {
			t.Errorf("detached: %+v, %v", p, err)
		}
		if err := s.api().KillProcess(t.Context(), id, name); err != nil {
			t.Error(err)
		}
		s.runs(id, "sleep", 0)
	}
}

// TestManyStreams opens 200 streams at once, and checks that nothing of them is left.
func TestManyStreams(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	const sandboxes, each = 4, 50
	before := s.metric("go_goroutines")
	var ids []string
	for range sandboxes {
		id := s.create(nil)
		defer s.destroy(id)
		s.want(id, "mkfifo /tmp/gate")
		ids = append(ids, id)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	c := s.api()
	var begun, right atomic.Int64
	var wg sync.WaitGroup
	for _, id := range ids {
		for i := range each {
			wg.Go(func() {
				var out strings.Builder
				exit, err := c.ExecuteStream(ctx, id,
					cay.ExecuteRequest{Command: new(fmt.Sprintf("echo begun; cat /tmp/gate; echo end %d", i)), Timeout: new("3m")},
					func(o cay.Output) error {
						if out.Len() == 0 && len(o.Data) > 0 {
							begun.Add(1)
						}
						out.Write(o.Data)
						return nil
					})
				if err != nil || exit.ExitCode != 0 || out.String() != fmt.Sprintf("begun\nend %d\n", i) {
					t.Errorf("stream %d: %q, %+v, %v", i, out.String(), exit, err)
					return
				}
				right.Add(1)
			})
		}
	}
	for begun.Load() < sandboxes*each && ctx.Err() == nil {
		time.Sleep(50 * time.Millisecond) // a poll with a deadline
	}
	if n := s.metric("cay_sandbox_leases"); n < sandboxes*each {
		t.Errorf("%d streams are open, want %d", n, sandboxes*each)
	}
	ended := make(chan struct{})
	go func() { wg.Wait(); close(ended) }()
	for open := true; open; {
		for _, id := range ids { // this releases all that wait; some begin to wait later
			s.want(id, ": <> /tmp/gate", object{"timeout": "80s"})
		}
		select {
		case <-ended:
			open = false
		case <-time.After(100 * time.Millisecond):
		}
	}
	if right.Load() != sandboxes*each {
		t.Errorf("%d of %d streams were right", right.Load(), sandboxes*each)
	}
	// Connections that are kept for the next call have goroutines, at most 8 for each sandbox.
	s.settles("goroutines", func() bool {
		return s.metric("go_goroutines") < before+sandboxes*8*2+20 && s.metric("cay_sandbox_leases") == 0
	})
	for _, id := range ids {
		s.runs(id, "cat /tmp/gate", 0)
	}
}

// settles polls until holds returns true.
func (s *server) settles(what string, holds func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); !holds(); {
		if time.Now().After(deadline) {
			s.t.Fatalf("%s did not settle", what)
		}
		time.Sleep(50 * time.Millisecond) // a poll with a deadline
	}
}

// counter is a shell program that writes numbers, a line each.
const counter = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"

// counted checks that the numbers in the output are consecutive, and returns the last one.
func counted(t *testing.T, out []byte) int {
	t.Helper()
	lines := strings.Split(string(out[:bytes.LastIndexByte(out, '\n')+1]), "\n")
	last := -1
	for i, line := range lines[:len(lines)-1] {
		n, err := strconv.Atoi(line)
		if err != nil || i > 0 && n != last+1 {
			t.Fatalf("%q comes after %d", line, last)
		}
		last = n
	}
	return last
}

// TestStreamsAndCrashes kills the server and the sandbox in mid-stream. Detached processes go on,
// and their followers miss nothing.
func TestStreamsAndCrashes(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	id := s.create(nil)
	p, err := s.api().StartProcess(t.Context(), id, cay.StartProcessRequest{Command: new(counter), Tag: new("counter")})
	if err != nil {
		t.Fatal(err)
	}
	var all []byte
	enough := 20
	follow := func(stop func()) error {
		_, err := s.api().FollowProcess(t.Context(), id, "counter", int64(len(all)), func(o cay.Output) error {
			if o.Offset != int64(len(all)) || o.Lost != 0 {
				return fmt.Errorf("at offset %d the stream sent %d, %d lost", len(all), o.Offset, o.Lost)
			}
			if all = append(all, o.Data...); counted(t, all) >= enough {
				enough += 20
				stop()
			}
			return nil
		})
		return err
	}
	streamed := make(chan error, 1)
	begun := make(chan struct{})
	go func() {
		_, err := s.api().ExecuteStream(t.Context(), id, cay.ExecuteRequest{Command: new("echo begun; sleep 7531"),
			Timeout: new("4m")}, func(o cay.Output) error {
			if len(o.Data) > 0 {
				close(begun)
			}
			return nil
		})
		streamed <- err
	}()
	<-begun
	err = follow(func() { s.stop(syscall.SIGKILL) })
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a stream of a server that was killed ends with %v", err)
	}
	if err := <-streamed; !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("an execution of a server that was killed ends with %v", err)
	}
	s.start()
	s.runs(id, "sleep 7531", 0)
	// A server that is asked to stop ends streams with an error that says so.
	err = follow(func() { go s.stop(syscall.SIGTERM) })
	if !cay.HasCode(err, "stopping") {
		t.Errorf("a stream of a server that stops ends with %v", err)
	}
	s.settles("the server", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.cmd == nil })
	<-s.exited
	s.start()
	if again, err := s.api().GetProcess(t.Context(), id, "counter"); err != nil || again.PID != p.PID ||
		again.Status != cay.ProcessStatusRunning {
		t.Errorf("afterwards it is %+v, %v", again, err)
	}
	err = follow(func() { s.destroy(id) })
	var told *cay.Error
	if !errors.As(err, &told) || told.Status != 503 {
		t.Errorf("a stream of a sandbox that was destroyed ends with %v", err)
	}
	s.settles("leases", func() bool { return s.metric("cay_sandbox_leases") == 0 })
}

func TestProcesses(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	c := s.api()
	p, err := c.StartProcess(ctx, id, cay.StartProcessRequest{Args: []string{"sh", "-c",
		"echo $A $PWD $(id -un); cat; trap 'exit 9' INT; sleep 3600 & echo eof; wait"}, Tag: new("job"),
		Env: cay.Env{"A": "b"}, Workdir: new("/tmp"), User: new("user"), Stdin: new(true)})
	if err != nil {
		t.Fatal(err)
	}
	name := strconv.Itoa(p.PID)
	for _, text := range []string{"x", strings.Repeat("y", 300_000), "z\n"} {
		if n, err := c.WriteProcessStdin(ctx, id, name, strings.NewReader(text), false); err != nil || n != int64(len(text)) {
			t.Fatalf("writing to its standard input: %d, %v", n, err)
		}
	}
	if _, err := c.WriteProcessStdin(ctx, id, "job", nil, true); err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteProcessStdin(ctx, id, "job", strings.NewReader("more"),
		false); !cay.HasCode(err, "stdin_closed") {
		t.Errorf("writing to a closed standard input: %v", err)
	}
	var out []byte
	exit, err := c.FollowProcess(ctx, id, name, 0, func(o cay.Output) error {
		if out = append(out, o.Data...); bytes.HasSuffix(out, []byte("eof\n")) {
			return c.SignalProcess(ctx, id, name, "SIGINT")
		}
		return nil
	})
	want := "b /tmp user\nx" + strings.Repeat("y", 300_000) + "z\neof\n"
	if err != nil || exit.ExitCode != 9 || string(out) != want {
		t.Errorf("%d bytes, %.50q, exit %+v, %v", len(out), out, exit, err)
	}
	all, err := c.ListProcesses(ctx, id)
	if err != nil || len(all) != 1 || all[0].PID != p.PID || all[0].Exit == nil || all[0].Exit.ExitCode != 9 ||
		*all[0].OutputTo != int64(len(want)) {
		t.Errorf("listed: %+v, %v", all, err)
	}
	// A process that it left in the background has ended, too.
	s.runs(id, "sleep 3600", 1)
	if err := c.KillProcess(ctx, id, name); err != nil {
		t.Error(err)
	}
	s.runs(id, "sleep 3600", 0)
	if _, err := c.GetProcess(ctx, id, name); !cay.HasCode(err, "process_not_found") {
		t.Errorf("the process is still known: %v", err)
	}
	if _, err := c.StartProcess(ctx, id, cay.StartProcessRequest{Command: new("true"),
		User: new("nobody-here")}); !cay.HasCode(err, "unknown_user") {
		t.Errorf("an unknown user: %v", err)
	}
	// The standard input of a program that does not read it.
	p, err = c.StartProcess(ctx, id, cay.StartProcessRequest{Command: new("sleep 600"), Stdin: new(true),
		Timeout: new("10m")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.WriteProcessStdin(ctx, id, strconv.Itoa(p.PID), strings.NewReader(strings.Repeat("x", 1<<20)),
		false); !cay.HasCode(err, "stdin_blocked") {
		t.Errorf("writing to a full standard input: %v", err)
	}
}

// TestProcessesSleep checks that processes survive a suspend and a wake with their output, that
// they do not keep a sandbox awake, and that following does.
func TestProcessesSleep(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	id := s.persistent(object{"idle_timeout": "10s"})
	defer s.destroy(id)
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	c := s.api()
	if _, err := c.StartProcess(ctx, id,
		cay.StartProcessRequest{Command: new(counter), Tag: new("counter")}); err != nil {
		t.Fatal(err)
	}
	var all []byte
	enough := errors.New("enough")
	follow := func(until func() bool) {
		t.Helper()
		_, err := c.FollowProcess(ctx, id, "counter", int64(len(all)), func(o cay.Output) error {
			if o.Offset != int64(len(all)) {
				return fmt.Errorf("at offset %d the stream sent %d", len(all), o.Offset)
			}
			if all = append(all, o.Data...); until() {
				return enough
			}
			return nil
		})
		if !errors.Is(err, enough) {
			t.Fatalf("following: %v", err)
		}
	}
	since := time.Now()
	follow(func() bool { return time.Since(since) > 13*time.Second })
	if state, _ := s.state(id); state != "running" {
		t.Errorf("while a process is followed its sandbox is %s", state)
	}
	for _, e := range s.events(id) {
		if e.To == "suspended" {
			t.Errorf("the sandbox was suspended while its process was followed: %+v", e)
		}
	}
	s.waitState(id, "suspended") // by itself, because no client follows
	before := counted(t, all)
	follow(func() bool { return counted(t, all) > before+20 }) // this wakes the sandbox
	s.suspend(id)
	s.wake(id)
	before = counted(t, all)
	follow(func() bool { return counted(t, all) > before+20 })
}

func TestTerminal(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	c := s.api()
	open := func(o cay.TerminalOptions) *cay.Terminal {
		t.Helper()
		term, err := c.OpenTerminal(ctx, id, o)
		if err != nil {
			t.Fatal(err)
		}
		return term
	}
	term := open(cay.TerminalOptions{Cols: 97, Rows: 31, Workdir: "/tmp", User: "user"})
	typing(t, term, "stty size; pwd; id -un; echo $TERM $((6*7))\r", "31 97\r\n/tmp\r\nuser\r\nxterm-256color 42\r\n")
	if err := term.Resize(ctx, 120, 40); err != nil {
		t.Fatal(err)
	}
	typing(t, term, "tput cols; x=kept\r", "120\r\n")
	typing(t, term, "echo busy$((1+1)); sleep 1000\r", "busy2\r\n")
	s.runs(id, "sleep 1000", 1)
	typing(t, term, "\x03", "$ ")
	s.runs(id, "sleep 1000", 0)
	at := term.Offset()
	if err := term.Close(); err != nil {
		t.Error(err)
	}
	// Another client joins and sees the output that it missed. Two clients see the same.
	name := strconv.Itoa(term.PID)
	again := open(cay.TerminalOptions{Process: name, Offset: &at, Cols: 50, Rows: 10})
	whole := open(cay.TerminalOptions{Process: name, Cols: 50, Rows: 10})
	if again.PID != term.PID || again.Offset() != at || whole.Offset() != 0 {
		t.Errorf("joined %d at %d and %d", again.PID, again.Offset(), whole.Offset())
	}
	typing(t, again, "echo $x; stty size\r", "kept\r\n10 50\r\n")
	typing(t, whole, "", "31 97", "120\r\n", "kept\r\n10 50\r\n")
	typing(t, again, "exit 5\r", "exit")
	for _, end := range []*cay.Terminal{again, whole} {
		if rest, err := io.ReadAll(end); err != nil || end.Exit() == nil || end.Exit().ExitCode != 5 {
			t.Errorf("the terminal ends with %+v, %v after %q", end.Exit(), err, rest)
		}
		_ = end.Close() // the shell has exited
	}
	// The output can be read for a while after the end.
	late := open(cay.TerminalOptions{Process: name})
	if shown, err := io.ReadAll(late); err != nil || !bytes.Contains(shown, []byte("31 97\r\n")) ||
		late.Exit().ExitCode != 5 {
		t.Errorf("afterwards: %q, %v", shown, err)
	}
	// A shell to which no client comes back is ended, with the programs in it.
	lonely := open(cay.TerminalOptions{Grace: time.Second})
	typing(t, lonely, "sleep 4321\r", "sleep 4321")
	s.runs(id, "sleep 4321", 1)
	_ = lonely.Close()
	s.runs(id, "sleep 4321", 0)
	if p, err := c.WaitProcess(ctx, id, strconv.Itoa(lonely.PID), time.Minute); err != nil || p.Exit == nil {
		t.Errorf("after the grace period the process is %+v, %v", p, err)
	}
}

// typing types keys, and reads until all texts were shown in this order.
func typing(t *testing.T, term io.ReadWriteCloser, keys string, want ...string) {
	t.Helper()
	late := time.AfterFunc(patience, func() { _ = term.Close() }) // this ends the reading
	defer late.Stop()
	if _, err := term.Write([]byte(keys)); err != nil {
		t.Fatal(err)
	}
	var shown []byte
	b := make([]byte, 4<<10)
	for at := 0; len(want) > 0; {
		if i := bytes.Index(shown[at:], []byte(want[0])); i >= 0 {
			at, want = at+i+len(want[0]), want[1:]
			continue
		}
		n, err := term.Read(b)
		if err != nil {
			t.Fatalf("%v after %q, while waiting for %q", err, shown, want[0])
		}
		shown = append(shown, b[:n]...)
	}
}

// TestHalfWrittenFrames breaks WebSocket connections in the middle of frames, and sends malformed
// frames.
func TestHalfWrittenFrames(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	before := s.metric("go_goroutines")
	masked := func(head ...byte) []byte { return append(head, 1, 2, 3, 4) }
	for name, frame := range map[string][]byte{
		"nothing": {}, "half a head": {0x82}, "half a length": {0x82, 0xfe, 0x10}, "half a mask": {0x82, 0x85, 1, 2}, "half a payload": append(masked(0x82, 0x85), 'a', 'b'),
		"not masked": {0x82, 0x01, 'a'}, "reserved bits": masked(0xf2, 0x80), "an unknown kind": masked(0x83, 0x80), "a huge frame": masked(0x82, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff),
		"half a message": append(masked(0x02, 0x81), 'a'), "no JSON": append(masked(0x81, 0x81), 'a'), "a long ping": masked(0x89, 0xfe, 0x01, 0x00),
	} {
		conn := s.handshake(id, "?grace=1s&command=sleep+5678")
		if _, err := conn.Write(frame); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		conn.Close()
	}
	// A connection that stays open and idle does not hold up others.
	held := s.handshake(id, "?grace=1s&command=sleep+5678")
	if _, err := held.Write([]byte{0x82, 0x85, 1}); err != nil {
		t.Error(err)
	}
	s.alive(id)
	held.Close()
	s.runs(id, "sleep 5678", 0)
	s.settles("goroutines", func() bool {
		return s.metric("go_goroutines") < before+20 &&
			s.metric("cay_sandbox_leases") == 0
	})
}

// handshake opens a WebSocket by hand.
func (s *server) handshake(id, query string) net.Conn {
	s.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		s.t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET /v1/sandboxes/%s/terminal%s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"+
		"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\nAuthorization: Bearer %s\r\n\r\n", id, query, s.key)
	_ = conn.SetReadDeadline(time.Now().Add(patience))
	head := make([]byte, 12)
	if _, err := io.ReadFull(conn, head); err != nil || string(head) != "HTTP/1.1 101" {
		s.t.Fatalf("the handshake is answered with %q, %v", head, err)
	}
	return conn
}
