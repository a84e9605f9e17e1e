package api

import (
	"bytes"
	"errors"
	"io/fs"
	"mime"
	"net/http"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cayhq/cay/internal/fault"
)

// Limits of JSON bodies, bytes.
const (
	maxBody        = 1 << 20
	maxExecuteBody = 8 << 20 // stdin is in it
)

// body reads a JSON body of at most limit bytes. One that is not there is nil.
func body(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	if r.ContentLength == 0 || r.Body == nil || r.Body == http.NoBody {
		return nil, nil
	}
	if r.ContentLength > limit {
		return nil, tooLarge(limit)
	}
	control := http.NewResponseController(w)
	// A writer without deadlines is one of a test.
	_ = control.SetReadDeadline(time.Now().Add(callOf(r).patience.body))
	b, err := readAll(&callOf(r).account, http.MaxBytesReader(w, r.Body, limit), limit, r.ContentLength)
	var over *http.MaxBytesError
	switch {
	case errors.As(err, &over):
		return nil, tooLarge(limit)
	case fault.As(err) != nil:
		return nil, err
	case err != nil:
		return nil, incomplete(err)
	}
	// The deadline must go when all is read: net/http watches the connection while we
	// work, and would take a deadline that passes for a caller who leaves. While
	// there is more to come it must stay, for net/http waits for that in the end.
	_ = control.SetReadDeadline(time.Time{})
	if len(b) == 0 {
		return nil, nil
	}
	return b, checkJSONType(r.Header)
}

func tooLarge(limit int64) error {
	return fault.New(fault.TooLarge, "body_too_large", "the body is over %d bytes", limit)
}

const codeIncomplete = "incomplete_body"

func incomplete(cause error) error {
	return fault.New(fault.Invalid, codeIncomplete, "the body ended early or came too slowly").Because(cause)
}

// errNotJSON is 415, a status that no kind of fault has.
type errNotJSON struct{ detail string }

func (e errNotJSON) Error() string { return e.detail }

// checkJSONType refuses a body that says it is something else. One that says
// nothing is taken for JSON.
func checkJSONType(h http.Header) error {
	if encoding := h.Get("Content-Encoding"); encoding != "" && encoding != "identity" {
		return errNotJSON{"the body is encoded; send it as it is"}
	}
	text := h.Get("Content-Type")
	if text == "" {
		return nil
	}
	media, params, err := mime.ParseMediaType(text)
	if err != nil || media != "application/json" {
		return errNotJSON{"the body must be application/json"}
	}
	if charset := params["charset"]; charset != "" && !strings.EqualFold(charset, "utf-8") {
		return errNotJSON{"the body must be UTF-8"}
	}
	return nil
}

// read decodes the body into dst, a pointer to a struct of api.gen.go, and
// returns it. Without a body it leaves dst alone, unless the body is required.
func read(w http.ResponseWriter, r *http.Request, limit int64, required bool, dst any) ([]byte, error) {
	b, err := body(w, r, limit)
	switch {
	case err != nil:
		return nil, err
	case b != nil:
		return b, decode(b, dst)
	case required:
		return nil, fault.New(fault.Invalid, "missing_body", "a JSON object is needed in the body")
	}
	return nil, nil
}

// nothing is the body of an operation that takes none: absent or an empty object.
type nothing struct{}

// DurationOrZero is a duration as text, for which the number 0 will do too.
type DurationOrZero string

// unmarshalers refuse null where a value is: in a list, a map, or a field that is
// required. An optional field that is null never comes here.
var unmarshalers = json.WithUnmarshalers(json.JoinUnmarshalers(
	json.UnmarshalFromFunc(func(d *jsontext.Decoder, _ *string) error { return refuseNull(d) }),
	json.UnmarshalFromFunc(func(d *jsontext.Decoder, _ *int) error { return refuseNull(d) }),
	json.UnmarshalFromFunc(takeZero),
))

func takeZero(d *jsontext.Decoder, dst *DurationOrZero) error {
	if d.PeekKind() != '0' { // which is the kind of all numbers
		return errors.ErrUnsupported // let the decoder do it
	}
	number, err := d.ReadValue()
	if err == nil && string(number) != "0" {
		err = errors.New("a number other than 0 has no unit")
	}
	*dst = "0"
	return err
}

func refuseNull(d *jsontext.Decoder) error {
	if d.PeekKind() == 'n' {
		return errors.New("null is no value here")
	}
	return errors.ErrUnsupported // let the decoder do it
}

// decode reads exactly one JSON object into dst: UTF-8, no unknown and no
// repeated fields, nothing after it. Errors are Invalid and name the field.
func decode(b []byte, dst any) error {
	if trimmed := bytes.TrimLeft(b, " \t\r\n"); len(trimmed) > 0 && trimmed[0] != '{' {
		return fault.New(fault.Invalid, "invalid_json", "the body must be a JSON object")
	}
	err := json.Unmarshal(b, dst, json.RejectUnknownMembers(true), unmarshalers)
	if err == nil {
		return nil
	}
	var semantic *json.SemanticError
	var syntax *jsontext.SyntacticError
	switch {
	case errors.Is(err, jsontext.ErrDuplicateName) && errors.As(err, &syntax):
		return fault.InField("duplicate_field", fieldPath(syntax.JSONPointer, dst), "is given more than once")
	case errors.As(err, &syntax):
		return fault.New(fault.Invalid, "invalid_json", "the body is not valid JSON at byte %d", syntax.ByteOffset).Because(err)
	case errors.Is(err, json.ErrUnknownName) && errors.As(err, &semantic):
		return fault.InField("unknown_field", fieldPath(semantic.JSONPointer, dst), "is no field of this request")
	case errors.As(err, &semantic):
		field := fieldPath(semantic.JSONPointer, dst)
		return fault.InField(codeOf(field), field, "must be %s", wanted(semantic.GoType)).Because(err)
	}
	return fault.New(fault.Invalid, "invalid_json", "the body cannot be read").Because(err)
}

// wanted names a type of api.gen.go as a caller knows it.
func wanted(t reflect.Type) string {
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t == nil {
		return "of another type"
	}
	if t == reflect.TypeFor[DurationOrZero]() {
		return "a duration such as 30s, 5m or 1h30m, or 0"
	}
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int32, reflect.Int64:
		return "a whole number"
	case reflect.Slice:
		return "a list"
	case reflect.Struct, reflect.Map:
		return "an object"
	}
	return "of another type"
}

// fieldPath writes a JSON pointer the way people do: egress.allow_cidrs[0]. The
// type says which numbers are indices.
func fieldPath(pointer jsontext.Pointer, dst any) string {
	var b strings.Builder
	t := reflect.TypeOf(dst)
	for token := range pointer.Tokens() {
		for t != nil && t.Kind() == reflect.Pointer {
			t = t.Elem()
		}
		if t != nil && t.Kind() == reflect.Slice {
			b.WriteString("[" + token + "]")
			t = t.Elem()
			continue
		}
		if b.Len() > 0 {
			b.WriteByte('.')
		}
		b.WriteString(token)
		t = member(t, token)
	}
	return b.String()
}

// member is the type of a field of a struct or a value of a map; nil if it has none.
func member(t reflect.Type, name string) reflect.Type {
	switch {
	case t == nil:
	case t.Kind() == reflect.Map:
		return t.Elem()
	case t.Kind() == reflect.Struct:
		for f := range t.Fields() {
			if tag, _, _ := strings.Cut(f.Tag.Get("json"), ","); tag == name {
				return f.Type
			}
		}
	}
	return nil
}

// fileMode is the octal text of permissions, 0 to 0777. The set-id and sticky bits
// are not taken: the agent would not set them.
func fileMode(text string) (fs.FileMode, error) {
	n, err := strconv.ParseUint(text, 8, 32)
	if err != nil || n > 0o777 || len(text) > len("0777") {
		return 0, fault.InField("invalid_mode", "mode", "must be permissions in octal, 0 to 0777, such as 0644")
	}
	return fs.FileMode(n), nil
}

// Limits of a page.
const (
	defaultLimit = 50
	maxLimit     = 200
)

// page checks the parameters of a listing; whether the cursor is one of ours is
// for the store to say.
func page(limit *int, cursor *string) (int, string, error) {
	n, after := defaultLimit, ""
	if limit != nil {
		n = *limit
	}
	if n < 1 || n > maxLimit {
		return 0, "", fault.InField("invalid_limit", "limit", "must be between 1 and %d", maxLimit)
	}
	if cursor != nil {
		after = *cursor
	}
	return n, after, nil
}
