package image

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/hostfile"
)

// Build makes the image of a source, or finds it if the same inputs were built before. It calls
// progress with lines for people, from one goroutine at a time. Builds run one at a time,
// downloads in parallel; waiting ends with ctx. A step that failed is a *[StepError].
// [Store.Collect] keeps the image for a while (see collectGrace), so that the caller can record
// that it needs the image.
func (s *Store) Build(ctx context.Context, src Source, progress func(string)) (Image, error) {
	img, err := s.build(ctx, src, progress)
	if err == nil && s.remote != nil {
		s.remote.Offer(img.Digest)
	}
	return img, err
}

func (s *Store) build(ctx context.Context, src Source, progress func(string)) (Image, error) {
	if err := src.check(); err != nil {
		return Image{}, err
	}
	in, err := s.open(ctx, src, progress)
	if err != nil {
		return Image{}, err
	}
	defer in.close()
	if in.done {
		return in.found, nil
	}
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return Image{}, context.Cause(ctx)
	}
	if in.key != "" && !src.Fresh { // another build of the same inputs may have finished
		if img, ok := s.known(ctx, in.key, progress); ok {
			return img, nil
		}
	}
	img, moving, err := s.make(ctx, src, in, progress)
	if err == nil && in.key != "" {
		s.remember(in.key, input{Image: img, MadeAt: s.cfg.Now().UTC(), Moving: moving})
	}
	return img, err
}

// limit returns the bound of a source's regular files, in bytes.
func (s *Store) limit(src Source) int64 {
	if src.MaxSize <= 0 || src.MaxSize > s.cfg.MaxSize {
		return s.cfg.MaxSize
	}
	return src.MaxSize
}

// check refuses a source with no origin, or with more than one.
func (src Source) check() error {
	n := 0
	for _, has := range []bool{src.Image != "", src.Layout != nil, src.Archive != ""} {
		if has {
			n++
		}
	}
	if n > 1 {
		return errors.New("source names more than one of an image, a layout and an archive")
	}
	if n == 0 && src.Debian == nil {
		return errors.New("source names neither an OCI image nor Debian packages")
	}
	return nil
}

// opened is a source that was opened: a result that was found, or an OCI image to build from, or
// the reason why there is none.
type opened struct {
	key     string // "" if the result must not be given to others
	found   Image
	done    bool // found is the result
	image   *ociImage
	name    string // the image's name for the record
	pulled  string // the store's layout that the image is in, or ""
	err     error  // why there is no image; Debian packages are used instead
	closers []func()
}

func (in *opened) close() {
	for _, f := range in.closers {
		f()
	}
}

// open opens the parts of a source. A result built from private inputs is found again only by
// callers that have them: the bytes of an archive or of a layout's blobs, or the registry's
// permission to pull.
func (s *Store) open(ctx context.Context, src Source, progress func(string)) (*opened, error) {
	in := &opened{}
	var err error
	if src.Auth == nil && src.Layout == nil && src.Archive == "" {
		if in.key, err = src.key(""); err != nil {
			return nil, err
		}
		if !src.Fresh {
			in.found, in.done = s.known(ctx, in.key, progress)
		}
		if in.done || src.Image == "" {
			return in, nil
		}
	}
	step := "reading the image"
	switch {
	case src.Image != "":
		step = "pulling " + src.Image
		err = s.openImage(ctx, in, src, progress)
	case src.Layout != nil:
		err = s.openLayout(ctx, in, src, *src.Layout)
	default:
		err = s.openArchiveOf(ctx, in, src)
	}
	if err == nil {
		if in.key != "" && (src.Image == "" || src.Auth != nil) {
			in.found, in.done = s.known(ctx, in.key, progress)
		}
		return in, nil
	}
	if ctx.Err() == nil && src.Debian != nil {
		in.err = err
		return in, nil
	}
	in.close()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if as := new(StepError); errors.As(err, &as) {
		return nil, err
	}
	return nil, &StepError{Step: step, ExitCode: -1, Err: err}
}

func (s *Store) openImage(ctx context.Context, in *opened, src Source, progress func(string)) error {
	l, err := s.Pull(ctx, src.Image, src.Auth, progress)
	if err != nil {
		return err
	}
	key := in.key
	if err := s.openLayout(ctx, in, src, l); err != nil {
		return err
	}
	if src.Auth == nil {
		in.key = key // any caller may pull it
	}
	return nil
}

func (s *Store) openLayout(ctx context.Context, in *opened, src Source, l Layout) error {
	in.closers = append(in.closers, s.Hold(l))
	root, err := os.OpenRoot(l.Dir)
	if err != nil {
		return fmt.Errorf("opening layout: %w", err)
	}
	in.closers = append(in.closers, func() { root.Close() })
	if id := filepath.Base(l.Dir); l.Dir == s.layoutPath(id) {
		in.pulled = id
	}
	p, err := openOCI(dirBlobs{root}, l.Manifest, s.limit(src))
	if err != nil {
		if errors.Is(err, errDamaged) && in.pulled != "" {
			s.dropLayout(in.pulled)
		}
		return err
	}
	if in.pulled == "" {
		l.Reference = "" // a caller could claim any reference
		if err := p.verify(ctx); err != nil {
			return err
		}
	}
	l.Manifest = p.manifest
	src.Image, src.Layout = "", &l
	in.image, in.name = p, l.Reference
	if in.name == "" {
		in.name = "oci:" + p.manifest
	}
	in.key, err = src.key("")
	return err
}

func (s *Store) openArchiveOf(ctx context.Context, in *opened, src Source) error {
	b, sum, err := s.openArchive(ctx, src.Archive, src.Within, s.limit(src))
	if err != nil {
		return err
	}
	in.closers = append(in.closers, func() { b.f.Close() })
	if in.image, err = b.image(s.limit(src)); err != nil {
		return err
	}
	in.name = "oci:" + in.image.manifest
	in.key, err = src.key(sum)
	return err
}

// make builds from the first of the source's parts that has the required programs.
func (s *Store) make(ctx context.Context, src Source, in *opened,
	progress func(string)) (img Image, moving bool, err error) {
	if in.image != nil {
		img, err := s.makeOne(ctx, src, progress, func(t *tree) (Runtime, string, error) {
			rt, err := in.image.unpack(ctx, t, progress)
			if err != nil && ctx.Err() == nil {
				if in.pulled != "" && in.image.verify(ctx) != nil && ctx.Err() == nil {
					s.dropLayout(in.pulled)
				}
				err = &StepError{Step: "unpacking " + in.name, ExitCode: -1, Err: err}
			}
			return rt, in.name, err
		})
		if err == nil || ctx.Err() != nil || src.Debian == nil {
			return img, src.moves(), err
		}
		in.err = err
	}
	var from string
	if in.err != nil {
		progress("Debian packages instead: " + short(in.err))
		from = fmt.Sprintf(" (not %s: %s)", cmp.Or(src.Image, in.name, "the image"), short(in.err))
	}
	img, err = s.makeOne(ctx, src, progress, func(t *tree) (Runtime, string, error) {
		return Runtime{}, "debian:" + src.Debian.Suite + from, s.fromDebian(ctx, t, src.Debian, progress)
	})
	return img, true, err
}

// makeOne fills a tree, sets it up, checks it and writes it as an image.
func (s *Store) makeOne(ctx context.Context, src Source, progress func(string),
	fill func(*tree) (Runtime, string, error)) (Image, error) {
	t, err := newTree(s.tmpDir(), s.limit(src))
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
		return Image{}, &StepError{Step: "checking " + from, ExitCode: -1,
			Err: fmt.Errorf("it lacks %s", strings.Join(missing, ", "))}
	}
	if err := t.writeAttributes(); err != nil {
		return Image{}, &StepError{Step: "keeping extended attributes", ExitCode: -1, Err: err}
	}
	if t.droppedDevices > 0 || t.droppedXattrs > 0 {
		progress(fmt.Sprintf("left out, since gVisor does not support them: %d device nodes of /dev, %d extended attributes",
			t.droppedDevices, t.droppedXattrs))
	}
	if src.Made != nil {
		src.Made()
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

// write writes the tree as a file of the store.
func (s *Store) write(t *tree) (Image, error) {
	f, err := os.CreateTemp(s.tmpDir(), "image-")
	if err != nil {
		return Image{}, fmt.Errorf("making file: %w", err)
	}
	defer f.Close()
	defer os.Remove(f.Name()) // fails if the file was renamed
	hash, out := sha256.New(), &sparseFile{f: f}
	if err := writeErofs(tee{hash, out}, t); err != nil {
		return Image{}, err
	}
	if err := out.finish(); err != nil {
		return Image{}, fmt.Errorf("ending image: %w", err)
	}
	return s.place(f, hex.EncodeToString(hash.Sum(nil)))
}

// place renames a finished file to its name. After a crash the file is there whole or not at all.
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
	s.touch(digest) // before the file appears, so that Collect keeps it
	if err := os.Rename(f.Name(), s.file(digest)); err != nil {
		return Image{}, fmt.Errorf("naming image: %w", err)
	}
	if err := hostfile.SyncDir(s.cfg.Dir); err != nil {
		return Image{}, err
	}
	s.trust(digest)
	return Image{Digest: digest, Size: info.Size()}, nil
}

func (s *Store) tmpDir() string            { return filepath.Join(s.cfg.Dir, "tmp") }
func (s *Store) file(digest string) string { return filepath.Join(s.cfg.Dir, digest+suffix) }

// suffix is the suffix of the names of images.
const suffix = ".erofs"
