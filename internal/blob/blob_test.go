package blob

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

func open(t *testing.T, minFree int64) *Store {
	t.Helper()
	s, err := Open(filepath.Join(t.TempDir(), "blobs"), minFree)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func put(t *testing.T, s *Store, text string) string {
	t.Helper()
	hash, size, err := s.Put(t.Context(), strings.NewReader(text), 1<<20)
	if err != nil || size != int64(len(text)) {
		t.Fatalf("put %d bytes: %d, %v", len(text), size, err)
	}
	return hash
}

// names returns the names of all files in the store's directory.
func names(t *testing.T, s *Store) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			all = append(all, d.Name())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestPut(t *testing.T) {
	s := open(t, 0)
	for _, text := range []string{"", "hello", strings.Repeat("x", 100_000)} {
		sum := sha256.Sum256([]byte(text))
		for range 2 { // putting the same again changes nothing
			if hash := put(t, s, text); hash != hex.EncodeToString(sum[:]) {
				t.Errorf("hash %s of %d bytes", hash, len(text))
			}
		}
		if size, err := s.Size(hex.EncodeToString(sum[:])); err != nil || size != int64(len(text)) {
			t.Errorf("the size is %d, %v", size, err)
		}
		path, release, err := s.Path(t.Context(), hex.EncodeToString(sum[:]))
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		f, err := s.Open(t.Context(), hex.EncodeToString(sum[:]))
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(f); err != nil || string(b) != text {
			t.Errorf("read back %d bytes, %v; want %d", len(b), err, len(text))
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("mode is %v, %v", info.Mode(), err)
		}
	}
	if all := names(t, s); len(all) != 3 {
		t.Errorf("there are %v, want 3 files", all)
	}
}

func TestNothingIsLeftAfterAnError(t *testing.T) {
	broken := errors.New("the caller has gone")
	gone, cancel := context.WithCancelCause(t.Context())
	cancel(broken)
	for _, c := range []struct {
		name    string
		ctx     context.Context
		r       io.Reader
		limit   int64
		minFree int64
		want    func(error) bool
	}{
		{"too large", t.Context(), strings.NewReader("12345"), 4, 0, func(err error) bool { return fault.Is(err, fault.TooLarge) }},
		{"larger than a piece", t.Context(), io.LimitReader(zeros{}, 3*piece), 2 * piece, 0, func(err error) bool { return fault.Is(err, fault.TooLarge) }},
		{"reader that breaks", t.Context(), io.MultiReader(strings.NewReader("abc"), iotest.ErrReader(broken)), 100, 0, func(err error) bool { return errors.Is(err, broken) }},
		{"caller gone", gone, strings.NewReader("abc"), 100, 0, func(err error) bool { return errors.Is(err, broken) }},
		{"disk full", t.Context(), strings.NewReader("abc"), 100, 1 << 60, func(err error) bool { return fault.Is(err, fault.NoSpace) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := open(t, c.minFree)
			if _, _, err := s.Put(c.ctx, c.r, c.limit); !c.want(err) {
				t.Errorf("error is %v", err)
			}
			if all := names(t, s); len(all) > 0 {
				t.Errorf("left behind: %v", all)
			}
		})
	}
	exact := open(t, 0)
	if _, size, err := exact.Put(t.Context(), strings.NewReader("1234"), 4); err != nil || size != 4 {
		t.Errorf("exactly the limit: %d, %v", size, err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestMissingPath(t *testing.T) {
	s := open(t, 0)
	for _, hash := range []string{"", "..", "tmp", "../" + strings.Repeat("a", 61), strings.Repeat("a", 64),
		strings.Repeat("A", 64)} {
		if path, _, err := s.Path(t.Context(), hash); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q is at %q, %v", hash, path, err)
		}
		if f, err := s.Open(t.Context(), hash); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q is open as %v, %v", hash, f, err)
		}
		if size, err := s.Size(hash); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q has %d bytes, %v", hash, size, err)
		}
	}
}

// TestPutDuringRemoval stores a file again while Collect removes an old one with the same content, and while Evict
// does. The file must be there afterwards.
func TestPutDuringRemoval(t *testing.T) {
	s := open(t, 0)
	const content = "stored again"
	hash := put(t, s, content)
	for what, remove := range map[string]func() error{
		"Collect": func() error { _, _, err := s.Collect(nil, nil); return err },
		"Evict":   func() error { _, err := s.Evict(hash); return err },
	} {
		old := time.Now().Add(-2 * Grace)
		if err := os.Chtimes(s.path(hash), old, old); err != nil {
			t.Fatal(err)
		}
		stored := make(chan error, 1)
		var once sync.Once
		s.now = func() time.Time { // is called when the file was found to be old
			once.Do(func() {
				go func() {
					_, _, err := s.Put(context.Background(), strings.NewReader(content), 100)
					stored <- err
				}()
				select {
				case err := <-stored:
					stored <- err
				case <-time.After(200 * time.Millisecond): // the Put waits, as it should
				}
			})
			return time.Now()
		}
		if err := remove(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if err := <-stored; err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := os.Stat(s.path(hash)); err != nil {
			t.Errorf("%s removed what was stored meanwhile: %v", what, err)
			put(t, s, content)
		}
	}
}

func TestCollect(t *testing.T) {
	s := open(t, 0)
	now := time.Now()
	s.now = func() time.Time { return now }
	wanted, unwanted, again := put(t, s, "wanted"), put(t, s, "unwanted"), put(t, s, "put again")
	if removed, _, err := s.Collect(nil, nil); err != nil || len(removed) > 0 {
		t.Errorf("young files went: %v, %v", removed, err)
	}
	old := now.Add(-2 * Grace)
	for _, hash := range []string{wanted, unwanted, again} {
		if err := os.Chtimes(s.path(hash), old, old); err != nil {
			t.Fatal(err)
		}
	}
	put(t, s, "put again")
	removed, freed, err := s.Collect([]string{wanted}, nil)
	if err != nil || !slices.Equal(removed, []string{unwanted}) || freed != int64(len("unwanted")) {
		t.Errorf("removed %v, %d bytes, %v", removed, freed, err)
	}
	for hash, want := range map[string]bool{wanted: true, unwanted: false, again: true} {
		if _, err := os.Stat(s.path(hash)); (err == nil) != want {
			t.Errorf("%s: there is %v, want %t", hash, err, want)
		}
	}
}

func TestOpenRemovesWhatACrashLeft(t *testing.T) {
	s := open(t, 0)
	kept := put(t, s, "kept")
	if err := os.WriteFile(filepath.Join(s.dir, tmpDir, "put-1"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(s.dir, 0); err != nil {
		t.Fatal(err)
	}
	if all := names(t, s); !slices.Equal(all, []string{kept}) {
		t.Errorf("there are %v, want the one that is whole", all)
	}
}

func TestConcurrentPutsOfSameContent(t *testing.T) {
	s := open(t, 0)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, _, err := s.Put(t.Context(), strings.NewReader("same"), 10); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if all := names(t, s); len(all) != 1 {
		t.Errorf("there are %v", all)
	}
}
