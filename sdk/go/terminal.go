package cay

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

// TerminalOptions holds the options of [Client.OpenTerminal]; the zero value is a login shell
// in a terminal of 80 columns and 24 rows.
type TerminalOptions struct {
	Cols, Rows int           // 0 is the default
	Command    string        // shell command line instead of a login shell
	User       string        // name or number; "" is the template's, else root
	Workdir    string        // "" is the template's, else the user's home
	Term       string        // value of the variable TERM; "" is xterm-256color
	Grace      time.Duration // time for which the process lives without a client; 0 is a minute

	// Process is the pid or tag of a process to join instead of starting one. Offset is then
	// the offset of the first byte to get; nil is that of the first byte that is kept.
	Process string
	Offset  *int64
}

// params returns the options as parameters of a request.
func (o TerminalOptions) params() *openTerminalParams {
	p := &openTerminalParams{Command: orNil(o.Command), User: orNil(o.User), Workdir: orNil(o.Workdir),
		Term: orNil(o.Term), Process: orNil(o.Process), Cols: orNil(o.Cols), Rows: orNil(o.Rows), Offset: o.Offset}
	if o.Grace != 0 {
		p.Grace = new(o.Grace.String())
	}
	return p
}

// orNil returns a pointer to v, nil for the zero value.
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
	PID int // process id, with which TerminalOptions.Process joins the process again

	conn *websocket.Conn
	rest []byte // unread part of the frame that is being read

	mu sync.Mutex
	// +checklocks:mu
	offset int64
	// +checklocks:mu
	lost int64
	// +checklocks:mu
	exit *ProcessExit
}

// OpenTerminal starts a shell or command with a terminal, or joins a process with one. ctx bounds
// only the opening. When the terminal is closed or its connection breaks, the process lives on for
// its grace.
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
		_ = conn.CloseNow() // the error of begin is the one to report
		return nil, err
	}
	return t, nil
}

// begin reads the server's first message, which names the process.
func (t *Terminal) begin(ctx context.Context) error {
	kind, b, err := t.conn.Read(ctx)
	if err != nil {
		return fmt.Errorf("opening the terminal: %w", err)
	}
	if kind == websocket.MessageText {
		err = t.told(b)
	}
	if err == nil && t.PID == 0 {
		err = errors.New("opening the terminal: the server does not name its process")
	}
	return err
}

// told handles a message of the server, which is a text frame. It returns [io.EOF] for the end of
// the process, and an [*Error] for an error that the server reports.
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
		return fmt.Errorf("decoding a message of the server: %w", err)
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

// Read reads output of the terminal. It returns [io.EOF] at the end of the process, which Exit
// then describes, and an [*Error] if the server reports an error. Any other error is one of the
// connection; joining the process again at Offset continues after it.
func (t *Terminal) Read(p []byte) (int, error) {
	for len(t.rest) == 0 {
		// No context bounds this read; Close ends it.
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

// Write sends p as input of the terminal.
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

// Resize sets the size of the terminal.
func (t *Terminal) Resize(ctx context.Context, cols, rows int) error {
	b, err := json.Marshal(map[string]any{"type": "resize", "cols": cols, "rows": rows})
	if err != nil {
		return err
	}
	return t.conn.Write(ctx, websocket.MessageText, b)
}

// Offset returns the offset of the next byte that Read reads.
func (t *Terminal) Offset() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.offset
}

// Lost returns the number of bytes of output that were no longer kept when Read came to them.
func (t *Terminal) Lost() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.lost
}

// Exit returns the end of the process, nil until Read has returned [io.EOF].
func (t *Terminal) Exit() *ProcessExit {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.exit
}

// Close ends the connection; the process lives on for its grace.
func (t *Terminal) Close() error {
	// An error means that the server closed the connection first, which changes nothing.
	_ = t.conn.Close(websocket.StatusNormalClosure, "")
	return nil
}
