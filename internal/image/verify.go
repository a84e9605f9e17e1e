package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// verification is one check of an image: it reads the file, or fetches one that is missing. All callers that ask for
// the image meanwhile wait for it, and it goes on when they leave.
type verification struct {
	done chan struct{}
	err  error // valid once done is closed
}

// over reports whether the verification has ended.
func (v *verification) over() bool {
	select {
	case <-v.done:
		return true
	default:
		return false
	}
}

// isDigest reports whether text can name an image, which also excludes paths.
func isDigest(text string) bool {
	return len(text) == 2*sha256.Size && strings.Trim(text, "0123456789abcdef") == ""
}

// Path returns the file of an image, for reading only. The first call in this process reads the
// whole file and checks its SHA-256; later ones are free. A missing file is fetched from the
// [Remote]; without one, or if it has none, it gives [ErrMissing]. A file that does not match its
// name gives [ErrCorrupt], and is renamed to NAME.corrupt, so that the next call fetches, or the
// next build makes, a good one. If ctx ends first, it gives [ErrUnderway], and the work goes on for
// later callers.
func (s *Store) Path(ctx context.Context, digest string) (string, error) {
	if !isDigest(digest) {
		return "", fmt.Errorf("%w: %.80q is not the name of one", ErrMissing, digest)
	}
	path := s.file(digest)
	s.mu.Lock()
	s.used[digest] = s.cfg.Now()
	v := s.verified[digest]
	if v != nil && v.over() {
		if _, err := os.Stat(path); err == nil {
			s.mu.Unlock()
			s.hits.Add(1)
			return path, nil
		}
		v = nil // the file was removed
	}
	if v == nil {
		v = s.beginLocked(digest)
	}
	s.mu.Unlock()
	select {
	case <-v.done:
		if v.err != nil {
			return "", v.err
		}
		return path, nil
	case <-ctx.Done():
		return "", fmt.Errorf("%w: %s: %w", ErrUnderway, digest, context.Cause(ctx))
	}
}

// beginLocked begins the verification of an image.
//
// +checklocks:s.mu
func (s *Store) beginLocked(digest string) *verification {
	v := &verification{done: make(chan struct{})}
	if s.ctx.Err() != nil { // Close waits for no more
		v.err = context.Cause(s.ctx)
		close(v.done)
		return v
	}
	s.verified[digest] = v
	s.verifying.Go(func() {
		v.err = s.verify(s.ctx, digest)
		s.mu.Lock()
		if v.err != nil && s.verified[digest] == v {
			delete(s.verified, digest) // a later caller begins a new one
		}
		s.mu.Unlock()
		close(v.done)
	})
	return v
}

// verify reads the file of an image and checks it, or fetches one that is missing.
func (s *Store) verify(ctx context.Context, digest string) error {
	path := s.file(digest)
	got, err := hashFile(ctx, path)
	if errors.Is(err, fs.ErrNotExist) {
		return s.fetchRemote(ctx, digest)
	}
	if err != nil {
		return fmt.Errorf("verifying image %s: %w", digest, err)
	}
	if got != digest {
		aside := filepath.Join(s.cfg.Dir, digest+".corrupt")
		s.log.Error("image is corrupt", "digest", digest, "found", got, "moved_to", aside)
		return errors.Join(fmt.Errorf("%w: %s has the digest %s", ErrCorrupt, path, got), os.Rename(path, aside))
	}
	return nil
}

// trust records that this process has just written and hashed an image.
func (s *Store) trust(digest string) {
	v := &verification{done: make(chan struct{})}
	close(v.done)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.verified[digest] = v
}

// touch records that an image is used now.
func (s *Store) touch(digest string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used[digest] = s.cfg.Now()
}

// collectGrace is the time for which an image that was built or used is kept, needed or not.
// Between choosing an image and recording that it is needed, no caller can name it to Collect.
const collectGrace = 15 * time.Minute

// Collect removes the images that are in neither list, and pulled OCI images that exceed the budget.
// It never removes one that was built or used in the last 15 minutes. Sandboxes that have a
// removed file open are not disturbed. After an error it goes on, and returns all errors joined.
// The [Remote] keeps those of both lists too, and until the next Collect none of keepHere is evicted.
func (s *Store) Collect(keep, keepHere []string) (removed []string, freed int64, err error) {
	all := slices.Concat(keep, keepHere)
	kept := setOf(all)
	s.mu.Lock()
	s.keepHere = setOf(keepHere)
	s.mu.Unlock()
	if s.remote != nil {
		s.remote.Keep(all) // after which it may evict
	}
	s.trimLayouts()
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return nil, 0, fmt.Errorf("listing images: %w", err)
	}
	var errs []error
	for _, e := range entries {
		digest, isImage := strings.CutSuffix(e.Name(), suffix)
		corrupt, isCorrupt := strings.CutSuffix(e.Name(), ".corrupt")
		switch {
		case isImage && isDigest(digest) && !kept[digest]:
		case isCorrupt && isDigest(corrupt):
			digest = "" // kept for inspection until now
		default:
			continue
		}
		info, err := e.Info()
		if err != nil {
			errs = append(errs, err)
			continue
		}
		gone, err := s.removeUnused(digest, e.Name(), info)
		if err != nil {
			errs = append(errs, err)
		}
		if gone {
			freed += info.Size()
			if digest != "" {
				removed = append(removed, digest)
			}
		}
	}
	return removed, freed, errors.Join(append(errs, s.forget(kept))...)
}

// setOf returns the set of digests.
func setOf(digests []string) map[string]bool {
	set := make(map[string]bool, len(digests))
	for _, digest := range digests {
		set[digest] = true
	}
	return set
}

// forget removes the records of images that are gone and not in kept: those may be in the [Remote].
func (s *Store) forget(kept map[string]bool) error {
	notes, err := filepath.Glob(filepath.Join(s.cfg.Dir, inputsDir, "*.json"))
	if err != nil {
		return err
	}
	var errs []error
	for _, note := range notes {
		b, err := os.ReadFile(note)
		if err != nil {
			continue // removed meanwhile
		}
		var in input
		if json.Unmarshal(b, &in) == nil && isDigest(in.Image.Digest) {
			if s.remote != nil && kept[in.Image.Digest] {
				continue
			}
			if _, err := os.Stat(s.file(in.Image.Digest)); !errors.Is(err, fs.ErrNotExist) {
				continue
			}
		}
		if err := os.Remove(note); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("removing note: %w", err))
		}
	}
	return errors.Join(errs...)
}

// removeUnused removes a file of the store that was not used recently.
func (s *Store) removeUnused(digest, name string, info fs.FileInfo) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock() // held, so that Path cannot return it meanwhile
	last, ok := s.used[digest]
	if !ok {
		last = info.ModTime() // an earlier process may have used it
	}
	if s.cfg.Now().Sub(last) < collectGrace {
		return false, nil
	}
	if err := os.Remove(filepath.Join(s.cfg.Dir, name)); err != nil {
		return false, fmt.Errorf("removing image: %w", err)
	}
	delete(s.used, digest)
	delete(s.verified, digest)
	return true, nil
}

// isSparse reports whether a file has holes.
func isSparse(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && st.Blocks*512 < info.Size()-hole
}

// hashFile returns the hex SHA-256 of a file.
func hashFile(ctx context.Context, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	hash := sha256.New()
	if _, err := io.CopyBuffer(hash, contextReader{ctx, f}, make([]byte, 1<<20)); err != nil {
		return "", err
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}
