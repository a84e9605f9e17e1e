package answer

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"time"

	"connectrpc.com/connect"
)

// defaultKeepalive is the interval of keepalives, E2B's, unless the client asks
// for another. Proxies may close a stream that is silent for longer.
const defaultKeepalive = 90 * time.Second

// Ended returns the error of a call whose context has ended.
func Ended(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return connect.NewError(connect.CodeDeadlineExceeded, errors.New("the time limit of the call is over"))
	}
	return connect.NewError(connect.CodeCanceled, errors.New("the client has gone"))
}

// Keepalive returns the interval of keepalives that a client asks for.
func Keepalive(h http.Header) time.Duration {
	if s, err := strconv.Atoi(h.Get("Keepalive-Ping-Interval")); err == nil && s > 0 && s <= 3600 {
		return time.Duration(s) * time.Second
	}
	return defaultKeepalive
}
