package e2b

import (
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// logEntry is E2B's SandboxLogEntry.
type logEntry struct {
	Timestamp time.Time         `json:"timestamp"`
	Level     string            `json:"level"`
	Message   string            `json:"message"`
	Fields    map[string]string `json:"fields"`
}

// maxLogs is the largest number of events in one answer.
const maxLogs = 1000

// logger names the source of every log line. E2B's CLI filters by it.
const logger = "cay"

// logsV1 encodes entries as GET /sandboxes/{id}/logs. Each line is a JSON text with
// level, message and logger, which E2B's CLI decodes.
func logsV1(entries []logEntry) any {
	type line struct {
		Timestamp time.Time `json:"timestamp"`
		Line      string    `json:"line"`
	}
	lines := make([]line, len(entries))
	for i, e := range entries {
		text := map[string]string{}
		maps.Copy(text, e.Fields)
		text["level"], text["message"], text["logger"] = e.Level, e.Message, logger
		encoded, err := json.Marshal(text)
		if err != nil {
			panic(err) // cannot happen with a map of strings
		}
		lines[i] = line{e.Timestamp, string(encoded)}
	}
	return map[string]any{"logs": lines, "logEntries": entries}
}

func logsV2(entries []logEntry) any { return map[string]any{"logs": entries} }

// logs answers with the events of a sandbox. The output of its commands goes to the clients that
// run them.
func (s *Handler) logs(form func([]logEntry) any) func(http.ResponseWriter, *http.Request) error {
	return func(w http.ResponseWriter, r *http.Request) error {
		id := sandboxID(r)
		q := r.URL.Query()
		limit := maxLogs
		if text := q.Get("limit"); text != "" {
			n, err := strconv.Atoi(text)
			if err != nil || n < 0 || n > maxLogs {
				return fault.InvalidField("limit", "must be from 0 to %d", maxLogs)
			}
			limit = n
		}
		from, err := unixMillis(q.Get("start"), "start")
		if err != nil {
			return err
		}
		if cursor, err := unixMillis(q.Get("cursor"), "cursor"); err != nil {
			return err
		} else if !cursor.IsZero() {
			from = cursor
		}
		events, err := s.events(r, id)
		if err != nil {
			return hidden(err, id)
		}
		entries := []logEntry{}
		for _, e := range events {
			if e.At.Before(from) || len(entries) == limit {
				continue
			}
			entries = append(entries, entryOf(e))
		}
		if q.Get("direction") == "backward" {
			slices.Reverse(entries)
		}
		reply(w, r, http.StatusOK, form(entries))
		return nil
	}
}

// events returns the newest events of a sandbox, oldest first.
func (s *Handler) events(r *http.Request, id sandbox.ID) ([]sandbox.Event, error) {
	var all []sandbox.Event
	cursor := ""
	for {
		page, next, err := s.Rows.Events(r.Context(), orgOf(r), id, maxPage, cursor)
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		if cursor = next; cursor == "" || len(all) >= maxLogs {
			slices.Reverse(all)
			return all, nil
		}
	}
}

func entryOf(e sandbox.Event) logEntry {
	out := logEntry{Timestamp: e.At.UTC(), Level: "info", Message: "sandbox " + string(e.To),
		Fields: map[string]string{"state": string(e.To)}}
	if e.From != "" {
		out.Fields["from"] = string(e.From)
	}
	if e.Reason != "" {
		out.Message += ": " + strings.ReplaceAll(e.Reason, "_", " ")
		out.Fields["reason"] = e.Reason
	}
	if e.Detail != "" {
		out.Message += ": " + e.Detail
	}
	if e.To == sandbox.Failed || e.Reason == string(sandbox.Lost) || strings.HasSuffix(e.Reason, "_failed") {
		out.Level = "error"
	}
	return out
}

// unixMillis parses a time in milliseconds; "" is the zero time.
func unixMillis(text, field string) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return time.Time{}, fault.InvalidField(field, "must be a time in milliseconds since 1970")
	}
	return time.UnixMilli(n), nil
}
