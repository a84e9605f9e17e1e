package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agentapi"
)

const (
	// strangerTime limits the life of a stranger: a connection that has not proved that it knows
	// the key, whether it is silent, stops in the middle of a handshake or asks for the health
	// again and again. The host needs a millisecond, and seconds in a sandbox that uses all its
	// CPU. A shorter time would keep the host out of such a sandbox; a longer one holds longer
	// the memory that maxStrangers limits.
	strangerTime = 10 * time.Second
	// maxStrangers limits the strangers from inside the sandbox at one time; further ones are
	// closed at once. Each costs up to maxHeader and some KB. The host's connections do not
	// count, so that processes inside cannot use up its places: the host's address is not one of
	// the sandbox's, and no process inside can send from it.
	maxStrangers = 16
	// maxHeader limits the header of a request, in bytes. The server takes 64 KiB from its
	// callers and adds little; a smaller limit would refuse requests that the server passes on.
	maxHeader = 128 << 10
)

// Listen opens the agent's port so that nothing else inside can bind it, on any IPv4 address and
// with any socket option. It clears SO_REUSEADDR, which Go sets: in gVisor two sockets with that
// option may share a port, and the one with the more specific address gets the connections.
func Listen(ctx context.Context) (*net.TCPListener, error) {
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if controlErr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 0)
		}); controlErr != nil {
			return controlErr
		}
		return err
	}}
	l, err := config.Listen(ctx, "tcp4", fmt.Sprintf("0.0.0.0:%d", agentapi.Port))
	if err != nil {
		return nil, fmt.Errorf("opening the agent's port: %w", err)
	}
	return l.(*net.TCPListener), nil
}

// Serve answers the connections of a listener until that fails. It closes the listener.
func (a *Agent) Serve(l *net.TCPListener) error {
	return a.server(a.Handler()).Serve(listener{l, a.connections})
}

func (a *Agent) server(h http.Handler) *http.Server {
	return &http.Server{
		Handler:        h,
		MaxHeaderBytes: maxHeader,
		ConnContext:    func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
}

// connections tracks the open connections and which of them are the host's: those that proved
// that they know the key, or that brought it.
type connections struct {
	patience time.Duration // strangerTime

	mu sync.Mutex
	// +checklocks:mu
	key string // "" until the host has given one; then connections must know it
	// +checklocks:mu
	open map[*connection]bool // true if the connection knows the key or brought it
	// +checklocks:mu
	strangers int // number of open connections that are counted
}

// listener accepts connections and admits them to connections.
type listener struct {
	*net.TCPListener
	connections *connections
}

// Accept implements [net.Listener]. It never waits for bytes from a connection.
func (l listener) Accept() (net.Conn, error) {
	for {
		tcp, err := l.AcceptTCP()
		if err != nil {
			return nil, err
		}
		if c := l.connections.admit(tcp); c != nil {
			return c, nil
		}
		_ = tcp.Close() // there are too many strangers from inside
	}
}

// connection is a connection to the agent. Its first read does the handshake if the connection
// begins with one.
type connection struct {
	*net.TCPConn
	owner   *connections
	counted bool        // whether it counts as a stranger
	tooLate *time.Timer // closes the connection if it is still a stranger

	begun bool   // belongs, as early, to the reading goroutine
	early []byte // bytes read already that are not a handshake
}

type connKey struct{}

// connOf returns the connection of a request, nil if the listener is not ours.
func connOf(r *http.Request) *connection {
	c, _ := r.Context().Value(connKey{}).(*connection)
	return c
}

// admit adds a new connection. It returns nil if there are too many strangers.
func (cs *connections) admit(tcp *net.TCPConn) *connection {
	c := &connection{TCPConn: tcp, owner: cs, counted: inside(tcp)}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if c.counted {
		if cs.strangers == maxStrangers {
			return nil
		}
		cs.strangers++
	}
	if cs.open == nil {
		cs.open = map[*connection]bool{}
	}
	cs.open[c] = false
	c.tooLate = time.AfterFunc(cs.patience, func() { cs.endStranger(c) })
	return c
}

// inside reports whether a process of the sandbox opened the connection. Then its source is an
// address of the sandbox, since a socket inside can be bound to no other.
func inside(tcp *net.TCPConn) bool {
	local, remote := addr(tcp.LocalAddr()), addr(tcp.RemoteAddr())
	return local.IsLoopback() || remote.IsLoopback() || local == remote
}

func addr(a net.Addr) netip.Addr { return a.(*net.TCPAddr).AddrPort().Addr().Unmap() }

// endStranger closes the connection unless it is the host's.
func (cs *connections) endStranger(c *connection) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if !cs.open[c] {
		_ = c.TCPConn.Close() // the reading goroutine fails and closes c
	}
}

// leave removes a closed connection.
func (cs *connections) leave(c *connection) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if _, ok := cs.open[c]; !ok {
		return
	}
	delete(cs.open, c)
	cs.uncountLocked(c)
}

// +checklocks:cs.mu
func (cs *connections) uncountLocked(c *connection) {
	c.tooLate.Stop()
	if c.counted {
		c.counted = false
		cs.strangers--
	}
}

// knowLocked marks a connection as the host's.
//
// +checklocks:cs.mu
func (cs *connections) knowLocked(c *connection) {
	if _, ok := cs.open[c]; ok { // it may be closed already
		cs.open[c] = true
		cs.uncountLocked(c)
	}
}

// allowed reports whether the connection may make calls other than that for the health.
func (cs *connections) allowed(c *connection) bool {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.key == "" || cs.open[c]
}

// rekey sets a new key, which came on c, and closes all other connections.
func (cs *connections) rekey(key string, c *connection) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if key == cs.key {
		return
	}
	cs.key = key
	for other := range cs.open {
		if other != c {
			cs.open[other] = false
			_ = other.TCPConn.Close() // the reading goroutine fails and closes other
		}
	}
	if c != nil {
		cs.knowLocked(c)
	}
}

// Read reads the bytes after the handshake.
func (c *connection) Read(b []byte) (int, error) {
	if !c.begun {
		c.begun = true
		if err := c.begin(); err != nil {
			return 0, err
		}
	}
	if len(c.early) > 0 {
		n := copy(b, c.early)
		c.early = c.early[n:]
		return n, nil
	}
	return c.TCPConn.Read(b)
}

// begin does the handshake of a connection that begins with one.
func (c *connection) begin() error {
	var hello agentapi.Hello
	n, err := io.ReadAtLeast(c.TCPConn, hello[:], 1)
	if err != nil {
		return err
	}
	if !agentapi.IsHello(hello[:n]) {
		c.early = hello[:n]
		return nil
	}
	if _, err := io.ReadFull(c.TCPConn, hello[n:]); err != nil {
		return err
	}
	cs := c.owner
	cs.mu.Lock()
	key := cs.key
	cs.mu.Unlock()
	if err := agentapi.Answer(c.TCPConn, hello, key); err != nil {
		return err
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if key != cs.key {
		return errors.New("the agent has another key now")
	}
	cs.knowLocked(c)
	return nil
}

// Close closes the connection.
func (c *connection) Close() error {
	c.owner.leave(c)
	return c.TCPConn.Close()
}
