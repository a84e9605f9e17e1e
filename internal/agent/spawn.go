package agent

import (
	"errors"
	"fmt"
	"os"
	"path"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// spawner makes processes, one at a time, on a thread that moves through the
// control groups. (Go makes them one at a time anyway: it holds the parent until
// the child has called exec.)
type spawner struct {
	groups *groups
	reaper *reaper
	mu     sync.Mutex // held while a thread is not in the agent's own group
}

// spawn is one process to make.
type spawn struct {
	path string // of the program
	argv []string
	attr *syscall.ProcAttr

	group *group                    // result
	pid   int                       // result
	ended <-chan syscall.WaitStatus // result: its end, once, after it was reaped
}

func newSpawner(g *groups, r *reaper) *spawner { return &spawner{groups: g, reaper: r} }

// start makes the process. On success the caller gives the group back when the
// command has ended.
func (s *spawner) start(w *spawn) error {
	gr, err := s.groups.take()
	if err != nil {
		return err
	}
	w.group = gr
	if err := s.fork(w); err != nil {
		s.groups.give(gr)
		return err
	}
	return nil
}

// fork makes the process on the caller's thread: handing it to another costs
// two switches between threads, each way.
func (s *spawner) fork(w *spawn) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	runtime.LockOSThread()
	if err := w.group.enter(); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("entering a control group: %w", err)
	}
	var err error
	w.pid, w.ended, err = s.reaper.fork(func() (int, error) {
		return syscall.ForkExec(w.path, w.argv, w.attr)
	})
	if home := s.groups.goHome(); home != nil {
		// The thread stays locked and so ends with this goroutine: nothing else of
		// the agent runs where a command is killed.
		return errors.Join(err, fmt.Errorf("leaving a control group: %w", home))
	}
	runtime.UnlockOSThread()
	return err
}

// lookPath finds a program as execvp would: a name with a slash as it is
// (relative to dir), any other in the PATH of env.
func lookPath(name, dir string, env []string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	list := defaultPath
	for _, kv := range env {
		if value, ok := strings.CutPrefix(kv, "PATH="); ok {
			list = value
		}
	}
	found := error(syscall.ENOENT)
	for p := range strings.SplitSeq(list, ":") {
		if p == "" {
			p = "."
		}
		candidate := path.Join(p, name)
		at := candidate
		if at[0] != '/' {
			at = path.Join(dir, at)
		}
		var st unix.Stat_t
		if unix.Stat(at, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			continue
		}
		if st.Mode&0o111 == 0 {
			found = syscall.EACCES
			continue
		}
		return at, nil
	}
	return "", found
}

// defaultPath is Debian's for root: what commands get when nobody sets PATH.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// closeAll closes files whose content does not depend on it.
func closeAll(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}
