package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
)

// started starts the command line against the server, with its standard output in a pipe.
func (s *server) started(args ...string) (*exec.Cmd, io.ReadCloser) {
	s.t.Helper()
	cmd := s.command(context.Background(), args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	return cmd, out
}

// TestAllOutput runs a command with more output than an answer keeps, into a pipe with a slow
// reader, and into a pipe whose reader has gone.
func TestAllOutput(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	t.Run("a slow reader", func(t *testing.T) {
		const lines = 6_000_000 // 47 MB, more than all the buffers between the command and here
		want := sha256.New()
		var line []byte
		for i := range lines {
			line = append(strconv.AppendInt(line[:0], int64(i+1), 10), '\n')
			want.Write(line)
		}
		cmd, out := s.started("sandbox", "exec", id, "--", "sh", "-c", "seq 1 "+strconv.Itoa(lines)+
			"; echo ended >/tmp/ended")
		first := make([]byte, 2)
		if _, err := io.ReadFull(out, first); err != nil {
			t.Fatal(err)
		}
		s.want(id, "sleep 2; test ! -e /tmp/ended")
		got := sha256.New()
		got.Write(first)
		if _, err := io.Copy(got, out); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
			t.Errorf("the output is not what the command wrote; %v", err)
		}
		s.want(id, "test -e /tmp/ended")
	})
	t.Run("a reader that goes", func(t *testing.T) {
		cmd, out := s.started("sandbox", "exec", id, "--", "yes", "is it there")
		if _, err := io.ReadFull(out, make([]byte, 12)); err != nil {
			t.Fatal(err)
		}
		out.Close()
		_ = cmd.Wait() // Go's runtime ends a program that writes to standard output without a reader
		if status := cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != syscall.SIGPIPE {
			t.Errorf("cay ends with %v", cmd.ProcessState)
		}
		s.settles("the command", func() bool { return s.exec(id, "pgrep -fx 'yes is it there'").ExitCode == 1 })
	})
	t.Run("an interrupt", func(t *testing.T) {
		cmd, out := s.started("sandbox", "exec", id, "--", "sh", "-c", "echo begun; exec sleep 86399")
		if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		if _ = cmd.Wait(); cmd.ProcessState.ExitCode() == 0 {
			t.Error("cay ends with 0")
		}
		s.settles("the command", func() bool { return s.exec(id, "pgrep -fx 'sleep 86399'").ExitCode == 1 })
	})
	t.Run("refused", func(t *testing.T) {
		for _, more := range []object{{"command": "true", "all_output": true},
			{"command": "true", "all_output": true, "detach": true}} {
			if status, body := s.call("POST", "/v1/sandboxes/"+id+"/execute", more); status != 400 ||
				!bytes.Contains(body, []byte(`"invalid_`)) {
				t.Errorf("%v: %d %s", more, status, body)
			}
		}
	})
}
