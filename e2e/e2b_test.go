package e2e

import (
	"context"
	"encoding/json"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
)

// TestE2B runs E2B's unmodified packages, in two versions, against a server, with the environment
// that their users set. The tests are e2e/e2b/*.test.mjs.
func TestE2B(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it has its own server
	s := newServer(t, "CAY_POOL_ENABLED=true", "CAY_PROXY_DOMAIN=localhost",
		"CAY_TEMPLATES_PREPARE=base,code-interpreter")
	s.start()
	s.needTemplate("base")
	s.needTemplate("code-interpreter")
	key := s.e2bKey()
	for _, version := range []string{"newest", "v2.45"} {
		t.Run(version, func(t *testing.T) {
			s.runE2B(t, version, key, func(name string) bool { return name != templatesFile }, "create, info, kill",
				"code interpreter")
		})
	}
	t.Run("Python", func(t *testing.T) { s.runPython(t, key, false) })
}

// e2bKey makes a key for an E2B user with the command line.
func (s *server) e2bKey() string {
	s.t.Helper()
	cmd := exec.Command(s.binary, "keys", "create", "sdk", "--format", "e2b")
	cmd.Env = append(os.Environ(), "CAY_API_URL="+s.url, "CAY_API_KEY="+s.key)
	out, err := cmd.Output()
	key := strings.TrimSpace(string(out))
	if err != nil || !strings.HasPrefix(key, "e2b_") {
		s.t.Fatalf("making a key: %q, %v", out, err)
	}
	return key
}

// e2bPatience limits one run of all tests of a version, or of all requests of the Python package.
const e2bPatience = 25 * time.Minute

// runE2B runs the files of tests that are chosen with the packages of a version. Its output must have
// the texts.
func (s *server) runE2B(t *testing.T, version, key string, chosen func(file string) bool, texts ...string) {
	t.Helper()
	node := nodeProgram(t)
	dir := installed(t, version)
	files := readAll(t, "e2b/*.mjs")
	args := []string{"--test", "--test-concurrency=2", "--test-reporter=spec"}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if strings.HasSuffix(name, ".test.mjs") && chosen(name) {
			args = append(args, name)
		}
	}
	run := runDir(t, dir, files)
	ctx, cancel := context.WithTimeout(t.Context(), e2bPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, node, args...)
	cmd.Dir = run
	cmd.Env = append(os.Environ(), "E2B_API_URL="+s.url, "E2B_SANDBOX_URL="+s.url, "E2B_API_KEY="+key,
		"E2B_TEST_VERSION="+packageVersion(t, filepath.Join(dir, "node_modules", "e2b")))
	record := filepath.Join(run, "record")
	if version == "newest" {
		cmd.Env = append(cmd.Env, "E2B_TEST_RECORD="+record)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("the tests of version %s: %v\n%s", version, err, out)
	}
	for _, text := range texts {
		if !strings.Contains(string(out), text) {
			t.Errorf("the tests did not run:\n%s", out)
		}
	}
	t.Logf("%s", out)
	if version == "newest" && !t.Failed() {
		templates := chosen(templatesFile)
		checkMatrix(t, matrixTable{place: "methods of " + kindOf(templates), works: "object | methods that work"},
			clientMethods(t, node, run, templates), record)
	}
	// No sandbox may be left, and no lease may be held.
	s.wantNone()
}

func mustGlob(t *testing.T, pattern string) []string {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		t.Fatalf("looking for %s: %v, %v", pattern, paths, err)
	}
	return paths
}

// nodeProgram returns a Node.js that can run the packages.
func nodeProgram(t *testing.T) string {
	t.Helper()
	caytest.RequireProgram(t, "node")
	node, err := caytest.Node(t.Context(), "e2b/node")
	if err != nil {
		t.Fatal(err)
	}
	return node
}

// installed returns a directory with the packages that a directory below e2b names.
func installed(t *testing.T, version string) string {
	t.Helper()
	caytest.RequireProgram(t, "npm")
	dir, err := caytest.NPM(t.Context(), filepath.Join("e2b", version))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// runDir makes a directory with files below a directory of packages, where Node.js looks for them,
// and removes it at the end of the test.
func runDir(t *testing.T, packages string, files map[string][]byte) string {
	t.Helper()
	dir, err := os.MkdirTemp(packages, "run-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// readAll reads the files of a pattern, under their base names.
func readAll(t *testing.T, pattern string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for _, path := range mustGlob(t, pattern) {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		files[filepath.Base(path)] = data
	}
	return files
}

func packageVersion(t *testing.T, dir string) string {
	t.Helper()
	data, err := fs.ReadFile(os.DirFS(dir), "package.json")
	if err != nil {
		t.Fatal(err)
	}
	var p struct {
		Version string `json:"version"`
	}
	if err := json.Unmarshal(data, &p); err != nil || p.Version == "" {
		t.Fatalf("reading the version of %s: %v", dir, err)
	}
	return p.Version
}
