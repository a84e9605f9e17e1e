package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// archSetCPUID is ARCH_SET_CPUID of Linux's asm/prctl.h: whether the instruction CPUID
// faults in the calling thread (0) or works (1).
const archSetCPUID = 0x1012

// plainCPUID lets programs inside ask the processor itself, as they do where it cannot
// be made to fault. gVisor makes CPUID fault and answers it from a table that it made by
// asking the same questions. A start of a program of glibc asks 60 times, and each time
// costs a signal and two switches: it was the larger half of starting one.
//
// gVisor has no flag for it. It takes "no such device" for an answer, which a filter
// gives from here on: this process, the one it becomes in its chroot, and the stubs that it
// forks. If the filter cannot be set everything works, more slowly.
func plainCPUID() {
	if _, _, errno := unix.RawSyscall(unix.SYS_ARCH_PRCTL, archSetCPUID, 1, 0); errno != 0 {
		return // the processor has no such fault, or the filter is there already
	}
	const number, arch, arg0 = 0, 4, 16 // where struct seccomp_data has them
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	// skip leaves out the next n instructions unless the value is k.
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
	// All threads: any of them may fork the first stub.
	_, _, _ = unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
}
