package e2e

import (
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/caytest"
)

// runPython makes the requests of E2B's Python package with the library that the package uses: those for
// "sandboxes" or those for "templates".
func (s *server) runPython(t *testing.T, key, what string) {
	t.Helper()
	python := caytest.RequirePython(t, "httpx", "h2")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, python, "e2b/wire.py", what)
	cmd.Env = append(os.Environ(), "E2B_API_URL="+s.url, "E2B_API_KEY="+key)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.HasSuffix(string(out), "all of it\n") {
		t.Errorf("the requests: %v\n%s", err, out)
	}
}
