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

// AttributesPath names the file in which an image keeps the extended attributes of its
// files, since gVisor's EROFS cannot hold them. It is a tar whose entries have no content.
const AttributesPath = "/.cay-xattrs"

const (
	// maxAttributes limits the file at AttributesPath, in bytes. Images are made with less;
	// the agent refuses to start with a longer one.
	maxAttributes = 16 << 20
	xattrRecord   = "SCHILY.xattr."
)

// SetAttributes sets the extended attributes, file capabilities among them, that the
// file list names on the files below root. It does nothing if list does not exist. Call
// it before anything runs that could use the files. It copies each file to the writable
// layer. After an error some files have their attributes and others do not.
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
