package agent

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

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/agentapi/process"
)

const (
	// maxStart is how long the body of POST /start may be, bytes: two commands of 64 KiB,
	// escaped.
	maxStart = 1 << 20

	// startLogSize is at what size the start command's log is put aside, bytes. There are
	// two of that size at the most; the smallest disk has 64 MiB.
	startLogSize = 4 << 20

	// What an error shows of a start command's output.
	startTailSize  = 2 << 10 // bytes
	startTailLines = 20
)

// startTag names the start command to who lists processes.
const startTag = "start_command"

// starter starts the sandbox's start command: a command as any other, whose output goes
// to a log inside, and that ends when it likes or with the sandbox.
type starter struct {
	processes *processes
	logPath   string
	started   atomic.Bool
}

// start answers POST /start, when the command is ready.
func (s *starter) start(w http.ResponseWriter, r *http.Request) {
	var req agentapi.StartRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxStart)).Decode(&req); err != nil {
		httpError(w, badRequest("start: %s", err))
		return
	}
	if s.started.Swap(true) {
		httpError(w, badRequest("start: the start command was started before"))
		return
	}
	c, log, err := s.launch(req)
	if err != nil {
		httpError(w, newProblem(agentapi.CodeStartFailed, "the start command could not be started: %s", err))
		return
	}
	if req.Ready != nil {
		own, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
		if err := s.await(r.Context(), c, req, own); err != nil {
			httpError(w, newProblem(agentapi.CodeStartFailed, "the start command %s; %s", err, log.last()))
			return
		}
	}
	w.WriteHeader(http.StatusNoContent)
}

// launch makes the process. It is one of nobody's call: what listens to it is its log.
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

// shell is a command line as /bin/sh reads it.
func shell(line string) *process.ProcessConfig {
	return &process.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", line}}
}

// howEnded says in words how a command ended.
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

// startLog is a start command's output in a file, the part before in another one.
type startLog struct {
	path string

	mu sync.Mutex
	// +checklocks:mu
	file *os.File
	// +checklocks:mu
	size int64 // bytes
	// +checklocks:mu
	tail []byte // the last of it
}

// openStartLog makes the log anew: what the image has in its place is not this sandbox's.
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

// createLog makes a file that is not there, through no link that somebody put there.
func createLog(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|os.O_EXCL, 0o644)
}

// take is a subscriber's send. It never fails: who cannot be sent to is left out from
// then on, and a disk that is full may have room later.
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

// writeLocked adds to the file.
//
// +checklocks:l.mu
func (l *startLog) writeLocked(b []byte) {
	if l.size += int64(len(b)); l.size > startLogSize {
		l.turnLocked()
		l.size = int64(len(b))
	}
	// What does not fit on the disk is lost.
	_, _ = l.file.Write(b)
}

// turnLocked puts the file aside and begins a new one. Where somebody has made that
// impossible, the file begins anew itself, so that it does not grow without end.
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

// last is the end of the output for an error's text.
func (l *startLog) last() string {
	l.mu.Lock()
	text := string(l.tail)
	l.mu.Unlock()
	if len(text) == startTailSize { // it begins in the middle of a line, if it has several
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

// await returns when the command is ready, or with what it did instead, to be read after
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
		if last == nil || ctx.Err() == nil { // one that was broken off says nothing new
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

// over is how the command ended; nil while it runs. One that ended well and left
// processes behind goes on in them: that is how services start that put themselves
// into the background.
func (s *starter) over(c *command) *process.EndEvent {
	select {
	case <-c.done:
	default:
		return nil
	}
	if c.end.GetExited() && c.end.GetExitCode() == 0 && s.processes.spawner.groups.lingers(c.groupName) {
		return nil
	}
	return c.end
}
