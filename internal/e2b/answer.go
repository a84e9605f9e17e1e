package e2b

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/accesslog"
	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/portproxy"
)

// statuses maps the kinds of error to HTTP statuses.
var statuses = map[fault.Kind]int{
	fault.NotFound:        http.StatusNotFound,
	fault.Conflict:        http.StatusConflict,
	fault.Invalid:         http.StatusBadRequest,
	fault.Unauthenticated: http.StatusUnauthorized,
	fault.Denied:          http.StatusForbidden,
	fault.Exhausted:       http.StatusTooManyRequests,
	fault.Unavailable:     http.StatusServiceUnavailable,
	fault.NoSpace:         http.StatusInsufficientStorage,
	fault.TooLarge:        http.StatusRequestEntityTooLarge,
	fault.Upstream:        http.StatusBadGateway,
	fault.Gone:            http.StatusGone,
}

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

// call holds what is known of one request. It belongs to the goroutine that answers it.
type call struct {
	id        string
	route     string // for the log and the metrics
	inside    bool   // the request is for a sandbox, not for the control API
	principal auth.Principal
	sandbox   string
	body      *slowBody
	code      string
	err       error // for the log
	account   budget.Account
}

// Estimates of the memory that calls hold, in bytes; the API has the same.
const (
	controlCost  = 32 << 10
	trafficCost  = 96 << 10
	portCost     = 128 << 10
	headLineCost = 100
)

// account opens the memory account of a call whose organization is known.
func (s *Surface) account(r *http.Request, orgID string, cost int64) error {
	cost += int64(3 * len(r.RequestURI))
	for name, values := range r.Header {
		cost += int64(headLineCost + len(name))
		for _, v := range values {
			cost += int64(headLineCost/2 + len(v))
		}
	}
	return callOf(r).account.Open(s.Budget, orgID, cost)
}

type callKey struct{}

func callOf(r *http.Request) *call { return r.Context().Value(callKey{}).(*call) }

// stall is the time that a caller may take for the next piece of a body, in either direction. A
// shorter one cuts off callers with slow lines; a longer one lets idle callers hold connections.
const stall = time.Minute

// handle answers a request with f, and logs and counts it. An error of f is answered, unless the
// answer has begun; then the connection is broken.
func (s *Surface) handle(w http.ResponseWriter, r *http.Request, inside bool,
	f func(http.ResponseWriter, *http.Request) error) {
	start := time.Now()
	control := http.NewResponseController(w)
	c := &call{id: "req_" + strings.ToLower(rand.Text()), inside: inside,
		body: &slowBody{ReadCloser: r.Body, control: control}}
	r = r.WithContext(budget.With(context.WithValue(r.Context(), callKey{}, c), &c.account))
	defer c.account.Close()
	rec := &recorder{ResponseWriter: w, control: control}
	if r.Body != nil && r.Body != http.NoBody {
		r.Body = c.body
	}
	// Clear the deadline of the connection's last answer. The writers of tests have no deadlines,
	// and fail.
	_ = control.SetWriteDeadline(time.Time{})
	ownHead(rec.Header(), c.id)
	defer func() {
		p := recover()
		broken := p != nil
		if err, ok := p.(error); broken && !(ok && errors.Is(err, http.ErrAbortHandler)) {
			c.err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
			if rec.status == 0 {
				s.fail(rec, r, c.err)
				broken = false
			}
		}
		s.finish(r, rec, c.body.n.Load(), time.Since(start))
		if broken {
			panic(http.ErrAbortHandler) // only a broken connection tells the caller that the answer is incomplete
		}
	}()
	err := f(rec, r)
	if err == nil {
		return
	}
	if rec.status != 0 {
		c.err = err
		panic(http.ErrAbortHandler)
	}
	s.fail(rec, r, err)
}

// ownHead sets the headers of all answers but those of ports. The answers hold text that
// untrusted code wrote, so browsers must not run them as a page.
func ownHead(h http.Header, id string) {
	h.Set("X-Request-Id", id)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'; sandbox")
	h.Set("Referrer-Policy", "no-referrer")
}

// problem is the answer to a call that failed.
type problem struct {
	status  int
	message string
	code    string // for programs; "": none
}

// problemOf returns the answer for an error of the control API.
func problemOf(err error) problem {
	var u unsupported
	if errors.As(err, &u) {
		return problem{http.StatusNotImplemented, string(u), fault.CodeUnsupported}
	}
	f := fault.As(err)
	if f == nil && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)) {
		return problem{http.StatusServiceUnavailable,
			"the call was interrupted before it was complete", fault.CodeInterrupted}
	}
	if f == nil || statuses[f.Kind] == 0 {
		return problem{http.StatusInternalServerError,
			"an internal error; the server's log has the cause", fault.CodeInternal}
	}
	p := problem{statuses[f.Kind], f.Detail, f.Code}
	if f.Field != "" {
		p.message = f.Field + ": " + f.Detail
	}
	return p
}

// fail answers an error.
func (s *Surface) fail(w http.ResponseWriter, r *http.Request, err error) {
	c := callOf(r)
	if fault.Is(err, fault.Unauthenticated) {
		if over := s.Auth.Failed(r.RemoteAddr); over != nil {
			err = over
		}
	}
	if r.Header.Get("Origin") != "" {
		allowOrigins(w, r)
	}
	var g gone
	if errors.As(err, &g) {
		body := map[string]any{"sandboxId": g.id, "message": g.message, "code": http.StatusBadGateway}
		if g.closed {
			body["port"] = g.port
		}
		reply(w, http.StatusBadGateway, body)
		return
	}
	p := problemOf(err)
	c.code = p.code
	if p.status == http.StatusInternalServerError || p.status == http.StatusServiceUnavailable {
		c.err = err
	}
	if f := fault.As(err); f != nil && f.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.FormatInt(int64(math.Ceil(f.RetryAfter.Seconds())), 10))
	}
	body := map[string]any{"code": p.status, "message": p.message}
	if !c.inside { // the agent's errors have no such field, and clients compare
		body["error_code"] = p.code
	}
	reply(w, p.status, body)
}

// reply writes v as JSON.
func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	_ = e.Encode(v) // an error means that the caller has left
}

// finish writes the line of the access log and counts the request.
func (s *Surface) finish(r *http.Request, w *recorder, in int64, took time.Duration) {
	c := callOf(r)
	level := slog.LevelInfo
	if c.err != nil && w.status == http.StatusInternalServerError {
		level = slog.LevelError
	}
	s.counts.observe(c.route, w.status, took)
	s.access.Write(r, accesslog.Entry{Level: level, ID: c.id, Route: "e2b: " + c.route, Status: w.status, Took: took,
		In: in, Out: w.bytes,
		Org: c.principal.Org.ID, Key: c.principal.Key.ID, Sandbox: c.sandbox, Code: c.code, Err: c.err})
}

// recorder records the status and size of the answer, and breaks the connection of a caller that
// does not read it.
type recorder struct {
	http.ResponseWriter
	control *http.ResponseController
	status  int
	bytes   int64
}

// Unwrap lets http.ResponseController reach the connection.
func (w *recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader begins the answer.
func (w *recorder) WriteHeader(status int) {
	if w.status == 0 && status >= 200 {
		w.status = status
	}
	if status < 200 {
		portproxy.CleanAnswer(w.Header(), true) // informational answers come from inside
	}
	_ = w.control.SetWriteDeadline(time.Now().Add(stall)) // may fail, as in Write
	w.ResponseWriter.WriteHeader(status)
}

// Write writes a piece, which the caller must take in time. The writers of tests have no
// deadlines.
func (w *recorder) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	_ = w.control.SetWriteDeadline(time.Now().Add(stall))
	n, err := w.ResponseWriter.Write(b)
	w.bytes += int64(n)
	return n, err
}

// slowBody is a request body whose pieces must each come in time. It counts the bytes. Another
// goroutine may still read it when the call is answered.
type slowBody struct {
	io.ReadCloser
	control *http.ResponseController
	n       atomic.Int64
	broken  atomic.Bool // a read failed before the end
}

// incomplete returns the error for a call whose body did not come whole, or nil.
func (b *slowBody) incomplete() error {
	if !b.broken.Load() {
		return nil
	}
	return fault.New(fault.Invalid, fault.CodeIncompleteBody, "the body ended early or came too slowly")
}

// Read implements [io.Reader].
func (b *slowBody) Read(p []byte) (int, error) {
	_ = b.control.SetReadDeadline(time.Now().Add(stall)) // may fail, as in recorder.Write
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	if err != nil && err != io.EOF {
		b.broken.Store(true)
	}
	if err == io.EOF {
		// From now on net/http reads the connection to notice a caller that leaves, and would
		// take an expired deadline for that.
		_ = b.control.SetReadDeadline(time.Time{})
	}
	return n, err
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
