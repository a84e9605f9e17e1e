package api

import (
	"encoding/json"
	"errors"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// statuses maps each kind of fault to its HTTP status. No other code does.
var statuses = map[fault.Kind]int{
	fault.Internal:        http.StatusInternalServerError,
	fault.NotFound:        http.StatusNotFound,
	fault.Conflict:        http.StatusConflict,
	fault.Invalid:         http.StatusBadRequest,
	fault.Unauthenticated: http.StatusUnauthorized,
	fault.Denied:          http.StatusForbidden,
	fault.Exhausted:       http.StatusTooManyRequests,
	fault.Unavailable:     http.StatusServiceUnavailable,
	fault.NoSpace:         http.StatusInsufficientStorage,
	fault.TooLarge:        http.StatusRequestEntityTooLarge,
	fault.Upstream:        http.StatusBadGateway,
	fault.Gone:            http.StatusGone,
}

// statusGone is the status in the log and the metrics of a call whose caller left before the
// answer. It is never sent. nginx introduced the number.
const statusGone = 499

// maxField limits how many bytes of a caller's own field name are sent back.
const maxField = 256

// fail answers err. An error that is not a fault is internal: the caller is not shown its text,
// which goes to the log line of the call.
func (s *server) fail(w http.ResponseWriter, r *http.Request, err error) {
	var notJSON errNotJSON
	if errors.As(err, &notJSON) {
		s.problem(w, r, http.StatusUnsupportedMediaType,
			fault.InField(fault.CodeUnsupportedMediaType, "Content-Type", "%s", notJSON.detail))
		return
	}
	if fault.Is(err, fault.Unauthenticated) {
		if over := s.Auth.Failed(r.RemoteAddr); over != nil {
			err = over
		}
	}
	status, f := verdict(r, err)
	s.problem(w, r, status, f)
}

// verdict returns the status and the fault that answer an error. It notes a failure of the server
// in the call.
func verdict(r *http.Request, err error) (int, *fault.Error) {
	status, f := statusOf(err)
	if status >= 500 {
		c := callOf(r)
		c.err = err
		if r.Context().Err() != nil {
			// The error is a consequence of the caller leaving or the server stopping. Answer the call all
			// the same, so that an incomplete call does not look like a success.
			c.gone = true
			status, f = http.StatusServiceUnavailable, fault.New(fault.Unavailable, fault.CodeInterrupted,
				"the call was interrupted")
		}
	}
	return status, f
}

// statusOf returns the status of an error and the fault that its caller is shown.
func statusOf(err error) (int, *fault.Error) {
	f := fault.As(err)
	if f == nil || f.Kind == fault.Internal && f.Code == "" {
		f = fault.New(fault.Internal, fault.CodeInternal,
			"something broke on this server; its log has the cause under the request_id").Because(err)
	}
	status := statuses[f.Kind]
	if status == 0 {
		status = http.StatusInternalServerError
	}
	return status, f
}

// problem answers with a fault under the given status.
func (s *server) problem(w http.ResponseWriter, r *http.Request, status int, f *fault.Error) {
	drain(w, r, f.Code)
	p := problemOf(r, status, f)
	h := w.Header()
	if status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "Bearer")
	}
	if f.RetryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(int64(math.Ceil(f.RetryAfter.Seconds())), 10))
	}
	h.Set("Cache-Control", "no-store")
	if callOf(r).page && wantsPage(r) {
		s.writePage(w, r, status, f)
		return
	}
	h.Set("Content-Type", "application/problem+json")
	writeJSON(w, r, status, p)
}

// problemOf returns a fault as the caller sees it. It records the code for the log line of the
// call.
func problemOf(r *http.Request, status int, f *fault.Error) Problem {
	c := callOf(r)
	c.code = f.Code
	p := Problem{
		Type:      "urn:cay:problem:" + f.Code,
		Title:     http.StatusText(status),
		Status:    status,
		Detail:    f.Detail,
		Code:      f.Code,
		RequestID: c.id,
	}
	if field := f.Field; field != "" {
		if len(field) > maxField {
			field = strings.ToValidUTF8(field[:maxField], "") + "…"
		}
		p.Field = &field
	}
	return p
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

func drain(w http.ResponseWriter, r *http.Request, code string) {
	c := callOf(r)
	switch {
	case r.Body == nil || r.Body == http.NoBody:
		return
	case r.Header.Get("Expect") != "" && c.received.n == 0:
		return // the caller waits for the server to ask for the body, which it does not
	case code == fault.CodeIncompleteBody, code == fault.CodeTooManyAttempts:
		return // the rest will not come, or is not worth reading
	}
	control := http.NewResponseController(w)
	patience, rest := c.patience.drain, int64(maxRest)
	if c.who.Key.ID == "" {
		patience, rest = min(patience, strangersDrain), maxStrangersRest
	}
	// The writers of tests have no deadlines, so the error is ignored.
	_ = control.SetReadDeadline(time.Now().Add(patience))
	withoutCall(r, func() {
		if _, err := io.CopyN(io.Discard, r.Body, rest); err == io.EOF {
			_ = control.SetReadDeadline(time.Time{}) // the function body in decode.go says why
		}
	})
}

// answer writes v as JSON.
func (s *server) answer(w http.ResponseWriter, r *http.Request, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store") // only the caller may see keys, files and states
	writeJSON(w, r, status, v)
}

func writeJSON(w http.ResponseWriter, r *http.Request, status int, v any) {
	w.WriteHeader(status)
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		// The caller has left, or one of our types cannot be encoded. In both cases the answer cannot be
		// repaired.
		callOf(r).err = err
	}
}

// parameterError turns an error of the generated code about a path, query or header parameter into
// a fault.
func parameterError(err error) error {
	var name, detail string
	var required *RequiredParamError
	var requiredHeader *RequiredHeaderError
	var many *TooManyValuesForParamError
	var format *InvalidParamFormatError
	var unmarshal *UnmarshalingParamError
	switch {
	case errors.As(err, &required):
		name, detail = required.ParamName, "is required"
	case errors.As(err, &requiredHeader):
		name, detail = requiredHeader.ParamName, "is required"
	case errors.As(err, &many):
		name, detail = many.ParamName, "is given more than once"
	case errors.As(err, &format):
		name, detail = format.ParamName, "is not of the right type"
	case errors.As(err, &unmarshal):
		name, detail = unmarshal.ParamName, "is not of the right type"
	default:
		return fault.New(fault.Invalid, fault.CodeInvalidRequest, "a parameter is invalid").Because(err)
	}
	switch name {
	case "limit", "depth", "port":
		if detail == "is not of the right type" {
			detail = "must be a whole number"
		}
	case "wait", "recursive":
		if detail == "is not of the right type" {
			detail = "must be true or false"
		}
	}
	return fault.InvalidField(name, "%s", detail).Because(err)
}

// duration parses a duration of a request's field in Go's syntax. It returns nil if the field was
// not given.
func duration(field string, text *string) (*time.Duration, error) {
	if text == nil {
		return nil, nil
	}
	d, err := time.ParseDuration(*text)
	if err != nil {
		return nil, fault.InvalidField(field, "must be a duration such as 30s, 5m or 1h30m")
	}
	return &d, nil
}
