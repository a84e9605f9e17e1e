package agent_test

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/agentapi/process"
)

// TestStreamsBelongToTheUser opens a command's standard streams again by their names, as programs do that
// log to /dev/stdout, and reads the owner of the terminal.
func TestStreamsBelongToTheUser(t *testing.T) {
	s := startSandbox(t, options{})
	const reopened = "read line < /dev/stdin; echo out $line > /dev/stdout && echo err > /dev/stderr && " +
		"echo fd > /proc/self/fd/2"
	for _, who := range []string{"", "user"} {
		r := s.exec(agentapi.ExecuteRequest{Command: reopened, User: who, Stdin: []byte("in\n")})
		if r.ExitCode != 0 || string(r.Stdout) != "out in\n" || string(r.Stderr) != "err\nfd\n" {
			t.Errorf("as %q: %+v: %q, %q", who, r.ExitCode, r.Stdout, r.Stderr)
		}
		ref := s.keep(agentapi.StartProcess{Args: sh(reopened), User: who, Input: []byte("in\n"), OpenInput: true})
		// Two pipes have no common order.
		out, _, p := s.followed(ref, 0)
		if p.End.ExitCode != 0 || out != "out in\nerr\nfd\n" && out != "err\nfd\nout in\n" {
			t.Errorf("detached, as %q: %+v, %q", who, p.End, out)
		}
	}
	const whose = `stat -c "%U %G %a" "$(tty)"; echo $TERM; echo typed > /dev/tty; echo again > /dev/stdout`
	terminal := &agentapi.TerminalSize{Cols: 80, Rows: 24}
	for who, want := range map[string]string{"": "root root 600", "user": "user user 600"} {
		out, _, _ := s.followed(s.keep(agentapi.StartProcess{Args: sh(whose), User: who, Terminal: terminal}), 0)
		if out != want+"\r\nxterm-256color\r\ntyped\r\nagain\r\n" {
			t.Errorf("the terminal of %q: %q", who, out)
		}
	}
	s.sh("echo tty:x:5: >> /etc/group")
	out, _, _ := s.followed(s.keep(agentapi.StartProcess{Args: sh(whose), User: "user", Terminal: terminal,
		Env: map[string]string{"TERM": "dumb"}}), 0)
	if out != "user tty 620\r\ndumb\r\ntyped\r\nagain\r\n" {
		t.Errorf("the terminal with a group tty: %q", out)
	}
}

// TestInputOfNone replaces /dev/null with a FIFO without readers and writers.
func TestInputOfNone(t *testing.T) {
	s := startSandbox(t, options{})
	s.sh("mknod /tmp/null c 1 3 && rm /dev/null && mkfifo /dev/null")
	if r := s.exec(agentapi.ExecuteRequest{Command: "cat; echo read"}); string(r.Stdout) != "read\n" {
		t.Errorf("%+v", r)
	}
}

// TestTerminalBeforeItIsOpened polls a terminal whose other end has not been opened yet, as screen does.
func TestTerminalBeforeItIsOpened(t *testing.T) {
	s := startSandbox(t, options{})
	const want = "before false resource temporarily unavailable\nopen false resource temporarily unavailable\n" +
		"closed true input/output error\nopen again false resource temporarily unavailable"
	if got := s.sh("probe terminal"); got != want {
		t.Errorf("got %q", got)
	}
}

// TestTerminalEndsWithItsShell leaves a background job that has the terminal open.
func TestTerminalEndsWithItsShell(t *testing.T) {
	s := startSandbox(t, options{})
	terminal := &agentapi.TerminalSize{Cols: 80, Rows: 24}
	left := func(what string) int {
		return strings.Count(s.sh("ps"), what)
	}
	t.Run("hung up", func(t *testing.T) {
		s := s.in(t)
		ref := s.keep(agentapi.StartProcess{Args: sh("sleep 4411 & echo bye; exit 3"), Terminal: terminal})
		p, err := s.client.WaitProcess(t.Context(), s.target, ref, 30*time.Second)
		if err != nil || p.End == nil || p.End.ExitCode != 3 {
			t.Fatalf("%+v, %v", p.End, err)
		}
		if out, _, _ := s.followed(ref, 0); out != "bye\r\n" {
			t.Errorf("it showed %q", out)
		}
		s.eventually("the hang-up reaches what is left", func() bool { return left("sleep 4411") == 0 })
	})
	t.Run("one that takes no hang-up lives on", func(t *testing.T) {
		s := s.in(t)
		ref := s.keep(agentapi.StartProcess{Args: sh("trap '' HUP; sleep 4422 & exit 4"), Terminal: terminal})
		p, err := s.client.WaitProcess(t.Context(), s.target, ref, 30*time.Second)
		if err != nil || p.End == nil || p.End.ExitCode != 4 {
			t.Fatalf("%+v, %v", p.End, err)
		}
		if left("sleep 4422") != 1 {
			t.Errorf("it is gone: %s", s.sh("ps"))
		}
	})
	t.Run("E2B's wire", func(t *testing.T) {
		s := s.in(t)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		c, _ := s.clients("user")
		e, _ := s.start(t, ctx, c, &process.StartRequest{Process: shell("sleep 4433 & exit 5"),
			Pty: &process.PTY{Size: &process.PTY_Size{Cols: 80, Rows: 24}}})
		if _, end := e.until(""); end.GetExitCode() != 5 {
			t.Errorf("%v", end)
		}
	})
}
