package checkpoint

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
)

const name = "sbx_test"

func everything(string) bool { return true }

func open(t *testing.T, dir string) (*Store, []string) {
	t.Helper()
	s, interrupted, err := Open(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	return s, interrupted
}

// write makes a draft with one file that holds text.
func write(t *testing.T, s *Store, text string) *Draft {
	t.Helper()
	d, err := s.Begin(name, int64(len(text)))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"pages", "state"} {
		if err := os.WriteFile(filepath.Join(d.Dir(), file), []byte(file+text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func commit(t *testing.T, d *Draft, about string) {
	t.Helper()
	if _, err := d.Commit(time.Unix(1e9, 5000), about); err != nil {
		t.Fatal(err)
	}
}

// want checks that the latest checkpoint is the one with the description about, and whole.
func want(t *testing.T, s *Store, about string) *Checkpoint {
	t.Helper()
	c, err := s.Latest(name)
	if err != nil || c == nil {
		t.Fatalf("the latest is %v, %v", c, err)
	}
	var got string
	if err := errors.Join(c.Understand(&got), c.Verify(t.Context(), everything)); err != nil || got != about {
		t.Errorf("the latest is about %q, want %q: %v", got, about, err)
	}
	return c
}

func TestTheLatestReplacesTheOneBefore(t *testing.T) {
	s, _ := open(t, t.TempDir())
	if c, err := s.Latest(name); c != nil || err != nil {
		t.Fatalf("before there was any: %v, %v", c, err)
	}
	for _, text := range []string{"one", "two", "three"} {
		commit(t, write(t, s, text), text)
		c := want(t, s, text)
		if !c.At.Equal(time.Unix(1e9, 5000)) || c.Size == 0 {
			t.Errorf("it is of %s with %d bytes", c.At, c.Size)
		}
		all, err := os.ReadDir(filepath.Dir(c.Dir))
		if err != nil || len(all) != 1 {
			t.Errorf("beside it: %v, %v", all, err)
		}
	}
	if err := s.Remove(name); err != nil {
		t.Fatal(err)
	}
	if names, err := s.Names(); err != nil || len(names) != 0 {
		t.Errorf("left: %v, %v", names, err)
	}
}

// TestLatestBesideRemove checks that Latest finds a whole checkpoint or none while others are
// made and removed.
func TestLatestBesideRemove(t *testing.T) {
	s, _, err := Open(t.TempDir(), 0)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var looks sync.WaitGroup
	for range 2 {
		looks.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if _, err := s.Latest(name); err != nil {
					t.Errorf("beside a removal: %v", err)
					return
				}
			}
		})
	}
	for range 60 {
		commit(t, write(t, s, "one"), "one")
		commit(t, write(t, s, "two"), "two")
		if err := s.Remove(name); err != nil {
			t.Error(err)
		}
	}
	close(done)
	looks.Wait()
	if s.Has(name) {
		t.Error("something is left")
	}
}

// TestNamesAreNames checks that no name stands for the checkpoints of others.
func TestNamesAreNames(t *testing.T) {
	dir := t.TempDir()
	s, _ := open(t, dir)
	if err := os.MkdirAll(filepath.Join(dir, "other", "1"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"", ".", "..", "../x", "other/1", "a\x00b"} {
		if err := s.Remove(name); err == nil {
			t.Errorf("removed %q", name)
		}
		if _, err := s.Begin(name, 0); err == nil {
			t.Errorf("began %q", name)
		}
	}
	if !s.Has("other") {
		t.Error("another checkpoint is gone")
	}
}

func TestAbandon(t *testing.T) {
	s, _ := open(t, t.TempDir())
	if err := write(t, s, "x").Abandon(); err != nil {
		t.Fatal(err)
	}
	if names, err := s.Names(); err != nil || len(names) != 0 {
		t.Errorf("left: %v, %v", names, err)
	}
	commit(t, write(t, s, "one"), "one")
	if err := write(t, s, "x").Abandon(); err != nil {
		t.Fatal(err)
	}
	want(t, s, "one")
}

// TestCrash opens the store again on what a crash can leave: until the rename the previous
// checkpoint is the latest, from then on the new one.
func TestCrash(t *testing.T) {
	dir := t.TempDir()
	s, _ := open(t, dir)
	commit(t, write(t, s, "one"), "one")
	write(t, s, "two")
	s, interrupted := open(t, dir)
	if diff := cmp.Diff([]string{name}, interrupted); diff != "" {
		t.Error(diff)
	}
	c := want(t, s, "one")
	if _, interrupted = open(t, dir); interrupted != nil {
		t.Errorf("again: %v", interrupted)
	}
	// After the rename, before the previous checkpoint is removed.
	if err := os.CopyFS(filepath.Join(dir, "before"), os.DirFS(c.Dir)); err != nil {
		t.Fatal(err)
	}
	commit(t, write(t, s, "two"), "two")
	if err := os.Rename(filepath.Join(dir, "before"), c.Dir); err != nil {
		t.Fatal(err)
	}
	s, _ = open(t, dir)
	want(t, s, "two")
	commit(t, write(t, s, "three"), "three")
	if all, err := os.ReadDir(filepath.Join(dir, name)); err != nil || len(all) != 1 {
		t.Errorf("there are %v, %v", all, err)
	}
}

func TestDamage(t *testing.T) {
	for what, change := range map[string]func(path string, data []byte) error{
		"flipped": func(path string, data []byte) error {
			data[len(data)/2] ^= 1
			return os.WriteFile(path, data, 0o600)
		},
		"cut":   func(path string, data []byte) error { return os.WriteFile(path, data[:len(data)-1], 0o600) },
		"empty": func(path string, _ []byte) error { return os.WriteFile(path, nil, 0o600) },
		"gone":  func(path string, _ []byte) error { return os.Remove(path) },
	} {
		for _, file := range []string{"pages", "state", manifestFile} {
			s, _ := open(t, t.TempDir())
			commit(t, write(t, s, "one"), "one")
			path := filepath.Join(want(t, s, "one").Dir, file)
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := change(path, data); err != nil {
				t.Fatal(err)
			}
			c, err := s.Latest(name)
			if err == nil {
				err = c.Verify(t.Context(), everything)
			}
			if f := fault.As(err); f == nil || f.Code != "checkpoint_damaged" || !strings.Contains(f.Detail, file) {
				t.Errorf("%s is %s: %v", file, what, err)
			}
		}
	}
}

func TestDistrust(t *testing.T) {
	s, _ := open(t, t.TempDir())
	commit(t, write(t, s, "one"), "one")
	c := want(t, s, "one")
	if c.Suspect() {
		t.Error("a new checkpoint is suspect")
	}
	if err := c.Distrust(); err != nil {
		t.Fatal(err)
	}
	if c = want(t, s, "one"); !c.Suspect() {
		t.Error("it is not suspect")
	}
}

// TestSpaceIsPromisedOnce checks that drafts under way count against each other.
func TestSpaceIsPromisedOnce(t *testing.T) {
	const most = int64(1) << 60
	s, _, err := Open(t.TempDir(), -most) // this much more than the disk has
	if err != nil {
		t.Fatal(err)
	}
	first, err := s.Begin(name, most-1<<30)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := s.Begin("another", most/2); !fault.Is(err, fault.NoSpace) {
			t.Fatalf("got %v", err)
		}
	}
	if err := first.Abandon(); err != nil {
		t.Fatal(err)
	}
	second, err := s.Begin("another", most/2)
	if err != nil {
		t.Fatal(err)
	}
	commit(t, second, "small after all")
	if _, err := s.Begin(name, most-1<<30); err != nil {
		t.Errorf("after the commit: %v", err)
	}
}
