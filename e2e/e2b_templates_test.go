package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// templatesFile has the tests of templates from code.
const templatesFile = "templates.test.mjs"

// TestE2BTemplates builds templates with E2B's unmodified packages, on a server that asks no
// registry.
func TestE2BTemplates(t *testing.T) {
	s := newServer(t, "CAY_POOL_ENABLED=false", "CAY_TEMPLATES_PREPARE=base", "CAY_IMAGES_REGISTRY=false")
	s.start()
	s.needTemplate("base")
	key := s.e2bKey()
	for _, version := range []string{"newest", "v2.45"} {
		t.Run(version, func(t *testing.T) {
			s.runE2B(t, version, key, func(name string) bool { return name == templatesFile }, "all kinds of steps",
				"a step that fails")
		})
	}
	t.Run("command line", func(t *testing.T) { s.runE2BCommandLine(t, key) })
	t.Run("killed", func(t *testing.T) { s.killDuringE2BBuild(t, key) })
}

// runE2BCommandLine makes, lists and deletes a template with E2B's command line.
func (s *server) runE2BCommandLine(t *testing.T, key string) {
	node := nodeProgram(t)
	program := filepath.Join(installed(t, "cli"), "node_modules", "@e2b", "cli", "dist", "index.js")
	dir := t.TempDir()
	for name, text := range map[string]string{"e2b.Dockerfile": "FROM e2bdev/base\nCOPY hello /hello\nRUN cat /hello\n",
		"hello": "by line\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ line, want string }{
		{"template create by-line --cpu-count 2 --memory-mb 1024", "by line"},
		{"template list --format json", `"by-line"`},
		{"template delete --yes by-line", "Deleting sandbox template"},
	} {
		cmd := exec.CommandContext(t.Context(), node, append([]string{program}, strings.Fields(c.line)...)...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "HOME="+dir, "E2B_API_URL="+s.url, "E2B_SANDBOX_URL="+s.url, "E2B_API_KEY="+key)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), c.want) {
			t.Fatalf("e2b %s: %v\n%s", c.line, err, out)
		}
	}
	if status, body := s.e2bCall(key, "GET", "/templates/aliases/by-line", ""); status != 404 {
		t.Errorf("after it was deleted: %d %s", status, body)
	}
}

// killDuringE2BBuild ends the server in the middle of a build, which the next one finishes.
func (s *server) killDuringE2BBuild(t *testing.T, key string) {
	status, body := s.e2bCall(key, "POST", "/v3/templates", `{"name":"survives"}`)
	if status != 202 {
		t.Fatalf("announcing: %d %s", status, body)
	}
	template, build := text(body, "templateID"), text(body, "buildID")
	status, body = s.e2bCall(key, "POST", fmt.Sprintf("/v2/templates/%s/builds/%s", template, build),
		`{"fromTemplate":"base","steps":[{"type":"RUN","args":["sleep 2"]},{"type":"RUN","args":["echo done > done"]}]}`)
	if status != 202 {
		t.Fatalf("building: %d %s", status, body)
	}
	until := func(want string) {
		t.Helper()
		for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) { // a poll with a deadline
			_, body := s.e2bCall(key, "GET", fmt.Sprintf("/templates/%s/builds/%s/status", template, build), "")
			if text(body, "status") == want {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("the build is not %s: %s", want, body)
			}
		}
	}
	until("building")
	s.stop(syscall.SIGKILL)
	s.start()
	until("ready")
}
