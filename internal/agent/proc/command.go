package proc

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

	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agentapi/process"
)

const (
	// outputGrace is the time for which an ended command's output stays open for
	// processes that it left in the background, as in docker exec and ssh without a
	// terminal. The command's own output is in the pipes when it ends and is never
	// lost; the time is for the last line of, say, a process substitution. A shorter
	// time loses such lines; a command that leaves a job with its output open takes
	// this much longer.
	outputGrace = 100 * time.Millisecond

	// killPatience limits the time in which killed processes die. They need it only
	// in a sandbox with hardly any CPU; a shorter time gives errors there.
	killPatience = 15 * time.Second

	outputChunk = 32 << 10 // bytes of one read from a pipe, as in E2B
	ptyChunk    = 16 << 10 // bytes of one read from a terminal, as in E2B

	// maxLeftover limits the bytes that are read at the end of outputGrace from a
	// pipe that a background job keeps full. It is the largest pipe that Linux
	// allows a user; less would lose output of the command itself.
	maxLeftover = 1 << 20
)

// command is one process with all its descendants. All methods are safe for
// concurrent use.
type command struct {
	pid      int
	tag      *string
	config   *process.ProcessConfig
	started  time.Time
	limit    int64     // bytes of each stream that are sent; 0 means no limit
	detached *detached // nil unless the command outlives the call that started it

	ended  <-chan syscall.WaitStatus
	exited chan struct{} // closed when the process has been reaped
	done   chan struct{} // closed when end is set and sent

	oomKilled atomic.Bool
	timedOut  atomic.Bool

	groupName string     // name of the group, valid while the command runs
	groupMu   sync.Mutex // held while the group's processes are killed
	// +checklocks:groupMu
	group *group // nil when given back

	stdin *os.File // nil without one
	pty   *os.File // nil without a terminal

	input chan struct{} // has a token while an input is written; closing does not wait and interrupts it

	mu sync.Mutex
	// +checklocks:mu
	subscribers []*subscriber // replaced, never changed
	// +checklocks:mu
	end *process.EndEvent
}

// subscriber is a client that receives a command's events. Its send blocks the
// command's output while the client does not read, as a pipe does.
type subscriber struct {
	mu sync.Mutex
	// +checklocks:mu
	send func(*process.ProcessEvent) error // nil when gone
}

// deliver sends the event unless the subscriber is gone. A failure marks the
// subscriber as gone.
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

// subscribe adds a subscriber, which gets the events from now on. If the command has
// ended it adds nothing and reports false.
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

// unsubscribe removes a subscriber and returns when nothing is being sent to it.
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

// ending returns how the command ended, nil while it runs.
func (c *command) ending() *process.EndEvent {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.end
}

// groupTaken returns the group of a command that has been started and not run yet, and its count of
// uses.
func (c *command) groupTaken() (*group, int) {
	c.groupMu.Lock()
	defer c.groupMu.Unlock()
	return c.group, c.group.taken
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
	event     *process.ProcessEvent // reused for every piece of output
	data      *[]byte               // the part of event that changes
	chunk     int
	answered  chan struct{} // closed when the output that belongs to the answer has been sent
	truncated bool          // valid after answered is closed
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

// pump sends the stream's output until its end, or until the read deadline that
// supervise sets. Then it reads on and discards the output, so that writing neither
// blocks nor kills background jobs.
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
		if err != nil { // io.EOF, or EIO from a terminal that no process has open
			close(s.answered)
			return
		}
	}
	close(s.answered)
	if s.isPTY {
		return // closing the terminal sends a hangup to the processes that still use it
	}
	buf = buf[:4<<10] // enough for a few log lines
	_, _ = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{s.file}, buf)
}

// leftover sends the bytes that are in the stream at this moment.
func (c *command) leftover(s *stream, buf []byte, emit func([]byte)) {
	_ = s.file.SetReadDeadline(time.Time{})
	raw, err := s.file.SyscallConn()
	if err != nil {
		return
	}
	for total := 0; total < maxLeftover; {
		n := 0
		// An error means that the pipe is empty or at its end.
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

// supervise waits for the command's end, calls over and sends the end to the subscribers.
func (c *command) supervise(streams []*stream, over func()) {
	status := <-c.ended
	duration := time.Since(c.started)
	close(c.exited)
	deadline := time.Now().Add(outputGrace)
	for _, s := range streams {
		// An error means that the stream has ended and is closed.
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
	// No process reads the input any more. A command without input gives an error, which is fine.
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

// endEvent describes a wait status as E2B's server does.
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

// stop kills the command and all its descendants and returns when they are gone. It
// does nothing if the command has ended, and leaves processes that it left behind
// alone.
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

// stopAt stops the command at a time, unless it has ended before. It ignores errors,
// since the command's client has gone.
func (c *command) stopAt(end time.Time) {
	select {
	case <-c.done:
	case <-time.After(time.Until(end)):
		_ = c.stop(true)
	}
}

// signal sends a signal to the command and its process group. With SIGKILL it
// returns when the command has been reaped and its pid is free.
func (c *command) signal(sig syscall.Signal) error {
	select {
	case <-c.exited:
		return os.ErrProcessDone
	default:
	}
	if err := syscall.Kill(-c.pid, sig); err != nil {
		// A command that has left its process group gets the signal alone.
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

// write writes input to the command's terminal or standard input. It blocks
// while the pipe is full and the command does not read.
func (c *command) write(input *process.ProcessInput) error {
	c.input <- struct{}{}
	defer func() { <-c.input }()
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
		return answer.Bad("input is missing")
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

// closeStdin closes the command's standard input, which the command sees as the end of file.
func (c *command) closeStdin() error {
	if c.stdin == nil || errors.Is(c.stdin.Close(), os.ErrClosed) {
		return errNoStdin
	}
	return nil
}
