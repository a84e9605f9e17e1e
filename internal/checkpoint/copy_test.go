package checkpoint

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// latestOf checks the latest checkpoint of a name.
func latestOf(t *testing.T, s *Store, of, about string) *Checkpoint {
	t.Helper()
	c, err := s.Latest(of)
	if err != nil || c == nil {
		t.Fatalf("the latest of %s is %v, %v", of, c, err)
	}
	var got string
	if err := errors.Join(c.Understand(&got), c.Verify(t.Context(), everything)); err != nil || got != about {
		t.Errorf("the latest of %s is about %q, want %q: %v", of, got, about, err)
	}
	return c
}

// TestCommitAs commits drafts of one name as others. The name's own latest checkpoint stays, and
// a name without one leaves no directory.
func TestCommitAs(t *testing.T) {
	s, _ := open(t, t.TempDir())
	for _, own := range []bool{false, true} {
		if own {
			commit(t, write(t, s, "own"), "own")
		}
		other := fmt.Sprint("snap_", own)
		if _, err := write(t, s, other).CommitAs(other, time.Unix(1e9, 0), other); err != nil {
			t.Fatal(err)
		}
		latestOf(t, s, other, other)
		if own {
			want(t, s, "own")
		} else if s.Has(name) {
			t.Errorf("%s has a directory", name)
		}
	}
	if s.promised != 0 {
		t.Errorf("%d bytes are promised still", s.promised)
	}
}

// TestCopy copies a checkpoint to another name; each is whole without the other.
func TestCopy(t *testing.T) {
	dir := t.TempDir()
	s, _ := open(t, dir)
	if c, err := s.Copy(name, "snap_none"); c != nil || err != nil {
		t.Errorf("a copy of nothing: %v, %v", c, err)
	}
	commit(t, write(t, s, "one"), "one")
	if err := want(t, s, "one").Distrust(); err != nil {
		t.Fatal(err)
	}
	if c, err := s.Copy(name, "snap_a"); err != nil || !c.Suspect() || c.Size == 0 {
		t.Fatalf("the copy is %+v, %v", c, err)
	}
	commit(t, write(t, s, "two"), "two") // which removes the first one
	latestOf(t, s, "snap_a", "one")
	if err := s.Remove("snap_a"); err != nil {
		t.Fatal(err)
	}
	want(t, s, "two")
	// A crash leaves a draft of a copy, which the next Open removes.
	if err := os.MkdirAll(filepath.Join(dir, "snap_b", draftDir), 0o700); err != nil {
		t.Fatal(err)
	}
	again, interrupted := open(t, dir)
	if len(interrupted) != 1 || again.Has("snap_b") {
		t.Errorf("interrupted: %v", interrupted)
	}
	want(t, again, "two")
}

// TestOpened reads a removed checkpoint to its end, and finds damage.
func TestOpened(t *testing.T) {
	s, _ := open(t, t.TempDir())
	for _, damaged := range []bool{false, true} {
		commit(t, write(t, s, "one"), "one")
		c := want(t, s, "one")
		o, err := c.Open(everything)
		if err != nil {
			t.Fatal(err)
		}
		if damaged {
			if err := os.WriteFile(filepath.Join(c.Dir, "pages"), []byte("pagesxne"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Remove(name); err != nil {
			t.Fatal(err)
		}
		if err := o.Verify(t.Context()); (err != nil) != damaged ||
			damaged && (fault.As(err) == nil || fault.As(err).Code != "checkpoint_damaged") {
			t.Errorf("damaged %v: %v", damaged, err)
		}
		if err := o.Close(); err != nil {
			t.Error(err)
		}
		if _, err := c.Open(everything); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("opening what is gone: %v", err)
		}
	}
}
