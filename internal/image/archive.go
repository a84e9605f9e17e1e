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

// maxParts bounds the number of files in an archive that holds an image.
const maxParts = 16 << 10

// tarBlobs is an image in a tar, with the place of each file in it.
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

// openArchive opens the tar of an image, or what it has at within. It returns the SHA-256 of the
// tar's bytes and of within. It unpacks a compressed tar to a file without a name. The caller
// closes the file.
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

// listArchive opens a tar, plain or compressed. It takes over the file.
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

// within returns what a tar has at a path: a tar that is a file of it, or a directory as if it
// were the whole tar. It takes over t.
func (s *Store) within(ctx context.Context, t *tarBlobs, at string, maxSize int64) (*tarBlobs, error) {
	if file, ok := t.at[at]; ok {
		defer t.f.Close()
		inner, err := os.CreateTemp(s.tmpDir(), "archive-")
		if err != nil {
			return nil, fmt.Errorf("taking %s out of the archive: %w", at, err)
		}
		_, err = io.CopyBuffer(struct{ io.Writer }{inner}, contextReader{ctx, io.NewSectionReader(t.f, file.off, file.size)},
			make([]byte, chunk))
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

// openRegular opens a file, which must be a regular one.
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

// plainFile returns f, or a file with the decompressed content of f.
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
	t, err := newTree(s.tmpDir(), maxSize) // a tree's spool is such a file, with the same bounds
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

// list records the places of the archive's files. It follows links once, since docker save uses
// them for a repeated layer.
func (t *tarBlobs) list(ctx context.Context) error {
	// The reader seeks over what it skips and reads headers by whole blocks, so the file's offset
	// is at the beginning of the content.
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
				return fmt.Errorf("entry %.100q is sparse, which a part of an image must not be", h.Name)
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

// image returns the image of the archive, an OCI layout or the output of docker save.
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
		return nil, fmt.Errorf("%d layers; at most %d are allowed", len(img.Layers), maxLayers)
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
