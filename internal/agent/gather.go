package agent

import (
	"context"
	"net/http"
)

// gathering lets a call hold its answer back with [gather]. A flush is a write to
// the network, and in gVisor's stack one costs as much as the rest of a short
// command's answer.
func gathering(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g := &gatherer{ResponseWriter: w}
		next.ServeHTTP(g, r.WithContext(context.WithValue(r.Context(), gatherKey{}, g)))
	})
}

type gatherKey struct{}

// gather makes the call's answer leave when it is whole, or when there is more of
// it than the server's buffer holds.
func gather(ctx context.Context) {
	if g, ok := ctx.Value(gatherKey{}).(*gatherer); ok {
		g.held = true
	}
}

// gatherer belongs to the goroutine that answers the call until that calls gather;
// from then on it does not change.
type gatherer struct {
	http.ResponseWriter
	held bool
}

// Flush is what sends an answer's beginning before its end.
func (g *gatherer) Flush() {
	if g.held {
		return
	}
	// A writer that cannot be flushed has nothing to hold back.
	_ = http.NewResponseController(g.ResponseWriter).Flush()
}

// Unwrap is for http.ResponseController.
func (g *gatherer) Unwrap() http.ResponseWriter { return g.ResponseWriter }
