package api

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// BenchmarkCall measures what the API, the look-up of the key and the database rows cost a call,
// with real HTTP and a real database, but without work inside the sandbox.
func BenchmarkCall(b *testing.B) {
	h := newTestServer(b)
	sbx := "/v1/sandboxes/" + h.newSandbox(b).ID
	h.agent.files["/f"] = make([]byte, 64<<10)
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	for _, c := range []struct{ name, method, path, body string }{
		{"get", "GET", sbx, ""},
		{"list", "GET", "/v1/sandboxes", ""},
		{"execute", "POST", sbx + "/execute", `{"command":"true"}`},
		{"read 64 KiB", "GET", sbx + "/files?path=/f", ""},
	} {
		b.Run(c.name, func(b *testing.B) {
			for b.Loop() {
				r, err := http.NewRequestWithContext(b.Context(), c.method, h.url+c.path, strings.NewReader(c.body))
				if err != nil {
					b.Fatal(err)
				}
				r.Header.Set("Authorization", "Bearer "+h.key)
				resp, err := client.Do(r)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != 200 {
					b.Fatal(resp.Status, err)
				}
				resp.Body.Close()
			}
		})
	}
}
