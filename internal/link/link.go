// Package link carries requests from replicas to nodes over connections that the nodes dial.
//
// A node dials every replica, so that no machine of a node has to be reachable. To each it keeps one pulse, a
// connection on which both ends send a byte at a regular interval, and data connections. On a data connection the
// replica is the client of HTTP/1.1 and the node the server: a connection carries one request at a time and is kept
// for the next. Some data connections wait unused, the spare ones; when a request takes one, the node dials another.
// All connections are TLS with certificates on both ends. On each the node first names its session, by which a replica
// tells a process of a node from another one with the same certificate: connections of two never mix.
//
// The two ends are [Hub], of the replica, and [Node]. The pulse decides whether they can reach each other: when no byte
// came for the time [silence], an end closes the pulse and all data connections. TCP cannot decide it, since its time
// limits also end connections whose reader is only slow.
//
// The package knows certificates and sessions only by the function that names their node, and carries requests without
// looking at them. Hub and Node are safe for concurrent use. When Serve of either has returned, no goroutine and no
// connection of it is left.
package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Protocols of ALPN.
const (
	dataProtocol    = "cay-data/1"
	pulseProtocol   = "cay-pulse/1"
	controlProtocol = "h2"
)

const (
	// silence is the time without a byte of the pulse after which the other end counts as unreachable. Calls to a node
	// whose machine is gone wait so long for their error; with a shorter time an overloaded machine would lose its calls.
	silence = 15 * time.Second
	// beats is the number of bytes that an end sends in the time of silence. With five, a cut of the network of less
	// than 5 s, with the delay of TCP's next retransmission, ends nothing.
	beats = 5

	// handshakeTime is the time for TLS, and for finding out whose certificate it is. It also suffices on a machine
	// that is starting hundreds of connections at once.
	handshakeTime = 10 * time.Second

	// socketBuffer is the size of each buffer of a data connection in the kernel, in bytes. Linux doubles it for its
	// own bookkeeping. Without it the kernel would let each of thousands of connections whose reader is slow hold 4 to
	// 6 MB. 128 KiB carry 128 MB a second at a round trip of 1 ms.
	socketBuffer = 128 << 10

	// minSpare is the number of data connections that wait at least, and maxSpare the number that wait at most. A call
	// that finds none waits for a handshake, some milliseconds; one that waits holds about 30 KiB at each end.
	minSpare, maxSpare = 2, 64
)

// wantedSpare returns how many spare connections a node keeps to a replica that has used connections open. As many as
// are used means that a burst of calls doubles them with each round of handshakes.
func wantedSpare(used int) int { return min(max(used, minSpare), maxSpare) }

// conn is a data connection at either end. It is not a *tls.Conn to net/http, whose server would not serve the
// protocol, but has its methods: CloseWrite ends one direction, and ConnectionState names the peer.
type conn struct {
	*tls.Conn
	first []byte // read already
	ended func() // called once, when the connection is closed
	once  sync.Once
}

// Read implements [net.Conn].
func (c *conn) Read(p []byte) (int, error) {
	if len(c.first) > 0 {
		n := copy(p, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}

// Close implements [net.Conn].
func (c *conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(c.ended)
	return err
}

// maxSession bounds the name of a session, in bytes.
const maxSession = 64

// sendSession names the session of the node on a new connection. It does not wait, since nothing was sent before.
func sendSession(c *tls.Conn, session string) error {
	if session == "" || len(session) > maxSession {
		return fmt.Errorf("a session's name has 1 to %d bytes, not %d", maxSession, len(session))
	}
	if _, err := c.Write(append([]byte{byte(len(session))}, session...)); err != nil {
		return fmt.Errorf("naming the session: %w", err)
	}
	return nil
}

// readSession reads what sendSession sends, until the deadline of ctx, which must have one.
func readSession(ctx context.Context, c *tls.Conn) (string, error) {
	deadline, _ := ctx.Deadline()
	_ = c.SetReadDeadline(deadline) // fails on a closed connection, as the read does
	var b [1 + maxSession]byte
	if _, err := io.ReadFull(c, b[:1]); err != nil {
		return "", fmt.Errorf("reading the name of a session: %w", err)
	}
	n := int(b[0])
	if n == 0 || n > maxSession {
		return "", fmt.Errorf("a session's name has 1 to %d bytes, not %d", maxSession, n)
	}
	if _, err := io.ReadFull(c, b[1:1+n]); err != nil {
		return "", fmt.Errorf("reading the name of a session: %w", err)
	}
	_ = c.SetReadDeadline(time.Time{})
	return string(b[1 : 1+n]), nil
}

// abort closes the connection at once. The kernel drops what it has not sent. Close waits up to 5 s on a connection
// whose other end takes nothing.
func (c *conn) abort() {
	abort(c.Conn)
	c.once.Do(c.ended)
}

// abort closes the TCP connection below a TLS connection.
func abort(c *tls.Conn) {
	if tcp, ok := c.NetConn().(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // fails on a closed connection
	}
	_ = c.NetConn().Close() // its users learn of it
}

// stirred reports whether something is to be read on a connection on which nothing may come: the other end has closed
// it, or the network has broken it. It waits for nothing.
func (c *conn) stirred() bool {
	tcp, ok := c.NetConn().(*net.TCPConn)
	if !ok {
		return true
	}
	stirred := true
	raw, err := tcp.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			var b [1]byte
			_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
			stirred = err != unix.EAGAIN
		})
	}
	return stirred || err != nil
}

// bound limits what the kernel holds for a connection.
func bound(c net.Conn) error {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return errors.New("not a TCP connection")
	}
	if err := tcp.SetReadBuffer(socketBuffer); err != nil {
		return fmt.Errorf("setting a buffer: %w", err)
	}
	if err := tcp.SetWriteBuffer(socketBuffer); err != nil {
		return fmt.Errorf("setting a buffer: %w", err)
	}
	return nil
}

// pulse sends bytes at an interval and reads those of the other end. It calls heard with each, and returns the
// reason when none came for the time of silence, the connection ended, or ctx did. The connection is then closed.
func pulse(ctx context.Context, c *tls.Conn, heard func()) error {
	ctx, cancel := context.WithCancel(ctx)
	var writer sync.WaitGroup
	defer writer.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { abort(c) })()
	defer abort(c)
	writer.Go(func() {
		tick := time.NewTicker(silence / beats)
		defer tick.Stop()
		for {
			_ = c.SetWriteDeadline(time.Now().Add(silence)) // fails on a closed connection, as the write does
			if _, err := c.Write([]byte{'.'}); err != nil {
				return // the reader sees it too, or its deadline passes
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	var b [64]byte
	for {
		_ = c.SetReadDeadline(time.Now().Add(silence))
		if _, err := c.Read(b[:]); err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			return fmt.Errorf("reading the pulse: %w", err)
		}
		heard()
	}
}

// queue is a listener whose connections are given to it.
type queue struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newQueue() *queue { return &queue{conns: make(chan net.Conn), done: make(chan struct{})} }

// put hands a connection to the server that accepts from the queue. It reports whether the server took it.
func (q *queue) put(c net.Conn) bool {
	select {
	case q.conns <- c:
		return true
	case <-q.done:
		return false
	}
}

// Accept implements [net.Listener].
func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

// Addr implements [net.Listener].
func (q *queue) Addr() net.Addr { return &net.TCPAddr{} }
