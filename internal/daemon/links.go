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
	// leaveTime bounds the end of the node's session when the server stops. Without that end, the session ends with its
	// lease.
	leaveTime = 2 * time.Second
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

// errLost reports that the other servers count this one's node as lost. The server must start again: its sandboxes may
// have ended in the records.
var errLost = errors.New("the other servers count this machine as lost")

// followFleet keeps the session of this server's node and follows the other nodes until ctx ends. Then it ends the
// session, so that other servers send no calls here. failed gets errLost when the node is lost.
func (s *server) followFleet(ctx context.Context, failed chan<- error) {
	who := fleet.Identity{Cluster: s.session.Cluster, Node: s.instance, KeySum: s.fleet.node.Identity().KeySum}
	const look, extend = "reading the nodes of the fleet", "extending the lease of this server's node"
	failing := map[string]bool{}
	do := func(ctx context.Context, what string, f func(context.Context) error) {
		err := f(ctx)
		if errors.Is(err, errLost) {
			select {
			case failed <- err:
			default: // it has got an error before
			}
			return
		}
		if err != nil && !failing[what] && ctx.Err() == nil {
			s.log.ErrorContext(ctx, what, "error", err)
		}
		failing[what] = err != nil
	}
	beat := func(ctx context.Context) error {
		load, unknown := s.node.Load() // a node that does not know its load comes last, and keeps its lease
		_, err := s.nodes.Beat(ctx, who, s.fleet.session, fleet.Load{MemoryFreeMB: int(load.MemoryFree >> 20),
			Sandboxes: load.Sandboxes, Starting: load.Starting})
		return errors.Join(err, unknown)
	}
	looks, beats := time.NewTicker(lookEvery), time.NewTicker(beatEvery)
	defer looks.Stop()
	defer beats.Stop()
	do(ctx, extend, beat) // the start may have taken long
	for do(ctx, look, s.lookAtFleet); ; {
		select {
		case <-looks.C:
			do(ctx, look, s.lookAtFleet)
		case <-beats.C:
			do(ctx, extend, beat)
		case <-ctx.Done():
			closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTime)
			defer cancel()
			do(closing, "ending the session of this server's node", func(ctx context.Context) error {
				return s.nodes.Leave(ctx, who, s.fleet.session)
			})
			return
		}
	}
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
