package agentapi

import (
	"context"

	"github.com/cayhq/cay/internal/agentapi/process"
)

// ExecuteEvent reports the start of a command or a piece of its output.
type ExecuteEvent struct {
	PID    int    // process id of the command that was started; 0 with output
	Stream Stream // the output that Data belongs to
	Data   []byte // belongs to emit, which may keep it
}

// ExecuteStream is like [Client.Execute], but calls emit with the output as it comes, up to
// MaxOutput bytes of each stream, and returns a result without output. A command that could
// not be started has no event with a PID. An error of emit kills the command.
func (c *Client) ExecuteStream(ctx context.Context, t Target, r ExecuteRequest, emit func(ExecuteEvent) error) (
	ExecuteResult, error) {
	if r.MaxOutput <= 0 {
		r.MaxOutput = DefaultMaxOutput
	}
	stdout, stderr := counted{left: r.MaxOutput}, counted{left: r.MaxOutput}
	end, err := c.execute(ctx, t, r.message(false), func(event *process.ProcessEvent) error {
		if start := event.GetStart(); start != nil {
			return emit(ExecuteEvent{PID: int(start.GetPid())})
		}
		if b := stdout.take(event.GetData().GetStdout()); len(b) > 0 {
			return emit(ExecuteEvent{Stream: Stdout, Data: b})
		}
		if b := stderr.take(event.GetData().GetStderr()); len(b) > 0 {
			return emit(ExecuteEvent{Stream: Stderr, Data: b})
		}
		return nil
	})
	if err != nil {
		return ExecuteResult{}, err
	}
	return result(end, stdout.cut, stderr.cut), nil
}

// counted passes on the first bytes of a stream and notes whether there were more.
type counted struct {
	left int64 // bytes still to pass on
	cut  bool  // there were more
}

// take returns the part of b, the next bytes, that is passed on.
func (c *counted) take(b []byte) []byte {
	if int64(len(b)) > c.left {
		c.cut = true
		b = b[:c.left]
	}
	c.left -= int64(len(b))
	return b
}
