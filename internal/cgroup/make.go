package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// CPUPeriod is the period of a CPU quota in µs: the kernel's default.
const CPUPeriod = 100_000

// Limits bound the processes of a group together. 0 is no limit.
type Limits struct {
	MemoryBytes int64 // beyond it the kernel kills one of them
	CPUQuota    int64 // µs per CPUPeriod
	PIDs        int64
}

// Make makes the group with limits, for processes that are not a sandbox: those of builds. A group that
// exists gets the limits. After an error the caller must call [Group.Remove].
func (g Group) Make(l Limits) error {
	if g.h.unified {
		if err := g.delegate(); err != nil {
			return err
		}
	}
	for _, controller := range []string{"memory", "cpu", "pids"} {
		if err := os.MkdirAll(g.dir(controller), 0o755); err != nil {
			return fmt.Errorf("making group %s: %w", g.path, err)
		}
	}
	memory, cpu := strconv.FormatInt(l.MemoryBytes, 10), strconv.FormatInt(l.CPUQuota, 10)
	pids := strconv.FormatInt(l.PIDs, 10)
	var errs []error
	limit := func(controller, file, value string, wanted int64) {
		if wanted > 0 {
			errs = append(errs, g.set(controller, file, value))
		}
	}
	if g.h.unified {
		limit("memory", "memory.max", memory, l.MemoryBytes)
		limit("cpu", "cpu.max", cpu+" "+strconv.Itoa(CPUPeriod), l.CPUQuota)
	} else {
		limit("memory", "memory.limit_in_bytes", memory, l.MemoryBytes)
		limit("cpu", "cpu.cfs_quota_us", cpu, l.CPUQuota)
	}
	limit("pids", "pids.max", pids, l.PIDs)
	return errors.Join(errs...)
}

// delegate lets the groups above give controllers to their children (v2). runsc needs cpuset, from which it reads the
// number of CPUs: without it no step of a build starts.
func (g Group) delegate() error {
	has, err := os.ReadFile(filepath.Join(mountRoot, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("reading the controllers of %s: %w", mountRoot, err)
	}
	hand := "+memory +cpu +pids"
	if slices.Contains(strings.Fields(string(has)), "cpuset") {
		hand += " +cpuset"
	}
	dir := mountRoot
	above := strings.FieldsFunc(filepath.Dir(g.path), func(r rune) bool { return r == '/' })
	for _, name := range append([]string{""}, above...) {
		dir = filepath.Join(dir, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("making group %s: %w", g.path, err)
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(hand), 0); err != nil {
			return fmt.Errorf("handing controllers down to %s: %w", g.path, err)
		}
	}
	return nil
}

// Add moves a process into the group. What the process starts later is in the group too.
func (g Group) Add(pid int) error {
	controllers := []string{"memory", "cpu", "pids"}
	if g.h.unified {
		controllers = controllers[:1] // there is one tree
	}
	for _, controller := range controllers {
		if err := g.set(controller, "cgroup.procs", strconv.Itoa(pid)); err != nil {
			return err
		}
	}
	return nil
}

// Events counts what limits did to a group.
type Events struct {
	OutOfMemory int64 // processes that the kernel killed for memory
	NoMorePIDs  int64 // forks that were refused
}

// Events reads what limits did to the group since it was made.
func (g Group) Events() (Events, error) {
	file := "memory.oom_control"
	if g.h.unified {
		file = "memory.events"
	}
	memory, err := g.stat("memory", file)
	if err != nil {
		return Events{}, err
	}
	pids, err := g.stat("pids", "pids.events")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Events{}, err
	}
	return Events{OutOfMemory: memory["oom_kill"], NoMorePIDs: pids["max"]}, nil
}
