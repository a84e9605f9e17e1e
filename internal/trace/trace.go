// Package trace measures what the parts of one call take, across the rooms that work on it. The
// room that answers a call begins a [Trace] with [New]; every room on the way marks its part with
// [Start]. A context without a Trace measures nothing.
//
// A Trace is safe for concurrent use. Spans that end after the Trace was read are kept and change
// nothing.
package trace

import (
	"context"
	"strconv"
	"strings"
	"sync"
	"time"
)

// most is the number of spans that a Trace keeps. Calls have about fifteen; the limit keeps a
// loop from taking memory.
const most = 64

// Span is one part of a call.
type Span struct {
	Name string // a token of HTTP: letters, digits and "-"
	Took time.Duration
}

// Trace holds the measured parts of one call.
type Trace struct {
	mu sync.Mutex
	// +checklocks:mu
	spans []Span // in the order of their ends; guarded by mu
}

type key struct{}

// New returns a context that records spans in a new Trace, and the Trace.
func New(ctx context.Context) (context.Context, *Trace) {
	t := &Trace{}
	return context.WithValue(ctx, key{}, t), t
}

// Carry returns a copy of to that records its spans in from's Trace, for work that outlives a
// call and so has another context.
func Carry(to, from context.Context) context.Context {
	if t, ok := from.Value(key{}).(*Trace); ok {
		return context.WithValue(to, key{}, t)
	}
	return to
}

// Start begins a span. The returned function ends it.
func Start(ctx context.Context, name string) (end func()) {
	t, ok := ctx.Value(key{}).(*Trace)
	if !ok {
		return func() {}
	}
	began := time.Now()
	return func() { t.Add(name, time.Since(began)) }
}

// Add adds a span that was measured elsewhere.
func Add(ctx context.Context, name string, took time.Duration) {
	if t, ok := ctx.Value(key{}).(*Trace); ok {
		t.Add(name, took)
	}
}

// Add adds a span.
func (t *Trace) Add(name string, took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.spans) < most {
		t.spans = append(t.spans, Span{name, took})
	}
}

// Spans returns the spans that have ended, in the order of their ends.
func (t *Trace) Spans() []Span {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]Span(nil), t.spans...)
}

// ServerTiming formats spans as the value of the header Server-Timing, in milliseconds with three
// decimals.
func ServerTiming(spans []Span) string {
	var b strings.Builder
	for i, s := range spans {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(s.Name)
		b.WriteString(";dur=")
		b.WriteString(strconv.FormatFloat(float64(s.Took.Microseconds())/1000, 'f', -1, 64))
	}
	return b.String()
}
