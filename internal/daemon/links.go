package daemon

import (
	"context"
	"crypto/x509"
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/link"
	"github.com/cayhq/cay/internal/noderpc"
	"github.com/cayhq/cay/internal/pki"
)

// fleetConns limits the data connections of a node to a server. A node serves fewer requests at full load.
const fleetConns = 2000

const (
	// lookEvery is the time between two looks at the nodes of the fleet. It bounds the time after which a server links
	// itself to a new one, and obeys an order that another one was given. A shorter time reads more rows.
	lookEvery = 2 * time.Second
	// beatEvery is the time between two extensions of the lease of this server's node. With a longer one, a database that
	// is slow for some seconds would make the node look lost; a shorter one writes more.
	beatEvery = fleet.LeaseTime / 6
	// beatRetry is the time until a beat that failed is tried again. A longer one lets a lease run out for a short trouble
	// at its end; a shorter one asks a database that is away more often.
	beatRetry = time.Second
	// leaveTime bounds the end of the node's session when the server stops. If the session cannot be ended, the node is
	// lost after a while. A longer time delays the end of a server whose database is away.
	leaveTime = 10 * time.Second
)

// openHub makes what takes the connections of nodes. The room of nodes must be open.
func (s *server) openHub() {
	f := s.fleet
	f.hub = link.NewHub(link.HubConfig{TLS: f.replica.ServerConfig, Peer: s.peer, Origin: auth.Address,
		Control:  noderpc.NewHandler(noderpc.Config{Nodes: s.nodes, Failed: s.auth.Failed, Log: s.log}),
		MaxConns: fleetConns, Log: s.log})
}

// peer returns the node of a certificate, unless the process that names the session may not have connections of it.
func (s *server) peer(ctx context.Context, c *x509.Certificate, session string) (string, error) {
	who, err := noderpc.NodeOf(c)
	if err != nil {
		return "", err
	}
	return who.Node, s.nodes.Check(ctx, who, session)
}

// replicaOnly returns an error unless a certificate is that of a server of this cluster, which may send calls.
func (s *server) replicaOnly(c *x509.Certificate) error {
	id, err := pki.IdentityOf(c)
	if err == nil && (id.Role != pki.Replica || id.Cluster != s.session.Cluster) {
		err = errors.New("the certificate is not that of a server of this cluster")
	}
	return err
}

// enroll gives this server's node its key and its session, by which other servers know it.
func (s *server) enroll(ctx context.Context) error {
	return s.nodes.Enroll(ctx, s.fleet.node.Identity().KeySum, s.fleet.session)
}

// relay returns what sends calls to the servers of the fleet that can do them, nil for a server that is alone.
func (s *server) relay() *httpserver.Relay {
	if !inFleet(s.cfg) {
		return nil
	}
	return &httpserver.Relay{Self: s.instance,
		Nodes: func(ctx context.Context, needs httpserver.Needs) ([]string, error) {
			return s.nodes.Place(ctx, fleet.Needs(needs))
		},
		Forwarder: &httpserver.Forwarder{Via: s.fleet.hub.Transport, Log: s.log}, Lost: s.fleet.lostSince,
		Builder: func(ctx context.Context) (string, error) {
			node, found, err := s.db.Leader(ctx, leadBuilds)
			if err == nil && !found {
				err = fault.New(fault.Unavailable, fault.CodeNotReady, "no server builds templates yet; try again").
					After(time.Second)
			}
			return node, err
		}}
}

// lostSince returns the time since which a node is lost, and whether it is.
func (f *fleetRooms) lostSince(node string) (since time.Time, lost bool) {
	since, lost = (*f.lost.Load())[node]
	return since, lost
}

// serveFleet serves other machines until ctx ends: it takes their connections, renews this server's certificates and,
// in a fleet, serves the calls that they send, with handler. failed gets the error with which the serving ends. Call
// stop to end the serving of their calls before, which it waits for; a call has 5 s to end.
func (s *server) serveFleet(ctx context.Context, wg *sync.WaitGroup, handler http.Handler,
	failed chan<- error) (stop func()) {
	f := s.fleet
	wg.Go(func() {
		if err := f.hub.Serve(ctx, f.listener); err != nil {
			failed <- err
		}
	})
	wg.Go(func() { s.renewOwn(ctx, f.replica, pki.Replica) })
	s.log.InfoContext(ctx, "machines may join", "listen", f.listener.Addr().String(), "cluster", s.session.Cluster)
	if !inFleet(s.cfg) {
		return func() {}
	}
	wg.Go(func() { s.renewOwn(ctx, f.node, pki.Node) })
	wg.Go(func() { s.followFleet(ctx, failed) })
	node := link.NewNode(link.NodeConfig{TLS: f.node.ClientConfig, Session: f.session, MaxConns: fleetConns, Log: s.log})
	serving, end := context.WithCancel(ctx)
	ended := make(chan struct{})
	wg.Go(func() {
		defer close(ended)
		others := func() []string { return *f.others.Load() }
		if err := node.Serve(serving, others, httpserver.Admit(s.replicaOnly, handler)); err != nil {
			s.log.ErrorContext(ctx, "serving the calls of other servers", "error", err)
		}
	})
	return func() { end(); <-ended }
}

// errLost reports that the other servers count this one's node as lost. Another process must start: the sandboxes that
// this one holds may have ended in the records.
var errLost = errors.New("the other servers count this machine as lost: start the server again")

// repeat calls f, after a failure again after retry and otherwise after every, until ctx ends or f returns errLost,
// which repeat returns. It logs the first of several failures.
func (s *server) repeat(ctx context.Context, what string, every, retry time.Duration,
	f func(context.Context) error) error {
	for failing := false; ; {
		err := f(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errLost):
			return err
		case err != nil && !failing:
			s.log.ErrorContext(ctx, what, "error", err)
		}
		wait := every
		if failing = err != nil; failing {
			wait = retry
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil
		}
	}
}

// followFleet follows the other nodes until ctx ends. failed gets errLost when this server's node is lost.
func (s *server) followFleet(ctx context.Context, failed chan<- error) {
	if err := s.repeat(ctx, "reading the nodes of the fleet", lookEvery, lookEvery, s.lookAtFleet); err != nil {
		failed <- err
	}
}

// keepLease keeps the session of this server's node until the server closes. Then it ends the session, so that the
// others send no calls here and do not count the node as lost.
func (s *server) keepLease() {
	who := fleet.Identity{Cluster: s.session.Cluster, Node: s.instance, KeySum: s.fleet.node.Identity().KeySum}
	beat := func(ctx context.Context) error {
		load, unknown := s.node.Load() // a node that does not know its load comes last, and keeps its lease
		_, err := s.nodes.Beat(ctx, who, s.fleet.session, fleet.Load{MemoryFreeMB: int(load.MemoryFree >> 20),
			Sandboxes: load.Sandboxes, Starting: load.Starting})
		return errors.Join(err, unknown)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.repeat(ctx, "extending the lease of this server's node", beatEvery, beatRetry, beat) // never errLost
	}()
	s.onClose(func(closing context.Context) error {
		stop()
		<-done
		closing, cancel := context.WithTimeout(closing, leaveTime)
		defer cancel()
		_ = s.repeat(closing, "ending the session of this server's node", leaveTime, beatRetry,
			func(ctx context.Context) error {
				err := s.nodes.Leave(ctx, who, s.fleet.session)
				if err == nil || fault.Is(err, fault.Denied) { // it has another session, or none
					cancel()
					return nil
				}
				return err
			})
		return nil
	})
}

// lookAtFleet reads the nodes once: it notes where the other servers are, ends connections of nodes that may not have
// them any more, and carries out the orders to this server's node.
func (s *server) lookAtFleet(ctx context.Context) error {
	all, err := s.nodes.List(ctx)
	if err != nil {
		return err
	}
	f, found, others, lost := s.fleet, map[fleet.ID]bool{}, []string{}, map[fleet.ID]time.Time{}
	for _, n := range all {
		found[n.ID] = true
		if n.ID == s.instance {
			if !n.LostAt.IsZero() {
				return errLost
			}
			continue
		}
		if !n.LostAt.IsZero() {
			lost[n.ID] = n.LostAt
		}
		f.hub.Drop(n.ID, n.Session)
		if n.Address != "" { // also of one that seems lost: after a time without the database all do
			others = append(others, n.Address)
		}
	}
	for id := range f.linked {
		if !found[id] {
			f.hub.Drop(id, "") // it was removed
		}
	}
	f.linked = found
	f.others.Store(&others)
	f.lost.Store(&lost)
	return s.nodes.Follow(ctx)
}
