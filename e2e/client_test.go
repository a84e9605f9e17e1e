package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"maps"
	"net/http"
	"strings"
	"testing"

	cay "github.com/cayhq/cay/sdk/go"
)

type object = map[string]any

// api returns a client with the server's first key. It shares its connections with [server.call].
func (s *server) api() *cay.Client {
	s.t.Helper()
	c, err := cay.New(s.url, s.key, cay.WithHTTPClient(http.DefaultClient))
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// requestOf returns a request of the client with the fields of several objects; later objects override
// earlier ones. A field that the client does not know fails the test.
func requestOf[T any](t testing.TB, objects ...object) T {
	t.Helper()
	all := object{}
	for _, o := range objects {
		maps.Copy(all, o)
	}
	data, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	var request T
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&request); err != nil {
		t.Fatalf("%T from %s: %v", request, data, err)
	}
	return request
}

// jsonOf returns a value of the client for a message, without pointers.
func jsonOf(v any) string {
	data, err := json.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// orZero returns the value of a field of the client, the zero value if the field is absent.
func orZero[T any](v *T) T {
	if v == nil {
		var zero T
		return zero
	}
	return *v
}

// refusal returns the server's error behind an error of the client, nil if it has none: the call succeeded,
// or the connection failed.
func refusal(err error) *cay.Error {
	var e *cay.Error
	errors.As(err, &e)
	return e
}

// isRefused reports whether the server refused a call with this status and this code.
func isRefused(err error, status int, code string) bool {
	e := refusal(err)
	return e != nil && e.Status == status && e.Code == code
}

// text returns a string field of a JSON object, "" if there is none.
func text(body []byte, field string) string {
	var o object
	if json.Unmarshal(body, &o) != nil {
		return ""
	}
	v, _ := o[field].(string)
	return v
}

// wantNone checks that the server has no sandboxes.
func (s *server) wantNone() {
	s.t.Helper()
	list, err := s.api().ListSandboxes(context.Background(), cay.ListSandboxesOptions{})
	if err != nil || len(list.Sandboxes) > 0 {
		s.t.Errorf("sandboxes are left: %s, %v", jsonOf(list), err)
	}
}

// tenant makes an organization with a quota, nil for the usual one, and returns the server with its admin key.
func (s *server) tenant(name string, quota object) *server {
	s.t.Helper()
	request := object{"name": name}
	if quota != nil {
		request["quota"] = quota
	}
	org, err := s.api().CreateOrg(context.Background(), requestOf[cay.CreateOrgRequest](s.t, request))
	if err != nil {
		s.t.Fatalf("making the organization %s: %v", name, err)
	}
	own := *s
	own.key = org.APIKey
	return &own
}

// upload writes a file in a sandbox.
func (s *server) upload(id, path, content string) {
	s.t.Helper()
	if err := s.api().WriteFile(context.Background(), id, path, strings.NewReader(content),
		cay.WriteFileOptions{}); err != nil {
		s.t.Fatalf("upload: %v", err)
	}
}
