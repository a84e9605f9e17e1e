package httpserver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/link"
)

const (
	replicaName     = "api.test"
	forwardPatience = 90 * time.Second
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// stateOf returns the state of a connection whose peer has a verified certificate of the name.
func stateOf(t testing.TB, a *caytest.Authority, name string) *tls.ConnectionState {
	t.Helper()
	c, err := x509.ParseCertificate(must(a.ServerConfig(name)).Certificates[0].Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return &tls.ConnectionState{PeerCertificates: []*x509.Certificate{c}, VerifiedChains: [][]*x509.Certificate{{c}}}
}

// fleet is a replica and the nodes that it forwards to.
type fleet struct {
	hub       *link.Hub
	forwarder *Forwarder
	direct    string // address of a server with the node's handler
	replica   string // address of the replica's server
}

// startFleet links nodes, which have handlers, to a replica. The replica's server forwards all requests to the node n1;
// another server has the handler of n1 itself. Both work as the fronts do.
func startFleet(t testing.TB, nodes map[string]http.Handler) *fleet {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	a := caytest.NewAuthority(t)
	f := &fleet{hub: link.NewHub(link.HubConfig{TLS: caytest.Each(a.ServerConfig(replicaName)), MaxConns: 2000, Log: quiet,
		Origin: auth.Address, Peer: func(_ context.Context, c *x509.Certificate, _ string) (string, error) {
			return c.Subject.CommonName, nil
		}})}
	l := must(net.Listen("tcp4", "127.0.0.1:0"))
	until(t, func(ctx context.Context) error { return f.hub.Serve(ctx, l) })
	isReplica := func(c *x509.Certificate) error {
		if c.Subject.CommonName != replicaName {
			return errors.New("not a replica")
		}
		return nil
	}
	f.forwarder = &Forwarder{Via: f.hub.Transport, Log: quiet}
	for name, h := range nodes {
		n := link.NewNode(link.NodeConfig{TLS: caytest.Each(a.ClientConfig(name, replicaName)), Session: "s1",
			MaxConns: 2000, Log: quiet})
		until(t, func(ctx context.Context) error {
			return n.Serve(ctx, func() []string { return []string{l.Addr().String()} }, Admit(isReplica, front(h)))
		})
		for deadline := time.Now().Add(forwardPatience); ; time.Sleep(5 * time.Millisecond) {
			c, err := f.hub.Dial(t.Context(), name)
			if err == nil {
				c.Close()
				break
			}
			if time.Now().After(deadline) {
				t.Fatal(err)
			}
		}
	}
	f.direct = httpServer(t, front(nodes["n1"]))
	f.replica = httpServer(t, frontOf(func(w *Recorder, r *http.Request) error {
		return f.forwarder.Forward(w, r, "n1", Passage{ID: CallOf(r).ID, Front: "api"})
	}))
	return f
}

// front serves a handler as the fronts do.
func front(h http.Handler) http.Handler {
	return frontOf(func(w *Recorder, r *http.Request) error {
		clear(w.Header()) // a test compares headers, and the ids of requests differ
		h.ServeHTTP(w, r)
		return nil
	})
}

func frontOf(do func(w *Recorder, r *http.Request) error) http.Handler {
	f := New(Config{Log: slog.New(slog.DiscardHandler), Patience: Usual, PiecewiseBodies: true,
		Failed: func(string) error { return nil },
		Problem: func(w http.ResponseWriter, r *http.Request, err error) {
			status, code := http.StatusInternalServerError, ""
			if f := fault.As(err); f != nil {
				status, code = f.Kind.Status(), f.Code
			}
			Refuse(w, r, status, code, []byte(code))
		},
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { f.Serve(w, r, do) })
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

// httpServer serves a handler with the server of the fronts.
func httpServer(t testing.TB, h http.Handler) (address string) {
	t.Helper()
	srv := Server("", h, slog.New(slog.DiscardHandler))
	l := must(net.Listen("tcp4", "127.0.0.1:0"))
	done := make(chan struct{})
	go func() {
		_ = srv.Serve(l) // ends when srv is closed
		close(done)
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
	return l.Addr().String()
}
