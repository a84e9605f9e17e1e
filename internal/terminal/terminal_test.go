package terminal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
)

// echo is an agent whose terminal writes back what is typed, and ends at "exit".
type echo struct {
	joined  agentapi.Process // what Process answers
	started agentapi.StartProcess
	deaf    bool // takes no input

	mu sync.Mutex
	// +checklocks:mu
	sizes []agentapi.TerminalSize

	output chan agentapi.ProcessOutput
	end    chan error // why Follow ends; nil is the end of the process
}

func newEcho() *echo {
	return &echo{output: make(chan agentapi.ProcessOutput), end: make(chan error, 1)}
}

func (e *echo) StartProcess(_ context.Context, _ agentapi.Target, r agentapi.StartProcess) (agentapi.Process, error) {
	e.started = r
	return agentapi.Process{PID: 7, Terminal: true}, nil
}

func (e *echo) Process(context.Context, agentapi.Target, string) (agentapi.Process, error) {
	return e.joined, nil
}

func (e *echo) ResizeTerminal(_ context.Context, _ agentapi.Target, _ string, size agentapi.TerminalSize) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.sizes = append(e.sizes, size)
	if size.Cols == 1 {
		return fault.New(fault.Conflict, fault.CodeProcessEnded, "it has ended")
	}
	return nil
}

func (e *echo) WriteInput(ctx context.Context, _ agentapi.Target, _ string, body io.Reader, _ bool) (int64, error) {
	if e.deaf {
		<-ctx.Done()
		return 0, ctx.Err()
	}
	for b := make([]byte, 100); ; {
		n, err := body.Read(b)
		if err != nil {
			return 0, nil
		}
		if string(b[:n]) == "exit" {
			e.end <- nil
			continue
		}
		select {
		case e.output <- agentapi.ProcessOutput{Stream: agentapi.Terminal, Data: []byte(string(b[:n]))}:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

func (e *echo) Follow(ctx context.Context, _ agentapi.Target, r agentapi.FollowRequest,
	emit func(agentapi.ProcessOutput) error) (agentapi.Process, error) {
	for {
		select {
		case o := <-e.output:
			if err := emit(o); err != nil {
				return agentapi.Process{}, err
			}
		case err := <-e.end:
			return agentapi.Process{PID: 7, End: &agentapi.ProcessExit{ExitCode: 3}}, err
		case <-ctx.Done():
			return agentapi.Process{}, fmt.Errorf("following: %w", context.Cause(ctx))
		}
	}
}

// screen is a client that keeps what it is sent.
type screen struct {
	mu sync.Mutex
	// +checklocks:mu
	text string
	fail error // of Output
}

func (s *screen) add(text string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.text += text
	return nil
}

func (s *screen) Started(pid int, offset int64) error {
	return s.add(fmt.Sprintf("[%d %d]", pid, offset))
}

func (s *screen) Lost(offset, bytes int64) error {
	return s.add(fmt.Sprintf("[lost %d %d]", offset, bytes))
}

func (s *screen) Output(data []byte) error {
	if s.fail != nil {
		return s.fail
	}
	return s.add(string(data))
}

func (s *screen) shown() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text
}

func open(t *testing.T, agent *echo, spec Spec) *Session {
	t.Helper()
	s, err := Open(t.Context(), agent, agentapi.Target{}, spec, &budget.Account{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestSession drives a session without any protocol of a client.
func TestSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent, client := newEcho(), &screen{}
		s := open(t, agent, Spec{Size: agentapi.TerminalSize{Cols: 90, Rows: 30},
			Start: agentapi.StartProcess{Args: []string{"sh"}}})
		var p agentapi.Process
		var err error
		done := make(chan struct{})
		go func() { defer close(done); p, err = s.Run(client) }() // the test waits for it
		if err := s.Input([]byte("ls\n")); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		agent.output <- agentapi.ProcessOutput{Offset: 3, Lost: 4}
		for _, cols := range []uint16{100, 1} { // the process has ended at the second
			if err := s.Resize(agentapi.TerminalSize{Cols: cols, Rows: 1}); err != nil {
				t.Error(err)
			}
		}
		if err := s.Input([]byte("exit")); err != nil {
			t.Error(err)
		}
		<-done
		if err != nil || p.End == nil || p.End.ExitCode != 3 {
			t.Errorf("it ended with %+v, %v", p, err)
		}
		if got, want := client.shown(), "[7 0]ls\n[lost 3 4]"; got != want {
			t.Errorf("the client was sent %q, want %q", got, want)
		}
		if agent.started.Terminal == nil || agent.started.Terminal.Cols != 90 || len(agent.sizes) != 2 {
			t.Errorf("started with %+v, resized to %v", agent.started, agent.sizes)
		}
		if err := s.Input([]byte("late")); err != nil {
			t.Errorf("input after the end: %v", err)
		}
	})
}

// TestEndsOfSessions ends sessions in every way but that of the process. Run must return with the
// cause and leave no goroutine, which synctest checks.
func TestEndsOfSessions(t *testing.T) {
	broken := errors.New("broken")
	for name, end := range map[string]func(*Session, *echo, *screen, context.CancelCauseFunc){
		"the caller hangs up":  func(s *Session, _ *echo, _ *screen, _ context.CancelCauseFunc) { s.Hangup(broken) },
		"the context ends":     func(_ *Session, _ *echo, _ *screen, cancel context.CancelCauseFunc) { cancel(broken) },
		"the agent fails":      func(_ *Session, e *echo, _ *screen, _ context.CancelCauseFunc) { e.end <- broken },
		"the client is gone":   func(s *Session, _ *echo, _ *screen, _ context.CancelCauseFunc) { _ = s.Input([]byte("x")) },
		"before it could run":  nil,
		"nothing reads it yet": func(s *Session, e *echo, _ *screen, _ context.CancelCauseFunc) { s.Hangup(broken) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				agent, client := newEcho(), &screen{}
				agent.deaf = strings.HasPrefix(name, "nothing")
				if strings.Contains(name, "client") {
					client.fail = broken
				}
				s, err := Open(ctx, agent, agentapi.Target{}, Spec{}, &budget.Account{})
				if err != nil {
					t.Fatal(err)
				}
				if end == nil {
					s.Hangup(broken)
				} else {
					go func() { synctest.Wait(); end(s, agent, client, cancel) }() // ends at once
				}
				if _, err := s.Run(client); !errors.Is(err, broken) {
					t.Errorf("it ended with %v", err)
				}
				if s.Context().Err() == nil {
					t.Error("its context has not ended")
				}
			})
		})
	}
}

// TestInputIsBounded types more than a terminal that reads nothing may be sent.
func TestInputIsBounded(t *testing.T) {
	s := open(t, newEcho(), Spec{})
	defer s.Hangup(nil)
	b := make([]byte, 64<<10)
	for n := 0; ; n += len(b) {
		err := s.Input(b)
		if err == nil && n <= maxTyped {
			continue
		}
		if f := fault.As(err); f == nil || f.Code != fault.CodeStdinBlocked || n != maxTyped {
			t.Errorf("after %d bytes: %v", n, err)
		}
		return
	}
}

// TestInputTakesMemory checks that input that waits counts in the account, and no longer when it is
// taken.
func TestInputTakesMemory(t *testing.T) {
	b := budget.New(1<<30, 1<<20)
	account := &budget.Account{}
	if err := account.Open(b, "org", 0); err != nil {
		t.Fatal(err)
	}
	defer account.Close()
	s, err := Open(t.Context(), newEcho(), agentapi.Target{}, Spec{}, account)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Hangup(nil)
	typed := make([]byte, 400<<10)
	if err := s.Input(typed); err != nil {
		t.Fatal(err)
	}
	if err := s.Input(typed); fault.As(err) == nil || fault.As(err).Code != fault.CodeBuffersExceeded {
		t.Errorf("more than the organization may hold: %v", err)
	}
	if _, err := io.ReadFull(s.typed, typed); err != nil {
		t.Fatal(err)
	}
	if err := s.Input(typed); err != nil {
		t.Errorf("after the terminal has taken it: %v", err)
	}
}

// TestJoinRefuses joins processes that cannot be joined.
func TestJoinRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		process agentapi.Process
		offset  int64
		code    string
	}{
		"no terminal":   {agentapi.Process{PID: 7}, 0, fault.CodeNoTerminal},
		"to come":       {agentapi.Process{PID: 7, Terminal: true, Next: 5}, 6, fault.CodeInvalidOffset},
		"all there is":  {agentapi.Process{PID: 7, Terminal: true, Next: 5}, 5, ""},
		"ended already": {agentapi.Process{PID: 7, Terminal: true, End: &agentapi.ProcessExit{}}, 0, ""},
	} {
		agent := newEcho()
		agent.joined = c.process
		s, err := Open(t.Context(), agent, agentapi.Target{}, Spec{Join: "7", Offset: &c.offset}, &budget.Account{})
		if err == nil {
			s.Hangup(nil)
		}
		if f := fault.As(err); (err != nil || c.code != "") && (f == nil || f.Code != c.code) {
			t.Errorf("%s: %v, want the code %q", name, err, c.code)
		}
	}
}
