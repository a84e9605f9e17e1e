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
	"io"
	"net/http"

	"connectrpc.com/connect"

	"github.com/cayhq/cay/internal/agent/account"
	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agent/file"
	"github.com/cayhq/cay/internal/agent/proc"
	"github.com/cayhq/cay/internal/agentapi"
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

	settings  *account.Settings
	processes *proc.Processes
	files     *file.Files
	tunnels   *tunnels
}

// New returns the agent of this sandbox and starts to reap children. A process can
// have only one agent, and nothing else in it may wait for children.
func New(cfg Config) (*Agent, error) {
	if cfg.MaxProcesses == 0 {
		cfg.MaxProcesses = DefaultMaxProcesses
	}
	a := &Agent{connections: &connections{patience: strangerTime}, settings: &account.Settings{}, tunnels: &tunnels{}}
	accounts := account.NewUsers("/etc/passwd", "/etc/group")
	var err error
	if a.processes, err = proc.New(a.settings, accounts, cmp.Or(cfg.MountPoint, "/sys"), cfg.MaxProcesses); err != nil {
		return nil, err
	}
	a.files = file.New(a.settings, accounts)
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
	mux.HandleFunc("GET /envs", func(w http.ResponseWriter, _ *http.Request) {
		env, _ := a.settings.CommandDefaults()
		answer.JSON(w, http.StatusOK, env)
	})
	mux.HandleFunc("GET /tunnel", a.tunnels.serve)
	opts := []connect.HandlerOption{connect.WithReadMaxBytes(maxMessage)}
	a.processes.Routes(mux, opts)
	a.files.Routes(mux, opts)
	return cors(a.authorise(a.guarded(mux)))
}

// guarded wakes the guard at every request, since any request may start processes.
func (a *Agent) guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.processes.Wake()
		next.ServeHTTP(w, r)
	})
}

// authorise passes requests for the agent's health and requests on the host's connections. It
// passes all requests until the host has given a key: before that, nothing else runs inside.
func (a *Agent) authorise(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/health" && !a.connections.allowed(connOf(r)) {
			answer.Error(w, &answer.Problem{Status: http.StatusUnauthorized, Text: "the agent serves only its host"})
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

// init answers POST /init: it applies the host's settings. Absent fields keep their values.
func (a *Agent) init(w http.ResponseWriter, r *http.Request) {
	const maxInit = 1 << 20 // bytes; an environment has at most 128 KiB
	var req agentapi.InitRequest
	body := http.MaxBytesReader(w, r.Body, maxInit)
	if err := json.NewDecoder(body).Decode(&req); err != nil && !errors.Is(err, io.EOF) {
		answer.Error(w, answer.Bad("init: %s", err))
		return
	}
	if err := a.settings.Apply(req); err != nil {
		answer.Error(w, err)
		return
	}
	if err := tellSystem(req); err != nil {
		answer.Error(w, err)
		return
	}
	if req.AccessToken != "" {
		a.connections.rekey(req.AccessToken, connOf(r))
	}
	w.WriteHeader(http.StatusNoContent)
}
