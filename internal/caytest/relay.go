package caytest

import (
	"io"
	"net"
	"sync"
	"testing"
)

// Relay carries connections from a TCP port of the loopback to a server. While it is frozen it carries nothing, and
// ends no connection, as a network does that is cut.
type Relay struct {
	listener        net.Listener
	network, target string
	all             sync.WaitGroup

	// gate is held for reading while bytes are passed on, and for writing while the relay is frozen.
	gate sync.RWMutex
}

// StartRelay starts a relay to a server, and ends it at the test's end. The test must have thawed it then.
func StartRelay(t testing.TB, network, target string) *Relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &Relay{listener: l, network: network, target: target}
	r.all.Go(r.serve)
	t.Cleanup(func() {
		l.Close()
		r.all.Wait()
	})
	return r
}

// Address returns the address that clients connect to.
func (r *Relay) Address() string { return r.listener.Addr().String() }

// Freeze stops the relay from carrying bytes, those of new connections too.
// +checklocksacquire:r.gate
func (r *Relay) Freeze() { r.gate.Lock() }

// Thaw ends a Freeze. What was sent meanwhile arrives.
// +checklocksrelease:r.gate
func (r *Relay) Thaw() { r.gate.Unlock() }

func (r *Relay) serve() {
	for {
		client, err := r.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial(r.network, r.target)
		if err != nil {
			client.Close()
			continue
		}
		r.all.Go(func() { r.carry(server, client) })
		r.all.Go(func() { r.carry(client, server) })
	}
}

// carry passes on what comes from a connection, and closes both at its end.
func (r *Relay) carry(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		if n > 0 && !r.pass(to, buffer[:n]) || err != nil {
			return
		}
	}
}

func (r *Relay) pass(to io.Writer, data []byte) bool {
	r.gate.RLock()
	defer r.gate.RUnlock()
	_, err := to.Write(data)
	return err == nil
}
