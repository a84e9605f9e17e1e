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
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// tree reads the tree of an image of the store. The caller closes it.
func (s *Store) tree(ctx context.Context, digest string) (*tree, error) {
	path, err := s.Path(ctx, digest)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path) // the image may be collected from now on
	if err != nil {
		return nil, fmt.Errorf("opening image: %w", err)
	}
	t, err := readErofs(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("reading image %s: %w", digest, err)
	}
	return t, nil
}

// Export writes an image of the store as an OCI layout with one layer to a directory, which it
// makes or which must be empty. Every name, owner, mode, time, link and extended attribute is
// kept, so that [Store.Build] makes the same image of the layout again. rt becomes the
// configuration. The same image and rt give the same bytes. After an error the directory may hold
// a part of them; the caller removes the directory in any case.
func (s *Store) Export(ctx context.Context, digest string, rt Runtime, dir string) (Layout, error) {
	t, err := s.tree(ctx, digest)
	if err != nil {
		return Layout{}, err
	}
	defer t.Close()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Layout{}, fmt.Errorf("making layout: %w", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		return Layout{}, errors.Join(fmt.Errorf("the directory for the layout holds %d files", len(entries)), err)
	}
	l, err := t.export(ctx, rt, layoutWriter{dir})
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return l, err
}

// export writes the tree as a layout.
func (t *tree) export(ctx context.Context, rt Runtime, w layoutWriter) (Layout, error) {
	if err := w.begin(); err != nil {
		return Layout{}, err
	}
	f, err := os.CreateTemp(w.dir, "layer-")
	if err != nil {
		return Layout{}, fmt.Errorf("making layer: %w", err)
	}
	defer f.Close()
	hash, out := sha256.New(), &sparseFile{f: f}
	if err := t.writeTar(ctx, tee{hash, out}); err != nil {
		return Layout{}, fmt.Errorf("writing layer: %w", err)
	}
	// The layer is not compressed: its reader is on this machine, and decompressing costs more
	// than reading.
	layer := v1.Descriptor{MediaType: types.OCIUncompressedLayer, Size: out.size,
		Digest: v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(hash.Sum(nil))}}
	if err := errors.Join(out.finish(), f.Chmod(0o644), os.Rename(f.Name(), w.file(layer.Digest))); err != nil {
		return Layout{}, fmt.Errorf("ending layer: %w", err)
	}
	config, err := json.Marshal(v1.ConfigFile{OS: platform.OS, Architecture: platform.Architecture,
		RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{layer.Digest}},
		Config: v1.Config{Env: rt.Env, User: rt.User, WorkingDir: rt.Workdir, Entrypoint: rt.Entrypoint, Cmd: rt.Cmd}})
	if err != nil {
		return Layout{}, fmt.Errorf("encoding configuration: %w", err)
	}
	m := &v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: describe(types.OCIConfigJSON, config),
		Layers: []v1.Descriptor{layer}}
	manifest, err := json.Marshal(m)
	if err != nil {
		return Layout{}, fmt.Errorf("encoding manifest: %w", err)
	}
	if err := errors.Join(w.blob(m.Config.Digest, config), w.finish(manifest, m)); err != nil {
		return Layout{}, err
	}
	return Layout{Dir: filepath.Clean(w.dir), Manifest: describe(m.MediaType, manifest).Digest.String()}, nil
}

// describe returns the descriptor of a small blob.
func describe(kind types.MediaType, b []byte) v1.Descriptor {
	sum := sha256.Sum256(b)
	return v1.Descriptor{MediaType: kind, Size: int64(len(b)),
		Digest: v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum[:])}}
}

// writeTar writes the tree as the tar of a layer.
func (t *tree) writeTar(ctx context.Context, out io.Writer) error {
	buffered := bufio.NewWriterSize(out, chunk)
	w := tar.NewWriter(buffered)
	first := map[*inode]string{} // of files with more than one name
	err := t.each(func(n *node) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		h := headerOf(n.inode)
		h.Name = "./" + t.path(n)[1:]
		if n.isDir() && n.parent != nil {
			h.Name += "/"
		}
		if name, ok := first[n.inode]; ok {
			h.Typeflag, h.Linkname, h.Size, h.PAXRecords = tar.TypeLink, name, 0, nil
		} else if n.inode.links > 1 && !n.isDir() {
			first[n.inode] = h.Name
		}
		if err := w.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", t.path(n), err)
		}
		if h.Typeflag != tar.TypeReg || h.Size == 0 {
			return nil
		}
		return copyRange(w, t.spool, n.inode.off, h.Size, t.buf)
	})
	return errors.Join(err, w.Close(), buffered.Flush())
}

// headerOf returns the tar header of a file, without its name.
func headerOf(i *inode) *tar.Header {
	h := &tar.Header{Format: tar.FormatPAX, Mode: int64(i.mode & 0o7777), Uid: int(i.uid), Gid: int(i.gid),
		ModTime: time.Unix(i.mtime, int64(i.mtimeNs))}
	switch i.kind() {
	case typeRegular:
		h.Typeflag, h.Size = tar.TypeReg, i.size
	case typeDir:
		h.Typeflag = tar.TypeDir
	case typeSymlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, i.target
	case typeFIFO:
		h.Typeflag = tar.TypeFifo
	}
	if len(i.xattrs) > 0 {
		h.PAXRecords = map[string]string{}
		for _, x := range i.xattrs {
			h.PAXRecords[schilyXattr+x.name] = x.value
		}
	}
	return h
}
