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

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/fault"
)

// statuses is the one place where a kind of error becomes an HTTP status.
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

// statusGone is what the log and the metrics say of a call whose caller left
// before the answer; nobody receives it. nginx made the number known.
const statusGone = 499

// maxField bounds how much of a caller's own field name is sent back, bytes.
const maxField = 256

// fail answers err. What is not a fault is internal: its text goes to the log line
// of the call alone.
func (s *server) fail(w http.ResponseWriter, r *http.Request, err error) {
	var notJSON errNotJSON
	if errors.As(err, &notJSON) {
		s.problem(w, r, http.StatusUnsupportedMediaType, fault.InField("unsupported_media_type", "Content-Type", "%s", notJSON.detail))
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

// verdict is what the caller is told of an error, and under which status; it notes for
// the call what broke.
func verdict(r *http.Request, err error) (int, *fault.Error) {
	status, f := statusOf(err)
	if status >= 500 {
		c := callOf(r)
		c.err = err
		if r.Context().Err() != nil {
			// Whatever broke, broke because the caller left or the server stops. It is
			// answered all the same, so that no half-done call looks like a success.
			c.gone = true
			status, f = http.StatusServiceUnavailable, fault.New(fault.Unavailable, "interrupted", "the call was interrupted")
		}
	}
	return status, f
}

// statusOf is the status of an error, and what of it a caller is told.
func statusOf(err error) (int, *fault.Error) {
	f := fault.As(err)
	if f == nil || f.Kind == fault.Internal && f.Code == "" {
		f = fault.New(fault.Internal, "internal", "something broke on this server; its log has the cause under the request_id").Because(err)
	}
	status := statuses[f.Kind]
	if status == 0 {
		status = http.StatusInternalServerError
	}
	return status, f
}

// problem writes a fault under a status that its kind does not have.
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

// problemOf is a fault as the caller sees it. The log line of the call has its code.
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

// What is still read of the body of a request that is refused: many clients send
// all of it before they look for an answer, and a connection closed meanwhile would
// tell them nothing. It is more than a file may have, so that a file which is a
// little too large hears of it.
const maxRest = 128 << 20 // bytes

// maxStrangersRest bounds how much is still read of the body of a caller without a valid key, bytes,
// and strangersDrain for how long: enough for the JSON body of a client with a wrong key. With more,
// anybody could keep the server reading.
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
		return // who waits to be asked for the body is not asked
	case code == codeIncomplete, code == auth.CodeTooManyAttempts:
		return // nothing comes, or nothing is wanted
	}
	control := http.NewResponseController(w)
	patience, rest := c.patience.drain, int64(maxRest)
	if c.who.Key.ID == "" {
		patience, rest = min(patience, strangersDrain), maxStrangersRest
	}
	// A writer without deadlines is one of a test.
	_ = control.SetReadDeadline(time.Now().Add(patience))
	withoutCall(r, func() {
		if _, err := io.CopyN(io.Discard, r.Body, rest); err == io.EOF {
			_ = control.SetReadDeadline(time.Time{}) // see body
		}
	})
}

// answer writes v as JSON.
func (s *server) answer(w http.ResponseWriter, r *http.Request, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store") // keys, files and states are nobody else's
	writeJSON(w, r, status, v)
}

func writeJSON(w http.ResponseWriter, r *http.Request, status int, v any) {
	w.WriteHeader(status)
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		// The caller has gone, or our own types cannot be encoded; either way the
		// answer cannot be mended any more.
		callOf(r).err = err
	}
}

// parameterError makes a fault of what the generated code says about a path,
// query or header parameter.
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
		return fault.New(fault.Invalid, "invalid_request", "a parameter is not right").Because(err)
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
	return fault.InField(codeOf(name), name, "%s", detail).Because(err)
}

// codeOf is the code of an Invalid in a field: that of its first element.
func codeOf(field string) string {
	if i := strings.IndexAny(field, ".["); i >= 0 {
		field = field[:i]
	}
	return "invalid_" + strings.ToLower(strings.ReplaceAll(field, "-", "_"))
}

// duration is a Go-style duration of a request's field, nil if it was not given.
func duration(field string, text *string) (*time.Duration, error) {
	if text == nil {
		return nil, nil
	}
	d, err := time.ParseDuration(*text)
	if err != nil {
		return nil, fault.InField(codeOf(field), field, "must be a duration such as 30s, 5m or 1h30m")
	}
	return &d, nil
}
