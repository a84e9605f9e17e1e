package runsc

import (
	"slices"
	"strconv"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Root describes a sandbox's root file system.
type Root struct {
	Image    string // path of an EROFS file, opened read-only and shared
	Overlay  string // directory on the host for the writable layer's unlinked file
	MaxBytes int64  // limit of the writable layer; beyond it writes get ENOSPC
}

// Bind describes a read-only mount of a host directory.
type Bind struct {
	From, To string
}

// Limits bound all processes of the sandbox together; the host's kernel enforces
// them. The agent enforces the limits inside.
type Limits struct {
	CgroupsPath string // absolute, below every controller's root
	MemoryBytes int64  // also what the sandbox sees as its total memory
	PauseBytes  int64  // at so many bytes of memory in use, processes that touch more are slowed down
	CPUShares   uint64 // weight against other sandboxes; 1024 is one CPU's worth
	CPUQuota    int64  // µs per CPUPeriod; 0 is no quota
	PIDs        int64  // host tasks: about three for every task inside
}

// CPUPeriod is the period of a CPU quota in µs: the kernel's default.
const CPUPeriod = 100_000

// SandboxSpec describes a sandbox for [NewSpec].
type SandboxSpec struct {
	Hostname  string
	Root      Root
	Binds     []Bind // at least one: without a gofer the writable layer cannot be a file
	Args, Env []string
	Namespace string // path of the network namespace
	Limits    Limits
	ShmBytes  int64  // limit of /dev/shm
	HostUID   uint32 // user and group id on the host of the sandbox's processes, and of no others
}

// capabilities lists docker's default set, which ordinary images expect root inside a
// container to have (chown, su, low ports, chroot, …), and CAP_SYS_ADMIN. The agent
// needs that to detach the control groups and to set the host name, and drops it for
// every process that it starts. They are capabilities in the sandbox's own kernel and
// give no power on the host. runsc removes CAP_NET_RAW: without --net-raw there are no
// raw sockets.
var capabilities = []string{"CAP_SYS_ADMIN",
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW",
	"CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE",
	"CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// Annotations that a restore changes; see [Place].
const (
	rootSource  = "dev.gvisor.spec.rootfs.source"
	rootOverlay = "dev.gvisor.spec.rootfs.overlay"
)

// Limits of /dev. Programs may write there as in any container: syslog makes a socket, and without
// it /dev/tty cannot be opened for writing. A file in /dev takes memory that the end of no process
// frees. The size is docker's. An inode costs the sandbox's kernel about 1 KiB, and programs make a
// few. Larger limits leave less memory for processes.
const (
	devSize   = "size=64m"
	devInodes = "nr_inodes=4096"
)

// NewSpec returns the OCI spec of a sandbox. The same SandboxSpec gives the same spec, as a
// restore requires.
func NewSpec(s SandboxSpec) *specs.Spec {
	shares, quota, period := s.Limits.CPUShares, s.Limits.CPUQuota, uint64(CPUPeriod)
	memory, pids := s.Limits.MemoryBytes, s.Limits.PIDs
	cpu := &specs.LinuxCPU{Shares: &shares}
	if quota > 0 {
		cpu.Quota, cpu.Period = &quota, &period
	}
	mounts := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc"},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "dev",
			Options: []string{"nosuid", "strictatime", "mode=755", devSize, devInodes}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm",
			Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=" + strconv.FormatInt(s.ShmBytes, 10)}},
	}
	for _, bind := range s.Binds {
		mounts = append(mounts, specs.Mount{Destination: bind.To, Type: "bind", Source: bind.From,
			Options: []string{"ro", "rbind", "nosuid", "nodev"}})
	}
	spec := &specs.Spec{
		Version:  "1.1.0",
		Hostname: s.Hostname,
		Root:     &specs.Root{Path: s.Root.Overlay}, // not used: the annotations give the root
		Process: &specs.Process{
			Args: s.Args, Env: s.Env, Cwd: "/",
			User: specs.User{UID: 0, GID: 0},
			Capabilities: &specs.LinuxCapabilities{
				Bounding: capabilities, Effective: capabilities, Permitted: capabilities,
			},
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1 << 16, Hard: 1 << 20}},
		},
		Mounts: mounts,
		Annotations: map[string]string{
			rootSource:                       s.Root.Image,
			"dev.gvisor.spec.rootfs.type":    "erofs",
			rootOverlay:                      "dir=" + s.Root.Overlay,
			"dev.gvisor.spec.rootfs.options": "size=" + strconv.FormatInt(s.Root.MaxBytes, 10),
			"dev.cay.memory.pause":           strconv.FormatInt(s.Limits.PauseBytes, 10),
		},
		Linux: &specs.Linux{
			CgroupsPath: s.Limits.CgroupsPath,
			Resources: &specs.LinuxResources{
				Memory: &specs.LinuxMemory{Limit: &memory},
				CPU:    cpu,
				Pids:   &specs.LinuxPids{Limit: pids},
			},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
				{Type: specs.NetworkNamespace, Path: s.Namespace},
			},
		},
	}
	runAs(spec, s.HostUID)
	return spec
}

// runAs gives the sandbox's processes on the host (sentry, gofer and stubs) the user and group id uid, which
// no other process has. They run as root of a user namespace of their own that maps root to uid and no other
// id, so their capabilities do not reach what another user owns. gVisor's default namespace maps every id to
// itself: in that they would run as the host's root.
func runAs(s *specs.Spec, uid uint32) {
	isUser := func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace }
	if !slices.ContainsFunc(s.Linux.Namespaces, isUser) {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	}
	only := []specs.LinuxIDMapping{{ContainerID: 0, HostID: uid, Size: 1}}
	s.Linux.UIDMappings, s.Linux.GIDMappings = only, only
}
