package daemon

import (
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

// Finding holds the result of one check of this machine.
type Finding struct {
	Check  string `json:"check"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
	Fix    string `json:"fix,omitempty"` // what to do about it
}

// CheckHost checks whether this machine has everything that a server with this data directory needs.
func CheckHost(dataDir string) []Finding {
	findings := []Finding{checkRoot(), checkKernel(), checkGroups(), checkUsers(), checkSELinux("/"),
		checkDataDir(dataDir), checkBootstrap(), checkBuildDisks()}
	for _, f := range network.Probe() {
		findings = append(findings, Finding{Check: f.Name, OK: f.OK, Detail: f.Detail, Fix: f.Fix})
	}
	return findings
}

// checkRoot checks for root.
func checkRoot() Finding {
	if os.Geteuid() != 0 {
		return Finding{Check: "root", Detail: "not root; some of what follows cannot be seen", Fix: "run it with sudo"}
	}
	return Finding{Check: "root", OK: true, Detail: "yes"}
}

// checkKernel checks for Linux 5.10, the oldest kernel that Debian supports and that has pidfds that do not block.
func checkKernel() Finding {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Finding{Check: "kernel", Detail: err.Error()}
	}
	release := unix.ByteSliceToString(u.Release[:])
	f := Finding{Check: "kernel", Detail: release + " on " + runtime.GOARCH, Fix: "cay needs Linux 5.10 or newer"}
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err == nil && (major > 5 || major == 5 && minor >= 10) {
		f.OK = true
	}
	return f
}

// checkGroups checks for control groups.
func checkGroups() Finding {
	h, err := cgroup.Detect()
	if err != nil {
		return Finding{Check: "control groups", Detail: err.Error(), Fix: "mount cgroup2 at /sys/fs/cgroup, as systemd does"}
	}
	return Finding{Check: "control groups", OK: true, Detail: h.Version()}
}

// checkUsers checks whether a process can be started as those of sandboxes are: with a user id of their range, in a
// user namespace that maps no other id. It starts this program as `cay version`.
func checkUsers() Finding {
	cmd := exec.Command("/proc/self/exe", "version")
	only := []syscall.SysProcIDMap{{ContainerID: 0, HostID: node.DefaultFirstUID, Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: only, GidMappings: only,
		Credential: &syscall.Credential{}}
	if err := cmd.Run(); err != nil {
		return Finding{Check: "user namespaces", Detail: err.Error(),
			Fix: "sandboxes need two each, with user ids of their own: raise user.max_user_namespaces with sysctl; " +
				"in a container, give it all ids"}
	}
	return Finding{Check: "user namespaces", OK: true, Detail: "can be made, with user ids of their own"}
}

// checkBootstrap checks for mmdebstrap, which makes base and code-interpreter from Debian's packages, and the other
// built-in templates on machines that reach no image registry.
func checkBootstrap() Finding {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return Finding{Check: "mmdebstrap", Detail: "not installed: base and code-interpreter cannot be made, and other " +
			"templates only from image registries",
			Fix: "apt-get install mmdebstrap debian-archive-keyring"}
	}
	return Finding{Check: "mmdebstrap", OK: true, Detail: "installed"}
}

// checkBuildDisks checks whether the kernel can limit the disk of a build.
func checkBuildDisks() Finding {
	if why := buildkit.Probe(); why != "" {
		return Finding{Check: "build disks", Detail: why + ": what builds of Dockerfiles write is looked at, and a fast " +
			"writer goes beyond build.disk_mb before it is stopped",
			Fix: "apt-get install e2fsprogs; in a container, give it /dev/loop-control and /dev/loop*"}
	}
	return Finding{Check: "build disks", OK: true, Detail: "the kernel holds builds of Dockerfiles to build.disk_mb"}
}
