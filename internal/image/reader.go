package image

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
)

// errNotOurs reports that a file is not an image as this package writes them.
var errNotOurs = errors.New("not an image of cay's")

// readErofs reads the tree of an image that [writeErofs] wrote. It does not copy the bytes of
// files: the image is the tree's spool, and is closed with it. The extended attributes are those
// of the files again.
func readErofs(f *os.File) (*tree, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	var sb [superSize]byte
	if _, err := f.ReadAt(sb[:], superOffset); err != nil {
		return nil, fmt.Errorf("%w: reading its superblock: %w", errNotOurs, err)
	}
	le := binary.LittleEndian
	if le.Uint32(sb[0:]) != erofsMagic || sb[12] != 12 || le.Uint32(sb[80:]) != 0 {
		return nil, fmt.Errorf("%w: magic %x, block size 1<<%d, features %x", errNotOurs, sb[0:4], sb[12], sb[80:84])
	}
	r := &erofsReader{f: f, size: info.Size(), meta: int64(le.Uint32(sb[40:])) * blockSize, seen: map[uint64]*inode{}}
	root, err := r.inode(uint64(le.Uint16(sb[14:])))
	if err != nil {
		return nil, err
	}
	if root.kind() != typeDir {
		return nil, fmt.Errorf("%w: its root is not a directory", errNotOurs)
	}
	r.t = &tree{root: &node{inode: root, children: map[string]*node{}}, nodes: 1, spool: f, buf: make([]byte, chunk),
		maxSize: info.Size()}
	if err := r.dir(r.t.root); err != nil {
		return nil, err
	}
	return r.t, r.t.readAttributes()
}

type erofsReader struct {
	f    *os.File
	size int64
	meta int64 // offset of the inodes
	t    *tree
	seen map[uint64]*inode // by number
}

// inode reads an inode, with the target of a link but not the bytes of a file.
func (r *erofsReader) inode(nid uint64) (*inode, error) {
	if i, ok := r.seen[nid]; ok {
		if i.kind() == typeDir {
			return nil, fmt.Errorf("%w: a directory with two names", errNotOurs)
		}
		return i, nil
	}
	var b [inodeSize]byte
	if nid > uint64(r.size)/slotSize {
		return nil, fmt.Errorf("%w: inode %d lies beyond its end", errNotOurs, nid)
	}
	at := r.meta + int64(nid)*slotSize
	if _, err := r.f.ReadAt(b[:], at); err != nil {
		return nil, fmt.Errorf("%w: reading inode %d: %w", errNotOurs, nid, err)
	}
	le := binary.LittleEndian
	format := le.Uint16(b[0:])
	i := &inode{mode: le.Uint16(b[4:]), uid: le.Uint32(b[24:]), gid: le.Uint32(b[28:]), size: int64(le.Uint64(b[8:])),
		mtime: int64(le.Uint64(b[32:])), mtimeNs: le.Uint32(b[40:]), nid: nid, off: int64(le.Uint32(b[16:])) * blockSize}
	i.plan = layout{format: format >> 1, offset: at + inodeSize}
	if format&1 == 0 || le.Uint16(b[2:]) != 0 || i.plan.format != layoutPlain && i.plan.format != layoutInline {
		return nil, fmt.Errorf("%w: inode %d has the format %#x", errNotOurs, nid, format)
	}
	inline := int64(0)
	if i.plan.format == layoutInline {
		inline = i.size % blockSize
	}
	if i.size < 0 || i.size > inline && (i.off > r.size || i.size-inline > r.size-i.off) ||
		inline > 0 && i.kind() == typeRegular {
		return nil, fmt.Errorf("%w: inode %d has its %d bytes outside", errNotOurs, nid, i.size)
	}
	i.plan.inline = inline
	switch i.kind() {
	case typeRegular, typeDir, typeFIFO:
	case typeSymlink:
		target, err := r.bytes(i, maxTarget)
		if err != nil {
			return nil, err
		}
		i.target, i.size = string(target), 0
	default:
		return nil, fmt.Errorf("%w: inode %d has the mode %o", errNotOurs, nid, i.mode)
	}
	r.seen[nid] = i
	return i, nil
}

// bytes reads the content of a directory or a link.
func (r *erofsReader) bytes(i *inode, limit int64) ([]byte, error) {
	if i.size > limit {
		return nil, fmt.Errorf("%w: inode %d holds %d bytes; at most %d are allowed", errNotOurs, i.nid, i.size, limit)
	}
	b := make([]byte, i.size)
	whole := i.size - i.plan.inline
	if _, err := r.f.ReadAt(b[:whole], i.off); err != nil && whole > 0 {
		return nil, fmt.Errorf("reading inode %d: %w", i.nid, err)
	}
	if _, err := r.f.ReadAt(b[whole:], i.plan.offset); err != nil && i.plan.inline > 0 {
		return nil, fmt.Errorf("reading inode %d: %w", i.nid, err)
	}
	return b, nil
}

// dir reads a directory and those below it.
func (r *erofsReader) dir(n *node) error {
	b, err := r.bytes(n.inode, int64(maxNodes)*(direntSize+maxName))
	if err != nil {
		return err
	}
	n.inode.size = 0
	for len(b) > 0 {
		block := b[:min(blockSize, len(b))]
		b = b[len(block):]
		if err := r.dirents(n, block); err != nil {
			return err
		}
	}
	return nil
}

// dirents reads one block of a directory.
func (r *erofsReader) dirents(n *node, b []byte) error {
	bad := func() error { return fmt.Errorf("%w: %s holds entries that make no sense", errNotOurs, r.t.path(n)) }
	le := binary.LittleEndian
	if len(b) < direntSize {
		return bad()
	}
	count := int(le.Uint16(b[8:])) / direntSize // names begin after the entries
	if count == 0 || count*direntSize > len(b) {
		return bad()
	}
	for k := range count {
		d := b[k*direntSize:]
		from, to := int(le.Uint16(d[8:])), len(b)
		if k < count-1 {
			to = int(le.Uint16(d[direntSize+8:]))
		}
		if from < count*direntSize || from >= to || to > len(b) {
			return bad()
		}
		name := b[from:to]
		for k == count-1 && len(name) > 0 && name[len(name)-1] == 0 { // padding
			name = name[:len(name)-1]
		}
		if s := string(name); s == "." || s == ".." {
			continue
		} else if parts, err := split(s); err != nil || len(parts) != 1 || parts[0] != s || n.children[s] != nil {
			return bad()
		}
		i, err := r.inode(le.Uint64(d[0:]))
		if err != nil {
			return err
		}
		child, err := r.t.put(n, string(name), i)
		if err != nil {
			return err
		}
		if child.isDir() {
			if err := r.dir(child); err != nil {
				return err
			}
		}
	}
	return nil
}
