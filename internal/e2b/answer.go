package e2b

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/portproxy"
	"github.com/cayhq/cay/internal/sandbox"
)

// unsupported is an error that names something this server does not have; it is answered with
// 501.
type unsupported string

func (u unsupported) Error() string { return "unsupported: " + string(u) }

// gone reports that a sandbox takes no traffic. It is answered with 502, which clients take for
// the sandbox's end.
type gone struct {
	place
	message string
	closed  bool // the sandbox runs, but the port is not open
}

func (g gone) Error() string { return g.message }

const notFoundText = "The sandbox was not found"

// call holds what this package knows of one request besides what every front does.
type call struct {
	*httpserver.Call
	inside bool // the request is for a sandbox, not for the control API
}

// trafficCost is the memory that a request to the agent holds, in bytes.
const trafficCost = httpserver.CallCost + httpserver.InsideCost

// names records the sandbox that a call names, if the text is an id.
func (c *call) names(id sandbox.ID) {
	if id.Valid() {
		c.Sandbox = string(id)
	}
}

type callKey struct{}

func callOf(r *http.Request) *call { return r.Context().Value(callKey{}).(*call) }

// newFront returns what surrounds each call.
func (s *Handler) newFront() *httpserver.Front {
	return httpserver.New(httpserver.Config{
		Log: s.Log, Name: "e2b: ", PiecewiseBodies: true, Patience: httpserver.Usual,
		Begin: func(ctx context.Context, c *httpserver.Call) context.Context {
			return context.WithValue(ctx, callKey{}, &call{Call: c})
		},
		Failed:  func(remote string) error { return s.Auth.Failed(remote) },
		Problem: s.problem,
		Done: func(r *http.Request, status int, took time.Duration) {
			s.counts.observe(callOf(r).Route, status, took)
		},
	})
}

// handle answers a request with f.
func (s *Handler) handle(w http.ResponseWriter, r *http.Request, inside bool,
	f func(http.ResponseWriter, *http.Request) error) {
	s.front.Serve(w, r, func(w *httpserver.Recorder, r *http.Request) error {
		callOf(r).inside = inside
		w.OnHead = func(status int, h http.Header) {
			if status < 200 {
				portproxy.CleanAnswer(h, true) // informational answers come from inside
			}
		}
		return f(w, r)
	})
}

// verdict is the answer to a call that failed.
type verdict struct {
	status  int
	message string
	code    string // for programs; "": none
}

// verdictOf returns the answer for an error of the control API.
func verdictOf(err error) verdict {
	var u unsupported
	if errors.As(err, &u) {
		return verdict{http.StatusNotImplemented, string(u), fault.CodeUnsupported}
	}
	f := fault.As(err)
	if f == nil && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)) {
		return verdict{http.StatusServiceUnavailable,
			"the call was interrupted before it was complete", fault.CodeInterrupted}
	}
	if f == nil || f.Kind == fault.Internal {
		return verdict{http.StatusInternalServerError,
			"an internal error; the server's log has the cause", fault.CodeInternal}
	}
	p := verdict{f.Kind.Status(), f.Detail, f.Code}
	if f.Field != "" {
		p.message = f.Field + ": " + f.Detail
	}
	return p
}

// problem answers an error.
func (s *Handler) problem(w http.ResponseWriter, r *http.Request, err error) {
	c := callOf(r)
	if r.Header.Get("Origin") != "" {
		allowOrigins(w, r)
	}
	var g gone
	if errors.As(err, &g) {
		body := map[string]any{"sandboxId": g.id, "message": g.message, "code": http.StatusBadGateway}
		if g.closed {
			body["port"] = g.port
		}
		reply(w, r, http.StatusBadGateway, body)
		return
	}
	p := verdictOf(err)
	c.Code = p.code
	if p.status == http.StatusInternalServerError || p.status == http.StatusServiceUnavailable {
		c.Err = err
	}
	httpserver.RetryAfter(w.Header(), fault.As(err))
	body := map[string]any{"code": p.status, "message": p.message}
	if c.inside { // the agent's errors have no further field, and clients compare
		reply(w, r, p.status, body)
		return
	}
	body["error_code"] = p.code
	httpserver.RefuseJSON(w, r, p.status, p.code, "application/json", body)
}

// reply writes v as JSON.
func reply(w http.ResponseWriter, r *http.Request, status int, v any) {
	httpserver.WriteJSON(w, r, status, v)
}

// preflight reports whether a request is a CORS preflight.
func preflight(r *http.Request) bool {
	return r.Method == http.MethodOptions && r.Header.Get("Origin") != "" &&
		r.Header.Get("Access-Control-Request-Method") != ""
}

// allowOrigins lets pages of any origin call. A sandbox is protected by its token, which browsers
// do not send by themselves.
func allowOrigins(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Access-Control-Expose-Headers", "*")
	if !preflight(r) {
		return
	}
	h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
	h.Set("Access-Control-Allow-Headers", r.Header.Get("Access-Control-Request-Headers"))
	h.Set("Access-Control-Max-Age", "7200")
	w.WriteHeader(http.StatusNoContent)
}
