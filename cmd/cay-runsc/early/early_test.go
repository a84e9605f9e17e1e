package early

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
)

// TestUmount has the real program unmount a directory when it is told to, and checks which
// packages were initialised in it.
func TestUmount(t *testing.T) {
	caytest.RequireRoot(t)
	program, err := filepath.Abs("../../../bin/cay-runsc")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(dir, syscall.MNT_DETACH) }) // EINVAL if it is unmounted already
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	cmd := exec.Command(caytest.RequireProgram(t, program), "umount", "--sync-fd=3", dir)
	var says bytes.Buffer
	cmd.Stderr, cmd.ExtraFiles = &says, []*os.File{r}
	cmd.Env = []string{"GODEBUG=inittrace=1"} // prints a line for each package
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r.Close()
	time.Sleep(50 * time.Millisecond) // it would have unmounted by now if it did not wait
	if _, err := os.Stat(filepath.Join(dir, "file")); err != nil {
		t.Errorf("before it was told: %v", err)
	}
	if _, err := w.Write([]byte{0}); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, &says)
	}
	if _, err := os.Stat(filepath.Join(dir, "file")); !os.IsNotExist(err) {
		t.Errorf("after it ended the mount is still there: %v", err)
	}
	if text := says.String(); !strings.Contains(text, "init os ") ||
		strings.Contains(text, "init gvisor.dev/gvisor/pkg/sentry/") {
		t.Errorf("it initialised more than it needs:\n%s", text)
	}
}

func TestUmountFails(t *testing.T) {
	program, err := filepath.Abs("../../../bin/cay-runsc")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(caytest.RequireProgram(t, program), "umount", "--sync-fd=0", t.TempDir())
	cmd.Stdin = strings.NewReader(".")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "invalid argument") {
		t.Errorf("unmounting what is none: %v: %s", err, out)
	}
	// Without the byte it does nothing.
	cmd = exec.Command(program, "umount", "--sync-fd=0", "/")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "waiting for the word") {
		t.Errorf("not told: %v: %s", err, out)
	}
}
