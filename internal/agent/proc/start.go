package proc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/agentapi/process"
	"github.com/cayhq/cay/internal/fault"
)

const (
	// maxStart limits the body of POST /start, in bytes: two commands of 64 KiB, escaped.
	// A longer body is refused.
	maxStart = 1 << 20

	// startLogSize is the size at which the start command's log is rotated, in bytes. There
	// are at most two files of that size; the smallest disk has 64 MiB.
	startLogSize = 4 << 20

	// startTailSize and startTailLines limit the part of a start command's output that an
	// error shows.
	startTailSize  = 2 << 10 // bytes
	startTailLines = 20
)

// startTag is the tag of the start command in lists of processes.
const startTag = "start_command"

// starter starts the sandbox's start command. It is a command like any other, except that
// its output goes to a log inside; it ends by itself or with the sandbox.
type starter struct {
	processes *Processes
	logPath   string
	started   atomic.Bool
}

// start answers POST /start as soon as the command is ready.
func (s *starter) start(w http.ResponseWriter, r *http.Request) {
	var req agentapi.StartRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxStart)).Decode(&req); err != nil {
		answer.Error(w, answer.Bad("start: %s", err))
		return
	}
	if s.started.Swap(true) {
		answer.Error(w, answer.Bad("start: the start command was started before"))
		return
	}
	c, log, err := s.launch(req)
	if err != nil {
		answer.Error(w, answer.New(fault.CodeStartFailed, "the start command could not be started: %s", err))
		return
	}
	if req.Ready != nil {
		own, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
		if err := s.await(r.Context(), c, req, own); err != nil {
			answer.Error(w, answer.New(fault.CodeStartFailed, "the start command %s; %s", err, log.last()))
			return
		}
	}
	w.WriteHeader(http.StatusNoContent)
}

// launch starts the process. It belongs to no call; only its log receives its output.
func (s *starter) launch(req agentapi.StartRequest) (*command, *startLog, error) {
	who, err := s.processes.userOf(nil, req.User)
	if err != nil {
		return nil, nil, err
	}
	cfg := shell(req.Command)
	if len(req.Args) > 0 {
		cfg = &process.ProcessConfig{Cmd: req.Args[0], Args: req.Args[1:]}
	}
	l, err := s.processes.prepare(&process.StartRequest{Process: cfg, Tag: new(startTag), Stdin: new(false)}, who)
	if err != nil {
		return nil, nil, err
	}
	log, err := openStartLog(s.logPath)
	if err != nil {
		return nil, nil, err
	}
	c, streams, err := s.processes.launch(l)
	if err != nil {
		log.close()
		return nil, nil, startProblem(l, err)
	}
	c.subscribe(log.take)
	s.processes.run(c, streams, nil)
	return c, log, nil
}

// shell returns the process that runs a command line with /bin/sh.
func shell(line string) *process.ProcessConfig {
	return &process.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", line}}
}

// howEnded describes the end of a command in words, as a predicate.
func howEnded(end *process.EndEvent) string {
	text := fmt.Sprintf("ended with exit code %d", end.GetExitCode())
	if end.GetSignal() != 0 {
		text = fmt.Sprintf("was ended by signal %d (%s)", end.GetSignal(), syscall.Signal(end.GetSignal()))
	}
	if end.GetOomKilled() {
		text += ", out of memory"
	}
	return text
}

// startLog writes a start command's output to a file and keeps one rotated file beside it.
type startLog struct {
	path string

	mu sync.Mutex
	// +checklocks:mu
	file *os.File
	// +checklocks:mu
	size int64 // bytes
	// +checklocks:mu
	tail []byte // the last startTailSize bytes of the output
}

// openStartLog creates the log. It removes a file that the image has in its place, which is
// not this sandbox's output.
func openStartLog(path string) (*startLog, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making its log: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("making its log: %w", err)
	}
	file, err := createLog(path)
	if err != nil {
		return nil, fmt.Errorf("making its log: %w", err)
	}
	return &startLog{path: path, file: file}, nil
}

// createLog creates a file. It fails if the path exists, also as a symbolic link.
func createLog(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|os.O_EXCL, 0o644)
}

// take adds an event's output to the log. It is a subscriber's send and never fails: a
// subscriber that fails is dropped, and a full disk may have room later.
func (l *startLog) take(ev *process.ProcessEvent) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if end := ev.GetEnd(); end != nil {
		text := "cay: the start command " + howEnded(end) + "\n"
		if n := len(l.tail); n > 0 && l.tail[n-1] != '\n' {
			text = "\n" + text
		}
		l.writeLocked([]byte(text))
		closeAll(l.file)
		return nil
	}
	for _, b := range [][]byte{ev.GetData().GetStdout(), ev.GetData().GetStderr()} {
		l.writeLocked(b)
		l.tail = append(l.tail, b...)
		l.tail = append(l.tail[:0], l.tail[max(0, len(l.tail)-startTailSize):]...)
	}
	return nil
}

func (l *startLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	closeAll(l.file)
}

// writeLocked appends to the file, which it rotates first if it is full.
//
// +checklocks:l.mu
func (l *startLog) writeLocked(b []byte) {
	if l.size += int64(len(b)); l.size > startLogSize {
		l.turnLocked()
		l.size = int64(len(b))
	}
	// Output that does not fit on the disk is lost.
	_, _ = l.file.Write(b)
}

// turnLocked renames the file and creates a new one. If a process inside has made that
// impossible, it truncates the file, so that the file does not grow without end.
//
// +checklocks:l.mu
func (l *startLog) turnLocked() {
	err := os.Rename(l.path, l.path+".1")
	if err == nil {
		var next *os.File
		if next, err = createLog(l.path); err == nil {
			closeAll(l.file)
			l.file = next
		}
	}
	if err != nil {
		_ = l.file.Truncate(0)
	}
}

// last returns the end of the output for the text of an error.
func (l *startLog) last() string {
	l.mu.Lock()
	text := string(l.tail)
	l.mu.Unlock()
	if len(text) == startTailSize { // the first of several lines is probably incomplete
		if _, rest, ok := strings.Cut(text, "\n"); ok && rest != "" {
			text = rest
		}
	}
	lines := strings.Split(strings.TrimSpace(strings.ToValidUTF8(text, "?")), "\n")
	text = strings.Join(lines[max(0, len(lines)-startTailLines):], "\n")
	if text == "" {
		return "it wrote nothing"
	}
	return "its last output:\n" + text
}

// await waits until the command is ready. Its error continues a sentence that begins with
// "the start command".
func (s *starter) await(ctx context.Context, c *command, req agentapi.StartRequest, own *net.TCPAddr) error {
	within := time.Duration(req.Ready.TimeoutMs) * time.Millisecond
	ctx, cancel := context.WithDeadline(ctx, c.started.Add(within))
	defer cancel()
	check := readyCheck{processes: s.processes, ready: req.Ready, own: own, user: req.User}
	var last error
	for pause := firstPause; ; pause = min(pause*5/4, longestPause) {
		err := check.do(ctx)
		if err == nil {
			return nil
		}
		if last == nil || ctx.Err() == nil { // the error of an interrupted check says nothing new
			last = err
		}
		if end := s.over(c); end != nil {
			return fmt.Errorf("%s before it was ready", howEnded(end))
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return fmt.Errorf("was not ready within %s: %w", within, last)
		}
	}
}

// over returns the end of the command, nil while it runs. A command that exits with 0 and
// leaves processes behind counts as running: services that put themselves into the
// background start so.
func (s *starter) over(c *command) *process.EndEvent {
	select {
	case <-c.done:
	default:
		return nil
	}
	end := c.ending()
	if end.GetExited() && end.GetExitCode() == 0 && s.processes.spawner.groups.lingers(c.groupName) {
		return nil
	}
	return end
}
