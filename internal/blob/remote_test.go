package blob

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/objects"
)

// copies is a Remote over a bucket in a directory. What Keep names is copied at once.
type copies struct {
	t *testing.T
	*objects.Transfer
	s       *Store
	kept    []string
	minFree int64 // bytes that a fetch leaves free
}

func (c *copies) Fetch(ctx context.Context, hash string, f *os.File) error {
	sum, err := objects.ParseSum(hash)
	if err != nil {
		return err
	}
	_, err = c.Download(ctx, hash, f, sum, 1<<20, c.minFree)
	return err
}

func (c *copies) Keep(hashes []string) {
	c.kept = hashes
	for _, hash := range hashes {
		f, err := c.s.OpenFile(hash)
		if err != nil {
			continue // evicted
		}
		defer f.Close()
		sum, _ := objects.ParseSum(hash)
		info, err := f.Stat()
		if err == nil {
			err = c.Upload(c.t.Context(), hash, f, info.Size(), sum)
		}
		if err != nil {
			c.t.Error(err)
		}
	}
}

func withCopies(t *testing.T, s *Store) *copies {
	t.Helper()
	b, err := objects.OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	c := &copies{t: t, Transfer: objects.NewTransfer(b), s: s}
	s.UseRemote(c)
	return c
}

func TestEvictAndFetch(t *testing.T) {
	s := open(t, 0)
	c := withCopies(t, s)
	now := time.Now()
	s.now = func() time.Time { return now }
	needed, here := put(t, s, "needed"), put(t, s, "needed here only")
	if _, _, err := s.Collect([]string{needed}, []string{here}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(c.kept, []string{needed}) {
		t.Errorf("told to keep were %v", c.kept)
	}
	evict := func(want bool) {
		t.Helper()
		if gone, err := s.Evict(needed); err != nil || gone != want {
			t.Errorf("evicted: %t, %v; want %t", gone, err, want)
		}
		if size, err := s.Size(needed); err != nil || size != int64(len("needed")) {
			t.Errorf("its size is %d, %v", size, err)
		}
	}
	evict(false)             // it is young
	now = now.Add(2 * Grace) // of the files, which were made a little later
	path, release, err := s.Path(t.Context(), needed)
	if err != nil {
		t.Fatal(err)
	}
	evict(false) // it is being read
	if text, err := os.ReadFile(path); err != nil || string(text) != "needed" {
		t.Errorf("it is %q, %v", text, err)
	}
	release()
	release() // does nothing
	evict(true)
	evict(false)
	if all := names(t, s); !slices.Contains(all, here) || len(all) != 2 {
		t.Errorf("there are %v, want the other file and a mark", all)
	}
	if s, err = Open(s.dir, 0); err != nil { // the mark outlives the process
		t.Fatal(err)
	}
	s.UseRemote(c)
	if size, err := s.Size(needed); err != nil || size != int64(len("needed")) {
		t.Errorf("its size is %d, %v", size, err)
	}
	c.minFree = 1 << 60
	if _, _, err := s.Path(t.Context(), needed); errors.Is(err, fs.ErrNotExist) || !fault.Is(err, fault.NoSpace) {
		t.Errorf("fetching without room: %v", err)
	}
	c.minFree = 0
	path, release, err = s.Path(t.Context(), needed)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if text, err := os.ReadFile(path); err != nil || string(text) != "needed" {
		t.Errorf("fetched %q, %v", text, err)
	}
	if all := names(t, s); len(all) != 2 {
		t.Errorf("there are %v, want two files and no mark", all)
	}
	unknown := strings.Repeat("0123456789abcdef", 4)
	if _, _, err := s.Path(t.Context(), unknown); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that was never stored: %v", err)
	}
}

// TestCollectRemovesMarks checks that of an evicted file nothing stays that is not needed any more.
func TestCollectRemovesMarks(t *testing.T) {
	s := open(t, 0)
	withCopies(t, s)
	hash := put(t, s, "text")
	if _, _, err := s.Collect([]string{hash}, nil); err != nil {
		t.Fatal(err)
	}
	s.now = func() time.Time { return time.Now().Add(2 * Grace) }
	if gone, err := s.Evict(hash); err != nil || !gone {
		t.Fatalf("evicted: %t, %v", gone, err)
	}
	removed, freed, err := s.Collect(nil, nil)
	if err != nil || !slices.Equal(removed, []string{hash}) || freed != 0 {
		t.Errorf("removed %v, %d bytes, %v", removed, freed, err)
	}
	if all := names(t, s); len(all) != 0 {
		t.Errorf("there are %v", all)
	}
}
