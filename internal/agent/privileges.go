package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Harden takes from everything the agent will start what would let it out of
// its control group or into the agent:
//
//   - control groups that are mounted below cgroupRoot are detached; the agent's
//     own are already;
//   - CAP_SYS_ADMIN goes out of the bounding set, so that no child, sudo
//     included, can mount them again (the agent itself keeps it, for the host
//     name, and since it thereby has more than they, none may trace it);
//   - the directory that the agent was started from is detached: it is one of the host's, and
//     df would show how full the host's disk is;
//   - the agent becomes undumpable: /proc/1/fd and /proc/1/mem are closed to
//     all without CAP_SYS_PTRACE.
//
// It does not keep root inside from killing PID 1, which hurts only its own
// sandbox. That nobody makes a user namespace, and mounts in it, is gVisor's to hold.
//
// It is for a process of its own that serves afterwards, and must be called
// before it starts the first command. Without the right to unmount, the error
// says so and the capability stays.
func Harden(cgroupRoot string) error {
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding the agent's program: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("closing the agent to tracing: %w", err)
	}
	controllers, err := filepath.Glob(filepath.Join(cgroupRoot, "*"))
	if err != nil {
		return err
	}
	home := filepath.Dir(program)
	for _, dir := range append(controllers, cgroupRoot, home) {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("detaching %s: %w", dir, err)
		}
	}
	// It was made to be mounted on; an image that has it keeps it.
	_ = unix.Rmdir(home)
	// gVisor mounts a tmpfs without a limit over an image's empty /tmp. Files there would
	// be memory that no process holds; below it is the image's own, on the disk. Where it
	// is not empty nothing was mounted, and it may be a link to some other mount.
	if names, err := readNames("/tmp"); err == nil && len(names) == 0 {
		if err := unix.Unmount("/tmp", unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("detaching the tmpfs at /tmp: %w", err)
		}
		if err := openTmp("/tmp"); err != nil {
			return err
		}
	}
	if err := allThreads(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, unix.CAP_SYS_ADMIN); err != nil {
		return fmt.Errorf("dropping CAP_SYS_ADMIN for children: %w", err)
	}
	return nil
}

// openTmp lets everybody make files in a directory that nobody but root could: one that the image lacks
// was made so by gVisor.
func openTmp(dir string) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil || st.Mode != unix.S_IFDIR|0o755 || st.Uid != 0 {
		return nil // it is as its image has it
	}
	if err := unix.Chmod(dir, 0o1777); err != nil {
		return fmt.Errorf("opening %s to all users: %w", dir, err)
	}
	return nil
}

// allThreads makes a system call on every thread, for what the kernel keeps per
// thread. Go has no other way without cgo.
func allThreads(trap, a1, a2 uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall(trap, a1, a2, 0); errno != 0 {
		return errno
	}
	return nil
}
