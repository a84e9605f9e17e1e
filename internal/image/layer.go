package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
)

// Whiteouts of OCI layers (https://github.com/opencontainers/image-spec, layer.md).
const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
	whiteoutMeta   = ".wh..wh." // names that AUFS used itself
)

// apply unpacks a tar over the tree. With whiteouts, its .wh. files remove files of lower layers,
// but none of the same layer, wherever in the archive they are.
func (t *tree) apply(ctx context.Context, r io.Reader, whiteouts bool) error {
	t.layer++
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading tar: %w", err)
		}
		if err := t.entry(h, tr, whiteouts); err != nil {
			return fmt.Errorf("tar entry %.100q: %w", h.Name, err)
		}
	}
}

// entry unpacks one entry of a tar.
func (t *tree) entry(h *tar.Header, r io.Reader, whiteouts bool) error {
	if t.entries++; t.entries > maxEntries {
		return fmt.Errorf("more than %d entries", maxEntries)
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	parts, err := split(h.Name)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		if h.Typeflag != tar.TypeDir {
			return errors.New("the root can only be a directory")
		}
		i, err := t.inodeOf(h)
		if err != nil {
			return err
		}
		t.root.inode = i
		return nil
	}
	name := parts[len(parts)-1]
	if whiteouts && strings.HasPrefix(name, whiteoutPrefix) {
		return t.whiteout(parts[:len(parts)-1], name)
	}
	if h.Typeflag == tar.TypeChar || h.Typeflag == tar.TypeBlock {
		if parts[0] != "dev" {
			return errors.New("a device node outside /dev, where a sandbox has none")
		}
		t.droppedDevices++
		return nil
	}
	dir, err := t.parent(parts)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeLink {
		return t.link(dir, name, h.Linkname)
	}
	i, err := t.inodeOf(h)
	if err != nil {
		return err
	}
	if i.kind() == typeRegular {
		if i.off, err = t.store(r, h.Size); err != nil {
			return err
		}
	}
	_, err = t.put(dir, name, i)
	return err
}

// parent returns the directory of the last of parts, making it if needed.
func (t *tree) parent(parts []string) (*node, error) {
	dir, err := t.walk(parts[:len(parts)-1], true, true)
	if err != nil {
		return nil, err
	}
	if !dir.isDir() {
		return nil, fmt.Errorf("%s is not a directory", t.path(dir))
	}
	return dir, nil
}

// link makes another name for an existing file. It does not follow the target's last element,
// since a symbolic link can have two names too.
func (t *tree) link(dir *node, name, target string) error {
	parts, err := split(target)
	if err != nil {
		return fmt.Errorf("hard link: %w", err)
	}
	old, err := t.walk(parts, false, false)
	if err != nil {
		return fmt.Errorf("hard link to %.100q: %w", target, err)
	}
	if old.isDir() {
		return fmt.Errorf("hard link to %.100q, which is a directory", target)
	}
	if old.parent == dir && old.name == name {
		return nil // a link to itself exists already
	}
	_, err = t.put(dir, name, old.inode)
	return err
}

// whiteout removes what lower layers put under a name, or below a directory.
func (t *tree) whiteout(parent []string, name string) error {
	if name != whiteoutOpaque && strings.HasPrefix(name, whiteoutMeta) {
		return nil
	}
	target := strings.TrimPrefix(name, whiteoutPrefix)
	if name != whiteoutOpaque && (target == "" || target == "." || target == "..") {
		return errors.New("whiteout of nothing")
	}
	dir, err := t.walk(parent, true, false)
	if errors.Is(err, errNotThere) {
		return nil // nothing to remove
	}
	if err != nil {
		return err
	}
	if name == whiteoutOpaque {
		// Iterating over a map takes longer than a look-up.
		if err := t.step(4 * len(dir.children)); err != nil {
			return err
		}
		for _, c := range dir.children {
			if _, err := t.hide(c); err != nil {
				return err
			}
		}
	} else if c, ok := dir.children[target]; ok {
		_, err = t.hide(c)
	}
	return err
}

// inodeOf returns the inode that a header describes, without its bytes.
func (t *tree) inodeOf(h *tar.Header) (*inode, error) {
	i := &inode{mode: uint16(h.Mode & 0o7777), size: h.Size}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		i.mode |= typeRegular
	case tar.TypeDir:
		i.mode |= typeDir
	case tar.TypeSymlink:
		i.mode = typeSymlink | 0o777
		i.target = h.Linkname
		if l := len(h.Linkname); l == 0 || l > maxTarget || strings.IndexByte(h.Linkname, 0) >= 0 {
			return nil, fmt.Errorf("symbolic link with a target of %d bytes, or a NUL in it", l)
		}
	case tar.TypeFifo:
		i.mode |= typeFIFO
	default:
		return nil, fmt.Errorf("entries of type %q are unknown", h.Typeflag)
	}
	if i.kind() != typeRegular {
		i.size = 0
	}
	if h.Uid < 0 || h.Gid < 0 || h.Uid > math.MaxUint32 || h.Gid > math.MaxUint32 {
		return nil, fmt.Errorf("owner %d:%d is outside 0-%d", h.Uid, h.Gid, uint32(math.MaxUint32))
	}
	i.uid, i.gid = uint32(h.Uid), uint32(h.Gid)
	// EROFS cannot hold a time before 1970; use the first one that it can.
	if !h.ModTime.IsZero() && h.ModTime.Unix() > 0 {
		i.mtime, i.mtimeNs = h.ModTime.Unix(), uint32(h.ModTime.Nanosecond())
	}
	return i, t.takeAttributes(i, h)
}
