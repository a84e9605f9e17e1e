package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/fault"
)

// ErrRemoteUnreachable reports that an image is not here, and that the [Remote], which may have it, could not be asked.
// It need not be built again.
var ErrRemoteUnreachable = errors.New("image is not in the store, and its copy cannot be reached")

// ErrUnderway reports that the caller left before the image was verified or fetched, which goes on.
var ErrUnderway = errors.New("image is still being verified or fetched")

// Remote keeps copies of images elsewhere.
type Remote interface {
	// Offer has an image copied in the background.
	Offer(digest string)
	// Fetch writes the copy of an image to an empty file and verifies it. It returns fs.ErrNotExist if there is none.
	Fetch(ctx context.Context, digest string, f *os.File) error
	// Find returns nil if there is a copy of an image, and fs.ErrNotExist if there is none.
	Find(ctx context.Context, digest string) error
	// Keep sets the digests of all images that are needed. Copies of others may be removed, and needed ones that have
	// none are made.
	Keep(digests []string)
}

// retryRoom is the time after which a caller for whose image the disk has no room should try again. Images are evicted
// when sandboxes end, so a shorter time finds the disk as full.
const retryRoom = 30 * time.Second

// fetchTimeout bounds one fetch, since a Remote may send a byte now and then. With a shorter one a large image never
// comes over a slow line, since the next fetch begins at its first byte; with a longer one a fetch that will not end
// keeps its space on the disk, and its callers waiting, for longer.
const fetchTimeout = 12 * time.Hour

// UseRemote lets the store copy images to a Remote and fetch them from there when they are missing. inUse reports
// whether a running sandbox has an image open, which is then not evicted. It is called once, before all other methods.
func (s *Store) UseRemote(r Remote, inUse func(digest string) bool) { s.remote, s.inUse = r, inUse }

// fetchRemote fetches an image that is missing. Without a copy it returns [ErrMissing].
func (s *Store) fetchRemote(ctx context.Context, digest string) error {
	missing := fmt.Errorf("%w: %s", ErrMissing, digest)
	if s.remote == nil {
		return missing
	}
	f, err := os.CreateTemp(s.tmpDir(), "image-")
	if err != nil {
		return fmt.Errorf("making file: %w", err)
	}
	defer f.Close()
	defer os.Remove(f.Name()) // fails if the file was renamed
	ctx, stop := context.WithTimeoutCause(ctx, fetchTimeout, fmt.Errorf("not done within %v", fetchTimeout))
	defer stop()
	err = s.remote.Fetch(ctx, digest, f)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errors.Join(missing, err)
	case errors.Is(err, unix.ENOSPC):
		return fault.New(fault.Unavailable, fault.CodeNoCapacity,
			"this machine's disk has no room for the template's image now: try again later").
			After(retryRoom).Because(err)
	case err != nil:
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("%w: %s: %w", ErrRemoteUnreachable, digest, err)
	}
	_, err = s.place(f, digest)
	return err
}

// findPatience bounds how long Find waits for the Remote, which tries three times with pauses. With a shorter time an
// unreachable one is found out when a sandbox has begun; with a longer one callers that need no answer wait.
const findPatience = 5 * time.Second

// Find returns nil if an image is here, being fetched or in the [Remote], or if that cannot be told within 5 seconds.
// It neither reads nor fetches an image. It gives [ErrMissing] for an image that is nowhere, and
// [ErrRemoteUnreachable] if the Remote does not answer.
func (s *Store) Find(ctx context.Context, digest string) error {
	if !isDigest(digest) {
		return fmt.Errorf("%w: %.80q is not the name of one", ErrMissing, digest)
	}
	s.mu.Lock()
	v := s.verified[digest]
	here := v != nil && !v.over()
	if !here {
		_, err := os.Stat(s.file(digest))
		here = err == nil
	}
	if here {
		s.used[digest] = s.cfg.Now() // so that it is not evicted before the sandbox is made
	}
	s.mu.Unlock()
	switch {
	case here:
		return nil
	case s.remote == nil:
		return fmt.Errorf("%w: %s", ErrMissing, digest)
	}
	ctx, cancel := context.WithTimeout(ctx, findPatience)
	defer cancel()
	err := s.remote.Find(ctx, digest)
	switch {
	case err == nil || ctx.Err() != nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %s: %w", ErrMissing, digest, err)
	}
	return fmt.Errorf("%w: %s: %w", ErrRemoteUnreachable, digest, err)
}

// Hits returns how often an image was used that was here already.
func (s *Store) Hits() uint64 { return s.hits.Load() }

// OpenFile opens the file of an image, which is not verified.
func (s *Store) OpenFile(digest string) (*os.File, error) {
	if !isDigest(digest) {
		return nil, fmt.Errorf("%.80q is not an image: %w", digest, fs.ErrNotExist)
	}
	return os.Open(s.file(digest))
}

// EachFile calls f with every image, its size in bytes and the time of its last use. What a former
// process used counts as used when it was made.
func (s *Store) EachFile(f func(digest string, size int64, used time.Time)) error {
	entries, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return fmt.Errorf("listing images: %w", err)
	}
	for _, e := range entries {
		digest, isImage := strings.CutSuffix(e.Name(), suffix)
		info, err := e.Info()
		if !isImage || !isDigest(digest) || err != nil {
			continue // no image, or removed meanwhile
		}
		s.mu.Lock()
		used, ok := s.used[digest]
		s.mu.Unlock()
		if !ok {
			used = info.ModTime()
		}
		f(digest, info.Size(), used)
	}
	return nil
}

// Evict removes an image of which there is a copy, and reports whether it did. It keeps one that was used in the last
// 15 minutes, that a running sandbox has open, or that the last Collect was told to keep here.
func (s *Store) Evict(digest string) (bool, error) {
	s.mu.Lock()
	stays := s.keepHere[digest]
	s.mu.Unlock()
	if stays || s.inUse != nil && s.inUse(digest) {
		return false, nil
	}
	info, err := os.Stat(s.file(digest))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("looking at an image: %w", err)
	}
	return s.removeUnused(digest, filepath.Base(s.file(digest)), info)
}
