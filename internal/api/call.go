package api

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"path"
	"regexp"
	"runtime/debug"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/accesslog"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/trace"
)

// call holds the facts about one request while it is answered. It belongs to the goroutine that
// answers the request.
type call struct {
	id       string
	patience patience
	received *countingBody

	route string // pattern, e.g. "/v1/sandboxes/{id}"; "" if no route matches
	who   auth.Principal
	page  bool // a browser is shown problems as a page

	trace *trace.Trace // times of the parts of the call
	timed bool         // the answer has a Server-Timing header

	code string // of the problem that was answered
	err  error  // for the log, when the server or the connection failed
	gone bool   // the caller left before the answer

	account budget.Account // the memory that the call holds
}

type callKey struct{}

func callOf(r *http.Request) *call { return r.Context().Value(callKey{}).(*call) }

// saneID matches the values of X-Request-Id that are taken over from callers. They hold no
// character that could garble a log.
var saneID = regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)

func requestID(r *http.Request) string {
	if id := r.Header.Get("X-Request-Id"); saneID.MatchString(id) {
		return id
	}
	return "req_" + strings.ToLower(rand.Text())
}

// ServeHTTP answers one request: it authenticates the caller, checks the scopes, runs the operation
// and logs the call.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	c := &call{id: requestID(r), patience: s.patience, received: &countingBody{ReadCloser: r.Body}}
	ctx, tr := trace.New(budget.With(context.WithValue(r.Context(), callKey{}, c), &c.account))
	c.trace = tr
	r = r.WithContext(ctx)
	rec := &recorder{ResponseWriter: w, control: http.NewResponseController(w), call: c, began: start}
	// Clear the write deadline of the previous answer on this connection. The writers of tests have no
	// deadlines, so the error is ignored.
	_ = rec.control.SetWriteDeadline(time.Time{})
	if r.Body != nil && r.Body != http.NoBody {
		r.Body = c.received
	}
	ownHead(rec.Header(), c.id)
	s.metrics.inFlight.Inc()
	defer func() {
		s.metrics.inFlight.Dec()
		defer c.account.Close()
		broken := s.recovered(rec, r, recover())
		s.finish(r, rec, time.Since(start))
		if broken {
			// The answer has begun and is incomplete; only a broken connection tells the client.
			panic(http.ErrAbortHandler)
		}
	}()
	s.serve(rec, r)
}

// ownHead sets the headers that all answers of the API have. Answers hold files, output and names
// that untrusted code wrote, so no browser may run them as a page.
func ownHead(h http.Header, id string) {
	h.Set("X-Request-Id", id)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'; sandbox")
	h.Set("Referrer-Policy", "no-referrer")
}

func (s *server) serve(w *recorder, r *http.Request) {
	c := callOf(r)
	if p, ok := s.portOf(r); ok {
		s.servePort(w, r, p)
		return
	}
	_, pattern := s.mux.Handler(r)
	route, known := routes[pattern]
	if path.Clean(r.URL.Path) != r.URL.Path {
		known = false // the mux would redirect; none of our clients needs that
	}
	if known {
		_, c.route, _ = strings.Cut(pattern, " ")
		c.timed = route.timed
	}
	if !known || !route.open {
		if err := s.admit(r, route.scope); err != nil {
			s.fail(w, r, err)
			return
		}
	}
	if !known {
		s.noRoute(w, r)
		return
	}
	if err := checkQuery(r, route); err != nil {
		s.fail(w, r, err)
		return
	}
	s.mux.ServeHTTP(w, r)
}

// admit authenticates the caller and checks that the key has the scope.
func (s *server) admit(r *http.Request, scope auth.Scope) error {
	return s.admitKey(r, secretOf(r), scope)
}

func (s *server) admitKey(r *http.Request, key string, scope auth.Scope) error {
	c := callOf(r)
	defer trace.Start(r.Context(), "auth")()
	who, err := s.Auth.Authenticate(r.Context(), key)
	if err != nil {
		return err
	}
	c.who = who
	if err := s.Auth.Allow(who); err != nil {
		return err
	}
	if scope != "" && !who.May(scope) {
		return fault.New(fault.Denied, fault.CodeScopeMissing, "the key lacks the scope %s", scope)
	}
	return s.account(r, who.Org.ID, callCost)
}

// secretOf returns the key that the caller presents.
func secretOf(r *http.Request) string {
	if callOf(r).route == terminalRoute && len(r.Header.Values("Authorization")) == 0 {
		return offeredKey(r.Header)
	}
	return bearer(r)
}

// bearer returns the secret of the Authorization header, or "" if the header is absent or
// malformed.
func bearer(r *http.Request) string {
	values := r.Header.Values("Authorization")
	if len(values) != 1 {
		return ""
	}
	scheme, secret, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return secret
}

// noRoute answers 405 if the path has other methods, which the mux knows, and 404 otherwise.
func (s *server) noRoute(w http.ResponseWriter, r *http.Request) {
	probe := probe{header: http.Header{}}
	if path.Clean(r.URL.Path) == r.URL.Path {
		if h, pattern := s.mux.Handler(r); pattern == "" {
			h.ServeHTTP(&probe, r)
		}
	}
	if probe.status == http.StatusMethodNotAllowed {
		allow := probe.header.Get("Allow")
		w.Header().Set("Allow", allow)
		s.problem(w, r, http.StatusMethodNotAllowed,
			fault.New(fault.Invalid, fault.CodeMethodNotAllowed, "this path has %s", allow))
		return
	}
	s.fail(w, r, fault.New(fault.NotFound, fault.CodeNoSuchRoute, "this API has no such path; see /openapi.yaml"))
}

// probe is a ResponseWriter that keeps the status and the header and discards the body.
type probe struct {
	header http.Header
	status int
}

func (p *probe) Header() http.Header         { return p.header }
func (p *probe) WriteHeader(status int)      { p.status = status }
func (p *probe) Write(b []byte) (int, error) { return len(b), nil }

// checkQuery refuses query parameters that the route does not know. Ignoring a misspelt filter
// would select everything.
func checkQuery(r *http.Request, route access) error {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return fault.New(fault.Invalid, fault.CodeInvalidQuery, "the query cannot be parsed").Because(err)
	}
	for name, values := range query {
		switch {
		case !route.takes(name):
			return fault.InField(fault.CodeUnknownParameter, name, "is not a parameter of this operation")
		case len(values) > 1 && name != route.many:
			return fault.InvalidField(name, "is given more than once")
		}
	}
	return nil
}

// recovered answers a panic. It reports whether the connection must be broken because an answer has
// begun.
func (s *server) recovered(w *recorder, r *http.Request, p any) (broken bool) {
	if p == nil {
		return false
	}
	c := callOf(r)
	if err, ok := p.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		return true
	}
	c.err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
	if w.status != 0 {
		return true
	}
	s.fail(w, r, c.err)
	return false
}

// finish writes the line of the access log and counts the call.
func (s *server) finish(r *http.Request, w *recorder, took time.Duration) {
	c := callOf(r)
	status := w.status
	switch {
	case c.gone:
		status = statusGone
	case status == 0:
		status = http.StatusOK
	}
	level := slog.LevelInfo
	switch {
	case status == http.StatusInternalServerError:
		level = slog.LevelError
	case status == http.StatusServiceUnavailable:
		level = slog.LevelWarn
	case c.route == "/healthz" || c.route == "/readyz" || c.route == "/metrics":
		level = slog.LevelDebug // polled every few seconds
	}
	s.access.Write(r, accesslog.Entry{
		Level: level, ID: c.id, Route: c.route, Status: status, Took: took, In: c.received.n, Out: w.bytes,
		Org: c.who.Org.ID, Key: c.who.Key.ID, Code: c.code, Err: c.err,
	})
	s.metrics.observe(c.route, r.Method, status, took)
	if c.timed && status/100 == 2 {
		s.metrics.observeParts(c.route, c.trace.Spans())
	}
}

// recorder records the status and size of an answer, and disconnects a caller that does not read
// it.
type recorder struct {
	http.ResponseWriter
	control *http.ResponseController
	call    *call
	began   time.Time
	status  int
	bytes   int64
}

// Unwrap lets http.ResponseController reach the connection.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Upgraded records that another protocol uses the connection from now on.
func (w *recorder) Upgraded() { w.status = http.StatusSwitchingProtocols }

// WriteHeader begins the answer.
func (w *recorder) WriteHeader(status int) {
	if w.status == 0 && (status >= 200 || status == http.StatusSwitchingProtocols) {
		w.status = status
	}
	w.soon()
	if w.call.timed {
		spans := append(w.call.trace.Spans(), trace.Span{Name: "total", Took: time.Since(w.began)})
		w.Header().Set("Server-Timing", trace.ServerTiming(spans))
	}
	w.ResponseWriter.WriteHeader(status)
}

// soon extends the write deadline, so that the caller has time to take the next piece. The writers
// of tests have no deadlines, so the error is ignored.
func (w *recorder) soon() {
	_ = w.control.SetWriteDeadline(time.Now().Add(w.call.patience.stall))
}

// writePiece is the number of bytes that are written under one deadline. With a deadline of a
// minute, a caller must take at least 4 KiB a second; larger pieces cut off slower callers.
const writePiece = 256 << 10

// Write writes b in pieces and disconnects the caller if it does not take each piece in time.
func (w *recorder) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	written := 0
	for {
		piece := b[written:min(written+writePiece, len(b))]
		w.soon()
		n, err := w.ResponseWriter.Write(piece)
		written += n
		w.bytes += int64(n)
		if err != nil || written == len(b) {
			return written, err
		}
	}
}

// countingBody counts the bytes that are read of a body.
type countingBody struct {
	io.ReadCloser
	n int64
}

func (b *countingBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n += int64(n)
	return n, err
}
