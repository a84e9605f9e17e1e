// Package portproxy carries traffic to the ports of sandboxes: HTTP/1.1 and HTTP/2 requests,
// WebSockets and other upgrades, server-sent events, bodies of any size, and raw TCP. It also
// knows the host names of ports ([Names]) and the signatures that open them for a while
// ([Signer]).
//
// It authorises no caller and wakes no sandbox: the caller of [Proxy.Serve] or [Proxy.Tunnel] has
// decided that the request may pass, and holds a lease of the sandbox until the call returns. The
// package promises that no key, signature or token of cay's reaches a sandbox in the head of a
// request, that no header of an answer has an effect beyond the port's own origin, and that
// bodies are streamed through a few buffers.
//
// A [Proxy] is safe for concurrent use. A connection to a port belongs to one run of a sandbox
// and breaks with it. A returned error means that nothing was answered yet; a later failure
// breaks the caller's connection. In both cases nothing is left.
package portproxy

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

const (
	// maxOpen is the number of requests and tunnels that one sandbox may have at a time. The
	// agent accepts twice as many connections, since some are idle between two requests.
	maxOpen = 500

	// dialTimeout is the time for a connection to a port. It is longer than the time that the
	// agent waits for the port; a shorter one would hide the agent's error.
	dialTimeout = 15 * time.Second

	// Limits of idle connections. Each blocks a server that serves one connection at a time, so
	// they are few and soon closed; a new one costs a few ms.
	idleTimeout = 10 * time.Second
	maxIdle     = 16 // to one port
	maxIdleAll  = 512

	// buffer is the number of bytes of a body that are moved at once. Below 64 KiB the throughput
	// falls; more only takes memory for each request.
	buffer = 64 << 10

	// connBuffer is the size in bytes of each of the two buffers of a connection. Larger pieces
	// bypass them.
	connBuffer = 8 << 10

	// maxAnswerHeader bounds the header of an answer, in bytes, so that a server inside cannot
	// make the host hold more. Proxies in front of most servers accept 8 KiB or less.
	maxAnswerHeader = 64 << 10

	// streamWindow is the number of bytes of an HTTP/2 answer that may arrive before the caller
	// reads them.
	streamWindow = buffer

	// hangupGrace is the time that requests in flight get when the server stops. Upgrades and
	// tunnels have no end of their own, so they end at once.
	hangupGrace = 3 * time.Second
)

// Dialer connects to ports. [*agentapi.Client] implements it.
type Dialer interface {
	DialPort(ctx context.Context, t agentapi.Target, port int) (net.Conn, error)
}

// Destination identifies the port that a request goes to.
type Destination struct {
	Target agentapi.Target // the sandbox, which the caller has leased
	Port   int
	// Path is the path requested inside, escaped as in a request; "" keeps the request's own.
	Path string
	// Prefix precedes Path in the URL outside. The server inside gets it as X-Forwarded-Prefix,
	// and redirects to other paths get it back.
	Prefix string
	Host   string // the Host sent to the port; "" keeps the request's own
	// Shared reports whether the port shares its origin with others, as all ports do that are
	// reached at the API's own host. Headers that speak for a whole origin are then removed from
	// answers.
	Shared bool
}

// Proxy carries requests to ports. Make it with [New].
type Proxy struct {
	ports   Dialer
	reverse *httputil.ReverseProxy
	h1      *http.Transport
	h2c     *http.Transport

	closing context.Context // done when all requests have to end
	close   context.CancelFunc
	hanging context.Context // done when upgrades and tunnels have to end
	hangup  context.CancelFunc

	mu sync.Mutex
	// +checklocks:mu
	open map[string]int // requests and tunnels by sandbox ID; none has 0
	// +checklocks:mu
	over chan struct{} // nil until Close; closed when open is empty after that
}

// New returns a Proxy. Close it.
func New(ports Dialer, log *slog.Logger) *Proxy {
	p := &Proxy{ports: ports, open: map[string]int{}}
	p.closing, p.close = context.WithCancel(context.Background())
	p.hanging, p.hangup = context.WithCancel(p.closing)
	p.h1, p.h2c = p.transport(), p.transport()
	dial := p.h1.DialContext
	p.h1.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &idleConn{Conn: conn}, nil
	}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	p.h2c.Protocols = protocols
	p.h2c.HTTP2 = &http.HTTP2Config{MaxReceiveBufferPerStream: streamWindow}
	p.reverse = &httputil.ReverseProxy{
		Rewrite:        rewrite,
		Transport:      p,
		FlushInterval:  -1, // pass on each piece at once; it may be the last one for a while
		BufferPool:     &buffers{},
		ModifyResponse: answered,
		ErrorHandler:   func(_ http.ResponseWriter, r *http.Request, err error) { passageOf(r).err = err },
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug), // mostly of callers that left
	}
	return p
}

func (p *Proxy) transport() *http.Transport {
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, dialTimeout)
			defer cancel()
			to := ctx.Value(passageKey{}).(*passage).to
			return p.ports.DialPort(ctx, to.Target, to.Port)
		},
		DisableCompression:     true, // pass encodings through unchanged
		MaxIdleConns:           maxIdleAll,
		MaxIdleConnsPerHost:    maxIdle,
		IdleConnTimeout:        idleTimeout,
		MaxResponseHeaderBytes: maxAnswerHeader,
		ExpectContinueTimeout:  time.Second,
		ReadBufferSize:         connBuffer,
		WriteBufferSize:        connBuffer,
	}
}

// RoundTrip implements [http.RoundTripper] for the reverse proxy. It sends gRPC requests over
// HTTP/2, which they need; it sends all others over HTTP/1.1, which every server speaks.
func (p *Proxy) RoundTrip(r *http.Request) (*http.Response, error) {
	transport := p.h1
	if passageOf(r).grpc {
		transport = p.h2c
	} else {
		r = r.WithContext(reuseIdleOnly(agentapi.WithHeads(r.Context())))
		r.Close = r.Close || mayStayUnread(r)
	}
	resp, err := transport.RoundTrip(r)
	if err == nil && resp.StatusCode < http.StatusOK && resp.StatusCode != http.StatusSwitchingProtocols {
		_ = resp.Body.Close() // the answer is refused
		return nil, fmt.Errorf("%d is not a status of HTTP", resp.StatusCode)
	}
	return resp, err
}

// passage holds what the proxy knows of one request while it carries it.
type passage struct {
	to     Destination
	grpc   bool
	signed bool  // the URL has a signature
	err    error // set if there is no answer
}

type passageKey struct{}

func passageOf(r *http.Request) *passage { return r.Context().Value(passageKey{}).(*passage) }

// Serve passes a request on and its answer back, and returns when both have ended, upgrades
// included. After an error nothing was answered. Errors:
//
//   - Upstream, code "port_closed" if nothing listens on the port, or [CodeNoAnswer] if the
//     server there does not answer with HTTP;
//   - Exhausted, code "too_many_connections";
//   - Denied, code [CodeWorker], for the script of a service worker at a shared origin;
//   - Invalid, code [CodeSecret], if the path or method holds a secret of cay's;
//   - those of [agentapi.Client.DialPort];
//   - the error of the request's context if the caller left.
//
// If the connection breaks after the answer has begun, Serve panics with [http.ErrAbortHandler],
// as net/http wants it.
func (p *Proxy) Serve(w http.ResponseWriter, r *http.Request, to Destination) error {
	done, err := p.begin(to.Target.SandboxID)
	if err != nil {
		return err
	}
	defer done()
	if err := refuse(r, to); err != nil {
		return err
	}
	over := p.closing
	if upgrades(r) {
		over = p.hanging
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(over, cancel)()

	pass := &passage{to: to, signed: r.URL.Query().Has(TokenParam), grpc: r.ProtoMajor == 2 &&
		strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc")}
	// A service may begin its answer before it has read the whole request; without this net/http
	// would then discard the rest of it. HTTP/2 writers do not need it, and fail.
	_ = http.NewResponseController(w).EnableFullDuplex()
	answer := &answer{ResponseWriter: w, shared: to.Shared}
	p.reverse.ServeHTTP(answer, r.WithContext(context.WithValue(ctx, passageKey{}, pass)))
	switch {
	case pass.err == nil:
		CleanTrailers(w.Header(), to.Shared)
		return nil
	case answer.begun:
		panic(http.ErrAbortHandler)
	case r.Context().Err() != nil:
		return fmt.Errorf("passing a request on: %w", r.Context().Err())
	}
	return p.explain(pass.err, to.Port)
}

// explain turns a failure before any answer into an error for the caller.
func (p *Proxy) explain(err error, port int) error {
	if p.hanging.Err() != nil {
		return fault.New(fault.Unavailable, fault.CodeInterrupted, "the server stops").Because(err)
	}
	if fault.As(err) != nil {
		return err
	}
	return fault.New(fault.Upstream, fault.CodePortNoAnswer,
		"the server on port %d did not answer with HTTP", port).Because(err)
}

// begin counts a request to a sandbox; done ends it.
func (p *Proxy) begin(sandboxID string) (done func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hanging.Err() != nil {
		return nil, fault.New(fault.Unavailable, fault.CodeInterrupted, "the server stops")
	}
	if p.open[sandboxID] >= maxOpen {
		return nil, fault.New(fault.Exhausted, fault.CodeTooManyConnections,
			"this sandbox already has %d requests and connections to its ports", maxOpen)
	}
	p.open[sandboxID]++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.open[sandboxID]--; p.open[sandboxID] == 0 {
			delete(p.open, sandboxID)
		}
		if len(p.open) == 0 && p.over != nil {
			close(p.over) // once, since none begins any more
		}
	}, nil
}

// Hangup ends upgrades and tunnels at once, and other requests after a short while, and lets no
// new ones begin. It does not wait; [Proxy.Close] does.
func (p *Proxy) Hangup() {
	p.mu.Lock() // so that each request is either counted or refused
	p.hangup()
	p.mu.Unlock()
	time.AfterFunc(hangupGrace, p.close)
}

// Close ends all requests and tunnels, and waits for their end until ctx ends.
func (p *Proxy) Close(ctx context.Context) error {
	p.mu.Lock()
	p.close()
	if p.over == nil {
		p.over = make(chan struct{})
		if len(p.open) == 0 {
			close(p.over)
		}
	}
	over := p.over
	p.mu.Unlock()
	select {
	case <-over:
	case <-ctx.Done():
		return fmt.Errorf("waiting for traffic to ports: %w", ctx.Err())
	}
	p.h1.CloseIdleConnections()
	p.h2c.CloseIdleConnections()
	return nil
}

// answer is a ResponseWriter that records whether an answer has begun.
type answer struct {
	http.ResponseWriter
	begun  bool
	shared bool // see Destination
}

// Unwrap lets http.ResponseController reach the connection.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// WriteHeader begins the answer, unless it is only informational.
func (a *answer) WriteHeader(status int) {
	a.begun = a.begun || status >= http.StatusOK
	if status < http.StatusOK {
		CleanAnswer(a.Header(), a.shared) // answered cleans the final one
	}
	a.ResponseWriter.WriteHeader(status)
}

// Write begins the answer.
func (a *answer) Write(b []byte) (int, error) {
	a.begun = true
	return a.ResponseWriter.Write(b)
}

// noter is a ResponseWriter that needs to know when its connection changes to another protocol.
type noter interface{ Upgraded() }

// Hijack implements [http.Hijacker].
func (a *answer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := http.NewResponseController(a.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	a.begun = true
	if n, ok := a.ResponseWriter.(noter); ok {
		n.Upgraded()
	}
	return conn, buffered, nil
}

// upgrades reports whether the request asks for another protocol on its connection.
func upgrades(r *http.Request) bool {
	for _, v := range r.Header.Values("Connection") {
		for token := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(token), "upgrade") {
				return true
			}
		}
	}
	return false
}

// buffers is a pool of the buffers that bodies are copied through.
type buffers struct{ pool sync.Pool }

// Get implements [httputil.BufferPool].
func (b *buffers) Get() []byte {
	if v, ok := b.pool.Get().(*[buffer]byte); ok {
		return v[:]
	}
	return make([]byte, buffer)
}

// Put implements [httputil.BufferPool].
func (b *buffers) Put(v []byte) { b.pool.Put((*[buffer]byte)(v)) }

// host returns the name under which idle connections are kept: one port in one run of the
// sandbox.
func (d Destination) host() string {
	return fmt.Sprintf("%s.%x:%s", d.Target.SandboxID, d.Target.Run, strconv.Itoa(d.Port))
}
