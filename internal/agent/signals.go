package agent

import (
	"fmt"
	"os/signal"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// IgnoreSignals keeps the process alive whatever signal it is sent, short of
// SIGKILL. The signals are caught, not ignored: ignoring would be inherited by
// every command. They are caught by a handler of our own that does nothing,
// since for each signal that Go's runtime handles a fork makes one more system
// call in the child, and in gVisor sixty of those are a good part of a short
// command.
func IgnoreSignals() error {
	handler, restorer := returner()
	for s := syscall.Signal(1); s < 65; s++ {
		// One at a time: each signal that came within the handler of another
		// would put a frame of kilobytes on Go's small stack for signals, and a
		// dozen at once would end the process.
		action := sigaction{handler: handler, restorer: restorer, flags: saOnStack | saRestart, mask: ^uintptr(0)}
		if restorer != 0 {
			action.flags |= saRestorer
		}
		switch s {
		case syscall.SIGURG, 32, 33, // Go's own: preemption, and system calls on all threads
			syscall.SIGKILL, syscall.SIGSTOP, syscall.SIGPROF,
			syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE: // real faults must not be hidden
			continue
		case syscall.SIGCHLD:
			// The reaper waits without it, and by default it interrupts nobody.
			action = sigaction{}
		}
		signal.Ignore(s) // from here on Go's runtime leaves it alone
		_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&action)), 0, unsafe.Sizeof(action.mask), 0, 0)
		if errno != 0 {
			return fmt.Errorf("catching signal %d: %w", s, errno)
		}
	}
	return nil
}

// Flags of Linux's asm-generic/signal-defs.h and, for the restorer, of x86's.
const (
	saRestorer = 0x04000000
	saOnStack  = 0x08000000 // Go's stacks are small
	saRestart  = 0x10000000
)

// sigaction is the kernel's, the same on amd64 and arm64.
type sigaction struct {
	handler, flags, restorer, mask uintptr
}

// returner is a signal handler that returns at once, and what it returns to
// where the kernel asks for that, else 0.
func returner() (handler, restorer uintptr)
