package agentapi

import (
	"context"
	"errors"
	"net/http/httptrace"
	"sync"
)

// maxHeadLines limits the lines in the heads of one answer and of the informational answers before it
// together. Each line costs the host some hundred bytes however short it is, so a limit of bytes alone
// does not bound the memory. Servers send some twenty lines; a limit near that would refuse good answers.
const maxHeadLines = 256

// errHead reports an answer with more than maxHeadLines.
var errHead = errors.New("the head of the answer has too many lines")

// WithHeads returns a copy of ctx for one HTTP/1.1 request over a connection of this package. An answer
// whose head has too many lines then breaks the connection.
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
	first bool // line is the head's first line
}

// expect makes look count the lines of the answer that comes next.
func (h *heads) expect() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expected, h.lines, h.line, h.first = true, 0, 0, true
}

// look counts lines in b, the bytes that came next, and returns errHead if there are too many.
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
			// Status "HTTP/1.1 1": another head follows an informational one.
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
