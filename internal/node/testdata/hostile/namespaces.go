package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// namespaces tries all ways to a user namespace, and to what one would give.
func namespaces() {
	runtime.LockOSThread()
	for name, flags := range map[string]uintptr{
		"user": unix.CLONE_NEWUSER, "user and mount": unix.CLONE_NEWUSER | unix.CLONE_NEWNS, "user and net": unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		"mount": unix.CLONE_NEWNS, "net": unix.CLONE_NEWNET, "pid": unix.CLONE_NEWPID, "ipc": unix.CLONE_NEWIPC, "uts": unix.CLONE_NEWUTS,
	} {
		say("clone "+name, child(flags))
		say("clone3 "+name, child3(flags))
		say("unshare "+name, unshareAlone(int(flags)))
	}
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err == nil {
		for name, kind := range map[string]int{"user": unix.CLONE_NEWUSER, "mount": unix.CLONE_NEWNS, "net": unix.CLONE_NEWNET, "user and net": unix.CLONE_NEWUSER | unix.CLONE_NEWNET} {
			say("setns of a process, "+name, unix.Setns(self, kind))
		}
	}
	for _, name := range []string{"user", "mnt", "net"} {
		fd, err := unix.Open("/proc/self/ns/"+name, unix.O_RDONLY, 0)
		if err == nil {
			err = unix.Setns(fd, 0)
		}
		say("setns "+name, err)
	}
	dir, err := os.MkdirTemp("/tmp", "")
	if err != nil { // it is root's alone
		dir, err = os.MkdirTemp("/dev/shm", "")
	}
	if err != nil {
		fmt.Println("WON nothing: no directory:", err)
		return
	}
	for _, kind := range []string{"tmpfs", "proc", "sysfs", "cgroup", "fuse", "overlay", "devpts", "devtmpfs", "mqueue"} {
		say("mount "+kind, unix.Mount("none", dir, kind, 0, map[string]string{"fuse": "fd=0,rootmode=40000,user_id=0,group_id=0"}[kind]))
	}
	say("bind mount", unix.Mount("/etc", dir, "", unix.MS_BIND, ""))
	for name, kind := range map[string][3]int{"raw socket": {unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP}, "packet socket": {unix.AF_PACKET, unix.SOCK_RAW, 0x0300}} {
		_, err := unix.Socket(kind[0], kind[1], kind[2])
		say(name, err)
	}
	for path, dev := range map[string]uint64{"/dev/fuse": unix.Mkdev(10, 229), "/dev/net/tun": unix.Mkdev(10, 200)} {
		_, err := os.Stat(path)
		say(path, err)
		made := dir + "/made"
		os.Remove(made)
		if err = unix.Mknod(made, unix.S_IFCHR|0o666, int(dev)); err == nil {
			_, err = unix.Open(made, unix.O_RDWR, 0)
		}
		say("a node like "+path, err)
	}
	fmt.Println("tried")
}

// child makes a process with clone, which ends at once.
func child(flags uintptr) error {
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, flags|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	return born(pid, errno)
}

// child3 is child with clone3.
func child3(flags uintptr) error {
	args := struct{ flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls uint64 }{flags: uint64(flags), exitSignal: uint64(unix.SIGCHLD)}
	pid, _, errno := syscall.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args), 0)
	return born(pid, errno)
}

func born(pid uintptr, errno syscall.Errno) error {
	if errno != 0 {
		return errno
	}
	if pid == 0 {
		syscall.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
	_, _ = unix.Wait4(int(pid), nil, 0, nil)
	return nil
}

// unshareAlone unshares in a child with one thread, since some namespaces need that.
func unshareAlone(flags int) error {
	pid, _, errno := syscall.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	if pid == 0 {
		_, _, errno := syscall.RawSyscall(unix.SYS_UNSHARE, uintptr(flags), 0, 0)
		syscall.RawSyscall(unix.SYS_EXIT_GROUP, uintptr(errno), 0, 0)
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(int(pid), &status, 0, nil); err != nil {
		return err
	}
	if !status.Exited() {
		return errors.New("it was killed")
	}
	if status.ExitStatus() != 0 {
		return syscall.Errno(status.ExitStatus())
	}
	return nil
}
