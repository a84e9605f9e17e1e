package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// favouredNice is the nice value of what serves a sandbox: its kernel and its agent. It
// weighs about thirty times as much as what the sandbox runs, which has nice 0. That is
// among the processes of one control group only; between sandboxes the groups' weights
// decide.
const favouredNice = -15

// Favour lets the processes that are in a sandbox's group now run before those that it will
// start: its sentry, its gofer, and the host's side of the agent. Each process inside is
// a process of the host too, so that without this an agent among hundreds of them gets the CPU
// a few times a second, and cannot end the fork bomb that takes it.
//
// It must be called when the agent runs and nothing else does. Processes started
// later begin with nice 0 again.
func (g Group) Favour() error {
	pids, err := g.Procs()
	if err != nil {
		return err
	}
	var errs []error
	for _, pid := range pids {
		threads, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(pid), "task"))
		if err != nil {
			errs = append(errs, fmt.Errorf("listing the threads of %d: %w", pid, err))
			continue
		}
		for _, t := range threads {
			tid, err := strconv.Atoi(t.Name())
			if err != nil {
				continue
			}
			err = unix.SchedSetAttr(tid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_NORMAL,
				Flags: unix.SCHED_FLAG_RESET_ON_FORK, Nice: favouredNice}, 0)
			if err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("favouring thread %d: %w", tid, err))
			}
		}
	}
	return errors.Join(errs...)
}
