package cay

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// acceptEvents changes a request to ask for a stream of events.
func acceptEvents(_ context.Context, r *http.Request) error {
	r.Header.Set("Accept", "text/event-stream")
	return nil
}

// errLast is returned by a callback of readEvents to report that the last event has come.
var errLast = errors.New("the last event")

// readEvents calls on with each event of a stream, of up to max bytes, until on fails. event is
// "" for an id without an event. readEvents returns nil if on returns errLast, and
// [io.ErrUnexpectedEOF] if the stream ends before.
func readEvents(r io.Reader, max int, on func(id, event string, data []byte) error) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, max)
	fields := map[string]string{}
	for lines.Scan() {
		if name, value, ok := strings.Cut(lines.Text(), ":"); ok {
			fields[name] = strings.TrimPrefix(value, " ")
			continue
		}
		if fields["event"] != "" || fields["id"] != "" {
			if err := on(fields["id"], fields["event"], []byte(fields["data"])); errors.Is(err, errLast) {
				return nil
			} else if err != nil {
				return err
			}
		}
		clear(fields)
	}
	return errors.Join(io.ErrUnexpectedEOF, lines.Err())
}

// errorOfEvent returns the error of an event whose data is a problem.
func errorOfEvent(data []byte) error {
	var p problem
	if err := json.Unmarshal(data, &p); err != nil {
		return fmt.Errorf("decoding an error: %w", err)
	}
	e := &Error{Status: p.Status, Code: p.Code, Detail: p.Detail, RequestID: p.RequestID}
	if p.Field != nil {
		e.Field = *p.Field
	}
	return e
}
