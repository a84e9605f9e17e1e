package agent_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

// keep starts a process that outlives the call and returns its pid.
func (s *sandbox) keep(r agentapi.StartProcess) string {
	s.t.Helper()
	p, err := s.client.StartProcess(s.t.Context(), s.target, r)
	if err != nil {
		s.t.Fatal(err)
	}
	return strconv.Itoa(p.PID)
}

func sh(line string) []string { return []string{"/bin/sh", "-c", line} }

// followed returns a process's output from an offset to the process's end, the number of lost bytes, and the process.
func (s *sandbox) followed(ref string, offset int64) (out string, lost int64, p agentapi.Process) {
	s.t.Helper()
	p, err := s.client.Follow(s.t.Context(), s.target, agentapi.FollowRequest{Ref: ref, Offset: offset},
		func(o agentapi.ProcessOutput) error {
			out += string(o.Data)
			lost += o.Lost
			return nil
		})
	if err != nil {
		s.t.Fatalf("following %s: %v", ref, err)
	}
	return out, lost, p
}

func (s *sandbox) wantCodeOf(err error, code string) {
	s.t.Helper()
	if f := fault.As(err); f == nil || f.Code != code {
		s.t.Errorf("error is %v, want %s", err, code)
	}
}

func TestDetachedProcesses(t *testing.T) {
	s := startSandbox(t, options{})
	ctx := t.Context()

	t.Run("output", func(t *testing.T) {
		ref := s.keep(agentapi.StartProcess{Args: sh("echo out; sleep 0.2; echo err >&2; sleep 0.2; echo more; exit 3"),
			Tag: "out"})
		out, lost, p := s.followed(ref, 0)
		if out != "out\nerr\nmore\n" || lost != 0 || p.End == nil || p.End.ExitCode != 3 || p.Next != 13 || p.Tag != "out" {
			t.Errorf("%q, %d lost, %+v", out, lost, p)
		}
		if out, _, _ := s.followed("out", 4); out != "err\nmore\n" {
			t.Errorf("by its tag from 4: %q", out)
		}
		_, err := s.client.Follow(ctx, s.target, agentapi.FollowRequest{Ref: ref, Offset: 14},
			func(agentapi.ProcessOutput) error { return nil })
		s.wantCodeOf(err, fault.CodeInvalidOffset)
	})
	t.Run("input", func(t *testing.T) {
		var ref string
		for range 10 { // no later input may overtake the first
			ref = s.keep(agentapi.StartProcess{Args: []string{"cat"}, Input: []byte("first "), OpenInput: true})
			for _, text := range []string{"second ", "third"} {
				n, err := s.client.WriteInput(ctx, s.target, ref, strings.NewReader(text), text == "third")
				if err != nil || n != int64(len(text)) {
					t.Fatalf("writing: %d, %v", n, err)
				}
			}
			out, _, p := s.followed(ref, 0)
			if out != "first second third" || p.End.ExitCode != 0 || p.Input {
				t.Errorf("%q, %+v", out, p)
			}
		}
		_, err := s.client.WriteInput(ctx, s.target, ref, strings.NewReader("x"), false)
		s.wantCodeOf(err, fault.CodeProcessEnded)
		ref = s.keep(agentapi.StartProcess{Args: sh("cat; sleep 60")})
		_, err = s.client.WriteInput(ctx, s.target, ref, strings.NewReader("x"), false)
		s.wantCodeOf(err, fault.CodeStdinClosed)
		if err := s.client.KillProcess(ctx, s.target, ref); err != nil {
			t.Error(err)
		}
	})
	t.Run("signals and wait", func(t *testing.T) {
		ref := s.keep(agentapi.StartProcess{Args: sh("trap 'echo got it; exit 5' USR1; while :; do sleep 0.05; done"),
			Tag: "trap"})
		_, err := s.client.StartProcess(ctx, s.target, agentapi.StartProcess{Args: []string{"true"}, Tag: "trap"})
		s.wantCodeOf(err, fault.CodeTagInUse)
		p, err := s.client.WaitProcess(ctx, s.target, ref, 200*time.Millisecond)
		if err != nil || p.End != nil {
			t.Errorf("waiting: %+v, %v", p, err)
		}
		if err := s.client.SignalProcess(ctx, s.target, ref, 10); err != nil {
			t.Fatal(err)
		}
		p, err = s.client.WaitProcess(ctx, s.target, ref, time.Minute)
		if err != nil || p.End == nil || p.End.ExitCode != 5 {
			t.Errorf("waited for: %+v, %v", p, err)
		}
		s.wantCodeOf(s.client.SignalProcess(ctx, s.target, ref, 10), fault.CodeProcessEnded)
		s.keep(agentapi.StartProcess{Args: []string{"true"}, Tag: "trap"}) // the tag is free again
	})
	t.Run("kill reaches what it left", func(t *testing.T) {
		ref := s.keep(agentapi.StartProcess{Args: sh("setsid sleep 5555 >/dev/null 2>&1 &")})
		if p, err := s.client.WaitProcess(ctx, s.target, ref, time.Minute); err != nil || p.End == nil {
			t.Fatalf("%+v, %v", p, err)
		}
		if err := s.client.KillProcess(ctx, s.target, ref); err != nil {
			t.Fatal(err)
		}
		if r, err := s.client.Execute(ctx, s.target,
			agentapi.ExecuteRequest{Command: "ps | grep 'sleep 555[5]'"}); err != nil || len(r.Stdout) != 0 {
			t.Errorf("left: %s, %v", r.Stdout, err)
		}
	})
	t.Run("kill reaches all", func(t *testing.T) {
		ref := s.keep(agentapi.StartProcess{Args: sh("setsid sleep 7777 & sleep 8888")})
		if err := s.client.KillProcess(ctx, s.target, ref); err != nil {
			t.Fatal(err)
		}
		if _, err := s.client.Process(ctx, s.target, ref); fault.As(err) == nil {
			t.Errorf("it is still known: %v", err)
		}
		if r, err := s.client.Execute(ctx, s.target,
			agentapi.ExecuteRequest{Command: "ps | grep -E 'sleep [78]' | grep -v grep"}); err != nil || len(r.Stdout) != 0 {
			t.Errorf("left: %s, %v", r.Stdout, err)
		}
	})
	t.Run("kill reaches nothing else", func(t *testing.T) {
		// The next command gets the control group of the ended one and leaves a job in it.
		ref := s.keep(agentapi.StartProcess{Args: sh("true")})
		if p, err := s.client.WaitProcess(ctx, s.target, ref, time.Minute); err != nil || p.End == nil {
			t.Fatalf("%+v, %v", p, err)
		}
		if _, err := s.client.Execute(ctx, s.target,
			agentapi.ExecuteRequest{Command: "sleep 6543 >/dev/null 2>&1 &"}); err != nil {
			t.Fatal(err)
		}
		if err := s.client.KillProcess(ctx, s.target, ref); err != nil {
			t.Fatal(err)
		}
		if r, err := s.client.Execute(ctx, s.target,
			agentapi.ExecuteRequest{Command: "ps | grep 'sleep 654[3]'"}); err != nil || r.ExitCode != 0 {
			t.Errorf("another command's job is gone: %+v, %v", r, err)
		}
	})
	t.Run("timeout", func(t *testing.T) {
		_, _, p := s.followed(s.keep(agentapi.StartProcess{Args: sh("sleep 60"), TimeoutMs: 200}), 0)
		if p.End == nil || !p.End.TimedOut || p.End.Result().ExitCode != agentapi.ExitTimedOut {
			t.Errorf("%+v", p.End)
		}
	})
	t.Run("refused", func(t *testing.T) {
		for _, c := range []struct {
			r    agentapi.StartProcess
			code string
		}{
			{agentapi.StartProcess{}, fault.CodeInvalidCommand}, {agentapi.StartProcess{Args: []string{"/nope"}}, fault.CodeInvalidCommand},
			{agentapi.StartProcess{Args: []string{"true"}, User: "nobody-of-that-name"}, fault.CodeUnknownUser}, {agentapi.StartProcess{Args: []string{"true"}, Workdir: "/nope"}, fault.CodeWorkdirNotFound},
		} {
			_, err := s.client.StartProcess(ctx, s.target, c.r)
			s.wantCodeOf(err, c.code)
		}
	})
}

// TestDetachedOutputIsBounded follows a process without reading. The process never waits, and the follower
// learns how much it missed.
func TestDetachedOutputIsBounded(t *testing.T) {
	s := startSandbox(t, options{})
	const size = 5 << 20
	ref := s.keep(agentapi.StartProcess{Args: sh(fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x; echo end", size))})
	first := make(chan struct{})
	release := make(chan struct{})
	var got, lost int64
	done := make(chan error, 1)
	go func() { // a follower that reads one piece and stops
		_, err := s.client.Follow(t.Context(), s.target, agentapi.FollowRequest{Ref: ref},
			func(o agentapi.ProcessOutput) error {
				if got+lost == 0 {
					close(first)
					<-release
				}
				got += int64(len(o.Data))
				lost += o.Lost
				return nil
			})
		done <- err
	}()
	<-first
	p, err := s.client.WaitProcess(t.Context(), s.target, ref, 2*time.Minute)
	if err != nil || p.End == nil || p.Next != size+4 || p.Next-p.First > agentapi.HistorySize ||
		p.Next-p.First < agentapi.HistorySize/2 {
		t.Errorf("with a follower that does not read: %+v, %v", p, err)
	}
	close(release)
	if err := <-done; err != nil || got+lost != p.Next || lost == 0 {
		t.Errorf("the slow follower got %d bytes, lost %d of %d: %v", got, lost, p.Next, err)
	}
	if out, lost, _ := s.followed(ref, 0); lost != p.First || int64(len(out)) != p.Next-p.First ||
		!strings.HasSuffix(out, "x"+"end\n") {
		t.Errorf("from the start: %d bytes, %d lost", len(out), lost)
	}
}

func TestDetachedTerminal(t *testing.T) {
	s := startSandbox(t, options{})
	ctx := t.Context()
	ref := s.keep(agentapi.StartProcess{Args: []string{"/bin/sh", "-i"},
		Terminal: &agentapi.TerminalSize{Cols: 91, Rows: 33}, GraceMs: 60_000})
	var shown bytes.Buffer
	input, typing := io.Pipe()
	go func() { _, _ = s.client.WriteInput(ctx, s.target, ref, input, false) }() // ends with the test
	defer typing.Close()
	// until follows from an offset until the terminal has shown the text.
	errSeen := errors.New("seen")
	until := func(offset int64, text string) int64 {
		t.Helper()
		shown.Reset()
		following, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		_, err := s.client.Follow(following, s.target, agentapi.FollowRequest{Ref: ref, Offset: offset},
			func(o agentapi.ProcessOutput) error {
				shown.Write(o.Data)
				offset = o.Offset + int64(len(o.Data))
				if o.Stream != agentapi.Terminal || strings.Contains(shown.String(), text) {
					return errSeen
				}
				return nil
			})
		if !errors.Is(err, errSeen) || !strings.Contains(shown.String(), text) {
			t.Fatalf("it shows %q: %v", shown.String(), err)
		}
		return offset
	}
	fmt.Fprintf(typing, "stty size; echo $((40+2))\r")
	at := until(0, "33 91\r\n42\r\n")
	if err := s.client.ResizeTerminal(ctx, s.target, ref, agentapi.TerminalSize{Cols: 20, Rows: 10}); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(typing, "stty size\r")
	until(at, "10 20\r\n")
	// A new follower sees the output from the start.
	until(0, "33 91")
	// While a command runs, the key sends a signal. Wait for output of the command: before it has
	// started, the process that the shell has forked ignores the signal as the shell does.
	fmt.Fprintf(typing, "sh -c 'echo $((50+1)); exec sleep 99'\r")
	at = until(at, "51\r\n")
	fmt.Fprintf(typing, "\x03")
	until(at, "# ") // the shell's prompt
	fmt.Fprintf(typing, "exit 4\r")
	if p, err := s.client.WaitProcess(ctx, s.target, ref, time.Minute); err != nil || p.End == nil ||
		p.End.ExitCode != 4 || p.Input {
		t.Errorf("%+v, %v", p, err)
	}
}

// TestDetachedGrace stops following a process, which gets a hangup when its grace is over, and not before.
func TestDetachedGrace(t *testing.T) {
	s := startSandbox(t, options{})
	const script = "trap 'echo hung up; exit 7' HUP; echo ready; while :; do sleep 0.05; done"
	ref := s.keep(agentapi.StartProcess{Args: sh(script), GraceMs: 700})
	following, leave := context.WithCancel(t.Context())
	ready := make(chan struct{}, 1)
	gone := make(chan error, 1)
	go func() {
		_, err := s.client.Follow(following, s.target, agentapi.FollowRequest{Ref: ref}, func(agentapi.ProcessOutput) error {
			select {
			case ready <- struct{}{}:
			default:
			}
			return nil
		})
		gone <- err
	}()
	<-ready
	if p, err := s.client.WaitProcess(t.Context(), s.target, ref, 2*time.Second); err != nil || p.End != nil {
		t.Fatalf("while it is followed: %+v, %v", p, err)
	}
	leave()
	<-gone
	p, err := s.client.WaitProcess(t.Context(), s.target, ref, time.Minute)
	if err != nil || p.End == nil || p.End.ExitCode != 7 {
		t.Fatalf("after it was left: %+v, %v", p, err)
	}
	// The shell may also report the hangup of its sleep, before or after.
	if out, _, _ := s.followed(ref, 0); !strings.HasPrefix(out, "ready\n") || strings.Count(out, "hung up\n") != 1 {
		t.Errorf("it wrote %q", out)
	}
}

// TestDetachedAreBounded ends many processes. Only the last ones stay known.
func TestDetachedAreBounded(t *testing.T) {
	s := startSandbox(t, options{})
	for range agentapi.MaxEnded + 5 {
		ref := s.keep(agentapi.StartProcess{Args: []string{"true"}})
		if p, err := s.client.WaitProcess(t.Context(), s.target, ref, time.Minute); err != nil || p.End == nil {
			t.Fatalf("%+v, %v", p, err)
		}
	}
	all, err := s.client.Processes(t.Context(), s.target)
	if err != nil || len(all) != agentapi.MaxEnded {
		t.Fatalf("%d are known, %v", len(all), err)
	}
	for i, p := range all[1:] {
		if p.StartedAt.After(all[i].StartedAt) {
			t.Error("not the newest first")
		}
	}
}
