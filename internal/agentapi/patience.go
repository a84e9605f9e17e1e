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

// DefaultPatience limits the silence of an agent. A sandbox whose processes compete for its CPU may take
// seconds to kill thousands of them, and a slow disk may take seconds to sync a file. A shorter limit
// breaks off calls that are only slow; a longer one lets a sandbox that does not answer hold its callers.
const DefaultPatience = 30 * time.Second

// patientPace is the number of bytes of a body that must come within the patience. A smaller number would
// let an agent that sends single bytes hold a call for ever, a larger one would break off transfers from
// a busy disk.
const patientPace = 16 << 10

// longPatience multiplies the patience for work that has no limit of its own: the removal of a large tree,
// the last sync of a large upload. A smaller factor breaks off such work, a larger one lets an agent that
// does not answer hold the caller for longer.
const longPatience = 5

// errSilent is the error of a call whose agent was silent for too long.
var errSilent = unreachable(errors.New("the agent was silent for too long"))

// watch ends a call whose agent is silent. Its clock runs while the call waits for the agent, and stands
// while it waits for the caller. Its methods may be called concurrently.
type watch struct {
	cancel   context.CancelCauseFunc
	patience time.Duration
	pace     int // more than this many bytes set the clock anew; 0: any byte does

	mu sync.Mutex
	// +checklocks:mu
	timer *time.Timer
	// +checklocks:mu
	left time.Duration // of the patience, when the clock last stood
	// +checklocks:mu
	since time.Time // zero while the clock stands
	// +checklocks:mu
	came int // bytes since the clock was set
	// +checklocks:mu
	over bool
	// +checklocks:mu
	answering bool // the head of the answer has come: the rest of the request does not affect the clock
}

// watching returns a context that ends when the agent is silent for longer than patience, and the watch
// that ends it, with its clock running.
func watching(ctx context.Context, patience time.Duration) (context.Context, *watch) {
	ctx, cancel := context.WithCancelCause(ctx)
	w := &watch{cancel: cancel, patience: patience, left: patience}
	w.timer = time.AfterFunc(patience, func() { cancel(errSilent) })
	w.since = time.Now()
	return ctx, w
}

// wait starts the clock, because the call waits for the agent.
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

// heard stops the clock, because the agent has sent n bytes or the call waits for the caller. It sets the
// clock anew if more than pace bytes have come since it was set.
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

// begun stops the clock and sets it anew for another part of the call.
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

// answered stops the clock and sets it anew for the body of the answer. An agent may answer before it has
// taken the whole request; the rest of the request no longer affects the clock.
func (w *watch) answered(patience time.Duration, pace int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answering = true
	w.begunLocked(patience, pace)
}

// taken stops the clock, because the agent took what was sent and the call waits for the caller.
func (w *watch) taken() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.answering {
		w.heardLocked(1)
	}
}

// given starts the clock, because the agent has to take what the caller gave. After the last of it the
// agent has to begin its answer within head.
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

// watchedBody lets the watch's clock run while the body of an answer is read.
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

// sentBody stops the watch's clock while the body of a request is read from the caller. The agent then has
// to take each piece within the patience, and to answer within head after the last one.
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

// plausible refuses an answer with a status that net/http accepts and no front can pass on: one outside
// 200 to 599. It closes the body of an answer that it refuses.
func plausible(resp *http.Response, err error) (*http.Response, error) {
	if err != nil || resp.StatusCode >= http.StatusOK && resp.StatusCode < 600 {
		return resp, err
	}
	_ = resp.Body.Close() // the body is not used
	return nil, unreachable(errors.New("the agent answered with the status " + brief(resp.Status)))
}

// maxSaid limits the text of an agent in an error, and so in a log line, bytes. A longer text would let
// a sandbox fill the log.
const maxSaid = 300

// said wraps an error whose text may come from an agent, and makes the text fit a log line.
type said struct{ error }

func (e said) Error() string { return brief(e.error.Error()) }

func (e said) Unwrap() error { return e.error }

// brief returns a text of an agent in a form that fits a log line: one line without control characters,
// cut after maxSaid bytes.
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

// unreachable returns the error of a call whose sandbox does not answer.
func unreachable(cause error) *fault.Error {
	return fault.New(fault.Unavailable, fault.CodeSandboxUnreachable, "the sandbox does not answer").Because(said{cause})
}

// unusable returns the error of a call whose sandbox gave an answer that cannot be used.
func unusable(cause error) *fault.Error {
	return fault.New(fault.Unavailable, fault.CodeSandboxUnreachable,
		"the sandbox does not answer as it should").Because(said{cause})
}
