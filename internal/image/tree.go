package image

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
)

// Bounds of a tree. A hostile image must reach them before the machine runs out of memory or
// time. A node costs about 400 bytes and its name.
const (
	maxNodes   = 2 << 20
	maxText    = 256 << 20 // bytes of names, link targets and attributes in all
	maxEntries = 4 * maxNodes
	maxSteps   = 64 << 20 // steps from node to node, some seconds; an honest image of a million files needs a tenth
	maxName    = 255      // bytes, EROFS's and Linux's
	maxTarget  = 4095     // bytes of a symbolic link, Linux's
	maxDepth   = 1024     // directories
	maxFollows = 40       // symbolic links in one path, Linux's
)

// File types as in st_mode.
const (
	typeMask    = 0o170000
	typeFIFO    = 0o010000
	typeDir     = 0o040000
	typeRegular = 0o100000
	typeSymlink = 0o120000
)

// inode is a file without its name; hard links share one.
type inode struct {
	mode     uint16 // type and permissions, setuid and the like included
	uid, gid uint32
	mtime    int64 // seconds since 1970
	mtimeNs  uint32
	links    uint32
	target   string // of a symbolic link
	xattrs   []xattr
	off      int64 // offset of a regular file's bytes in the spool
	size     int64 // of a regular file, bytes

	// These are set by the writer. nid 0 belongs to the root, and to inodes that have no place
	// yet.
	placed bool
	nid    uint64
	plan   layout
}

func (i *inode) kind() uint16 { return i.mode & typeMask }

// node is a name in a directory.
type node struct {
	name     string
	parent   *node // nil for the root
	inode    *inode
	children map[string]*node // of a directory
	layer    int              // the last layer that wrote this name
	depth    int              // of the root: 0
}

func (n *node) isDir() bool { return n.inode.kind() == typeDir }

// sorted returns the children by name, bytewise, as EROFS needs them.
func (n *node) sorted() []*node {
	names := slices.Sorted(maps.Keys(n.children))
	out := make([]*node, len(names))
	for i, name := range names {
		out[i] = n.children[name]
	}
	return out
}

// tree is a file system in the making. Names and owners are in memory, the bytes of files in a
// spool on disk. It is not safe for concurrent use.
type tree struct {
	root  *node
	nodes int
	layer int

	spool   *os.File // unlinked, so that closing it frees the disk
	out     *sparseFile
	buf     []byte // for copying
	maxSize int64

	// These are counted against the bounds, with covered layers.
	text, entries, steps, streamed int64

	droppedDevices int
	droppedXattrs  int // attributes that gVisor does not support
}

// newTree returns an empty tree whose spool is in dir. Close it.
func newTree(dir string, maxSize int64) (*tree, error) {
	f, err := os.CreateTemp(dir, "spool-")
	if err != nil {
		return nil, fmt.Errorf("making spool: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, fmt.Errorf("unlinking spool: %w", err)
	}
	root := &node{inode: &inode{mode: typeDir | 0o755}, children: map[string]*node{}}
	return &tree{root: root, nodes: 1, spool: f, out: &sparseFile{f: f}, buf: make([]byte, chunk), maxSize: maxSize}, nil
}

// Close closes the spool and frees its space.
func (t *tree) Close() error { return t.spool.Close() }

// split splits a name of a tar. It ignores leading "/" and "./", and refuses "..", which no
// honest archive has.
func split(name string) ([]string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return nil, fmt.Errorf("name %q holds a NUL byte", name)
	}
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "" || part == ".":
		case part == "..":
			return nil, fmt.Errorf("name %q holds a .. element", name)
		case len(part) > maxName:
			return nil, fmt.Errorf("name %.40q… has an element of %d bytes; file systems allow at most %d", name, len(part),
				maxName)
		default:
			parts = append(parts, part)
		}
	}
	return parts, nil
}

// errNotThere reports that a path does not exist in the tree.
var errNotThere = errors.New("no such file in the image")

// walk returns the node of a path. It follows symbolic links in all elements but the last one,
// and with follow there too. Links cannot lead out of the tree: its root is the root of absolute
// ones and its own parent. With mkdir it makes missing directories, also at the target of a
// dangling link.
func (t *tree) walk(parts []string, follow, mkdir bool) (*node, error) {
	at := t.root
	follows := 0
	for len(parts) > 0 {
		if err := t.step(1); err != nil {
			return nil, err
		}
		part := parts[0]
		parts = parts[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			if at.parent != nil {
				at = at.parent
			}
			continue
		}
		if !at.isDir() {
			return nil, fmt.Errorf("%s is not a directory", t.path(at))
		}
		next, ok := at.children[part]
		if !ok {
			if !mkdir {
				return nil, errNotThere
			}
			// The target of a dangling link may be longer than any name, or hold a NUL.
			if len(part) > maxName || strings.IndexByte(part, 0) >= 0 {
				return nil, fmt.Errorf("the link to %.40q… cannot be followed: no file can have that name", part)
			}
			var err error
			if next, err = t.put(at, part, &inode{mode: typeDir | 0o755}); err != nil {
				return nil, err
			}
		}
		if next.inode.kind() == typeSymlink && (follow || len(parts) > 0) {
			if follows++; follows > maxFollows {
				return nil, fmt.Errorf("too many symbolic links at %s", t.path(next))
			}
			if strings.HasPrefix(next.inode.target, "/") {
				at = t.root
			}
			parts = slices.Concat(strings.Split(next.inode.target, "/"), parts)
			if err := t.step(len(parts)); err != nil { // the work of splitting the target
				return nil, err
			}
			continue
		}
		at = next
	}
	return at, nil
}

// step counts the work that an archive causes, so that a small one cannot cause much.
func (t *tree) step(n int) error {
	if t.steps += int64(n); t.steps > maxSteps {
		return fmt.Errorf("its links and whiteouts lead to more than %d steps", maxSteps)
	}
	return nil
}

// lookup returns the node of a path, following symbolic links everywhere.
func (t *tree) lookup(path string) (*node, error) {
	parts, err := split(path)
	if err != nil {
		return nil, err
	}
	return t.walk(parts, true, false)
}

// path returns the node's absolute path, for people.
func (t *tree) path(n *node) string {
	if n.parent == nil {
		return "/"
	}
	var parts []string
	for ; n.parent != nil; n = n.parent {
		parts = append(parts, n.name)
	}
	slices.Reverse(parts)
	return "/" + strings.Join(parts, "/")
}

// put adds a child to a directory, in the present layer. It replaces an existing child; only a
// directory replaced by a directory keeps its children.
func (t *tree) put(dir *node, name string, i *inode) (*node, error) {
	if old, ok := dir.children[name]; ok {
		if old.isDir() && i.kind() == typeDir {
			old.inode = i
			old.layer = t.layer
			i.links = 1
			return old, nil
		}
		t.drop(old)
	}
	if t.nodes >= maxNodes {
		return nil, fmt.Errorf("more than %d files", maxNodes)
	}
	if t.text += int64(len(name) + len(i.target)); t.text > maxText {
		return nil, fmt.Errorf("names and links of more than %d bytes", maxText)
	}
	if dir.depth >= maxDepth {
		return nil, fmt.Errorf("more than %d directories deep", maxDepth)
	}
	n := &node{name: name, parent: dir, inode: i, layer: t.layer, depth: dir.depth + 1}
	if i.kind() == typeDir {
		n.children = map[string]*node{}
	}
	dir.children[name] = n
	i.links++
	t.nodes++
	return n, nil
}

// drop removes a node and all below it.
func (t *tree) drop(n *node) {
	for _, c := range n.children {
		t.drop(c)
	}
	delete(n.parent.children, n.name)
	n.inode.links--
	t.nodes--
}

// hide removes what lower layers put at and below n, and reports whether anything of the present
// layer remains there.
func (t *tree) hide(n *node) (remains bool, err error) {
	if err := t.step(1); err != nil {
		return true, err
	}
	for _, c := range n.children {
		left, err := t.hide(c)
		if err != nil {
			return true, err
		}
		remains = remains || left
	}
	if n.layer == t.layer || remains {
		return true, nil
	}
	t.drop(n)
	return false, nil
}

// store copies the bytes of a regular file to the spool.
func (t *tree) store(r io.Reader, size int64) (off int64, err error) {
	if size < 0 || size > t.maxSize-t.out.size {
		return 0, fmt.Errorf("the files of the image are larger than %d bytes", t.maxSize)
	}
	off = t.out.size
	n, err := io.CopyBuffer(struct{ io.Writer }{t.out}, io.LimitReader(r, size), t.buf)
	if err != nil {
		return 0, fmt.Errorf("spooling: %w", err)
	}
	if n != size {
		return 0, fmt.Errorf("spooling: %w", io.ErrUnexpectedEOF)
	}
	return off, nil
}

// settle extends the spool to the length of its content, so that it can be read.
func (t *tree) settle() error {
	if t.out == nil {
		return nil // the tree of a finished image
	}
	if err := t.out.finish(); err != nil {
		return fmt.Errorf("ending spool: %w", err)
	}
	return nil
}

// read returns a regular file's bytes, at most limit.
func (t *tree) read(i *inode, limit int64) ([]byte, error) {
	if i.kind() != typeRegular {
		return nil, errors.New("not a regular file")
	}
	if i.size > limit {
		return nil, fmt.Errorf("has %d bytes; at most %d are allowed", i.size, limit)
	}
	if err := t.settle(); err != nil {
		return nil, err
	}
	b := make([]byte, i.size)
	if _, err := t.spool.ReadAt(b, i.off); err != nil {
		return nil, fmt.Errorf("reading spool: %w", err)
	}
	return b, nil
}
