package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/buildkit"
	"github.com/cayhq/cay/internal/cgroup"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/node"
)

func init() { hostChecks = checkHost }

// checkHost looks at everything the server needs of this machine.
func checkHost(context.Context) []finding {
	findings := []finding{checkRoot(), checkKernel(), checkGroups(), checkUsers(), checkBootstrap(), checkBuildDisks()}
	for _, f := range network.Probe() {
		findings = append(findings, finding{Check: f.Name, OK: f.OK, Detail: f.Detail, Fix: f.Fix})
	}
	return findings
}

func checkRoot() finding {
	if os.Geteuid() != 0 {
		return finding{Check: "root", Detail: "not root; some of what follows cannot be seen", Fix: "run it with sudo"}
	}
	return finding{Check: "root", OK: true, Detail: "yes"}
}

// checkKernel wants 5.10, the oldest that Debian supports and that has pidfds that
// do not block.
func checkKernel() finding {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return finding{Check: "kernel", Detail: err.Error()}
	}
	release := unix.ByteSliceToString(u.Release[:])
	f := finding{Check: "kernel", Detail: release + " on " + runtime.GOARCH, Fix: "cay needs Linux 5.10 or newer"}
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err == nil && (major > 5 || major == 5 && minor >= 10) {
		f.OK = true
	}
	return f
}

func checkGroups() finding {
	h, err := cgroup.Detect()
	if err != nil {
		return finding{Check: "control groups", Detail: err.Error(), Fix: "mount cgroup2 at /sys/fs/cgroup, as systemd does"}
	}
	return finding{Check: "control groups", OK: true, Detail: h.Version()}
}

// checkUsers starts a process as a sandbox's are: with a user id of the range, in a user namespace that maps no
// other.
func checkUsers() finding {
	cmd := exec.Command("/proc/self/exe", "version")
	only := []syscall.SysProcIDMap{{ContainerID: 0, HostID: node.DefaultFirstUID, Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: only, GidMappings: only, Credential: &syscall.Credential{}}
	if err := cmd.Run(); err != nil {
		return finding{Check: "user namespaces", Detail: err.Error(),
			Fix: "sandboxes need two each, with user ids of their own: raise user.max_user_namespaces with sysctl; in a container, give it all ids"}
	}
	return finding{Check: "user namespaces", OK: true, Detail: "can be made, with user ids of their own"}
}

// checkBootstrap is for machines that reach no image registry: there the built-in
// templates are made from Debian's packages.
func checkBootstrap() finding {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return finding{Check: "mmdebstrap", Detail: "not installed: templates can only be made from image registries",
			Fix: "apt-get install mmdebstrap debian-archive-keyring"}
	}
	return finding{Check: "mmdebstrap", OK: true, Detail: "installed"}
}

// checkBuildDisks looks at what holds builds to their share of the disk.
func checkBuildDisks() finding {
	if why := buildkit.Probe(); why != "" {
		return finding{Check: "build disks", Detail: why + ": what builds of Dockerfiles write is looked at, and a fast writer goes beyond build.disk_mb before it is stopped",
			Fix: "apt-get install e2fsprogs; in a container, give it /dev/loop-control and /dev/loop*"}
	}
	return finding{Check: "build disks", OK: true, Detail: "the kernel holds builds of Dockerfiles to build.disk_mb"}
}
