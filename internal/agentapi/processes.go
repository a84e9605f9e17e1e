package agentapi

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/cayhq/cay/internal/agentapi/process"
	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/fault"
)

// Limits of the processes that the agent keeps for clients to come back to.
const (
	// HistorySize limits the output of a process that is kept, bytes: the end of it. With
	// many processes it is less, see MaxHistory. The output takes memory of the sandbox; a
	// smaller limit loses output of followers that come late.
	HistorySize = 1 << 20
	// MaxHistory limits the kept output of all processes of a sandbox together, bytes. More
	// would leave programs less memory.
	MaxHistory = 32 << 20
	// MaxDetached limits the detached processes that run at once, MaxEnded the ended processes that
	// are still known, and EndedKept the time for which they are. Larger limits cost memory
	// of the sandbox.
	MaxDetached = 512
	MaxEnded    = 32
	EndedKept   = 15 * time.Minute
	// InputPatience limits the time for which a process may leave its input unread before a
	// write fails. A longer one holds connections, a shorter one breaks off writes to processes
	// that are only slow.
	InputPatience = 30 * time.Second
	// MaxTag limits the length of a process's tag, bytes.
	MaxTag = 64
)

// Limits of an answer about processes. Lower ones refuse honest answers, higher ones let an agent
// take more of the host's memory.
const (
	maxCommands    = 4096     // processes that are not kept: at most one for each call under way
	maxProcess     = 32 << 10 // bytes of JSON; arguments are cut after 1 KiB, which may be 6 KiB when escaped
	maxProcessList = 8 << 20  // bytes of JSON
	processCost    = 512      // memory of a process beside its texts, bytes
)

// TerminalSize is the size of a terminal in columns and rows; 0 is the agent's default.
type TerminalSize struct {
	Cols uint16 `json:"cols"`
	Rows uint16 `json:"rows"`
}

// StartProcess is the body of POST /processes. It describes a process that outlives the call.
type StartProcess struct {
	Args    []string          `json:"args"`
	Env     map[string]string `json:"env,omitempty"`
	Workdir string            `json:"workdir,omitempty"` // "" is the sandbox's, else the user's home
	User    string            `json:"user,omitempty"`    // "" is the sandbox's default
	Tag     string            `json:"tag,omitempty"`     // no other running process may have it
	// Input is written to the process's standard input, which then ends unless OpenInput is set.
	Input     []byte        `json:"input,omitempty"`
	OpenInput bool          `json:"openInput,omitempty"`
	Terminal  *TerminalSize `json:"terminal,omitempty"`
	TimeoutMs int64         `json:"timeoutMs,omitempty"` // time until the process is killed; 0 is never
	// GraceMs limits the time for which the process lives without a follower, from its start on.
	// After that it is hung up and killed; 0 is no limit.
	GraceMs int64 `json:"graceMs,omitempty"`
}

// Process describes a process of a sandbox that a call started.
type Process struct {
	PID       int          `json:"pid"`
	Tag       string       `json:"tag,omitempty"`
	Args      []string     `json:"args"` // long ones are cut
	Workdir   string       `json:"workdir,omitempty"`
	User      string       `json:"user,omitempty"`
	StartedAt time.Time    `json:"startedAt"`
	Terminal  bool         `json:"terminal,omitempty"`
	Input     bool         `json:"input,omitempty"` // its input can be written
	Kept      bool         `json:"kept,omitempty"`  // its output is kept and can be followed
	First     int64        `json:"first,omitempty"` // offset of the first byte of output that is kept
	Next      int64        `json:"next,omitempty"`  // offset of the next byte to come
	End       *ProcessExit `json:"end,omitempty"`   // nil while the process runs
}

// ProcessExit describes the end of a process.
type ProcessExit struct {
	At         time.Time `json:"at"`
	ExitCode   int       `json:"exitCode"` // -1 after a signal
	Signal     int       `json:"signal,omitempty"`
	TimedOut   bool      `json:"timedOut,omitempty"`
	OOMKilled  bool      `json:"oomKilled,omitempty"`
	DurationUs int64     `json:"durationUs"`
}

// Result returns the end as a result of [Client.Execute], without output.
func (e ProcessExit) Result() ExecuteResult {
	return result(&process.EndEvent{ExitCode: int32(e.ExitCode), Signal: int32(e.Signal), TimedOut: e.TimedOut,
		OomKilled: e.OOMKilled, DurationUs: e.DurationUs}, false, false)
}

// ProcessList is the answer to GET /processes.
type ProcessList struct {
	Processes []Process `json:"processes"`
}

// SignalRequest is the body of POST /processes/{process}/signal.
type SignalRequest struct {
	Signal int `json:"signal"`
}

// InputReply is the answer to POST /processes/{process}/input.
type InputReply struct {
	Written int64 `json:"written"`
}

// StartProcess starts a process and returns when it runs.
func (c *Client) StartProcess(ctx context.Context, t Target, r StartProcess) (Process, error) {
	var p Process
	err := c.callProcesses(ctx, t, http.MethodPost, "/processes", nil, r, &p)
	return p, err
}

// Processes returns the processes that calls have started and that still run, and the detached ones
// that have ended.
func (c *Client) Processes(ctx context.Context, t Target) ([]Process, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.Patience, errSilent)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.url("/processes", nil), nil)
	if err != nil {
		return nil, fmt.Errorf("making the request: %w", err)
	}
	resp, err := c.send(req)
	if err != nil {
		return nil, olderAgent(err)
	}
	defer resp.Body.Close()
	list, err := readProcesses(resp.Body, budget.From(ctx))
	if err != nil {
		return nil, callError(ctx, err)
	}
	return list, nil
}

// readProcesses reads the processes of a [ProcessList] one by one. It refuses a list with more or
// larger processes than there can be.
func readProcesses(r io.Reader, account *budget.Account) ([]Process, error) {
	d := json.NewDecoder(io.LimitReader(r, maxProcessList))
	for _, want := range []json.Token{json.Delim('{'), "processes", json.Delim('[')} {
		got, err := d.Token()
		if err != nil {
			return nil, unusable(fmt.Errorf("decoding the list of processes: %w", err))
		}
		if got == nil && want == json.Delim('[') {
			return nil, nil // null stands for an empty list
		}
		if got != want {
			return nil, unusable(fmt.Errorf("the list of processes has %v in place of %v", got, want))
		}
	}
	var list []Process
	for d.More() {
		var one json.RawMessage
		if err := d.Decode(&one); err != nil {
			return nil, unusable(fmt.Errorf("decoding a process: %w", err))
		}
		if len(list) == MaxDetached+MaxEnded+maxCommands || len(one) > maxProcess {
			return nil, unusable(fmt.Errorf("the list of processes has one of %d bytes after %d", len(one), len(list)))
		}
		var p Process
		if err := json.Unmarshal(one, &p); err != nil {
			return nil, unusable(fmt.Errorf("decoding a process: %w", err))
		}
		// Twice, until the call is answered: once for the list, once for the answer made from it.
		if err := account.Take(2 * (processCost + int64(len(one)))); err != nil {
			return nil, err
		}
		list = append(list, p)
	}
	if _, err := d.Token(); err != nil {
		return nil, unusable(fmt.Errorf("decoding the list of processes: %w", err))
	}
	return list, nil
}

// Process returns the process with a pid or tag.
func (c *Client) Process(ctx context.Context, t Target, ref string) (Process, error) {
	var p Process
	err := c.callProcesses(ctx, t, http.MethodGet, processPath(ref, ""), nil, nil, &p)
	return p, err
}

// WaitProcess returns the process when it has ended, or as it is after the time within.
func (c *Client) WaitProcess(ctx context.Context, t Target, ref string, within time.Duration) (Process, error) {
	var p Process
	query := url.Values{"ms": {strconv.FormatInt(within.Milliseconds(), 10)}}
	err := olderAgent(c.call(ctx, t, within+c.Patience, http.MethodGet, processPath(ref, "/wait"), query, nil, &p))
	return p, err
}

// SignalProcess sends a signal to a process and its process group.
func (c *Client) SignalProcess(ctx context.Context, t Target, ref string, signal int) error {
	body := SignalRequest{Signal: signal}
	return c.callProcesses(ctx, t, http.MethodPost, processPath(ref, "/signal"), nil, body, nil)
}

// KillProcess kills a process with all its descendants, and makes the agent forget it.
func (c *Client) KillProcess(ctx context.Context, t Target, ref string) error {
	return c.callProcesses(ctx, t, http.MethodDelete, processPath(ref, ""), nil, nil, nil)
}

// ResizeTerminal sets the size of a process's terminal.
func (c *Client) ResizeTerminal(ctx context.Context, t Target, ref string, size TerminalSize) error {
	return c.callProcesses(ctx, t, http.MethodPost, processPath(ref, "/resize"), nil, size, nil)
}

// WriteInput writes body to a process's input as it comes and returns the number of bytes that
// the process's input took; with end it then ends the input. A process that does not read for
// InputPatience is a Conflict, code "stdin_blocked".
func (c *Client) WriteInput(ctx context.Context, t Target, ref string, body io.Reader, end bool) (int64, error) {
	query := url.Values{}
	if end {
		query.Set("end", "1")
	}
	sent, within := &countedReader{r: body}, c.Patience
	if within >= InputPatience {
		within += InputPatience // the agent is silent while it waits for the process; shorter patiences stay short
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, t.url(processPath(ref, "/input"), query), sent)
	if err != nil {
		return 0, fmt.Errorf("making the request: %w", err)
	}
	resp, err := c.doFor(req, within, within, c.Patience, patientPace)
	if err != nil {
		return 0, olderAgent(err)
	}
	defer resp.Body.Close()
	var reply InputReply
	if err := decodeReply(ctx, resp.Body, "/input", &reply); err != nil {
		return 0, err
	}
	return min(max(reply.Written, 0), sent.n.Load()), nil
}

// countedReader counts the bytes that were read from r.
type countedReader struct {
	r io.Reader
	n atomic.Int64
}

func (c *countedReader) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n.Add(int64(n))
	return n, err
}

func processPath(ref, verb string) string { return "/processes/" + url.PathEscape(ref) + verb }

// callProcesses sends one request of a kind that old agents do not have.
func (c *Client) callProcesses(ctx context.Context, t Target, method, path string, query url.Values,
	body, reply any) error {
	return olderAgent(c.call(ctx, t, c.Patience, method, path, query, body, reply))
}

// olderAgent returns CodeOlderSandbox for the error of a call that the agent does not know, and other
// errors unchanged.
func olderAgent(err error) error {
	var unknown *unknownCall
	if errors.As(err, &unknown) {
		return fault.New(fault.Conflict, fault.CodeSandboxTooOld,
			"the sandbox was started by an older version of cay that does not have this yet").Because(err)
	}
	return err
}

// ProcessOutput holds a piece of a process's output, or reports a gap in it.
type ProcessOutput struct {
	Stream Stream
	Offset int64  // of the first byte
	Data   []byte // empty for a gap
	Lost   int64  // length of the gap, bytes: they are no longer kept
}

// FollowRequest selects the output to follow.
type FollowRequest struct {
	Ref    string // pid or tag
	Offset int64  // of the first byte
	Now    bool   // only the output that there is already
	Begun  func() // called once the agent has found the process, unless nil
}

// Follow calls emit with the output of a process from an offset on, first with what is kept, then
// as it comes, and returns the process when it has ended and emit had all output. Output is lost
// if it is no longer kept when emit is ready for it; a slow emit never holds up the process. An
// error of emit ends Follow. emit may keep the data.
func (c *Client) Follow(ctx context.Context, t Target, r FollowRequest, emit func(ProcessOutput) error) (
	Process, error) {
	query := url.Values{"offset": {strconv.FormatInt(r.Offset, 10)}}
	if r.Now {
		query.Set("now", "1")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.url(processPath(r.Ref, "/output"), query), nil)
	if err != nil {
		return Process{}, fmt.Errorf("making the request: %w", err)
	}
	// While there is no output, the agent sends an idle frame every 30 seconds.
	resp, err := c.doFor(req, c.Patience, c.Patience, 2*c.Patience, 1)
	if err != nil {
		return Process{}, olderAgent(err)
	}
	defer resp.Body.Close()
	if r.Begun != nil {
		r.Begun()
	}
	// Once for a piece of output, once for the event that is made of it.
	if err := budget.From(ctx).Take(2 * maxFrame); err != nil {
		return Process{}, err
	}
	defer budget.From(ctx).Give(2 * maxFrame)
	frames := bufio.NewReaderSize(resp.Body, 4<<10)
	for next := r.Offset; ; {
		f, err := readFrame(frames)
		if err != nil {
			return Process{}, callError(ctx, noEOF(err))
		}
		out := ProcessOutput{Stream: f.Kind, Offset: f.Offset, Data: f.Payload}
		switch f.Kind {
		case frameIdle:
			continue
		case frameEnd:
			var p Process
			if err := json.Unmarshal(f.Payload, &p); err != nil {
				return Process{}, unusable(fmt.Errorf("decoding the end of a process's output: %w", err))
			}
			// Read the end of the stream, so that the connection can be used again.
			return p, drain(ctx, frames)
		case frameLost:
			out = ProcessOutput{Offset: f.Offset, Lost: f.lost()}
		}
		size := max(out.Lost, int64(len(out.Data)))
		if f.Offset < next || size > 1<<62-f.Offset {
			return Process{}, unusable(fmt.Errorf("a frame of output is at %d after %d", f.Offset, next))
		}
		if size == 0 {
			continue
		}
		next = f.Offset + size
		if err := emit(out); err != nil {
			return Process{}, err
		}
	}
}
