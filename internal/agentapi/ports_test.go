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
		"an older agent": {http.NotFound, fault.CodeSandboxTooOld},
		"a closed port": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set(CodeHeader, fault.CodePortClosed)
			w.WriteHeader(502)
		}, fault.CodePortClosed},
		"no HTTP": {func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.WriteString(conn, "SSH-2.0\r\n")
			conn.Close()
		}, fault.CodeSandboxUnreachable},
		"an endless head": {func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 1<<20)) }, fault.CodeSandboxUnreachable},
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

// TestDialPortAsks checks that DialPort asks the agent for the port, with the token of an agent that has one.
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
	client.Bearer = func(id string) string { return map[string]string{"sbx_old": "secret"}[id] }
	target := Target{SandboxID: "sbx_old"}
	conn, err := client.DialPort(t.Context(), target, 8080)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r := <-asked
	if r.URL.String() != "/tunnel?port=8080" || r.Header.Get(TokenHeader) != "secret" ||
		r.Header.Get("Upgrade") != TunnelProtocol {
		t.Errorf("asked %s with %v", r.URL, r.Header)
	}
	if b, err := io.ReadAll(struct{ io.Reader }{conn}); err != nil || string(b) != "early" {
		t.Errorf("read %q, %v", b, err)
	}
	other, err := client.DialPort(t.Context(), Target{SandboxID: "sbx_new"}, Port)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if r := <-asked; r.URL.String() != "/tunnel?port=49983" || r.Header.Get(TokenHeader) != "" {
		t.Errorf("asked %s with %v", r.URL, r.Header)
	}
}
