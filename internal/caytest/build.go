package caytest

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
)

// Build builds a program of the repository, named by its directory, for a test to run or to
// put into a sandbox. On a machine without Go (those of e2e/hosts), CAY_TEST_PROGRAMS names a
// directory with the programs.
func Build(out, dir string) error {
	if built := os.Getenv("CAY_TEST_PROGRAMS"); built != "" {
		return copyProgram(out, filepath.Join(built, filepath.Base(dir)))
	}
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, dir)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w: %s", dir, err, text)
	}
	return nil
}

func copyProgram(out, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	f, err := os.OpenFile(out, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(f, in); err != nil {
		f.Close() // the copy has failed already
		return err
	}
	return f.Close()
}
