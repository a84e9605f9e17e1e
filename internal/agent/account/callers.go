package account

import (
	"errors"
	"net/http"
	"path"
	"strings"

	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/fault"
)

// OfCall returns the user that a call acts as: the name in its Authorization header, else the
// fallback, else the sandbox's default.
func OfCall(users *Users, settings *Settings, h http.Header, fallback string) (*User, error) {
	name, _, _ := (&http.Request{Header: h}).BasicAuth()
	for _, spec := range []string{name, fallback, settings.DefaultUser()} {
		if spec != "" {
			return Known(users, spec)
		}
	}
	return Known(users, "root")
}

// Known looks a user up and returns the error that clients expect.
func Known(users *Users, spec string) (*User, error) {
	u, err := users.Lookup(spec)
	if errors.Is(err, answer.ErrUnknownUser) {
		return nil, answer.New(fault.CodeUnknownUser, "%s", err)
	}
	return u, err
}

// ResolvePath returns a client's path, absolute and clean. "~", "~/x" and relative
// paths are below home; an empty path is home itself.
func ResolvePath(p, home string) (string, error) {
	if strings.IndexByte(p, 0) >= 0 {
		return "", answer.New(fault.CodeInvalidPath, "path contains a NUL")
	}
	switch {
	case p == "" || p == "~":
		return path.Clean(home), nil
	case strings.HasPrefix(p, "~/"):
		return path.Join(home, p[2:]), nil
	case p[0] == '/':
		return path.Clean(p), nil
	case p[0] == '~':
		return "", answer.New(fault.CodeInvalidPath, "path %q: only the user's own home can be written with ~", p)
	}
	return path.Join(home, p), nil
}
