package httpserver

import (
	"bytes"
	"encoding/json"
	"io"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// RetryAfter tells the caller of a failed call when to try again, if that is known.
func RetryAfter(h http.Header, f *fault.Error) {
	if f != nil && f.RetryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(int64(math.Ceil(f.RetryAfter.Seconds())), 10))
	}
}

// OwnHead sets the headers that all answers have but those of programs in sandboxes. Answers hold
// files, output and names that untrusted code wrote, so no browser may run them as a page.
func OwnHead(h http.Header, id string) {
	h.Set("X-Request-Id", id)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'; sandbox")
	h.Set("Referrer-Policy", "no-referrer")
}

// WriteJSON answers with v as JSON. The call notes an error: the caller has left, or v cannot be
// encoded. In both cases the answer cannot be repaired.
func WriteJSON(w http.ResponseWriter, r *http.Request, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store") // only the caller may see keys, files and states
	w.WriteHeader(status)
	if err := encode(w, v); err != nil {
		CallOf(r).Err = err
	}
}

// RefuseJSON answers with an error that v describes as JSON of the media type; see [Refuse].
func RefuseJSON(w http.ResponseWriter, r *http.Request, status int, code, media string, v any) {
	w.Header().Set("Content-Type", media)
	var b bytes.Buffer
	if err := encode(&b, v); err != nil { // cannot happen with texts and numbers
		panic(err)
	}
	Refuse(w, r, status, code, b.Bytes())
}

// encode writes v the way all answers are encoded.
func encode(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// Recorder records the status and size of an answer, and disconnects a caller that does not read
// it.
type Recorder struct {
	http.ResponseWriter
	// OnHead, if not nil, is called with the header before each head is written, informational ones
	// included.
	OnHead func(status int, h http.Header)

	control *http.ResponseController
	call    *Call
	made    string // the nonce with which a replica is told the sandbox that the call made; "" tells none
	status  int
	bytes   int64
}

// Unwrap lets http.ResponseController reach the connection.
func (w *Recorder) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Upgraded records that another protocol uses the connection from now on.
func (w *Recorder) Upgraded() { w.status = http.StatusSwitchingProtocols }

// WriteHeader begins the answer.
func (w *Recorder) WriteHeader(status int) {
	if w.status == 0 && (status >= 200 || status == http.StatusSwitchingProtocols) {
		w.status = status
		if w.made != "" && w.call.Sandbox != "" {
			w.Header().Set(sandboxHeader, w.made+" "+w.call.Sandbox)
		}
	}
	w.soon()
	if w.OnHead != nil {
		w.OnHead(status, w.Header())
	}
	w.ResponseWriter.WriteHeader(status)
}

// soon extends the write deadline, so that the caller has time to take the next piece. The writers
// of tests have no deadlines, so the error is ignored.
func (w *Recorder) soon() {
	_ = w.control.SetWriteDeadline(time.Now().Add(w.call.Patience.Stall))
}

// writePiece is the number of bytes that are written under one deadline. With a deadline of a
// minute, a caller must take at least 4 KiB a second; larger pieces cut off slower callers.
const writePiece = 256 << 10

// Write writes b in pieces and disconnects the caller if it does not take each piece in time.
func (w *Recorder) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	written := 0
	for {
		piece := b[written:min(written+writePiece, len(b))]
		w.soon()
		n, err := w.ResponseWriter.Write(piece)
		written += n
		w.bytes += int64(n)
		if err != nil || written == len(b) {
			return written, err
		}
	}
}
