package agent

import (
	"path"
	"strings"

	"github.com/cayhq/cay/internal/fault"
)

// resolvePath returns a client's path, absolute and clean. "~", "~/x" and relative
// paths are below home; an empty path is home itself.
func resolvePath(p, home string) (string, error) {
	if strings.IndexByte(p, 0) >= 0 {
		return "", newProblem(fault.CodeInvalidPath, "path contains a NUL")
	}
	switch {
	case p == "" || p == "~":
		return path.Clean(home), nil
	case strings.HasPrefix(p, "~/"):
		return path.Join(home, p[2:]), nil
	case p[0] == '/':
		return path.Clean(p), nil
	case p[0] == '~':
		return "", newProblem(fault.CodeInvalidPath, "path %q: only the user's own home can be written with ~", p)
	}
	return path.Join(home, p), nil
}
