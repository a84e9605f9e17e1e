// Package blob keeps files by what is in them: each is named by the SHA-256 of its
// bytes, appears whole under that name or not at all, and never changes afterwards.
//
// It owns one directory. What the files are, and which of them are still needed, is the
// business of those who call. A [Store] is safe for concurrent use. After an error
// nothing is left; after a crash only the directory "tmp" may hold leftovers, which the
// next [Open] removes. Files are 0600: they are strangers' sources.
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
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/fault"
)

// Grace is how long a file that was put lately is safe from [Store.Collect], so that
// whoever put it can write down that it is needed. Shorter and a slow caller loses its
// file; longer keeps files nobody wants on the disk.
const Grace = 10 * time.Minute

const (
	tmpDir = "tmp"
	// piece is how much is written between two looks at the free space, bytes. The limit
	// of free space is overstepped by no more than this for each Put under way.
	piece = 16 << 20
)

var name = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Store is a directory of files.
type Store struct {
	dir     string
	minFree int64
	now     func() time.Time
}

// Open opens a store in dir, makes the directory if it is not there and removes what a
// crash left. Puts leave minFree bytes of its disk free.
func Open(dir string, minFree int64) (*Store, error) {
	s := &Store{dir: dir, minFree: minFree, now: time.Now}
	if err := os.RemoveAll(s.path(tmpDir)); err != nil {
		return nil, fmt.Errorf("removing leftovers: %w", err)
	}
	if err := os.MkdirAll(s.path(tmpDir), 0o700); err != nil {
		return nil, fmt.Errorf("making directory: %w", err)
	}
	return s, nil
}

func (s *Store) path(name string) string { return filepath.Join(s.dir, name) }

// Put stores what r gives and returns its hash (hex SHA-256) and its size in bytes. It
// is on the disk when Put returns. More than limit bytes are TooLarge, code
// "blob_too_large", too little space NoSpace, code "disk_full"; an error of r comes back
// wrapped.
func (s *Store) Put(ctx context.Context, r io.Reader, limit int64) (hash string, size int64, err error) {
	f, err := os.CreateTemp(s.path(tmpDir), "put-")
	if err != nil {
		return "", 0, fmt.Errorf("making file: %w", err)
	}
	defer os.Remove(f.Name()) // nothing is there any more once it has its name
	defer f.Close()
	sum := sha256.New()
	if size, err = s.fill(ctx, io.MultiWriter(f, sum), r, limit); err != nil {
		return "", 0, err
	}
	if err := f.Sync(); err != nil {
		return "", 0, fmt.Errorf("syncing file: %w", noSpace(err))
	}
	hash = hex.EncodeToString(sum.Sum(nil))
	// A file that is there already is the same; replacing it makes it young again.
	if err := os.Rename(f.Name(), s.path(hash)); err != nil {
		return "", 0, fmt.Errorf("naming file: %w", err)
	}
	return hash, size, syncDir(s.dir)
}

// fill copies in pieces, looking at the free space before each.
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
			return 0, fault.New(fault.TooLarge, "blob_too_large", "it has more than %d bytes", limit)
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
		return fault.New(fault.NoSpace, "disk_full", "the server's disk has no room for it")
	}
	return nil
}

func noSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fault.New(fault.NoSpace, "disk_full", "the server's disk has no room for it").Because(err)
	}
	return err
}

// Path returns where a file is, for reading; fs.ErrNotExist when it is not there. It
// stays as long as every Collect is told to keep it.
func (s *Store) Path(hash string) (string, error) {
	if !name.MatchString(hash) {
		return "", fmt.Errorf("%q is no name of a file: %w", hash, fs.ErrNotExist)
	}
	if _, err := os.Stat(s.path(hash)); err != nil {
		return "", fmt.Errorf("finding file: %w", err)
	}
	return s.path(hash), nil
}

// Size returns how many bytes a file has; fs.ErrNotExist when it is not there.
func (s *Store) Size(hash string) (int64, error) {
	if !name.MatchString(hash) {
		return 0, fmt.Errorf("%q is no name of a file: %w", hash, fs.ErrNotExist)
	}
	info, err := os.Stat(s.path(hash))
	if err != nil {
		return 0, fmt.Errorf("finding file: %w", err)
	}
	return info.Size(), nil
}

// Collect removes the files that are not in keep and were not put within [Grace]. It
// goes on after errors and joins them.
func (s *Store) Collect(keep []string) (removed []string, freed int64, err error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, 0, fmt.Errorf("listing files: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if !name.MatchString(e.Name()) || slices.Contains(keep, e.Name()) {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil && s.now().Sub(info.ModTime()) < Grace {
			continue
		}
		if err == nil {
			err = os.Remove(s.path(e.Name()))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("removing file: %w", err))
			continue
		}
		removed, freed = append(removed, e.Name()), freed+info.Size()
	}
	return removed, freed, errors.Join(errs...)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("opening directory to sync: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("syncing directory: %w", err)
	}
	return nil
}
