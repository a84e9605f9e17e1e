package sandbox

import (
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// Start describes the command that a template's sandboxes begin with. It runs as a command of
// Execute does, with the sandbox's environment and working directory, and continues beside all
// others. It is not restarted when it ends. The zero value means no command.
type Start struct {
	Command string   // run by /bin/sh -c; exclusive with Args
	Args    []string // run without a shell
	Ready   *Ready   // nil: a create does not wait
	// User runs the command if it is not the sandbox's user; "" means the sandbox's. Templates do not
	// set it: a create sets it when later commands run as another user.
	User string `json:",omitempty"`
}

// Ready describes the check, from inside the sandbox, that a start command is ready. Exactly one of
// Port, Command and HTTP is set.
type Ready struct {
	Port    int           // ready when a program listens on this TCP port
	Command string        // ready when it ends with exit code 0; run by /bin/sh -c
	HTTP    *ReadyHTTP    // ready when it answers
	Timeout time.Duration // from the command's start; 0 means DefaultReadyTimeout
}

// ReadyHTTP describes a GET that counts as answered with a status of 2xx or 3xx.
type ReadyHTTP struct {
	Port int
	Path string // begins with "/", may have a query
}

// Limits of a start command.
const (
	DefaultReadyTimeout = time.Minute
	MinReadyTimeout     = time.Second
	MaxReadyTimeout     = 10 * time.Minute

	// MaxStartBytes limits the bytes of a command and all of its arguments together.
	MaxStartBytes = 64 << 10
	// MaxReadyPath limits the bytes of the path of a check.
	MaxReadyPath = 2048
)

// Clone returns a copy that shares no list or pointer.
func (s Start) Clone() Start {
	s.Args = slices.Clone(s.Args)
	if s.Ready != nil {
		ready := *s.Ready
		if ready.HTTP != nil {
			ready.HTTP = new(*ready.HTTP)
		}
		s.Ready = &ready
	}
	return s
}

// None reports whether there is no start command.
func (s Start) None() bool { return s.Command == "" && len(s.Args) == 0 }

// Patience returns how long a create waits at most for the command to be ready.
func (s Start) Patience() time.Duration {
	switch {
	case s.None() || s.Ready == nil:
		return 0
	case s.Ready.Timeout == 0:
		return DefaultReadyTimeout
	}
	return s.Ready.Timeout
}

// Check returns an error for a start command that no sandbox could run, for a check without a
// command, and for a check out of its limits. The error is Invalid in field "start_command", or in
// "ready" or a field below it.
func (s Start) Check() error {
	if s.Command != "" && len(s.Args) > 0 {
		return invalid("start_command", "is a command or arguments, not both")
	}
	if len(s.Args) > 0 && s.Args[0] == "" {
		return invalid("start_command", "begins with an empty argument")
	}
	bytes := 0
	for _, text := range append([]string{s.Command}, s.Args...) {
		if strings.Contains(text, "\x00") {
			return invalid("start_command", "contains a NUL")
		}
		bytes += len(text)
	}
	if bytes > MaxStartBytes {
		return invalid("start_command", "is %d bytes; at most %d", bytes, MaxStartBytes)
	}
	if s.Ready == nil {
		return nil
	}
	if s.None() {
		return fault.InvalidField("ready", "is for a template with a start_command")
	}
	return s.Ready.check()
}

func (r *Ready) check() error {
	wrong := func(field, detail string, args ...any) error {
		return fault.InField(fault.CodeInvalidReady, field, detail, args...)
	}
	given := 0
	for _, is := range []bool{r.Port != 0, r.Command != "", r.HTTP != nil} {
		if is {
			given++
		}
	}
	if given != 1 {
		return wrong("ready", "needs one of port, command and http")
	}
	if r.Timeout != 0 && (r.Timeout < MinReadyTimeout || r.Timeout > MaxReadyTimeout) {
		return wrong("ready.timeout", "must be between %s and %s", MinReadyTimeout, MaxReadyTimeout)
	}
	const ports = "must be between 1 and 65535"
	switch {
	case r.Port < 0 || r.Port > 65535:
		return wrong("ready.port", ports)
	case strings.Contains(r.Command, "\x00"):
		return wrong("ready.command", "contains a NUL")
	case len(r.Command) > MaxStartBytes:
		return wrong("ready.command", "is %d bytes; at most %d", len(r.Command), MaxStartBytes)
	case r.HTTP == nil:
		return nil
	case r.HTTP.Port < 1 || r.HTTP.Port > 65535:
		return wrong("ready.http.port", ports)
	case len(r.HTTP.Path) > MaxReadyPath:
		return wrong("ready.http.path", "is %d bytes; at most %d", len(r.HTTP.Path), MaxReadyPath)
	}
	if _, err := url.ParseRequestURI(r.HTTP.Path); err != nil || r.HTTP.Path[0] != '/' ||
		strings.Contains(r.HTTP.Path, "#") {
		return wrong("ready.http.path", "must be a path that begins with /, as /health")
	}
	return nil
}
