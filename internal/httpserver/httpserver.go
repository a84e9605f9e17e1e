// Package httpserver has everything that the fronts, api and e2b, do alike with HTTP: the server
// with its limits on connections and slow callers, and around each handler the request id, the
// account of memory, the deadlines, the recovery from a panic and the access log. It also writes
// streams of server-sent events, and forwards whole requests to the nodes that serve them
// ([Forwarder], [Admit]). It knows no operation and no shape of an error's body; a [Front]
// is given those.
//
// Each call of a Front ends in its method finish, also after a panic. The access log leaves out lines
// of callers without a key that call too often, so nothing that must be complete may depend on it.
//
// A Front is safe for concurrent use. A [Call] belongs to the goroutine that answers it, except its
// Body. The server drops the connections that exceed its limits, but never one on which a call is
// answered.
package httpserver

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"runtime/debug"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
)

// Patience limits how long a caller may take.
type Patience struct {
	Body  time.Duration // to send a JSON body, 8 MiB at most
	Stall time.Duration // between two pieces of a body or a file, and to take a piece of an answer
	Drain time.Duration // to send the rest of a body that is already refused
	Quiet time.Duration // without a sign of life in a stream of events; proxies give up after about a minute
}

// Usual is the patience with callers outside of tests. Shorter times cut off callers with slow
// lines; longer ones let idle callers hold connections.
var Usual = Patience{Body: time.Minute, Stall: time.Minute, Drain: 30 * time.Second, Quiet: 15 * time.Second}

// StatusGone is the status in the log and the metrics of a call whose caller left before the
// answer. It is never sent. nginx introduced the number.
const StatusGone = 499

// Config configures a Front. All fields but Name, TakesIDs, PiecewiseBodies, Begin, Done and Level
// are required.
type Config struct {
	Log  *slog.Logger
	Name string // stands before routes in the log
	// TakesIDs makes the Front take over the request ids of callers.
	TakesIDs bool
	// PiecewiseBodies gives callers Patience.Stall for each piece of a body from the start; see
	// [Body.Piecewise].
	PiecewiseBodies bool
	Patience        Patience

	// Begin returns the context of a call. A nil Begin adds nothing to it.
	Begin func(ctx context.Context, c *Call) context.Context
	// Failed counts a call without a valid key against its caller's address. It returns the error to
	// answer instead if there are too many.
	Failed func(remote string) error
	// Problem answers an error before the answer has begun.
	Problem func(w http.ResponseWriter, r *http.Request, err error)
	// Done counts an answered call.
	Done func(r *http.Request, status int, took time.Duration)
	// Level returns the level of a call's line in the log. It may return a lower level than
	// [slog.LevelInfo] for calls that are made all the time. A nil Level returns LevelInfo.
	Level func(c *Call) slog.Level
}

// Front does for each call of one API what every front does. Make it with [New].
type Front struct {
	Config
	log *accessLog
}

// New returns a Front.
func New(cfg Config) *Front { return &Front{Config: cfg, log: newAccessLog(cfg.Log)} }

// Call holds the facts about one request while it is answered.
type Call struct {
	ID       string
	Route    string         // one of few, for the log and the metrics; "" if no route matches
	Who      auth.Principal // the zero value is a caller without a key
	Sandbox  string         // the sandbox that the call names, or made; "" if there is none
	Patience Patience
	Body     *Body
	Account  budget.Account // the memory that the call holds

	payer string // the organization that OpenAccount was given
	// refused, if not nil, does the call elsewhere after this server has refused it.
	refused func(error) error

	Code string // of the problem that was answered
	Err  error  // for the log, when the server or the connection failed
	Gone bool   // the caller left before the answer
}

// Org returns the organization that the call is made for: that of the key, or without a key that of
// the sandbox whose signature, token or public port let the caller in. It is "" for a caller whose right
// is not known, or not known yet.
func (c *Call) Org() string { return cmp.Or(c.Who.Org.ID, c.payer) }

type callKey struct{}

// CallOf returns the call of a request that [Front.Serve] passes on.
func CallOf(r *http.Request) *Call { return r.Context().Value(callKey{}).(*Call) }

// saneID matches the values of X-Request-Id that are taken over from callers. They hold no
// character that could garble a log.
var saneID = regexp.MustCompile(`^[A-Za-z0-9._-]{1,128}$`)

func (f *Front) requestID(r *http.Request) string {
	if p, ok := PassageOf(r.Context()); ok {
		return p.ID
	}
	if id := r.Header.Get("X-Request-Id"); f.TakesIDs && saneID.MatchString(id) {
		return id
	}
	return "req_" + strings.ToLower(rand.Text())
}

// Serve answers a request with do, and logs and counts it. An error of do is answered, unless the
// answer has begun; then Serve breaks the connection, since nothing else tells the caller that the
// answer is incomplete.
func (f *Front) Serve(w http.ResponseWriter, r *http.Request, do func(*Recorder, *http.Request) error) {
	start := time.Now()
	control := http.NewResponseController(w)
	c := &Call{ID: f.requestID(r), Patience: f.Patience, Body: &Body{ReadCloser: r.Body, control: control}}
	if f.PiecewiseBodies {
		c.Body.Piecewise(f.Patience.Stall)
	}
	ctx := budget.With(context.WithValue(r.Context(), callKey{}, c), &c.Account)
	if f.Begin != nil {
		ctx = f.Begin(ctx, c)
	}
	r = r.WithContext(ctx)
	rec := &Recorder{ResponseWriter: w, control: control, call: c}
	if p, ok := PassageOf(r.Context()); ok && p.Sandbox == "" {
		rec.made = p.Nonce
	}
	// Clear the write deadline of the previous answer on this connection. The writers of tests have no
	// deadlines, so the error is ignored.
	_ = control.SetWriteDeadline(time.Time{})
	if r.Body != nil && r.Body != http.NoBody {
		r.Body = c.Body
	}
	OwnHead(rec.Header(), c.ID)
	defer func() {
		defer c.Account.Close()
		broken := f.recovered(rec, r, recover())
		f.finish(rec, r, time.Since(start))
		if broken {
			panic(http.ErrAbortHandler)
		}
	}()
	err := do(rec, r)
	switch {
	case err == nil:
	case rec.status != 0:
		c.Err = err
		panic(http.ErrAbortHandler)
	default:
		f.Fail(rec, r, err)
	}
}

// Fail answers an error. It counts one of a caller without a valid key against the caller's address. A
// forwarded request for what another node has is answered with that node; see [Misdirect].
func (f *Front) Fail(w http.ResponseWriter, r *http.Request, err error) {
	c := CallOf(r)
	if next := c.refused; next != nil && refuses(err) {
		c.refused = nil
		if err = next(err); err == nil {
			return
		}
	}
	p, forwarded := PassageOf(r.Context())
	switch why := fault.As(err); {
	case forwarded && why != nil && why.Node != "":
		c.Code = why.Code
		Misdirect(w, r, why.Node)
		return
	case forwarded && p.Offered && refuses(err):
		w.Header().Set(nodeHeader, p.Nonce+" "+noNode)
	case fault.Is(err, fault.Unauthenticated) && !forwarded: // the replica has counted it
		if over := f.Failed(r.RemoteAddr); over != nil {
			err = over
		}
	}
	f.Problem(w, r, err)
}

// recovered answers a panic. It reports whether the connection must be broken because an answer has
// begun.
func (f *Front) recovered(w *Recorder, r *http.Request, p any) (broken bool) {
	if p == nil {
		return false
	}
	if err, ok := p.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		return true
	}
	c := CallOf(r)
	c.Err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
	if w.status != 0 {
		return true
	}
	f.Fail(w, r, c.Err)
	return false
}

// finish writes the line of the access log and counts the call.
func (f *Front) finish(w *Recorder, r *http.Request, took time.Duration) {
	c := CallOf(r)
	if c.Body.Broken() != nil {
		closeAfter(w)
	}
	status := w.status
	switch {
	case c.Gone:
		status = StatusGone
	case status == 0:
		status = http.StatusOK
	}
	level := slog.LevelInfo
	_, forwarded := PassageOf(r.Context())
	switch {
	case status == http.StatusInternalServerError:
		level = slog.LevelError
	case status == http.StatusServiceUnavailable:
		level = slog.LevelWarn
	case forwarded:
		level = slog.LevelDebug // the replica has a line too
	case f.Level != nil:
		level = f.Level(c)
	}
	f.log.write(r, entry{
		Level: level, ID: c.ID, Route: f.Name + c.Route, Status: status, Took: took, In: c.Body.Received(), Out: w.bytes,
		Org: c.Org(), Key: c.Who.Key.ID, Sandbox: c.Sandbox, Code: c.Code, Err: c.Err,
		Forwarded: forwarded,
	})
	if f.Done != nil {
		f.Done(r, status, took)
	}
}

// The memory that calls hold while they are answered, in bytes, estimated from the buffers of each.
// If these costs are too high, an organization that makes many calls gets 429 although there is
// memory; if they are too low, a server with 1000 callers needs more than its memory.heap_mb.
const (
	// CallCost covers a connection with its buffers and goroutines, and a request with a short head
	// and body.
	CallCost = 32 << 10
	// InsideCost covers a call into a sandbox: another connection, and the piece that is being copied.
	InsideCost = 64 << 10
	// PortCost covers a request to a port: a connection with larger buffers, and one to copy.
	PortCost = 128 << 10
	// headLineCost is the cost of a line in the head of a request, in addition to its bytes.
	headLineCost = 100
)

// OpenAccount opens the account of a call once its organization is known, and takes the cost of the
// call and of its head. Until then the call holds nothing that lasts.
func (c *Call) OpenAccount(b *budget.Budget, r *http.Request, orgID string, cost int64) error {
	c.payer = orgID
	cost += int64(3 * len(r.RequestURI)) // the path and the parameters are copied from it
	for name, values := range r.Header {
		cost += int64(headLineCost + len(name))
		for _, v := range values {
			cost += int64(headLineCost/2 + len(v))
		}
	}
	return c.Account.Open(b, orgID, cost)
}
