// Package agent implements PID 1 of a sandbox. It starts commands, tracks and kills
// their descendants, reads and writes files, and reaps orphaned processes. It speaks
// the protocol of package agentapi. Calls that E2B's envd also has behave as in envd,
// so that E2B's clients work unmodified.
//
// It owns the sandbox's processes and, through the control groups of gVisor's
// kernel, their limit. The host owns the sandbox's lifetime, network and disk.
// The agent runs as root and acts for the user that a call names. Only the host may call:
// each of its connections begins with a proof that it knows the key that it gave at init.
//
// Everything is safe for concurrent use. The agent survives every error: a full
// disk, a lack of processes or a flood of output ends one call, never PID 1.
package agent

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"strings"
	"sync"

	"connectrpc.com/connect"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/agentapi/filesystem"
	"github.com/cayhq/cay/internal/agentapi/process"
	"github.com/cayhq/cay/internal/fault"
)

// DefaultMaxProcesses limits the processes and threads that the commands of a
// sandbox have at once, unless Config sets another limit. Each costs the
// sandbox's kernel some 30 KB of the sandbox's memory.
const DefaultMaxProcesses = 1024

// Config configures an Agent.
type Config struct {
	// MountPoint names the directory on which New mounts control groups for a moment; "" means /sys.
	MountPoint   string
	MaxProcesses int // 0 means DefaultMaxProcesses
}

// Agent runs commands and serves files inside one sandbox.
type Agent struct {
	connections *connections

	settings  *settings
	users     *users
	processes *processes
	files     *files
	watchers  *watchers
	memory    *memory
	starter   *starter
	tunnels   *tunnels
	keeper    *keeper
}

// New returns the agent of this sandbox and starts to reap children. A process can
// have only one agent, and nothing else in it may wait for children.
func New(cfg Config) (*Agent, error) {
	if cfg.MaxProcesses == 0 {
		cfg.MaxProcesses = DefaultMaxProcesses
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, fmt.Errorf("opening the input of commands that have none: %w", err)
	}
	g, err := openGroups(cmp.Or(cfg.MountPoint, "/sys"), cfg.MaxProcesses)
	if err != nil {
		return nil, err
	}
	r := newReaper()
	s := newSpawner(g, r)
	go r.run()
	a := &Agent{
		connections: &connections{patience: strangerTime}, settings: &settings{},
		users: &users{passwd: "/etc/passwd", group: "/etc/group"},
	}
	a.processes = &processes{settings: a.settings, users: a.users, spawner: s, null: null, commands: map[int]*command{}}
	a.processes.guard = newGuard(a.processes, g)
	go a.processes.guard.run()
	a.files = &files{settings: a.settings, users: a.users, maxEntries: agentapi.MaxEntries}
	a.watchers = &watchers{}
	a.tunnels = &tunnels{}
	a.memory = newMemory(a.processes)
	a.starter = &starter{processes: a.processes, logPath: agentapi.StartLog}
	a.keeper = &keeper{processes: a.processes}
	return a, nil
}

// maxMessage limits a Connect message, in bytes. A command's standard input comes
// in one message; a larger one is refused.
const maxMessage = 64 << 20

// Handler returns the handler of all the agent's calls.
func (a *Agent) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("POST /init", a.init)
	mux.HandleFunc("POST /start", a.starter.start)
	a.keeper.routes(mux)
	mux.HandleFunc("GET /envs", func(w http.ResponseWriter, _ *http.Request) {
		env, _ := a.settings.commandDefaults()
		writeJSON(w, http.StatusOK, env)
	})
	mux.HandleFunc("GET /metrics", a.memory.metrics)
	mux.HandleFunc("POST /memory/relieve", a.memory.relieve)
	mux.HandleFunc("GET /busy", func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, agentapi.BusyReply{Busy: a.processes.spawner.groups.busy()})
	})
	mux.HandleFunc("GET /tunnel", a.tunnels.serve)
	mux.HandleFunc("GET /files", a.files.get)
	mux.HandleFunc("HEAD /files", a.files.get)
	mux.HandleFunc("POST /files", a.files.post)
	mux.HandleFunc("PUT /files", a.files.put)
	mux.HandleFunc("DELETE /files", a.files.remove)
	mux.HandleFunc("GET /files/list", a.files.list)
	mux.HandleFunc("GET /files/stat", a.files.stat)
	mux.HandleFunc("POST /files/mkdir", a.files.mkdir)
	mux.HandleFunc("POST /files/rename", a.files.rename)
	mux.HandleFunc("GET /files/tar", a.files.getTar)
	mux.HandleFunc("PUT /files/tar", a.files.putTar)
	mux.HandleFunc("POST /files/compose", a.files.compose)
	opts := []connect.HandlerOption{connect.WithReadMaxBytes(maxMessage)}
	path, calls := process.NewProcessHandler(a.processes, opts...)
	mux.Handle(path, gathering(calls))
	mux.Handle(filesystem.NewFilesystemHandler(&filesystemService{files: a.files, watchers: a.watchers}, opts...))
	return cors(a.authorise(a.guarded(mux)))
}

// guarded wakes the guard at every request, since any request may start processes.
func (a *Agent) guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.processes.guard.wake()
		next.ServeHTTP(w, r)
	})
}

// authorise passes requests for the agent's health and requests on the host's connections. It
// passes all requests until the host has given a key: before that, nothing else runs inside.
func (a *Agent) authorise(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/health" && !a.connections.allowed(connOf(r)) {
			httpError(w, &problem{status: http.StatusUnauthorized, text: "the agent serves only its host"})
			return
		}
		next.ServeHTTP(w, r)
	})
}

// cors allows browsers to call from any page. The host checks who may call.
func cors(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Origin") != "" {
			h := w.Header()
			h.Set("Access-Control-Allow-Origin", "*")
			h.Set("Access-Control-Expose-Headers", "*")
			if r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != "" {
				h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
				h.Set("Access-Control-Allow-Headers", allowedHeaders(r))
				h.Set("Access-Control-Max-Age", "7200")
				w.WriteHeader(http.StatusNoContent)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// allowedHeaders returns the headers that the browser asks for: "*" does not cover Authorization.
func allowedHeaders(r *http.Request) string {
	if asked := r.Header.Get("Access-Control-Request-Headers"); asked != "" {
		return asked
	}
	return "*"
}

// settings holds the host's settings for the sandbox.
type settings struct {
	mu      sync.RWMutex
	env     map[string]string // replaced, never changed
	user    string
	workdir string
}

func (s *settings) defaultUser() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.user
}

// commandDefaults returns the sandbox's environment, which the caller must not change, and
// its working directory.
func (s *settings) commandDefaults() (env map[string]string, workdir string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.env, s.workdir
}

// init answers POST /init: it applies the host's settings. Absent fields keep their values.
func (a *Agent) init(w http.ResponseWriter, r *http.Request) {
	const maxInit = 1 << 20 // bytes; an environment has at most 128 KiB
	var req agentapi.InitRequest
	body := http.MaxBytesReader(w, r.Body, maxInit)
	if err := json.NewDecoder(body).Decode(&req); err != nil && !errors.Is(err, io.EOF) {
		httpError(w, badRequest("init: %s", err))
		return
	}
	if err := a.settings.apply(req); err != nil {
		httpError(w, err)
		return
	}
	if err := tellSystem(req); err != nil {
		httpError(w, err)
		return
	}
	if req.AccessToken != "" {
		a.connections.rekey(req.AccessToken, connOf(r))
	}
	w.WriteHeader(http.StatusNoContent)
}

func (s *settings) apply(req agentapi.InitRequest) error {
	for name := range req.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") {
			return newProblem(fault.CodeInvalidEnv, "%q is not a name of an environment variable", name)
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
