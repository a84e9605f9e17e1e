package agentapi_test

import (
	"errors"
	"net/url"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
)

func TestSignatures(t *testing.T) {
	const token = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0"
	q := url.Values{"path": {"hello.txt"}, "username": {"user"}}
	if got := agentapi.Signature("GET", q, token); got != "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E" {
		t.Errorf("the signature is %s", got)
	}
	now := time.Unix(1000, 0)
	signed := func(method, until string) url.Values {
		q := url.Values{"path": {"a b"}, "signature_expiration": {until}}
		if until == "" {
			q.Del("signature_expiration")
		}
		q.Set("signature", agentapi.Signature(method, q, token))
		return q
	}
	without := func(q url.Values, name string) url.Values { q.Del(name); return q }
	for name, c := range map[string]struct {
		method string
		q      url.Values
		want   error
	}{
		"for ever":           {"GET", signed("GET", ""), nil},
		"HEAD is a read":     {"HEAD", signed("GET", ""), nil},
		"until later":        {"POST", signed("POST", "1001"), nil},
		"until now":          {"GET", signed("GET", "1000"), nil},
		"over":               {"GET", signed("GET", "999"), agentapi.ErrSignatureExpired},
		"no number":          {"GET", signed("GET", "soon"), agentapi.ErrSignatureInvalid},
		"of the other verb":  {"POST", signed("GET", ""), agentapi.ErrSignatureInvalid},
		"none":               {"GET", without(signed("GET", ""), "signature"), agentapi.ErrSignatureMissing},
		"of another path":    {"GET", without(signed("GET", ""), "path"), agentapi.ErrSignatureInvalid},
		"without its expiry": {"GET", without(signed("GET", "1001"), "signature_expiration"), agentapi.ErrSignatureInvalid},
	} {
		if err := agentapi.CheckSignature(c.method, c.q, token, now); !errors.Is(err, c.want) || err == nil && c.want != nil {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func FuzzSignature(f *testing.F) {
	f.Add("path=a&signature=v1_x&signature_expiration=9", "GET")
	f.Add("path=a&path=b&signature=", "POST")
	f.Fuzz(func(t *testing.T, query, method string) {
		q, _ := url.ParseQuery(query) // after an error q holds what could be parsed
		const token = "a token that the fuzzer does not know"
		if err := agentapi.CheckSignature(method, q, token, time.Unix(0, 0)); err == nil {
			t.Errorf("%q passed", query)
		}
	})
}
