package hostfile_test

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/cayhq/cay/internal/hostfile"
)

// names returns the names in a directory.
func names(t *testing.T, dir string) (all []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

// wantOnly fails the test unless a directory has one file, with this content.
func wantOnly(t *testing.T, path, content string) {
	t.Helper()
	if got := names(t, filepath.Dir(path)); len(got) != 1 || got[0] != filepath.Base(path) {
		t.Errorf("the directory has %q, want only %s", got, filepath.Base(path))
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != content {
		t.Errorf("read %q, %v; want %q", got, err, content)
	}
}

func TestReplace(t *testing.T) {
	for name, replace := range map[string]func(string, []byte, fs.FileMode) error{
		"Replace": hostfile.Replace, "ReplaceSynced": hostfile.ReplaceSynced,
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "record")
			// A process that was killed left a draft, longer than the content.
			if err := os.WriteFile(path+".new", []byte("a part of something long"), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, content := range []string{"first", "2"} {
				if err := replace(path, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
				wantOnly(t, path, content)
			}
			open, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer open.Close()
			if err := replace(path, []byte("third"), 0o640); err != nil {
				t.Fatal(err)
			}
			// The replaced file is another one: its reader still sees all of it.
			if b := make([]byte, 9); true {
				if n, _ := open.Read(b); string(b[:n]) != "2" {
					t.Errorf("the reader of the old file got %q", b[:n])
				}
			}
			if info, err := os.Stat(path); err != nil || info.Mode() != 0o640 {
				t.Errorf("the file has mode %v, %v; want 0640", info.Mode(), err)
			}
		})
	}
}

// TestNothingIsLeft makes each step of a replacement fail.
func TestNothingIsLeft(t *testing.T) {
	t.Run("the rename fails", func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, "taken")
		if err := os.MkdirAll(filepath.Join(path, "by a directory"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := hostfile.ReplaceSynced(path, []byte("x"), 0o600); err == nil {
			t.Error("a directory was replaced")
		}
		if got := names(t, dir); len(got) != 1 {
			t.Errorf("the directory has %q", got)
		}
	})
	t.Run("there is no directory", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "none", "record")
		if err := hostfile.Replace(path, []byte("x"), 0o600); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v, want ErrNotExist", err)
		}
		if err := hostfile.SyncDir(filepath.Dir(path)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v, want ErrNotExist", err)
		}
	})
	t.Run("the write fails", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "record")
		if err := hostfile.Replace(path, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		// The draft leads to a device that is always full.
		if err := os.Symlink("/dev/full", path+".new"); err != nil {
			t.Fatal(err)
		}
		if err := hostfile.Replace(path, []byte("new"), 0o600); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("got %v, want ENOSPC", err)
		}
		wantOnly(t, path, "old")
	})
}

func TestCreateSynced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "manifest")
	if err := hostfile.CreateSynced(path, []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := hostfile.CreateSynced(path, []byte("two"), 0o600); !errors.Is(err, fs.ErrExist) {
		t.Errorf("got %v, want ErrExist", err)
	}
	wantOnly(t, path, "one")
}

func TestIsZero(t *testing.T) {
	for n := range 3000 {
		p := make([]byte, n)
		if !hostfile.IsZero(p) {
			t.Fatalf("%d zeros are not", n)
		}
		if n > 0 {
			p[rand.IntN(n)] = 1
			if hostfile.IsZero(p) {
				t.Fatalf("%d bytes with a one are all zeros", n)
			}
		}
	}
}
