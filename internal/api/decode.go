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
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
)

// Limits of JSON bodies, in bytes.
const (
	maxBody        = 1 << 20
	maxExecuteBody = 8 << 20 // includes stdin
)

// body reads a JSON body of at most limit bytes. It returns nil if there is no body.
func body(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	b, err := httpserver.ReadBody(w, r, limit)
	if err != nil || b == nil {
		return nil, err
	}
	return b, checkJSONType(r.Header)
}

// errNotJSON reports a body that is not JSON. It is answered with 415, a status that no kind of
// fault has.
type errNotJSON struct{ detail string }

func (e errNotJSON) Error() string { return e.detail }

// checkJSONType refuses a body whose headers declare another type than JSON. It accepts a body
// without a declared type.
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

// read decodes the body into dst, a pointer to a struct of api.gen.go, and returns the body.
// Without a body it leaves dst unchanged, or fails if the body is required.
func read(w http.ResponseWriter, r *http.Request, limit int64, required bool, dst any) ([]byte, error) {
	b, err := body(w, r, limit)
	switch {
	case err != nil:
		return nil, err
	case b != nil:
		return b, decode(b, dst)
	case required:
		return nil, fault.New(fault.Invalid, fault.CodeMissingBody, "a JSON object is needed in the body")
	}
	return nil, nil
}

// nothing decodes the body of an operation that takes none: absent or an empty object.
type nothing struct{}

// DurationOrZero holds a duration as text; JSON may also give the number 0.
type DurationOrZero string

// unmarshalers caches the options of decode by the type of the request.
var unmarshalers sync.Map // of reflect.Type to json.Options

// unmarshalersOf returns options that refuse null in lists, in maps and in the required fields of a
// request. A field that is null counts as absent if it is optional. The decoder handles optional
// fields with pointers itself.
func unmarshalersOf(request reflect.Type) json.Options {
	if known, ok := unmarshalers.Load(request); ok {
		return known.(json.Options)
	}
	options := json.WithUnmarshalers(json.JoinUnmarshalers(
		json.UnmarshalFromFunc(func(d *jsontext.Decoder, _ *string) error { return readNull(d, request) }),
		json.UnmarshalFromFunc(func(d *jsontext.Decoder, _ *int) error { return readNull(d, request) }),
		json.UnmarshalFromFunc(takeZero),
	))
	unmarshalers.Store(request, options)
	return options
}

func takeZero(d *jsontext.Decoder, dst *DurationOrZero) error {
	if d.PeekKind() != '0' { // '0' is the kind of all numbers
		return errors.ErrUnsupported // leave it to the decoder
	}
	number, err := d.ReadValue()
	if err == nil && string(number) != "0" {
		err = errors.New("a number other than 0 has no unit")
	}
	*dst = "0"
	return err
}

// readNull skips a null that stands for an absent field of the request, and refuses any other.
func readNull(d *jsontext.Decoder, request reflect.Type) error {
	switch {
	case d.PeekKind() != 'n':
		return errors.ErrUnsupported // leave it to the decoder
	case !isOptional(d, request):
		return errors.New("null is not allowed here")
	}
	return d.SkipValue()
}

// isOptional reports whether the value that comes next is an optional field of a struct.
func isOptional(d *jsontext.Decoder, request reflect.Type) bool {
	if kind, _ := d.StackIndex(d.StackDepth()); kind != '{' {
		return false
	}
	pointer := d.StackPointer() // ends with the name that was read last, which is the field's
	in := request
	for token := range pointer.Parent().Tokens() {
		in = inner(in, token)
	}
	for in != nil && in.Kind() == reflect.Pointer {
		in = in.Elem()
	}
	if in == nil || in.Kind() != reflect.Struct {
		return false
	}
	for f := range in.Fields() {
		if name, flags, _ := strings.Cut(f.Tag.Get("json"), ","); name == pointer.LastToken() {
			return strings.Contains(flags, "omitempty")
		}
	}
	return false
}

// inner returns the type of a member or an element of t, or nil if t has no such member.
func inner(t reflect.Type, token string) reflect.Type {
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t != nil && t.Kind() == reflect.Slice {
		return t.Elem()
	}
	return member(t, token)
}

// decode reads exactly one JSON object into dst. It refuses invalid UTF-8, unknown and repeated
// fields, and text after the object. Its errors are Invalid and name the field.
func decode(b []byte, dst any) error {
	if trimmed := bytes.TrimLeft(b, " \t\r\n"); len(trimmed) > 0 && trimmed[0] != '{' {
		return fault.New(fault.Invalid, fault.CodeInvalidJSON, "the body must be a JSON object")
	}
	err := json.Unmarshal(b, dst, json.RejectUnknownMembers(true), unmarshalersOf(reflect.TypeOf(dst)))
	if err == nil {
		return nil
	}
	var semantic *json.SemanticError
	var syntax *jsontext.SyntacticError
	switch {
	case errors.Is(err, jsontext.ErrDuplicateName) && errors.As(err, &syntax):
		return fault.InField(fault.CodeDuplicateField, fieldPath(syntax.JSONPointer, dst), "is given more than once")
	case errors.As(err, &syntax):
		return fault.New(fault.Invalid, fault.CodeInvalidJSON,
			"the body is not valid JSON at byte %d", syntax.ByteOffset).Because(err)
	case errors.Is(err, json.ErrUnknownName) && errors.As(err, &semantic):
		return fault.InField(fault.CodeUnknownField, fieldPath(semantic.JSONPointer, dst), "is not a field of this request")
	case errors.As(err, &semantic):
		field := fieldPath(semantic.JSONPointer, dst)
		return fault.InvalidField(field, "must be %s", wanted(semantic.GoType)).Because(err)
	}
	return fault.New(fault.Invalid, fault.CodeInvalidJSON, "the body cannot be read").Because(err)
}

// wanted describes a type of api.gen.go in words that callers know.
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

// fieldPath writes a JSON pointer in the usual notation, such as egress.allow_cidrs[0]. The type of
// dst tells which numbers are indices.
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
		t = inner(t, token)
	}
	return b.String()
}

// member returns the type of a field of a struct or of the values of a map, or nil if t has no such
// member.
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

// fileMode parses the octal text of permissions, 0 to 0777. It refuses the set-id and sticky bits,
// because the agent would not set them.
func fileMode(text string) (fs.FileMode, error) {
	n, err := strconv.ParseUint(text, 8, 32)
	if err != nil || n > 0o777 || len(text) > len("0777") {
		return 0, fault.InvalidField("mode", "must be permissions in octal, 0 to 0777, such as 0644")
	}
	return fs.FileMode(n), nil
}

// Limits of a page, in rows.
const (
	defaultLimit = 50
	maxLimit     = 200
)

// page checks the parameters of a listing. The store checks whether the cursor is valid.
func page(limit *int, cursor *string) (int, string, error) {
	n, after := defaultLimit, ""
	if limit != nil {
		n = *limit
	}
	if n < 1 || n > maxLimit {
		return 0, "", fault.InvalidField("limit", "must be between 1 and %d", maxLimit)
	}
	if cursor != nil {
		after = *cursor
	}
	return n, after, nil
}
