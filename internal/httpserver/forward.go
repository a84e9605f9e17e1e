package httpserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/portproxy"
)

const (
	// ForwardCost is the memory that a forwarded call holds beside CallCost, in bytes: a buffer for each direction, and
	// the buffers of HTTP and TLS of two connections. What the kernel holds is not counted.
	ForwardCost = 160 << 10

	// forwardBuffer is the number of bytes of an answer that are moved at once. Below 64 KiB the throughput falls.
	forwardBuffer = 64 << 10

	// forwardRetry is the time after which the caller of a node that broke off should try again.
	forwardRetry = 2 * time.Second
)

// Forwarder sends requests to the nodes that have what they need. It is safe for concurrent use.
type Forwarder struct {
	// Via returns a client of a node's HTTP server, whatever host a request names.
	Via func(node string) http.RoundTripper
	Log *slog.Logger
}

// Misdirected reports that another node has what a forwarded request asks for.
type Misdirected struct{ Node string }

// Error returns the text for logs.
func (m *Misdirected) Error() string { return fmt.Sprintf("the node %q has it", m.Node) }

// Forward passes a request on to a node, with p, and the answer back. It returns when both have ended, those of an
// upgraded connection too. Cay's own headers and values with an API key in the request's head do not travel; all other
// headers do, and the node decides about them. A 1xx answer is passed on.
//
// After an error nothing was answered, and w's header is as before. Errors:
//
//   - Unavailable, code "node_unreachable", if there is no connection or it broke; the node may have done the call;
//   - Exhausted or Unavailable of the call's account, which is charged with ForwardCost;
//   - Invalid, code "secret_in_path", if the path holds a key;
//   - Invalid, code "incomplete_body", if the caller's body breaks off;
//   - errRefused, if p was offered and the node has no room;
//   - [Misdirected]. Forward has followed a first one itself, if the request has no body or a GetBody;
//   - the error of the request's context if the caller left.
//
// If the connection breaks after the answer has begun, Forward panics with [http.ErrAbortHandler].
func (f *Forwarder) Forward(w http.ResponseWriter, r *http.Request, node string, p Passage) error {
	if path := r.URL.EscapedPath(); portproxy.HasKey(path) || portproxy.HasKey(r.Host) || portproxy.HasKey(r.Method) {
		return fault.InField(fault.CodeSecretInPath, "path",
			"the path, host name or method holds an API key, which must not leave this server")
	}
	account := budget.From(r.Context())
	if err := account.Take(ForwardCost); err != nil {
		return err
	}
	defer account.Give(ForwardCost)
	err := f.pass(w, r, node, p)
	var other *Misdirected
	if !errors.As(err, &other) || other.Node == node {
		return err
	}
	if r.ContentLength != 0 {
		if r.GetBody == nil {
			return err
		}
		body, failed := r.GetBody()
		if failed != nil {
			return fmt.Errorf("sending a body again: %w", failed)
		}
		again := *r
		again.Body = body
		r = &again
	}
	p.Offered = false // that node alone can do it
	return f.pass(w, r, other.Node, p)
}

// pass forwards a request once.
func (f *Forwarder) pass(w http.ResponseWriter, r *http.Request, node string, p Passage) error {
	passage, nonce, err := p.sealed(r)
	if err != nil {
		return err
	}
	before := maps.Clone(w.Header())
	clear(w.Header()) // the node sets the whole header
	// The node may answer before it has read the whole request. HTTP/2 writers do not need it, and fail.
	_ = http.NewResponseController(w).EnableFullDuplex()
	a := &forwarded{ResponseWriter: w}
	proxy := &httputil.ReverseProxy{
		Transport:     f.Via(node),
		FlushInterval: -1,
		BufferPool:    forwardBuffers,
		ErrorLog:      slog.NewLogLogger(f.Log.Handler(), slog.LevelDebug),
		Rewrite:       func(pr *httputil.ProxyRequest) { rewriteForward(pr, passage) },
		ModifyResponse: func(resp *http.Response) error {
			takeMade(CallOf(r), resp.Header, nonce)
			return misdirected(resp, nonce)
		},
		ErrorHandler: func(_ http.ResponseWriter, _ *http.Request, failed error) { err = failed },
	}
	proxy.ServeHTTP(a, r)
	if err == nil && a.status >= http.StatusBadRequest && worthReading(r, "") {
		readRest(w, r) // ReverseProxy leaves the body open
	}
	switch {
	case err == nil || a.hijacked: // a caller that has upgraded sees its connection end
		return nil
	case a.begun:
		panic(http.ErrAbortHandler)
	}
	clear(w.Header())
	maps.Copy(w.Header(), before)
	var other *Misdirected
	switch {
	case errors.As(err, &other) || errors.Is(err, errRefused) || fault.As(err) != nil && !errors.Is(err, context.Canceled):
		return err
	case r.Context().Err() != nil:
		if broken := CallOf(r).Body.Broken(); broken != nil {
			return broken // the server ends the context at the end of the connection, at the same moment
		}
		return fmt.Errorf("forwarding a request: %w", r.Context().Err())
	}
	return fault.New(fault.Unavailable, fault.CodeNodeUnreachable,
		"the connection to the node broke off before the answer; it is not known whether the call was done").
		After(forwardRetry).Because(fmt.Errorf("%w: %w", errBrokeOff, err))
}

// rewriteForward makes the request to the node.
func rewriteForward(pr *httputil.ProxyRequest, passage string) {
	in, out := pr.In, pr.Out
	out.URL.Scheme, out.URL.Host = "http", "localhost" // the transport is the node's alone
	out.Host = in.Host
	out.URL.RawQuery = withoutKeys(in.URL.RawQuery, "&")
	for _, name := range []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"} {
		if values, ok := in.Header[name]; ok { // ReverseProxy has removed them
			out.Header[name] = values
		}
	}
	withoutOwn(out.Header)
	withoutKeysIn(out.Header)
	out.Header.Set(passageHeader, passage)
	if len(in.Trailer) > 0 && out.Body != nil {
		// ReverseProxy would send the names without the values, which are known when the body has ended.
		out.Trailer = make(http.Header, len(in.Trailer))
		for name := range in.Trailer {
			if !isOwn(name) && !portproxy.HasKey(name) {
				out.Trailer[name] = nil
			}
		}
		out.Body = &trailedBody{out.Body, in.Trailer, out.Trailer}
	}
}

// trailedBody sets the trailer of a forwarded request when the body has ended.
type trailedBody struct {
	io.ReadCloser
	from, to http.Header
}

// Read implements [io.Reader].
func (b *trailedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF {
		for name := range b.to { // those that were announced
			b.to[name] = b.from[name]
		}
		withoutKeysIn(b.to)
	}
	return n, err
}

// withoutKeysIn removes API keys from a header or trailer. It drops the whole value that holds one; in a list of
// cookies or subprotocols it drops only the element.
func withoutKeysIn(h http.Header) {
	h.Del(portproxy.KeyHeader)
	for name, values := range h {
		if portproxy.HasKey(name) {
			delete(h, name)
			continue
		}
		separator := ""
		switch name {
		case "Cookie":
			separator = ";"
		case "Sec-Websocket-Protocol":
			separator = ","
		}
		var kept []string
		for _, v := range values {
			switch {
			case !portproxy.HasKey(v):
				kept = append(kept, v)
			case separator != "":
				if v := strings.TrimSpace(withoutKeys(v, separator)); v != "" {
					kept = append(kept, v)
				}
			}
		}
		if len(kept) == 0 && len(values) > 0 {
			delete(h, name)
		} else {
			h[name] = kept
		}
	}
}

// withoutKeys removes the elements of a list that hold an API key, and leaves the rest as it is.
func withoutKeys(list, separator string) string {
	if !portproxy.HasKey(list) {
		return list
	}
	var kept []string
	for element := range strings.SplitSeq(list, separator) {
		if !portproxy.HasKey(element) {
			kept = append(kept, element)
		}
	}
	return strings.Join(kept, separator)
}

// misdirected returns the error for an answer of a node that names another, or that leaves the request to others. A
// node's name has at most 64 characters.
func misdirected(resp *http.Response, nonce string) error {
	node, ok := strings.CutPrefix(resp.Header.Get(nodeHeader), nonce+" ")
	switch {
	case !ok || node == "" || len(node) > 64: // an application's answer
		return nil
	case node == noNode && resp.StatusCode == http.StatusServiceUnavailable:
		return errRefused
	case resp.StatusCode == http.StatusMisdirectedRequest:
		return &Misdirected{node}
	}
	return nil
}

// takeMade takes the sandbox that a forwarded call made from the header of its answer.
func takeMade(c *Call, h http.Header, nonce string) {
	if id, ok := strings.CutPrefix(h.Get(sandboxHeader), nonce+" "); ok {
		c.Sandbox = id
		h.Del(sandboxHeader)
	}
}

// forwarded is a ResponseWriter that records whether an answer has begun.
type forwarded struct {
	http.ResponseWriter
	begun, hijacked bool
	status          int
}

// Unwrap lets http.ResponseController reach the connection.
func (a *forwarded) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// WriteHeader begins the answer, unless it is only informational.
func (a *forwarded) WriteHeader(status int) {
	if status >= http.StatusOK && !a.begun {
		a.begun, a.status = true, status
	}
	a.ResponseWriter.WriteHeader(status)
}

// Write begins the answer.
func (a *forwarded) Write(b []byte) (int, error) {
	a.begun = true
	return a.ResponseWriter.Write(b)
}

// Hijack implements [http.Hijacker].
func (a *forwarded) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := http.NewResponseController(a.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, fmt.Errorf("taking the connection over: %w", err)
	}
	a.hijacked = true
	if rec, ok := a.ResponseWriter.(*Recorder); ok {
		rec.Upgraded()
	}
	return earlyConn{conn, buffered.Reader}, buffered, nil
}

// earlyConn is an upgraded connection whose caller may have sent something before the answer. ReverseProxy would read
// only what comes later.
type earlyConn struct {
	net.Conn
	early *bufio.Reader
}

// Read implements [io.Reader].
func (c earlyConn) Read(p []byte) (int, error) {
	if n := c.early.Buffered(); n > 0 {
		return c.early.Read(p[:min(len(p), n)])
	}
	return c.Conn.Read(p)
}

// CloseWrite ends this server's half of the connection.
func (c earlyConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return http.ErrNotSupported
}

// forwardBuffers are the buffers of answers.
var forwardBuffers = &buffers{sync.Pool{New: func() any { return new([forwardBuffer]byte) }}}

type buffers struct{ pool sync.Pool }

// Get implements [httputil.BufferPool].
func (b *buffers) Get() []byte { return b.pool.Get().(*[forwardBuffer]byte)[:] }

// Put implements [httputil.BufferPool].
func (b *buffers) Put(p []byte) { b.pool.Put((*[forwardBuffer]byte)(p)) }
