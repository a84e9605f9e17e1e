package objects

import (
	"crypto/sha256"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// TestBodiesAreSigned looks at the requests, over TLS too, where the client by itself signs no body. A body is in the
// signature, unless the server compares its checksum, which is in the signature too, and takes bodies that are not.
func TestBodiesAreSigned(t *testing.T) {
	body := []byte("body")
	sum := Sum(sha256.Sum256(body))
	in := sum.String()
	for _, c := range []struct {
		name, scheme     string
		compares, denies bool
		want             []string // how the requests are signed
	}{
		{"no checksums", "http", false, false, []string{in, in, in}},
		{"no checksums", "https", false, false, []string{in, in, in}},
		{"checksums", "http", true, false, []string{in, unsigned, unsigned}},
		{"checksums", "https", true, false, []string{in, unsigned, unsigned}},
		{"checksums and a policy", "https", true, true, []string{in, unsigned, in, in}},
	} {
		t.Run(c.name+" "+c.scheme, func(t *testing.T) {
			start := map[string]func(http.Handler) *httptest.Server{"http": httptest.NewServer,
				"https": httptest.NewTLSServer}[c.scheme]
			requests := make(chan *http.Request, len(c.want))
			server := start(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if got, err := io.ReadAll(r.Body); err != nil || string(got) != "body" {
					t.Errorf("the body is %q, %v", got, err)
				}
				requests <- r
				if c.compares {
					w.Header().Set("X-Amz-Checksum-Sha256", r.Header.Get("X-Amz-Checksum-Sha256"))
				}
				if c.denies && r.Header.Get("X-Amz-Content-Sha256") == unsigned {
					w.WriteHeader(http.StatusForbidden)
					io.WriteString(w, "<Error><Code>AccessDenied</Code></Error>")
				}
			}))
			t.Cleanup(server.Close)
			b, err := OpenS3(Location{Bucket: "cay", Endpoint: server.URL, Region: "r", PathStyle: true},
				Credentials{AccessKey: "a", SecretKey: "b"})
			if err != nil {
				t.Fatal(err)
			}
			if c.scheme == "https" {
				b.wire.transport.TLSClientConfig = server.Client().Transport.(*http.Transport).TLSClientConfig
			}
			if _, err := b.Put(t.Context(), "a", section(body), sum, Condition{Absent: true}); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if _, err := b.PutPart(t.Context(), "a", "id", 1, section(body), sum); err != nil {
					t.Fatal(err)
				}
			}
			for _, want := range c.want {
				r := <-requests
				if got := r.Header.Get("X-Amz-Content-Sha256"); got != want {
					t.Errorf("%s %s: signed is %q, want %s", r.Method, r.URL, got, want)
				}
				if got := r.Header.Get("X-Amz-Checksum-Sha256"); got != *encoded(sum) {
					t.Errorf("%s %s: the checksum is %q", r.Method, r.URL, got)
				}
				if got := r.Header.Get("Authorization"); !strings.Contains(got, ";x-amz-checksum-sha256;") {
					t.Errorf("%s %s: the checksum is not signed: %s", r.Method, r.URL, got)
				}
			}
		})
	}
}
