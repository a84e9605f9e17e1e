package agent

import (
	"path"
	"strings"

	"github.com/cayhq/cay/internal/agentapi"
)

// resolvePath makes a client's path absolute: "~" and "~/x" are below home, so
// is a relative one; an empty one is home itself. The result is clean.
func resolvePath(p, home string) (string, error) {
	if strings.IndexByte(p, 0) >= 0 {
		return "", newProblem(agentapi.CodeInvalidPath, "path contains a NUL")
	}
	switch {
	case p == "" || p == "~":
		return path.Clean(home), nil
	case strings.HasPrefix(p, "~/"):
		return path.Join(home, p[2:]), nil
	case p[0] == '/':
		return path.Clean(p), nil
	case p[0] == '~':
		return "", newProblem(agentapi.CodeInvalidPath, "path %q: only the user's own home can be written with ~", p)
	}
	return path.Join(home, p), nil
}
