package image

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

// AttributesPath is the file of an image that holds the image's extended attributes, if it has
// any: a tar whose entries have no content, the names of the files, and the attributes as PAX
// records SCHILY.xattr.NAME. gVisor's EROFS cannot hold attributes; the first process inside sets
// them in the writable layer before anything else runs. A file of a layer with this name is
// ignored.
const AttributesPath = "/" + attributesFile

const attributesFile = ".cay-xattrs"

// Bounds of the attributes of one image. Each file with attributes is copied to the writable
// layer at every start, so many or large ones would make every start slow.
const (
	maxAttributed     = 4096
	maxAttributeBytes = 1 << 20   // names and values in all
	maxAttributedSize = 512 << 20 // bytes of the files that have any
	maxValue          = 64 << 10  // bytes, Linux's
)

// xattrRecords are the prefixes of PAX records that are attributes.
const (
	schilyXattr     = "SCHILY.xattr."
	libarchiveXattr = "LIBARCHIVE.xattr." // values in base64, always beside SCHILY's
)

// capability is the attribute that holds a file's capabilities.
const capability = "security.capability"

// validCapability reports whether a kernel accepts a value as capabilities (capability.h:
// vfs_cap_data). A value that it would refuse at a start is refused here.
func validCapability(value string) bool {
	if len(value) < 4 {
		return false
	}
	const effective, second, third = 1, 2 << 24, 3 << 24
	switch form := binary.LittleEndian.Uint32([]byte(value)) &^ effective; len(value) {
	case 20:
		return form == second
	case 24:
		return form == third
	}
	return false
}

// xattr is one extended attribute.
type xattr struct{ name, value string }

// takeAttributes takes the extended attributes from a tar header. It counts and leaves out those
// that gVisor does not support.
func (t *tree) takeAttributes(i *inode, h *tar.Header) error {
	for _, key := range slices.Sorted(maps.Keys(h.PAXRecords)) {
		name, ok := strings.CutPrefix(key, schilyXattr)
		if !ok {
			if name, ok = strings.CutPrefix(key, libarchiveXattr); ok && h.PAXRecords[schilyXattr+name] == "" {
				t.droppedXattrs++
			}
			continue
		}
		kind := i.kind()
		fits := strings.HasPrefix(name, "user.") && name != "user." && (kind == typeRegular || kind == typeDir) ||
			name == capability && kind == typeRegular
		if !fits {
			t.droppedXattrs++
			continue
		}
		value := h.PAXRecords[key]
		if name == capability && !validCapability(value) {
			return fmt.Errorf("its file capabilities are not of the kernel's second or third form: %x",
				value[:min(len(value), 32)])
		}
		if len(name) > maxName || len(value) > maxValue || strings.IndexByte(name, 0) >= 0 {
			return fmt.Errorf(
				"extended attribute %.60q with a name of %d bytes and a value of %d; at most %d and %d are allowed", name,
				len(name), len(value), maxName, maxValue)
		}
		if t.text += int64(len(name) + len(value)); t.text > maxText {
			return fmt.Errorf("names, links and attributes of more than %d bytes", maxText)
		}
		i.xattrs = append(i.xattrs, xattr{name, value})
	}
	return nil
}

// writeAttributes puts the file of attributes into the tree, if there are any. Call it last,
// before the tree is written.
func (t *tree) writeAttributes() error {
	if others, ok := t.root.children[attributesFile]; ok {
		t.drop(others) // a file from a layer would be trusted
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	files, size, bulk := 0, 0, int64(0)
	err := t.each(func(n *node) error {
		if len(n.inode.xattrs) == 0 {
			return nil
		}
		files++
		bulk += n.inode.size
		h := &tar.Header{Typeflag: tar.TypeReg, Name: t.path(n)[1:], Format: tar.FormatPAX, ModTime: time.Unix(0, 0),
			PAXRecords: map[string]string{}}
		if h.Name == "" {
			h.Name = "./"
		}
		if n.isDir() {
			h.Typeflag = tar.TypeDir
		}
		for _, x := range n.inode.xattrs {
			size += len(x.name) + len(x.value)
			h.PAXRecords[schilyXattr+x.name] = x.value
		}
		if files > maxAttributed || size > maxAttributeBytes || bulk > maxAttributedSize {
			return fmt.Errorf(
				"too many extended attributes: %d files of %d bytes with %d bytes of them; at most %d, %d and %d are allowed",
				files, bulk,
				size, maxAttributed, maxAttributedSize, maxAttributeBytes)
		}
		return w.WriteHeader(h)
	})
	if err != nil || files == 0 {
		return err
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("encoding extended attributes: %w", err)
	}
	// The file shows nothing that stat and getfattr do not, and only root may read it.
	return t.writeFile(File{Path: AttributesPath, Mode: 0o400, Content: b.String()})
}

// readAttributes reads the attributes from their file, as writeAttributes wrote it, and removes
// the file from the tree.
func (t *tree) readAttributes() error {
	parts, err := split(AttributesPath)
	if err != nil {
		return err
	}
	n, err := t.walk(parts, false, false)
	if errors.Is(err, errNotThere) {
		return nil
	}
	if err != nil {
		return err
	}
	b, err := t.read(n.inode, 8*maxAttributeBytes)
	if err != nil {
		return err
	}
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("reading extended attributes: %w", err)
		}
		parts, err := split(h.Name)
		if err != nil {
			return err
		}
		to, err := t.walk(parts, false, false)
		if err != nil {
			return fmt.Errorf("extended attributes of %.100q: %w", h.Name, err)
		}
		if len(to.inode.xattrs) == 0 { // otherwise it is another name of a file that has them
			if err := t.takeAttributes(to.inode, h); err != nil {
				return err
			}
		}
	}
	t.drop(n)
	return nil
}

// each calls a function for every node, a directory before its content, in the order of names.
func (t *tree) each(do func(*node) error) error {
	var walk func(*node) error
	walk = func(n *node) error {
		if err := do(n); err != nil {
			return err
		}
		for _, c := range n.sorted() {
			if err := walk(c); err != nil {
				return err
			}
		}
		return nil
	}
	return walk(t.root)
}
