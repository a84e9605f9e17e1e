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
			requests := make(chan *http.Request, 2*len(c.want))
			server := start(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if got, err := io.ReadAll(r.Body); err != nil || string(got) != "body" {
					t.Errorf("the body is %q, %v", got, err)
				}
				requests <- r
				for _, header := range []string{"X-Amz-Checksum-Sha256", "X-Amz-Checksum-Crc32c"} {
					if c.compares && r.Header.Get(header) != "" {
						w.Header().Set(header, r.Header.Get(header))
					}
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
			crc := crcOf(body)
			for range 3 {
				if _, err := b.Put(t.Context(), "a", section(body), sum, Condition{Absent: true}); err != nil {
					t.Fatal(err)
				}
			}
			for range 3 {
				if _, err := b.PutPart(t.Context(), "a", "id", 1, section(body), crc); err != nil {
					t.Fatal(err)
				}
			}
			for _, of := range []struct{ header, checksum string }{
				{"X-Amz-Checksum-Sha256", *encoded(sum[:])}, {"X-Amz-Checksum-Crc32c", *encoded(bigEndian(crc))}} {
				for _, want := range c.want {
					r := <-requests
					if got := r.Header.Get("X-Amz-Content-Sha256"); got != want {
						t.Errorf("%s %s: signed is %q, want %s", r.Method, r.URL, got, want)
					}
					if got := r.Header.Get(of.header); got != of.checksum {
						t.Errorf("%s %s: the checksum is %q, want %s", r.Method, r.URL, got, of.checksum)
					}
					signed := r.Header.Get("Authorization")
					if !strings.Contains(signed, ";"+strings.ToLower(of.header)+";") {
						t.Errorf("%s %s: the checksum is not signed: %s", r.Method, r.URL, signed)
					}
				}
			}
		})
	}
}
