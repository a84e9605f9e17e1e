package blob

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Remote keeps copies of files elsewhere.
type Remote interface {
	// Fetch writes the copy of a file to an empty file and verifies it. It returns fs.ErrNotExist if there is none.
	Fetch(ctx context.Context, hash string, f *os.File) error
	// Keep sets the hashes of all files that are needed. Copies of others may be removed, and needed ones that have
	// none are made.
	Keep(hashes []string)
}

// UseRemote lets the store keep copies of files in a Remote and fetch them from there when they are missing. It is
// called once, before all other methods.
func (s *Store) UseRemote(r Remote) { s.remote = r }

func (s *Store) evicted(hash string) string { return filepath.Join(s.dir, evictedDir, hash) }

// fetch fetches a file that is missing.
func (s *Store) fetch(ctx context.Context, hash string) error {
	if err := s.room(); err != nil {
		return err
	}
	f, err := os.CreateTemp(s.path(tmpDir), "fetch-")
	if err != nil {
		return fmt.Errorf("making file: %w", err)
	}
	defer os.Remove(f.Name()) // after the rename there is nothing to remove
	defer f.Close()
	if err := s.remote.Fetch(ctx, hash, f); err != nil {
		return noSpace(err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("syncing file: %w", noSpace(err))
	}
	return s.place(f, hash)
}

// OpenFile opens a file, or returns fs.ErrNotExist.
func (s *Store) OpenFile(hash string) (*os.File, error) {
	if !name.MatchString(hash) {
		return nil, fmt.Errorf("%q is not a file name: %w", hash, fs.ErrNotExist)
	}
	return os.Open(s.path(hash))
}

// EachFile calls f with every file that is here, its size in bytes and the time when it was stored or fetched.
func (s *Store) EachFile(f func(hash string, size int64, used time.Time)) error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("listing files: %w", err)
	}
	for _, e := range entries {
		if !name.MatchString(e.Name()) {
			continue
		}
		if info, err := e.Info(); err == nil { // else it was removed meanwhile
			f(e.Name(), info.Size(), info.ModTime())
		}
	}
	return nil
}

// Evict removes a file of which there is a copy, and reports whether it did. It keeps one that is younger than [Grace]
// or that a caller of Path has not released.
func (s *Store) Evict(hash string) (bool, error) {
	if !name.MatchString(hash) {
		return false, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	info, err := os.Stat(s.path(hash))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("looking at a file: %w", err)
	}
	mark, err := os.OpenFile(s.evicted(hash), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return false, fmt.Errorf("marking an evicted file: %w", err)
	}
	if err := errors.Join(mark.Truncate(info.Size()), mark.Close()); err != nil {
		return false, fmt.Errorf("marking an evicted file: %w", err)
	}
	_, gone, err := s.removeLocked(hash, hash)
	if gone {
		return true, err
	}
	if markErr := os.Remove(mark.Name()); markErr != nil && !errors.Is(markErr, fs.ErrNotExist) {
		err = errors.Join(err, fmt.Errorf("removing mark of eviction: %w", markErr))
	}
	return false, err
}
