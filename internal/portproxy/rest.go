package portproxy

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync"
)

// A connection to a port serves one caller after the other. What a server inside sends beyond its
// answer would be taken for the answer to the next request, which may be another caller's. Servers do
// that by mistake: many do not read the body of a GET, and take it for a request of its own, which
// whoever sent it has written. So a connection is used again only when nothing came while it
// was at rest, and never after a body that such a server may not have read.

// restingConn is a connection of which is known whether it rests, that is whether everything that came
// was taken and its reader waits for more.
type restingConn struct {
	net.Conn

	mu sync.Mutex
	// +checklocks:mu
	waiting bool // guarded by mu
	// +checklocks:mu
	closed bool // guarded by mu
	// +checklocks:mu
	changed chan struct{} // closed when the next of them becomes true, nil while nobody waits; guarded by mu
}

// Read implements [net.Conn].
func (c *restingConn) Read(b []byte) (int, error) {
	c.note(true, false)
	n, err := c.Conn.Read(b)
	c.note(false, false)
	return n, err
}

// Close implements [net.Conn].
func (c *restingConn) Close() error {
	c.note(false, true)
	return c.Conn.Close()
}

// ReadFrom sends what r has, within the kernel where that can be.
func (c *restingConn) ReadFrom(r io.Reader) (int64, error) { return io.Copy(c.Conn, r) }

// CloseWrite ends what is sent; what comes can still be read.
func (c *restingConn) CloseWrite() error { return closeWrite(c.Conn) }

func (c *restingConn) note(waiting, closed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting, c.closed = waiting, c.closed || closed
	if (c.waiting || c.closed) && c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

// rests returns when the connection rests or is closed. net/http's transport gives a connection back a
// moment before it looks whether more came than was asked for, and closes it then.
func (c *restingConn) rests(ctx context.Context) {
	for {
		c.mu.Lock()
		if c.waiting || c.closed {
			c.mu.Unlock()
			return
		}
		if c.changed == nil {
			c.changed = make(chan struct{})
		}
		changed := c.changed
		c.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// onRestingOnly lets a request use a connection again only when that rests.
func onRestingOnly(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) {
		if c, ok := got.Conn.(*restingConn); ok && got.Reused {
			c.rests(ctx)
		}
	}})
}

// mayStayUnread reports whether a request has a body that servers often do not read.
func mayStayUnread(r *http.Request) bool {
	if r.ContentLength == 0 {
		return false
	}
	switch r.Method {
	case http.MethodPost, http.MethodPut, http.MethodPatch:
		return false
	}
	return true
}
