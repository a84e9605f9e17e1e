// Package cgroup finds, measures, kills and removes the control groups that hold
// sandboxes, and keeps a sandbox's memory below its limit without the kernel
// killing its sentry.
//
// It works on cgroup v1 (also a hybrid of both, where the controllers are v1) and
// on v2. runsc makes the groups of sandboxes, from the spec; this package makes those
// of the server and of builds. It knows nothing of the product. A [Group] is a path
// and holds no state; its methods may be called concurrently.
package cgroup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// mountRoot is the directory in which every Linux distribution mounts its control groups.
const mountRoot = "/sys/fs/cgroup"

// Hierarchy describes the machine's control groups.
type Hierarchy struct {
	unified bool    // v2: one tree with all controllers
	mounts  []mount // v1: a tree for each controller, or for some together
}

// Detect returns the Hierarchy of this machine.
func Detect() (*Hierarchy, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(mountRoot, &st); err != nil {
		return nil, fmt.Errorf("looking at %s: %w", mountRoot, err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return &Hierarchy{unified: true}, nil
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("reading the mounts: %w", err)
	}
	defer f.Close()
	h := &Hierarchy{mounts: mountsOf(f)}
	for _, controller := range []string{"memory", "pids", "cpu"} {
		if !slices.ContainsFunc(h.mounts, func(m mount) bool { return slices.Contains(m.controllers, controller) }) {
			return nil, fmt.Errorf("the controller %s is not mounted below %s", controller, mountRoot)
		}
	}
	return h, nil
}

// mount describes one of v1's trees.
type mount struct {
	dir         string
	controllers []string // several share a tree where systemd mounts them: cpu,cpuacct
}

// mountsOf returns v1's trees, from the text of /proc/self/mountinfo.
func mountsOf(info io.Reader) (all []mount) {
	for lines := bufio.NewScanner(info); lines.Scan(); {
		// 39 32 0:34 / /sys/fs/cgroup/memory rw,… shared:18 - cgroup cgroup rw,memory
		before, after, ok := strings.Cut(lines.Text(), " - ")
		place, tree := strings.Fields(before), strings.Fields(after)
		if ok && len(place) > 4 && len(tree) > 2 && tree[0] == "cgroup" && strings.HasPrefix(place[4], mountRoot+"/") {
			all = append(all, mount{place[4], strings.Split(tree[2], ",")})
		}
	}
	return all
}

// Version returns "v1" or "v2", the interface of the controllers.
func (h *Hierarchy) Version() string {
	if h.unified {
		return "v2"
	}
	return "v1"
}

// Group returns the group at an absolute path such as "/cay-1a2b3c/sbx_…", which is the
// same in every controller's tree.
func (h *Hierarchy) Group(path string) Group { return Group{h: h, path: path} }

// Group names one control group, which need not exist.
type Group struct {
	h    *Hierarchy
	path string
}

// dirs returns the group's directories: one on v2, one for each tree on v1.
func (g Group) dirs() []string {
	if g.h.unified {
		return []string{filepath.Join(mountRoot, g.path)}
	}
	dirs := make([]string, 0, len(g.h.mounts))
	for _, m := range g.h.mounts {
		dirs = append(dirs, filepath.Join(m.dir, g.path))
	}
	return dirs
}

// dir returns the group's directory in one controller's tree.
func (g Group) dir(controller string) string {
	if g.h.unified {
		return filepath.Join(mountRoot, g.path)
	}
	for _, m := range g.h.mounts {
		if slices.Contains(m.controllers, controller) {
			return filepath.Join(m.dir, g.path)
		}
	}
	return filepath.Join(mountRoot, controller, g.path) // does not exist; opening it fails
}

// Children returns the names of the groups below, in any controller's tree.
func (g Group) Children() ([]string, error) {
	var names []string
	for _, dir := range g.dirs() {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("listing the groups below %s: %w", g.path, err)
		}
		for _, e := range entries {
			if e.IsDir() && !slices.Contains(names, e.Name()) {
				names = append(names, e.Name())
			}
		}
	}
	return names, nil
}

// Exists reports whether the group exists in any controller's tree.
func (g Group) Exists() bool {
	return slices.ContainsFunc(g.dirs(), func(dir string) bool {
		_, err := os.Stat(dir)
		return err == nil
	})
}

// Procs returns the ids of the processes in the group, in any controller's tree.
func (g Group) Procs() ([]int, error) {
	var pids []int
	for _, dir := range g.dirs() {
		data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("listing the processes of %s: %w", g.path, err)
		}
		for _, field := range strings.Fields(string(data)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return nil, fmt.Errorf("listing the processes of %s: %w", g.path, err)
			}
			if !slices.Contains(pids, pid) {
				pids = append(pids, pid)
			}
		}
	}
	return pids, nil
}

// killPoll is the pause of Kill between two looks. A killed sentry with little memory
// is gone in about 5 ms; one with gigabytes takes longer to return them.
const killPoll = 2 * time.Millisecond

// Kill ends every process in the group and returns when none is left, or with ctx's
// error. A group that does not exist has no process.
func (g Group) Kill(ctx context.Context) error {
	if !g.h.unified {
		// Processes that wait for memory at the limit cannot run to their end.
		_ = g.set("memory", "memory.oom_control", "0") // fails if the group does not exist: nothing waits
	}
	for {
		if g.h.unified {
			// One write instead of a race with fork; absent before Linux 5.14.
			_ = g.set("", "cgroup.kill", "1") // the loop below kills what this misses
		}
		pids, err := g.Procs()
		if err != nil || len(pids) == 0 && !g.leaving() {
			return err
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
				return fmt.Errorf("killing process %d of %s: %w", pid, g.path, err)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for %d processes of %s to end: %w", len(pids), g.path, ctx.Err())
		case <-time.After(killPoll):
		}
	}
}

// leaving reports whether the group, which lists no process, still has processes that end (v2). The kernel lists none
// that has begun to end, and the group cannot be removed before the last has returned its memory.
func (g Group) leaving() bool {
	if !g.h.unified {
		return false
	}
	events, err := g.stat("", "cgroup.events")
	if err != nil || events["populated"] == 0 {
		return false // most likely there is no such group
	}
	below, err := g.Children() // their processes count too
	return err == nil && len(below) == 0
}

// Remove removes the group, which must be empty, and the groups below it. It succeeds if
// there is no such group. It goes on after errors and joins them.
func (g Group) Remove() error {
	var errs []error
	for _, dir := range g.dirs() {
		if err := removeTree(dir); err != nil {
			errs = append(errs, fmt.Errorf("removing group %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}

// removeTree removes directories bottom up; the kernel removes their files. A group
// whose last process has just ended may be busy for a moment.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	for try := 0; ; try++ {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || try == 50 {
			return err
		}
		time.Sleep(killPoll)
	}
}

func (g Group) set(controller, file, value string) error {
	f, err := os.OpenFile(filepath.Join(g.dir(controller), file), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("opening %s of %s: %w", file, g.path, err)
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("setting %s of %s to %s: %w", file, g.path, value, err)
	}
	return nil
}

// value reads a file that holds one number.
func (g Group) value(controller, file string) (int64, error) {
	data, err := os.ReadFile(filepath.Join(g.dir(controller), file))
	if err != nil {
		return 0, fmt.Errorf("reading %s of %s: %w", file, g.path, err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("reading %s of %s: %w", file, g.path, err)
	}
	return n, nil
}

// stat reads a file of "name value" lines.
func (g Group) stat(controller, file string) (map[string]int64, error) {
	data, err := os.ReadFile(filepath.Join(g.dir(controller), file))
	if err != nil {
		return nil, fmt.Errorf("reading %s of %s: %w", file, g.path, err)
	}
	values := map[string]int64{}
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseInt(value, 10, 64); err == nil {
			values[name] = n
		}
	}
	return values, nil
}
