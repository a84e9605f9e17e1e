package api

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/terminal"
)

const terminalRoute = "/v1/sandboxes/{id}/terminal"

const (
	// maxTerminalFrame is the size in bytes of the largest frame that is accepted, and maxTerminalText
	// that of the largest text frame. Larger frames would hold more memory.
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
	s.inside(w, r, id, sandbox.ForTerminal, func(t agentapi.Target) error {
		ctx, stop := s.untilStop(r.Context())
		defer stop()
		session, err := terminal.Open(ctx, s.Agent, t, spec, &callOf(r).Account)
		if err != nil {
			return err
		}
		conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{
			Subprotocols: []string{terminalProtocol},
			// Pages of all origins are accepted: the key decides, and no browser sends a key by itself.
			InsecureSkipVerify: true,
		})
		if err != nil {
			session.Hangup(err)
			callOf(r).Err = err // Accept has answered
			return nil
		}
		(&terminalSocket{call: callOf(r), conn: conn, session: session}).serve()
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

// terminalOf returns the terminal that the parameters of a call describe.
func terminalOf(p OpenTerminalParams) (terminal.Spec, error) {
	out := terminal.Spec{Join: deref(p.Process), Offset: p.Offset}
	cols, rows := terminal.DefaultCols, terminal.DefaultRows
	if p.Cols != nil {
		cols = *p.Cols
	}
	if p.Rows != nil {
		rows = *p.Rows
	}
	var err error
	if out.Size, err = terminal.Size("", cols, rows); err != nil {
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
	line := terminal.LoginShell
	if p.Command != nil {
		if line = *p.Command; line == "" {
			return out, fault.InvalidField("command", "is empty")
		}
	}
	term := terminal.DefaultTerm
	if p.Term != nil {
		term = *p.Term
	}
	command, err := program{command: &line, user: p.User, workdir: p.Workdir, env: Env{"TERM": term}}.request()
	if err != nil {
		return out, err
	}
	grace := terminal.DefaultGrace
	given, err := duration("grace", p.Grace)
	if err == nil && given != nil {
		grace = *given
		err = terminal.CheckGrace(grace)
	}
	out.Start = command.Detached()
	out.Start.GraceMs = grace.Milliseconds()
	return out, err
}

// terminalSocket serves a session of a terminal over a WebSocket.
type terminalSocket struct {
	call    *call
	conn    *websocket.Conn
	session *terminal.Session
	// lasting outlasts the session, because a context that ends during a read or a write breaks the
	// connection before the last frame.
	lasting context.Context
}

// errClientLeft reports that the client has closed the connection or does not answer.
var errClientLeft = errors.New("the client has left")

// serve serves the connection until the process or the client has ended, then closes it.
func (t *terminalSocket) serve() {
	ctx := t.session.Context()
	lasting, breakOff := context.WithCancel(context.WithoutCancel(ctx))
	defer breakOff()
	t.lasting = lasting
	t.conn.SetReadLimit(maxTerminalFrame)
	context.AfterFunc(ctx, func() { time.AfterFunc(goodbyeTime, breakOff) })
	var wg sync.WaitGroup
	wg.Go(func() { t.session.Hangup(t.receive()) })
	wg.Go(func() { t.ping(ctx) })
	p, err := t.session.Run(t)
	t.goodbye(p, err)
	wg.Wait()
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

// Started implements [terminal.Client].
func (t *terminalSocket) Started(pid int, offset int64) error {
	return t.say(terminalStarted{Type: "started", PID: pid, Offset: offset})
}

// Output implements [terminal.Client].
func (t *terminalSocket) Output(data []byte) error { return t.write(websocket.MessageBinary, data) }

// Lost implements [terminal.Client].
func (t *terminalSocket) Lost(offset, bytes int64) error {
	return t.say(terminalLost{"lost", OutputLost{Offset: offset, Bytes: bytes}})
}

func (t *terminalSocket) say(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return t.write(websocket.MessageText, b)
}

// write sends a frame. It fails if the client does not take the frame in time.
func (t *terminalSocket) write(kind websocket.MessageType, b []byte) error {
	ctx, cancel := context.WithTimeout(t.lasting, t.call.Patience.Stall)
	defer cancel()
	if err := t.conn.Write(ctx, kind, b); err != nil {
		return errors.Join(errClientLeft, err)
	}
	return nil
}

// receive handles the client's frames until the client closes the connection.
func (t *terminalSocket) receive() error {
	for {
		kind, in, err := t.conn.Reader(t.lasting)
		if err != nil {
			return errors.Join(errClientLeft, err)
		}
		if kind == websocket.MessageBinary {
			if err := t.typed(in); err != nil {
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
		if err == nil {
			err = t.session.Resize(size)
		}
		if err != nil {
			return err
		}
	}
}

// typed passes the bytes of a frame on as they arrive.
func (t *terminalSocket) typed(in io.Reader) error {
	b := make([]byte, 4<<10)
	for {
		n, err := in.Read(b)
		if n > 0 {
			if err := t.session.Input(b[:n]); err != nil {
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
	return terminal.Size("", in.Cols, in.Rows)
}

// ping checks regularly whether the client still answers.
func (t *terminalSocket) ping(ctx context.Context) {
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
			t.session.Hangup(errors.Join(errClientLeft, err))
			return
		}
	}
}

// goodbye sends the end of the session to the client and closes the connection.
func (t *terminalSocket) goodbye(p agentapi.Process, err error) {
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
	if err := t.say(last); err != nil {
		_ = t.conn.CloseNow()
		return
	}
	// An error means that the client left without a close frame.
	_ = t.conn.Close(code, "")
}

func deref(p *string) string {
	if p == nil {
		return ""
	}
	return *p
}
