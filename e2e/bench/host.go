package main

import (
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// host describes the machine, on which the numbers depend.
type host struct {
	CPUs          int     `json:"cpus"`
	CPUModel      string  `json:"cpu_model"`
	MemoryMB      int     `json:"memory_mb"` // units of 10⁶ bytes
	Kernel        string  `json:"kernel"`
	Cgroup        string  `json:"cgroup"`
	Cay           string  `json:"cay"`
	Docker        string  `json:"docker"`         // version, or why there is none
	DockerNetwork string  `json:"docker_network"` // "" without an engine
	LoadBefore    float64 `json:"load_before"`    // of the last minute; other work on the machine makes every number worse
	LoadAfter     float64 `json:"load_after"`
}

func lookAtHost() host {
	h := host{CPUs: runtime.NumCPU(), CPUModel: "unknown", Cgroup: "v1", LoadBefore: load()}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		h.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		h.MemoryMB = int(uint64(info.Totalram) * uint64(info.Unit) / 1e6)
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		h.Cgroup = "v2"
	}
	cpus, _ := os.ReadFile("/proc/cpuinfo") // if it fails the model is unknown
	for line := range strings.Lines(string(cpus)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			h.CPUModel = strings.TrimSpace(value)
			break
		}
	}
	return h
}

// load returns the load average of the last minute, 0 if the kernel does not say.
func load() float64 {
	data, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0
	}
	var v float64
	_, _ = fmt.Sscan(string(data), &v) // 0 if it fails
	return v
}
