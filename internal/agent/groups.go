package agent

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

// Control groups of the sandbox kernel, which is gVisor's: version 1, every
// controller in a hierarchy of its own. Each command gets a group in "pids", which
// knows all its descendants whatever they do, and carries a limit.
//
// That limit is not enough: charges do not propagate from a group to its parent, so there
// is none for all commands together, and the dead are not counted. The guard sees to that.
//
// The thread that makes processes moves itself into a command's group before it
// forks, because the new process inherits the groups of the forking thread; this
// costs two writes and no window in which the process is outside.

// maxGroupKills is how often in a row a process group is killed before its members
// are looked for one by one.
const maxGroupKills = 50

// maxSpareGroups is how many empty groups are kept for the next commands: a
// spare saves making and removing one, at the price of two file descriptors.
const maxSpareGroups = 8

// groups hands out process groups that cannot be escaped by fork, setsid or
// double fork. Safe for concurrent use.
type groups struct {
	root  *os.File // directory of the hierarchy
	home  *os.File // its tasks file: where the forking thread goes back to
	limit int      // processes and threads of all commands together

	mu        sync.Mutex
	spare     []*group
	running   []*group // taken and not given back
	lingering []*group // their command has ended, some process of theirs lives
	made      int      // groups made so far; the next one's name
	swept     time.Time
}

// group is the processes of one command.
type group struct {
	owner *groups
	name  string
	tasks *os.File
	procs *os.File
	now   *os.File // pids.current
	max   *os.File // pids.max

	leader int // pid of the command: its process group; set before kill can be called
	taken  int // how often it was handed out; changes under groups.mu
}

// groupPrefix begins the names of our groups.
const groupPrefix = "cay-"

// openGroups mounts the hierarchy on a directory that is there anyway, opens it
// and detaches the mount again: what is open works on, and nobody finds it.
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

// current is how many processes and threads the group has.
func (gr *group) current() int {
	var b [16]byte
	n, _ := gr.now.ReadAt(b[:], 0)
	count, _ := strconv.Atoi(string(bytes.TrimSpace(b[:n])))
	return count
}

// self moves the calling thread when it is written to a tasks file.
var self = []byte("0")

// enter moves the calling thread into the group; home moves it out again.
func (gr *group) enter() error {
	_, err := gr.tasks.WriteAt(self, 0)
	return err
}

func (g *groups) goHome() error {
	_, err := g.home.WriteAt(self, 0)
	return err
}

// take gives an empty group.
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
	}{{&gr.tasks, "tasks", unix.O_WRONLY}, {&gr.procs, "cgroup.procs", unix.O_RDONLY}, {&gr.now, "pids.current", unix.O_RDONLY}, {&gr.max, "pids.max", unix.O_WRONLY}} {
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

// total is how many processes and threads all commands have, and largest the group
// that has most of them, nil if none has any.
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

// busy reports whether processes of some command, one that has ended included, may live.
func (g *groups) busy() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.sweepLocked()
	return len(g.running)+len(g.lingering) > 0
}

// lingers reports whether the command of the group of that name has ended and something
// of it lives.
func (g *groups) lingers(name string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.ContainsFunc(g.lingering, func(gr *group) bool { return gr.name == name && !gr.empty() })
}

// takeLingering gives the group of that name if its command has ended and
// something of it lives; the caller gives it back.
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

// takeAgain gives a group that was handed out for the taken-th time, if its command has ended
// and something of it lives; the caller gives it back. Its name alone would not do: empty ones
// are handed out again.
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

// give takes a group back whose command has ended. While processes of it live it
// is set aside and looked at again later.
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
func (g *groups) sweepLocked() {
	// Once a second is often enough: a group that stays costs two descriptors.
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

// close removes an empty group. A process that was moved in behind our back
// keeps the directory, which then stays for good and harms nobody.
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

// members calls f with the pid of every process of the group and says how many
// there were.
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

// kill ends every process of the group and returns when none is left or, with
// an error, when some could not be killed within the time. A bomb leaves the agent
// so little CPU that a system call takes tens of milliseconds, so most are killed
// by one; the passes are for what left its process group, and what was forked
// meanwhile. Killing is faster than forking, so they come to an end.
func (gr *group) kill(within time.Duration) error {
	deadline := time.Now().Add(within)
	me := os.Getpid()
	for pass := 1; ; pass++ {
		gr.killLeaders()
		left := gr.members(func(pid int) {
			// The agent's forking thread passes through the groups.
			if pid != me {
				// A process that has ended meanwhile is what we want.
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		})
		if left == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes of a command are still there %s after they were killed", left, within)
		}
		// The killed ones need the CPU to die.
		time.Sleep(min(time.Duration(pass), 10) * time.Millisecond)
	}
}

// killLeaders kills all that stayed in the process group the command began with,
// which of a bomb are mostly all, by one system call. A fork that is under way
// when its process is killed still makes the child, so it is repeated until
// nobody is left or the children are few.
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
	// Only a group that one of ours is in: the number may be another's by now.
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

// nameOf reads which of our groups a process is in, "" if none, out of the text
// of its /proc/PID/cgroup. It allocates nothing but the name.
func nameOf(cgroupFile []byte) string {
	for line := range bytes.SplitSeq(cgroupFile, []byte("\n")) {
		_, path, ok := bytes.Cut(line, []byte(":pids:/"))
		if ok && bytes.HasPrefix(path, []byte(groupPrefix)) {
			return string(path)
		}
	}
	return ""
}
