package objects

import (
	"crypto/sha256"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
)

// TestBodiesAreSigned looks at the requests, over TLS too, where the client by itself signs no body.
func TestBodiesAreSigned(t *testing.T) {
	body := []byte("body")
	sum := Sum(sha256.Sum256(body))
	for scheme, start := range map[string]func(http.Handler) *httptest.Server{"http": httptest.NewServer,
		"https": httptest.NewTLSServer} {
		requests := make(chan *http.Request, 2)
		server := start(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if got, err := io.ReadAll(r.Body); err != nil || string(got) != "body" {
				t.Errorf("%s: the body is %q, %v", scheme, got, err)
			}
			requests <- r
		}))
		t.Cleanup(server.Close)
		b, err := OpenS3(Location{Bucket: "cay", Endpoint: server.URL, Region: "r", PathStyle: true},
			Credentials{AccessKey: "a", SecretKey: "b"})
		if err != nil {
			t.Fatal(err)
		}
		if scheme == "https" {
			b.wire.transport.TLSClientConfig = server.Client().Transport.(*http.Transport).TLSClientConfig
		}
		if _, err := b.Put(t.Context(), "a", section(body), sum, Condition{Absent: true}); err != nil {
			t.Fatal(err)
		}
		if _, err := b.PutPart(t.Context(), "a", "id", 1, section(body), sum); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			r := <-requests
			if got := r.Header.Get("X-Amz-Content-Sha256"); got != sum.String() {
				t.Errorf("%s %s: signed is %q, want the sum", scheme, r.URL, got)
			}
			if got := r.Header.Get("X-Amz-Checksum-Sha256"); got != *encoded(sum) {
				t.Errorf("%s %s: the checksum is %q", scheme, r.URL, got)
			}
		}
	}
}
