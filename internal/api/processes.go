package api

import (
	"context"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/httpserver"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/terminal"
)

// Limits of processes. They are part of the contract.
const (
	maxProcessTimeout = 24 * time.Hour
	defaultWait       = 30 * time.Second
	maxWait           = 5 * time.Minute
	// maxInput limits the bytes of input in one call. The process takes them as it reads.
	maxInput = 8 << 20
)

// Processes has the calls into sandboxes that concern processes; [*agentapi.Client] implements it.
// Processes started by StartProcess outlive the call.
type Processes interface {
	ExecuteStream(ctx context.Context, t agentapi.Target, r agentapi.ExecuteRequest,
		emit func(agentapi.ExecuteEvent) error) (agentapi.ExecuteResult, error)
	StartProcess(ctx context.Context, t agentapi.Target, r agentapi.StartProcess) (agentapi.Process, error)
	Processes(ctx context.Context, t agentapi.Target) ([]agentapi.Process, error)
	Process(ctx context.Context, t agentapi.Target, ref string) (agentapi.Process, error)
	WaitProcess(ctx context.Context, t agentapi.Target, ref string, within time.Duration) (agentapi.Process, error)
	SignalProcess(ctx context.Context, t agentapi.Target, ref string, signal int) error
	KillProcess(ctx context.Context, t agentapi.Target, ref string) error
	ResizeTerminal(ctx context.Context, t agentapi.Target, ref string, size agentapi.TerminalSize) error
	WriteInput(ctx context.Context, t agentapi.Target, ref string, body io.Reader, end bool) (int64, error)
	Follow(ctx context.Context, t agentapi.Target, r agentapi.FollowRequest,
		emit func(agentapi.ProcessOutput) error) (agentapi.Process, error)
}

// processRef matches the names of a process in a call: its pid or a tag.
var processRef = regexp.MustCompile(`^([0-9]{1,9}|[A-Za-z][A-Za-z0-9_.-]{0,63})$`)

func checkRef(field, ref string) error {
	if !processRef.MatchString(ref) {
		return fault.InField(fault.CodeInvalidProcess, field, "must be the pid of a process or its tag")
	}
	return nil
}

// StartProcess answers POST /v1/sandboxes/{id}/processes.
func (s *server) StartProcess(w http.ResponseWriter, r *http.Request, id SandboxID) {
	var in StartProcessRequest
	if _, err := read(w, r, maxExecuteBody, true, &in); err != nil {
		s.fail(w, r, err)
		return
	}
	start, err := startOf(in)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.inside(w, r, id, sandbox.ForProcess, func(t agentapi.Target) error {
		p, err := s.Agent.StartProcess(r.Context(), t, start)
		if err == nil {
			s.answer(w, r, http.StatusCreated, processOf(p))
		}
		return err
	})
}

func startOf(in StartProcessRequest) (agentapi.StartProcess, error) {
	var out agentapi.StartProcess
	command, err := program{command: in.Command, shell: (*string)(in.Shell), args: in.Args,
		env: in.Env, user: in.User, workdir: in.Workdir}.request()
	if err != nil {
		return out, err
	}
	out = command.Detached()
	out.OpenInput = in.Stdin != nil && *in.Stdin
	if in.Tag != nil {
		if checkRef("tag", *in.Tag) != nil || (*in.Tag)[0] <= '9' {
			return out, fault.InvalidField("tag",
				"must be 1 to %d letters, digits, _, . and -, and begin with a letter", agentapi.MaxTag)
		}
		out.Tag = *in.Tag
	}
	timeout, err := duration("timeout", in.Timeout)
	if err != nil {
		return out, err
	}
	if timeout != nil {
		if *timeout < time.Second || *timeout > maxProcessTimeout {
			return out, fault.InvalidField("timeout", "must be between 1s and %s", maxProcessTimeout)
		}
		out.TimeoutMs = timeout.Milliseconds()
	}
	if in.Pty != nil {
		size, err := terminal.Size("pty.", in.Pty.Cols, in.Pty.Rows)
		if err != nil {
			return out, err
		}
		out.Terminal = &size
	}
	return out, nil
}

// ListProcesses answers GET /v1/sandboxes/{id}/processes.
func (s *server) ListProcesses(w http.ResponseWriter, r *http.Request, id SandboxID) {
	s.inside(w, r, id, sandbox.ForProcess, func(t agentapi.Target) error {
		all, err := s.Agent.Processes(r.Context(), t)
		if err == nil {
			s.answer(w, r, http.StatusOK, ProcessList{Processes: each(all, processOf)})
		}
		return err
	})
}

// withProcess runs do, which needs a process, with a lease of the sandbox; see inside.
func (s *server) withProcess(w http.ResponseWriter, r *http.Request, id SandboxID, ref ProcessRef,
	do func(agentapi.Target) error) {
	if err := checkRef("process", ref); err != nil {
		s.fail(w, r, err)
		return
	}
	s.inside(w, r, id, sandbox.ForProcess, do)
}

// GetProcess answers GET /v1/sandboxes/{id}/processes/{process}.
func (s *server) GetProcess(w http.ResponseWriter, r *http.Request, id SandboxID, ref ProcessRef) {
	s.withProcess(w, r, id, ref, func(t agentapi.Target) error {
		p, err := s.Agent.Process(r.Context(), t, ref)
		if err == nil {
			s.answer(w, r, http.StatusOK, processOf(p))
		}
		return err
	})
}

// KillProcess answers DELETE /v1/sandboxes/{id}/processes/{process}.
func (s *server) KillProcess(w http.ResponseWriter, r *http.Request, id SandboxID, ref ProcessRef) {
	s.withProcess(w, r, id, ref, func(t agentapi.Target) error {
		err := s.Agent.KillProcess(r.Context(), t, ref)
		if err == nil {
			w.WriteHeader(http.StatusNoContent)
		}
		return err
	})
}

// WaitProcess answers GET /v1/sandboxes/{id}/processes/{process}/wait.
func (s *server) WaitProcess(w http.ResponseWriter, r *http.Request, id SandboxID, ref ProcessRef,
	params WaitProcessParams) {
	within := defaultWait
	timeout, err := duration("timeout", params.Timeout)
	if err == nil && timeout != nil {
		if within = *timeout; within < 0 || within > maxWait {
			err = fault.InvalidField("timeout", "must be between 0 and %s", maxWait)
		}
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.withProcess(w, r, id, ref, func(t agentapi.Target) error {
		ctx, cancel := s.untilStop(r.Context())
		defer cancel()
		p, err := s.Agent.WaitProcess(ctx, t, ref, within)
		if err == nil {
			s.answer(w, r, http.StatusOK, processOf(p))
		}
		return err
	})
}

// GetProcessOutput answers GET /v1/sandboxes/{id}/processes/{process}/output.
func (s *server) GetProcessOutput(w http.ResponseWriter, r *http.Request, id SandboxID, ref ProcessRef,
	params GetProcessOutputParams) {
	f := agentapi.FollowRequest{Ref: ref}
	var err error
	if params.Offset != nil {
		f.Offset = *params.Offset
	}
	if params.LastEventID != nil {
		if f.Offset, err = strconv.ParseInt(*params.LastEventID, 10, 64); err != nil || f.Offset < 0 {
			err = fault.InvalidField("Last-Event-ID", "is not the id of an event of this stream")
		}
	}
	if err == nil && f.Offset < 0 {
		err = fault.InvalidField("offset", "must not be negative")
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.withProcess(w, r, id, ref, func(t agentapi.Target) error {
		if httpserver.WantsEvents(r) {
			reply := s.newEventReply(w, r)
			defer reply.Close()
			s.followProcess(reply, t, f)
			return nil
		}
		f.Now = true
		out, err := s.outputNow(r.Context(), t, f)
		if err == nil {
			s.answer(w, r, http.StatusOK, out)
		}
		return err
	})
}

// outputNow returns the output of a process that the agent still keeps.
func (s *server) outputNow(ctx context.Context, t agentapi.Target, f agentapi.FollowRequest) (ProcessOutput, error) {
	out := ProcessOutput{Output: []OutputPiece{}, NextOffset: f.Offset}
	size, account := 0, budget.From(ctx)
	p, err := s.Agent.Follow(ctx, t, f, func(o agentapi.ProcessOutput) error {
		out.Lost += o.Lost
		out.NextOffset = o.Offset + max(o.Lost, int64(len(o.Data)))
		// Accept no more than the agent keeps, with room for output that arrives meanwhile.
		if size += len(o.Data) + waitingCost; size > 2*agentapi.HistorySize {
			return fault.New(fault.Unavailable, fault.CodeSandboxUnreachable, "the sandbox sent more output than it can keep")
		}
		if len(o.Data) > 0 {
			piece := pieceOf(o.Data)
			// The piece is held, it is encoded, and the buffer of the answer may have doubled.
			if err := account.Take(waitingCost + int64(len(piece.Data)) + 3*escapedLen(piece.Data)); err != nil {
				return err
			}
			piece.Offset, piece.Stream = &o.Offset, new(OutputPieceStream(streamNames[o.Stream]))
			out.Output = append(out.Output, piece)
		}
		return nil
	})
	out.Process = processOf(p)
	return out, err
}

// escapedLen returns the approximate length of a text in JSON, in bytes.
func escapedLen(s string) int64 {
	n := len(s)
	for i := range len(s) {
		switch c := s[i]; {
		case c < ' ':
			n += 5
		case c == '"', c == '\\':
			n++
		}
	}
	return int64(n)
}

// WriteProcessStdin answers POST /v1/sandboxes/{id}/processes/{process}/stdin.
func (s *server) WriteProcessStdin(w http.ResponseWriter, r *http.Request, id SandboxID, ref ProcessRef,
	params WriteProcessStdinParams) {
	if r.ContentLength > maxInput {
		s.fail(w, r, httpserver.TooLarge(maxInput))
		return
	}
	body := newUpload(r, maxInput, httpserver.TooLarge(maxInput))
	s.withProcess(w, r, id, ref, func(t agentapi.Target) error {
		n, err := s.Agent.WriteInput(r.Context(), t, ref, body, params.Close != nil && *params.Close)
		if err == nil {
			s.answer(w, r, http.StatusOK, InputTaken{Written: n})
		}
		return err
	})
}

// SignalProcess answers POST /v1/sandboxes/{id}/processes/{process}/signal.
func (s *server) SignalProcess(w http.ResponseWriter, r *http.Request, id SandboxID, ref ProcessRef) {
	var in SignalRequest
	_, err := read(w, r, maxBody, true, &in)
	number := 0
	if err == nil {
		number, err = signalNumber(in.Signal)
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.withProcess(w, r, id, ref, func(t agentapi.Target) error {
		err := s.Agent.SignalProcess(r.Context(), t, ref, number)
		if err == nil {
			w.WriteHeader(http.StatusNoContent)
		}
		return err
	})
}

// signalNumber parses a signal the way kill(1) does.
func signalNumber(name string) (int, error) {
	const highest = 64
	if n, err := strconv.Atoi(name); err == nil && n >= 1 && n <= highest {
		return n, nil
	}
	name = strings.ToUpper(name)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n != 0 {
		return int(n), nil
	}
	for n := firstRealtime; n <= highest; n++ {
		if signalName(n) == name {
			return n, nil
		}
	}
	return 0, fault.InvalidField("signal", "must be the name of a signal, such as TERM, or its number, 1 to %d", highest)
}

// ResizeProcessTerminal answers POST /v1/sandboxes/{id}/processes/{process}/resize.
func (s *server) ResizeProcessTerminal(w http.ResponseWriter, r *http.Request, id SandboxID, ref ProcessRef) {
	var in TerminalSize
	_, err := read(w, r, maxBody, true, &in)
	var size agentapi.TerminalSize
	if err == nil {
		size, err = terminal.Size("", in.Cols, in.Rows)
	}
	if err != nil {
		s.fail(w, r, err)
		return
	}
	s.withProcess(w, r, id, ref, func(t agentapi.Target) error {
		err := s.Agent.ResizeTerminal(r.Context(), t, ref, size)
		if err == nil {
			w.WriteHeader(http.StatusNoContent)
		}
		return err
	})
}

func processOf(p agentapi.Process) Process {
	out := Process{
		PID: p.PID, Tag: optional(p.Tag),
		Args:    each(p.Args, func(arg string) string { return strings.ToValidUTF8(arg, "\uFFFD") }),
		Workdir: optional(strings.ToValidUTF8(p.Workdir, "\uFFFD")),
		User:    optional(strings.ToValidUTF8(p.User, "\uFFFD")),
		Status:  ProcessStatusRunning, StartedAt: p.StartedAt.UTC(),
		Terminal: p.Terminal, StdinOpen: p.Input, OutputKept: p.Kept,
	}
	if p.Kept {
		out.OutputFrom, out.OutputTo = &p.First, &p.Next
	}
	if p.End != nil {
		out.Status = ProcessStatusExited
		out.Exit = new(exitOf(p.End.Result()))
	}
	return out
}

func exitOf(r agentapi.ExecuteResult) ProcessExit {
	out := ProcessExit{ExitCode: r.ExitCode, DurationMs: r.Duration.Milliseconds(), TimedOut: r.TimedOut,
		OOMKilled: r.OOMKilled}
	if r.Signal != 0 {
		out.Signal = new(signalName(r.Signal))
	}
	return out
}
