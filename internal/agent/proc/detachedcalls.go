package proc

import (
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/agentapi/process"
	"github.com/cayhq/cay/internal/fault"
)

const (
	// maxStartProcess limits the body of POST /processes, in bytes: the host takes 8 MiB for
	// a command, and the input comes as base64. A longer body is refused.
	maxStartProcess = 16 << 20

	// maxListed limits the processes in a list; the newest are listed.
	maxListed = 1000

	// idleFrames is the interval of idle frames in a stream without output. With a longer
	// one the host learns later that the agent is gone.
	idleFrames = 30 * time.Second
)

func (k *keeper) routes(mux *http.ServeMux) {
	mux.HandleFunc("POST /processes", k.post)
	mux.HandleFunc("GET /processes", k.list)
	mux.HandleFunc("GET /processes/{process}", k.named(k.get))
	mux.HandleFunc("DELETE /processes/{process}", k.named(k.remove))
	mux.HandleFunc("GET /processes/{process}/wait", k.named(k.wait))
	mux.HandleFunc("GET /processes/{process}/output", k.named(k.output))
	mux.HandleFunc("POST /processes/{process}/signal", k.named(k.signal))
	mux.HandleFunc("POST /processes/{process}/resize", k.named(k.resize))
	mux.HandleFunc("POST /processes/{process}/input", k.named(k.input))
}

// named finds the command that a path names: by its pid, else by its tag.
func (k *keeper) named(do func(http.ResponseWriter, *http.Request, *command) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ref := r.PathValue("process")
		sel := &process.ProcessSelector{Selector: &process.ProcessSelector_Tag{Tag: ref}}
		if pid, err := strconv.ParseUint(ref, 10, 32); err == nil {
			sel.Selector = &process.ProcessSelector_Pid{Pid: uint32(pid)}
		}
		c, err := k.processes.find(sel)
		if err != nil {
			answer.Error(w, answer.New(fault.CodeProcessNotFound, "there is no process %q, or it ended a while ago", ref))
			return
		}
		if err := do(w, r, c); err != nil {
			answer.Error(w, err)
		}
	}
}

func (k *keeper) post(w http.ResponseWriter, r *http.Request) {
	var req agentapi.StartProcess
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxStartProcess)).Decode(&req); err != nil {
		answer.Error(w, answer.Bad("processes: %s", err))
		return
	}
	c, err := k.start(req)
	if err != nil {
		answer.Error(w, err)
		return
	}
	answer.JSON(w, http.StatusOK, c.about())
}

func (k *keeper) list(w http.ResponseWriter, _ *http.Request) {
	reply := agentapi.ProcessList{Processes: []agentapi.Process{}}
	k.processes.mu.Lock()
	all := make([]*command, 0, len(k.processes.commands))
	for _, c := range k.processes.commands {
		if c.detached != nil || c.running() {
			all = append(all, c)
		}
	}
	k.processes.mu.Unlock()
	slices.SortFunc(all, func(a, b *command) int {
		return cmp.Or(b.started.Compare(a.started), cmp.Compare(b.pid, a.pid))
	})
	for _, c := range all[:min(len(all), maxListed)] {
		reply.Processes = append(reply.Processes, c.about())
	}
	answer.JSON(w, http.StatusOK, reply)
}

func (k *keeper) get(w http.ResponseWriter, _ *http.Request, c *command) error {
	answer.JSON(w, http.StatusOK, c.about())
	return nil
}

// remove kills a process with its descendants, those that it left in the background
// included, and forgets it.
func (k *keeper) remove(w http.ResponseWriter, r *http.Request, c *command) error {
	if err := c.stop(false); err != nil {
		return err
	}
	select {
	case <-c.done:
	case <-r.Context().Done(): // a slow client may not yet have taken the last output
		return r.Context().Err()
	}
	groups := k.processes.spawner.groups
	if d := c.detached; d != nil && groups.takeAgain(d.group, d.taken) {
		err := d.group.kill(killPatience)
		groups.give(d.group)
		if err != nil {
			return err
		}
	}
	k.processes.forget(c)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (k *keeper) wait(w http.ResponseWriter, r *http.Request, c *command) error {
	ms, err := strconv.ParseInt(r.URL.Query().Get("ms"), 10, 32)
	if err != nil || ms < 0 {
		return answer.Bad("wait: ms is not a number of milliseconds")
	}
	timer := time.NewTimer(time.Duration(ms) * time.Millisecond)
	defer timer.Stop()
	select {
	case <-c.done:
	case <-timer.C:
	case <-r.Context().Done():
	}
	answer.JSON(w, http.StatusOK, c.about())
	return nil
}

func (k *keeper) signal(w http.ResponseWriter, r *http.Request, c *command) error {
	var req agentapi.SignalRequest
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<10)).Decode(&req)
	if err != nil || req.Signal < 1 || req.Signal > 64 {
		return answer.Bad("signal: not the number of a signal")
	}
	if err := c.signal(syscall.Signal(req.Signal)); errors.Is(err, os.ErrProcessDone) || errors.Is(err, syscall.ESRCH) {
		return answer.New(fault.CodeProcessEnded, "process %d has ended", c.pid)
	} else if err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (k *keeper) resize(w http.ResponseWriter, r *http.Request, c *command) error {
	var size agentapi.TerminalSize
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<10)).Decode(&size); err != nil {
		return answer.Bad("resize: %s", err)
	}
	if c.pty == nil {
		return answer.New(fault.CodeNoTerminal, "process %d has no terminal", c.pid)
	}
	if err := c.resize(&process.PTY_Size{Cols: uint32(size.Cols), Rows: uint32(size.Rows)}); errors.Is(err, os.ErrClosed) {
		return answer.New(fault.CodeProcessEnded, "process %d has ended", c.pid)
	} else if err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// input writes the body to the process as it arrives, and closes the process's input after
// it if the query has "end".
func (k *keeper) input(w http.ResponseWriter, r *http.Request, c *command) error {
	to := cmp.Or(c.pty, c.stdin)
	if to == nil {
		return answer.New(fault.CodeStdinClosed, "process %d has no input: it was started without one", c.pid)
	}
	buf := make([]byte, outputChunk)
	written := int64(0)
	for {
		n, err := r.Body.Read(buf)
		took, writeErr := c.writeSoon(to, buf[:n])
		written += int64(took)
		k.processes.guard.wake()
		switch {
		case writeErr != nil:
			return writeErr
		case errors.Is(err, io.EOF):
			if r.URL.Query().Has("end") && c.stdin != nil {
				if err := c.closeStdin(); err != nil {
					return answer.New(fault.CodeStdinClosed, "the input of process %d is closed", c.pid)
				}
			}
			answer.JSON(w, http.StatusOK, agentapi.InputReply{Written: written})
			return nil
		case err != nil:
			return answer.Bad("input: %s", err)
		}
	}
}

// writeSoon writes input and fails if the process does not read it within InputPatience.
func (c *command) writeSoon(to *os.File, b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	c.input <- struct{}{}
	defer func() { <-c.input }()
	// A file that takes no deadline is closed, and the write fails.
	_ = to.SetWriteDeadline(time.Now().Add(agentapi.InputPatience))
	n, err := to.Write(b)
	_ = to.SetWriteDeadline(time.Time{})
	switch {
	case err == nil:
		return n, nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return n, answer.New(fault.CodeStdinBlocked,
			"process %d has not read its input for %s; %d bytes of the last %d were taken",
			c.pid, agentapi.InputPatience, n, len(b))
	case errors.Is(err, os.ErrClosed), errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.EIO):
		if !c.running() {
			return n, answer.New(fault.CodeProcessEnded, "process %d has ended", c.pid)
		}
		return n, answer.New(fault.CodeStdinClosed, "the input of process %d is closed", c.pid)
	}
	return n, err
}

// output sends a process's output in frames, from an offset to the process's end, or, if the
// query has "now", to the newest byte.
func (k *keeper) output(w http.ResponseWriter, r *http.Request, c *command) error {
	offset, err := strconv.ParseInt(r.URL.Query().Get("offset"), 10, 64)
	if err != nil || offset < 0 {
		return answer.Bad("output: offset is not the number of a byte")
	}
	if c.detached == nil {
		return answer.New(fault.CodeOutputNotKept,
			"the output of process %d goes to the call that started it and is not kept", c.pid)
	}
	if _, next := c.detached.history.bounds(); offset > next {
		return answer.New(fault.CodeInvalidOffset, "the process has written %d bytes so far", next)
	}
	c.attend()
	defer c.leave(1)
	w.Header().Set("Content-Type", "application/octet-stream")
	f := follower{w: w, control: http.NewResponseController(w), command: c, next: offset}
	_, f.until = c.detached.history.bounds()
	if !r.URL.Query().Has("now") {
		f.until = -1
	}
	// An error means that the client has gone.
	_ = f.run(r)
	return nil
}

// follower sends a command's output to one client.
type follower struct {
	w       io.Writer
	control *http.ResponseController
	command *command
	next    int64 // offset of the byte to send
	until   int64 // offset at which to stop; -1 means at the process's end
}

func (f *follower) run(r *http.Request) error {
	idle := time.NewTicker(idleFrames)
	defer idle.Stop()
	if err := f.control.Flush(); err != nil { // the head of the answer tells the client that the process exists
		return err
	}
	for {
		if f.until >= 0 && f.next >= f.until {
			return f.end()
		}
		stream, data, lost, changed := f.command.detached.history.read(f.next)
		var err error
		switch {
		case lost > 0:
			err = f.send(agentapi.LostFrame(f.next, lost))
			f.next += lost
		case len(data) > 0:
			err = f.send(agentapi.Frame{Kind: stream, Offset: f.next, Payload: data})
			f.next += int64(len(data))
		case changed == nil:
			return f.end()
		default:
			select {
			case <-changed:
			case <-idle.C:
				err = f.send(agentapi.IdleFrame())
			case <-r.Context().Done():
				err = r.Context().Err()
			}
		}
		if err != nil {
			return err
		}
	}
}

// end sends the last frame, which describes the process and its end.
func (f *follower) end() error {
	about, err := json.Marshal(f.command.about())
	if err != nil {
		return err
	}
	return f.send(agentapi.EndFrame(f.next, about))
}

func (f *follower) send(frame agentapi.Frame) error {
	if _, err := frame.WriteTo(f.w); err != nil {
		return err
	}
	return f.control.Flush()
}
