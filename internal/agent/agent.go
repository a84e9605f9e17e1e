// Package agent is what runs as PID 1 inside a sandbox: it starts the commands,
// knows and kills what descends from them, reads and writes files, and reaps what
// nobody else waits for. It speaks the protocol of the agentapi room and
// behaves as E2B's envd where that speaks, so that E2B's clients work unmodified.
//
// It owns the sandbox's processes and, through the control groups of gVisor's
// kernel, their limit. It does not own the sandbox's life, network or disk: the
// host does. It runs as root and acts for whatever user a call names. The host alone may call:
// each of its connections begins with a proof that it knows the key that it gave at init.
//
// Everything is safe for concurrent use. The agent goes on after every error:
// a full disk, no more processes, a flood of output end a call, never PID 1.
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
)

// DefaultMaxProcesses is how many processes and threads the commands of a
// sandbox may have at once when nothing else is said. Each costs the sandbox's
// kernel some 30 KB of the sandbox's memory.
const DefaultMaxProcesses = 1024

// Config is what an Agent is made with.
type Config struct {
	// MountPoint is a directory to mount control groups on for a moment, "" is /sys.
	MountPoint   string
	MaxProcesses int // 0 is DefaultMaxProcesses
}

// Agent is the inside of one sandbox.
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

// New makes the agent of this sandbox and starts to reap children; there can be
// only one in a process, and nothing else there may wait for children.
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
	a.files = &files{settings: a.settings, users: a.users}
	a.watchers = &watchers{}
	a.tunnels = &tunnels{}
	a.memory = newMemory(a.processes)
	a.starter = &starter{processes: a.processes, logPath: agentapi.StartLog}
	a.keeper = &keeper{processes: a.processes}
	return a, nil
}

// maxMessage is the largest Connect message taken, bytes: a command's standard
// input comes in one.
const maxMessage = 64 << 20

// Handler serves the whole wire.
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

// guarded makes the guard look soon: whatever is asked may set something going.
func (a *Agent) guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.processes.guard.wake()
		next.ServeHTTP(w, r)
	})
}

// authorise lets requests through that came on a connection of the host's, and those for the
// health. Before the host has given a key nothing else runs inside, and all may pass.
func (a *Agent) authorise(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/health" && !a.connections.allowed(connOf(r)) {
			httpError(w, &problem{status: http.StatusUnauthorized, text: "the agent serves its host alone"})
			return
		}
		next.ServeHTTP(w, r)
	})
}

// cors lets browsers call from any page; what protects is outside.
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

// allowedHeaders repeats what the browser asks for: "*" does not cover Authorization.
func allowedHeaders(r *http.Request) string {
	if asked := r.Header.Get("Access-Control-Request-Headers"); asked != "" {
		return asked
	}
	return "*"
}

// settings is what the host told the agent about its sandbox.
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

// commandDefaults are the environment (not to be changed) and working directory
// of commands that bring none.
func (s *settings) commandDefaults() (env map[string]string, workdir string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.env, s.workdir
}

// init takes what the host says about the sandbox. Fields that are absent stay.
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
			return newProblem(agentapi.CodeInvalidEnv, "%q is no name of an environment variable", name)
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
