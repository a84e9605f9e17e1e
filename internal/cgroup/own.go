package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Own returns the group that this process's memory counts in.
func (h *Hierarchy) Own() (Group, error) {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return Group{}, fmt.Errorf("reading the own control groups: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		// 4:memory:/path, and on v2 0::/path
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) == 3 && (h.unified && fields[0] == "0" || !h.unified && hasController(fields[1], "memory")) {
			return h.Group(fields[2]), nil
		}
	}
	return Group{}, errors.New("this process is in no control group that counts memory")
}

func hasController(list, name string) bool {
	for c := range strings.SplitSeq(list, ",") {
		if c == name {
			return true
		}
	}
	return false
}

// Path returns the group's path, the same in every controller's tree.
func (g Group) Path() string { return g.path }

// OfService reports whether systemd made the group and so must be told of what it holds: on v2 a process that
// leaves it looks to systemd as if the service had ended.
func (g Group) OfService() bool {
	return g.h.unified && (strings.HasSuffix(g.path, ".service") || strings.HasSuffix(g.path, ".scope"))
}

// MemoryLimit returns the lowest limit on memory of the group and those above it, bytes; 0 when there is none.
func (g Group) MemoryLimit() (int64, error) {
	if !g.h.unified {
		stat, err := g.stat("memory", "memory.stat")
		if err != nil {
			return 0, err
		}
		limit := stat["hierarchical_memory_limit"]
		if limit > 1<<60 { // v1's "none" is all pages that a number can count
			limit = 0
		}
		return limit, nil
	}
	lowest := int64(0)
	for path := g.path; path != "/" && path != "."; path = filepath.Dir(path) {
		data, err := os.ReadFile(filepath.Join(mountRoot, path, "memory.max"))
		if err != nil {
			return 0, fmt.Errorf("reading the limit of memory of %s: %w", path, err)
		}
		if n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64); err == nil && (lowest == 0 || n < lowest) {
			lowest = n // "max" is none
		}
	}
	return lowest, nil
}

// Confine makes the group with a limit on memory and moves a process into it, in the controller of memory
// alone. Whatever the process starts counts there too, until it is moved.
func (g Group) Confine(pid int, memory int64) error {
	file := "memory.limit_in_bytes"
	if g.h.unified {
		file = "memory.max"
		if err := g.delegate(); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(g.dir("memory"), 0o755); err != nil {
		return fmt.Errorf("making group %s: %w", g.path, err)
	}
	if err := g.set("memory", file, strconv.FormatInt(memory, 10)); err != nil {
		return err
	}
	return g.Join(pid)
}

// Join moves a process into the group, which must be there, in the controller of memory alone.
func (g Group) Join(pid int) error { return g.set("memory", "cgroup.procs", strconv.Itoa(pid)) }
