package e2e

import (
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
	onOneStore(t)
	t.Parallel() // it has its own server
	s := newServer(t, "CAY_POOL_ENABLED=false", "CAY_TEMPLATES_PREPARE=python,base", "CAY_IMAGES_REGISTRY=false")
	s.start()
	s.needTemplate("python")
	s.needTemplate("base")
	key := s.e2bKey()
	for _, version := range []string{"newest", "v2.45"} {
		t.Run(version, func(t *testing.T) {
			s.runE2B(t, version, key, func(name string) bool { return name == templatesFile }, "all kinds of steps",
				"a step that fails")
		})
	}
	t.Run("command line", func(t *testing.T) { s.runE2BCommandLine(t, key) })
	t.Run("Python", func(t *testing.T) { s.runPython(t, key, true) })
	t.Run("hostile", func(t *testing.T) { s.hostileE2BBuilds(t, key) })
	t.Run("killed", func(t *testing.T) { s.killDuringE2BBuild(t, key) })
}

// runE2BCommandLine makes, lists and deletes templates and sandboxes with E2B's command line.
func (s *server) runE2BCommandLine(t *testing.T, key string) {
	node := nodeProgram(t)
	program := filepath.Join(installed(t, "cli"), "node_modules", "@e2b", "cli", "dist", "index.js")
	dir := t.TempDir()
	for name, text := range map[string]string{"e2b.Dockerfile": "FROM python\nCOPY hello /hello\nRUN cat /hello\n",
		"hello": "by line\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// run runs a program, and returns what it prints. The code that it must end with is wanted.
	run := func(code int, stdin string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
		cmd.Dir, cmd.Stdin = dir, strings.NewReader(stdin)
		cmd.Env = append(os.Environ(), "HOME="+dir, "E2B_API_URL="+s.url, "E2B_SANDBOX_URL="+s.url, "E2B_API_KEY="+key)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != code {
			t.Fatalf("%v: %v, want code %d\n%s", args, err, code, out)
		}
		return string(out)
	}
	e2b := func(code int, want, line string) {
		t.Helper()
		if out := run(code, "", append([]string{node, program}, strings.Fields(line)...)...); !strings.Contains(out, want) {
			t.Errorf("e2b %s: %s\nwant %q", line, out, want)
		}
	}
	e2b(0, "by line", "template create by-line --cpu-count 2 --memory-mb 1024")
	e2b(0, `"by-line"`, "template list --format json")
	e2b(0, "Deleting sandbox template", "template delete --yes by-line")
	if status, body := s.e2bCall(key, "GET", "/templates/aliases/by-line", ""); status != 404 {
		t.Errorf("after it was deleted: %d %s", status, body)
	}
	e2b(0, "initialized successfully", "template init --name made --language typescript")
	e2b(0, "Migration completed", "template migrate --name moved --language typescript")
	e2b(1, "[501]", "template publish --yes made")

	id := strings.TrimSpace(run(0, "", node, program, "sandbox", "create", "--detach", "--timeout", "300", "python"))
	e2b(0, `"sandboxId": "`+id+`"`, "sandbox list --template python --format json")
	e2b(0, "State: running", "sandbox info "+id)
	if out := run(3, "", node, program, "sandbox", "exec", "-u", "root", "-c", "/tmp", "-e", "A=b", id, "sh", "-c",
		"id -un; pwd; echo $A; exit 3"); !strings.Contains(out, "root\n/tmp\nb\n") {
		t.Errorf("e2b sandbox exec: %s", out)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) { // until the first sample
		out := run(0, "", node, program, "sandbox", "metrics", "--format", "json", id)
		if strings.Contains(out, `"memTotal":`) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("e2b sandbox metrics: %s", out)
		}
	}
	e2b(0, `"sandbox running"`, "sandbox logs --format json "+id)
	// A terminal of the host's own, since the program sets its mode.
	terminal := run(0, "echo $((6*7)); exit\n", "script", "-qec",
		strings.Join([]string{node, program, "sandbox", "connect", id}, " "), "/dev/null")
	if !strings.Contains(terminal, "\r42\r") {
		t.Errorf("the terminal showed %q", terminal)
	}
	e2b(0, "has been paused", "sandbox pause "+id)
	e2b(0, `"state": "paused"`, "sandbox list --state paused --format json")
	e2b(0, "has been resumed", "sandbox resume "+id)
	e2b(0, "has been killed", "sandbox kill "+id)
	e2b(0, "No sandboxes found", "sandbox list")
}

// killDuringE2BBuild ends the server in the middle of a build, which the next one finishes.
func (s *server) killDuringE2BBuild(t *testing.T, key string) {
	build := s.beginE2BBuild(key, "survives", object{"fromTemplate": "python", "steps": []object{
		{"type": "RUN", "args": []string{"sleep 2"}}, {"type": "RUN", "args": []string{"echo done > done"}}}})
	build.until("building")
	s.stop(syscall.SIGKILL)
	s.start()
	build.until("ready")
}
