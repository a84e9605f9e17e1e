package agent

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// AttributesPath is where an image keeps the extended attributes of its files,
// since gVisor's EROFS cannot hold them: a tar whose entries have no content.
const AttributesPath = "/.cay-xattrs"

const (
	// maxAttributes bounds that file, bytes; images are made with less.
	maxAttributes = 16 << 20
	xattrRecord   = "SCHILY.xattr."
)

// SetAttributes gives the files below root the extended attributes, file
// capabilities among them, that the file list names. No list is fine. It must run
// before anything that could have an eye on the files does. Each file is copied to
// the writable layer; after an error some have their attributes and others not.
func SetAttributes(root, list string) error {
	f, err := os.Open(list)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening the list of extended attributes: %w", err)
	}
	defer f.Close()
	r := tar.NewReader(io.LimitReader(f, maxAttributes))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the list of extended attributes: %w", err)
		}
		for record, value := range h.PAXRecords {
			name, ok := strings.CutPrefix(record, xattrRecord)
			if !ok {
				continue
			}
			if err := unix.Lsetxattr(filepath.Join(root, h.Name), name, []byte(value), 0); err != nil {
				return fmt.Errorf("setting the extended attribute %s of %q: %w", name, h.Name, err)
			}
		}
	}
}
