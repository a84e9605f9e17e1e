package daemon

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// unneeded lists the capabilities that neither the server nor any program that it starts needs, so that a flaw in the
// parsers of requests, images or guests' answers does not give them away. deploy/cay.service takes the same from the
// unit.
//
// Each of the others has a use: namespaces, mounts and control groups (SYS_ADMIN), links and packet filter rules
// (NET_ADMIN, NET_RAW), ports below 1024 (NET_BIND_SERVICE), other processes (KILL, SYS_PTRACE, SYS_NICE), their
// limits (SYS_RESOURCE, IPC_LOCK), ids (SETUID, SETGID, SETPCAP), and images, which have files of any owner, mode,
// device and capability, and which Debian's programs make in a chroot (CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER,
// FSETID, MKNOD, SETFCAP, SYS_CHROOT, AUDIT_WRITE for useradd).
var unneeded = map[string]uintptr{
	"CAP_SYS_MODULE":         unix.CAP_SYS_MODULE, // the kernel loads what netfilter and links need by itself
	"CAP_SYS_RAWIO":          unix.CAP_SYS_RAWIO,
	"CAP_SYS_BOOT":           unix.CAP_SYS_BOOT,
	"CAP_SYS_TIME":           unix.CAP_SYS_TIME,
	"CAP_SYS_PACCT":          unix.CAP_SYS_PACCT,
	"CAP_SYS_TTY_CONFIG":     unix.CAP_SYS_TTY_CONFIG,
	"CAP_SYSLOG":             unix.CAP_SYSLOG,
	"CAP_MAC_ADMIN":          unix.CAP_MAC_ADMIN,
	"CAP_MAC_OVERRIDE":       unix.CAP_MAC_OVERRIDE,
	"CAP_AUDIT_CONTROL":      unix.CAP_AUDIT_CONTROL,
	"CAP_AUDIT_READ":         unix.CAP_AUDIT_READ,
	"CAP_WAKE_ALARM":         unix.CAP_WAKE_ALARM,
	"CAP_BLOCK_SUSPEND":      unix.CAP_BLOCK_SUSPEND,
	"CAP_LEASE":              unix.CAP_LEASE,
	"CAP_LINUX_IMMUTABLE":    unix.CAP_LINUX_IMMUTABLE,
	"CAP_NET_BROADCAST":      unix.CAP_NET_BROADCAST,
	"CAP_IPC_OWNER":          unix.CAP_IPC_OWNER,
	"CAP_PERFMON":            unix.CAP_PERFMON,
	"CAP_BPF":                unix.CAP_BPF,
	"CAP_CHECKPOINT_RESTORE": unix.CAP_CHECKPOINT_RESTORE,
}

// dropUnneeded drops the unneeded capabilities from all threads of this process and from the bounding set, so that no
// program that it starts gets them again.
func dropUnneeded() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var has [2]unix.CapUserData // 32 capabilities each
	if err := unix.Capget(&header, &has[0]); err != nil {
		return fmt.Errorf("reading the capabilities of the server: %w", err)
	}
	for _, name := range slices.Sorted(maps.Keys(unneeded)) {
		number := unneeded[name]
		// EINVAL says that the kernel does not know the capability, and so cannot give it.
		_, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, number, 0)
		if errno != 0 && !errors.Is(errno, unix.EINVAL) {
			return fmt.Errorf("taking %s out of the bounding set: %w", name, errno)
		}
		set, bit := &has[number/32], uint32(1)<<(number%32)
		set.Effective &^= bit
		set.Permitted &^= bit
		set.Inheritable &^= bit
	}
	header.Pid = 0 // each thread changes its own
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)),
		uintptr(unsafe.Pointer(&has[0])), 0)
	if errno != 0 {
		return fmt.Errorf("dropping capabilities: %w", errno)
	}
	return nil
}
