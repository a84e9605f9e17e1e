package agentapi

import (
	"path"
	"strings"

	"github.com/cayhq/cay/internal/fault"
)

// maxPath is Linux's PATH_MAX with its closing NUL, bytes.
const maxPath = 4096

// CheckPath refuses a path that the v1 API does not take anywhere: empty,
// relative, too long, with a NUL or with a ".." element. The error is Invalid in
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

// CheckFilePath is [CheckPath] for what must name a file or directory other
// than the root: uploads and removals. A path that ends in a slash names a
// directory and is refused too.
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
	return fault.InField(CodeInvalidPath, "path", detail, args...)
}
