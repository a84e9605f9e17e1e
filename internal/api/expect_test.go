package api

import (
	"context"
	"slices"
	"sync"
	"testing"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/sandbox"
)

// TestCallsExpectTheirSandbox checks that a call announces the sandbox that it reads, before it reads the key.
func TestCallsExpectTheirSandbox(t *testing.T) {
	notForwarded(t, "both servers expect the sandbox")
	var mu sync.Mutex
	var expected []string
	h := newTestServer(t, func(_ *auth.Config, _ *sandbox.Config, cfg *Config) {
		expect := cfg.Expect
		cfg.Expect = func(ctx context.Context, id sandbox.ID) context.Context {
			mu.Lock()
			defer mu.Unlock()
			expected = append(expected, string(id))
			return expect(ctx, id)
		}
	})
	id := h.newSandbox(t).ID
	sbx := "/v1/sandboxes/" + id
	for _, c := range []struct {
		method, path, body string
		status             int
		want               []string
	}{
		{"POST", sbx + "/execute", `{"command":"true"}`, 200, []string{id}},
		{"GET", sbx, "", 200, []string{id}},
		{"GET", sbx + "/events", "", 200, []string{id}},
		{"GET", sbx + "/ports/8080/", "", 502, []string{id}},
		{"GET", "/v1/sandboxes", "", 200, nil},
		{"GET", "/v1/sandboxes/none", "", 404, nil},
		{"GET", sbx + "/nothing", "", 404, nil},
	} {
		mu.Lock()
		expected = nil
		mu.Unlock()
		got := h.send(t, c.method, c.path, h.key, c.body)
		mu.Lock()
		if got.status != c.status || !slices.Equal(expected, c.want) {
			t.Errorf("%s %s: %d, expected %v, want %d, %v", c.method, c.path, got.status, expected, c.status, c.want)
		}
		mu.Unlock()
	}
}
