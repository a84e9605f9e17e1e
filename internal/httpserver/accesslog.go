package httpserver

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/auth"
)

// Limits of texts that callers choose, bytes. Useful paths are shorter; longer ones are cut, and
// the line says how long they were.
const (
	maxText  = 256
	maxError = 8 << 10 // of a panic it holds the stack
)

// Rates of lines of callers without a key. All of them together, at some 500 bytes a line, write
// 25 KB a second, 2 GB a day; lower rates would hide visits to public ports.
const (
	eachPerSecond  = 10 // of one address or key
	eachBurst      = 100
	totalPerSecond = 50
	totalBurst     = 500

	// tellEvery is the interval between lines that count those left out.
	tellEvery = 10 * time.Second
)

// accessLog writes the lines of requests, with bounds on their size and number. It bounds each text
// that a caller chooses, and the rate of lines of callers without a key or beyond their rate: it
// drops lines beyond that rate and writes how many. It is safe for concurrent use. It keeps a token
// bucket for each recent address, up to a fixed number of addresses.
type accessLog struct {
	to    *slog.Logger
	each  *auth.Buckets // by address, or by key
	total *auth.Buckets

	mu sync.Mutex
	// +checklocks:mu
	left int // lines left out and not told of yet
	// +checklocks:mu
	since time.Time // of the first of them, or when they were last told of; zero is none
}

// newAccessLog returns an accessLog that writes to a logger.
func newAccessLog(to *slog.Logger) *accessLog {
	return &accessLog{to: to, each: auth.NewBuckets(eachPerSecond, eachBurst),
		total: auth.NewBuckets(totalPerSecond, totalBurst)}
}

// entry describes a finished request.
type entry struct {
	Level   slog.Level
	ID      string // of the request: ours, or checked
	Route   string // one of few
	Status  int
	Took    time.Duration
	In, Out int64  // bytes
	Org     string // "" is not known
	Key     string // "" is a caller without a key
	Sandbox string // as the caller named it; "" is none
	Code    string // of the problem that was answered; "" is none
	Err     error

	Forwarded bool // by a replica
}

// write writes the line of a request. It leaves out the query, which may hold a signature, paths
// and metadata.
func (l *accessLog) write(r *http.Request, e entry) {
	ctx := context.WithoutCancel(r.Context())
	if !l.to.Enabled(ctx, e.Level) {
		return
	}
	// A caller with a key has a rate already, but nothing bounds how often it is told so.
	if (e.Key == "" || e.Status == http.StatusTooManyRequests) &&
		!l.admit(ctx, cmp.Or(e.Key, auth.Address(r.RemoteAddr)), time.Now()) {
		return
	}
	attrs := []slog.Attr{
		slog.String("request_id", e.ID),
		slog.String("method", cut(r.Method, maxText)),
		slog.String("route", e.Route),
		slog.String("path", cut(r.URL.Path, maxText)),
		slog.Int("status", e.Status),
		slog.Float64("duration_ms", float64(e.Took.Microseconds())/1000),
		slog.Int64("bytes_in", e.In),
		slog.Int64("bytes_out", e.Out),
		slog.String("remote", cut(r.RemoteAddr, maxText)),
	}
	if e.Org != "" {
		attrs = append(attrs, slog.String("org", e.Org))
	}
	if e.Key != "" {
		attrs = append(attrs, slog.String("key", e.Key))
	}
	if e.Sandbox != "" {
		attrs = append(attrs, slog.String("sandbox", cut(e.Sandbox, maxText)))
	}
	if e.Forwarded {
		attrs = append(attrs, slog.Bool("forwarded", true))
	}
	if e.Code != "" {
		attrs = append(attrs, slog.String("code", e.Code))
	}
	if e.Err != nil {
		attrs = append(attrs, slog.String("error", cut(e.Err.Error(), maxError)))
	}
	l.to.LogAttrs(ctx, e.Level, "request", attrs...)
}

// admit reports whether the line of a caller, a key or an address, is written. It writes when lines
// begin to be left out, and from time to time how many were.
func (l *accessLog) admit(ctx context.Context, caller string, now time.Time) bool {
	ok := l.each.Take(caller, now) == 0 && l.total.Take("", now) == 0
	l.mu.Lock()
	first, told := !ok && l.since.IsZero(), 0
	if !ok {
		l.left++
	}
	if first {
		l.since = now
	} else if !l.since.IsZero() && now.Sub(l.since) >= tellEvery {
		told, l.left = l.left, 0
		if l.since = now; told == 0 {
			l.since = time.Time{} // no line was left out in the last interval
		}
	}
	l.mu.Unlock()
	switch {
	case first:
		l.to.WarnContext(ctx, "many requests come without a key or beyond their rate; some are left out of the log",
			"caller", cut(caller, maxText))
	case told > 0:
		l.to.WarnContext(ctx, "requests without a key or beyond their rate were left out of the log", "count", told)
	}
	return ok
}

// cut bounds a text.
func cut(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[:limit], "") + fmt.Sprintf("… (%d bytes)", len(text))
}
