package image

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// maxParts bounds the files of an archive that holds an image.
const maxParts = 16 << 10

// tarBlobs is an image in a tar: where in the file each part lies.
type tarBlobs struct {
	f  *os.File
	at map[string]section
}

type section struct{ off, size int64 }

func (t *tarBlobs) open(name string) (io.ReadCloser, int64, error) {
	at, ok := t.at[name]
	if !ok {
		return nil, 0, fmt.Errorf("the archive has no %.200q: %w", name, fs.ErrNotExist)
	}
	return io.NopCloser(io.NewSectionReader(t.f, at.off, at.size)), at.size, nil
}

// openArchive opens the tar of an image, or what is within it, and returns the SHA-256
// of the tar's bytes and of where in it the image is. A packed one is unpacked to a file that has no name. Close
// the file.
func (s *Store) openArchive(ctx context.Context, name, within string, maxSize int64) (*tarBlobs, string, error) {
	f, err := openRegular(name)
	if err != nil {
		return nil, "", err
	}
	hash := sha256.New()
	_, err = io.CopyBuffer(hash, contextReader{ctx, f}, make([]byte, chunk))
	if err != nil {
		f.Close()
		return nil, "", fmt.Errorf("reading archive: %w", err)
	}
	t, err := s.listArchive(ctx, f, maxSize)
	if err != nil {
		return nil, "", err
	}
	if within = path.Clean("/" + within)[1:]; within != "" {
		fmt.Fprintf(hash, "\n%s", within)
		if t, err = s.within(ctx, t, within, maxSize); err != nil {
			return nil, "", err
		}
	}
	return t, hex.EncodeToString(hash.Sum(nil)), nil
}

// listArchive takes the file of a tar, plain or packed.
func (s *Store) listArchive(ctx context.Context, f *os.File, maxSize int64) (*tarBlobs, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		f.Close()
		return nil, fmt.Errorf("reading archive: %w", err)
	}
	plain, err := s.plainFile(ctx, f, maxSize)
	if plain != f {
		f.Close()
	}
	if err != nil {
		return nil, err
	}
	t := &tarBlobs{f: plain, at: map[string]section{}}
	if err := t.list(ctx); err != nil {
		plain.Close()
		return nil, fmt.Errorf("reading archive: %w", err)
	}
	return t, nil
}

// within takes a tar and gives what it has at a path: a tar that is a file of it, or
// a directory as if it were all there is.
func (s *Store) within(ctx context.Context, t *tarBlobs, at string, maxSize int64) (*tarBlobs, error) {
	if file, ok := t.at[at]; ok {
		defer t.f.Close()
		inner, err := os.CreateTemp(s.tmpDir(), "archive-")
		if err != nil {
			return nil, fmt.Errorf("taking %s out of the archive: %w", at, err)
		}
		_, err = io.CopyBuffer(struct{ io.Writer }{inner}, contextReader{ctx, io.NewSectionReader(t.f, file.off, file.size)}, make([]byte, chunk))
		if err := errors.Join(err, os.Remove(inner.Name())); err != nil {
			inner.Close()
			return nil, fmt.Errorf("taking %s out of the archive: %w", at, err)
		}
		return s.listArchive(ctx, inner, maxSize)
	}
	below := map[string]section{}
	for name, where := range t.at {
		if rest, ok := strings.CutPrefix(name, at+"/"); ok {
			below[rest] = where
		}
	}
	if len(below) == 0 {
		t.f.Close()
		return nil, fmt.Errorf("the archive has no %.200q", at)
	}
	return &tarBlobs{f: t.f, at: below}, nil
}

// openRegular opens a file that must be one.
func openRegular(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("opening archive: %w", err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("the archive is not a regular file")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// plainFile gives back f, or a file of what is packed in it.
func (s *Store) plainFile(ctx context.Context, f *os.File, maxSize int64) (*os.File, error) {
	in := &counted{Reader: contextReader{ctx, f}}
	r, done, err := decompress(in)
	if err != nil {
		return nil, err
	}
	defer done()
	if _, plain := r.(*bufio.Reader); plain {
		_, err := f.Seek(0, io.SeekStart)
		return f, err
	}
	t, err := newTree(s.tmpDir(), maxSize) // its spool is such a file, its bounds are those wanted
	if err != nil {
		return nil, err
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{t.out}, t.metered(r, in), t.buf)
	if err := errors.Join(err, t.settle()); err != nil {
		t.Close()
		return nil, fmt.Errorf("unpacking archive: %w", err)
	}
	_, err = t.spool.Seek(0, io.SeekStart)
	return t.spool, err
}

// list notes where the files of the archive lie. Links are followed once: that is
// how docker save names a layer that is there already.
func (t *tarBlobs) list(ctx context.Context) error {
	// The reader seeks over what it skips and reads headers by whole blocks, so
	// that the file stands where the content begins.
	tr := tar.NewReader(t.f)
	links := map[string]string{}
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if len(t.at)+len(links) >= maxParts {
			return fmt.Errorf("more than %d files", maxParts)
		}
		name := path.Clean("/" + h.Name)[1:]
		switch h.Typeflag {
		case tar.TypeReg:
			if h.PAXRecords["GNU.sparse.major"] != "" || h.PAXRecords["GNU.sparse.map"] != "" {
				return fmt.Errorf("entry %.100q is sparse, which parts of an image are not", h.Name)
			}
			off, err := t.f.Seek(0, io.SeekCurrent)
			if err != nil {
				return err
			}
			t.at[name] = section{off, h.Size}
		case tar.TypeSymlink:
			links[name] = path.Join(path.Dir("/"+name), h.Linkname)[1:]
		case tar.TypeLink:
			links[name] = path.Clean("/" + h.Linkname)[1:]
		}
	}
	for name, target := range links {
		if at, ok := t.at[target]; ok {
			t.at[name] = at
		}
	}
	return nil
}

// image finds the image of the archive: as an OCI layout, or as docker save
// writes it.
func (t *tarBlobs) image(maxSize int64) (*ociImage, error) {
	if _, ok := t.at["index.json"]; ok {
		return openOCI(t, "", maxSize)
	}
	b, err := readAll(t, "manifest.json", -1, maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errors.New("the archive has neither index.json (an OCI layout) nor manifest.json (docker save)")
	}
	if err != nil {
		return nil, err
	}
	var images []struct {
		Config string
		Layers []string
	}
	if err := json.Unmarshal(b, &images); err != nil {
		return nil, fmt.Errorf("reading manifest.json: %w", err)
	}
	if len(images) != 1 {
		return nil, fmt.Errorf("the archive has %d images; save one", len(images))
	}
	img := images[0]
	if len(img.Layers) > maxLayers {
		return nil, fmt.Errorf("%d layers; %d are the most", len(img.Layers), maxLayers)
	}
	raw, err := readAll(t, path.Clean(img.Config), -1, maxConfig)
	if err != nil {
		return nil, fmt.Errorf("reading its configuration: %w", err)
	}
	c, err := parseConfig(raw, len(img.Layers))
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(raw)
	p := &ociImage{from: t, manifest: "sha256:" + hex.EncodeToString(sum[:]), config: c}
	for n, name := range img.Layers {
		p.layers = append(p.layers, ociLayer{path.Clean(name), v1.Descriptor{}, c.RootFS.DiffIDs[n]})
	}
	return p, nil
}
