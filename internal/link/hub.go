package link

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

const (
	// dialPatience is the time that a call waits for a data connection of a node that has a pulse. A burst of 500 calls
	// needs 500 handshakes, about 2 s of two slow CPUs.
	dialPatience = 10 * time.Second
	// retryAfter is the time after which a caller should try again. A node that was cut off is back within 2 s.
	retryAfter = 2 * time.Second

	// maxHandshakes limits the connections that have not shown a certificate yet, in all and of one origin. More than
	// the first would take memory and CPU for strangers; fewer than the second would delay bursts of nodes behind one
	// address.
	maxHandshakes, maxHandshakesOfOrigin = 1024, 64

	// maxControl limits the connections for nodes' own requests that have one key. A node needs one at a time.
	// controlIdle is the time that one may be at rest.
	maxControl  = 16
	controlIdle = 2 * time.Minute
	// maxUnknownControl limits those without a certificate, which joining nodes have, in all and of one origin. With more
	// of one origin, a stranger could keep the others from joining.
	maxUnknownControl, maxUnknownControlOfOrigin = 128, 32
	// controlWindow bounds the unread bodies of such a connection, in bytes, to what HTTP/2 demands at least.
	controlWindow = 64<<10 - 1

	// surplusAge is the age from which spare connections that are too many are closed, and pruneEvery the interval at
	// which the Hub looks for them. A shorter age would close those that the next burst needs.
	surplusAge, pruneEvery = time.Minute, 10 * time.Second

	// idleTime is the time for which a data connection is kept after a request; see nodeIdleTime.
	idleTime = 90 * time.Second
	// maxIdle is the number of data connections of a node that are kept after their requests.
	maxIdle = 256
	// continueTime is the time for which a body waits for the node's 100 Continue. A node always sends that or another
	// answer, perhaps after it has woken a sandbox.
	continueTime = time.Minute
	// maxAnswerHead bounds the head of an answer, in bytes: what a port may answer, 64 KiB, and the node's own lines.
	maxAnswerHead = 80 << 10
	// connBuffer is the size of each of the two buffers of a connection in the process, in bytes. Larger pieces bypass
	// them.
	connBuffer = 8 << 10
)

// HubConfig configures a Hub. All fields are required but Control.
type HubConfig struct {
	// TLS returns the configuration of the server's end with protocols of ALPN. It is called for each connection, so that
	// none begins with a certificate or authorities of before a renewal. It verifies certificates of clients; data
	// connections without one are refused.
	TLS func(protocols ...string) *tls.Config
	// Peer returns the node of a verified certificate, or an error if the process that names a session may not have
	// connections of the node now. It must know of every session that has begun before it is called.
	Peer func(ctx context.Context, c *x509.Certificate, session string) (node string, err error)
	// Origin returns the name under which connections from an address of TCP count together before they have shown a
	// certificate.
	Origin func(remote string) string
	// Control answers requests that nodes make themselves, over HTTP/2. It finds the certificate, if there is one, in the
	// request's TLS field.
	Control http.Handler
	// MaxConns limits the data connections of a node, spare ones included. 2000 fit its requests at full load.
	MaxConns int
	Log      *slog.Logger
}

// Hub is the replica's end: nodes dial it, and it sends requests to them. Make it with [NewHub].
type Hub struct {
	cfg       HubConfig
	protocols []string

	mu sync.Mutex
	// +checklocks:mu
	peers map[string]*peer
	// settled has the times at which a node's connections were dropped, or its pulse was taken. What Peer said before
	// holds no longer.
	// +checklocks:mu
	settled map[string]time.Time
	// +checklocks:mu
	handshakes map[string]int // by origin
	// +checklocks:mu
	handshaking int
	// +checklocks:mu
	controls map[string]int // connections for nodes' own requests, by nameOf
	// +checklocks:mu
	unknown int // of these, those without a certificate
}

// peer is a session of a node that has a pulse. Its fields are guarded by the Hub's mu, except the first four, which do
// not change.
type peer struct {
	node, session string
	pulse         *tls.Conn
	transport     *http.Transport
	ended         bool
	all           map[*conn]struct{} // data connections
	spare         []spare            // the one that is taken next is the last
	waiting       []chan *conn       // dials, in order; closed when the pulse ends
}

type spare struct {
	*conn
	since time.Time
}

// NewHub returns a Hub.
func NewHub(cfg HubConfig) *Hub {
	h := &Hub{cfg: cfg, protocols: []string{dataProtocol, pulseProtocol}, peers: map[string]*peer{},
		settled: map[string]time.Time{}, handshakes: map[string]int{}, controls: map[string]int{}}
	if cfg.Control != nil {
		h.protocols = append(h.protocols, controlProtocol)
	}
	return h
}

// Serve accepts connections of nodes until ctx ends, and then ends all connections. It returns nil if ctx ended it.
func (h *Hub) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	control, stop := h.serveControl(&all)
	defer stop()
	all.Go(func() { h.prune(ctx) })
	for {
		c, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = c.Close() // nobody uses it
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accepting connections of nodes: %w", err)
		case err != nil: // too many open files, or a connection that ended at once
			h.cfg.Log.Warn("accepting a node's connection failed", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		case !h.beginHandshake(c):
			_ = c.Close() // it has been told nothing
		default:
			all.Go(func() { h.welcome(ctx, c, control) })
		}
	}
}

// serveControl starts the server of the nodes' own requests. The connections are put into the queue.
func (h *Hub) serveControl(all *sync.WaitGroup) (_ *queue, stop func()) {
	q := newQueue()
	if h.cfg.Control == nil {
		return q, func() {}
	}
	srv := &http.Server{
		Handler:           h.cfg.Control,
		Protocols:         new(http.Protocols),
		ReadHeaderTimeout: handshakeTime,
		IdleTimeout:       controlIdle,
		HTTP2: &http.HTTP2Config{MaxReceiveBufferPerConnection: controlWindow, MaxReceiveBufferPerStream: controlWindow,
			MaxConcurrentStreams: 100},
		ConnState: func(c net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				h.endControl(c.(*tls.Conn))
			}
		},
		ErrorLog: slog.NewLogLogger(h.cfg.Log.Handler(), slog.LevelDebug),
	}
	srv.Protocols.SetHTTP2(true)
	all.Go(func() { _ = srv.Serve(q) }) // ends with the queue
	return q, func() { _ = srv.Close() }
}

// beginHandshake counts a connection that has not shown who it is. It reports whether there is room for it.
func (h *Hub) beginHandshake(c net.Conn) bool {
	from := h.origin(c)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.handshaking >= maxHandshakes || h.handshakes[from] >= maxHandshakesOfOrigin {
		return false
	}
	h.handshaking++
	h.handshakes[from]++
	return true
}

func (h *Hub) endHandshake(c net.Conn) {
	from := h.origin(c)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.handshaking--
	if h.handshakes[from]--; h.handshakes[from] == 0 {
		delete(h.handshakes, from)
	}
}

func (h *Hub) origin(c net.Conn) string { return h.cfg.Origin(c.RemoteAddr().String()) }

// welcome does the handshake of a connection and gives it to those that use it.
func (h *Hub) welcome(ctx context.Context, tcp net.Conn, control *queue) {
	c := tls.Server(tcp, h.cfg.TLS(h.protocols...))
	who, err := h.handshake(ctx, c)
	h.endHandshake(tcp)
	if err != nil {
		h.cfg.Log.Debug("a connection to the link was refused", "remote", tcp.RemoteAddr().String(), "error", err)
		abort(c)
		return
	}
	switch c.ConnectionState().NegotiatedProtocol {
	case controlProtocol:
		if !h.beginControl(c) {
			abort(c)
		} else if !control.put(c) {
			h.endControl(c)
			abort(c)
		}
	case pulseProtocol:
		h.servePulse(ctx, c, who)
	case dataProtocol:
		if !h.add(c, who) {
			abort(c)
		}
	}
}

// nameOf returns the name under which a connection for a node's own requests counts: its certificate's key, or without
// a certificate its origin.
func (h *Hub) nameOf(c *tls.Conn) (name string, known bool) {
	certs := c.ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return "from " + h.origin(c), false
	}
	sum := sha256.Sum256(certs[0].RawSubjectPublicKeyInfo)
	return "key " + string(sum[:]), true
}

// beginControl counts a connection for a node's own requests. It reports whether there is room for it.
func (h *Hub) beginControl(c *tls.Conn) bool {
	name, known := h.nameOf(c)
	most := maxControl
	if !known {
		most = maxUnknownControlOfOrigin
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.controls[name] >= most || !known && h.unknown >= maxUnknownControl {
		return false
	}
	h.controls[name]++
	if !known {
		h.unknown++
	}
	return true
}

func (h *Hub) endControl(c *tls.Conn) {
	name, known := h.nameOf(c)
	h.mu.Lock()
	defer h.mu.Unlock()
	if !known {
		h.unknown--
	}
	if h.controls[name]--; h.controls[name] == 0 {
		delete(h.controls, name)
	}
}

// caller says whose a connection is.
type caller struct {
	node, session string
	asked         time.Time // before Peer was
}

// holdsLocked reports whether what Peer has said of a connection still holds. A node may be removed, or begin another
// session, between the question and the use of its answer.
// +checklocks:h.mu
func (h *Hub) holdsLocked(who caller) bool {
	return who.asked.After(h.settled[who.node]) && time.Since(who.asked) < handshakeTime
}

// handshake finds out whose connection it is.
func (h *Hub) handshake(ctx context.Context, c *tls.Conn) (caller, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	if err := bound(c.NetConn()); err != nil {
		return caller{}, err
	}
	if err := c.HandshakeContext(ctx); err != nil {
		return caller{}, fmt.Errorf("greeting a node: %w", err)
	}
	state := c.ConnectionState()
	switch {
	case state.NegotiatedProtocol == controlProtocol:
		return caller{}, nil
	case state.NegotiatedProtocol == "":
		return caller{}, errors.New("the connection names no protocol")
	case len(state.VerifiedChains) == 0:
		return caller{}, errors.New("the connection has no certificate")
	}
	session, err := readSession(ctx, c)
	if err != nil {
		return caller{}, err
	}
	asked := time.Now()
	node, err := h.cfg.Peer(ctx, state.PeerCertificates[0], session)
	if err != nil {
		return caller{}, fmt.Errorf("finding a certificate's node: %w", err)
	}
	return caller{node, session, asked}, nil
}

// servePulse keeps a node's pulse until it ends, and with it the node's data connections.
func (h *Hub) servePulse(ctx context.Context, c *tls.Conn, who caller) {
	p := &peer{node: who.node, session: who.session, pulse: c, all: map[*conn]struct{}{}}
	p.transport = &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return h.dial(ctx, p) },
		DisableCompression:     true,
		ExpectContinueTimeout:  continueTime,
		IdleConnTimeout:        idleTime,
		MaxIdleConnsPerHost:    maxIdle,
		MaxResponseHeaderBytes: maxAnswerHead,
		ReadBufferSize:         connBuffer,
		WriteBufferSize:        connBuffer,
	}
	h.mu.Lock()
	valid, before := h.holdsLocked(who), h.peers[p.node]
	if valid {
		h.peers[p.node], h.settled[p.node] = p, time.Now()
		if before != nil {
			before.ended = true // nothing takes a connection of it any more
		}
	}
	h.mu.Unlock()
	if !valid {
		abort(c) // the node dials again
		return
	}
	if before != nil {
		h.end(before) // of a process that is gone, or the node's view of this replica is
	}
	h.cfg.Log.Info("a node is linked", "node", p.node, "remote", c.RemoteAddr().String())
	err := pulse(ctx, c, func() {})
	h.end(p)
	h.cfg.Log.Info("a node's link ended", "node", p.node, "reason", err)
}

// add takes a data connection. It reports whether the node may have it.
func (h *Hub) add(c *tls.Conn, who caller) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.peers[who.node]
	if p == nil || p.session != who.session || !h.holdsLocked(who) || len(p.all) >= h.cfg.MaxConns {
		return false
	}
	d := &conn{Conn: c}
	d.ended = func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(p.all, d)
	}
	p.all[d] = struct{}{}
	h.offerLocked(p, d)
	return true
}

// offerLocked gives a connection to the first dial that waits, or keeps it as a spare one.
// +checklocks:h.mu
func (h *Hub) offerLocked(p *peer, c *conn) {
	if len(p.waiting) > 0 {
		p.waiting[0] <- c // has room for it
		p.waiting = p.waiting[1:]
		return
	}
	p.spare = append(p.spare, spare{c, time.Now()})
}

// end ends the connections of a node's pulse.
func (h *Hub) end(p *peer) {
	h.mu.Lock()
	if h.peers[p.node] == p {
		delete(h.peers, p.node)
	}
	for _, ch := range p.waiting {
		close(ch)
	}
	all := make([]*conn, 0, len(p.all))
	for c := range p.all {
		all = append(all, c)
	}
	p.ended, p.waiting, p.spare = true, nil, nil
	h.mu.Unlock()
	abort(p.pulse)
	for _, c := range all {
		c.abort()
	}
	p.transport.CloseIdleConnections()
}

// Drop ends the connections of a node, except those of the session keep: the node was removed, or has begun another
// session. With "" it ends all. [HubConfig.Peer] decides about those that it dials from then on.
func (h *Hub) Drop(node, keep string) {
	h.mu.Lock()
	p := h.peers[node]
	if p != nil && p.session == keep {
		h.mu.Unlock()
		return
	}
	h.settled[node] = time.Now() // those whose handshake is under way were judged before
	h.mu.Unlock()
	if p != nil {
		h.end(p)
	}
}

func unreachable(node string) *fault.Error {
	return fault.New(fault.Unavailable, fault.CodeNodeUnreachable, "the server has no connection to the node %s", node).
		After(retryAfter)
}

// Dial returns a data connection to a node. Errors: Unavailable, code "node_unreachable", if the node has no pulse, or
// no data connection within 10 s.
func (h *Hub) Dial(ctx context.Context, node string) (net.Conn, error) {
	p := h.peer(node)
	if p == nil {
		return nil, unreachable(node)
	}
	return h.dial(ctx, p)
}

// peer returns the session of a node that has a pulse, or nil.
func (h *Hub) peer(node string) *peer {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.peers[node]
}

// dial returns a data connection to a session of a node, and never one to another session.
func (h *Hub) dial(ctx context.Context, p *peer) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialPatience)
	defer cancel()
	c, wait := h.take(p)
	if c != nil {
		return c, nil
	}
	select {
	case c, ok := <-wait:
		if !ok {
			return nil, unreachable(p.node)
		}
		return c, nil
	case <-ctx.Done():
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	p.waiting = slices.DeleteFunc(p.waiting, func(ch chan *conn) bool { return ch == wait })
	select {
	case c, ok := <-wait:
		if ok {
			h.offerLocked(p, c)
		}
	default:
	}
	return nil, unreachable(p.node).Because(ctx.Err())
}

// take returns a spare connection of a session, or a channel on which one will come. The channel is closed if the
// session's pulse has ended, or ends.
func (h *Hub) take(p *peer) (_ *conn, wait chan *conn) {
	var dead []*conn
	defer func() {
		for _, c := range dead {
			c.abort()
		}
	}()
	h.mu.Lock()
	defer h.mu.Unlock()
	wait = make(chan *conn, 1)
	if p.ended {
		close(wait)
		return nil, wait
	}
	for len(p.spare) > 0 {
		c := p.spare[len(p.spare)-1].conn
		p.spare = p.spare[:len(p.spare)-1]
		if !c.stirred() {
			return c, nil
		}
		dead = append(dead, c)
	}
	p.waiting = append(p.waiting, wait)
	return nil, wait
}

// Transport returns a client of a node's HTTP server. It keeps connections between requests. Errors are those of Dial,
// or say that a connection broke.
func (h *Hub) Transport(node string) http.RoundTripper { return transport{h, node} }

type transport struct {
	hub  *Hub
	node string
}

// RoundTrip implements [http.RoundTripper].
func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	p := t.hub.peer(t.node)
	if p == nil {
		if r.Body != nil {
			_ = r.Body.Close() // as each RoundTripper must
		}
		return nil, unreachable(t.node)
	}
	return p.transport.RoundTrip(r)
}

// prune closes spare connections that are too many.
func (h *Hub) prune(ctx context.Context) {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			for _, c := range h.surplus(now) {
				_ = c.Close() // the node sees it
			}
		}
	}
}

// surplus takes away the spare connections that are too many. It also forgets when nodes were settled, once no answer
// of Peer from before can hold.
func (h *Hub) surplus(now time.Time) (surplus []*conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	maps.DeleteFunc(h.settled, func(_ string, at time.Time) bool { return now.Sub(at) > 2*handshakeTime })
	for _, p := range h.peers {
		n, most := 0, len(p.spare)-wantedSpare(len(p.all)-len(p.spare))
		for ; n < most && now.Sub(p.spare[n].since) > surplusAge; n++ {
			surplus = append(surplus, p.spare[n].conn)
		}
		p.spare = slices.Delete(p.spare, 0, n)
	}
	return surplus
}
