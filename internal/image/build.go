package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Build makes the image of a source, or finds it where the same inputs were
// built before. progress is called with lines for people, from one goroutine at a
// time. Builds run one at a time; waiting for the turn ends with ctx. A step that
// failed is a *[StepError]. The image is safe from [Store.Collect] for a while
// (see collectGrace), so that the caller can write down that it is needed.
func (s *Store) Build(ctx context.Context, src Source, progress func(string)) (Image, error) {
	if src.Image == "" && src.Debian == nil {
		return Image{}, errors.New("source names neither an OCI image nor Debian packages")
	}
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return Image{}, context.Cause(ctx)
	}
	key, err := src.key()
	if err != nil {
		return Image{}, err
	}
	if img, ok := s.known(ctx, key, progress); ok {
		return img, nil
	}
	img, moving, err := s.make(ctx, src, progress)
	if err != nil {
		return Image{}, err
	}
	s.remember(key, input{Image: img, MadeAt: s.cfg.Now().UTC(), Moving: moving})
	return img, nil
}

// make builds from the first of the source's parts that gives what is required.
func (s *Store) make(ctx context.Context, src Source, progress func(string)) (img Image, moving bool, err error) {
	var from string
	if src.Image != "" {
		img, err := s.makeOne(ctx, src, progress, func(t *tree) (rt Runtime, from string, err error) {
			return s.fromRegistry(ctx, t, src.Image, progress)
		})
		if err == nil || ctx.Err() != nil || src.Debian == nil {
			return img, src.moves(), err
		}
		progress("Debian packages instead: " + short(err))
		from = fmt.Sprintf(" (not %s: %s)", src.Image, short(err))
	}
	img, err = s.makeOne(ctx, src, progress, func(t *tree) (Runtime, string, error) {
		return Runtime{}, "debian:" + src.Debian.Suite + from, s.fromDebian(ctx, t, src.Debian, progress)
	})
	return img, true, err
}

// makeOne fills a tree, sets it up, checks it and makes it an image.
func (s *Store) makeOne(ctx context.Context, src Source, progress func(string), fill func(*tree) (Runtime, string, error)) (Image, error) {
	t, err := newTree(s.tmpDir(), s.cfg.MaxSize)
	if err != nil {
		return Image{}, err
	}
	defer t.Close()
	rt, from, err := fill(t)
	if err != nil {
		return Image{}, err
	}
	if err := t.setUp(src.Setup); err != nil {
		return Image{}, &StepError{Step: "setting up", ExitCode: -1, Err: err}
	}
	if missing := t.missing(src.Require); len(missing) > 0 {
		return Image{}, &StepError{Step: "checking " + from, ExitCode: -1, Err: fmt.Errorf("it lacks %s", strings.Join(missing, ", "))}
	}
	if t.droppedDevices > 0 || t.droppedXattrs > 0 {
		progress(fmt.Sprintf("left out, since gVisor cannot have them: %d device nodes, the extended attributes of %d files",
			t.droppedDevices, t.droppedXattrs))
	}
	start := time.Now()
	progress(fmt.Sprintf("writing an image of %d files", t.nodes))
	img, err := s.write(t)
	if err != nil {
		return Image{}, &StepError{Step: "writing the image", ExitCode: -1, Err: err}
	}
	img.Source, img.Config = from, rt
	took := time.Since(start)
	progress(fmt.Sprintf("wrote %d MB in %.1f s", (img.Size+500_000)/1_000_000, took.Seconds()))
	return img, nil
}

// write makes the tree a file of the store.
func (s *Store) write(t *tree) (Image, error) {
	f, err := os.CreateTemp(s.tmpDir(), "image-")
	if err != nil {
		return Image{}, fmt.Errorf("making file: %w", err)
	}
	defer f.Close()
	defer os.Remove(f.Name()) // fails when it was moved to its place
	hash := sha256.New()
	if err := writeErofs(io.MultiWriter(f, hash), t); err != nil {
		return Image{}, err
	}
	return s.place(f, hex.EncodeToString(hash.Sum(nil)))
}

// place moves a finished file to its name: after a crash it is there whole or
// not at all.
func (s *Store) place(f *os.File, digest string) (Image, error) {
	info, err := f.Stat()
	if err != nil {
		return Image{}, err
	}
	if err := f.Chmod(0o444); err != nil {
		return Image{}, fmt.Errorf("making image read-only: %w", err)
	}
	if err := f.Sync(); err != nil {
		return Image{}, fmt.Errorf("syncing image: %w", err)
	}
	s.touch(digest) // before it can be seen, so that Collect leaves it
	if err := os.Rename(f.Name(), s.file(digest)); err != nil {
		return Image{}, fmt.Errorf("naming image: %w", err)
	}
	if err := syncDir(s.cfg.Dir); err != nil {
		return Image{}, err
	}
	s.trust(digest)
	return Image{Digest: digest, Size: info.Size()}, nil
}

func (s *Store) tmpDir() string            { return filepath.Join(s.cfg.Dir, "tmp") }
func (s *Store) file(digest string) string { return filepath.Join(s.cfg.Dir, digest+suffix) }

// suffix of the names of images.
const suffix = ".erofs"

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
