package agent

import (
	"fmt"
	"os"
	"path"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// spawner makes processes, one at a time, on a thread of its own that moves
// through the control groups. (Go makes them one at a time anyway: it holds
// the parent until the child has called exec.)
type spawner struct {
	groups *groups
	reaper *reaper
	work   chan *spawn
}

// spawn is one process to make.
type spawn struct {
	path string // of the program
	argv []string
	attr *syscall.ProcAttr

	group *group                    // result
	pid   int                       // result
	ended <-chan syscall.WaitStatus // result: its end, once, after it was reaped
	err   error                     // result
	done  chan struct{}
}

func newSpawner(g *groups, r *reaper) *spawner {
	s := &spawner{groups: g, reaper: r, work: make(chan *spawn)}
	go s.run()
	return s
}

func (s *spawner) run() {
	runtime.LockOSThread() // never unlocked: the thread's group is its own
	for w := range s.work {
		s.one(w)
		close(w.done)
	}
}

// start makes the process. On success the caller gives the group back when the
// command has ended.
func (s *spawner) start(w *spawn) error {
	gr, err := s.groups.take()
	if err != nil {
		return err
	}
	w.group, w.done = gr, make(chan struct{})
	s.work <- w
	<-w.done
	if w.err != nil {
		s.groups.give(gr)
	}
	return w.err
}

func (s *spawner) one(w *spawn) {
	if err := w.group.enter(); err != nil {
		w.err = fmt.Errorf("entering a control group: %w", err)
		return
	}
	w.pid, w.ended, w.err = s.reaper.fork(func() (int, error) {
		return syscall.ForkExec(w.path, w.argv, w.attr)
	})
	if err := s.groups.goHome(); err != nil && w.err == nil {
		// The next command enters a group of its own before it forks; only this
		// group would never look empty.
		w.err = fmt.Errorf("leaving a control group: %w", err)
	}
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
