package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Own returns the group that this process is in, in a controller's tree.
func (h *Hierarchy) Own(controller string) (Group, error) {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return Group{}, fmt.Errorf("reading the own control groups: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		// 4:memory:/path, and on v2 0::/path
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) == 3 && (h.unified && fields[0] == "0" || !h.unified && hasController(fields[1], controller)) {
			return h.Group(fields[2]), nil
		}
	}
	return Group{}, fmt.Errorf("this process is in no control group of the controller %s", controller)
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

// OfService reports whether systemd made the group. On v2 a process must not leave such a group: to systemd it
// looks as if the service had ended.
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
		if limit > 1<<60 { // v1 writes "none" as the largest number of pages
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
			lowest = n // "max", which is no limit, does not parse
		}
	}
	return lowest, nil
}

// Confine makes the group with a limit on memory, in bytes, and moves a process into it, in the controller of
// memory. What the process starts counts there too, until it is moved. On v2 the group is in every controller.
func (g Group) Confine(pid int, memory int64) error {
	file := "memory.limit_in_bytes"
	if g.h.unified {
		file = "memory.max"
	}
	return g.seat(pid, "memory", file, memory)
}

// Weigh makes the group with a weight against other groups when the CPUs are busy, and moves a process into it, in
// the controller of cpu. A group has 1024 unless it is given another weight; the least is 2 and the most 262144.
func (g Group) Weigh(pid int, weight int64) error {
	file, weight := g.cpuWeight(weight)
	return g.seat(pid, "cpu", file, weight)
}

// SetCPUWeight sets the weight of a group that exists, as [Group.Weigh] does.
func (g Group) SetCPUWeight(weight int64) error {
	file, weight := g.cpuWeight(weight)
	return g.set("cpu", file, strconv.FormatInt(weight, 10))
}

// CPUTime returns the CPU time that the group's processes have used, those that ended included.
func (g Group) CPUTime() (time.Duration, error) {
	if !g.h.unified {
		ns, err := g.value("cpuacct", "cpuacct.usage")
		return time.Duration(ns), err
	}
	stat, err := g.stat("cpu", "cpu.stat")
	if err != nil {
		return 0, err
	}
	return time.Duration(stat["usage_usec"]) * time.Microsecond, nil
}

// cpuWeight returns the file that holds a weight and the weight as it is written there. On v2 a group has 100 unless
// it is given another weight.
func (g Group) cpuWeight(weight int64) (file string, value int64) {
	if g.h.unified {
		return "cpu.weight", min(max(weight*100/1024, 1), 10_000)
	}
	return "cpu.shares", min(weight, 262_144)
}

// SpecShares returns the CPU shares of an OCI spec with which runsc gives a group the weight that
// [Group.SetCPUWeight] sets. On v2 runsc converts 2 to 262144 shares to a weight of 1 to 10000 in a line of its own,
// and does not start a sandbox whose weight would be higher. 0 remains 0, which a spec takes for none.
func (h *Hierarchy) SpecShares(weight int64) uint64 {
	if weight == 0 {
		return 0
	}
	_, value := h.Group("").cpuWeight(weight)
	if !h.unified {
		return uint64(value)
	}
	return uint64(2 + ((value-1)*262_142+9998)/9999)
}

// seat makes the group with a setting of a controller and moves a process into it.
func (g Group) seat(pid int, controller, file string, value int64) error {
	if g.h.unified {
		if err := g.delegate(); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(g.dir(controller), 0o755); err != nil {
		return fmt.Errorf("making group %s: %w", g.path, err)
	}
	if err := g.set(controller, file, strconv.FormatInt(value, 10)); err != nil {
		return err
	}
	return g.Join(controller, pid)
}

// Join moves a process into the group, which must exist, in one controller. On v2 that is every controller.
func (g Group) Join(controller string, pid int) error {
	return g.set(controller, "cgroup.procs", strconv.Itoa(pid))
}
