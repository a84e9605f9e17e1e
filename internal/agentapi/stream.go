package agentapi

import (
	"context"

	"github.com/cayhq/cay/internal/agentapi/process"
)

// ExecuteEvent is what happens to a command before its end.
type ExecuteEvent struct {
	PID    int    // it was started, and is this process; or 0 and
	Stream Stream // which of its outputs
	Data   []byte // this is of, emit's own
}

// ExecuteStream is [Client.Execute] that hands the output over as it comes, up to MaxOutput
// bytes of each stream. The result has none. A command that could not be started has no
// event with a pid. An error of emit kills the command.
func (c *Client) ExecuteStream(ctx context.Context, t Target, r ExecuteRequest, emit func(ExecuteEvent) error) (ExecuteResult, error) {
	if err := r.Check(); err != nil {
		return ExecuteResult{}, err
	}
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

// counted lets through the first bytes and notes that there were more.
type counted struct {
	left int64
	cut  bool
}

func (c *counted) take(b []byte) []byte {
	if int64(len(b)) > c.left {
		c.cut = true
		b = b[:c.left]
	}
	c.left -= int64(len(b))
	return b
}
