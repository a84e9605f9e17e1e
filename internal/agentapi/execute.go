package agentapi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/cayhq/cay/internal/agentapi/process"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
)

// DefaultMaxOutput limits the kept output of each stream of a command, in bytes,
// when the call sets no limit.
const DefaultMaxOutput = 8 << 20

// Exit codes of commands that did not exit by themselves.
const (
	ExitTimedOut = 124 // as timeout(1)
	exitSignal   = 128 // plus the signal's number, as in the shell
)

// MaxArgument limits an argument of a program, and a NAME=value of its environment, bytes: Linux's
// limit without the closing NUL. With a higher one the program's start would fail instead.
const MaxArgument = 128<<10 - 1

// ExecuteRequest describes a command to run to its end.
type ExecuteRequest struct {
	Command string   // run by Shell -c; excludes Args
	Shell   string   // "" is /bin/sh
	Args    []string // program, looked up in the PATH of Env, and arguments, run without a shell
	Env     map[string]string
	Workdir string        // "" is the sandbox's, else the user's home
	User    string        // "" is the sandbox's default
	Stdin   []byte        // followed by end of file
	Timeout time.Duration // 0 is none
	// MaxOutput limits the bytes of each stream that are kept; 0 is DefaultMaxOutput.
	MaxOutput int64
}

// ExecuteResult holds the end and the output of a command.
type ExecuteResult struct {
	// ExitCode is the command's own, ExitTimedOut, or 128 and the signal.
	ExitCode                         int
	Stdout, Stderr                   []byte
	StdoutTruncated, StderrTruncated bool
	Duration                         time.Duration // inside the sandbox
	TimedOut                         bool
	// OOMKilled reports whether some process of the command was killed to relieve
	// the sandbox's memory.
	OOMKilled bool
	Signal    int // the signal that ended the command; 0 if it exited
}

// Check refuses a request that no sandbox could run: neither or both of Command
// and Args, an empty program name, a NUL anywhere, an environment name that is
// empty or has a "=". Errors are Invalid and name the field.
func (r ExecuteRequest) Check() error {
	switch {
	case r.Command == "" && len(r.Args) == 0:
		return fault.InField(fault.CodeMissingCommand, "command", "give command or args")
	case r.Command != "" && len(r.Args) > 0:
		return fault.InvalidField("command", "give command or args, not both")
	case len(r.Args) > 0 && r.Args[0] == "":
		return fault.InvalidField("args[0]", "is empty")
	case strings.Contains(r.Command, "\x00"):
		return fault.InvalidField("command", "contains a NUL")
	case strings.Contains(r.Workdir, "\x00"):
		return fault.InvalidField("workdir", "contains a NUL")
	case r.Timeout < 0:
		return fault.InvalidField("timeout", "is negative")
	}
	if len(r.Command) > MaxArgument {
		return fault.InvalidField("command", "has %d bytes, and may have %d: write it into a file",
			len(r.Command), MaxArgument)
	}
	for i, a := range r.Args {
		switch {
		case strings.Contains(a, "\x00"):
			return fault.InvalidField(fmt.Sprintf("args[%d]", i), "contains a NUL")
		case len(a) > MaxArgument:
			return fault.InvalidField(fmt.Sprintf("args[%d]", i), "has %d bytes, and may have %d",
				len(a), MaxArgument)
		}
	}
	for name, value := range r.Env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			return fault.InvalidField("env", "%q is no name of an environment variable, or its value contains a NUL", name)
		}
	}
	return nil
}

// Argv returns the program to run and its arguments.
func (r ExecuteRequest) Argv() []string {
	if r.Command == "" {
		return r.Args
	}
	return []string{cmp.Or(r.Shell, "/bin/sh"), "-c", r.Command}
}

// Detached returns the process that runs the command without a call that owns it.
func (r ExecuteRequest) Detached() StartProcess {
	return StartProcess{Args: r.Argv(), Env: r.Env, Workdir: r.Workdir, User: r.User, Input: r.Stdin,
		TimeoutMs: r.Timeout.Milliseconds()}
}

// Execute runs a command, which must have passed [ExecuteRequest.Check], to its end in a single HTTP
// request. When its Timeout
// is over, or ctx ends, the command is killed with all its descendants; in the
// first case Execute returns its result with TimedOut set. Processes that a
// finished command left in the background live on; the output that they write
// after the command's end is lost.
func (c *Client) Execute(ctx context.Context, t Target, r ExecuteRequest) (ExecuteResult, error) {
	var stdout, stderr budget.Bytes
	res, err := c.Collect(ctx, t, r, &stdout, &stderr)
	if err == nil {
		res.Stdout, res.Stderr = stdout.Bytes(), stderr.Bytes()
	}
	return res, err
}

// Collect is like [Client.Execute], but keeps the output in stdout and stderr and returns a result without
// output. When their account refuses more, Collect kills the command and returns the account's error. After
// an error stdout and stderr hold nothing.
func (c *Client) Collect(ctx context.Context, t Target, r ExecuteRequest, stdout, stderr *budget.Bytes) (
	ExecuteResult, error) {
	if r.MaxOutput <= 0 {
		r.MaxOutput = DefaultMaxOutput
	}
	out, errs := counted{left: r.MaxOutput}, counted{left: r.MaxOutput}
	end, err := c.execute(ctx, t, r.message(true), func(event *process.ProcessEvent) error {
		if err := stdout.Keep(out.take(event.GetData().GetStdout())); err != nil {
			return err
		}
		return stderr.Keep(errs.take(event.GetData().GetStderr()))
	})
	if err != nil {
		stdout.Drop()
		stderr.Drop()
		return ExecuteResult{}, err
	}
	return result(end, out.cut, errs.cut), nil
}

// execute runs a command, calls on with each of its events but the last, and returns the last,
// its end. When on fails, execute kills the command and returns that error.
func (c *Client) execute(ctx context.Context, t Target, r *process.StartRequest,
	on func(*process.ProcessEvent) error) (*process.EndEvent, error) {
	waitCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	if limit := r.GetExecute().GetTimeoutMs(); limit > 0 {
		var stop context.CancelFunc
		// The agent may need the patience to kill thousands of processes.
		within := time.Duration(limit)*time.Millisecond + c.Patience
		waitCtx, stop = context.WithTimeoutCause(waitCtx, within, errSilent)
		defer stop()
	}

	call := connect.NewClient[process.StartRequest, process.StartResponse](metered{c.http},
		t.url(process.ProcessStartProcedure, nil), connectOptions...)
	req := connect.NewRequest(r)
	stream, err := call.CallServerStream(waitCtx, req)
	if err != nil {
		return nil, connectError(waitCtx, err)
	}
	// Closing tells the agent that the host no longer waits. An error of Close says nothing new.
	defer func() { _ = stream.Close() }()
	for stream.Receive() {
		event := stream.Msg().GetEvent()
		if end := event.GetEnd(); end != nil {
			// Read the end of the stream, so that the connection can be reused.
			stream.Receive()
			return end, nil
		}
		if err := on(event); err != nil {
			cancel() // else Close would wait for the rest of the command's output
			return nil, err
		}
	}
	if err := stream.Err(); err != nil {
		return nil, connectError(waitCtx, err)
	}
	return nil, unusable(errors.New("the agent ended the stream without a result"))
}

// connectOptions limits the messages of an agent, and refuses compressed ones: a few KiB of such could
// become very large.
var connectOptions = []connect.ClientOption{
	connect.WithReadMaxBytes(maxMessage),
	connect.WithAcceptCompression("gzip", nil, nil),
}

// message returns the request as it is sent. With gather the agent may hold back output, until
// the end of the command at the latest.
func (r ExecuteRequest) message(gather bool) *process.StartRequest {
	m := &process.StartRequest{
		Process: &process.ProcessConfig{Envs: r.Env},
		Execute: &process.ExecuteOptions{
			Stdin:          r.Stdin,
			CloseStdin:     true,
			TimeoutMs:      r.Timeout.Milliseconds(),
			MaxOutputBytes: r.MaxOutput,
			User:           r.User,
			Gather:         gather,
		},
	}
	if r.Timeout > 0 && m.Execute.TimeoutMs == 0 {
		m.Execute.TimeoutMs = 1
	}
	argv := r.Argv()
	m.Process.Cmd, m.Process.Args = argv[0], argv[1:]
	if r.Workdir != "" {
		m.Process.Cwd = &r.Workdir
	}
	return m
}

// Limits of what an agent's result may say.
const (
	maxSignal = 64 // Linux's last signal
	// maxDurationUs is longer than any sandbox runs one command, µs. Much longer durations would
	// overflow a [time.Duration].
	maxDurationUs = int64(366 * 24 * time.Hour / time.Microsecond)
)

// result returns the result of a command without its output.
func result(end *process.EndEvent, stdoutCut, stderrCut bool) ExecuteResult {
	// The program that answers may have made the numbers up: they are clamped to possible ones.
	res := ExecuteResult{
		ExitCode:        int(min(max(end.GetExitCode(), -1), 255)),
		StdoutTruncated: end.GetStdoutTruncated() || stdoutCut,
		StderrTruncated: end.GetStderrTruncated() || stderrCut,
		Duration:        time.Duration(min(max(end.GetDurationUs(), 0), maxDurationUs)) * time.Microsecond,
		TimedOut:        end.GetTimedOut(),
		OOMKilled:       end.GetOomKilled(),
		Signal:          int(min(max(end.GetSignal(), 0), maxSignal)),
	}
	switch {
	case res.TimedOut:
		res.ExitCode = ExitTimedOut
	case res.Signal != 0:
		res.ExitCode = exitSignal + res.Signal
	}
	return res
}
