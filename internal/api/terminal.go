package api

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
)

const terminalRoute = "/v1/sandboxes/{id}/terminal"

// Limits of terminals. They are part of the contract, except maxTyped and those below it.
const (
	defaultCols, defaultRows = 80, 24
	defaultTerm              = "xterm-256color"
	defaultGrace             = time.Minute
	minGrace, maxGrace       = time.Second, time.Hour

	// maxTyped limits the typed bytes that wait for the terminal to take them. It suffices for a large
	// paste. Beyond it the connection ends, but the terminal's process goes on.
	maxTyped = 4 << 20
	// maxTerminalFrame is the size in bytes of the largest frame that is accepted, and maxTerminalText
	// that of the largest text frame.
	maxTerminalFrame = 1 << 20
	maxTerminalText  = 4 << 10
	// pingEvery is the interval at which the server pings a client, and the time that the client has
	// to answer. Pings detect broken connections and keep proxies from ending silent ones; with longer
	// intervals both take longer, and proxies may give up.
	pingEvery = 20 * time.Second
	// goodbyeTime is the time that a client has to take the last frame.
	goodbyeTime = 10 * time.Second
)

// Subprotocols of a terminal: the protocol itself, and the prefix of one that carries the key of a
// caller that cannot send headers.
const (
	terminalProtocol = "cay.terminal.v1"
	keyProtocol      = "cay.key."
)

// offeredKey returns the key among the offered subprotocols, or "" if there is none.
func offeredKey(h http.Header) string {
	for _, line := range h.Values("Sec-WebSocket-Protocol") {
		for offer := range strings.SplitSeq(line, ",") {
			if key, ok := strings.CutPrefix(strings.TrimSpace(offer), keyProtocol); ok {
				return key
			}
		}
	}
	return ""
}

// terminalSpec describes a terminal to start or to join.
type terminalSpec struct {
	size   agentapi.TerminalSize
	start  agentapi.StartProcess // if join is ""
	join   string                // the process to join
	offset *int64
}

// OpenTerminal answers GET /v1/sandboxes/{id}/terminal.
func (s *server) OpenTerminal(w http.ResponseWriter, r *http.Request, id SandboxID, params OpenTerminalParams) {
	spec, err := terminalOf(params)
	if err == nil {
		err = checkWebSocket(r)
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.Hijacked.Add(1)
	defer s.Hijacked.Done()
	s.inside(w, r, id, func(t agentapi.Target) error {
		p, err := s.terminalProcess(r.Context(), t, spec)
		if err != nil {
			return err
		}
		conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{
			Subprotocols: []string{terminalProtocol},
			// Pages of all origins are accepted: the key decides, and no browser sends a key by itself.
			InsecureSkipVerify: true,
		})
		if err != nil {
			callOf(r).Err = err // Accept has answered
			return nil
		}
		session := &terminalSession{server: s, call: callOf(r), conn: conn, target: t, process: p, ref: strconv.Itoa(p.PID)}
		session.offset = p.First
		if spec.offset != nil {
			session.offset = *spec.offset
		}
		session.run(r.Context())
		return nil
	})
}

// checkWebSocket refuses requests that cannot be upgraded, while a problem can still be answered.
func checkWebSocket(r *http.Request) error {
	has := func(header, token string) bool {
		for _, line := range r.Header.Values(header) {
			for one := range strings.SplitSeq(line, ",") {
				if strings.EqualFold(strings.TrimSpace(one), token) {
					return true
				}
			}
		}
		return false
	}
	key, err := base64.StdEncoding.DecodeString(strings.TrimSpace(r.Header.Get("Sec-WebSocket-Key")))
	if !r.ProtoAtLeast(1, 1) || !has("Connection", "upgrade") || !has("Upgrade", "websocket") ||
		r.Header.Get("Sec-WebSocket-Version") != "13" || err != nil || len(key) != 16 {
		return fault.New(fault.Invalid, fault.CodeNotAWebsocket,
			"this is the address of a WebSocket, version 13 over HTTP/1.1")
	}
	return nil
}

func terminalOf(p OpenTerminalParams) (terminalSpec, error) {
	out := terminalSpec{join: deref(p.Process), offset: p.Offset}
	cols, rows := defaultCols, defaultRows
	if p.Cols != nil {
		cols = *p.Cols
	}
	if p.Rows != nil {
		rows = *p.Rows
	}
	var err error
	if out.size, err = sizeOfTerminal("", cols, rows); err != nil {
		return out, err
	}
	if p.Process != nil {
		for name, given := range map[string]bool{
			"command": p.Command != nil, "user": p.User != nil, "workdir": p.Workdir != nil,
			"term": p.Term != nil, "grace": p.Grace != nil,
		} {
			if given {
				return out, fault.InvalidField(name, "is for a new terminal, and cannot be given together with process")
			}
		}
		if p.Offset != nil && *p.Offset < 0 {
			return out, fault.InvalidField("offset", "must not be negative")
		}
		return out, checkRef("process", *p.Process)
	}
	if p.Offset != nil {
		return out, fault.InvalidField("offset", "is for joining a process")
	}
	line := loginShell
	if p.Command != nil {
		if line = *p.Command; line == "" {
			return out, fault.InvalidField("command", "is empty")
		}
	}
	term := defaultTerm
	if p.Term != nil {
		term = *p.Term
	}
	command, err := commandOf(ExecuteRequest{Command: &line, User: p.User, Workdir: p.Workdir, Env: Env{"TERM": term},
		Detach: new(true)})
	if err != nil {
		return out, err
	}
	grace := defaultGrace
	given, err := duration("grace", p.Grace)
	if err != nil {
		return out, err
	}
	if given != nil {
		if grace = *given; grace < minGrace || grace > maxGrace {
			return out, fault.InvalidField("grace", "must be between %s and %s", minGrace, maxGrace)
		}
	}
	out.start = agentapi.StartProcess{
		Args: command.Argv(), Env: command.Env, User: command.User, Workdir: command.Workdir,
		Terminal: &out.size, GraceMs: grace.Milliseconds(),
	}
	return out, nil
}

// loginShell starts bash if the image has it, else sh.
const loginShell = `[ -x /bin/bash ] && exec /bin/bash -il; exec /bin/sh -il`

// terminalProcess starts the process of a terminal, or finds the one to join.
func (s *server) terminalProcess(ctx context.Context, t agentapi.Target, spec terminalSpec) (agentapi.Process, error) {
	if spec.join == "" {
		return s.Agent.StartProcess(ctx, t, spec.start)
	}
	p, err := s.Agent.Process(ctx, t, spec.join)
	switch {
	case err != nil:
		return p, err
	case !p.Terminal:
		return p, fault.New(fault.Conflict, fault.CodeNoTerminal, "process %d has no terminal", p.PID)
	case spec.offset != nil && *spec.offset > p.Next:
		return p, fault.InvalidField("offset", "the process has written %d bytes so far", p.Next)
	case p.End != nil:
		return p, nil // its output can still be read
	}
	if err := s.Agent.ResizeTerminal(ctx, t, spec.join, spec.size); err != nil && !ended(err) {
		return p, err
	}
	return p, nil
}

// terminalSession serves the connection of one client to a terminal.
type terminalSession struct {
	server  *server
	call    *call
	conn    *websocket.Conn
	target  agentapi.Target
	process agentapi.Process
	ref     string
	offset  int64
}

// errClientLeft reports that the client has closed the connection or does not answer.
var errClientLeft = errors.New("the client has left")

// run serves the connection until the process or the client has ended, then closes it.
func (t *terminalSession) run(ctx context.Context) {
	ctx, stop := t.server.untilStop(ctx)
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	typed := newTyped(ctx, &t.call.Account)
	var wg sync.WaitGroup
	t.conn.SetReadLimit(maxTerminalFrame)
	// The connection uses a context that outlasts ctx, because a context that ends during a read or a
	// write breaks the connection before the last frame.
	lasting, breakOff := context.WithCancel(context.WithoutCancel(ctx))
	defer breakOff()
	context.AfterFunc(ctx, func() { time.AfterFunc(goodbyeTime, breakOff) })
	err := t.say(lasting, terminalStarted{Type: "started", PID: t.process.PID, Offset: t.offset})
	wg.Go(func() { cancel(t.receive(lasting, ctx, typed)) })
	wg.Go(func() { t.ping(ctx, cancel) })
	wg.Go(func() {
		_, err := t.server.Agent.WriteInput(ctx, t.target, t.ref, typed, false)
		if err != nil && ctx.Err() == nil && !ended(err) {
			cancel(err)
		}
	})
	var p agentapi.Process
	if err == nil {
		f := agentapi.FollowRequest{Ref: t.ref, Offset: t.offset}
		p, err = t.server.Agent.Follow(ctx, t.target, f, func(o agentapi.ProcessOutput) error { return t.show(lasting, o) })
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	t.goodbye(lasting, p, err)
	cancel(nil)
	typed.close()
	wg.Wait()
}

// ended reports whether the agent refused input because the process has ended. The output of the
// process tells the end too, with its reason.
func ended(err error) bool {
	f := fault.As(err)
	return f != nil && f.Code == fault.CodeProcessEnded
}

// Messages that the server sends in text frames.
type (
	terminalStarted struct {
		Type   string `json:"type"`
		PID    int    `json:"pid"`
		Offset int64  `json:"offset"`
	}
	terminalLost struct {
		Type string `json:"type"`
		OutputLost
	}
	terminalExit struct {
		Type string `json:"type"`
		ProcessExit
	}
	terminalError struct {
		Type   string `json:"type"`
		Code   string `json:"code"`
		Detail string `json:"detail"`
	}
)

func (t *terminalSession) say(ctx context.Context, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return t.write(ctx, websocket.MessageText, b)
}

// write sends a frame. It fails if the client does not take the frame in time.
func (t *terminalSession) write(ctx context.Context, kind websocket.MessageType, b []byte) error {
	ctx, cancel := context.WithTimeout(ctx, t.call.Patience.Stall)
	defer cancel()
	if err := t.conn.Write(ctx, kind, b); err != nil {
		return errors.Join(errClientLeft, err)
	}
	return nil
}

func (t *terminalSession) show(ctx context.Context, o agentapi.ProcessOutput) error {
	if o.Lost > 0 {
		return t.say(ctx, terminalLost{"lost", OutputLost{Offset: o.Offset, Bytes: o.Lost}})
	}
	return t.write(ctx, websocket.MessageBinary, o.Data)
}

// receive handles the client's frames until the client closes the connection.
func (t *terminalSession) receive(lasting, ctx context.Context, typed *typed) error {
	for {
		kind, in, err := t.conn.Reader(lasting)
		if err != nil {
			return errors.Join(errClientLeft, err)
		}
		if kind == websocket.MessageBinary {
			if err := typed.take(in); err != nil {
				return err
			}
			continue
		}
		b, err := io.ReadAll(io.LimitReader(in, maxTerminalText+1))
		if err != nil {
			return errors.Join(errClientLeft, err)
		}
		if len(b) > maxTerminalText {
			return httpserver.TooLarge(maxTerminalText)
		}
		size, err := resizeOf(b)
		if err != nil {
			return err
		}
		// Resizing a process that has just ended fails, which is no error.
		if err := t.server.Agent.ResizeTerminal(ctx, t.target, t.ref, size); err != nil && !ended(err) {
			return err
		}
	}
}

// resizeOf decodes a text frame of the client, which can only be a resize.
func resizeOf(b []byte) (agentapi.TerminalSize, error) {
	var in struct {
		Type string `json:"type"`
		Cols int    `json:"cols"`
		Rows int    `json:"rows"`
	}
	if err := decode(b, &in); err != nil {
		return agentapi.TerminalSize{}, err
	}
	if in.Type != "resize" {
		return agentapi.TerminalSize{}, fault.InvalidField("type", "must be resize")
	}
	return sizeOfTerminal("", in.Cols, in.Rows)
}

// ping checks regularly whether the client still answers.
func (t *terminalSession) ping(ctx context.Context, cancel context.CancelCauseFunc) {
	tick := time.NewTicker(pingEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		pinging, stop := context.WithTimeout(context.WithoutCancel(ctx), pingEvery)
		err := t.conn.Ping(pinging)
		stop()
		if err != nil {
			cancel(errors.Join(errClientLeft, err))
			return
		}
	}
}

// goodbye sends the end of the session to the client and closes the connection.
func (t *terminalSession) goodbye(ctx context.Context, p agentapi.Process, err error) {
	code := websocket.StatusInternalError
	var last any
	f := fault.As(err)
	switch {
	case err == nil && p.End != nil:
		code, last = websocket.StatusNormalClosure, terminalExit{"exit", exitOf(p.End.Result())}
	case errors.Is(err, errClientLeft), f == nil && t.call.Gone:
		t.call.Gone = true
		_ = t.conn.CloseNow() // the client has left, so no frame can be sent
		return
	case f != nil:
		t.call.Code = f.Code
		last = terminalError{"error", f.Code, f.Detail}
		if f == errStopping {
			code = websocket.StatusGoingAway
		} else if f.Kind == fault.Invalid {
			code = websocket.StatusPolicyViolation
		}
	default:
		t.call.Err = err
		last = terminalError{"error", fault.CodeInternal,
			"an internal error; the server's log has the cause under the request_id " + t.call.ID}
	}
	if err := t.say(ctx, last); err != nil {
		_ = t.conn.CloseNow()
		return
	}
	// An error means that the client left without a close frame.
	_ = t.conn.Close(code, "")
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

// take adds the bytes of a frame as they arrive.
func (t *typed) take(in io.Reader) error {
	b := make([]byte, 4<<10)
	for {
		n, err := in.Read(b)
		if n > 0 {
			if err := t.add(b[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return errors.Join(errClientLeft, err)
		}
	}
}

// add appends input without waiting. It fails if too much input waits.
func (t *typed) add(b []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.waiting)+len(b) > maxTyped {
		return fault.New(fault.Conflict, fault.CodeStdinBlocked,
			"the terminal does not read what is typed, and %d bytes wait", len(t.waiting))
	}
	if err := t.account.Take(2 * int64(len(b))); err != nil { // the buffer may have doubled
		return err
	}
	t.waiting = append(t.waiting, b...)
	signal(t.more)
	return nil
}

func (t *typed) close() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	signal(t.more)
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

func deref(p *string) string {
	if p == nil {
		return ""
	}
	return *p
}
