package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agent/file"
	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

const (
	// maxTunnels limits the tunnels of a sandbox. Each costs the agent two connections,
	// two goroutines and two small buffers, some 50 KB of the sandbox's memory.
	maxTunnels = 1000

	// dialTimeout limits the wait for a service whose queue of connections is full; a
	// shorter one would refuse a busy service. A port without a listener refuses at once.
	dialTimeout = 10 * time.Second

	// smallRelay and largeRelay are the sizes of a tunnel's buffers, in bytes. A tunnel
	// reads into a small buffer until one read fills it, then into a large one until a
	// read gets less than smallRelay: many tunnels are idle, few move much, and a system
	// call costs tens of microseconds in gVisor.
	smallRelay = 8 << 10
	largeRelay = file.CopyBuffer
)

// tunnels connects the host to ports of the sandbox.
type tunnels struct{ open atomic.Int64 }

// serve answers GET /tunnel. It connects to the port and turns the connection of the request
// into a tunnel to it, in which each side can close its half.
func (t *tunnels) serve(w http.ResponseWriter, r *http.Request) {
	port, err := strconv.ParseUint(r.URL.Query().Get("port"), 10, 16)
	if err != nil || port == 0 {
		answer.Error(w, answer.Bad("port %q is not a port", r.URL.Query().Get("port")))
		return
	}
	if r.Header.Get("Upgrade") != agentapi.TunnelProtocol {
		answer.Error(w, answer.Bad("a tunnel needs Upgrade: %s", agentapi.TunnelProtocol))
		return
	}
	if t.open.Add(1) > maxTunnels {
		t.open.Add(-1)
		answer.Error(w, answer.New(fault.CodeTooManyConnections,
			"the sandbox has %d connections to its ports already", maxTunnels))
		return
	}
	defer t.open.Add(-1)
	inside, err := dialInside(r.Context(), int(port))
	if err != nil {
		answer.Error(w, err)
		return
	}
	defer inside.Close()
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		answer.Error(w, fmt.Errorf("taking the connection over: %w", err))
		return
	}
	defer conn.Close()
	outside, ok := conn.(*net.TCPConn)
	if !ok {
		outside = conn.(*connection).TCPConn // net/http returns the accepted connection
	}
	const head = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n" +
		"Upgrade: " + agentapi.TunnelProtocol + "\r\n\r\n"
	if _, err := io.WriteString(outside, head); err != nil {
		return // the client has gone
	}
	early, err := buffered.Reader.Peek(buffered.Reader.Buffered())
	if err != nil {
		return
	}
	if _, err := inside.Write(early); err != nil {
		return
	}
	join(outside, inside)
}

// dialInside connects to a port of the sandbox. It tries the loopback addresses first, on
// which most services listen, and then the sandbox's other addresses.
func dialInside(ctx context.Context, port int) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	tried := map[string]bool{}
	var first error
	for _, host := range append([]string{"127.0.0.1", "::1"}, ownAddresses()...) {
		if tried[host] {
			continue
		}
		tried[host] = true
		var d net.Dialer
		conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		if first == nil {
			first = err
		}
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, syscall.EMFILE) {
			break
		}
	}
	switch {
	case errors.Is(first, syscall.ECONNREFUSED):
		return nil, answer.New(fault.CodePortClosed, "nothing listens on port %d", port)
	case ctx.Err() != nil:
		return nil, answer.New(fault.CodePortClosed, "the program that listens on port %d accepts no connection", port)
	}
	return nil, fmt.Errorf("connecting to port %d: %w", port, first)
}

// ownAddresses returns the addresses of the sandbox without those of the loopback.
func ownAddresses() []string {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil // the loopback suffices for most services
	}
	var own []string
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			own = append(own, n.IP.String())
		}
	}
	return own
}

// join carries bytes both ways until both halves have ended or one fails.
func join(a, b *net.TCPConn) {
	var wg sync.WaitGroup
	for _, way := range [][2]*net.TCPConn{{a, b}, {b, a}} {
		wg.Go(func() {
			from, to := way[0], way[1]
			if err := relay(to, from); err == nil && to.CloseWrite() == nil {
				return
			}
			// The other half alone is of no use and may wait without end.
			_, _ = from.Close(), to.Close()
		})
	}
	wg.Wait()
}

var smallBuffers = sync.Pool{New: func() any { return new([smallRelay]byte) }}

// relay copies until the end of from.
func relay(to, from *net.TCPConn) error {
	small := smallBuffers.Get().(*[smallRelay]byte)
	defer smallBuffers.Put(small)
	for {
		n, err := from.Read(small[:])
		if n > 0 {
			if _, err := to.Write(small[:n]); err != nil {
				return err
			}
		}
		if err == nil && n == len(small) {
			err = relayMuch(to, from)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// relayMuch copies with a large buffer. It returns nil when a read gets less than smallRelay.
func relayMuch(to, from *net.TCPConn) error {
	large := file.CopyBuffers.Get().(*[largeRelay]byte)
	defer file.CopyBuffers.Put(large)
	for {
		n, err := from.Read(large[:])
		if n > 0 {
			if _, err := to.Write(large[:n]); err != nil {
				return err
			}
		}
		if err != nil || n < smallRelay {
			return err
		}
	}
}
