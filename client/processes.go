package client

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"
)

// maxOutputEvent bounds an event with output, bytes: a piece has 64 KiB, or what waited of
// 8 MiB, which JSON makes up to six times as long.
const maxOutputEvent = 64 << 20

// Streams of output.
const (
	StreamStdout   = string(OutputPieceStreamStdout)
	StreamStderr   = string(OutputPieceStreamStderr)
	StreamTerminal = string(OutputPieceStreamTerminal)
)

// Output is a piece of what a running process writes, or what is told beside.
type Output struct {
	PID int // of the process that was started; then nothing else is set

	Stream string // StreamStdout, StreamStderr or StreamTerminal; "" with Lost
	Offset int64  // of the first byte, counting all streams; 0 in an execution that is not detached
	Data   []byte
	Lost   int64 // so many bytes from Offset on are not kept any more
}

// ExecuteStream runs a command and hands its output to on as it comes, then says how it
// ended. When ctx ends or on fails, the command is killed, unless r.Detach: then it goes on,
// and can be followed again. A stream that breaks off is an [io.ErrUnexpectedEOF].
func (c *Client) ExecuteStream(ctx context.Context, id string, r ExecuteRequest, on func(Output) error) (*ProcessExit, error) {
	resp, err := open(c.wire.ExecuteCommand(ctx, id, r, acceptEvents))
	if err != nil {
		return nil, err
	}
	return followed(resp, on)
}

// StartProcess starts a process that goes on by itself.
func (c *Client) StartProcess(ctx context.Context, id string, r StartProcessRequest) (*Process, error) {
	return decode[Process](c.wire.StartProcess(ctx, id, r))
}

// ListProcesses returns what calls have started and still runs, and what has ended and is
// still known, newest first.
func (c *Client) ListProcesses(ctx context.Context, id string) ([]Process, error) {
	l, err := decode[ProcessList](c.wire.ListProcesses(ctx, id))
	if err != nil {
		return nil, err
	}
	return l.Processes, nil
}

// GetProcess returns the process of a pid or tag.
func (c *Client) GetProcess(ctx context.Context, id, process string) (*Process, error) {
	return decode[Process](c.wire.GetProcess(ctx, id, process))
}

// WaitProcess returns a process when it has ended, or as it is after a time of up to 5
// minutes.
func (c *Client) WaitProcess(ctx context.Context, id, process string, within time.Duration) (*Process, error) {
	return decode[Process](c.wire.WaitProcess(ctx, id, process, &WaitProcessParams{Timeout: new(within.String())}))
}

// SignalProcess sends a signal, by name or number, to a process and its process group.
func (c *Client) SignalProcess(ctx context.Context, id, process, signal string) error {
	return done(c.wire.SignalProcess(ctx, id, process, SignalRequest{Signal: signal}))
}

// KillProcess kills a process with all that descends from it, and forgets it.
func (c *Client) KillProcess(ctx context.Context, id, process string) error {
	return done(c.wire.KillProcess(ctx, id, process))
}

// WriteProcessStdin writes body, up to 8 MiB, to a process's input as it comes and returns
// how much was taken; with end the input is at its end then. body is not closed.
func (c *Client) WriteProcessStdin(ctx context.Context, id, process string, body io.Reader, end bool) (int64, error) {
	p := WriteProcessStdinParams{}
	if end {
		p.Close = &end
	}
	size := int64(-1)
	if body == nil {
		body, size = http.NoBody, 0
	} else if n := sizeOf(body); n > 0 {
		size = n
	}
	if _, closes := body.(io.Closer); closes && body != http.NoBody {
		body = struct{ io.Reader }{body} // net/http would close what is the caller's
	}
	taken, err := decode[InputTaken](c.wire.WriteProcessStdinWithBody(ctx, id, process, &p, "application/octet-stream", body, func(_ context.Context, r *http.Request) error {
		r.ContentLength = size
		return nil
	}))
	if err != nil {
		return 0, err
	}
	return taken.Written, nil
}

// ResizeProcessTerminal tells a process's terminal its size.
func (c *Client) ResizeProcessTerminal(ctx context.Context, id, process string, size TerminalSize) error {
	return done(c.wire.ResizeProcessTerminal(ctx, id, process, size))
}

// ProcessOutput returns what is kept of a process's output from an offset on.
func (c *Client) ProcessOutput(ctx context.Context, id, process string, offset int64) (*ProcessOutput, error) {
	return decode[ProcessOutput](c.wire.GetProcessOutput(ctx, id, process, &GetProcessOutputParams{Offset: &offset}))
}

// Bytes is the output as the process wrote it, whatever the encoding.
func (p *OutputPiece) Bytes() ([]byte, error) { return outputBytes(p.Data, p.Encoding != nil) }

// FollowProcess hands a process's output from an offset on to f, what is kept first, then as
// it comes, and says how it ended. A stream that breaks off is an [io.ErrUnexpectedEOF]:
// follow again from the offset after the last byte. An error of f ends it.
func (c *Client) FollowProcess(ctx context.Context, id, process string, offset int64, on func(Output) error) (*ProcessExit, error) {
	resp, err := open(c.wire.GetProcessOutput(ctx, id, process, &GetProcessOutputParams{Offset: &offset}, acceptEvents))
	if err != nil {
		return nil, err
	}
	return followed(resp, on)
}

// followed reads a stream of output to its end.
func followed(resp *http.Response, on func(Output) error) (*ProcessExit, error) {
	defer resp.Body.Close()
	exit := new(ProcessExit)
	err := readEvents(resp.Body, maxOutputEvent, func(_, event string, data []byte) error {
		switch event {
		case "exit":
			if err := json.Unmarshal(data, exit); err != nil {
				return fmt.Errorf("decoding the end of the process: %w", err)
			}
			return errLast
		case "error":
			return errorOfEvent(data)
		}
		out, known, err := outputOf(event, data)
		if err != nil {
			return fmt.Errorf("decoding the event %s: %w", event, err)
		}
		if !known {
			return nil // of a newer server
		}
		return on(out)
	})
	if err != nil {
		return nil, err
	}
	return exit, nil
}

func outputOf(event string, data []byte) (out Output, known bool, err error) {
	switch event {
	case "started":
		var started ProcessStarted
		err = json.Unmarshal(data, &started)
		return Output{PID: started.PID}, true, err
	case "lost":
		var lost OutputLost
		err = json.Unmarshal(data, &lost)
		return Output{Offset: lost.Offset, Lost: lost.Bytes}, true, err
	case StreamStdout, StreamStderr, StreamTerminal:
		var piece OutputPiece
		if err = json.Unmarshal(data, &piece); err != nil {
			return out, true, err
		}
		out.Stream = event
		if piece.Offset != nil {
			out.Offset = *piece.Offset
		}
		out.Data, err = piece.Bytes()
		return out, true, err
	}
	return out, false, nil
}
