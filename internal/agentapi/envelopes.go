package agentapi

import (
	"encoding/binary"
	"fmt"
	"io"
	"net/http"

	"github.com/cayhq/cay/internal/budget"
)

// metered is a client for streams of the Connect protocol, whose messages are taken from the call's
// account while they are put together.
type metered struct{ *http.Client }

// Do sends a request.
func (m metered) Do(r *http.Request) (*http.Response, error) {
	resp, err := m.Client.Do(r)
	if err == nil {
		resp.Body = &envelopes{ReadCloser: resp.Body, account: budget.From(r.Context())}
	}
	return resp, err
}

const (
	envelopeHead = 5 // bytes: flags and the length of the message
	// smallMessage is up to which length a message counts as part of what every call costs, bytes.
	smallMessage = 4 << 10
)

// envelopes follows the messages of a stream. One that is longer than any of an agent's ends it.
type envelopes struct {
	io.ReadCloser
	account *budget.Account

	head [envelopeHead]byte
	got  int   // bytes of head
	left int64 // bytes of the message that have not come
	held int64
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
				// The buffer it is read to, which may have doubled, and the message.
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

// give is called when a message is whole: what is kept of it is the receiver's to take.
func (e *envelopes) give() {
	e.account.Give(e.held)
	e.got, e.held = 0, 0
}

// Close implements [io.Closer].
func (e *envelopes) Close() error {
	e.give()
	return e.ReadCloser.Close()
}
