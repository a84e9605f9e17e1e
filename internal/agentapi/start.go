package agentapi

import (
	"context"
	"net/http"
	"time"
)

// StartRequest is the body of POST /start: a command that goes on beside all others, and
// how it is seen to be ready.
type StartRequest struct {
	Command string   `json:"command,omitempty"` // run by /bin/sh -c; or
	Args    []string `json:"args,omitempty"`    // run as they are
	User    string   `json:"user,omitempty"`    // "" is that of the last init
	Ready   *Ready   `json:"ready,omitempty"`   // nil: nothing is waited for
}

// Ready is looked at from inside until it holds. One of Port, Command and HTTP is given.
type Ready struct {
	Port      int        `json:"port,omitempty"`    // something listens on this TCP port
	Command   string     `json:"command,omitempty"` // ends with exit code 0, run by /bin/sh -c
	HTTP      *ReadyHTTP `json:"http,omitempty"`
	TimeoutMs int64      `json:"timeoutMs"` // from the command's start
}

// ReadyHTTP is a GET that is answered with a status of 2xx or 3xx.
type ReadyHTTP struct {
	Port int    `json:"port"`
	Path string `json:"path"` // begins with "/"
}

// StartLog is the file inside that has the start command's output and how it ended. The
// part before is in the file of the same name and ".1".
const StartLog = "/var/log/cay/start.log"

// Start starts the sandbox's start command, with the environment and working directory of
// the last init, and returns when it is ready, or runs if there is nothing
// to wait for. It may be called once in a sandbox's life. A command that cannot be
// started, ends before it is ready, or is not ready in time is a Conflict, code
// "start_failed", whose text says which, with the last lines of its output; it may still
// run then. When ctx ends nothing more is waited for, and the command goes on.
func (c *Client) Start(ctx context.Context, t Target, r StartRequest) error {
	within := c.Patience
	if r.Ready != nil {
		within += time.Duration(r.Ready.TimeoutMs) * time.Millisecond
	}
	return c.call(ctx, t, within, http.MethodPost, "/start", nil, r, nil)
}
