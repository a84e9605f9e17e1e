package egressproxy

import (
	"net"
	"net/http"
	"sync"
)

// handedOver is a listener that accepts the connections sent on a channel.
type handedOver struct {
	conns <-chan net.Conn
	done  <-chan struct{}
}

func (l *handedOver) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (*handedOver) Close() error   { return nil }
func (*handedOver) Addr() net.Addr { return &net.TCPAddr{} }

// watched is a connection that closes gone when it is closed.
type watched struct {
	net.Conn
	once sync.Once
	gone chan struct{}
}

func watch(c net.Conn) *watched { return &watched{Conn: c, gone: make(chan struct{})} }

func (w *watched) Close() error {
	w.once.Do(func() { close(w.gone) })
	return w.Conn.Close()
}

// serveConn serves one connection and returns when it is closed.
func serveConn(server *http.Server, c net.Conn) {
	w := watch(c)
	conns := make(chan net.Conn, 1)
	conns <- w
	// Serve returns net.ErrClosed when the connection is closed.
	_ = server.Serve(&handedOver{conns: conns, done: w.gone})
}
