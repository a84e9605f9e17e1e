// Command bearer is the agent as it was before the handshake: it shares its port with whatever asks for SO_REUSEADDR, and
// opens to the token of the last init, which the host sends with each request.
package main

import (
	"bytes"
	"crypto/subtle"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"

	"github.com/cayhq/cay/internal/agent"
	"github.com/cayhq/cay/internal/agentapi"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	if err := agent.IgnoreSignals(); err != nil {
		return err
	}
	syscall.Umask(0o022)
	a, err := agent.New(agent.Config{})
	if err != nil {
		return err
	}
	if err := agent.Harden("/sys/fs/cgroup"); err != nil {
		return err
	}
	l, err := net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", agentapi.Port))
	if err != nil {
		return err
	}
	return http.Serve(l, &bearer{next: a.Handler()})
}

type bearer struct {
	next http.Handler

	mu sync.Mutex
	// +checklocks:mu
	token string
}

func (b *bearer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	token := b.token
	b.mu.Unlock()
	given := r.Header.Get(agentapi.TokenHeader)
	if token != "" && r.URL.Path != "/health" && subtle.ConstantTimeCompare([]byte(given), []byte(token)) != 1 {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	if r.URL.Path == "/init" && !b.init(w, r) {
		return
	}
	b.next.ServeHTTP(w, r)
}

// init takes the token out of the request: the agent behind it is to have no key.
func (b *bearer) init(w http.ResponseWriter, r *http.Request) bool {
	var req agentapi.InitRequest
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return false
	}
	if req.AccessToken != "" {
		b.mu.Lock()
		b.token = req.AccessToken
		b.mu.Unlock()
	}
	req.AccessToken = ""
	body, err := json.Marshal(req)
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return false
	}
	r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	return true
}
