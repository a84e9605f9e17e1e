package httpserver

import (
	"net/http/httptest"
	"strings"
	"testing"
)

func FuzzRequestID(f *testing.F) {
	f.Add("abc.DEF_1-2")
	f.Add("a b")
	f.Add("")
	f.Fuzz(func(t *testing.T, id string) {
		r := httptest.NewRequest("GET", "/", nil)
		r.Header["X-Request-Id"] = []string{id}
		got := (&Front{Config: Config{TakesIDs: true}}).requestID(r)
		if got != id && !strings.HasPrefix(got, "req_") || got == "" || len(got) > 128 ||
			strings.ContainsAny(got, " \t\r\n\"\\{}\x00") {
			t.Fatalf("%q gives %q", id, got)
		}
	})
}
