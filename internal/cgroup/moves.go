package cgroup

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// QuickMoves lets the kernel move processes between groups without waiting, until the returned
// hierarchy is closed or this process has ended. No other hierarchy of the machine may have the name.
//
// The kernel keeps forks and moves apart with a lock. By default a fork takes it for free, and a
// move waits for an RCU grace period of 8 to 24 ms, in which no group can be made either. runsc
// moves itself into its group and out again on every start. A hierarchy that is mounted with the
// option favordynmods (Linux 6.0) reverses this for the whole machine: a move took 7.9 ms and
// takes 0.2, and 2000 forks took no longer. QuickMoves makes such a hierarchy, without
// controllers and without a mount point; the kernel removes it when no process has it open.
// Linux 6.18 gives forks a lock for each process instead, and keeps that until the next boot.
//
// It fails on kernels before 6.0 and on those that are booted without hierarchies of v1.
func QuickMoves(name string) (io.Closer, error) {
	fs, err := unix.Fsopen("cgroup", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("opening a hierarchy of control groups: %w", err)
	}
	defer unix.Close(fs)
	err = errors.Join(
		unix.FsconfigSetFlag(fs, "none"), // of the controllers
		unix.FsconfigSetString(fs, "name", name),
		unix.FsconfigSetFlag(fs, "favordynmods"))
	if err == nil {
		err = unix.FsconfigCreate(fs)
	}
	if err != nil {
		return nil, fmt.Errorf("making a hierarchy of control groups with favordynmods: %w", err)
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("mounting a hierarchy of control groups: %w", err)
	}
	return os.NewFile(uintptr(mount), "control groups with favordynmods"), nil
}
