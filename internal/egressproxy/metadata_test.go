package egressproxy

import (
	"bufio"
	"io"
	"net/http"
	"testing"
	"time"
)

func TestMetadata(t *testing.T) {
	r := newRig(t, 0)
	r.set(func() {
		r.meta = Metadata{ID: "sb-1", Template: "python", Mode: "ephemeral",
			Metadata:  map[string]string{"owner": "ann", "a/b c": "<odd>"},
			ExpiresAt: time.Date(2031, 2, 3, 4, 5, 6, 7, time.UTC)}
	})
	const all = `{"id":"sb-1","template":"python","mode":"ephemeral",` +
		`"metadata":{"a/b c":"\u003codd\u003e","owner":"ann"},"expires_at":"2031-02-03T04:05:06Z"}` + "\n"
	for _, tc := range []struct {
		method, path string
		status       int
		want         string // "": any body
	}{
		{"GET", "/", 200, all}, {"GET", "/v1", 200, all}, {"HEAD", "/", 200, ""},
		{"GET", "/id", 200, "sb-1"}, {"GET", "/template", 200, "python"}, {"GET", "/mode", 200, "ephemeral"},
		{"GET", "/expires_at", 200, "2031-02-03T04:05:06Z"},
		{"GET", "/metadata/owner", 200, "ann"}, {"GET", "/metadata/a%2Fb%20c", 200, "<odd>"},
		{"GET", "/metadata/none", 404, ""}, {"GET", "/metadata", 404, ""}, {"GET", "/latest/meta-data/", 404, ""},
		{"POST", "/", 405, ""}, {"PUT", "/latest/api/token", 405, ""},
	} {
		req, err := http.NewRequest(tc.method, "http://"+r.about+tc.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "whatever.example"
		req.Header.Set("X-Forwarded-For", "198.51.100.1")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatalf("%s %s: %v", tc.method, tc.path, err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != tc.status || tc.want != "" && string(body) != tc.want {
			t.Errorf("%s %s: %d %s %v, want %d %s", tc.method, tc.path, resp.StatusCode, body, err, tc.status, tc.want)
		}
		if ct := resp.Header.Get("Content-Type"); resp.StatusCode >= 400 && ct != "application/problem+json" {
			t.Errorf("%s %s: %s", tc.method, tc.path, ct)
		}
	}
	http.DefaultClient.CloseIdleConnections()

	r.set(func() { r.meta.ExpiresAt = time.Time{} })
	resp, err := http.Get("http://" + r.about + "/expires_at")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 404 {
		t.Errorf("/expires_at of what does not expire: %d", resp.StatusCode)
	}

	// An open connection does not serve the next owner of the address.
	c := dial(t, r.about)
	const ask = "GET /id HTTP/1.1\r\nHost: x\r\n\r\n"
	for range 2 {
		if _, err := io.WriteString(c, ask); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
	}
	r.set(func() { r.handle = 2 })
	_, _ = io.WriteString(c, ask)
	refused(t, c)
	r.set(func() { r.gone = true })
	http.DefaultClient.CloseIdleConnections()
	if resp, err := http.Get("http://" + r.about + "/id"); err == nil {
		resp.Body.Close()
		t.Error("a stranger was answered")
	}
}
