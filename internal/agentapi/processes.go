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
	// HistorySize is how much of a process's output is kept, bytes: the last of it. With
	// many processes it is less, see MaxHistory. It is memory of the sandbox.
	HistorySize = 1 << 20
	// MaxHistory is how much output is kept of all processes of a sandbox together.
	MaxHistory = 32 << 20
	// MaxKept is how many of them run at once; MaxEnded and EndedKept how many that have
	// ended are still known, and how long.
	MaxKept   = 512
	MaxEnded  = 32
	EndedKept = 15 * time.Minute
	// InputPatience is how long a process may leave its input unread before whoever writes
	// it is told so. Longer holds connections, shorter breaks off what only is slow.
	InputPatience = 30 * time.Second
	// MaxTag is the length of a process's tag, bytes.
	MaxTag = 64
)

// What is taken of an answer about processes.
const (
	maxCommands    = 4096     // processes beside those that are kept: calls go on, one for each at the most
	maxProcess     = 32 << 10 // bytes of JSON; arguments are cut after 1 KiB, which escaped are 6
	maxProcessList = 8 << 20  // bytes of JSON
	processCost    = 512      // what one costs beside its texts, bytes
)

// TerminalSize is what a terminal has of columns and rows; 0 is the agent's default.
type TerminalSize struct {
	Cols uint16 `json:"cols"`
	Rows uint16 `json:"rows"`
}

// StartProcess is the body of POST /processes: a process that outlives the call.
type StartProcess struct {
	Args    []string          `json:"args"`
	Env     map[string]string `json:"env,omitempty"`
	Workdir string            `json:"workdir,omitempty"` // "" is the sandbox's, else the user's home
	User    string            `json:"user,omitempty"`    // "" is the sandbox's default
	Tag     string            `json:"tag,omitempty"`     // of no other that runs
	// Input is written to its standard input, which ends then unless OpenInput.
	Input     []byte        `json:"input,omitempty"`
	OpenInput bool          `json:"openInput,omitempty"`
	Terminal  *TerminalSize `json:"terminal,omitempty"`
	TimeoutMs int64         `json:"timeoutMs,omitempty"` // then it is killed; 0 is never
	// GraceMs is how long it lives without anybody who follows it, from its start on, before
	// it is hung up and killed; 0 is for ever.
	GraceMs int64 `json:"graceMs,omitempty"`
}

// Process is one of a sandbox's processes that some call started.
type Process struct {
	PID       int          `json:"pid"`
	Tag       string       `json:"tag,omitempty"`
	Args      []string     `json:"args"` // cut where they are long
	Workdir   string       `json:"workdir,omitempty"`
	User      string       `json:"user,omitempty"`
	StartedAt time.Time    `json:"startedAt"`
	Terminal  bool         `json:"terminal,omitempty"`
	Input     bool         `json:"input,omitempty"` // it can be written to
	Kept      bool         `json:"kept,omitempty"`  // its output can be followed from where it is kept
	First     int64        `json:"first,omitempty"` // offset of the first byte of output that is kept
	Next      int64        `json:"next,omitempty"`  // offset of the first byte to come
	End       *ProcessExit `json:"end,omitempty"`   // nil while it runs
}

// ProcessExit is how a process ended.
type ProcessExit struct {
	At         time.Time `json:"at"`
	ExitCode   int       `json:"exitCode"` // -1 after a signal
	Signal     int       `json:"signal,omitempty"`
	TimedOut   bool      `json:"timedOut,omitempty"`
	OOMKilled  bool      `json:"oomKilled,omitempty"`
	DurationUs int64     `json:"durationUs"`
}

// Result is the end as Execute has it, without the output.
func (e ProcessExit) Result() ExecuteResult {
	return result(&process.EndEvent{ExitCode: int32(e.ExitCode), Signal: int32(e.Signal), TimedOut: e.TimedOut, OomKilled: e.OOMKilled, DurationUs: e.DurationUs},
		false, false)
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

// Processes lists what calls have started and still runs, and what has ended and is kept.
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

// readProcesses reads a [ProcessList] one by one, as many as there can be, and as large.
func readProcesses(r io.Reader, account *budget.Account) ([]Process, error) {
	d := json.NewDecoder(io.LimitReader(r, maxProcessList))
	for _, want := range []json.Token{json.Delim('{'), "processes", json.Delim('[')} {
		got, err := d.Token()
		if err != nil {
			return nil, unusable(fmt.Errorf("decoding the list of processes: %w", err))
		}
		if got == nil && want == json.Delim('[') {
			return nil, nil // null, which is an empty list
		}
		if got != want {
			return nil, unusable(fmt.Errorf("the list of processes has %v for %v", got, want))
		}
	}
	var list []Process
	for d.More() {
		var one json.RawMessage
		if err := d.Decode(&one); err != nil {
			return nil, unusable(fmt.Errorf("decoding a process: %w", err))
		}
		if len(list) == MaxKept+MaxEnded+maxCommands || len(one) > maxProcess {
			return nil, unusable(fmt.Errorf("after %d processes comes one of %d bytes", len(list), len(one)))
		}
		var p Process
		if err := json.Unmarshal(one, &p); err != nil {
			return nil, unusable(fmt.Errorf("decoding a process: %w", err))
		}
		// Held until the call is answered, twice: as it is here and as it is answered.
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

// Process is the one of a pid or tag.
func (c *Client) Process(ctx context.Context, t Target, ref string) (Process, error) {
	var p Process
	err := c.callProcesses(ctx, t, http.MethodGet, processPath(ref, ""), nil, nil, &p)
	return p, err
}

// WaitProcess returns the process when it has ended, or as it is after a time.
func (c *Client) WaitProcess(ctx context.Context, t Target, ref string, within time.Duration) (Process, error) {
	var p Process
	query := url.Values{"ms": {strconv.FormatInt(within.Milliseconds(), 10)}}
	err := olderAgent(c.call(ctx, t, within+c.Patience, http.MethodGet, processPath(ref, "/wait"), query, nil, &p))
	return p, err
}

// SignalProcess sends a signal to a process and its process group.
func (c *Client) SignalProcess(ctx context.Context, t Target, ref string, signal int) error {
	return c.callProcesses(ctx, t, http.MethodPost, processPath(ref, "/signal"), nil, SignalRequest{Signal: signal}, nil)
}

// KillProcess kills a process with all that descends from it, and forgets it.
func (c *Client) KillProcess(ctx context.Context, t Target, ref string) error {
	return c.callProcesses(ctx, t, http.MethodDelete, processPath(ref, ""), nil, nil, nil)
}

// ResizeTerminal tells a process's terminal its size.
func (c *Client) ResizeTerminal(ctx context.Context, t Target, ref string, size TerminalSize) error {
	return c.callProcesses(ctx, t, http.MethodPost, processPath(ref, "/resize"), nil, size, nil)
}

// WriteInput writes body to a process's input as it comes and says how much was taken; with
// end the input is at its end then. A process that does not read for InputPatience is a
// Conflict, code "stdin_blocked".
func (c *Client) WriteInput(ctx context.Context, t Target, ref string, body io.Reader, end bool) (int64, error) {
	query := url.Values{}
	if end {
		query.Set("end", "1")
	}
	sent, within := &countedReader{r: body}, c.Patience
	if within >= InputPatience { // the agent is silent while it waits for the process; a shorter patience is meant to be shorter
		within += InputPatience
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

// countedReader counts what was read.
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

// callProcesses is call for what agents have not always had.
func (c *Client) callProcesses(ctx context.Context, t Target, method, path string, query url.Values, body, reply any) error {
	return olderAgent(c.call(ctx, t, c.Patience, method, path, query, body, reply))
}

// olderAgent says of a call that the agent does not know why that is.
func olderAgent(err error) error {
	var unknown *unknownCall
	if errors.As(err, &unknown) {
		return fault.New(fault.Conflict, CodeOlderSandbox, "the sandbox was started by an older version of cay that does not have this yet").Because(err)
	}
	return err
}

// ProcessOutput is what Follow hands over.
type ProcessOutput struct {
	Stream Stream
	Offset int64  // of the first byte
	Data   []byte // or, if there is none:
	Lost   int64  // so many bytes from Offset on are not kept any more
}

// FollowRequest says what to follow.
type FollowRequest struct {
	Ref    string // pid or tag
	Offset int64  // of the first byte
	Now    bool   // only what there is at the moment
	Begun  func() // called when it is known that there is such a process, unless nil
}

// Follow hands the output of a process from an offset on to emit, what is kept first, then
// as it comes, and returns the process when it has ended and all was handed over. What emit
// is slow to take is lost when it is not kept any more; the process is never held up. An
// error of emit ends it. The data is emit's own.
func (c *Client) Follow(ctx context.Context, t Target, r FollowRequest, emit func(ProcessOutput) error) (Process, error) {
	query := url.Values{"offset": {strconv.FormatInt(r.Offset, 10)}}
	if r.Now {
		query.Set("now", "1")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, t.url(processPath(r.Ref, "/output"), query), nil)
	if err != nil {
		return Process{}, fmt.Errorf("making the request: %w", err)
	}
	// An agent with nothing to say says so every 30 seconds.
	resp, err := c.doFor(req, c.Patience, c.Patience, 2*c.Patience, 1)
	if err != nil {
		return Process{}, olderAgent(err)
	}
	defer resp.Body.Close()
	if r.Begun != nil {
		r.Begun()
	}
	// A piece, and what an event is made of it.
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
