package objects

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// TestOpenDirMakesNone opens a directory whose file system is not mounted. Made there, it would be on the very disk
// that the copies are to outlive.
func TestOpenDirMakesNone(t *testing.T) {
	mount := t.TempDir()
	dir := filepath.Join(mount, "cay")
	if _, err := OpenDir(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory that does not exist: %v", err)
	}
	if left, err := os.ReadDir(mount); err != nil || len(left) != 0 {
		t.Errorf("there is %v, %v", left, err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := OpenDir(dir); err != nil {
			t.Errorf("a directory that exists: %v", err)
		}
	}
	file := filepath.Join(mount, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenDir(file); err == nil {
		t.Error("a file is taken for a directory")
	}
}
