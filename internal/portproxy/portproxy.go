// Package portproxy carries traffic to the ports of sandboxes: HTTP/1.1 and HTTP/2 requests,
// WebSockets and other upgrades, server-sent events, bodies of any size, and raw TCP. It
// also knows the names under which ports are reached ([Names]) and the signatures
// that open them for a while ([Signer]).
//
// It authorises nobody and wakes nothing: who calls [Proxy.Serve] or [Proxy.Tunnel] has
// decided that the request may pass, and holds a lease of the sandbox until the call
// returns. It promises that no key, signature or token of cay's reaches a sandbox in the
// head of a request, that no header of an answer reaches beyond the port's own origin, and
// that bodies are streamed: it holds no more than a few buffers.
//
// A [Proxy] is safe for concurrent use. Connections to ports belong to one life of one
// sandbox and break with it. An error that is returned means that nothing was answered yet;
// what breaks later breaks the connection of the caller, and nothing is left in either case.
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
	// maxOpen bounds what goes on in one sandbox at a time. The agent takes twice as many
	// connections, some of which rest between two requests.
	maxOpen = 500

	// dialTimeout is longer than the agent's own patience with a port.
	dialTimeout = 15 * time.Second

	// Connections that rest. A server inside that serves one connection at a time is
	// held up by each, so they are few and soon gone; a new one costs a few ms.
	idleTimeout = 10 * time.Second
	maxIdle     = 16 // of one port
	maxIdleAll  = 512

	// buffer is how much of a body is moved at once, bytes: below 64 KiB the throughput
	// falls, above it only the memory of many requests grows.
	buffer = 64 << 10

	// connBuffer is each of the two buffers of a connection, bytes. Larger pieces pass them by.
	connBuffer = 8 << 10

	// maxAnswerHeader bounds what a server inside can make the host hold, bytes; what stands before most
	// servers takes 8 KiB or less.
	maxAnswerHeader = 64 << 10

	// streamWindow is how much of an answer over HTTP/2 comes before the caller takes it, bytes.
	streamWindow = buffer

	// hangupGrace is what requests in flight get when the server stops. Upgrades and
	// tunnels, which have no end of their own, get nothing.
	hangupGrace = 3 * time.Second
)

// Codes of what goes wrong on the way in, beside those of agentapi.
const (
	CodeNoAnswer    = "port_no_answer"
	CodeWorker      = "service_worker_refused"
	CodeSecret      = "secret_in_path"
	codeTooMany     = agentapi.CodeTooManyTunnels
	codeInterrupted = "interrupted"
)

// Dialer reaches ports; [*agentapi.Client] has it.
type Dialer interface {
	DialPort(ctx context.Context, t agentapi.Target, port int) (net.Conn, error)
}

// Destination is where a request goes.
type Destination struct {
	Target agentapi.Target // a sandbox that is leased
	Port   int
	// Path is what is asked for inside, escaped as in a request; "" is the request's own.
	Path string
	// Prefix is what stands before that path outside. Inside it is told as
	// X-Forwarded-Prefix, and redirects to other paths get it back.
	Prefix string
	Host   string // the Host that is sent; "" is the request's own
	// Shared reports whether the port shares its origin with others, as all do that are reached at
	// the API's own host. Headers that speak for a whole origin are then removed from answers.
	Shared bool
}

// Proxy carries requests. See [New].
type Proxy struct {
	ports   Dialer
	reverse *httputil.ReverseProxy
	h1      *http.Transport
	h2c     *http.Transport

	closing context.Context // over when all that goes on has to end
	close   context.CancelFunc
	hanging context.Context // over when upgrades and tunnels have to end
	hangup  context.CancelFunc

	mu sync.Mutex
	// +checklocks:mu
	open map[string]int // by sandbox
	wg   sync.WaitGroup
}

// New makes a Proxy. Close it.
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
		return &restingConn{Conn: conn}, nil
	}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	p.h2c.Protocols = protocols
	p.h2c.HTTP2 = &http.HTTP2Config{MaxReceiveBufferPerStream: streamWindow}
	p.reverse = &httputil.ReverseProxy{
		Rewrite:        rewrite,
		Transport:      p,
		FlushInterval:  -1, // every piece at once: it may be all that comes for a while
		BufferPool:     &buffers{},
		ModifyResponse: answered,
		ErrorHandler:   func(_ http.ResponseWriter, r *http.Request, err error) { passageOf(r).err = err },
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug), // of callers who leave
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
		DisableCompression:     true, // what is asked for and answered passes as it is
		MaxIdleConns:           maxIdleAll,
		MaxIdleConnsPerHost:    maxIdle,
		IdleConnTimeout:        idleTimeout,
		MaxResponseHeaderBytes: maxAnswerHeader,
		ExpectContinueTimeout:  time.Second,
		ReadBufferSize:         connBuffer,
		WriteBufferSize:        connBuffer,
	}
}

// RoundTrip implements [http.RoundTripper] for the reverse proxy. What comes in as gRPC
// can only be answered over HTTP/2; all else goes in as HTTP/1.1, which every server speaks.
func (p *Proxy) RoundTrip(r *http.Request) (*http.Response, error) {
	transport := p.h1
	if passageOf(r).grpc {
		transport = p.h2c
	} else {
		r = r.WithContext(onRestingOnly(agentapi.WithHeads(r.Context())))
		r.Close = r.Close || mayStayUnread(r)
	}
	resp, err := transport.RoundTrip(r)
	if err == nil && resp.StatusCode < http.StatusOK && resp.StatusCode != http.StatusSwitchingProtocols {
		_ = resp.Body.Close() // nothing of it is wanted
		return nil, fmt.Errorf("the status is %d, which is none", resp.StatusCode)
	}
	return resp, err
}

// passage is one request on its way.
type passage struct {
	to     Destination
	grpc   bool
	signed bool  // its URL has a signature
	err    error // instead of an answer
}

type passageKey struct{}

func passageOf(r *http.Request) *passage { return r.Context().Value(passageKey{}).(*passage) }

// Serve passes a request on and its answer back, and returns when both are over, upgrades
// included. After an error, nothing was answered: Upstream, code "port_closed" when nothing
// listens on the port, [CodeNoAnswer] when what listens gives no answer that is HTTP; Exhausted, code
// "too_many_connections"; Denied, [CodeWorker] for the script of a service worker at a shared
// origin; Invalid, [CodeSecret]; those of [agentapi.Client.DialPort]. The caller's leaving is its
// context's error. What breaks after an answer has begun is a panic with
// [http.ErrAbortHandler], as net/http wants it.
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

	pass := &passage{to: to, signed: r.URL.Query().Has(TokenParam), grpc: r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc")}
	// A service may begin its answer before it has read all of the request, of which
	// net/http would then take away the rest. A writer that cannot is one of HTTP/2.
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

// explain says what an error before any answer means.
func (p *Proxy) explain(err error, port int) error {
	if p.hanging.Err() != nil {
		return fault.New(fault.Unavailable, codeInterrupted, "the server stops").Because(err)
	}
	if fault.As(err) != nil {
		return err
	}
	return fault.New(fault.Upstream, CodeNoAnswer, "what listens on port %d gave no answer that is HTTP", port).Because(err)
}

// begin counts a request that goes on in a sandbox; done ends it.
func (p *Proxy) begin(sandboxID string) (done func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hanging.Err() != nil {
		return nil, fault.New(fault.Unavailable, codeInterrupted, "the server stops")
	}
	if p.open[sandboxID] >= maxOpen {
		return nil, fault.New(fault.Exhausted, codeTooMany, "%d requests to ports of this sandbox go on already", maxOpen)
	}
	p.open[sandboxID]++
	p.wg.Add(1)
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.open[sandboxID]--; p.open[sandboxID] == 0 {
			delete(p.open, sandboxID)
		}
		p.wg.Done()
	}, nil
}

// Hangup ends upgrades and tunnels, and a little later what else goes on. Nothing begins
// any more. It does not wait; [Proxy.Close] does.
func (p *Proxy) Hangup() {
	p.mu.Lock() // so that what has begun is counted, and nothing else begins
	p.hangup()
	p.mu.Unlock()
	time.AfterFunc(hangupGrace, p.close)
}

// Close ends whatever goes on and waits for it until ctx ends.
func (p *Proxy) Close(ctx context.Context) error {
	p.mu.Lock()
	p.close()
	p.mu.Unlock()
	over := make(chan struct{})
	go func() { p.wg.Wait(); close(over) }()
	select {
	case <-over:
	case <-ctx.Done():
		return fmt.Errorf("waiting for traffic to ports: %w", ctx.Err())
	}
	p.h1.CloseIdleConnections()
	p.h2c.CloseIdleConnections()
	return nil
}

// answer knows whether anything was answered.
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
		CleanAnswer(a.Header(), a.shared) // of others answered takes care
	}
	a.ResponseWriter.WriteHeader(status)
}

// Write begins the answer.
func (a *answer) Write(b []byte) (int, error) {
	a.begun = true
	return a.ResponseWriter.Write(b)
}

// noter is told that a connection is another protocol's from now on.
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

// buffers are those that bodies are copied through.
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

// host is what connections that rest are kept by: one port in one life.
func (d Destination) host() string {
	return fmt.Sprintf("%s.%x:%s", d.Target.SandboxID, d.Target.Run, strconv.Itoa(d.Port))
}
