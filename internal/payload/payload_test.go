package payload

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestUnpack unpacks from several goroutines at once, and again: the same programs at
// the same place, whole, and nothing beside them.
func TestUnpack(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "programs")
	results := make([]Programs, 4)
	var wg sync.WaitGroup
	for i := range results {
		wg.Go(func() {
			var err error
			if results[i], err = Unpack(dir); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, got := range results[1:] {
		if diff := cmp.Diff(results[0], got); diff != "" {
			t.Error(diff)
		}
	}
	for _, path := range []string{results[0].Agent, results[0].Runsc} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o555 {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	beside, err := os.ReadDir(results[0].AgentDir)
	if err != nil || len(beside) != 1 {
		t.Errorf("beside the agent is %v, %v", beside, err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".unpacking-*")); err != nil || len(left) > 0 {
		t.Errorf("left are %v, %v", left, err)
	}
	out, err := exec.Command(results[0].Runsc, "--version").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "runsc") {
		t.Errorf("runsc says %q, %v", out, err)
	}
}
