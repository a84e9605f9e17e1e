package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/coder/websocket"
)

// TerminalOptions says which terminal to open; the zero value is a login shell of 80
// columns and 24 rows.
type TerminalOptions struct {
	Cols, Rows int           // 0 is the default
	Command    string        // shell command line instead of a login shell
	User       string        // name or number; "" is the template's, else root
	Workdir    string        // "" is the template's, else the user's home
	Term       string        // the variable TERM; "" is xterm-256color
	Grace      time.Duration // how long it lives without a client; 0 is a minute

	// Process is the pid or tag of a process to join instead of starting one, and Offset that
	// of the first byte to get then; nil is all that is kept.
	Process string
	Offset  *int64
}

func (o TerminalOptions) params() *OpenTerminalParams {
	p := &OpenTerminalParams{Command: orNil(o.Command), User: orNil(o.User), Workdir: orNil(o.Workdir), Term: orNil(o.Term), Process: orNil(o.Process),
		Cols: orNil(o.Cols), Rows: orNil(o.Rows), Offset: o.Offset}
	if o.Grace != 0 {
		p.Grace = new(o.Grace.String())
	}
	return p
}

func orNil[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

// Terminal is a connection to a terminal. One goroutine may read while others write and
// resize.
type Terminal struct {
	PID int // what joins it again

	conn *websocket.Conn
	rest []byte // of the frame that is being read

	mu     sync.Mutex
	offset int64
	lost   int64
	exit   *ProcessExit
}

// OpenTerminal starts a shell with a terminal, or joins one. ctx ends the opening only. A
// terminal that is closed, or whose connection breaks, lives on for its grace.
func (c *Client) OpenTerminal(ctx context.Context, id string, o TerminalOptions) (*Terminal, error) {
	w := c.wire
	req, err := newOpenTerminalRequest(w.Server, id, o.params())
	if err != nil {
		return nil, err
	}
	req = req.WithContext(ctx)
	if err := w.applyEditors(ctx, req, nil); err != nil {
		return nil, err
	}
	dial := &websocket.DialOptions{HTTPHeader: req.Header, Subprotocols: []string{"cay.terminal.v1"}}
	if h, ok := w.Client.(*http.Client); ok {
		dial.HTTPClient = h
	}
	conn, resp, err := websocket.Dial(ctx, req.URL.String(), dial)
	if err != nil {
		if resp != nil && resp.StatusCode != http.StatusSwitchingProtocols {
			return nil, errorOf(resp)
		}
		return nil, fmt.Errorf("opening the terminal: %w", err)
	}
	conn.SetReadLimit(1 << 20) // bytes of a frame; the server's have 64 KiB
	t := &Terminal{conn: conn}
	if err := t.begin(ctx); err != nil {
		_ = conn.CloseNow() // the error is what counts
		return nil, err
	}
	return t, nil
}

// begin reads what the server says first.
func (t *Terminal) begin(ctx context.Context) error {
	kind, b, err := t.conn.Read(ctx)
	if err != nil {
		return fmt.Errorf("opening the terminal: %w", err)
	}
	if kind == websocket.MessageText {
		err = t.told(b)
	}
	if err == nil && t.PID == 0 {
		err = errors.New("opening the terminal: the server does not say of which process it is")
	}
	return err
}

// told takes what the server says in a text frame.
func (t *Terminal) told(b []byte) error {
	var said struct {
		Type   string `json:"type"`
		PID    int    `json:"pid"`
		Offset int64  `json:"offset"`
		Bytes  int64  `json:"bytes"`
		Code   string `json:"code"`
		Detail string `json:"detail"`
	}
	if err := json.Unmarshal(b, &said); err != nil {
		return fmt.Errorf("decoding what the server says: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch said.Type {
	case "started":
		t.PID, t.offset = said.PID, said.Offset
	case "lost":
		t.lost += said.Bytes
		t.offset = said.Offset + said.Bytes
	case "exit":
		t.exit = new(ProcessExit)
		if err := json.Unmarshal(b, t.exit); err != nil {
			return fmt.Errorf("decoding the end of the process: %w", err)
		}
		return io.EOF
	case "error":
		return &Error{Status: http.StatusServiceUnavailable, Code: said.Code, Detail: said.Detail}
	}
	return nil
}

// Read reads what the terminal shows. The end of its process is [io.EOF], see Exit; an
// [*Error] is what the server says, any other one the connection's: joining the process
// again at Offset goes on where it broke.
func (t *Terminal) Read(p []byte) (int, error) {
	for len(t.rest) == 0 {
		// Close is what ends it.
		kind, b, err := t.conn.Read(context.Background())
		if err != nil {
			return 0, fmt.Errorf("reading from the terminal: %w", errors.Join(io.ErrUnexpectedEOF, err))
		}
		if kind == websocket.MessageText {
			if err := t.told(b); err != nil {
				return 0, err
			}
			continue
		}
		t.rest = b
	}
	n := copy(p, t.rest)
	t.rest = t.rest[n:]
	t.mu.Lock()
	t.offset += int64(n)
	t.mu.Unlock()
	return n, nil
}

// Write types.
func (t *Terminal) Write(p []byte) (int, error) {
	const piece = 64 << 10 // bytes in a frame
	for written := 0; ; {
		n := min(piece, len(p)-written)
		if err := t.conn.Write(context.Background(), websocket.MessageBinary, p[written:written+n]); err != nil {
			return written, fmt.Errorf("writing to the terminal: %w", err)
		}
		if written += n; written == len(p) {
			return written, nil
		}
	}
}

// Resize tells the terminal its size.
func (t *Terminal) Resize(ctx context.Context, cols, rows int) error {
	b, err := json.Marshal(map[string]any{"type": "resize", "cols": cols, "rows": rows})
	if err != nil {
		return err
	}
	return t.conn.Write(ctx, websocket.MessageText, b)
}

// Offset is that of the byte that Read gives next.
func (t *Terminal) Offset() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.offset
}

// Lost is how much output was not kept any more when it was asked for, bytes.
func (t *Terminal) Lost() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.lost
}

// Exit is how the process ended; nil before Read has said io.EOF.
func (t *Terminal) Exit() *ProcessExit {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.exit
}

// Close ends the connection; the process lives on for its grace.
func (t *Terminal) Close() error {
	// A server that has gone first is no error.
	_ = t.conn.Close(websocket.StatusNormalClosure, "")
	return nil
}
