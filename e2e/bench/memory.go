package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// usage is the memory of one sandbox, in bytes.
type usage struct {
	// own is the memory that the end of the sandbox would free, by role, and by "memfd" for the file
	// that holds the memory of everything inside, which sentry and stubs share.
	own     map[string]float64
	pss     float64
	charged float64 // by the kernel to its control group
}

// roles lists the kinds of process that a sandbox has on the host.
var roles = []string{"sentry", "gofer", "stub"}

// memoryOf adds up all processes in the control group of a sandbox.
func memoryOf(id string) (usage, error) {
	u := usage{own: map[string]float64{}}
	group, err := groupOf(id)
	if err != nil {
		return u, err
	}
	pids, err := os.ReadFile(filepath.Join(group, "cgroup.procs"))
	if err != nil {
		return u, err
	}
	spaces, err := addressSpaces(strings.Fields(string(pids)))
	if err != nil {
		return u, err
	}
	for _, pid := range spaces {
		if err := u.addProcess(pid); err != nil {
			return u, err
		}
	}
	if u.own["sentry"] == 0 {
		return u, fmt.Errorf("no sentry in %s", group)
	}
	for _, name := range []string{"memory.current", "memory.usage_in_bytes"} {
		data, err := os.ReadFile(filepath.Join(group, name))
		if err == nil {
			u.charged, err = strconv.ParseFloat(strings.TrimSpace(string(data)), 64)
			return u, err
		}
	}
	return u, fmt.Errorf("%s does not count memory", group)
}

// groupOf returns the control group that counts the sandbox's memory.
func groupOf(id string) (string, error) {
	for _, root := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
		groups, err := filepath.Glob(filepath.Join(root, "cay-*", id))
		if err != nil {
			return "", err
		}
		if len(groups) == 1 {
			return groups[0], nil
		}
	}
	return "", fmt.Errorf("no control group of %s", id)
}

// addressSpaces returns one process of each address space. systrap runs several processes in one,
// and each reports all of its memory.
func addressSpaces(pids []string) ([]string, error) {
	var spaces []string
next:
	for _, pid := range pids {
		for _, seen := range spaces {
			same, err := sameMemory(pid, seen)
			if err != nil {
				return nil, err
			}
			if same {
				continue next
			}
		}
		spaces = append(spaces, pid)
	}
	return spaces, nil
}

// sameMemory reports whether two processes share their address space. A process that has ended
// shares nothing.
func sameMemory(a, b string) (bool, error) {
	var n [2]int
	for i, pid := range []string{a, b} {
		var err error
		if n[i], err = strconv.Atoi(pid); err != nil {
			return false, err
		}
	}
	const kcmpVM = 1 // of linux/kcmp.h
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(n[0]), uintptr(n[1]), kcmpVM, 0, 0, 0)
	if errno != 0 && errno != unix.ESRCH {
		return false, fmt.Errorf("comparing the memory of two processes: %w", errno)
	}
	return errno == 0 && order == 0, nil
}

func (u *usage) addProcess(pid string) error {
	name, err := os.ReadFile(filepath.Join("/proc", pid, "cmdline"))
	if err != nil {
		return ended(err)
	}
	role := "stub"
	if program, _, _ := bytes.Cut(name, []byte{0}); bytes.HasPrefix(program, []byte("runsc-")) {
		role = map[string]string{"runsc-sandbox": "sentry", "runsc-gofer": "gofer"}[string(program)]
		if role == "" {
			return fmt.Errorf("process %s is a %s, which is not known", pid, program)
		}
	}
	maps, err := os.ReadFile(filepath.Join("/proc", pid, "smaps"))
	if err != nil {
		return ended(err)
	}
	return u.addMaps(role, maps)
}

// ended ignores errors about processes that have ended: the sentry ends the stubs of processes that
// ended inside.
func ended(err error) error {
	if errors.Is(err, fs.ErrNotExist) || strings.HasSuffix(err.Error(), "no such process") {
		return nil
	}
	return err
}

// addMaps adds the mappings of one process. Anonymous memory and the memory file belong to this
// sandbox alone, so their proportional parts add up to its memory although its processes share it.
// Of files only private pages count: all sandboxes share the program.
func (u *usage) addMaps(role string, maps []byte) error {
	kind := ""
	for line := range strings.Lines(string(maps)) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		if !strings.HasSuffix(fields[0], ":") { // address perms offset dev inode [path]
			path := ""
			if len(fields) > 5 {
				path = fields[5]
			}
			switch {
			case strings.HasPrefix(path, "/memfd:runsc-memory"):
				kind = "memfd"
			case path == "" || path[0] == '[':
				kind = "anonymous"
			default:
				kind = "file"
			}
			continue
		}
		if len(fields) != 3 || fields[2] != "kB" {
			continue
		}
		kib, err := strconv.ParseFloat(fields[1], 64)
		if err != nil {
			return fmt.Errorf("reading the mappings of a process: %w", err)
		}
		bytes := kib * 1024
		switch name := fields[0]; {
		case name == "Pss:":
			u.pss += bytes
			switch kind {
			case "memfd":
				u.own["memfd"] += bytes
			case "anonymous":
				u.own[role] += bytes
			}
		case kind == "file" && (name == "Private_Clean:" || name == "Private_Dirty:"):
			u.own[role] += bytes
		}
	}
	return nil
}
