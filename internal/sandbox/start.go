package sandbox

import (
	"net/url"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// Start is the command that a template's sandboxes begin with. It runs as one of Execute
// would, with the sandbox's environment and working directory, and goes on beside all others. When it ends nothing starts it again. The zero value is none.
type Start struct {
	Command string   // run by /bin/sh -c; or
	Args    []string // run as they are
	Ready   *Ready   // nil: nothing is waited for
	// User is whom it runs as when that is not the sandbox's: "" is the sandbox's. Templates
	// have none: it is given by a create that has the commands after it run as another.
	User string `json:",omitempty"`
}

// Ready is how a start command is seen to be ready, looked at from inside the sandbox.
// Exactly one of Port, Command and HTTP is given.
type Ready struct {
	Port    int           // something listens on this TCP port
	Command string        // ends with exit code 0, run by /bin/sh -c
	HTTP    *ReadyHTTP    // answers
	Timeout time.Duration // from the command's start; 0 is DefaultReadyTimeout
}

// ReadyHTTP is a GET that is answered with a status of 2xx or 3xx.
type ReadyHTTP struct {
	Port int
	Path string // begins with "/", may have a query
}

// Limits of a start command.
const (
	DefaultReadyTimeout = time.Minute
	MinReadyTimeout     = time.Second
	MaxReadyTimeout     = 10 * time.Minute

	// MaxStartBytes is how long a command and all of its arguments may be together, bytes.
	MaxStartBytes = 64 << 10
	// MaxReadyPath is how long the path of a check may be, bytes.
	MaxReadyPath = 2048
)

// None reports whether there is no start command.
func (s Start) None() bool { return s.Command == "" && len(s.Args) == 0 }

// Patience is how long a create waits for the command to be ready at the most.
func (s Start) Patience() time.Duration {
	switch {
	case s.None() || s.Ready == nil:
		return 0
	case s.Ready.Timeout == 0:
		return DefaultReadyTimeout
	}
	return s.Ready.Timeout
}

// Check refuses a start command that no sandbox could run, and a check without one or
// out of its limits: Invalid in field "start_command", or "ready" and what is in it.
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
		return fault.InField("invalid_ready", "ready", "is for a template with a start_command")
	}
	return s.Ready.check()
}

func (r *Ready) check() error {
	wrong := func(field, detail string, args ...any) error {
		return fault.InField("invalid_ready", field, detail, args...)
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
	if _, err := url.ParseRequestURI(r.HTTP.Path); err != nil || r.HTTP.Path[0] != '/' || strings.Contains(r.HTTP.Path, "#") {
		return wrong("ready.http.path", "must be a path that begins with /, as /health")
	}
	return nil
}
