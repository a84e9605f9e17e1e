package agentapi

import (
	"context"
	"net/http"
	"time"
)

// StartRequest is the body of POST /start: a command that runs beside all others, and the
// condition under which it is ready.
type StartRequest struct {
	Command string   `json:"command,omitempty"` // run by /bin/sh -c; excludes Args
	Args    []string `json:"args,omitempty"`    // program and arguments, run without a shell
	User    string   `json:"user,omitempty"`    // "" is the user of the last init
	Ready   *Ready   `json:"ready,omitempty"`   // nil: the command is ready once it runs
}

// Ready is a condition that the agent checks until it holds. One of Port, Command and HTTP is set.
type Ready struct {
	Port      int        `json:"port,omitempty"`    // a program listens on this TCP port
	Command   string     `json:"command,omitempty"` // ends with exit code 0, run by /bin/sh -c
	HTTP      *ReadyHTTP `json:"http,omitempty"`
	TimeoutMs int64      `json:"timeoutMs"` // from the command's start
}

// ReadyHTTP is a condition that holds when a GET is answered with a status of 2xx or 3xx.
type ReadyHTTP struct {
	Port int    `json:"port"`
	Path string `json:"path"` // begins with "/"
}

// StartLog is the file in a sandbox with the output of its start command and a note of the
// command's end. Earlier output is in the file with ".1" after its name.
const StartLog = "/var/log/cay/start.log"

// Start starts the sandbox's start command, with the environment and working directory of
// the last init, and returns when the command is ready, or once it runs if r has no
// condition. It may be called once for an instance. A command that cannot be started, ends
// before it is ready, or is not ready in time is a Conflict, code "start_failed"; the text
// says which of these happened and has the last lines of the output. The command may still
// run after that error. When ctx ends, Start returns and the command goes on.
func (c *Client) Start(ctx context.Context, t Target, r StartRequest) error {
	within := c.Patience
	if r.Ready != nil {
		within += time.Duration(r.Ready.TimeoutMs) * time.Millisecond
	}
	return c.call(ctx, t, within, http.MethodPost, "/start", nil, r, nil)
}
