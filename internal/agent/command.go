package agent

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agentapi/process"
)

const (
	// outputGrace is how long an ended command's output stays open for what it
	// left in the background, as docker exec and ssh do without a terminal. What
	// the command itself wrote is in the pipes when it ends and is never lost;
	// this is for a last line of, say, a process substitution. A command that
	// leaves a job behind with its output open costs this much more.
	outputGrace = 100 * time.Millisecond

	// killPatience is how long killed processes may take to die, which they do
	// unless the sandbox has hardly any CPU.
	killPatience = 15 * time.Second

	outputChunk = 32 << 10 // bytes read at once from a pipe
	ptyChunk    = 16 << 10 // and from a terminal: E2B's sizes

	// maxLeftover bounds what is read at the grace's end from a pipe that a
	// background job keeps full, bytes. The largest pipe Linux allows a user.
	maxLeftover = 1 << 20
)

// command is one process with all that descends from it. All methods are safe
// for concurrent use.
type command struct {
	pid     int
	tag     *string
	config  *process.ProcessConfig
	started time.Time
	limit   int64 // bytes of each stream that are sent; 0 is no limit
	kept    *kept // nil unless clients come back to it

	ended  <-chan syscall.WaitStatus
	exited chan struct{} // closed when the process has been reaped
	done   chan struct{} // closed when end is set and was sent

	oomKilled atomic.Bool
	timedOut  atomic.Bool

	groupName string     // of the group, while the command runs
	groupMu   sync.Mutex // held while the group's processes are killed
	group     *group     // nil when given back

	stdin *os.File // nil without one
	pty   *os.File // nil without a terminal

	inputMu sync.Mutex // orders inputs; not held by closing, which breaks them off

	mu          sync.Mutex
	subscribers []*subscriber // replaced, never changed
	end         *process.EndEvent
}

// subscriber is a client that listens to a command. Its send blocks the
// command's output when the client does not read, as a pipe would.
type subscriber struct {
	mu   sync.Mutex
	send func(*process.ProcessEvent) error // nil when gone
}

// deliver sends the event unless the subscriber is gone. One that cannot be
// sent to is gone.
func (s *subscriber) deliver(ev *process.ProcessEvent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.send == nil {
		return
	}
	if err := s.send(ev); err != nil {
		s.send = nil
	}
}

// subscribe adds a listener; it gets what happens from now on. On a command that
// has ended it reports false and adds nothing.
func (c *command) subscribe(send func(*process.ProcessEvent) error) (*subscriber, bool) {
	s := &subscriber{send: send}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.end != nil {
		return s, false
	}
	c.subscribers = append(c.subscribers[:len(c.subscribers):len(c.subscribers)], s)
	return s, true
}

// unsubscribe returns when nothing is being sent any more.
func (c *command) unsubscribe(s *subscriber) {
	s.mu.Lock()
	s.send = nil
	s.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	var left []*subscriber
	for _, other := range c.subscribers {
		if other != s {
			left = append(left, other)
		}
	}
	c.subscribers = left
}

func (c *command) publish(ev *process.ProcessEvent) {
	c.mu.Lock()
	subscribers := c.subscribers
	c.mu.Unlock()
	for _, s := range subscribers {
		s.deliver(ev)
	}
}

// stream is one of a command's outputs.
type stream struct {
	file      *os.File
	event     *process.ProcessEvent // sent again and again
	data      *[]byte               // the part of event that changes
	chunk     int
	answered  chan struct{} // closed when what belongs to the answer has been sent
	truncated bool          // read after answered
	isPTY     bool
}

func newStream(f *os.File, kind string) *stream {
	s := &stream{file: f, chunk: outputChunk, answered: make(chan struct{})}
	data := &process.DataEvent{}
	switch kind {
	case "stdout":
		out := &process.DataEvent_Stdout{}
		data.Output, s.data = out, &out.Stdout
	case "stderr":
		out := &process.DataEvent_Stderr{}
		data.Output, s.data = out, &out.Stderr
	case "pty":
		out := &process.DataEvent_Pty{}
		data.Output, s.data = out, &out.Pty
		s.chunk, s.isPTY = ptyChunk, true
	}
	s.event = &process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: data}}
	return s
}

// pump sends what comes out of the stream until its end, or until the read
// deadline that supervise sets passes. Then it goes on reading for nobody, so that
// background jobs neither block nor die of writing.
func (c *command) pump(s *stream) {
	defer s.file.Close()
	buf := make([]byte, s.chunk)
	sent := int64(0)
	emit := func(b []byte) {
		if c.limit > 0 && int64(len(b)) > c.limit-sent {
			s.truncated = true
			b = b[:c.limit-sent]
		}
		if len(b) > 0 {
			sent += int64(len(b))
			*s.data = b
			c.publish(s.event)
		}
	}
	for {
		n, err := s.file.Read(buf)
		emit(buf[:n])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			c.leftover(s, buf, emit)
			break
		}
		if err != nil { // io.EOF, or EIO of a terminal nobody holds any more
			close(s.answered)
			return
		}
	}
	close(s.answered)
	if s.isPTY {
		return // closing the terminal hangs up on what still uses it
	}
	buf = buf[:4<<10] // what a few log lines need
	_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{s.file}, buf)
}

// leftover sends what is in the stream at this moment.
func (c *command) leftover(s *stream, buf []byte, emit func([]byte)) {
	_ = s.file.SetReadDeadline(time.Time{})
	raw, err := s.file.SyscallConn()
	if err != nil {
		return
	}
	for total := 0; total < maxLeftover; {
		n := 0
		// An error means nothing there, as at the end of file.
		_ = raw.Read(func(fd uintptr) bool {
			n, _ = unix.Read(int(fd), buf)
			return true
		})
		if n <= 0 {
			return
		}
		emit(buf[:n])
		total += n
	}
}

// supervise waits for the command's end, publishes it and calls over.
func (c *command) supervise(streams []*stream, over func()) {
	status := <-c.ended
	duration := time.Since(c.started)
	close(c.exited)
	deadline := time.Now().Add(outputGrace)
	for _, s := range streams {
		// A stream that has ended is closed already.
		_ = s.file.SetReadDeadline(deadline)
	}
	for _, s := range streams {
		<-s.answered
	}
	end := endEvent(status)
	end.DurationUs = duration.Microseconds()
	end.TimedOut = c.timedOut.Load()
	end.OomKilled = c.oomKilled.Load()
	for _, s := range streams {
		switch (*s.event).GetData().Output.(type) {
		case *process.DataEvent_Stderr:
			end.StderrTruncated = s.truncated
		default:
			end.StdoutTruncated = s.truncated
		}
	}
	// Whoever still writes input, writes it for nobody. "Has none" is as good.
	_ = c.closeStdin()

	c.groupMu.Lock()
	gr := c.group
	c.group = nil
	c.groupMu.Unlock()
	gr.owner.give(gr)

	c.mu.Lock()
	c.end = end
	subscribers := c.subscribers
	c.mu.Unlock()
	over()
	ev := &process.ProcessEvent{Event: &process.ProcessEvent_End{End: end}}
	for _, s := range subscribers {
		s.deliver(ev)
	}
	close(c.done)
}

// endEvent has what E2B's server says about a status.
func endEvent(status syscall.WaitStatus) *process.EndEvent {
	if status.Signaled() {
		text := "signal: " + status.Signal().String()
		return &process.EndEvent{ExitCode: -1, Status: text, Error: &text, Signal: int32(status.Signal())}
	}
	code := status.ExitStatus()
	end := &process.EndEvent{ExitCode: int32(code), Exited: true, Status: fmt.Sprintf("exit status %d", code)}
	if code != 0 {
		text := end.Status
		end.Error = &text
	}
	return end
}

// stop kills the command and everything that descends from it, unless the
// command has ended; what an ended one left behind is not touched. It returns
// when all are gone.
func (c *command) stop(timedOut bool) error {
	c.groupMu.Lock()
	defer c.groupMu.Unlock()
	select {
	case <-c.exited:
		return nil
	default:
	}
	if c.group == nil {
		return nil
	}
	if timedOut {
		c.timedOut.Store(true)
	}
	return c.group.kill(killPatience)
}

// stopAt stops the command at a time, unless it has ended before. It is for a
// command whose client has gone: nobody is left to tell what could not be killed.
func (c *command) stopAt(end time.Time) {
	select {
	case <-c.done:
	case <-time.After(time.Until(end)):
		_ = c.stop(true)
	}
}

// signal sends a signal to the command and its process group. After SIGKILL it
// returns when the command has been reaped, so that its pid is free.
func (c *command) signal(sig syscall.Signal) error {
	select {
	case <-c.exited:
		return os.ErrProcessDone
	default:
	}
	if err := syscall.Kill(-c.pid, sig); err != nil {
		// The leader of a group that it has left is signalled alone.
		if err := syscall.Kill(c.pid, sig); err != nil {
			return fmt.Errorf("signalling process %d: %w", c.pid, err)
		}
	}
	if sig == syscall.SIGKILL {
		select {
		case <-c.exited:
		case <-time.After(killPatience):
			return fmt.Errorf("process %d is still there %s after it was killed", c.pid, killPatience)
		}
	}
	return nil
}

var (
	errNoStdin = errors.New("the process has no standard input to write to")
	errNoPTY   = errors.New("the process has no terminal")
)

// write gives the command input, to its terminal or its standard input. It
// blocks while the command does not read and its pipe is full.
func (c *command) write(input *process.ProcessInput) error {
	c.inputMu.Lock()
	defer c.inputMu.Unlock()
	var to *os.File
	var b []byte
	switch in := input.GetInput().(type) {
	case *process.ProcessInput_Stdin:
		if to, b = c.stdin, in.Stdin; to == nil {
			return errNoStdin
		}
	case *process.ProcessInput_Pty:
		if to, b = c.pty, in.Pty; to == nil {
			return errNoPTY
		}
	default:
		return badRequest("input is missing")
	}
	if len(b) == 0 {
		return nil
	}
	_, err := to.Write(b)
	if errors.Is(err, os.ErrClosed) {
		return errNoStdin
	}
	if err != nil {
		return fmt.Errorf("writing input: %w", err)
	}
	return nil
}

// closeStdin is the end of file for the command.
func (c *command) closeStdin() error {
	if c.stdin == nil || errors.Is(c.stdin.Close(), os.ErrClosed) {
		return errNoStdin
	}
	return nil
}
