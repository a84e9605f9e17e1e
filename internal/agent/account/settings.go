package account

import (
	"maps"
	"strings"
	"sync"

	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

// Settings holds the host's settings for the sandbox.
type Settings struct {
	mu sync.RWMutex
	// +checklocks:mu
	env map[string]string // replaced, never changed
	// +checklocks:mu
	user string
	// +checklocks:mu
	workdir string
}

// DefaultUser returns the name of the user of calls that name none; "" means root.
func (s *Settings) DefaultUser() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.user
}

// CommandDefaults returns the sandbox's environment, which the caller must not change, and
// its working directory.
func (s *Settings) CommandDefaults() (env map[string]string, workdir string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.env, s.workdir
}

// Apply takes the host's settings. Absent fields keep their values.
func (s *Settings) Apply(req agentapi.InitRequest) error {
	for name := range req.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") {
			return answer.New(fault.CodeInvalidEnv, "%q is not a name of an environment variable", name)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if req.Env != nil {
		s.env = maps.Clone(req.Env)
	}
	if req.DefaultUser != "" {
		s.user = req.DefaultUser
	}
	if req.DefaultWorkdir != "" {
		s.workdir = req.DefaultWorkdir
	}
	return nil
}
