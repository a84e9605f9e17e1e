// Package terminal runs one session of a terminal in a sandbox: it starts a process with a terminal
// or joins one, sends its output to a client and what the client types to it, and tells the client
// how it ended. It owns the limits of terminals and the rules for input. It knows no protocol of
// clients: a WebSocket, or anything else that carries bytes both ways, drives a [Session] and takes
// its output as a [Client].
//
// The methods of a Session may be called concurrently. When Run returns, the session has no
// goroutine and no call to the agent. The process may go on: the agent hangs it up when no session
// has joined it for its grace.
package terminal

import (
	"context"
	"io"
	"strconv"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
)

// Limits and defaults of terminals. They are part of the contract.
const (
	DefaultCols, DefaultRows = 80, 24
	DefaultTerm              = "xterm-256color"
	DefaultGrace             = time.Minute
	MinGrace, MaxGrace       = time.Second, time.Hour
	maxSide                  = 10_000 // columns or rows

	// LoginShell is the command of a terminal that names none. It runs bash if the image has it,
	// else sh.
	LoginShell = `[ -x /bin/bash ] && exec /bin/bash -il; exec /bin/sh -il`
)

// maxTyped limits the typed bytes that wait for the terminal to take them. It suffices for a large
// paste. Beyond it the session ends, but the terminal's process goes on.
const maxTyped = 4 << 20

// Size returns the size of a terminal. Its errors name the field, which is prefix and "cols" or
// "rows".
func Size(prefix string, cols, rows int) (agentapi.TerminalSize, error) {
	for name, n := range map[string]int{"cols": cols, "rows": rows} {
		if n < 1 || n > maxSide {
			return agentapi.TerminalSize{}, fault.InvalidField(prefix+name, "must be between 1 and %d", maxSide)
		}
	}
	return agentapi.TerminalSize{Cols: uint16(cols), Rows: uint16(rows)}, nil
}

// CheckGrace refuses a grace that no terminal may have.
func CheckGrace(grace time.Duration) error {
	if grace < MinGrace || grace > MaxGrace {
		return fault.InvalidField("grace", "must be between %s and %s", MinGrace, MaxGrace)
	}
	return nil
}

// Agent has the calls into sandboxes that a session makes; [*agentapi.Client] implements it.
type Agent interface {
	StartProcess(ctx context.Context, t agentapi.Target, r agentapi.StartProcess) (agentapi.Process, error)
	Process(ctx context.Context, t agentapi.Target, ref string) (agentapi.Process, error)
	ResizeTerminal(ctx context.Context, t agentapi.Target, ref string, size agentapi.TerminalSize) error
	WriteInput(ctx context.Context, t agentapi.Target, ref string, body io.Reader, end bool) (int64, error)
	Follow(ctx context.Context, t agentapi.Target, r agentapi.FollowRequest,
		emit func(agentapi.ProcessOutput) error) (agentapi.Process, error)
}

// Client takes what a session sends. Run calls its methods one at a time. An error of one ends the
// session.
type Client interface {
	// Started is called first, with the offset of the output that comes next.
	Started(pid int, offset int64) error
	// Output sends output of the terminal. The bytes belong to the session.
	Output(data []byte) error
	// Lost reports output that the sandbox does not have any more.
	Lost(offset, bytes int64) error
}

// Spec describes a terminal to start or to join.
type Spec struct {
	Size   agentapi.TerminalSize
	Start  agentapi.StartProcess // without its Terminal, which is Size; if Join is ""
	Join   string                // the process to join
	Offset *int64                // of the output that is sent first; nil sends all that is kept
}

// Session is the connection of one client to a terminal. Make it with [Open].
type Session struct {
	agent  Agent
	target agentapi.Target
	ref    string
	pid    int
	offset int64
	typed  *typed

	ctx    context.Context // ends with the session
	hangup context.CancelCauseFunc
}

// Open starts the process of a terminal, or finds the one to join, and returns a session with it.
// The session ends with ctx, and takes the memory for what is typed from the account. The caller
// must call Run, or Hangup if the client cannot be served after all.
func Open(ctx context.Context, agent Agent, target agentapi.Target, spec Spec, account *budget.Account) (
	*Session, error) {
	p, err := process(ctx, agent, target, spec)
	if err != nil {
		return nil, err
	}
	s := &Session{agent: agent, target: target, pid: p.PID, ref: strconv.Itoa(p.PID), offset: p.First}
	if spec.Offset != nil {
		s.offset = *spec.Offset
	}
	s.ctx, s.hangup = context.WithCancelCause(ctx)
	s.typed = newTyped(s.ctx, account)
	return s, nil
}

func process(ctx context.Context, agent Agent, target agentapi.Target, spec Spec) (agentapi.Process, error) {
	if spec.Join == "" {
		spec.Start.Terminal = &spec.Size
		return agent.StartProcess(ctx, target, spec.Start)
	}
	p, err := agent.Process(ctx, target, spec.Join)
	switch {
	case err != nil:
		return p, err
	case !p.Terminal:
		return p, fault.New(fault.Conflict, fault.CodeNoTerminal, "process %d has no terminal", p.PID)
	case spec.Offset != nil && *spec.Offset > p.Next:
		return p, fault.InvalidField("offset", "the process has written %d bytes so far", p.Next)
	case p.End != nil:
		return p, nil // its output can still be read
	}
	if err := agent.ResizeTerminal(ctx, target, spec.Join, spec.Size); err != nil && !ended(err) {
		return p, err
	}
	return p, nil
}

// Run serves the client until the process has ended or the session is over. It returns the process
// with its end; or the cause of the end of the session: that of Hangup or of the context of [Open],
// an error of the client, or an error of the agent.
func (s *Session) Run(client Client) (agentapi.Process, error) {
	var wg sync.WaitGroup
	err := client.Started(s.pid, s.offset)
	wg.Go(func() {
		_, err := s.agent.WriteInput(s.ctx, s.target, s.ref, s.typed, false)
		if err != nil && s.ctx.Err() == nil && !ended(err) {
			s.hangup(err)
		}
	})
	var p agentapi.Process
	if err == nil {
		f := agentapi.FollowRequest{Ref: s.ref, Offset: s.offset}
		p, err = s.agent.Follow(s.ctx, s.target, f, func(o agentapi.ProcessOutput) error {
			if o.Lost > 0 {
				return client.Lost(o.Offset, o.Lost)
			}
			return client.Output(o.Data)
		})
	}
	if cause := context.Cause(s.ctx); cause != nil {
		err = cause
	}
	s.hangup(nil)
	s.typed.close()
	wg.Wait()
	return p, err
}

// Hangup ends the session with a cause.
func (s *Session) Hangup(cause error) { s.hangup(cause) }

// Context returns a context that ends with the session.
func (s *Session) Context() context.Context { return s.ctx }

// Input queues what the client typed. It does not wait; it fails if too much waits already.
func (s *Session) Input(b []byte) error { return s.typed.add(b) }

// Resize gives the terminal another size. Resizing a process that has just ended is no error.
func (s *Session) Resize(size agentapi.TerminalSize) error {
	err := s.agent.ResizeTerminal(s.ctx, s.target, s.ref, size)
	if ended(err) {
		return nil
	}
	return err
}

// ended reports whether the agent refused a call because the process has ended. The output of the
// process tells the end too, with its reason.
func ended(err error) bool {
	f := fault.As(err)
	return f != nil && f.Code == fault.CodeProcessEnded
}

// typed queues the input that was typed and the terminal has not taken yet. One goroutine reads it.
type typed struct {
	ctx     context.Context
	account *budget.Account

	mu sync.Mutex
	// +checklocks:mu
	waiting []byte
	// +checklocks:mu
	closed bool

	more chan struct{} // capacity 1
}

func newTyped(ctx context.Context, account *budget.Account) *typed {
	return &typed{ctx: ctx, account: account, more: make(chan struct{}, 1)}
}

// signal wakes the reader.
func (t *typed) signal() {
	select {
	case t.more <- struct{}{}:
	default:
	}
}

// add appends input without waiting. It fails if too much input waits. It drops what comes after
// the end of the session.
func (t *typed) add(b []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	if len(t.waiting)+len(b) > maxTyped {
		return fault.New(fault.Conflict, fault.CodeStdinBlocked,
			"the terminal does not read what is typed, and %d bytes wait", len(t.waiting))
	}
	if err := t.account.Take(2 * int64(len(b))); err != nil { // the buffer may have doubled
		return err
	}
	t.waiting = append(t.waiting, b...)
	t.signal()
	return nil
}

func (t *typed) close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.signal()
}

// Read waits for input. It returns io.EOF when the session ends.
func (t *typed) Read(p []byte) (int, error) {
	for {
		t.mu.Lock()
		n := copy(p, t.waiting)
		t.account.Give(2 * int64(n))
		if t.waiting = t.waiting[n:]; len(t.waiting) == 0 {
			t.waiting = nil // free the buffer of a large paste
		}
		closed := t.closed
		t.mu.Unlock()
		if n > 0 {
			return n, nil
		}
		if closed {
			return 0, io.EOF
		}
		select {
		case <-t.more:
		case <-t.ctx.Done():
			return 0, io.EOF
		}
	}
}
