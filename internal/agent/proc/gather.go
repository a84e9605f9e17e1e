package proc

import (
	"context"
	"net/http"
)

// gathering allows a call to hold its answer back with [gather]. A flush writes to
// the network; in gVisor's stack one write costs as much as the rest of a short
// command's answer.
func gathering(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g := &gatherer{ResponseWriter: w}
		next.ServeHTTP(g, r.WithContext(context.WithValue(r.Context(), gatherKey{}, g)))
	})
}

type gatherKey struct{}

// gather holds the call's answer back until it is complete or fills the server's buffer.
func gather(ctx context.Context) {
	if g, ok := ctx.Value(gatherKey{}).(*gatherer); ok {
		g.held = true
	}
}

// gatherer is a ResponseWriter that can ignore flushes. It belongs to the goroutine that
// answers the call until that goroutine calls gather; from then on it does not change.
type gatherer struct {
	http.ResponseWriter
	held bool
}

// Flush sends the part of the answer that is written so far, unless it is held back.
func (g *gatherer) Flush() {
	if g.held {
		return
	}
	// A writer that cannot be flushed has nothing to hold back.
	_ = http.NewResponseController(g.ResponseWriter).Flush()
}

// Unwrap returns the wrapped writer to http.ResponseController.
func (g *gatherer) Unwrap() http.ResponseWriter { return g.ResponseWriter }
