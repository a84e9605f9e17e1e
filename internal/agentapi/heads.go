package agentapi

import (
	"context"
	"errors"
	"net/http/httptrace"
	"sync"
)

// maxHeadLines is how many lines the heads of one answer may have together, those of informational
// answers before it included. Each costs the host some hundred bytes however short it is, so that a limit
// of bytes alone bounds nothing; servers send some twenty.
const maxHeadLines = 256

var errHead = errors.New("the head of the answer has too many lines")

// WithHeads returns a copy of ctx for one HTTP/1.1 request over a connection of this package's: an
// answer whose head has more lines than any needs breaks the connection.
func WithHeads(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		if c, ok := i.Conn.(interface{ expectHead() }); ok {
			c.expectHead()
		}
	}})
}

// heads counts the lines of the heads that come on a connection.
type heads struct {
	mu sync.Mutex
	// +checklocks:mu
	expected bool
	// +checklocks:mu
	lines int
	// +checklocks:mu
	line int // length of the line so far
	// +checklocks:mu
	status [10]byte // the beginning of the head's first line
	// +checklocks:mu
	first bool // that is the line
}

// expect says that an answer comes.
func (h *heads) expect() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expected, h.lines, h.line, h.first = true, 0, 0, true
}

// look looks at what came.
func (h *heads) look(b []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range b {
		switch {
		case !h.expected:
			return nil
		case c == '\r':
		case c != '\n':
			if h.first && h.line < len(h.status) {
				h.status[h.line] = c
			}
			h.line++
		case h.line == 0 && !h.first:
			// "HTTP/1.1 1": another head follows an informational one.
			h.expected, h.first = h.status[9] == '1', true
		default:
			h.line, h.first = 0, false
			if h.lines++; h.lines > maxHeadLines {
				return errHead
			}
		}
	}
	return nil
}
