// Package trace measures what the parts of one call take, across the rooms that have a
// part in it: who answers a call begins a [Trace], and every room on the way says
// with [Start] what it is doing. Where nobody asked, nothing is measured.
//
// A Trace is safe for concurrent use. What is measured after it was read is kept and
// changes nothing.
package trace

import (
	"context"
	"strconv"
	"strings"
	"sync"
	"time"
)

// most is how many spans a Trace keeps: the calls have about fifteen each, and one
// that goes round in a loop must not take memory for it.
const most = 64

// Span is one part of a call.
type Span struct {
	Name string // a token of HTTP: letters, digits and "-"
	Took time.Duration
}

// Trace is what is known of one call.
type Trace struct {
	mu sync.Mutex
	// +checklocks:mu
	spans []Span // in the order of their ends; guarded by mu
}

type key struct{}

// New begins a Trace that what is done with the returned context is part of.
func New(ctx context.Context) (context.Context, *Trace) {
	t := &Trace{}
	return context.WithValue(ctx, key{}, t), t
}

// Carry makes what is done with the returned context, which is to else, part of the
// Trace of from: work that outlives a call has another context than the call.
func Carry(to, from context.Context) context.Context {
	if t, ok := from.Value(key{}).(*Trace); ok {
		return context.WithValue(to, key{}, t)
	}
	return to
}

// Start begins a part of the call; the function it returns ends it.
func Start(ctx context.Context, name string) (end func()) {
	t, ok := ctx.Value(key{}).(*Trace)
	if !ok {
		return func() {}
	}
	began := time.Now()
	return func() { t.Add(name, time.Since(began)) }
}

// Add adds a part that somebody else has measured.
func Add(ctx context.Context, name string, took time.Duration) {
	if t, ok := ctx.Value(key{}).(*Trace); ok {
		t.Add(name, took)
	}
}

// Add adds a part of the call.
func (t *Trace) Add(name string, took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.spans) < most {
		t.spans = append(t.spans, Span{name, took})
	}
}

// Spans lists the parts that have ended, in that order.
func (t *Trace) Spans() []Span {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]Span(nil), t.spans...)
}

// ServerTiming is the value of the header Server-Timing, with milliseconds to the
// microsecond.
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
