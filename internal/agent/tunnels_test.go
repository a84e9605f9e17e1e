package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

// tunnelled returns a client of tunnels that run in this process, and the tunnels.
func tunnelled(t *testing.T) (*agentapi.Client, *tunnels) {
	t.Helper()
	tun := &tunnels{}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /tunnel", tun.serve)
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	return agentapi.NewClient(func(ctx context.Context, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", srv.Listener.Addr().String())
	}), tun
}

// echo starts a server that sends the bytes of a connection back once the client has closed its half.
func echo(t *testing.T, network, address string) (port int) {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.WriteString(c, "hello ") // before the client has sent anything
				b, _ := io.ReadAll(c)
				_, _ = c.Write(b)
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

var sbx = agentapi.Target{SandboxID: "sbx_a", Run: "1"}

func TestTunnel(t *testing.T) {
	c, tun := tunnelled(t)
	services := map[string]int{"loopback": echo(t, "tcp4", "127.0.0.1:0"), "everywhere": echo(t, "tcp", ":0")}
	if own := ownAddresses(); len(own) > 0 {
		services["own address"] = echo(t, "tcp", net.JoinHostPort(own[0], "0"))
	}
	if _, err := net.Listen("tcp6", "[::1]:0"); err == nil {
		services["loopback of IPv6"] = echo(t, "tcp6", "[::1]:0")
	}
	much := bytes.Repeat([]byte("0123456789abcdef"), 1<<17)
	for name, port := range services {
		for _, sent := range [][]byte{nil, []byte("x"), much} {
			conn, err := c.DialPort(t.Context(), sbx, port)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			go func() {
				_, _ = conn.Write(sent)
				_ = conn.(interface{ CloseWrite() error }).CloseWrite()
			}()
			got, err := io.ReadAll(conn)
			if err != nil || string(got) != "hello "+string(sent) {
				t.Errorf("%s: sent %d bytes, got %d, %v", name, len(sent), len(got), err)
			}
			conn.Close()
		}
	}
	for deadline := time.Now().Add(10 * time.Second); tun.open.Load() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d tunnels are left", tun.open.Load())
		}
	}
}

func TestTunnelRefused(t *testing.T) {
	c, tun := tunnelled(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().(*net.TCPAddr).Port
	l.Close()
	open := echo(t, "tcp4", "127.0.0.1:0")
	for name, try := range map[string]struct {
		port int
		code string
	}{"closed": {closed, fault.CodePortClosed}, "none": {0, "invalid_port"}, "too high": {65536, "invalid_port"}} {
		if _, err := c.DialPort(t.Context(), sbx, try.port); fault.As(err) == nil || fault.As(err).Code != try.code {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.DialPort(ctx, sbx, open); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	tun.open.Store(maxTunnels)
	if _, err := c.DialPort(t.Context(), sbx, open); !fault.Is(err, fault.Exhausted) {
		t.Errorf("too many: %v", err)
	}
	if n := tun.open.Load(); n != maxTunnels {
		t.Errorf("%d tunnels after one was refused", n)
	}

	w := httptest.NewRecorder()
	(&tunnels{}).serve(w, httptest.NewRequest("GET", "/tunnel?port=80", nil))
	if w.Code != 400 || !strings.Contains(w.Body.String(), "Upgrade") {
		t.Errorf("without an upgrade: %d %s", w.Code, w.Body)
	}
}

// TestTunnelBreaks breaks one side of a tunnel, which breaks the other.
func TestTunnelBreaks(t *testing.T) {
	c, tun := tunnelled(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, cut := range map[string]func(outside net.Conn, inside *net.TCPConn){
		"the sandbox goes":  func(net.Conn, *net.TCPConn) { c.Drop(sbx.SandboxID) },
		"the caller goes":   func(out net.Conn, _ *net.TCPConn) { out.Close() },
		"the service fails": func(_ net.Conn, in *net.TCPConn) { _ = in.SetLinger(0); in.Close() },
	} {
		out, err := c.DialPort(t.Context(), sbx, l.Addr().(*net.TCPAddr).Port)
		if err != nil {
			t.Fatal(err)
		}
		in, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		cut(out, in.(*net.TCPConn))
		for side, conn := range map[string]net.Conn{"outside": out, "inside": in} {
			_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second)) // fails on a closed connection
			if _, err := conn.Read(make([]byte, 1)); err == nil || isTimeout(err) {
				t.Errorf("%s: reading %s: %v", name, side, err)
			}
		}
		in.Close()
		out.Close()
	}
	for deadline := time.Now().Add(10 * time.Second); tun.open.Load() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d tunnels are left", tun.open.Load())
		}
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}
