package api

import (
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
)

// maxField limits how many bytes of a caller's own field name are sent back.
const maxField = 256

// problemFor answers err. An error that is not a fault is internal: the caller is not shown its
// text, which goes to the log line of the call.
func (s *server) problemFor(w http.ResponseWriter, r *http.Request, err error) {
	var notJSON errNotJSON
	if errors.As(err, &notJSON) {
		s.problem(w, r, http.StatusUnsupportedMediaType,
			fault.InField(fault.CodeUnsupportedMediaType, "Content-Type", "%s", notJSON.detail))
		return
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
		c.Err = err
		if r.Context().Err() != nil {
			// The error is a consequence of the caller leaving or the server stopping. Answer the call all
			// the same, so that an incomplete call does not look like a success.
			c.Gone = true
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
			"an internal error; the server's log has the cause under the request_id").Because(err)
	}
	return f.Kind.Status(), f
}

// problem answers with a fault under the given status.
func (s *server) problem(w http.ResponseWriter, r *http.Request, status int, f *fault.Error) {
	p := problemOf(r, status, f)
	h := w.Header()
	if status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "Bearer")
	}
	httpserver.RetryAfter(h, f)
	if callOf(r).page && wantsPage(r) {
		s.writePage(w, r, status, f)
		return
	}
	httpserver.RefuseJSON(w, r, status, f.Code, "application/problem+json", p)
}

// problemOf returns a fault as the caller sees it. It records the code for the log line of the
// call.
func problemOf(r *http.Request, status int, f *fault.Error) Problem {
	c := callOf(r)
	c.Code = f.Code
	p := Problem{
		Type:      "urn:cay:problem:" + f.Code,
		Title:     http.StatusText(status),
		Status:    status,
		Detail:    f.Detail,
		Code:      f.Code,
		RequestID: c.ID,
	}
	if field := f.Field; field != "" {
		if len(field) > maxField {
			field = strings.ToValidUTF8(field[:maxField], "") + "…"
		}
		p.Field = &field
	}
	return p
}

// answer writes v as JSON.
func (s *server) answer(w http.ResponseWriter, r *http.Request, status int, v any) {
	httpserver.WriteJSON(w, r, status, v)
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
