package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// reniceTo is the nice value of the processes that serve a sandbox: its kernel and its agent.
// It weighs about thirty times as much as nice 0, which the processes of the sandbox have.
// It counts only among the processes of one control group; between sandboxes the weights of
// their groups decide. With a higher value, an agent among hundreds of busy processes runs
// too seldom to end them.
const reniceTo = -15

// Renice lets the processes that are in a sandbox's group now (its sentry, its gofer and the
// agent) run before those that the sandbox starts later, and gives them a short time slice. Each
// process inside is a process of the host too, so that without this an agent among hundreds of
// them gets the CPU a few times a second, and cannot end the fork bomb that takes it.
//
// Call it when the agent runs and nothing else does. Processes started later begin with
// nice 0 again.
func (g Group) Renice() error {
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
				Flags: unix.SCHED_FLAG_RESET_ON_FORK, Nice: reniceTo, Runtime: uint64(shortSlice)}, 0)
			if err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("renicing thread %d: %w", tid, err))
			}
		}
	}
	return errors.Join(errs...)
}
