package agent

import (
	"fmt"
	"os/signal"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// IgnoreSignals keeps the process alive at every signal but SIGKILL. It catches the
// signals and does not ignore them, since every command would inherit that. It
// installs a handler that does nothing instead of Go's: for each signal that Go's
// runtime handles, a fork makes one more system call in the child, and in gVisor
// sixty of those take a good part of a short command's time.
func IgnoreSignals() error {
	handler, restorer := returner()
	for s := syscall.Signal(1); s < 65; s++ {
		// The mask lets the handler run for one signal at a time: each signal within
		// the handler of another would put a frame of kilobytes on Go's small stack
		// for signals, and a dozen at once would end the process.
		action := sigaction{handler: handler, restorer: restorer, flags: saOnStack | saRestart, mask: ^uintptr(0)}
		if restorer != 0 {
			action.flags |= saRestorer
		}
		switch s {
		case syscall.SIGURG, 32, 33, // Go uses them for preemption and for system calls on all threads
			syscall.SIGKILL, syscall.SIGSTOP, syscall.SIGPROF,
			syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE: // real faults must not be hidden
			continue
		case syscall.SIGCHLD:
			// The reaper does not need it, and by default it interrupts no system call.
			action = sigaction{}
		}
		signal.Ignore(s) // from now on Go's runtime does not touch the signal
		_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&action)), 0,
			unsafe.Sizeof(action.mask), 0, 0)
		if errno != 0 {
			return fmt.Errorf("catching signal %d: %w", s, errno)
		}
	}
	return nil
}

// Flags from Linux's asm-generic/signal-defs.h; saRestorer is from x86's signal.h.
const (
	saRestorer = 0x04000000
	saOnStack  = 0x08000000 // Go's stacks are small
	saRestart  = 0x10000000
)

// sigaction is the kernel's struct sigaction, the same on amd64 and arm64.
type sigaction struct {
	handler, flags, restorer, mask uintptr
}

// returner returns the address of a signal handler that returns at once, and of its
// restorer if the kernel asks for one, else 0.
func returner() (handler, restorer uintptr)
