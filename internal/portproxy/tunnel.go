package portproxy

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"

	"github.com/cayhq/cay/internal/agentapi"
)

// WantsTunnel reports whether a request asks for a tunnel, see [Proxy.Tunnel].
func WantsTunnel(r *http.Request) bool {
	return r.ProtoMajor == 1 && upgrades(r) && strings.EqualFold(r.Header.Get("Upgrade"), agentapi.TunnelProtocol)
}

// Tunnel answers 101 and connects the request's connection to a port of the sandbox. Each side
// can end its half; it returns when both have ended. After an error nothing was answered; errors
// are those of [Proxy.Serve].
func (p *Proxy) Tunnel(w http.ResponseWriter, r *http.Request, t agentapi.Target, port int) error {
	done, err := p.begin(t.SandboxID)
	if err != nil {
		return err
	}
	defer done()
	dialling, cancel := context.WithTimeout(r.Context(), dialTimeout)
	inside, err := p.ports.DialPort(dialling, t, port)
	cancel()
	if err != nil {
		if r.Context().Err() != nil {
			return fmt.Errorf("dialling a port: %w", r.Context().Err())
		}
		return p.explain(err, port)
	}
	defer inside.Close()
	outside, buffered, err := (&answer{ResponseWriter: w}).Hijack()
	if err != nil {
		return fmt.Errorf("taking the connection over: %w", err)
	}
	defer outside.Close()
	// The request's context ends with the call, so it does not end them.
	defer context.AfterFunc(p.hanging, func() { _, _ = inside.Close(), outside.Close() })()

	head := "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + agentapi.TunnelProtocol + "\r\n"
	if id := w.Header().Get("X-Request-Id"); id != "" {
		head += "X-Request-Id: " + id + "\r\n"
	}
	if _, err := io.WriteString(outside, head+"\r\n"); err != nil {
		return nil // the caller has left
	}
	early, err := buffered.Reader.Peek(buffered.Reader.Buffered())
	if err != nil {
		return nil // cannot happen, since the bytes are there
	}
	if _, err := inside.Write(early); err != nil {
		return nil // the port has closed the connection, and the caller sees that
	}
	join(inside, outside)
	return nil
}

// join copies bytes both ways until both halves have ended or one failed.
func join(a, b net.Conn) {
	var wg sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Go(func() {
			from, to := way[0], way[1]
			if _, err := io.Copy(to, from); err == nil && closeWrite(to) == nil {
				return
			}
			// Half a tunnel is of no use, and the other half may wait forever.
			_, _ = from.Close(), to.Close()
		})
	}
	wg.Wait()
}

func closeWrite(c net.Conn) error {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return http.ErrNotSupported
}
