package daemon

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/noderpc"
	"github.com/cayhq/cay/internal/pki"
	"github.com/cayhq/cay/internal/store"
)

// fleetRooms has what a server needs that other machines may join.
type fleetRooms struct {
	ca     noderpc.CA
	signer *pki.Authority
	keeper *pki.Keeper // of this server's own certificate
}

// openFleet opens the authority of the cluster, which the first server makes, and gets this server a certificate. It
// does nothing without fleet.listen.
func (s *server) openFleet(ctx context.Context) error {
	if s.cfg.Fleet.Listen == "" {
		return nil
	}
	secret, err := readSecret(s.cfg.Fleet.SecretFile)
	if err != nil {
		return err
	}
	all, err := s.db.Authorities(ctx)
	if err != nil {
		return err
	}
	if len(all) == 0 {
		first, err := s.firstAuthority(ctx, secret)
		if err != nil {
			return err
		}
		all = []store.Authority{first}
	}
	f := &fleetRooms{}
	if f.signer, err = pki.OpenAuthority(secret, all[0].Certificate, all[0].Sealed); err != nil {
		return fmt.Errorf("%w; fleet.secret_file must be the one with which the cluster began", err)
	}
	f.ca.Signer = f.signer
	for _, a := range all {
		f.ca.Trusted += a.Certificate
	}
	key, err := pki.NewKey()
	if err != nil {
		return err
	}
	request, err := pki.NewRequest(key)
	if err != nil {
		return err
	}
	chain, authorities, err := s.signOwn(f, request)
	if err != nil {
		return err
	}
	if f.keeper, err = pki.NewKeeper(key, chain, authorities); err != nil {
		return err
	}
	s.fleet = f
	return nil
}

// firstAuthority makes the authority of a new cluster, or returns the one that another server has made meanwhile.
func (s *server) firstAuthority(ctx context.Context, secret []byte) (store.Authority, error) {
	made, err := pki.NewAuthority(s.session.Cluster, s.db.Now())
	if err != nil {
		return store.Authority{}, err
	}
	sealed, err := made.Seal(secret)
	if err != nil {
		return store.Authority{}, err
	}
	sum := made.Fingerprint()
	return s.db.FirstAuthority(ctx, store.Authority{ID: fmt.Sprintf("%x", sum[:8]), Certificate: made.Certificate(),
		Sealed: sealed})
}

// signOwn returns a certificate of this server for the key of a request.
func (s *server) signOwn(f *fleetRooms, request []byte) (chain, authorities string, err error) {
	id := pki.Identity{Cluster: s.session.Cluster, Role: pki.Replica, ID: s.instance}
	chain, _, err = f.signer.Sign(request, id, s.db.Now())
	return chain, f.ca.Trusted, err
}

// readSecret returns the secret of a file that only its owner can read.
func readSecret(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("reading fleet.secret_file: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("fleet.secret_file: others may read %s: chmod 600 it", path)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading fleet.secret_file: %w", err)
	}
	secret := strings.TrimSpace(string(text))
	if len(secret) < pki.MinSecret {
		return nil, fmt.Errorf("fleet.secret_file: %s has less than %d characters: make it with openssl rand -hex 32", path,
			pki.MinSecret)
	}
	return []byte(secret), nil
}

// nodeTimeout limits the time to read a call of a node and to answer it. A call has some KiB; a longer time lets a
// stranger keep it open for longer.
const nodeTimeout = 30 * time.Second

// nodeStreams limits the concurrent calls on one connection. A node makes a few; more let a stranger make the server
// hold more bodies, of 64 KiB each.
const nodeStreams = 8

// serveFleet serves the calls of nodes, and renews this server's certificate until ctx ends. failed gets the error with
// which the serving ends.
func (s *server) serveFleet(ctx context.Context, wg *sync.WaitGroup, failed chan<- error) (*http.Server, error) {
	l, err := net.Listen("tcp", s.cfg.Fleet.Listen)
	if err != nil {
		return nil, fmt.Errorf("listening for nodes: %w", err)
	}
	handler := noderpc.NewHandler(noderpc.Config{Nodes: s.nodes, Failed: s.auth.Failed, Log: s.log})
	srv := httpserver.Server(s.cfg.Fleet.Listen, handler, s.log)
	srv.TLSConfig = s.fleet.keeper.ServerConfig("h2")
	srv.Protocols = new(http.Protocols)
	srv.Protocols.SetHTTP2(true)
	srv.ReadTimeout, srv.WriteTimeout = nodeTimeout, nodeTimeout
	srv.HTTP2.MaxConcurrentStreams = nodeStreams
	go func() { failed <- srv.ServeTLS(l, "", "") }()
	wg.Go(func() { s.renewOwn(ctx) })
	s.log.InfoContext(ctx, "machines may join", "listen", l.Addr().String(), "cluster", s.session.Cluster)
	return srv, nil
}

// renewOwn renews this server's certificate until ctx ends.
func (s *server) renewOwn(ctx context.Context) {
	renew := func(_ context.Context, request []byte) (string, string, error) { return s.signOwn(s.fleet, request) }
	failed := func(err error) { s.log.ErrorContext(ctx, "renewing this server's certificate", "error", err) }
	for {
		err := s.fleet.keeper.Run(ctx, renew, failed)
		if ctx.Err() != nil {
			return
		}
		failed(err) // the machine was paused, or its clock set: this server can sign another one
		if err := s.replaceOwn(); err != nil {
			failed(err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
	}
}

// replaceOwn signs another certificate of this server, also if its own has expired.
func (s *server) replaceOwn() error {
	request, err := s.fleet.keeper.Request()
	if err != nil {
		return err
	}
	chain, authorities, err := s.signOwn(s.fleet, request)
	if err != nil {
		return err
	}
	return s.fleet.keeper.Replace(chain, authorities)
}
