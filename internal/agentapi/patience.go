package agentapi

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/cayhq/cay/internal/fault"
)

// DefaultPatience is how long an agent may be silent. A sandbox whose processes compete for its CPU may
// take seconds to kill thousands of them, and a slow disk seconds to sync a file. Shorter breaks off
// what only is slow; longer lets a sandbox that does not answer hold its callers.
const DefaultPatience = 30 * time.Second

// patientPace is how much of a body has to come within the patience, bytes. Less would let an agent that
// sends single bytes hold a call for ever, more would break off a disk that is busy.
const patientPace = 16 << 10

// longPatience is how often the patience fits into what an agent may take for work without an end of its
// own: the removal of a large tree, the last sync of a large upload.
const longPatience = 5

// errSilent is the cause of a call's end whose agent was silent for too long.
var errSilent = unreachable(errors.New("the agent was silent for too long"))

// watch ends a call whose agent is silent. The time that the caller takes is not counted. Its methods
// may be called concurrently.
type watch struct {
	cancel   context.CancelCauseFunc
	patience time.Duration
	pace     int // bytes; 0 is any

	mu sync.Mutex
	// +checklocks:mu
	timer *time.Timer
	// +checklocks:mu
	left time.Duration
	// +checklocks:mu
	since time.Time // zero while the clock stands
	// +checklocks:mu
	came int // bytes since the clock was set
	// +checklocks:mu
	over bool
	// +checklocks:mu
	answering bool // the head of the answer has come: what is still sent of a request sets no clock
}

// watching returns a context that ends when the agent is silent for longer than patience, and the watch,
// whose clock runs.
func watching(ctx context.Context, patience time.Duration) (context.Context, *watch) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watch{cancel: cancel, patience: patience, left: patience}
	w.timer = time.AfterFunc(patience, func() { cancel(errSilent) })
	w.since = time.Now()
	return ctx, w
}

// wait lets the clock run: it is the agent's turn.
func (w *watch) wait() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waitLocked()
}

// +checklocks:w.mu
func (w *watch) waitLocked() {
	if w.since.IsZero() && !w.over {
		w.since = time.Now()
		w.timer.Reset(w.left)
	}
}

// heard stops the clock: the agent has sent n bytes, or it is the caller's turn. It is set anew when
// enough came.
func (w *watch) heard(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.heardLocked(n)
}

// +checklocks:w.mu
func (w *watch) heardLocked(n int) {
	if w.over {
		return
	}
	if !w.since.IsZero() {
		w.timer.Stop()
		w.left -= time.Since(w.since)
		w.since = time.Time{}
	}
	if w.came += n; w.came > w.pace {
		w.came, w.left = 0, w.patience
	}
	w.left = max(w.left, 0)
}

// begun sets the clock anew and stops it: another part of the call has begun.
func (w *watch) begun(patience time.Duration, pace int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.begunLocked(patience, pace)
}

// +checklocks:w.mu
func (w *watch) begunLocked(patience time.Duration, pace int) {
	w.heardLocked(0)
	w.patience, w.pace, w.left, w.came = patience, pace, patience, 0
}

// answered is begun for the body of the answer. An agent may answer before it has taken the request, whose
// rest then no longer sets the clock.
func (w *watch) answered(patience time.Duration, pace int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answering = true
	w.begunLocked(patience, pace)
}

// taken stops the clock: the agent took what was sent, and the caller is waited for.
func (w *watch) taken() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.answering {
		w.heardLocked(1)
	}
}

// given lets the clock run: the agent has to take what the caller gave, or, after the last of it, to begin
// its answer within head.
func (w *watch) given(last bool, head time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.answering {
		return
	}
	if last {
		w.begunLocked(head, 0)
	}
	w.waitLocked()
}

// end ends the watch and its context.
func (w *watch) end() {
	w.mu.Lock()
	w.over = true
	w.timer.Stop()
	w.mu.Unlock()
	w.cancel(nil)
}

// watchedBody is an answer each piece of which has to come in time.
type watchedBody struct {
	io.ReadCloser
	watch *watch
	ctx   context.Context
}

func (b *watchedBody) Read(p []byte) (int, error) {
	b.watch.wait()
	n, err := b.ReadCloser.Read(p)
	b.watch.heard(n)
	if err != nil && err != io.EOF && errors.Is(context.Cause(b.ctx), errSilent) {
		err = errSilent
	}
	return n, err
}

func (b *watchedBody) Close() error {
	b.watch.end()
	return b.ReadCloser.Close()
}

// sentBody is a request's body. While it is read the caller is waited for; then the agent has to take it,
// and answer within head when it has all.
type sentBody struct {
	io.ReadCloser
	watch *watch
	head  time.Duration
}

func (b *sentBody) Read(p []byte) (int, error) {
	b.watch.taken()
	n, err := b.ReadCloser.Read(p)
	b.watch.given(err == io.EOF, b.head)
	return n, err
}

// plausible refuses an answer that net/http takes and nothing of ours can pass on. The body of one that
// is refused is closed.
func plausible(resp *http.Response, err error) (*http.Response, error) {
	if err != nil || resp.StatusCode >= http.StatusOK && resp.StatusCode < 600 {
		return resp, err
	}
	_ = resp.Body.Close() // nothing of it is wanted
	return nil, unreachable(errors.New("the agent answered with the status " + brief(resp.Status)))
}

// maxSaid is how much of what an agent said gets into an error, and so into a log line, bytes.
const maxSaid = 300

// said is an error whose text may be an agent's.
type said struct{ error }

func (e said) Error() string { return brief(e.error.Error()) }

func (e said) Unwrap() error { return e.error }

// brief returns a text that an agent may have made up in a form that fits a log line.
func brief(text string) string {
	cut := len(text) > maxSaid
	if cut {
		text = text[:maxSaid]
	}
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "\uFFFD"))
	if cut {
		text += "…"
	}
	return text
}

func unreachable(cause error) *fault.Error {
	return fault.New(fault.Unavailable, CodeUnreachable, "the sandbox does not answer").Because(said{cause})
}

// unusable is unreachable for an agent that answers, and what it answers is no answer.
func unusable(cause error) *fault.Error {
	return fault.New(fault.Unavailable, CodeUnreachable, "the sandbox does not answer as it should").Because(said{cause})
}
