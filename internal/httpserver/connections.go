package httpserver

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

// Limits of the connections that a server holds, no matter which client opens them: opening one
// needs no key.
const (
	// mostConnections is the largest number of connections. An idle one takes about 12 KiB, so all of
	// them take a fifth of the server's memory. Beyond the limit idle connections are closed, the
	// longest idle first; their clients open new ones.
	mostConnections = 8192
	// mostPending is the largest number of connections that are neither idle nor have a call being
	// answered: their request, or the rest of its body, is on its way. A header takes up to 64 KiB, so
	// all of them take up to 64 MiB. Callers send a header in one piece; with a lower limit a crowd
	// that connects at once would lose some connections.
	mostPending = 1024
	// shareOfFiles limits connections to one part in four of the server's file descriptors: each call
	// needs another descriptor for its connection to the sandbox, and the sandboxes need some too.
	// With a larger part, calls fail for lack of descriptors.
	shareOfFiles = 4
	// restOfBody limits how long net/http reads a body that its call did not read. net/http reads up
	// to 256 KiB of it, to use the connection again, and sets no time limit itself.
	restOfBody = 30 * time.Second
)

// connections limits the connections of one http.Server. It never closes a connection on which a
// call is answered; the limits of organizations bound the number of those. It is safe for
// concurrent use.
type connections struct {
	most        int
	mostPending int
	rest        time.Duration // restOfBody, shorter in tests

	mu sync.Mutex
	// +checklocks:mu
	all map[net.Conn]*connection // guarded by mu
	// +checklocks:mu
	pending list.List // of *connection, the oldest first; guarded by mu
	// +checklocks:mu
	resting list.List // of *connection, the oldest first; guarded by mu
}

// connection records the state of one connection. of.mu guards all fields that are not constant.
type connection struct {
	of       *connections // constant
	conn     net.Conn     // constant
	state    http.ConnState
	serving  int // calls being answered; HTTP/2 allows several
	in       *list.List
	at       *list.Element
	hijacked bool
}

type connectionKey struct{}

// newConnections returns the limits for a process that may have that many file descriptors.
func newConnections(files uint64) *connections {
	most := int(min(mostConnections, max(files/shareOfFiles, 16)))
	return &connections{most: most, mostPending: min(mostPending, most), rest: restOfBody, all: map[net.Conn]*connection{}}
}

// files returns the number of descriptors that the process may have.
func files() uint64 {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 1024 // the smallest usual limit
	}
	return limit.Cur
}

// bound makes srv keep to the limits. It must be called before srv serves.
func (c *connections) bound(srv *http.Server) {
	next := srv.Handler
	srv.ConnState = c.changed
	srv.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		c.mu.Lock()
		defer c.mu.Unlock()
		one := &connection{of: c, conn: conn, state: http.StateNew}
		c.all[conn] = one
		return context.WithValue(ctx, connectionKey{}, one)
	}
	srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn := r.Context().Value(connectionKey{}).(*connection)
		// net/http looks at the body of its own request before it answers "Expect: 100-continue", so
		// that request must keep its body.
		r = r.WithContext(r.Context())
		body := &touchedBody{ReadCloser: r.Body}
		if r.Body != nil && r.Body != http.NoBody {
			r.Body = body
		} else {
			body.touched.Store(true)
		}
		c.serve(conn, 1)
		defer func() {
			if c.serve(conn, -1) && !body.touched.Load() {
				// Only net/http's own writers have deadlines; others return an error, which is ignored.
				_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(c.rest))
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// touchedBody records whether a call read any of its body. If it did, the call's own deadlines hold
// for the rest.
type touchedBody struct {
	io.ReadCloser
	touched atomic.Bool // atomic, because a goroutine that passes the body on may read it after the call
}

// Read implements [io.Reader].
func (b *touchedBody) Read(p []byte) (int, error) {
	b.touched.Store(true)
	return b.ReadCloser.Read(p)
}

// changed takes note of the new state of a connection; net/http calls it.
func (c *connections) changed(conn net.Conn, state http.ConnState) {
	c.mu.Lock()
	one := c.all[conn]
	if one == nil {
		// It was closed as surplus while its first bytes were read. Counting it again would close
		// another connection in its place.
		c.mu.Unlock()
		return
	}
	one.state = state
	switch state {
	case http.StateClosed:
		c.dropLocked(one)
	case http.StateHijacked:
		one.hijacked = true // it is kept until its call has ended
	}
	surplus := c.placeLocked(one)
	c.mu.Unlock()
	closeAll(surplus)
}

func closeAll(conns []net.Conn) {
	for _, conn := range conns {
		_ = conn.Close() // its reader or writer gets an error
	}
}

// serve adds n to the number of calls on a connection. It reports whether net/http still owns the
// connection.
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

// WithoutCall runs f, which waits for a caller whose call is practically answered. While f runs,
// the connection may be closed as one without a call.
func WithoutCall(r *http.Request, f func()) {
	one, ok := r.Context().Value(connectionKey{}).(*connection)
	if ok { // requests of tests have none
		one.of.serve(one, -1)
		defer one.of.serve(one, 1)
	}
	f()
}

// placeLocked puts a connection at the end of the list where it belongs, and removes and returns
// the connections that then exceed the limits.
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

// surplusLocked removes and returns the connections that exceed the limits: first those that have
// been idle longest, then those that have been pending longest, which may include the newest one.
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
			return surplus // unreachable, because a new connection is pending
		}
	}
	return surplus
}

// takeLocked removes the oldest connection of a list and returns it.
//
// +checklocks:c.mu
func (c *connections) takeLocked(from *list.List) net.Conn {
	one := from.Front().Value.(*connection)
	c.dropLocked(one)
	c.unlistLocked(one)
	return one.conn
}
