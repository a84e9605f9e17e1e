package api

import (
	"encoding/base64"
	"fmt"
	"math"
	"net/http"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/trace"
)

// Time limits of a command. They are part of the contract.
const (
	defaultCommandTimeout = 30 * time.Second
	maxCommandTimeout     = 5 * time.Minute
)

// inside runs do with a lease of the sandbox, which it wakes for the use if the sandbox is suspended. It
// releases the lease when do returns. It answers an error of the lease or of do; if do returns nil,
// do has answered.
func (s *server) inside(w http.ResponseWriter, r *http.Request, id SandboxID, use sandbox.Cause,
	do func(agentapi.Target) error) {
	if err := callOf(r).Account.Take(httpserver.InsideCost); err != nil {
		s.fail(w, r, err) // before the sandbox is woken
		return
	}
	lease, err := s.Sandboxes.Connect(r.Context(), callerOf(r), sandbox.ID(id), use)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer lease.Release()
	sbx := lease.Sandbox
	if err := do(agentapi.Target{SandboxID: string(sbx.ID), Run: sbx.Run}); err != nil {
		s.fail(w, r, err)
	}
}

// ExecuteCommand answers POST /v1/sandboxes/{id}/execute.
func (s *server) ExecuteCommand(w http.ResponseWriter, r *http.Request, id SandboxID) {
	var in ExecuteRequest
	if _, err := read(w, r, maxExecuteBody, true, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	detach, all := in.Detach != nil && *in.Detach, in.AllOutput != nil && *in.AllOutput
	request, err := commandOf(in)
	switch {
	case err != nil:
	case detach && !httpserver.WantsEvents(r):
		err = fault.InvalidField("detach",
			"needs Accept: text/event-stream; without following its output start a process instead")
	case all && detach:
		err = fault.InvalidField("all_output", "cannot be given together with detach")
	case all && !httpserver.WantsEvents(r):
		err = fault.InvalidField("all_output", "needs Accept: text/event-stream")
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	if httpserver.WantsEvents(r) {
		s.streamCommand(w, r, id, request, detach)
		return
	}
	s.inside(w, r, id, sandbox.ForCommand, func(t agentapi.Target) error {
		account := &callOf(r).Account
		stdout, stderr := budget.Bytes{Account: account}, budget.Bytes{Account: account}
		end := trace.Start(r.Context(), "agent")
		result, err := s.Agent.Collect(r.Context(), t, request, &stdout, &stderr)
		end()
		trace.Add(r.Context(), "inside", result.Duration)
		if err == nil {
			s.sendResult(w, r, result, &stdout, &stderr)
		}
		return err
	})
}

// commandOf returns the command that a request describes, with its time limit.
func commandOf(in ExecuteRequest) (agentapi.ExecuteRequest, error) {
	p := program{command: in.Command, shell: (*string)(in.Shell), args: in.Args, env: in.Env, user: in.User,
		workdir: in.Workdir, timeout: in.Timeout, usual: defaultCommandTimeout, longest: maxCommandTimeout}
	if in.Detach != nil && *in.Detach {
		p.usual, p.longest = 0, maxProcessTimeout
	}
	maxOutput := int64(0)
	if in.AllOutput != nil && *in.AllOutput {
		p.usual, p.longest, maxOutput = 0, maxProcessTimeout, math.MaxInt64
	}
	out, err := p.request()
	out.MaxOutput = maxOutput
	if in.Stdin != nil {
		out.Stdin = []byte(*in.Stdin)
	}
	return out, err
}

// program holds the fields with which calls say what to run.
type program struct {
	command, shell *string
	args           []string
	env            map[string]string
	user, workdir  *string

	timeout        *string
	usual, longest time.Duration // the timeout if none is given, and the longest
}

// request checks the fields and returns the command.
func (p program) request() (agentapi.ExecuteRequest, error) {
	out := agentapi.ExecuteRequest{Args: p.args, Env: p.env, Timeout: p.usual}
	if p.command != nil {
		if p.args != nil {
			return out, fault.InvalidField("command", "give command or args, not both")
		}
		out.Command = *p.command
	}
	if err := p.readShell(&out); err != nil {
		return out, err
	}
	timeout, err := duration("timeout", p.timeout)
	if err != nil {
		return out, err
	}
	if timeout != nil {
		if *timeout <= 0 || *timeout > p.longest {
			return out, fault.InvalidField("timeout", "must be more than 0 and at most %s", p.longest)
		}
		out.Timeout = *timeout
	}
	if err := sandbox.CheckEnv(p.env); err != nil {
		return out, err
	}
	if p.workdir != nil {
		if len(*p.workdir) == 0 || (*p.workdir)[0] != '/' {
			return out, fault.InvalidField("workdir", "must be an absolute path")
		}
		out.Workdir = *p.workdir
	}
	if p.user != nil {
		if *p.user == "" {
			return out, fault.InvalidField("user", "must be the name or number of a user, not empty")
		}
		out.User = *p.user
	}
	return out, out.Check()
}

// readShell reads the shell that runs the command line.
func (p program) readShell(out *agentapi.ExecuteRequest) error {
	if p.shell == nil {
		return nil
	}
	if p.command == nil {
		return fault.InvalidField("shell", "applies to command only; args are run without a shell")
	}
	switch ExecuteRequestShell(*p.shell) {
	case ExecuteRequestShellSh:
	case ExecuteRequestShellBash:
		out.Shell = "bash" // found on PATH, because images keep it in different places
	default:
		return fault.InvalidField("shell", "must be sh or bash")
	}
	return nil
}

// text returns output in a form that JSON can carry: unchanged if it is UTF-8, else in base64.
func text(b []byte) (s string, encoded bool) {
	if utf8.Valid(b) {
		return string(b), false
	}
	return base64.StdEncoding.EncodeToString(b), true
}

// firstRealtime is SIGRTMIN of Linux. The signals above it have no names of their own.
const firstRealtime = 34

func signalName(n int) string {
	if name := unix.SignalName(syscall.Signal(n)); name != "" {
		return name
	}
	if n > firstRealtime {
		return fmt.Sprintf("SIGRTMIN+%d", n-firstRealtime)
	}
	if n == firstRealtime {
		return "SIGRTMIN"
	}
	return fmt.Sprintf("SIG%d", n)
}
