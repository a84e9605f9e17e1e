package api

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
)

// passCost is added to the cost of a call for copying a file or an archive, and for a listing; see
// [httpserver.CallCost].
const passCost = copyPiece

// piece is the number of bytes of an answer that are collected before they are written.
const piece = 32 << 10

// answerBegin is a writer that begins the answer with its first write. Until then another answer
// can be sent.
type answerBegin struct {
	w     http.ResponseWriter
	begun bool
}

func (a *answerBegin) Write(p []byte) (int, error) {
	if !a.begun {
		a.begun = true
		a.w.Header().Set("Content-Type", "application/json")
		a.w.Header().Set("Cache-Control", "no-store") // only the caller may see keys, files and states
		a.w.WriteHeader(http.StatusOK)
	}
	return a.w.Write(p)
}

// listReply sends an answer {"name": [items…], …} while its items are produced.
type listReply struct {
	begin *answerBegin
	out   *bufio.Writer
	items int
}

func newListReply(w http.ResponseWriter, name string) *listReply {
	l := &listReply{begin: &answerBegin{w: w}}
	l.out = bufio.NewWriterSize(l.begin, piece)
	_, _ = fmt.Fprintf(l.out, `{"%s":[`, name) // it fits into the buffer
	return l
}

// add appends an encoded item.
func (l *listReply) add(item []byte) error {
	if l.items++; l.items > 1 {
		if err := l.out.WriteByte(','); err != nil {
			return err
		}
	}
	_, err := l.out.Write(item)
	return err
}

// encode encodes a value the way all answers are encoded.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// end ends the list, appends more members to the object, and ends the answer.
func (l *listReply) end(members string) error {
	if _, err := l.out.WriteString("]" + members + "}\n"); err != nil {
		return err
	}
	return l.out.Flush()
}

// broken answers an error that occurred while a list was sent. If the answer has begun, it breaks
// the connection, because nothing else tells the client that the list is incomplete.
func (s *server) broken(l *listReply, w http.ResponseWriter, r *http.Request, err error) {
	if !l.begin.begun {
		s.fail(w, r, err)
		return
	}
	if r.Context().Err() != nil {
		callOf(r).Gone = true
	}
	callOf(r).Err = fmt.Errorf("sending a list: %w", err)
	panic(http.ErrAbortHandler)
}

// listPage is the number of rows of a listing that are held at once. A row may have an environment
// of 128 KiB, a policy and metadata, so a larger number costs memory; a smaller one costs more
// reads of the database.
const listPage = 8

// answerList answers with a page of rows, of which it holds listPage at once.
func answerList[T, U any](s *server, w http.ResponseWriter, r *http.Request, name string, limit int, cursor string,
	page func(limit int, cursor string) ([]T, string, error), shown func(T) U) {
	account := &callOf(r).Account
	reply := newListReply(w, name)
	for left := limit; ; {
		rows, next, err := page(min(left, listPage), cursor)
		var texts [][]byte
		held := int64(0)
		for i := 0; err == nil && i < len(rows); i++ {
			var text []byte
			if text, err = encode(shown(rows[i])); err == nil {
				held += 3 * int64(len(text)) // held as a row, as an API type, and as text
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
