package portproxy

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync"
)

// A connection to a port serves one caller after another. Bytes that a server inside sends beyond
// its answer would be taken for the answer to the next request, which may be another caller's.
// Servers do that by mistake: many do not read the body of a GET, and take it for another
// request, which the sender of the body has written. So a connection is reused only if nothing
// came while it was idle, and never after a body that such a server may not have read.

// idleConn is a connection that knows whether it is idle: whether everything that came was read,
// and its reader waits for more.
type idleConn struct {
	net.Conn

	mu sync.Mutex
	// +checklocks:mu
	waiting bool // guarded by mu
	// +checklocks:mu
	closed bool // guarded by mu
	// +checklocks:mu
	// changed is closed when waiting or closed becomes true; nil while no caller waits. Guarded
	// by mu.
	changed chan struct{}
}

// Read implements [net.Conn].
func (c *idleConn) Read(b []byte) (int, error) {
	c.note(true, false)
	n, err := c.Conn.Read(b)
	c.note(false, false)
	return n, err
}

// Close implements [net.Conn].
func (c *idleConn) Close() error {
	c.note(false, true)
	return c.Conn.Close()
}

// ReadFrom sends the bytes of r, within the kernel if possible.
func (c *idleConn) ReadFrom(r io.Reader) (int64, error) { return io.Copy(c.Conn, r) }

// CloseWrite ends the sending direction; the other stays open.
func (c *idleConn) CloseWrite() error { return closeWrite(c.Conn) }

func (c *idleConn) note(waiting, closed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.waiting, c.closed = waiting, c.closed || closed
	if (c.waiting || c.closed) && c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

// waitIdle returns when the connection is idle or closed. net/http's transport gives a connection
// back a moment before it checks whether more bytes came than expected, and closes it then.
func (c *idleConn) waitIdle(ctx context.Context) {
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

// reuseIdleOnly makes a request wait until the connection that it reuses is idle.
func reuseIdleOnly(ctx context.Context) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(got httptrace.GotConnInfo) {
		if c, ok := got.Conn.(*idleConn); ok && got.Reused {
			c.waitIdle(ctx)
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
