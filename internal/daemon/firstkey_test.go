package daemon

import (
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/store"
)

// TestFirstKeyOutlivesPower makes the first key on a file system that then ends as at a loss of power: what was not
// synced is lost. The key in the file opens the server whose records have its row.
func TestFirstKeyOutlivesPower(t *testing.T) {
	caytest.RequireRoot(t)
	caytest.RequireProgram(t, "mkfs.ext4")
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
		}
	}
	image, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	run("mkfs.ext4", "-q", image)
	mount := func(image string) {
		t.Helper()
		// Nothing but a sync writes within the hour.
		run("mount", "-o", "loop,commit=3600", image, dir)
	}
	mount(image)
	mounted := true
	t.Cleanup(func() {
		if mounted {
			run("umount", dir)
		}
	})
	open := func() *store.DB {
		t.Helper()
		db, err := store.Open(t.Context(), filepath.Join(dir, databaseFile))
		if err != nil {
			t.Fatal(err)
		}
		return db
	}

	db, limits := open(), auth.Config{Log: slog.New(slog.DiscardHandler)}
	service := auth.New(db, limits)
	made, err := service.Bootstrap(t.Context(), saveKey(dir))
	if err != nil || !made {
		t.Fatalf("the first key was made: %v, %v", made, err)
	}
	cutPower(t, dir)
	_ = service.Close(t.Context()) // it has nothing to write
	_ = db.Close()                 // its disk is gone
	run("umount", dir)
	mounted = false
	// A copy: the namespace of another process may still have the file system that was ended, and with it the image.
	run("cp", "--sparse=always", image, image+"-after")
	mount(image + "-after")
	mounted = true

	db = open()
	defer db.Close() // before the directory is unmounted
	service = auth.New(db, limits)
	defer func() {
		if err := service.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	if made, err = service.Bootstrap(t.Context(), saveKey(dir)); err != nil || made {
		t.Errorf("the records lost the first key: another was made (%v), %v", made, err)
	}
	secret, err := os.ReadFile(filepath.Join(dir, keyFile))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := service.Authenticate(t.Context(), strings.TrimSpace(string(secret))); err != nil {
		t.Errorf("the file of the first key has %d bytes, which are refused: %v", len(secret), err)
	}
}

// cutPower ends the file system of a directory without writing what it has in memory.
func cutPower(t *testing.T, dir string) {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	const shutdown, withoutLog = 0x8004587d, 2 // EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
	if err := unix.IoctlSetPointerInt(int(d.Fd()), shutdown, withoutLog); err != nil {
		t.Fatalf("ending the file system: %v", err)
	}
}
