package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// archSetCPUID is ARCH_SET_CPUID of Linux's asm/prctl.h. It sets whether the instruction CPUID
// faults in the calling thread (0) or works (1).
const archSetCPUID = 0x1012

// plainCPUID lets programs inside execute CPUID on the processor itself, as they do where it
// cannot be made to fault. gVisor makes CPUID fault and answers it from a table, which it made
// with the same instruction. A start of a glibc program executes it 60 times, each at the cost of
// a signal and two switches, which was the larger half of starting a program.
//
// gVisor has no flag for it. It accepts "no such device" as an answer, and a seccomp filter gives
// that answer from here on to this process, to the one that it becomes in its chroot, and to the
// stubs that it forks. If the filter cannot be set, everything works, but more slowly.
func plainCPUID() {
	if _, _, errno := unix.RawSyscall(unix.SYS_ARCH_PRCTL, archSetCPUID, 1, 0); errno != 0 {
		return // the processor has no such fault, or the filter is set already
	}
	const number, arch, arg0 = 0, 4, 16 // offsets in struct seccomp_data
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	// skip jumps over the next n instructions unless the value is k.
	skip := func(k uint32, n uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: k, Jf: n}
	}
	answer := func(k uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k}
	}
	filter := []unix.SockFilter{
		load(arch), skip(unix.AUDIT_ARCH_X86_64, 5),
		load(number), skip(unix.SYS_ARCH_PRCTL, 3),
		load(arg0), skip(archSetCPUID, 1),
		answer(unix.SECCOMP_RET_ERRNO | uint32(unix.ENODEV)),
		answer(unix.SECCOMP_RET_ALLOW),
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	// The filter applies to all threads, since any of them may fork the first stub.
	_, _, _ = unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&program)))
}
