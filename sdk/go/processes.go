package cay

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"
)

// maxOutputEvent limits an event with output, bytes. A piece of output has 64 KiB, or up to 8 MiB
// that waited to be sent, and JSON may escape it to six times its size; a lower limit would refuse
// such events.
const maxOutputEvent = 64 << 20

// Streams of output.
const (
	StreamStdout   = "stdout"
	StreamStderr   = "stderr"
	StreamTerminal = "terminal"
)

// Shell names the shell that runs a command line.
type Shell string

// Values of Shell.
const (
	ShellBash Shell = "bash" // bash -c, with the bash in the PATH
	ShellSh   Shell = "sh"   // /bin/sh -c
)

// Output reports a piece of a process's output, the process's start, or a gap in its output.
type Output struct {
	PID int // of a process that was started; the other fields are then not set

	Stream string // StreamStdout, StreamStderr or StreamTerminal; "" for a gap
	Offset int64  // of the first byte, counting all streams; 0 in an execution that is not detached
	Data   []byte
	Lost   int64 // length of a gap that begins at Offset, bytes: they are no longer kept
}

// ExecuteStream runs a command, calls on with its output as it comes, and returns its end. When ctx
// ends or on fails, the command is killed; with r.Detach it goes on instead, and can be followed
// again. If the stream breaks off, ExecuteStream returns [io.ErrUnexpectedEOF].
func (c *Client) ExecuteStream(ctx context.Context, id string, r ExecuteRequest, on func(Output) error) (
	*ProcessExit, error) {
	resp, err := open(c.wire.ExecuteCommand(ctx, id, r, acceptEvents))
	if err != nil {
		return nil, err
	}
	return followed(resp, on)
}

// StartProcess starts a process that outlives the call.
func (c *Client) StartProcess(ctx context.Context, id string, r StartProcessRequest) (*Process, error) {
	return decode[Process](c.wire.StartProcess(ctx, id, r))
}

// ListProcesses returns the processes that calls have started and that still run, and the ended
// ones that are still known, newest first.
func (c *Client) ListProcesses(ctx context.Context, id string) ([]Process, error) {
	l, err := decode[processList](c.wire.ListProcesses(ctx, id))
	if err != nil {
		return nil, err
	}
	return l.Processes, nil
}

// GetProcess returns the process with a pid or tag.
func (c *Client) GetProcess(ctx context.Context, id, process string) (*Process, error) {
	return decode[Process](c.wire.GetProcess(ctx, id, process))
}

// WaitProcess returns a process when it has ended, or as it is after the time within, which is
// up to 5 minutes.
func (c *Client) WaitProcess(ctx context.Context, id, process string, within time.Duration) (*Process, error) {
	return decode[Process](c.wire.WaitProcess(ctx, id, process, &waitProcessParams{Timeout: new(within.String())}))
}

// SignalProcess sends a signal, by name or number, to a process and its process group.
func (c *Client) SignalProcess(ctx context.Context, id, process, signal string) error {
	return done(c.wire.SignalProcess(ctx, id, process, signalRequest{Signal: signal}))
}

// KillProcess kills a process with all its descendants, and makes the sandbox forget it.
func (c *Client) KillProcess(ctx context.Context, id, process string) error {
	return done(c.wire.KillProcess(ctx, id, process))
}

// WriteProcessStdin writes body, up to 8 MiB, to a process's input as it comes, and returns the
// number of bytes that the input took; with end it then ends the input. It does not close body.
func (c *Client) WriteProcessStdin(ctx context.Context, id, process string, body io.Reader, end bool) (int64, error) {
	p := writeProcessStdinParams{}
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
		body = struct{ io.Reader }{body} // net/http would close the caller's body
	}
	setLength := func(_ context.Context, r *http.Request) error {
		r.ContentLength = size
		return nil
	}
	taken, err := decode[inputTaken](c.wire.WriteProcessStdinWithBody(ctx, id, process, &p,
		"application/octet-stream", body, setLength))
	if err != nil {
		return 0, err
	}
	return taken.Written, nil
}

// ResizeProcessTerminal sets the size of a process's terminal.
func (c *Client) ResizeProcessTerminal(ctx context.Context, id, process string, size TerminalSize) error {
	return done(c.wire.ResizeProcessTerminal(ctx, id, process, size))
}

// ProcessOutput returns the kept output of a process from an offset on.
func (c *Client) ProcessOutput(ctx context.Context, id, process string, offset int64) (*ProcessOutput, error) {
	return decode[ProcessOutput](c.wire.GetProcessOutput(ctx, id, process, &getProcessOutputParams{Offset: &offset}))
}

// Bytes returns the output as the process wrote it; it decodes Data if Encoding is set.
func (p *OutputPiece) Bytes() ([]byte, error) { return outputBytes(p.Data, p.Encoding != nil) }

// FollowProcess calls on with a process's output from an offset on, first with what is kept, then
// as it comes, and returns the process's end. If the stream breaks off, FollowProcess returns
// [io.ErrUnexpectedEOF]; a call with the offset after the last byte then continues. An error of on
// ends FollowProcess.
func (c *Client) FollowProcess(ctx context.Context, id, process string, offset int64, on func(Output) error) (
	*ProcessExit, error) {
	p := &getProcessOutputParams{Offset: &offset}
	resp, err := open(c.wire.GetProcessOutput(ctx, id, process, p, acceptEvents))
	if err != nil {
		return nil, err
	}
	return followed(resp, on)
}

// followed calls on with the output of a stream, and returns the end of the process.
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
			return nil // a newer server sent it
		}
		return on(out)
	})
	if err != nil {
		return nil, err
	}
	return exit, nil
}

// outputOf returns the output of an event, and whether the event is of a known type.
func outputOf(event string, data []byte) (out Output, known bool, err error) {
	switch event {
	case "started":
		var started processStarted
		err = json.Unmarshal(data, &started)
		return Output{PID: started.PID}, true, err
	case "lost":
		var lost outputLost
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
