package api

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"

	"github.com/cayhq/cay/internal/budget"
)

// The costs of calls while they go on, bytes, reckoned from the buffers that each holds. Too high, an organization
// that makes many calls gets 429 although there is memory; too low, a server with 1000 callers needs more than its
// memory.heap_mb.
const (
	// callCost is a connection with its buffers and goroutines, and a request without a long head or body.
	callCost = 32 << 10
	// insideCost is a call into a sandbox: another connection, and the piece that is being passed on.
	insideCost = 64 << 10
	// passCost is what a file or an archive is passed on with beside, and a listing.
	passCost = copyPiece
	// portCost is a request to a port: a connection with larger buffers, and one to copy.
	portCost = 128 << 10
	// headLineCost is what a line of a request's head costs beside its bytes.
	headLineCost = 100
	// smallBody is up to which length a body is a part of callCost, bytes.
	smallBody = 8 << 10
	// bodyCost is how many bytes one byte of a JSON body costs: as it came, as it was decoded, and as it
	// is sent on.
	bodyCost = 3
)

// account opens the account of a call whose organization is known. Until then a call holds nothing that lasts.
func (s *server) account(r *http.Request, orgID string, cost int64) error {
	cost += int64(3 * len(r.RequestURI)) // with the path and the parameters that were made of it
	for name, values := range r.Header {
		cost += int64(headLineCost + len(name))
		for _, v := range values {
			cost += int64(headLineCost/2 + len(v))
		}
	}
	return callOf(r).account.Open(s.Budget, orgID, cost)
}

// readAll reads a body of at most limit bytes, which are taken from the account as they come.
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
		larger := min(2*int64(cap(b)), limit+512) // one more than the limit has to be seen
		if err := account.Take(bodyCost * (larger - int64(cap(b)))); err != nil {
			return nil, err
		}
		b = append(make([]byte, 0, larger), b...)
	}
}

// piece is how much of an answer is gathered before it is written, bytes.
const piece = 32 << 10

// answerBegin is a writer whose first write begins the answer: until then there can be another.
type answerBegin struct {
	w     http.ResponseWriter
	begun bool
}

func (a *answerBegin) Write(p []byte) (int, error) {
	if !a.begun {
		a.begun = true
		a.w.Header().Set("Content-Type", "application/json")
		a.w.Header().Set("Cache-Control", "no-store") // keys, files and states are nobody else's
		a.w.WriteHeader(http.StatusOK)
	}
	return a.w.Write(p)
}

// listReply is an answer {"name": [items…], …} that is sent while it is made.
type listReply struct {
	begin *answerBegin
	out   *bufio.Writer
	items int
}

func newListReply(w http.ResponseWriter, name string) *listReply {
	l := &listReply{begin: &answerBegin{w: w}}
	l.out = bufio.NewWriterSize(l.begin, piece)
	_, _ = fmt.Fprintf(l.out, `{"%s":[`, name) // it fits the buffer
	return l
}

// add adds an item that is encoded.
func (l *listReply) add(item []byte) error {
	if l.items++; l.items > 1 {
		if err := l.out.WriteByte(','); err != nil {
			return err
		}
	}
	_, err := l.out.Write(item)
	return err
}

// encode encodes a value as all answers are.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// end ends the list, and the answer after more members.
func (l *listReply) end(members string) error {
	if _, err := l.out.WriteString("]" + members + "}\n"); err != nil {
		return err
	}
	return l.out.Flush()
}

// broken answers an error of a list that was being sent, or breaks the connection if the answer has begun:
// only that says that it is not whole.
func (s *server) broken(l *listReply, w http.ResponseWriter, r *http.Request, err error) {
	if !l.begin.begun {
		s.fail(w, r, err)
		return
	}
	if r.Context().Err() != nil {
		callOf(r).gone = true
	}
	callOf(r).err = fmt.Errorf("sending a list: %w", err)
	panic(http.ErrAbortHandler)
}

// listPage is how many rows of a listing are held at once. A row may have an environment of 128 KiB, a
// policy and metadata.
const listPage = 8

// answerList answers with a page of rows, of which it holds listPage at once.
func answerList[T, U any](s *server, w http.ResponseWriter, r *http.Request, name string, limit int, cursor string,
	page func(limit int, cursor string) ([]T, string, error), shown func(T) U) {
	account := &callOf(r).account
	reply := newListReply(w, name)
	for left := limit; ; {
		rows, next, err := page(min(left, listPage), cursor)
		var texts [][]byte
		held := int64(0)
		for i := 0; err == nil && i < len(rows); i++ {
			var text []byte
			if text, err = encode(shown(rows[i])); err == nil {
				held += 3 * int64(len(text)) // as a row, as it is shown, and as text
				texts = append(texts, text)
			}
		}
		if err == nil {
			err = account.Take(held)
		}
		for i := 0; err == nil && i < len(texts); i++ {
			err = reply.add(texts[i])
		}
		if err != nil {
			s.broken(reply, w, r, err)
			return
		}
		account.Give(held)
		left, cursor = left-len(rows), next
		if next == "" || left <= 0 {
			break
		}
	}
	members := ""
	if cursor != "" {
		text, err := json.Marshal(cursor)
		if err != nil {
			s.broken(reply, w, r, err)
			return
		}
		members = `,"next_cursor":` + string(text)
	}
	if err := reply.end(members); err != nil {
		s.broken(reply, w, r, err)
	}
}
