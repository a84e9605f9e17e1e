package objects

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	// stall is the time for which a connection may carry nothing before a request fails. It includes the server's own
	// work, such as the joining of the parts of a large object. A shorter one fails requests of slow servers; with a
	// longer one a dead connection delays its request by that much.
	stall = 2 * time.Minute
	// leastRate is the speed in bytes per second that a request must reach after stall. Without it, a server that sends a
	// byte from time to time would hold requests, of which there are few, for ever. A higher one fails requests over a
	// slow line, which up to 2*maxRequests of them share.
	leastRate = 16 << 10
	// maxAnswer bounds an answer without the content of an object, in bytes: a list of 1000 objects has at most 2 MiB.
	maxAnswer = 4 << 20
	// bufferSize is the size of a buffer that a transfer copies through, in bytes. There is one
	// for each request of a transfer, and about as much again in each connection. Smaller ones take more system calls.
	bufferSize = 256 << 10
)

// wire makes the HTTP requests to an S3 server. It bounds answers and silence, and reads the server's clock.
type wire struct {
	transport http.Transport
	patience  time.Duration // stall, but for tests
	rate      int64         // leastRate, but for tests

	mu sync.Mutex
	// +checklocks:mu
	ahead time.Duration // of the server's clock
	// +checklocks:mu
	seen bool // whether ahead is known
}

func newWire() *wire {
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	return &wire{patience: stall, rate: leastRate, transport: http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return stallConn{c}, nil
		},
		TLSHandshakeTimeout: 10 * time.Second,
		MaxIdleConnsPerHost: 2 * maxRequests, MaxConnsPerHost: 3 * maxRequests, IdleConnTimeout: time.Minute,
		WriteBufferSize: bufferSize / 4, ReadBufferSize: bufferSize / 4, MaxResponseHeaderBytes: 64 << 10,
		DisableCompression: true, // an object has the bytes that were written
	}}
}

// stallConn is a connection on which every read and write fails after stall.
type stallConn struct{ net.Conn }

// Read implements [net.Conn].
func (c stallConn) Read(p []byte) (int, error) {
	_ = c.SetReadDeadline(time.Now().Add(stall)) // a closed connection fails the read
	return c.Conn.Read(p)
}

// Write implements [net.Conn].
func (c stallConn) Write(p []byte) (int, error) {
	_ = c.SetWriteDeadline(time.Now().Add(stall)) // a closed connection fails the write
	return c.Conn.Write(p)
}

type contentKey struct{}

// content marks a request whose answer is content of an object, of which the caller reads n bytes.
func content(ctx context.Context, n int64) context.Context {
	return context.WithValue(ctx, contentKey{}, n)
}

var errSlow = errors.New("the S3 server is too slow")

// RoundTrip implements [http.RoundTripper].
func (w *wire) RoundTrip(r *http.Request) (*http.Response, error) {
	most, isContent := r.Context().Value(contentKey{}).(int64)
	if !isContent {
		most = maxAnswer
	}
	limit := w.patience + time.Duration((max(r.ContentLength, 0)+most)/w.rate)*time.Second
	ctx, cancel := context.WithTimeoutCause(r.Context(), limit, errSlow)
	answer, err := w.transport.RoundTrip(r.WithContext(ctx))
	if err != nil {
		cancel()
		return nil, err
	}
	answer.Body = &endingBody{answer.Body, cancel}
	if at, err := http.ParseTime(answer.Header.Get("Date")); err == nil {
		w.mu.Lock()
		w.ahead, w.seen = at.Sub(time.Now().Truncate(time.Second)), true
		w.mu.Unlock()
	}
	if !isContent || answer.StatusCode >= 300 {
		answer.Body = http.MaxBytesReader(nil, answer.Body, maxAnswer)
	}
	return answer, nil
}

// endingBody is the body of an answer, which ends the context of its request when it is closed.
type endingBody struct {
	io.ReadCloser
	end context.CancelFunc
}

// Close implements [io.Closer].
func (b *endingBody) Close() error {
	defer b.end()
	return b.ReadCloser.Close()
}

// skew returns how far the server's clock is ahead.
func (w *wire) skew() (time.Duration, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.seen {
		return 0, errors.New("the server does not tell its time")
	}
	return w.ahead, nil
}

// ignoreAbsent returns nil for the error of an object or an upload that does not exist.
func ignoreAbsent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
