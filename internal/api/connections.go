package api

import (
	"container/list"
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of the connections that a server holds, whoever opens them: they need no key.
const (
	// mostConnections is how many there may be. One at rest takes about 12 KiB, so that all of them
	// take a fifth of the server's memory. Beyond it those that rest are closed, the one that has
	// rested longest first: its client opens another.
	mostConnections = 8192
	// mostPending is how many may be without a call that is being answered and not at rest either:
	// their request is on its way, or what is left of its body. A header takes up to 64 KiB, so all of
	// them 64 MiB. Callers send a header in one piece; with fewer a crowd that connects at once would lose some.
	mostPending = 1024
	// shareOfFiles is the part of the server's file descriptors that connections may take: each call
	// needs another one to the sandbox, and the sandboxes themselves some.
	shareOfFiles = 4
	// restOfBody is how long a body is read that its call did not look at. net/http reads up
	// to 256 KiB of it, to use the connection again, and has no end for that of its own.
	restOfBody = 30 * time.Second
)

// connections bounds the connections of one http.Server. Those on which calls are answered are
// never closed; how many of them there are is for the limits of organizations to say. It is safe
// for concurrent use.
type connections struct {
	most        int
	mostPending int
	rest        time.Duration // restOfBody, less in tests

	mu sync.Mutex
	// +checklocks:mu
	all map[net.Conn]*connection // guarded by mu
	// +checklocks:mu
	pending list.List // of *connection, the oldest first; guarded by mu
	// +checklocks:mu
	resting list.List // of *connection, the oldest first; guarded by mu
}

// connection is one of them. Its fields, but for the constant ones, are guarded by of.mu.
type connection struct {
	of       *connections // constant
	conn     net.Conn     // constant
	state    http.ConnState
	serving  int // calls; several on one of HTTP/2
	in       *list.List
	at       *list.Element
	hijacked bool
}

type connectionKey struct{}

// newConnections makes one for a process with so many file descriptors.
func newConnections(files uint64) *connections {
	most := int(min(mostConnections, max(files/shareOfFiles, 16)))
	return &connections{most: most, mostPending: min(mostPending, most), rest: restOfBody, all: map[net.Conn]*connection{}}
}

// files is how many descriptors the process may have.
func files() uint64 {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 1024 // what every system gives
	}
	return limit.Cur
}

// bound makes srv keep to the bounds. It must be called before srv serves.
func (c *connections) bound(srv *http.Server) {
	next := srv.Handler
	srv.ConnState = c.changed
	srv.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		c.mu.Lock()
		defer c.mu.Unlock()
		return context.WithValue(ctx, connectionKey{}, c.ofLocked(conn))
	}
	srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn := r.Context().Value(connectionKey{}).(*connection)
		r = r.WithContext(r.Context()) // net/http looks at the body of its own request to answer before "Expect: 100-continue"
		body := &touchedBody{ReadCloser: r.Body}
		if r.Body != nil && r.Body != http.NoBody {
			r.Body = body
		} else {
			body.touched.Store(true)
		}
		c.serve(conn, 1)
		defer func() {
			if c.serve(conn, -1) && !body.touched.Load() {
				// A writer without deadlines is none of net/http's.
				_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(c.rest))
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// touchedBody knows whether a call read anything of its body: then the call's own deadlines hold for the rest.
type touchedBody struct {
	io.ReadCloser
	touched atomic.Bool // what carries a body on may read it when its call is over
}

// Read implements [io.Reader].
func (b *touchedBody) Read(p []byte) (int, error) {
	b.touched.Store(true)
	return b.ReadCloser.Read(p)
}

// +checklocks:c.mu
func (c *connections) ofLocked(conn net.Conn) *connection {
	if c.all[conn] == nil {
		c.all[conn] = &connection{of: c, conn: conn, state: http.StateNew}
	}
	return c.all[conn]
}

// changed is told of a connection's new state by net/http.
func (c *connections) changed(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	one := c.ofLocked(conn)
	one.state = state
	switch state {
	case http.StateClosed:
		c.dropLocked(one)
	case http.StateHijacked:
		one.hijacked = true // it is there until its call is over
	}
	surplus := c.placeLocked(one)
	c.mu.Unlock()
	closeAll(surplus)
}

func closeAll(conns []net.Conn) {
	for _, conn := range conns {
		_ = conn.Close() // who has it finds out
	}
}

// serve counts a call that began on a connection, or ended. It reports whether the connection is
// net/http's still.
func (c *connections) serve(one *connection, n int) (kept bool) {
	c.mu.Lock()
	one.serving += n
	if one.hijacked && one.serving == 0 {
		c.dropLocked(one)
	}
	surplus := c.placeLocked(one)
	kept = !one.hijacked
	c.mu.Unlock()
	closeAll(surplus)
	return kept
}

// withoutCall runs f, which waits for a caller whose call is as good as answered: meanwhile its connection
// may be closed as one without a call.
func withoutCall(r *http.Request, f func()) {
	one, ok := r.Context().Value(connectionKey{}).(*connection)
	if ok { // a request of a test has none
		one.of.serve(one, -1)
		defer one.of.serve(one, 1)
	}
	f()
}

// placeLocked puts a connection at the end of the list where it belongs, and takes out what there is
// too much of then.
//
// +checklocks:c.mu
func (c *connections) placeLocked(one *connection) (surplus []net.Conn) {
	c.unlistLocked(one)
	switch {
	case c.all[one.conn] != one || one.serving > 0 || one.hijacked:
	case one.state == http.StateIdle:
		one.in = &c.resting
	default:
		one.in = &c.pending
	}
	if one.in != nil {
		one.at = one.in.PushBack(one)
	}
	return c.surplusLocked()
}

// +checklocks:c.mu
func (c *connections) unlistLocked(one *connection) {
	if one.at != nil {
		one.in.Remove(one.at)
		one.in, one.at = nil, nil
	}
}

// +checklocks:c.mu
func (c *connections) dropLocked(one *connection) { delete(c.all, one.conn) }

// surplusLocked takes out what there is too much of: the oldest that rest, then the oldest that
// are pending, which may be the newcomer.
//
// +checklocks:c.mu
func (c *connections) surplusLocked() (surplus []net.Conn) {
	for c.pending.Len() > c.mostPending {
		surplus = append(surplus, c.takeLocked(&c.pending))
	}
	for len(c.all) > c.most {
		switch {
		case c.resting.Len() > 0:
			surplus = append(surplus, c.takeLocked(&c.resting))
		case c.pending.Len() > 0:
			surplus = append(surplus, c.takeLocked(&c.pending))
		default:
			return surplus // cannot be: a newcomer is pending
		}
	}
	return surplus
}

// takeLocked takes the oldest out of a list.
//
// +checklocks:c.mu
func (c *connections) takeLocked(from *list.List) net.Conn {
	one := from.Front().Value.(*connection)
	c.dropLocked(one)
	c.unlistLocked(one)
	return one.conn
}
