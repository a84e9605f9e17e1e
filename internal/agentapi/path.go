package agentapi

import (
	"path"
	"strings"

	"github.com/cayhq/cay/internal/fault"
)

// maxPath is Linux's PATH_MAX, in bytes with the closing NUL. Longer paths would fail inside.
const maxPath = 4096

// CheckPath refuses a path that no call of the v1 API takes: an empty, relative or
// too long one, or one with a NUL or with a ".." element. The error is Invalid in
// field "path", code "invalid_path".
func CheckPath(p string) error {
	switch {
	case p == "":
		return badPath("is empty")
	case p[0] != '/':
		return badPath("must be absolute")
	case len(p) >= maxPath:
		return badPath("is longer than %d bytes", maxPath-1)
	case strings.IndexByte(p, 0) >= 0:
		return badPath("contains a NUL")
	}
	for element := range strings.SplitSeq(p, "/") {
		if element == ".." {
			return badPath("contains a .. element")
		}
	}
	return nil
}

// CheckFilePath refuses the paths that [CheckPath] refuses, the root, and a path
// that ends in a slash, which names a directory.
func CheckFilePath(p string) error {
	if err := CheckPath(p); err != nil {
		return err
	}
	if path.Clean(p) == "/" {
		return badPath("is the root directory")
	}
	if strings.HasSuffix(p, "/") || strings.HasSuffix(p, "/.") {
		return badPath("names a directory")
	}
	return nil
}

func badPath(detail string, args ...any) error {
	return fault.InvalidField("path", detail, args...)
}
