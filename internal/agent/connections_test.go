package agent

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agent/account"
	"github.com/cayhq/cay/internal/agentapi"
)

// door starts a server that admits connections as the agent does, at another address than the agent's.
func door(t *testing.T, patience time.Duration) (*connections, string) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{connections: &connections{patience: patience}, settings: &account.Settings{}}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /init", func(_ http.ResponseWriter, r *http.Request) {
		a.connections.rekey(r.URL.Query().Get("key"), connOf(r))
	})
	mux.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) })
	s := a.server(a.authorise(mux))
	done := make(chan error, 1)
	go func() { done <- s.Serve(listener{l, a.connections}) }()
	t.Cleanup(func() {
		s.Close()
		<-done
		a.connections.mu.Lock()
		defer a.connections.mu.Unlock()
		if len(a.connections.open) > 0 || a.connections.strangers != 0 {
			t.Errorf("%d connections are left, %d strangers", len(a.connections.open), a.connections.strangers)
		}
	})
	return a.connections, l.Addr().String()
}

// dial connects, with a key as the host does. On this machine the test itself is a stranger until it has proved that
// it knows the key, so dial tries until there is a place for it.
func dial(t *testing.T, addr, key string) net.Conn {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("tcp4", addr)
		if err != nil {
			t.Fatal(err)
		}
		if key == "" {
			t.Cleanup(func() { c.Close() })
			return c
		}
		k, err := agentapi.Authenticate(t.Context(), c, key)
		if err == nil {
			// The answer shows that the agent has read the proof.
			if got := ask(k, "GET", "/health"); got == 200 {
				t.Cleanup(func() { k.Close() })
				return k
			}
		}
		if time.Now().After(deadline) {
			t.Fatal("no connection with the key:", err)
		}
	}
}

// ask sends a request and returns the status, 0 when the connection ended.
func ask(c net.Conn, method, path string) int {
	if _, err := fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: x\r\n\r\n", method, path); err != nil {
		return 0
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return 0
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	return resp.StatusCode
}

func TestConnections(t *testing.T) {
	_, addr := door(t, time.Minute)
	first, idle := dial(t, addr, ""), dial(t, addr, "")
	if got := ask(idle, "GET", "/envs"); got != 200 {
		t.Errorf("before there is a key: %d", got)
	}
	if got := ask(first, "POST", "/init?key=one"); got != 200 {
		t.Errorf("init: %d", got)
	}
	if got := ask(idle, "GET", "/envs"); got != 0 {
		t.Errorf("a connection from before the key answers %d", got)
	}
	if got := ask(first, "GET", "/envs"); got != 200 {
		t.Errorf("the connection that brought the key: %d", got)
	}
	stranger := dial(t, addr, "")
	for path, want := range map[string]int{
		"/health": 200, "/envs": 401, "/files?path=x&signature=v1_x": 401, "//health": 401, "/health/": 401,
	} {
		if got := ask(stranger, "GET", path); got != want {
			t.Errorf("a stranger asks for %s: %d, want %d", path, got, want)
		}
	}
	if got := ask(stranger, "POST", "/init?key=mine"); got != 401 {
		t.Errorf("a stranger gives a key: %d", got)
	}
	known := dial(t, addr, "one")
	if got := ask(known, "GET", "/envs"); got != 200 {
		t.Errorf("with the key: %d", got)
	}
	if got := ask(known, "POST", "/init?key=two"); got != 200 {
		t.Errorf("another key: %d", got)
	}
	if got := ask(first, "GET", "/envs"); got != 0 {
		t.Errorf("a connection under the former key answers %d", got)
	}
	if got := ask(known, "GET", "/envs"); got != 200 {
		t.Errorf("the connection that brought the other key: %d", got)
	}
	c, err := net.Dial("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := agentapi.Authenticate(t.Context(), c, "one"); err == nil {
		t.Error("the former key opens a connection")
	}
}

// TestStrangers opens many connections that do not prove that they know the key. The agent limits their number and
// time, whatever they send, and still admits the host.
func TestStrangers(t *testing.T) {
	cs, addr := door(t, 300*time.Millisecond)
	cs.rekey("key", nil)
	known := dial(t, addr, "key")
	if got := ask(known, "GET", "/envs"); got != 200 {
		t.Fatalf("with the key: %d", got)
	}
	said := []string{"", "\x00", "\x00cay/1\r\n", "\x00cay/1\r\n0123456789abcdef",
		"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", "GET /health HTTP/1.1\r\nHost: x\r\nA: ",
		"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", "\x00nonsense that is no handshake at all"}
	var all []net.Conn
	for i := range 3 * maxStrangers {
		c := dial(t, addr, "")
		_, _ = io.WriteString(c, said[i%len(said)]) // fails on a connection beyond the limit, which is closed
		all = append(all, c)
	}
	cs.mu.Lock()
	if cs.strangers > maxStrangers {
		t.Errorf("%d strangers at once", cs.strangers)
	}
	cs.mu.Unlock()
	for i, c := range all {
		_ = c.SetReadDeadline(time.Now().Add(30 * time.Second)) // far above the limit of 300 ms
		if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Errorf("%q holds its connection", said[i%len(said)])
		}
	}
	if got := ask(known, "GET", "/envs"); got != 200 {
		t.Errorf("the host's connection answers %d", got)
	}
	if got := ask(dial(t, addr, "key"), "GET", "/envs"); got != 200 {
		t.Errorf("another one of the host's answers %d", got)
	}
}
