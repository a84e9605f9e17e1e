package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Harden keeps the agent's children in their control groups and out of the agent:
//
//   - It detaches the control groups that are mounted below cgroupRoot; those of
//     the agent are detached already.
//   - It removes CAP_SYS_ADMIN from the bounding set, so that no child, sudo
//     included, can mount them again. The agent keeps the capability for the host
//     name; since it has more capabilities than its children, none may trace it.
//   - It detaches the directory that the agent was started from. The directory
//     belongs to the host, and df would show how full the host's disk is.
//   - It makes the agent undumpable, which closes /proc/1/fd and /proc/1/mem to
//     all processes without CAP_SYS_PTRACE.
//
// Root inside can still kill PID 1, which hurts only its own sandbox. gVisor refuses
// user namespaces, in which a process could mount.
//
// Call it in the agent's process before the first command starts. Without the right
// to unmount it returns an error and keeps the capability.
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
	// The directory was made as a mount point; an image that has files in it keeps it.
	_ = unix.Rmdir(home)
	// gVisor mounts a tmpfs without a limit over an image's empty /tmp. Its files would take
	// memory that belongs to no process; the image's own /tmp below it is on the disk. If /tmp
	// is not empty gVisor mounted nothing, and /tmp may be a link to some other mount.
	if names, err := os.ReadDir("/tmp"); err == nil && len(names) == 0 {
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

// openTmp allows all users to make files in a directory in which only root can. gVisor makes a /tmp that
// the image lacks with such a mode.
func openTmp(dir string) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil || st.Mode != unix.S_IFDIR|0o755 || st.Uid != 0 {
		return nil // the directory is the image's own
	}
	if err := unix.Chmod(dir, 0o1777); err != nil {
		return fmt.Errorf("opening %s to all users: %w", dir, err)
	}
	return nil
}

// allThreads makes a system call on every thread, for settings that the kernel keeps
// per thread. Go has no other way without cgo.
func allThreads(trap, a1, a2 uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall(trap, a1, a2, 0); errno != 0 {
		return errno
	}
	return nil
}
