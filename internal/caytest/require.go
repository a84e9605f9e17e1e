// Package caytest holds code that the tests of several rooms share, such as the checks
// that the machine has what a test needs.
//
// A test that cannot run is skipped with the reason. With CAY_TEST_REQUIRE=1 it fails
// instead, so that CI on a machine that lacks something does not pass.
package caytest

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// RequireRoot skips the test unless it runs as root.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Missing(t, "needs root")
	}
}

// RequireProgram skips the test unless the program is on PATH or is a path to
// an executable, and returns its path.
func RequireProgram(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		Missing(t, "needs the program "+name)
	}
	return path
}

// RequirePython returns Debian's Python, and skips the test, or fails it if CAY_TEST_REQUIRE is set, without
// the modules.
func RequirePython(t testing.TB, modules ...string) string {
	t.Helper()
	python := RequireProgram(t, "/usr/bin/python3")
	if err := exec.Command(python, "-c", "import "+strings.Join(modules, ", ")).Run(); err != nil {
		Missing(t, "Python's "+strings.Join(modules, ", ")+" are needed")
	}
	return python
}

// Missing skips the test, or fails it with CAY_TEST_REQUIRE=1.
func Missing(t testing.TB, reason string) {
	t.Helper()
	if os.Getenv("CAY_TEST_REQUIRE") == "1" {
		t.Fatalf("%s, and CAY_TEST_REQUIRE=1 makes that a failure", reason)
	}
	t.Skipf("skipped: %s", reason)
}
