package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
)

// ours runs cay in a terminal of the test.
type ours struct {
	*os.File
	cmd *exec.Cmd
}

// inTerminal runs cay with a terminal.
func (s *server) inTerminal(cols, rows uint16, args ...string) *ours {
	s.t.Helper()
	cmd := s.command(context.Background(), args...)
	cmd.Env = append(cmd.Env, "TERM=xterm-256color")
	f, err := pty.StartWithSize(cmd, &pty.Winsize{Cols: cols, Rows: rows})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { f.Close() })
	return &ours{f, cmd}
}

// exits waits for cay's end and returns its status.
func (o *ours) exits(t *testing.T) int {
	t.Helper()
	late := time.AfterFunc(patience, func() { _ = o.cmd.Process.Kill() })
	defer late.Stop()
	_ = o.cmd.Wait() // the status is returned below
	return o.cmd.ProcessState.ExitCode()
}

// TestShell types into cay sandbox shell like a user at a terminal.
func TestShell(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	id := s.create(nil)
	defer s.destroy(id)
	shell := s.inTerminal(101, 37, "sandbox", "shell", id, "-u", "user")
	typing(t, shell, "stty size; id -un; x=kept\r", "37 101\r\nuser\r\n")
	if err := pty.Setsize(shell.File, &pty.Winsize{Cols: 55, Rows: 22}); err != nil {
		t.Fatal(err)
	}
	typing(t, shell, "while [ \"$(stty size)\" != \"22 55\" ]; do sleep 0.1; done; echo resized $((1+1))\r",
		"resized 2\r\n")
	typing(t, shell, "sleep 2345\r", "sleep 2345")
	s.runs(id, "sleep 2345", 1)
	typing(t, shell, "\x03", "$ ") // interrupts the command, not cay
	// The server stops and comes back; cay reconnects to the same shell.
	s.stop(syscall.SIGTERM)
	s.start()
	typing(t, shell, "\recho $x again\r", "kept again\r\n")
	s.stop(syscall.SIGKILL)
	s.start()
	typing(t, shell, "\r", "$ ")
	typing(t, shell, "echo $x twice; exit 42\r", "kept twice\r\n")
	if status := shell.exits(t); status != 42 {
		t.Errorf("cay exits with %d", status)
	}
	// A background job does not keep cay from exiting.
	shell = s.inTerminal(80, 24, "sandbox", "shell", id, "--", "sh", "-c", "trap '' HUP; sleep 3456 & exit 7")
	if status := shell.exits(t); status != 7 {
		t.Errorf("with a job in the background, cay exits with %d", status)
	}
	s.runs(id, "sleep 3456", 1)
	// The user detaches from the shell and attaches again.
	shell = s.inTerminal(80, 24, "sandbox", "shell", id, "--", "sh", "-c",
		"echo pid $$; read line; echo got $line; exit 6")
	typing(t, shell, "", "pid ")
	typing(t, shell, "~.", "cay: left; ")
	if status := shell.exits(t); status != 0 {
		t.Errorf("detached, cay exits with %d", status)
	}
	list, _, _ := s.cli("", "sandbox", "ps", id)
	pid := strings.Fields(strings.Split(list, "\n")[1])[0]
	shell = s.inTerminal(80, 24, "sandbox", "shell", id, "--process", pid)
	typing(t, shell, "it's me\r", "got it's me\r\n")
	if status := shell.exits(t); status != 6 {
		t.Errorf("attached again, cay exits with %d", status)
	}
}

// TestLiveCommandLine reads exec's output as it comes, and runs detached processes.
func TestLiveCommandLine(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	cmd := s.command(context.Background(), "sandbox", "exec", id, "--timeout", "80s", "--", "sh", "-c", "echo first; "+
		waitingFor("/tmp/go")+"; echo second >&2; exit 4")
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 6)
	if _, err := out.Read(line); err != nil || string(line) != "first\n" {
		t.Errorf("%q, %v", line, err)
	}
	s.touch(id, "/tmp/go") // so the line came before the end
	if _ = cmd.Wait(); cmd.ProcessState.ExitCode() != 4 || errs.String() != "second\n" {
		t.Errorf("exit status %d, %q", cmd.ProcessState.ExitCode(), errs.String())
	}
	pid, _, _ := s.cli("", "sandbox", "exec", id, "-d", "--tag", "job", "--", "sh", "-c", "echo out; echo err >&2; "+
		waitingFor("/tmp/end")+"; exit 9")
	pid = strings.TrimSpace(pid)
	if _, err := strconv.Atoi(pid); err != nil {
		t.Fatalf("the number of the process is %q", pid)
	}
	if list, _, _ := s.cli("", "sandbox", "ps", id); !strings.Contains(list, "job") || !strings.Contains(list, "running") {
		t.Errorf("ps: %s", list)
	}
	s.settles("its output", func() bool {
		out, errs, code := s.cli("", "sandbox", "logs", id, "job")
		return code == 0 && out == "out\n" && errs == "err\n"
	})
	s.touch(id, "/tmp/end")
	if out, _, _ := s.cli("", "sandbox", "wait", id, pid); out != "9\n" {
		t.Errorf("wait: %q", out)
	}
	if out, _, code := s.cli("", "sandbox", "logs", id, "job", "-f"); code != 0 || out != "out\n" {
		t.Errorf("logs -f: %q, %d", out, code)
	}
	if _, errs, code := s.cli("", "sandbox", "kill", id, "job"); code != 0 {
		t.Errorf("kill: %s, %d", errs, code)
	}
	if list, _, _ := s.cli("", "sandbox", "ps", id); strings.Contains(list, "job") {
		t.Errorf("ps after kill: %s", list)
	}
	// A reader that has enough ends the command, as in every pipe.
	_, _, code := s.pipeline(fmt.Sprintf("%s sandbox exec %s --timeout 4m -- sh -c 'yes | tr y z' | head -n 1", s.binary,
		id))
	s.runs(id, "yes", 0)
	if code != 0 {
		t.Errorf("the pipeline ends with %d", code)
	}
}

// pipeline runs a line of a shell that calls cay.
func (s *server) pipeline(line string) (stdout, stderr string, code int) {
	s.t.Helper()
	cmd := exec.Command("sh", "-c", line)
	cmd.Env = append(s.env, "CAY_API_URL="+s.url, "CAY_API_KEY="+s.key)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	late := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		s.t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}
