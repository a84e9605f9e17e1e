package httpserver

import (
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"sync"
	"time"
)

const eventStream = "text/event-stream"

// WantsEvents reports whether the caller asks for server-sent events.
func WantsEvents(r *http.Request) bool {
	for _, accepted := range r.Header.Values("Accept") {
		for one := range strings.SplitSeq(accepted, ",") {
			if media, _, err := mime.ParseMediaType(one); err == nil && media == eventStream {
				return true
			}
		}
	}
	return false
}

// WriteEvent appends an event to a text. An empty id leaves the id out.
func WriteEvent(b *strings.Builder, id, event string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding an event: %w", err)
	}
	if id != "" {
		fmt.Fprintf(b, "id: %s\n", id)
	}
	fmt.Fprintf(b, "event: %s\ndata: %s\n\n", event, data)
	return nil
}

// EventStream answers a call with server-sent events. The answer begins with the first event or with
// [EventStream.Begin]; until then another answer can be given. One goroutine at a time may use it.
// Close must be called.
type EventStream struct {
	w       http.ResponseWriter
	control *http.ResponseController
	quiet   time.Duration
	stop    func() // nil until the answer has begun

	mu sync.Mutex
	// +checklocks:mu
	err error // the first error
}

// NewEventStream returns a stream for the call of r.
func NewEventStream(w http.ResponseWriter, r *http.Request) *EventStream {
	return &EventStream{w: w, control: http.NewResponseController(w), quiet: CallOf(r).Patience.Quiet}
}

// Begun reports whether the answer has begun.
func (e *EventStream) Begun() bool { return e.stop != nil }

// Begin sends the head of the answer if it is not sent yet.
func (e *EventStream) Begin() {
	if e.Begun() {
		return
	}
	h := e.w.Header()
	h.Set("Content-Type", eventStream)
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no") // nginx would buffer the events
	e.w.WriteHeader(http.StatusOK)
	// The caller sees the head at once. If this fails, the first event fails too.
	_ = e.write(":\n\n")
	e.stop = e.keepalive()
}

// Send sends events that are encoded already.
func (e *EventStream) Send(text string) error {
	e.Begin()
	return e.write(text)
}

func (e *EventStream) write(text string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err == nil {
		_, e.err = io.WriteString(e.w, text)
	}
	if e.err == nil {
		e.err = e.control.Flush()
	}
	return e.err
}

// keepalive sends a comment regularly until stop is called. The comments keep proxies from ending
// the stream as idle, and detect a caller that has left.
func (e *EventStream) keepalive() (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(e.quiet)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				_ = e.write(":\n\n") // the next event meets the same error
			}
		}
	})
	return func() { close(done); wg.Wait() }
}

// Close ends the comments that keep the stream alive.
func (e *EventStream) Close() {
	if e.stop != nil {
		e.stop()
	}
}
