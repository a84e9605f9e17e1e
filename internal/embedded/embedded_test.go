package embedded

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
)

// TestUnpack unpacks from several goroutines at once, and again. Each gets the same programs at
// the same paths, whole, with nothing beside them.
func TestUnpack(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "programs")
	t.Cleanup(func(mask int) func() { return func() { unix.Umask(mask) } }(unix.Umask(0o077)))
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
	for range 2 { // the second time with the mode that an older cay gave it
		if info, err := os.Stat(results[0].AgentDir); err != nil || info.Mode().Perm() != 0o755 {
			t.Errorf("the agent's directory: %v, %v", info, err)
		}
		if err := os.Chmod(results[0].AgentDir, 0o700); err != nil {
			t.Fatal(err)
		}
		if _, err := Find(dir, results[0].Version); err != nil {
			t.Error(err)
		}
	}
	beside, err := os.ReadDir(results[0].AgentDir)
	if err != nil || len(beside) != 1 {
		t.Errorf("the agent's directory holds %v, %v", beside, err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, ".unpacking-*")); err != nil || len(left) > 0 {
		t.Errorf("temporary files are left: %v, %v", left, err)
	}
	out, err := exec.Command(results[0].Runsc, "--version").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "runsc") {
		t.Errorf("runsc --version printed %q, %v", out, err)
	}
}

// TestUnpackWithoutExec checks that programs are not unpacked onto a file system from which none can be started, and
// that the error says so.
func TestUnpackWithoutExec(t *testing.T) {
	caytest.RequireRoot(t)
	mounted, tried := t.TempDir(), make(chan error, 1)
	dir := filepath.Join(mounted, "programs")
	go func() {
		runtime.LockOSThread() // and no unlock, so that the namespace and its mount end with the thread
		if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("tmpfs", mounted, "tmpfs", unix.MS_NOEXEC, "")); err != nil {
			t.Error(err)
		}
		_, err := Unpack(dir)
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			t.Errorf("the directory holds %v, %v", entries, err)
		}
		tried <- err
	}()
	const want = "mounted with noexec"
	if err := <-tried; err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "data_dir") {
		t.Errorf("got %v", err)
	}
}

// TestCollect checks that versions in keep stay and can be found, and that all others go.
func TestCollect(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "programs")
	now, err := Unpack(dir)
	if err != nil {
		t.Fatal(err)
	}
	buildkit, err := UnpackBuildkit(dir)
	if err != nil {
		t.Fatal(err)
	}
	earlier := Version{Agent: "00aa", Runsc: "00bb"}
	for _, file := range []string{"00aa/cay-agent", "00bb/cay-runsc", "00cc/cay-runsc", ".unpacking-1"} {
		path := filepath.Join(dir, file)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o555)); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		keep    []Version
		removed []string
	}{
		{[]Version{now.Version, earlier}, []string{".unpacking-1", "00cc"}},
		{[]Version{now.Version, earlier}, nil},
		{[]Version{now.Version}, []string{"00aa", "00bb"}},
	} {
		removed, err := Collect(dir, step.keep)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(step.removed, removed); diff != "" {
			t.Error(diff)
		}
		for _, v := range step.keep {
			if _, err := Find(dir, v); err != nil {
				t.Error(err)
			}
		}
	}
	if info, err := os.Stat(buildkit); err != nil || info.Mode().Perm() != 0o555 {
		t.Errorf("this build's cay-buildkit was not kept: %v, %v", info, err)
	}
	if _, err := Find(dir, earlier); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("finding what is gone: %v", err)
	}
}
