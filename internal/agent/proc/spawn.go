package proc

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

// spawner makes processes, one at a time, on a thread that enters their control
// groups. (Go makes them one at a time anyway: it holds the parent until the child has
// called exec.)
type spawner struct {
	groups *groups
	reaper *reaper
	mu     sync.Mutex // held while a thread is not in the agent's own group
}

// spawn describes one process to make, and the result.
type spawn struct {
	path string // path of the program
	argv []string
	attr *syscall.ProcAttr

	group *group                    // result
	pid   int                       // result
	ended <-chan syscall.WaitStatus // result: receives its end, once, after it was reaped
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

// fork makes the process on the caller's thread. A thread of its own would cost two
// switches between threads in each direction.
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
		// the agent may run in a group whose processes are killed.
		return errors.Join(err, fmt.Errorf("leaving a control group: %w", home))
	}
	runtime.UnlockOSThread()
	return err
}

// lookPath finds a program as execvp does: it returns a name with a slash unchanged
// (relative to dir) and looks any other up in the PATH of env.
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

// defaultPath is the PATH of commands for which none is set, Debian's for root.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// closeAll closes files and ignores errors. Use it only where an error cannot mean lost
// data.
func closeAll(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			_ = f.Close()
		}
	}
}
