package api

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/trace"
)

// call holds what this package knows of one request besides what every front does.
type call struct {
	*httpserver.Call
	page bool // a browser is shown problems as a page

	trace *trace.Trace // times of the parts of the call
	began time.Time
	timed bool // the answer has a Server-Timing header
}

type callKey struct{}

func callOf(r *http.Request) *call { return r.Context().Value(callKey{}).(*call) }

// newFront returns what surrounds each call.
func (s *server) newFront() *httpserver.Front {
	return httpserver.New(httpserver.Config{
		Log: s.Log, TakesIDs: true, Patience: httpserver.Usual, Begin: s.begin, Failed: s.Auth.Failed, Problem: s.problemFor,
		Done: s.done, Level: levelOf,
	})
}

// begin returns the context of a call.
func (s *server) begin(ctx context.Context, shared *httpserver.Call) context.Context {
	s.metrics.inFlight.Inc()
	c := &call{Call: shared, began: time.Now()}
	ctx, c.trace = trace.New(context.WithValue(ctx, callKey{}, c))
	return ctx
}

// done counts a call that is answered.
func (s *server) done(r *http.Request, status int, took time.Duration) {
	c := callOf(r)
	s.metrics.inFlight.Dec()
	s.metrics.observe(c.Route, r.Method, status, took)
	if c.timed && status/100 == 2 {
		s.metrics.observeParts(c.Route, c.trace.Spans())
	}
}

// levelOf returns the level of a call's line in the log.
func levelOf(c *httpserver.Call) slog.Level {
	switch c.Route {
	case "/healthz", "/readyz", "/metrics":
		return slog.LevelDebug // polled every few seconds
	}
	return slog.LevelInfo
}

// ServeHTTP answers one request: it authenticates the caller, checks the scopes, runs the operation
// and logs the call.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.front.Serve(w, r, func(w *httpserver.Recorder, r *http.Request) error {
		w.OnHead = func(_ int, h http.Header) {
			// The times of a forwarded call are those of its node.
			if c := callOf(r); c.timed && h["Server-Timing"] == nil {
				spans := append(c.trace.Spans(), trace.Span{Name: "total", Took: time.Since(c.began)})
				h.Set("Server-Timing", trace.ServerTiming(spans))
			}
		}
		s.serve(w, r)
		return nil
	})
}

// fail answers an error.
func (s *server) fail(w http.ResponseWriter, r *http.Request, err error) { s.front.Fail(w, r, err) }

func (s *server) serve(w http.ResponseWriter, r *http.Request) {
	c := callOf(r)
	if p, ok := httpserver.PassageOf(r.Context()); ok && p.Front != frontAPI && p.Front != frontPort {
		s.fail(w, r, fmt.Errorf("a call was forwarded to the front %q, which this server does not have", p.Front))
		return
	}
	id, named := sandboxIn(r.URL.Path)
	if named {
		c.Sandbox = string(id)
	}
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
		_, c.Route, _ = strings.Cut(pattern, " ")
		c.timed = route.timed
	}
	if named && known {
		r = s.expecting(r, id)
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
	if r = s.relay(w, r, route, id); r != nil {
		s.mux.ServeHTTP(w, r)
	}
}

// sandboxIn returns the sandbox that a path names.
func sandboxIn(path string) (sandbox.ID, bool) {
	rest, ok := strings.CutPrefix(path, "/v1/sandboxes/")
	id, _, _ := strings.Cut(rest, "/")
	return sandbox.ID(id), ok && sandbox.ID(id).Valid()
}

// expecting returns the request of a call that will read a sandbox after its key.
func (s *server) expecting(r *http.Request, id sandbox.ID) *http.Request {
	if s.Expect == nil {
		return r
	}
	return r.WithContext(s.Expect(r.Context(), id))
}

// admit authenticates the caller and checks that the key has the scope.
func (s *server) admit(r *http.Request, scope auth.Scope) error {
	return s.admitKey(r, secretOf(r), scope)
}

func (s *server) admitKey(r *http.Request, key string, scope auth.Scope) error {
	c := callOf(r)
	defer trace.Start(r.Context(), "auth")()
	who, forwarded, err := httpserver.CallerOf(r, scope)
	if !forwarded {
		who, err = s.Auth.Authenticate(r.Context(), key)
	}
	if err != nil {
		return err
	}
	c.Who = who
	if !forwarded { // otherwise the replica has done this too
		if err := s.Auth.Allow(who); err != nil {
			return err
		}
		if scope != "" && !who.May(scope) {
			return httpserver.MissingScope(scope)
		}
	}
	return callOf(r).OpenAccount(s.Budget, r, who.Org.ID, httpserver.CallCost)
}

// secretOf returns the key that the caller presents.
func secretOf(r *http.Request) string {
	if callOf(r).Route == terminalRoute && len(r.Header.Values("Authorization")) == 0 {
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
