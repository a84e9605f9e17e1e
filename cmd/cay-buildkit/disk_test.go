package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/buildkit/wire"
	"github.com/cayhq/cay/internal/caytest"
)

// TestDiskGivesRunningBuildsNothing has a build write all that it may, while the end of another one and a trim settle
// the disk: the first may not write on.
func TestDiskGivesRunningBuildsNothing(t *testing.T) {
	caytest.RequireRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("disk", dir, "tmpfs", 0, "size=512m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	const limit = 50 << 20
	d, err := openDisk(dir, &wire.Config{BuildBytes: limit, Image: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.ballast.Close()
	begin := func() *diskUse {
		use, err := d.begin(context.CancelCauseFunc(func(error) {}))
		if err != nil {
			t.Fatal(err)
		}
		return use
	}
	free := func() int64 {
		free, _ := statfs(dir)
		return free
	}
	if free() != diskSlack {
		t.Errorf("without a build %d bytes are free", free())
	}
	first, second := begin(), begin()
	if free() != 2*limit {
		t.Errorf("with two builds %d bytes are free", free())
	}
	// The two share their space.
	if err := os.WriteFile(filepath.Join(dir, "written"), make([]byte, 2*limit-4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.end(second); err != nil || free() != 4<<20 {
		t.Errorf("after the end of the second build %d bytes are free, %v", free(), err)
	}
	if _ = d.trim(); free() != 4<<20 { // tmpfs has no blocks to give back, which is an error
		t.Errorf("after a trim %d bytes are free", free())
	}
	if err := d.end(first); err != nil || free() != diskSlack {
		t.Errorf("after the end of all builds %d bytes are free, %v", free(), err)
	}
}
