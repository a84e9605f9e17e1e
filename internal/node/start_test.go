package node

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// web is a start command that answers on port 8080 after a moment and counts its starts.
const web = `echo started >>/root/starts; mkdir -p /tmp/www; echo hello >/tmp/www/index.html; sleep 0.3; ` +
	`exec httpd -f -p 8080 -h /tmp/www`

func (m *machine) serving(ready sandbox.Ready) sandbox.Spec {
	spec := m.spec()
	spec.Start = sandbox.Start{Command: web, Ready: &ready}
	return spec
}

// wantServing checks that the server of the start command answers, and was started once.
func (m *machine) wantServing(spec sandbox.Spec) {
	m.t.Helper()
	if got := m.sh(spec, "wget -q -O - http://127.0.0.1:8080/index.html; wc -l </root/starts"); got != "hello\n1" {
		m.t.Errorf("the server and the count of its starts: %q", got)
	}
}

// TestStartCommand checks that a create returns when the start command is ready, and that its
// server continues after a suspend and a wake and is not started again.
func TestStartCommand(t *testing.T) {
	m := newMachine(t)
	for name, ready := range map[string]sandbox.Ready{
		"port":    {Port: 8080},
		"http":    {HTTP: &sandbox.ReadyHTTP{Port: 8080, Path: "/index.html"}, Timeout: 30 * time.Second},
		"command": {Command: "wget -q -O /dev/null http://127.0.0.1:8080/"},
	} {
		t.Run(name, func(t *testing.T) {
			spec := m.serving(ready)
			// A policy that denies all traffic does not keep the check from succeeding.
			spec.Egress = sandbox.Egress{Mode: sandbox.DenyAll}
			if err := m.node.Create(m.ctx(), spec); err != nil {
				t.Fatal(err)
			}
			m.wantServing(spec)
			if name == "port" {
				pid := m.sh(spec, "pidof httpd")
				m.suspend(spec)
				spec = m.wake(spec)
				m.wantServing(spec)
				if again := m.sh(spec, "pidof httpd"); again != pid {
					t.Errorf("the server's process is %s, was %s", again, pid)
				}
				if _, err := m.node.Checkpoint(m.ctx(), spec.ID); err != nil {
					t.Error(err)
				}
				m.wantServing(spec)
				m.sh(spec, "kill "+pid+"; until grep -q 'cay: the start command was ended by signal 15' "+
					agentapi.StartLog+"; do sleep 0.05; done")
			}
			if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
				t.Error(err)
			}
			m.wantNothing()
		})
	}
}

// TestStartCommandFails checks that a create whose start command fails returns the reason and
// leaves nothing.
func TestStartCommandFails(t *testing.T) {
	m := newMachine(t)
	for name, c := range map[string]struct {
		start sandbox.Start
		want  string
	}{
		"ends":            {sandbox.Start{Command: "echo no configuration; exit 3", Ready: &sandbox.Ready{Port: 8080}}, "ended with exit code 3 before it was ready; its last output:\nno configuration"},
		"never ready":     {sandbox.Start{Command: "sleep 1000", Ready: &sandbox.Ready{Port: 8080, Timeout: time.Second}}, "was not ready within 1s: nothing listens on port 8080"},
		"no such program": {sandbox.Start{Args: []string{"nosuch"}}, `could not be started: starting "nosuch": no such file or directory`},
	} {
		t.Run(name, func(t *testing.T) {
			spec := m.spec()
			spec.Start = c.start
			err := m.node.Create(m.ctx(), spec)
			if f := fault.As(err); f == nil || f.Kind != fault.Conflict || f.Code != "start_failed" ||
				!strings.Contains(f.Detail, c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
			m.wantNothing()
		})
	}
}

// TestStartCommandNotWaitedFor checks that a create returns at once when its context ends or the
// sandbox dies while the start command is not ready.
func TestStartCommandNotWaitedFor(t *testing.T) {
	m := newMachine(t)
	begin := func(ctx context.Context) (sandbox.Spec, chan error) {
		spec := m.spec()
		spec.Start = sandbox.Start{Command: "sleep 1000", Ready: &sandbox.Ready{Port: 8080, Timeout: 10 * time.Minute}}
		over, waiting := make(chan error, 1), make(chan bool)
		m.node.after = func(step string) error {
			if step == "init" {
				close(waiting)
			}
			return nil
		}
		go func() { over <- m.node.Create(ctx, spec) }()
		select {
		case <-waiting:
		case err := <-over:
			t.Fatal(err)
		}
		for m.sh(spec, "ps | grep -c '[s]leep 1000' || true") == "0" { // a poll; Execute has a deadline
		}
		return spec, over
	}
	ended := func(over chan error) error {
		select {
		case err := <-over:
			return err
		case <-time.After(time.Minute):
			t.Fatal("the create still waits")
			return nil
		}
	}

	interrupted := errors.New("interrupted")
	ctx, cancel := context.WithCancelCause(context.Background())
	_, over := begin(ctx)
	cancel(interrupted)
	if err := ended(over); !errors.Is(err, interrupted) {
		t.Errorf("given up: %v", err)
	}
	m.wantNothing()

	spec, over := begin(context.Background())
	if err := unix.Kill(m.node.instance(spec.ID).pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := ended(over); !fault.Is(err, fault.Internal) || fault.As(err) == nil {
		t.Errorf("died: %v", err)
	}
	m.wantNothing()
}
