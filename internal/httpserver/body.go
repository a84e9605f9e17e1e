package httpserver

import (
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
)

// Body is the body of a request. It counts what is read. Another goroutine may still read it after
// the call is answered.
type Body struct {
	io.ReadCloser
	control *http.ResponseController
	stall   atomic.Int64 // nanoseconds for each piece; 0 is no limit here
	n       atomic.Int64
	broken  atomic.Bool // a read failed before the end
	reading sync.Mutex  // held by Read
}

// Piecewise gives the caller a time for each piece of the body from now on. A body that does not
// come whole in that way fails with the error of [Incomplete]. With 0 the deadline that the caller of
// Piecewise sets stands for the whole rest.
func (b *Body) Piecewise(stall time.Duration) { b.stall.Store(int64(stall)) }

// Received returns the number of bytes that were read.
func (b *Body) Received() int64 { return b.n.Load() }

// Broken returns the error for a call whose body did not come whole, or nil.
func (b *Body) Broken() error {
	if !b.broken.Load() {
		return nil
	}
	return incomplete()
}

// Close waits for a Read in another goroutine, so that Broken knows of its error.
func (b *Body) Close() error {
	err := b.ReadCloser.Close()
	b.reading.Lock()
	defer b.reading.Unlock()
	return err
}

// Read implements [io.Reader].
func (b *Body) Read(p []byte) (int, error) {
	b.reading.Lock()
	defer b.reading.Unlock()
	stall := time.Duration(b.stall.Load())
	if stall > 0 {
		// The writers of tests have no deadlines, so the error is ignored.
		_ = b.control.SetReadDeadline(time.Now().Add(stall))
	}
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	switch {
	case err == nil || stall == 0:
	case err == io.EOF:
		_ = b.control.SetReadDeadline(time.Time{}) // ReadBody says why
	default:
		b.broken.Store(true)
		err = Incomplete(err)
	}
	return n, err
}

func incomplete() *fault.Error {
	return fault.New(fault.Invalid, fault.CodeIncompleteBody, "the body ended early or came too slowly")
}

// Incomplete returns the error for a body that does not come whole.
func Incomplete(cause error) error { return incomplete().Because(cause) }

// TooLarge returns the error for a body of more than limit bytes.
func TooLarge(limit int64) error {
	return fault.New(fault.TooLarge, fault.CodeBodyTooLarge, "the body is over %d bytes", limit)
}

// ReadBody reads a body of at most limit bytes, which must come within Patience.Body. It charges the
// call's account for the body. It returns nil if there is no body.
func ReadBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	if r.ContentLength == 0 || r.Body == nil || r.Body == http.NoBody {
		return nil, nil
	}
	if r.ContentLength > limit {
		return nil, TooLarge(limit)
	}
	c := CallOf(r)
	c.Body.Piecewise(0)
	control := http.NewResponseController(w)
	// The writers of tests have no deadlines, so the error is ignored.
	_ = control.SetReadDeadline(time.Now().Add(c.Patience.Body))
	b, err := readAll(&c.Account, http.MaxBytesReader(w, r.Body, limit), limit, r.ContentLength)
	var over *http.MaxBytesError
	switch {
	case errors.As(err, &over):
		return nil, TooLarge(limit)
	case fault.As(err) != nil:
		return nil, err
	case err != nil:
		return nil, Incomplete(err)
	}
	// Clear the deadline once the whole body is read: net/http watches the connection during the call
	// and would take an expired deadline for a caller that leaves. While more of the body is to come
	// the deadline must stay, because net/http waits for the rest in the end.
	_ = control.SetReadDeadline(time.Time{})
	if len(b) == 0 {
		return nil, nil
	}
	return b, nil
}

const (
	// smallBody is the largest body that CallCost includes, in bytes.
	smallBody = 8 << 10
	// bodyCost is the number of bytes that one byte of a JSON body costs: it is held as received, as
	// decoded, and as it is passed on.
	bodyCost = 3
)

// readAll reads a body of at most limit bytes and charges the account for them as they arrive.
func readAll(account *budget.Account, body io.Reader, limit, length int64) ([]byte, error) {
	b := make([]byte, 0, min(max(length+1, 512), smallBody))
	for {
		n, err := body.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if err == io.EOF {
			return b, nil
		}
		if err != nil {
			return nil, err
		}
		if len(b) < cap(b) {
			continue
		}
		larger := min(2*int64(cap(b)), limit+512) // a byte beyond the limit must be noticed
		if err := account.Take(bodyCost * (larger - int64(cap(b)))); err != nil {
			return nil, err
		}
		b = append(make([]byte, 0, larger), b...)
	}
}

// maxRest limits how many bytes of the body of a refused request are still read. Many clients send
// the whole body before they look for an answer, and closing the connection meanwhile would hide
// the answer from them. The limit is above the size that a file may have, so that the sender of a
// file that is slightly too large gets the answer.
const maxRest = 128 << 20

// maxStrangersRest limits how many bytes of the body of a caller without a valid key are still
// read, and strangersDrain for how long. They suffice for the JSON body of a client with a wrong
// key. With higher limits, anybody could keep the server reading.
const (
	maxStrangersRest = 1 << 20
	strangersDrain   = 5 * time.Second
)

// Refuse answers a call with an error of the code, and then reads the rest of the request's body,
// within limits. The answer leaves first: a client that looks for it while it sends stops sending,
// and it has the answer when the server closes the connection because the rest is too long.
func Refuse(w http.ResponseWriter, r *http.Request, status int, code string, answer []byte) {
	control := http.NewResponseController(w)
	more := worthReading(r, code)
	if more {
		// Without this net/http would itself read some of the body before the head leaves, or close the
		// connection. HTTP/2 and the writers of tests do not have it, so the error is ignored.
		_ = control.EnableFullDuplex()
	}
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Content-Length", strconv.Itoa(len(answer)))
	w.WriteHeader(status)
	if _, err := w.Write(answer); err != nil {
		CallOf(r).Err = err // the caller has left
		return
	}
	if more {
		readRest(w, r)
	}
}

// readRest sends what was answered, and then reads the rest of the request's body, within limits.
func readRest(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	_ = control.Flush() // the caller may have left, and then the body ends too
	if !drained(control, r) {
		closeAfter(w)
	}
}

// worthReading reports whether the rest of a refused request's body is read.
func worthReading(r *http.Request, code string) bool {
	switch {
	case r.Body == nil || r.Body == http.NoBody:
		return false
	case r.Header.Get("Expect") != "" && CallOf(r).Body.Received() == 0:
		return false // the caller waits for the server to ask for the body, which it does not
	}
	// Otherwise the rest will not come, or is not worth reading.
	return code != fault.CodeIncompleteBody && code != fault.CodeTooManyAttempts
}

// drained reads the rest of a refused request's body. It reports whether it came to the end.
func drained(control *http.ResponseController, r *http.Request) (whole bool) {
	c := CallOf(r)
	c.Body.Piecewise(0)
	patience, rest := c.Patience.Drain, int64(maxRest)
	if c.Who.Key.ID == "" {
		patience, rest = min(patience, strangersDrain), maxStrangersRest
	}
	// The writers of tests have no deadlines, so the error is ignored.
	_ = control.SetReadDeadline(time.Now().Add(patience))
	WithoutCall(r, func() {
		_, err := io.CopyN(io.Discard, r.Body, rest)
		whole = err == io.EOF
	})
	if whole {
		_ = control.SetReadDeadline(time.Time{}) // ReadBody says why
	}
	return whole
}

// closeAfter makes net/http close the connection when the call ends, after a moment in which the
// client can take the answer. Otherwise net/http would take the rest of the body for the next
// request. Only a body over its limit tells net/http so once the head has left.
func closeAfter(w http.ResponseWriter) {
	for {
		wrapper, ok := w.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			break
		}
		w = wrapper.Unwrap()
	}
	over := http.MaxBytesReader(w, io.NopCloser(strings.NewReader("x")), 0)
	_, _ = over.Read(make([]byte, 1)) // fails, and tells w
}
