package client

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

// acceptEvents asks for a stream of events.
func acceptEvents(_ context.Context, r *http.Request) error {
	r.Header.Set("Accept", "text/event-stream")
	return nil
}

// errLast ends the reading of events: the last one has come.
var errLast = errors.New("the last event")

// readEvents hands the events of a stream to on until it says errLast, which is then no
// error; event is "" where there is an id alone. An event has max bytes at the most. A stream that ends before is an
// [io.ErrUnexpectedEOF].
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

// errorOfEvent is the error of an event whose data is a problem.
func errorOfEvent(data []byte) error {
	var p Problem
	if err := json.Unmarshal(data, &p); err != nil {
		return fmt.Errorf("decoding an error: %w", err)
	}
	e := &Error{Status: p.Status, Code: p.Code, Detail: p.Detail, RequestID: p.RequestID}
	if p.Field != nil {
		e.Field = *p.Field
	}
	return e
}
