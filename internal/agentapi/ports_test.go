package agentapi

import (
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/fault"
)

func TestDialPortAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		code   string
	}{
		"an older agent": {http.NotFound, CodeOlderSandbox},
		"a closed port": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set(CodeHeader, CodePortClosed)
			w.WriteHeader(502)
		}, CodePortClosed},
		"no HTTP": {func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.WriteString(conn, "SSH-2.0\r\n")
			conn.Close()
		}, CodeUnreachable},
		"an endless head": {func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 1<<20)) }, CodeUnreachable},
	} {
		client, _ := serve(t, c.answer)
		conn, err := client.DialPort(t.Context(), Target{SandboxID: "sbx_a"}, 80)
		if f := fault.As(err); f == nil || f.Code != c.code || conn != nil {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
		client.mu.Lock()
		if len(client.conns) != 0 {
			t.Errorf("%s: a connection is left", name)
		}
		client.mu.Unlock()
	}
}

// The agent's own port is dialled as it is, and what is dialled is asked for with the token.
func TestDialPortAsks(t *testing.T) {
	asked := make(chan *http.Request, 1)
	client, _ := serve(t, func(w http.ResponseWriter, r *http.Request) {
		asked <- r
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\nearly")
		_ = conn.(*net.TCPConn).CloseWrite()
		_, _ = io.Copy(io.Discard, conn)
	})
	target := Target{SandboxID: "sbx_a", Token: "secret"}
	conn, err := client.DialPort(t.Context(), target, 8080)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r := <-asked
	if r.URL.String() != "/tunnel?port=8080" || r.Header.Get(TokenHeader) != "secret" || r.Header.Get("Upgrade") != TunnelProtocol {
		t.Errorf("asked %s with %v", r.URL, r.Header)
	}
	if b, err := io.ReadAll(struct{ io.Reader }{conn}); err != nil || string(b) != "early" {
		t.Errorf("read %q, %v", b, err)
	}
	agent, err := client.DialPort(t.Context(), target, Port)
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	if _, err := io.WriteString(agent, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if r := <-asked; r.URL.Path != "/health" {
		t.Errorf("asked %s", r.URL)
	}
}
