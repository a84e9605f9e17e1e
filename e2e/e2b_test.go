package e2e

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
)

// TestE2B runs E2B's unmodified packages, in two versions, against a server, with the environment
// that their users set. The tests are e2e/e2b/*.test.mjs.
func TestE2B(t *testing.T) {
	s := newServer(t, "CAY_POOL_ENABLED=true", "CAY_TEMPLATES_PREPARE=base,code-interpreter")
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

// e2bPatience limits one run of all tests of a version.
const e2bPatience = 10 * time.Minute

// runE2B runs the files of tests that are chosen with the packages of a version. Its output must have
// the texts.
func (s *server) runE2B(t *testing.T, version, key string, chosen func(file string) bool, texts ...string) {
	t.Helper()
	node := nodeProgram(t)
	dir := installed(t, version)
	// Node.js looks for the packages in the directories above the tests.
	run, err := os.MkdirTemp(dir, "run-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(run); err != nil {
			t.Error(err)
		}
	})
	args := []string{"--test", "--test-concurrency=2", "--test-reporter=spec"}
	for _, path := range mustGlob(t, "e2b/*.mjs") {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(run, filepath.Base(path)), data, 0o600); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(path, ".test.mjs") && chosen(filepath.Base(path)) {
			args = append(args, filepath.Base(path))
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), e2bPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, node, args...)
	cmd.Dir = run
	cmd.Env = append(os.Environ(), "E2B_API_URL="+s.url, "E2B_SANDBOX_URL="+s.url, "E2B_API_KEY="+key,
		"E2B_TEST_VERSION="+packageVersion(t, filepath.Join(dir, "node_modules", "e2b")))
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
	// No sandbox may be left, and no lease may be held.
	if status, body := s.call("GET", "/v1/sandboxes", nil); status != 200 ||
		!strings.Contains(string(body), `"sandboxes":[]`) {
		t.Errorf("sandboxes are left: %d %s", status, body)
	}
}

func mustGlob(t *testing.T, pattern string) []string {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil || len(paths) == 0 {
		t.Fatalf("looking for %s: %v, %v", pattern, paths, err)
	}
	return paths
}

// nodeProgram returns a Node.js that can run E2B's packages: the host's if it is new enough, else
// one that is installed with npm like them.
func nodeProgram(t *testing.T) string {
	t.Helper()
	const oldest = 20
	node := caytest.RequireProgram(t, "node")
	out, err := exec.Command(node, "--version").Output()
	if err != nil {
		t.Fatalf("asking node for its version: %v", err)
	}
	major, err := strconv.Atoi(strings.Split(strings.TrimPrefix(string(out), "v"), ".")[0])
	if err == nil && major >= oldest {
		return node
	}
	arch := map[string]string{"amd64": "x64"}[runtime.GOARCH]
	return filepath.Join(installed(t, "node"), "node_modules", "node-linux-"+cmp.Or(arch, runtime.GOARCH), "bin", "node")
}

// installed returns a directory with the packages of a version, as its lock file names them. The
// directory is kept outside the clone, under a hash of its content.
func installed(t *testing.T, version string) string {
	t.Helper()
	npm := caytest.RequireProgram(t, "npm")
	files := map[string][]byte{}
	sum := sha256.New()
	for _, name := range []string{"package.json", "package-lock.json"} {
		data, err := os.ReadFile(filepath.Join("e2b", version, name))
		if err != nil {
			t.Fatal(err)
		}
		files[name] = data
		sum.Write(data)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "cay", "npm", hex.EncodeToString(sum.Sum(nil)[:8]))
	if _, err := os.Stat(filepath.Join(dir, "node_modules")); err == nil {
		return dir
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	// The directory gets its name when it is complete.
	draft, err := os.MkdirTemp(filepath.Dir(dir), "draft-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(draft) // it has another name if all went well
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(draft, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	cmd.Dir = draft
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("installing E2B's packages: %v\n%s", err, out)
	}
	if err := os.Rename(draft, dir); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	return dir
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
