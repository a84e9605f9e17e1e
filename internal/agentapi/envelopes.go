package agentapi

import (
	"encoding/binary"
	"fmt"
	"io"
	"net/http"

	"github.com/cayhq/cay/internal/budget"
)

// metered sends requests for streams of the Connect protocol. It takes the memory of each message from
// the call's account while the message is read.
type metered struct{ *http.Client }

// Do sends a request and meters the body of its answer.
func (m metered) Do(r *http.Request) (*http.Response, error) {
	resp, err := m.Client.Do(r)
	if err == nil {
		resp.Body = &envelopes{ReadCloser: resp.Body, account: budget.From(r.Context())}
	}
	return resp, err
}

const (
	envelopeHead = 5 // bytes: flags and the length of the message
	// smallMessage is the longest message, in bytes, that is not taken from the account: the cost that
	// each call pays at its start covers it. A larger value leaves memory that no account counts.
	smallMessage = 4 << 10
)

// envelopes meters the messages of a stream. A message longer than maxMessage, which no agent sends,
// ends the stream.
type envelopes struct {
	io.ReadCloser
	account *budget.Account

	head [envelopeHead]byte
	got  int   // bytes of head that have come
	left int64 // bytes of the message that have not come
	held int64 // bytes taken from account
}

// Read implements [io.Reader].
func (e *envelopes) Read(p []byte) (int, error) {
	n, err := e.ReadCloser.Read(p)
	for b := p[:n]; len(b) > 0; {
		if e.got < envelopeHead {
			took := copy(e.head[e.got:], b)
			e.got, b = e.got+took, b[took:]
			if e.got < envelopeHead {
				break
			}
			e.left = int64(binary.BigEndian.Uint32(e.head[1:]))
			if e.left > maxMessage {
				return 0, unusable(fmt.Errorf("a message of the stream has %d bytes", e.left))
			}
			if e.left > smallMessage {
				// Once for the message, twice for the buffer that it is read to, which may have doubled.
				if err := e.account.Take(3 * e.left); err != nil {
					return 0, err
				}
				e.held = 3 * e.left
			}
		}
		took := min(int64(len(b)), e.left)
		e.left, b = e.left-took, b[took:]
		if e.left == 0 {
			e.give()
		}
	}
	return n, err
}

// give returns the memory of a message that has come whole to the account. The receiver takes the
// memory of what it keeps.
func (e *envelopes) give() {
	e.account.Give(e.held)
	e.got, e.held = 0, 0
}

// Close implements [io.Closer].
func (e *envelopes) Close() error {
	e.give()
	return e.ReadCloser.Close()
}
