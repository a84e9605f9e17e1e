package nodetest

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/link"
)

const (
	replicaName = "api.test"
	// linkPatience limits the time in which a node links itself to the replica, which takes milliseconds on an idle
	// machine.
	linkPatience = time.Minute
)

// Linked serves the handlers of nodes, which are named by their ids, over real links on the loopback. It returns what
// forwards requests to them as a replica does.
func Linked(t testing.TB, nodes map[string]http.Handler) *httpserver.Forwarder {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	authority := caytest.NewAuthority(t)
	hub := link.NewHub(link.HubConfig{TLS: caytest.Each(authority.ServerConfig(replicaName)), MaxConns: 100, Log: quiet,
		Origin: auth.Address, Peer: func(_ context.Context, c *x509.Certificate, _ string) (string, error) {
			return c.Subject.CommonName, nil
		}})
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	until(t, func(ctx context.Context) error { return hub.Serve(ctx, l) })
	isReplica := func(c *x509.Certificate) error {
		if c.Subject.CommonName != replicaName {
			return errors.New("the certificate is not a replica's")
		}
		return nil
	}
	for id, h := range nodes {
		n := link.NewNode(link.NodeConfig{TLS: caytest.Each(authority.ClientConfig(id, replicaName)), Session: "s1",
			MaxConns: 100, Log: quiet})
		until(t, func(ctx context.Context) error {
			return n.Serve(ctx, func() []string { return []string{l.Addr().String()} }, httpserver.Admit(isReplica, h))
		})
		for deadline := time.Now().Add(linkPatience); ; time.Sleep(5 * time.Millisecond) {
			c, err := hub.Dial(t.Context(), id)
			if err == nil {
				_ = c.Close()
				break
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	}
	return &httpserver.Forwarder{Via: hub.Transport, Log: quiet}
}

// until runs something until the test's end, and waits for it.
func until(t testing.TB, run func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
