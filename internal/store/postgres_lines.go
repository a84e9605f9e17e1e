package store

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sys/unix"
)

// lines tracks the network connections to PostgreSQL, below TLS and the protocol. It knows which of them wait for an
// answer, and closes all of them when PostgreSQL is away, so that no call waits for a machine that does not answer.
type lines struct {
	heard atomic.Int64 // counts the reads that brought something, on all connections

	mu sync.Mutex
	// +checklocks:mu
	all map[*line]bool
	// away is set while new connections are refused.
	// +checklocks:mu
	away bool
}

// line is one connection.
type line struct {
	net.Conn
	of *lines
	// waits is the time, in nanoseconds since 1970, at which the present read or write began; 0 if there is none. The
	// client reads only while it waits for an answer.
	waits atomic.Int64
}

// errAway reports that PostgreSQL was found to be away.
var errAway = errors.New("PostgreSQL does not answer")

// dialGated connects for a call. It fails at once while PostgreSQL is away.
func (l *lines) dialGated(ctx context.Context, network, address string) (net.Conn, error) {
	l.mu.Lock()
	away := l.away
	l.mu.Unlock()
	if away {
		return nil, errAway
	}
	return l.dial(ctx, network, address)
}

// dial connects.
func (l *lines) dial(ctx context.Context, network, address string) (net.Conn, error) {
	c, err := dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	added := &line{Conn: c, of: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all == nil {
		l.all = map[*line]bool{}
	}
	l.all[added] = true
	return added, nil
}

// waiting reports whether a connection has waited for an answer for longer than d.
func (l *lines) waiting(d time.Duration) bool {
	limit := time.Now().Add(-d).UnixNano()
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.all {
		if since := c.waits.Load(); since != 0 && since < limit {
			return true
		}
	}
	return false
}

// cut ends all connections, and makes dialGated refuse new ones until join.
func (l *lines) cut() {
	l.mu.Lock()
	l.away = true
	var all []*line
	for c := range l.all {
		all = append(all, c)
	}
	l.mu.Unlock()
	for _, c := range all {
		_ = c.Close() // its user learns of it
	}
}

// join makes dialGated connect again.
func (l *lines) join() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.away = false
}

// Read implements [net.Conn].
func (c *line) Read(p []byte) (int, error) {
	c.waits.Store(time.Now().UnixNano())
	n, err := c.Conn.Read(p)
	c.waits.Store(0)
	if n > 0 {
		c.of.heard.Add(1)
	}
	return n, err
}

// Write implements [net.Conn].
func (c *line) Write(p []byte) (int, error) {
	c.waits.Store(time.Now().UnixNano())
	defer c.waits.Store(0)
	return c.Conn.Write(p)
}

// stirred reports whether something is to be read on a connection that waits for no answer: PostgreSQL has ended it, or
// tells of a setting, or the network has broken it. stirred waits for nothing, also while pgx reads the connection in
// the background, as it does after a slow write.
func (c *line) stirred() bool {
	stirred := true
	raw, err := c.Conn.(syscall.Conn).SyscallConn()
	if err == nil {
		// Read would wait for the end of the present read.
		err = raw.Control(func(fd uintptr) {
			var b [1]byte
			_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
			stirred = err != unix.EAGAIN
		})
	}
	return stirred || err != nil
}

// shouldPing reports whether a connection of the pool must be tried before a call uses it. It replaces the pool's rule,
// which costs each call after a second without one a round trip.
func shouldPing(_ context.Context, of pgxpool.ShouldPingParams) bool {
	c := of.Conn.PgConn().Conn()
	if secured, ok := c.(*tls.Conn); ok {
		c = secured.NetConn()
	}
	l, ok := c.(*line)
	return !ok || l.stirred()
}

// Close implements [net.Conn].
func (c *line) Close() error {
	c.of.mu.Lock()
	delete(c.of.all, c)
	c.of.mu.Unlock()
	return c.Conn.Close()
}
