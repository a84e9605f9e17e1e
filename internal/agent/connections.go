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
	// strangerTime bounds the life of a connection that has not proved itself, whatever it does:
	// says nothing, stops in the middle of a handshake, or asks for the health again and
	// again. The host needs a millisecond, and seconds in a sandbox that burns all its CPU; a
	// shorter time would keep it out of such a one, a longer one holds more of the memory that
	// maxStrangers bounds.
	strangerTime = 10 * time.Second
	// maxStrangers is how many such connections from inside the sandbox there are at once; more
	// are closed as they come. Each costs up to maxHeader and some KB. Those of the host are not
	// counted, so that processes inside cannot use up its places: its address is none of the
	// sandbox's, and no process inside can send from it.
	maxStrangers = 16
	// maxHeader bounds the header of a request, bytes. The server takes 64 KiB from its callers,
	// and adds little; less would refuse what it lets through.
	maxHeader = 128 << 10
)

// Listen opens the agent's port so that nothing else inside can bind it, on no address of IPv4
// and with no option of its own. Go asks for SO_REUSEADDR by itself, and two that ask for it may
// share a port in gVisor, where the more specific address gets the connections.
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

// connections knows which connections the host has opened: those that proved that they know the
// key, or that brought it.
type connections struct {
	patience time.Duration // strangerTime

	mu sync.Mutex
	// +checklocks:mu
	key string // "" until the host has given one; then connections must know it
	// +checklocks:mu
	open map[*connection]bool // whether it knows the key, or brought it
	// +checklocks:mu
	strangers int // of open, those that are counted
}

// listener gives its connections to connections.
type listener struct {
	*net.TCPListener
	connections *connections
}

// Accept implements [net.Listener]. It never waits for what a connection sends.
func (l listener) Accept() (net.Conn, error) {
	for {
		tcp, err := l.AcceptTCP()
		if err != nil {
			return nil, err
		}
		if c := l.connections.admit(tcp); c != nil {
			return c, nil
		}
		_ = tcp.Close() // one too many from inside
	}
}

// connection is one with the agent. Its first read is the handshake, if it begins with one.
type connection struct {
	*net.TCPConn
	owner   *connections
	counted bool        // as a stranger, while it is one
	tooLate *time.Timer // closes a stranger

	begun bool   // of the goroutine that reads, as early
	early []byte // read already, and no handshake
}

type connKey struct{}

// connOf returns the connection that a request came on, nil if it came on none of ours.
func connOf(r *http.Request) *connection {
	c, _ := r.Context().Value(connKey{}).(*connection)
	return c
}

// admit takes a new connection; nil if it is one too many.
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

// inside reports whether a process of the sandbox opened the connection: its source is then an
// address of the sandbox, since a socket can be bound to no other.
func inside(tcp *net.TCPConn) bool {
	local, remote := addr(tcp.LocalAddr()), addr(tcp.RemoteAddr())
	return local.IsLoopback() || remote.IsLoopback() || local == remote
}

func addr(a net.Addr) netip.Addr { return a.(*net.TCPAddr).AddrPort().Addr().Unmap() }

// endStranger closes the connection, unless it is the host's.
func (cs *connections) endStranger(c *connection) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if !cs.open[c] {
		_ = c.TCPConn.Close() // whoever reads from it does the rest
	}
}

// leave takes a connection that is closed out of the books.
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

// knowLocked makes it a connection of the host's.
//
// +checklocks:cs.mu
func (cs *connections) knowLocked(c *connection) {
	if _, ok := cs.open[c]; ok { // it may be closed already
		cs.open[c] = true
		cs.uncountLocked(c)
	}
}

// allowed reports whether the connection may ask for more than the health.
func (cs *connections) allowed(c *connection) bool {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.key == "" || cs.open[c]
}

// rekey takes a new key, which came on c, and ends all connections that were opened under the
// former one, or under none.
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
			_ = other.TCPConn.Close() // whoever reads from it does the rest
		}
	}
	if c != nil {
		cs.knowLocked(c)
	}
}

// Read reads what comes after the handshake.
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
