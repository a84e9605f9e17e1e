package link

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"
)

const (
	// dialTime is the time for a TCP connection to a replica. SYN packets are sent again after 1 and 3 s; a longer time
	// would delay the first connection after a cut.
	dialTime = 2 * time.Second
	// firstPause and lastPause are the times between two tries to reach a replica, of which up to a half is left out by
	// chance, so that the nodes of a replica that starts do not all come at once.
	firstPause, lastPause = 100 * time.Millisecond, time.Second
	// maxDials limits the handshakes with one replica at a time. It is below what the replica takes of one address.
	maxDials = 32
	// lookEvery is the interval at which the list of replicas is read.
	lookEvery = time.Second

	// nodeIdleTime is the time for which a node keeps a data connection after a request. It is longer than that of the
	// replica, so that a node never closes a connection that a request is about to use.
	nodeIdleTime = 5 * time.Minute
	// headTime is the time for the head of a request, once it has begun.
	headTime = 10 * time.Second
	// maxHead bounds the head of a request, in bytes: what replicas accept from callers, 32 KiB, and what they add.
	maxHead = 64 << 10
	// grace is the time that requests have to end when the node stops, and after that the time in which their handlers
	// must notice that the connection is gone.
	grace, lastGrace = 5 * time.Second, 30 * time.Second
)

// NodeConfig configures a Node. All fields are required.
type NodeConfig struct {
	// TLS returns the configuration of the client's end with protocols of ALPN: the node's certificate, the authorities
	// and the name of replicas. It is called for each connection, so that none begins with a certificate or authorities
	// of before a renewal.
	TLS func(protocols ...string) *tls.Config
	// Session names this process among those that had or have the node's certificate, in 1 to 64 bytes.
	Session string
	// MaxConns limits the data connections to each replica, as [HubConfig] does.
	MaxConns int
	Log      *slog.Logger
}

// Node is the node's end: it dials replicas, and serves their requests. Make it with [NewNode].
type Node struct{ cfg NodeConfig }

// NewNode returns a Node.
func NewNode(cfg NodeConfig) *Node { return &Node{cfg} }

// Serve keeps data connections to the replicas, which are named by host and port, and serves their requests with h
// until ctx ends. The handler finds the replica's certificate in the request's TLS field. A replica that leaves the
// list gets no new connections; it may use those that it has until it closes them. When ctx ends, requests have 5 s to
// end. Serve returns an error only if a handler does not end within 30 s after its connection did.
func (n *Node) Serve(ctx context.Context, replicas func() []string, h http.Handler) error {
	var handlers sync.WaitGroup // net/http does not wait for those that have taken over their connection
	calls := newQueue()
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			handlers.Add(1)
			defer handlers.Done()
			h.ServeHTTP(w, r)
		}),
		ReadHeaderTimeout: headTime,
		IdleTimeout:       nodeIdleTime,
		MaxHeaderBytes:    maxHead,
		ErrorLog:          slog.NewLogLogger(n.cfg.Log.Handler(), slog.LevelDebug),
	}
	var all sync.WaitGroup
	all.Go(func() { _ = srv.Serve(calls) }) // ends with the queue
	links, cut := context.WithCancel(context.WithoutCancel(ctx))
	n.follow(ctx, replicas, func(retired context.Context, address string) {
		r := &replica{node: n, address: address, calls: calls, retired: retired, all: map[*conn]bool{}}
		all.Go(func() { r.run(links) })
	})
	stopping, cancel := context.WithTimeout(links, grace)
	_ = srv.Shutdown(stopping) // an error means that requests are left, which end now
	cancel()
	cut()
	all.Wait()
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastGrace)
	defer cancel()
	if err := srv.Shutdown(ending); err != nil {
		return fmt.Errorf("waiting for requests of replicas: %w", err)
	}
	handlers.Wait()
	return nil
}

// follow starts a link to each replica that joins the list, and retires it when the replica leaves, until ctx ends.
func (n *Node) follow(ctx context.Context, replicas func() []string,
	start func(retired context.Context, address string)) {
	known := map[string]context.CancelFunc{}
	defer func() {
		for _, retire := range known {
			retire()
		}
	}()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		listed := map[string]bool{}
		for _, address := range replicas() {
			listed[address] = true
			if known[address] == nil {
				retired, retire := context.WithCancel(ctx)
				known[address] = retire
				start(retired, address)
			}
		}
		for address, retire := range known {
			if !listed[address] {
				retire()
				delete(known, address)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// replica is the link to one replica.
type replica struct {
	node    *Node
	address string
	calls   *queue
	retired context.Context // ends when no new connections are wanted

	mu sync.Mutex
	// +checklocks:mu
	all map[*conn]bool // data connections; true is a spare one
	// +checklocks:mu
	spare int
	// +checklocks:mu
	dialing int // those that are being made, or failed a moment ago
}

// run keeps the link until it is retired and unused, or ctx ends.
func (r *replica) run(ctx context.Context) {
	log := r.node.cfg.Log.With("replica", r.address)
	pause, told := firstPause, false
	for r.retired.Err() == nil {
		err := r.link(ctx, func() {
			log.Info("linked to a replica")
			pause, told = firstPause, false
		})
		if r.retired.Err() != nil {
			return
		}
		if !told {
			log.Warn("no link to a replica; trying again", "error", err)
			told = true
		}
		select {
		case <-r.retired.Done():
		case <-time.After(pause/2 + rand.N(pause/2)):
		}
		pause = min(2*pause, lastPause)
	}
}

// link makes a pulse and keeps data connections beside it until the pulse ends. Then it ends them.
func (r *replica) link(ctx context.Context, up func()) error {
	c, err := r.dial(ctx, pulseProtocol)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var keeper sync.WaitGroup
	defer keeper.Wait()
	defer r.abortAll()
	defer cancel(nil)
	// The first byte says that the replica has taken the pulse, and will take data connections.
	var first sync.Once
	return pulse(ctx, c, func() {
		first.Do(func() {
			up()
			keeper.Go(func() {
				r.keep(ctx)
				cancel(errRetired)
			})
		})
	})
}

// errRetired ends the pulse of a replica that has left the list.
var errRetired = errors.New("the replica is not listed any more")

// keep keeps spare connections until ctx ends, or the link is retired and no connection is in use.
func (r *replica) keep(ctx context.Context) {
	var conns sync.WaitGroup
	defer conns.Wait()
	changed := make(chan struct{}, 1)
	change := func() {
		select {
		case changed <- struct{}{}:
		default: // a change is to be noticed already
		}
	}
	retired := r.retired.Done()
	for {
		if r.retired.Err() != nil {
			retired = nil
			if r.abortSpare() == 0 {
				return
			}
		} else {
			for range r.missing() {
				conns.Go(func() { r.add(ctx, change) })
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-retired:
		case <-changed:
		}
	}
}

// missing returns how many connections must be dialled, and counts them as dialling.
func (r *replica) missing() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := min(wantedSpare(len(r.all)-r.spare)-r.spare-r.dialing,
		r.node.cfg.MaxConns-len(r.all)-r.dialing, maxDials-r.dialing)
	n = max(n, 0)
	r.dialing += n
	return n
}

// abortSpare ends the spare connections, and returns how many others there are.
func (r *replica) abortSpare() (others int) {
	r.mu.Lock()
	var unused []*conn
	for c, spare := range r.all {
		if spare {
			unused = append(unused, c)
		}
	}
	others = len(r.all) - len(unused) + r.dialing
	r.mu.Unlock()
	for _, c := range unused {
		c.abort()
	}
	return others
}

// abortAll ends all data connections. The context of the link has ended, so that no new ones stay.
func (r *replica) abortAll() {
	r.mu.Lock()
	all := slices.Collect(maps.Keys(r.all))
	r.mu.Unlock()
	for _, c := range all {
		c.abort()
	}
}

// add dials a data connection, waits for its first request, and gives it to the server. It calls change when the
// numbers of connections have changed.
func (r *replica) add(ctx context.Context, change func()) {
	defer change()
	began := time.Now()
	used, err := r.await(ctx, change)
	if err == nil && !r.calls.put(used) {
		used.abort() // the node stops
	}
	if err == nil {
		return
	}
	if time.Since(began) < lastPause { // the replica refuses connections: do not ask again at once
		select {
		case <-ctx.Done():
		case <-r.retired.Done():
		case <-time.After(lastPause):
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dialing--
}

// await dials a data connection and returns it when a request begins. The connection counts as dialling before, and
// after an error.
func (r *replica) await(ctx context.Context, change func()) (*conn, error) {
	tlsConn, err := r.dial(ctx, dataProtocol)
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: tlsConn}
	c.ended = func() {
		r.mu.Lock()
		if r.all[c] {
			r.spare--
			r.dialing++
		}
		delete(r.all, c)
		r.mu.Unlock()
		change()
	}
	r.mu.Lock()
	r.dialing--
	r.spare++
	r.all[c] = true
	r.mu.Unlock()
	if ctx.Err() != nil {
		c.abort() // abortAll may have run before
	}
	change()
	first := make([]byte, 1)
	if _, err := c.Conn.Read(first); err != nil {
		c.abort()
		return nil, fmt.Errorf("waiting for a request: %w", err)
	}
	c.first = first
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.all[c] {
		return nil, errors.New("the connection ended")
	}
	r.all[c] = false
	r.spare--
	return c, nil
}

// dial makes a connection to the replica.
func (r *replica) dial(ctx context.Context, protocol string) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	defer context.AfterFunc(r.retired, cancel)()
	dialer := net.Dialer{Timeout: dialTime}
	tcp, err := dialer.DialContext(ctx, "tcp", r.address)
	if err != nil {
		return nil, fmt.Errorf("dialling a replica: %w", err)
	}
	if err := bound(tcp); err != nil {
		_ = tcp.Close() // the error says enough
		return nil, err
	}
	c := tls.Client(tcp, r.node.cfg.TLS(protocol))
	if err := c.HandshakeContext(ctx); err != nil {
		_ = tcp.Close()
		return nil, fmt.Errorf("greeting a replica: %w", err)
	}
	if got := c.ConnectionState().NegotiatedProtocol; got != protocol {
		abort(c)
		return nil, fmt.Errorf("the replica speaks the protocol %q, not %q", got, protocol)
	}
	if err := sendSession(c, r.node.cfg.Session); err != nil {
		abort(c)
		return nil, err
	}
	return c, nil
}
