package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
)

// TestCheckDataDir looks at directories on real file systems of each kind, which exist and do not exist yet.
func TestCheckDataDir(t *testing.T) {
	caytest.RequireRoot(t)
	if f := checkDataDir("/var/tmp/cay-not-yet/data"); !f.OK || !strings.Contains(f.Detail, "GiB free") {
		t.Errorf("on a disk: %+v", f)
	}
	for name, c := range map[string]struct {
		flags uintptr
		want  string
	}{
		"tmpfs":     {0, "in memory"},
		"noexec":    {unix.MS_NOEXEC, "noexec"},
		"read-only": {unix.MS_RDONLY, "read-only"},
	} {
		t.Run(name, func(t *testing.T) {
			mounted, found := t.TempDir(), make(chan Finding, 1)
			go func() {
				runtime.LockOSThread() // and no unlock, so that the namespace and its mount end with the thread
				if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
					unix.Mount("tmpfs", mounted, "tmpfs", c.flags, "")); err != nil {
					t.Error(err)
				}
				found <- checkDataDir(filepath.Join(mounted, "data"))
			}()
			if f := <-found; f.OK || !strings.Contains(f.Detail, c.want) || !strings.Contains(f.Fix, "data_dir") {
				t.Errorf("%+v", f)
			}
		})
	}
}

// TestCheckSELinux reads the kernel's file in each of its forms.
func TestCheckSELinux(t *testing.T) {
	for mode, c := range map[string]struct {
		ok   bool
		want string
	}{"": {true, "off"}, "0": {true, "permissive"}, "1": {false, "enforcing"}} {
		root := t.TempDir()
		if mode != "" {
			path := filepath.Join(root, "sys/fs/selinux/enforce")
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(mode), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		if f := checkSELinux(root); f.OK != c.ok || !strings.Contains(f.Detail, c.want) || f.OK != (f.Fix == "") {
			t.Errorf("with %q: %+v", mode, f)
		}
	}
}
