package proc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// The sandbox's kernel, gVisor, has control groups of version 1, with each controller
// in a hierarchy of its own. Each command gets a group in "pids", which contains all
// its descendants, whatever they do, and has a limit.
//
// That limit is not enough. A group's charges do not count for its parent, so that no
// group limits all commands together; and zombies are not counted. The guard covers both.
//
// The thread that makes processes moves itself into a command's group before it
// forks, because the new process inherits the groups of the forking thread. That
// costs two writes, and the process is never outside of its group.

// maxGroupKills limits the consecutive kills of a process group before its members
// are killed one by one. Fewer leave more members to slow single kills.
const maxGroupKills = 50

// maxSpareGroups limits the empty groups that are kept for the next commands. A
// spare saves making and removing a group and costs four file descriptors.
const maxSpareGroups = 8

// groups hands out process groups that cannot be escaped by fork, setsid or
// double fork. Safe for concurrent use.
type groups struct {
	root  *os.File // directory of the hierarchy
	home  *os.File // its tasks file, through which the forking thread returns
	limit int      // processes and threads of all commands together

	mu sync.Mutex
	// +checklocks:mu
	spare []*group
	// +checklocks:mu
	running []*group // taken and not given back
	// +checklocks:mu
	lingering []*group // groups with live processes whose command has ended
	// +checklocks:mu
	made int // groups made so far; numbers their names
	// +checklocks:mu
	swept time.Time
}

// group is the control group of one command's processes.
type group struct {
	owner *groups
	name  string
	tasks *os.File
	procs *os.File
	now   *os.File // pids.current
	max   *os.File // pids.max

	leader int // pid of the command: its process group; set before kill can be called
	taken  int // number of times it was handed out; guarded by groups.mu
}

// groupPrefix begins the names of the agent's groups.
const groupPrefix = "cay-"

// openGroups mounts the hierarchy on an existing directory, opens it and detaches the
// mount again. The open files keep working, and no process inside finds the hierarchy.
func openGroups(mountPoint string, limit int) (*groups, error) {
	if err := unix.Mount("none", mountPoint, "cgroup", 0, "pids"); err != nil {
		return nil, fmt.Errorf("mounting control groups on %s: %w", mountPoint, err)
	}
	root, err := os.OpenFile(mountPoint, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("opening control groups: %w", err), unix.Unmount(mountPoint, unix.MNT_DETACH))
	}
	if err := unix.Unmount(mountPoint, unix.MNT_DETACH); err != nil {
		return nil, fmt.Errorf("detaching control groups from %s: %w", mountPoint, err)
	}
	home, err := openAt(int(root.Fd()), "tasks", unix.O_WRONLY)
	if err != nil {
		return nil, err
	}
	return &groups{root: root, home: home, limit: limit}, nil
}

func (gr *group) setMax(n int) error {
	if _, err := gr.max.WriteAt(strconv.AppendInt(nil, int64(n), 10), 0); err != nil {
		return fmt.Errorf("limiting processes to %d: %w", n, err)
	}
	return nil
}

// current returns the number of processes and threads in the group.
func (gr *group) current() int {
	var b [16]byte
	n, _ := gr.now.ReadAt(b[:], 0)
	count, _ := strconv.Atoi(string(bytes.TrimSpace(b[:n])))
	return count
}

// self moves the calling thread when it is written to a tasks file.
var self = []byte("0")

// enter moves the calling thread into the group; goHome moves it out again.
func (gr *group) enter() error {
	_, err := gr.tasks.WriteAt(self, 0)
	return err
}

func (g *groups) goHome() error {
	_, err := g.home.WriteAt(self, 0)
	return err
}

// take returns an empty group. The caller gives it back.
func (g *groups) take() (*group, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var gr *group
	if n := len(g.spare); n > 0 {
		gr, g.spare = g.spare[n-1], g.spare[:n-1]
	} else {
		g.made++
		made, err := g.make(groupPrefix + strconv.Itoa(g.made))
		if err != nil {
			return nil, err
		}
		gr = made
	}
	gr.taken++
	g.running = append(g.running, gr)
	return gr, nil
}

func (g *groups) make(name string) (_ *group, err error) {
	dir := int(g.root.Fd())
	if err := unix.Mkdirat(dir, name, 0o700); err != nil {
		return nil, fmt.Errorf("making a control group: %w", err)
	}
	gr := &group{owner: g, name: name}
	defer func() {
		if err != nil {
			gr.close()
		}
	}()
	for _, f := range []struct {
		to   **os.File
		name string
		flag int
	}{
		{&gr.tasks, "tasks", unix.O_WRONLY},
		{&gr.procs, "cgroup.procs", unix.O_RDONLY},
		{&gr.now, "pids.current", unix.O_RDONLY},
		{&gr.max, "pids.max", unix.O_WRONLY},
	} {
		if *f.to, err = openAt(dir, name+"/"+f.name, f.flag); err != nil {
			return nil, err
		}
	}
	return gr, gr.setMax(g.limit)
}

func openAt(dir int, name string, flag int) (*os.File, error) {
	fd, err := unix.Openat(dir, name, flag|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("opening control group file %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// total returns the number n of processes and threads of all commands, and the group
// with most of them, nil if no group has any.
func (g *groups) total() (n int, largest *group, most int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, list := range [][]*group{g.running, g.lingering} {
		for _, gr := range list {
			c := gr.current()
			n += c
			if c > most {
				most, largest = c, gr
			}
		}
	}
	return n, largest, most
}

// busy reports whether processes of any command may live, also of one that has ended.
func (g *groups) busy() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sweepLocked()
	return len(g.running)+len(g.lingering) > 0
}

// lingers reports whether the command of the named group has ended and left live processes.
func (g *groups) lingers(name string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.ContainsFunc(g.lingering, func(gr *group) bool { return gr.name == name && !gr.empty() })
}

// takeLingering returns the named group if its command has ended and left live
// processes, else nil. The caller gives it back.
func (g *groups) takeLingering(name string) *group {
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, gr := range g.lingering {
		if gr.name == name {
			g.lingering = slices.Delete(g.lingering, i, i+1)
			g.running = append(g.running, gr)
			return gr
		}
	}
	return nil
}

// takeAgain takes the group if the command that it was handed out to the taken-th time has
// ended and left live processes, and reports whether it did. The caller then gives it back. The
// group alone does not identify the command, since empty groups are handed out again.
func (g *groups) takeAgain(gr *group, taken int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	i := slices.Index(g.lingering, gr)
	if i < 0 || gr.taken != taken {
		return false
	}
	g.lingering = slices.Delete(g.lingering, i, i+1)
	g.running = append(g.running, gr)
	return true
}

// give gives back a group whose command has ended. A group with live processes is
// kept in lingering and checked again later.
func (g *groups) give(gr *group) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if i := slices.Index(g.running, gr); i >= 0 {
		g.running = slices.Delete(g.running, i, i+1)
	}
	g.putLocked(gr)
	g.sweepLocked()
}

// sweepLocked takes back the lingering groups that have become empty.
//
// +checklocks:g.mu
func (g *groups) sweepLocked() {
	// Once a second is enough: a group that stays costs four descriptors.
	if len(g.lingering) == 0 || time.Since(g.swept) < time.Second {
		return
	}
	g.swept = time.Now()
	again := g.lingering
	g.lingering = nil
	for _, gr := range again {
		g.putLocked(gr)
	}
}

// putLocked puts a group with the lingering or with the spare ones, or removes it.
//
// +checklocks:g.mu
func (g *groups) putLocked(gr *group) {
	if !gr.empty() {
		g.lingering = append(g.lingering, gr)
		return
	}
	if len(g.spare) < maxSpareGroups {
		g.spare = append(g.spare, gr)
		return
	}
	gr.close()
}

// close removes an empty group. If root inside has moved a process into it, the
// directory stays, which does no harm.
func (gr *group) close() {
	_ = unix.Unlinkat(int(gr.owner.root.Fd()), gr.name, unix.AT_REMOVEDIR)
	closeAll(gr.tasks, gr.procs, gr.now, gr.max)
}

// empty reports whether no process of the group lives; zombies do not count.
func (gr *group) empty() bool {
	var b [16]byte
	n, _ := gr.procs.ReadAt(b[:], 0)
	return n == 0
}

// members calls f with the pid of every process of the group and returns their
// number.
func (gr *group) members(f func(pid int)) int {
	buf := make([]byte, 16<<10)
	count, pid, offset := 0, 0, int64(0)
	for {
		n, err := gr.procs.ReadAt(buf, offset)
		offset += int64(n)
		for _, c := range buf[:n] {
			if c >= '0' && c <= '9' {
				pid = pid*10 + int(c-'0')
				continue
			}
			if pid != 0 {
				count++
				f(pid)
			}
			pid = 0
		}
		if n == 0 || err != nil {
			return count
		}
	}
}

// kill kills every process of the group and returns when none is left. It returns an
// error if some are left after the time. A fork bomb leaves the agent so little CPU that
// a system call takes tens of milliseconds; killLeaders kills most processes with one
// call. The passes kill processes that left the process group or were forked meanwhile.
// They come to an end because killing is faster than forking.
func (gr *group) kill(within time.Duration) error {
	deadline := time.Now().Add(within)
	me := os.Getpid()
	for pass := 1; ; pass++ {
		gr.killLeaders()
		left := gr.members(func(pid int) {
			// The agent is a member while its forking thread is in the group.
			if pid != me {
				// An error means that the process has ended.
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		})
		if left == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes of a command are still there %s after they were killed", left, within)
		}
		// The killed processes need the CPU to die.
		time.Sleep(min(time.Duration(pass), 10) * time.Millisecond)
	}
}

// killLeaders kills the process group that the command began with, by one system
// call; a fork bomb mostly stays in it. A fork that is in progress when its process is
// killed still makes the child, so killLeaders repeats the call until no process is
// left, or maxGroupKills times.
func (gr *group) killLeaders() {
	first := 0
	gr.members(func(pid int) {
		if first == 0 && pid != os.Getpid() {
			first = pid
		}
	})
	if first == 0 {
		return
	}
	// Kill only the process group of a member: the number may have been reused.
	pgid, err := unix.Getpgid(first)
	if err != nil || pgid <= 1 || pgid != gr.leader {
		return
	}
	for range maxGroupKills {
		if unix.Kill(-pgid, unix.SIGKILL) != nil || gr.empty() {
			return
		}
	}
}

// nameOf returns the name of the agent's group that a process is in, "" if none, from the
// text of its /proc/PID/cgroup. It allocates only the name.
func nameOf(cgroupFile []byte) string {
	for line := range bytes.SplitSeq(cgroupFile, []byte("\n")) {
		_, path, ok := bytes.Cut(line, []byte(":pids:/"))
		if ok && bytes.HasPrefix(path, []byte(groupPrefix)) {
			return string(path)
		}
	}
	return ""
}
