package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/caytest"
)

// kindOf names what a half of E2B's tests is about.
func kindOf(templates bool) string {
	if templates {
		return "templates"
	}
	return "sandboxes"
}

// runPython makes the requests of E2B's Python package, those for templates or those for sandboxes, and
// compares the table of its methods with those that the checks have named.
func (s *server) runPython(t *testing.T, key string, templates bool) {
	t.Helper()
	python := caytest.RequirePython(t, "httpx", "h2")
	ctx, cancel := context.WithTimeout(t.Context(), e2bPatience)
	defer cancel()
	record := filepath.Join(t.TempDir(), "record")
	cmd := exec.CommandContext(ctx, python, "-B", "e2b/wire_"+kindOf(templates)+".py")
	cmd.Env = append(os.Environ(), "E2B_API_URL="+s.url, "E2B_API_KEY="+key, "E2B_TEST_RECORD="+record)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.HasSuffix(string(out), "all of it\n") {
		t.Fatalf("the requests: %v\n%s", err, out)
	}
	checkMatrix(t, matrixTable{place: "requests of " + kindOf(templates), works: "object | methods whose requests work",
		absent: "object | methods that are not tested"}, pythonMethods(t, templates), record)
}

// pythonMethods returns the methods of E2B's Python package that python.txt lists.
func pythonMethods(t *testing.T, templates bool) []string {
	t.Helper()
	data, err := os.ReadFile("e2b/python.txt")
	if err != nil {
		t.Fatal(err)
	}
	var methods []string
	for line := range strings.Lines(string(data)) {
		if name, _, _ := strings.Cut(line, " "); name != "#" {
			methods = append(methods, name)
		}
	}
	return ofTemplates(slices.Compact(methods), templates)
}
