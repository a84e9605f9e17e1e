package daemon

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/link"
	"github.com/cayhq/cay/internal/noderpc"
	"github.com/cayhq/cay/internal/pki"
	"github.com/cayhq/cay/internal/store"
)

// fleetRooms has what a server needs that other machines may join.
type fleetRooms struct {
	ca       noderpc.CA
	signer   *pki.Authority
	listener net.Listener
	hub      *link.Hub
	replica  *pki.Keeper // of the certificate that nodes see
	stop     func()      // ends the serving of other servers' calls

	// These are set in a fleet, where this server's node serves the calls that other servers get.
	node    *pki.Keeper // of the certificate that other servers see
	session string
	address string                   // at which other servers reach this one
	others  atomic.Pointer[[]string] // addresses of the other servers
	lost    atomic.Pointer[map[fleet.ID]time.Time]
	linked  map[fleet.ID]bool // nodes that a look has found before; used by one goroutine
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
	if f.replica, err = s.newKeeper(f, pki.Replica); err != nil {
		return err
	}
	if f.listener, err = net.Listen("tcp", s.cfg.Fleet.Listen); err != nil {
		return fmt.Errorf("listening for other machines: %w", err)
	}
	s.onClose(func(context.Context) error { _ = f.listener.Close(); return nil }) // also of one that is served
	s.fleet = f
	if !inFleet(s.cfg) {
		return nil
	}
	f.session, f.address = rand.Text(), cmp.Or(s.cfg.Fleet.Advertise, f.listener.Addr().String())
	f.others.Store(new([]string))
	f.lost.Store(new(map[fleet.ID]time.Time))
	f.linked = map[fleet.ID]bool{}
	f.node, err = s.newKeeper(f, pki.Node)
	return err
}

// newKeeper returns a certificate of this server in a role, for a new key.
func (s *server) newKeeper(f *fleetRooms, role pki.Role) (*pki.Keeper, error) {
	key, err := pki.NewKey()
	if err != nil {
		return nil, err
	}
	request, err := pki.NewRequest(key)
	if err != nil {
		return nil, err
	}
	chain, authorities, err := s.signOwn(f, role, request)
	if err != nil {
		return nil, err
	}
	return pki.NewKeeper(key, chain, authorities)
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

// signOwn returns a certificate of this server in a role for the key of a request.
func (s *server) signOwn(f *fleetRooms, role pki.Role, request []byte) (chain, authorities string, err error) {
	id := pki.Identity{Cluster: s.session.Cluster, Role: role, ID: s.instance}
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

// renewOwn renews a certificate of this server until ctx ends.
func (s *server) renewOwn(ctx context.Context, k *pki.Keeper, role pki.Role) {
	renew := func(_ context.Context, request []byte) (string, string, error) {
		return s.signOwn(s.fleet, role, request)
	}
	failed := func(err error) {
		s.log.ErrorContext(ctx, "renewing this server's certificate", "role", role, "error", err)
	}
	for {
		err := k.Run(ctx, renew, failed)
		if ctx.Err() != nil {
			return
		}
		failed(err) // the machine was paused, or its clock set: this server can sign another one
		if err := s.replaceOwn(k, role); err != nil {
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
func (s *server) replaceOwn(k *pki.Keeper, role pki.Role) error {
	request, err := k.Request()
	if err != nil {
		return err
	}
	chain, authorities, err := s.signOwn(s.fleet, role, request)
	if err != nil {
		return err
	}
	return k.Replace(chain, authorities)
}
