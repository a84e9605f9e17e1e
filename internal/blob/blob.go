// Package blob stores files by their content: each is named by the SHA-256 of its bytes, appears
// whole under that name or not at all, and never changes afterwards.
//
// It owns one directory, and with a [Remote] also the choice of files that are only there: evicted
// files leave their size behind. Its callers know what the files are and which are still needed.
// A [Store] is safe for concurrent use. An error leaves nothing behind; a crash leaves files in
// the directory "tmp" only, which the next [Open] removes. Files have mode 0600, since they are
// sources of tenants.
package blob

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/hostfile"
)

// Grace is the time for which [Store.Collect] keeps a file after a Put, so that the caller can
// record that it needs the file. With a shorter time a slow caller loses its file; a longer one
// keeps unneeded files on the disk.
const Grace = 10 * time.Minute

const (
	tmpDir = "tmp"
	// evictedDir has an empty file for each evicted one, as long as that, without taking space.
	evictedDir = "evicted"
	// piece is the number of bytes written between two checks of the free space. Each Put under
	// way may exceed the limit of free space by this much.
	piece = 16 << 20
)

var name = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Store is a directory of files.
type Store struct {
	dir     string
	minFree int64
	now     func() time.Time
	remote  Remote // nil: none; constant after [Store.UseRemote]

	// mu is also held while a file gets or loses its name, so that what was found out about a file is true of the file
	// that is removed.
	mu sync.Mutex
	// +checklocks:mu
	held map[string]int // callers that read a file, by hash
}

// Open opens a store in dir, makes the directory if it does not exist and removes what a crash
// left. A Put leaves minFree bytes of the disk free.
func Open(dir string, minFree int64) (*Store, error) {
	s := &Store{dir: dir, minFree: minFree, now: time.Now, held: map[string]int{}}
	if err := os.RemoveAll(s.path(tmpDir)); err != nil {
		return nil, fmt.Errorf("removing leftovers: %w", err)
	}
	for _, sub := range []string{tmpDir, evictedDir} {
		if err := os.MkdirAll(s.path(sub), 0o700); err != nil {
			return nil, fmt.Errorf("making directory: %w", err)
		}
	}
	return s, nil
}

func (s *Store) path(name string) string { return filepath.Join(s.dir, name) }

// Put stores the content of r and returns its hash (hex SHA-256) and its size in bytes. The file
// is synced to the disk when Put returns. More than limit bytes give TooLarge, code
// "blob_too_large"; too little space gives NoSpace, code "disk_full"; an error of r comes back
// wrapped.
func (s *Store) Put(ctx context.Context, r io.Reader, limit int64) (hash string, size int64, err error) {
	f, err := os.CreateTemp(s.path(tmpDir), "put-")
	if err != nil {
		return "", 0, fmt.Errorf("making file: %w", err)
	}
	defer os.Remove(f.Name()) // after the rename there is nothing to remove
	defer f.Close()
	sum := sha256.New()
	if size, err = s.fill(ctx, io.MultiWriter(f, sum), r, limit); err != nil {
		return "", 0, err
	}
	if err := f.Sync(); err != nil {
		return "", 0, fmt.Errorf("syncing file: %w", noSpace(err))
	}
	hash = hex.EncodeToString(sum.Sum(nil))
	return hash, size, s.place(f, hash)
}

// place renames a synced file to its hash, and syncs the directory.
func (s *Store) place(f *os.File, hash string) error {
	if err := s.rename(f, hash); err != nil {
		return err
	}
	return hostfile.SyncDir(s.dir)
}

func (s *Store) rename(f *os.File, hash string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	// An existing file has the same content; replacing it renews its time for Collect.
	if err := os.Rename(f.Name(), s.path(hash)); err != nil {
		return fmt.Errorf("naming file: %w", err)
	}
	if err := os.Remove(s.evicted(hash)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing mark of eviction: %w", err)
	}
	return nil
}

// fill copies r to w in pieces and checks the free space before each.
func (s *Store) fill(ctx context.Context, w io.Writer, r io.Reader, limit int64) (size int64, err error) {
	for {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		if err := s.room(); err != nil {
			return 0, err
		}
		n, err := io.CopyN(w, r, min(piece, limit+1-size))
		size += n
		switch {
		case size > limit:
			return 0, fault.New(fault.TooLarge, fault.CodeBlobTooLarge, "it has more than %d bytes", limit)
		case errors.Is(err, io.EOF):
			return size, nil
		case err != nil:
			return 0, fmt.Errorf("storing: %w", noSpace(err))
		}
	}
}

func (s *Store) room() error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return fmt.Errorf("looking at the free space below %s: %w", s.dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < s.minFree+piece {
		return fault.New(fault.NoSpace, fault.CodeDiskFull, "the server's disk has no room for it")
	}
	return nil
}

func noSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fault.New(fault.NoSpace, fault.CodeDiskFull, "the server's disk has no room for it").Because(err)
	}
	return err
}

// Path returns the path of a file, for reading until release is called, or fs.ErrNotExist. A file
// that is missing is fetched from the [Remote]. It stays as long as every Collect is told to keep it
// and, since the Remote may have it too, until release.
func (s *Store) Path(ctx context.Context, hash string) (path string, release func(), err error) {
	if !name.MatchString(hash) {
		return "", nil, fmt.Errorf("%q is not a file name: %w", hash, fs.ErrNotExist)
	}
	s.hold(hash, 1)
	release = sync.OnceFunc(func() { s.hold(hash, -1) })
	_, err = os.Stat(s.path(hash))
	if errors.Is(err, fs.ErrNotExist) && s.remote != nil {
		err = s.fetch(ctx, hash)
	}
	if err != nil {
		release()
		return "", nil, fmt.Errorf("finding file: %w", err)
	}
	return s.path(hash), release, nil
}

// Open returns a reader of a file, which the caller closes, or fs.ErrNotExist. It fetches a missing file as
// [Store.Path] does.
func (s *Store) Open(ctx context.Context, hash string) (io.ReadCloser, error) {
	path, release, err := s.Path(ctx, hash)
	if err != nil {
		return nil, err
	}
	defer release() // an open file can be read to its end
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening file: %w", err)
	}
	return f, nil
}

func (s *Store) hold(hash string, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.held[hash] += n; s.held[hash] == 0 {
		delete(s.held, hash)
	}
}

// Size returns the size of a file in bytes, or fs.ErrNotExist. An evicted file has its size.
func (s *Store) Size(hash string) (int64, error) {
	if !name.MatchString(hash) {
		return 0, fmt.Errorf("%q is not a file name: %w", hash, fs.ErrNotExist)
	}
	info, err := os.Stat(s.path(hash))
	if errors.Is(err, fs.ErrNotExist) {
		info, err = os.Stat(s.evicted(hash))
	}
	if err != nil {
		return 0, fmt.Errorf("finding file: %w", err)
	}
	return info.Size(), nil
}

// Collect removes the files that are in neither list and are older than [Grace]. Those in keep are
// also kept by the [Remote]. After an error it goes on, and returns all errors joined.
func (s *Store) Collect(keep, keepHere []string) (removed []string, freed int64, err error) {
	if s.remote != nil {
		s.remote.Keep(keep)
	}
	kept := make(map[string]bool, len(keep)+len(keepHere))
	for _, hash := range slices.Concat(keep, keepHere) {
		kept[hash] = true
	}
	var errs []error
	for _, dir := range []string{".", evictedDir} {
		entries, err := os.ReadDir(s.path(dir))
		if err != nil {
			errs = append(errs, fmt.Errorf("listing files: %w", err))
		}
		for _, e := range entries {
			if !name.MatchString(e.Name()) || kept[e.Name()] {
				continue
			}
			size, gone, err := s.remove(e.Name(), filepath.Join(dir, e.Name()))
			if err != nil {
				errs = append(errs, err)
			}
			if gone {
				removed = append(removed, e.Name())
			}
			if gone && dir != evictedDir {
				freed += size
			}
		}
	}
	return removed, freed, errors.Join(errs...)
}

// remove removes a file at a path below the directory that is older than [Grace] and not held, and
// returns its size in bytes.
func (s *Store) remove(hash, path string) (size int64, gone bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.removeLocked(hash, path)
}

// +checklocks:s.mu
func (s *Store) removeLocked(hash, path string) (size int64, gone bool, err error) {
	info, err := os.Stat(s.path(path))
	if errors.Is(err, fs.ErrNotExist) || err == nil && s.now().Sub(info.ModTime()) < Grace || s.held[hash] > 0 {
		return 0, false, nil
	}
	if err == nil {
		err = os.Remove(s.path(path))
	}
	if err != nil {
		return 0, false, fmt.Errorf("removing file: %w", err)
	}
	return info.Size(), true, nil
}
