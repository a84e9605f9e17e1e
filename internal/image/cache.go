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
	"runtime"
	"strings"
	"time"
)

// recipe is the version of the way in which images are made from a source. A new number makes
// every image anew.
const recipe = 2

// inputsDir is the directory with the result for each key of inputs.
const inputsDir = "inputs"

// maxInput bounds such a file, in bytes. Most of it is the environment of an image.
const maxInput = 1 << 20

// maxInputs bounds the inputs in the shared cache, in bytes: tens of thousands of usual ones.
const maxInputs = 64 << 20

// input is the result for one set of inputs.
type input struct {
	Image  Image     `json:"image"`
	MadeAt time.Time `json:"made_at"`
	Moving bool      `json:"moving"` // may change by itself
}

// key returns the key of the inputs of a build. archive is the SHA-256 of the source's archive.
func (src Source) key(archive string) (string, error) {
	b, err := json.Marshal(struct {
		Recipe  int    `json:"recipe"`
		Arch    string `json:"arch"`
		Source  Source `json:"source"`
		Archive string `json:"archive,omitempty"`
	}{recipe, runtime.GOARCH, src, archive})
	if err != nil {
		return "", fmt.Errorf("encoding source: %w", err)
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}

// known returns the earlier result for the same inputs, here or in the shared cache, and verifies
// the image.
func (s *Store) known(ctx context.Context, key string, progress func(string)) (Image, bool) {
	if in, ok := s.recall(s.cfg.Dir, key); ok {
		_, err := s.Path(ctx, in.Image.Digest)
		if err == nil {
			progress("using the result of an earlier build with the same inputs")
			return in.Image, true
		}
		if !errors.Is(err, ErrMissing) {
			s.log.Warn("cannot use image of earlier build", "digest", in.Image.Digest, "error", err)
		}
	}
	if s.cfg.CacheDir == "" {
		return Image{}, false
	}
	in, ok := s.recall(s.cfg.CacheDir, key)
	if !ok {
		return Image{}, false
	}
	if err := s.fetch(ctx, in.Image.Digest); err != nil {
		if !errors.Is(err, fs.ErrNotExist) { // trimCache may have removed it
			s.log.Warn("cannot use cached image", "digest", in.Image.Digest, "error", err)
		}
		return Image{}, false
	}
	if err := writeInput(s.cfg.Dir, key, in); err != nil {
		s.log.Warn("cannot record the inputs of an image", "error", err)
	}
	progress("found in the cache")
	return in.Image, true
}

// recall reads the result for a key, unless it is too old.
func (s *Store) recall(dir, key string) (input, bool) {
	f, err := os.Open(filepath.Join(dir, inputsDir, key+".json"))
	if err != nil {
		return input{}, false
	}
	defer f.Close()
	var in input
	if err := json.NewDecoder(io.LimitReader(f, maxInput)).Decode(&in); err != nil || !isDigest(in.Image.Digest) {
		return input{}, false
	}
	age := s.cfg.Now().Sub(in.MadeAt)
	if in.Moving && (age < 0 || age >= s.cfg.MovingFor) {
		return input{}, false
	}
	return in, true
}

// remember records the result for a key, here and in the shared cache. An error only costs a
// later build.
func (s *Store) remember(key string, in input) {
	if err := writeInput(s.cfg.Dir, key, in); err != nil {
		s.log.Warn("cannot record the inputs of an image", "error", err)
	}
	if s.cfg.CacheDir == "" {
		return
	}
	err := s.offer(in.Image.Digest)
	if err == nil {
		err = writeInput(s.cfg.CacheDir, key, in)
	}
	if err != nil {
		s.log.Warn("cannot put image into the cache", "cache", s.cfg.CacheDir, "error", err)
	}
	if err := s.trimCache(); err != nil {
		s.log.Warn("cannot remove unused images from the cache", "cache", s.cfg.CacheDir, "error", err)
	}
}

// trimCache removes images from the shared cache, the longest unused first, until they fit its budget, and inputs
// until they fit maxInputs. It leaves all other files, since the operator names the directory. Other processes may do
// the same at the same time.
func (s *Store) trimCache() error {
	images, err := files(s.cfg.CacheDir, suffix)
	if err != nil {
		return err
	}
	var errs []error
	remove := func(dir string) func(string) bool {
		return func(name string) bool {
			err := os.Remove(filepath.Join(dir, name))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
				return false
			}
			return true
		}
	}
	trim(images, s.cfg.CacheBudget, remove(s.cfg.CacheDir))
	dir := filepath.Join(s.cfg.CacheDir, inputsDir)
	inputs, err := files(dir, ".json")
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	trim(inputs, maxInputs, remove(dir))
	return errors.Join(errs...)
}

// files lists the regular files of a shared directory that are named by a hash and the suffix, or that a process left
// when it ended in [share].
func files(dir, suffix string) ([]stored, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var all []stored
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() { // an error: it was removed meanwhile
			continue
		}
		hash, named := strings.CutSuffix(e.Name(), suffix)
		if named && isDigest(hash) || isPartial(e.Name()) && time.Since(info.ModTime()) > partialAge {
			all = append(all, stored{e.Name(), info.Size(), info.ModTime()})
		}
	}
	return all, nil
}

// partial begins the names of files that are not whole yet.
const partial = ".new-"

// partialAge is the time without a write after which such a file is left over. With a shorter one a process on a slow
// disk loses the file that it writes.
const partialAge = time.Hour

// isPartial reports whether [share] gave a file its name.
func isPartial(name string) bool {
	random, ok := strings.CutPrefix(name, partial)
	return ok && random != "" && strings.Trim(random, "0123456789") == ""
}

func writeInput(dir, key string, in input) error {
	b, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("encoding: %w", err)
	}
	dir = filepath.Join(dir, inputsDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("making directory: %w", err)
	}
	return share(filepath.Join(dir, key+".json"), 0o644, func(f *os.File) error {
		_, err := f.Write(append(b, '\n'))
		return err
	})
}

// share puts a file in place, whole, that several processes may write at the same time.
func share(path string, perm fs.FileMode, fill func(*os.File) error) error {
	f, err := os.CreateTemp(filepath.Dir(path), partial)
	if err != nil {
		return fmt.Errorf("making file: %w", err)
	}
	defer os.Remove(f.Name()) // fails if the file was renamed
	if err := errors.Join(fill(f), f.Chmod(perm), f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("writing file: %w", err)
	}
	return os.Rename(f.Name(), path)
}

// fetch copies an image from the shared cache and checks it.
func (s *Store) fetch(ctx context.Context, digest string) error {
	in, err := os.Open(filepath.Join(s.cfg.CacheDir, digest+suffix))
	if err != nil {
		return fmt.Errorf("opening cached image: %w", err)
	}
	defer in.Close()
	f, err := os.CreateTemp(s.tmpDir(), "image-")
	if err != nil {
		return fmt.Errorf("making file: %w", err)
	}
	defer f.Close()
	defer os.Remove(f.Name()) // fails if the file was renamed
	// Copy instead of making a hard link: the digest says nothing about a file that others can
	// write to. The copy is hashed on its way, so it costs little more.
	hash, out := sha256.New(), &sparseFile{f: f}
	_, err = io.CopyBuffer(struct{ io.Writer }{tee{hash, out}}, contextReader{ctx, in}, make([]byte, chunk))
	if err := errors.Join(err, out.finish()); err != nil {
		return fmt.Errorf("copying cached image: %w", err)
	}
	if got := hex.EncodeToString(hash.Sum(nil)); got != digest {
		// The next build puts a good one there.
		return errors.Join(fmt.Errorf("%w: cached file has the digest %s", ErrCorrupt, got), os.Remove(in.Name()))
	}
	now := time.Now()
	_ = os.Chtimes(in.Name(), now, now) // for trimCache; another user's file keeps its time
	_, err = s.place(f, digest)
	return err
}

// offer copies an image to the shared cache.
func (s *Store) offer(digest string) error {
	to := filepath.Join(s.cfg.CacheDir, digest+suffix)
	if _, err := os.Stat(to); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(s.cfg.CacheDir, 0o755); err != nil {
		return fmt.Errorf("making cache: %w", err)
	}
	in, err := os.Open(s.file(digest))
	if err != nil {
		return fmt.Errorf("opening image: %w", err)
	}
	defer in.Close()
	return share(to, 0o444, func(f *os.File) error { return copyFile(f, in) })
}

// contextReader is a reader that fails when its context ends.
type contextReader struct {
	ctx context.Context
	io.Reader
}

func (r contextReader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.Reader.Read(p)
}
