package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/buildkit/wire"
)

// Paths in the program's own file tree.
const (
	dataDir     = "/data"     // everything that builds write
	contextsDir = "/contexts" // contexts of this organization's builds, read-only
	runscPath   = "/bin/cay-runsc"
	runscDir    = "/run/runsc" // gVisor's state and sockets
	binDir      = "/bin/own"   // programs that shadow the host's
)

// errNoDisk reports that the image of the disk cannot be mounted.
var errNoDisk = errors.New("mounting the builds' disk")

// enter leaves the host's file tree for one of the program's own, which has only what builds
// need. The host's tree is not mounted anywhere in it.
func enter(c *wire.Config) error {
	if os.Getpid() != 1 {
		return errors.New("not in a PID namespace of its own")
	}
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("leaving the host's mounts: %w", err)
	}
	r := root(c.RunDir)
	if err := unix.Mount("tmpfs", string(r), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV,
		"mode=0755,size="+rootSize); err != nil {
		return fmt.Errorf("mounting a root: %w", err)
	}
	if err := errors.Join(r.system(c), r.files(c), r.programs()); err != nil {
		return fmt.Errorf("making a root: %w", err)
	}
	if err := r.disk(c); err != nil {
		return err
	}
	old := r.path("old")
	err := os.Mkdir(old, 0o700)
	if err == nil {
		err = unix.PivotRoot(string(r), old)
	}
	if err == nil {
		err = errors.Join(os.Chdir("/"), unix.Unmount("/old", unix.MNT_DETACH), os.Remove("/old"))
	}
	if err != nil {
		return fmt.Errorf("leaving the host's root: %w", err)
	}
	return nil
}

// rootSize bounds what is written outside the disk, which takes memory: gVisor's state and this
// file tree, some 300 KB.
const rootSize = "64m"

// root is the directory that becomes the root.
type root string

func (r root) path(name string) string { return filepath.Join(string(r), name) }

// bind mounts a file or directory of the host in the root, at the same or another path.
func (r root) bind(from, to string, flags uintptr) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	to = r.path(to)
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(to, 0o755)
	} else {
		err = os.WriteFile(to, nil, 0o644)
	}
	if err != nil {
		return err
	}
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting %s: %w", from, err)
	}
	if flags == 0 {
		return nil
	}
	if err := unix.Mount("", to, "", unix.MS_BIND|unix.MS_REMOUNT|flags, ""); err != nil {
		return fmt.Errorf("mounting %s: %w", from, err)
	}
	return nil
}

const readOnly = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV

// system mounts the kernel's file systems: /proc of this PID namespace, a few devices, and the
// control groups below the program's own.
func (r root) system(c *wire.Config) error {
	for _, dir := range []string{"proc", "dev", "tmp", "run/runsc", "bin/own", "etc"} {
		if err := os.MkdirAll(r.path(dir), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("proc", r.path("proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting /proc: %w", err)
	}
	// Writing there affects the whole machine.
	for _, name := range []string{"sys", "sysrq-trigger", "irq", "bus", "fs"} {
		path := r.path(filepath.Join("proc", name))
		err := unix.Mount(path, path, "", unix.MS_BIND|unix.MS_REC, "")
		if err == nil {
			err = unix.Mount("", path, "", unix.MS_BIND|unix.MS_REMOUNT|readOnly|unix.MS_NOEXEC, "")
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("mounting /proc/%s: %w", name, err)
		}
	}
	devices := []string{"null", "zero", "full", "random", "urandom"}
	if c.Platform == "kvm" {
		devices = append(devices, "kvm")
	}
	for _, name := range devices {
		if err := r.bind(filepath.Join("/dev", name), filepath.Join("dev", name), 0); err != nil {
			return err
		}
	}
	return r.groups(c.Group)
}

// groupRoot is the directory of control groups, on the host and in the root.
const groupRoot = "/sys/fs/cgroup"

// groups mounts what is below a control group as if it were the whole hierarchy.
func (r root) groups(group string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(groupRoot, &st); err != nil {
		return fmt.Errorf("looking at %s: %w", groupRoot, err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return r.bind(filepath.Join(groupRoot, group), groupRoot, 0)
	}
	entries, err := os.ReadDir(groupRoot)
	if err != nil {
		return fmt.Errorf("listing control groups: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(groupRoot, e.Name())
		if e.Type()&fs.ModeSymlink != 0 { // cpu, to cpu,cpuacct
			to, err := os.Readlink(path)
			if err == nil {
				err = errors.Join(os.MkdirAll(r.path(groupRoot), 0o755), os.Symlink(to, r.path(path)))
			}
			if err != nil {
				return err
			}
			continue
		}
		if err := unix.Statfs(path, &st); err != nil || st.Type != unix.CGROUP_SUPER_MAGIC {
			continue // v2 beside v1
		}
		// gVisor returns to the group that it is started in, so it must be able to see that
		// group.
		own := filepath.Join(group, "program")
		err := makeGroup(path, own)
		if err == nil {
			err = os.WriteFile(filepath.Join(path, own, "cgroup.procs"), []byte("0"), 0)
		}
		if err != nil {
			return fmt.Errorf("entering the control group %s: %w", filepath.Join(path, own), err)
		}
		if err := r.bind(filepath.Join(path, group), path, 0); err != nil {
			return err
		}
	}
	return nil
}

// makeGroup makes a group in a controller's tree. In cpuset, a group can be used only after its
// parent's values are copied.
func makeGroup(tree, group string) error {
	if err := os.MkdirAll(filepath.Join(tree, group), 0o755); err != nil {
		return err
	}
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		above, err := os.ReadFile(filepath.Join(tree, file))
		if errors.Is(err, fs.ErrNotExist) {
			return nil // another controller
		}
		if err != nil {
			return err
		}
		dir := tree
		for name := range strings.SplitSeq(strings.Trim(group, "/"), "/") {
			dir = filepath.Join(dir, name)
			has, err := os.ReadFile(filepath.Join(dir, file))
			if err == nil && strings.TrimSpace(string(has)) == "" {
				has, err = above, os.WriteFile(filepath.Join(dir, file), above, 0)
			}
			if err != nil {
				return err
			}
			above = has
		}
	}
	return nil
}

// bundles are the files in which distributions have the certificates of authorities, as in Go's
// crypto/x509. One of them is enough.
var bundles = []string{
	"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
	"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem",
}

// files writes the few files of /etc that are needed. Names are resolved by the given servers,
// not by one on the host's loopback, which cannot be reached from here, and not from the host's
// own list of hosts.
func (r root) files(c *wire.Config) error {
	texts := map[string]string{
		"/etc/resolv.conf": resolvConf(c.Nameservers), "/etc/hosts": "127.0.0.1\tlocalhost\n",
		"/etc/passwd": "root:x:0:0::/:/bin/false\n", "/etc/group": "root:x:0:\n",
	}
	for _, bundle := range bundles {
		data, err := os.ReadFile(bundle)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		texts[bundle] = string(data)
		break
	}
	for path, text := range texts {
		path = r.path(path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return errors.Join(r.bind(c.Runsc, runscPath, readOnly), r.bind(c.Contexts, contextsDir, readOnly|unix.MS_NOEXEC))
}

// gitTrees are the directories in which distributions have git, the programs that it runs, and
// their libraries. They hold no secrets; a host's own programs and data are elsewhere.
var gitTrees = []string{"/usr/bin", "/usr/lib", "/usr/lib64", "/usr/libexec", "/usr/share/git-core", "/lib", "/lib64"}

// gitScript runs in place of git, since the repositories, and the others that they name, are
// untrusted. BuildKit itself uses file: URLs between its own directories; "user" allows those,
// and denies them to submodules.
const gitScript = `#!/bin/sh
export GIT_CONFIG_COUNT=8
export GIT_CONFIG_KEY_0=protocol.allow GIT_CONFIG_VALUE_0=never
export GIT_CONFIG_KEY_1=protocol.https.allow GIT_CONFIG_VALUE_1=always
export GIT_CONFIG_KEY_2=protocol.http.allow GIT_CONFIG_VALUE_2=always
export GIT_CONFIG_KEY_3=protocol.file.allow GIT_CONFIG_VALUE_3=user
export GIT_CONFIG_KEY_4=core.hooksPath GIT_CONFIG_VALUE_4=/dev/null
export GIT_CONFIG_KEY_5=core.fsmonitor GIT_CONFIG_VALUE_5=false
export GIT_CONFIG_KEY_6=http.followRedirects GIT_CONFIG_VALUE_6=initial
export GIT_CONFIG_KEY_7=core.sshCommand GIT_CONFIG_VALUE_7=/bin/false
unset GIT_SSH_COMMAND
exec /usr/bin/git "$@"
`

// programs mounts git and what it needs, read-only, if the host has it. ssh is shadowed: it would
// offer keys, if there were any, to every server that a repository's submodules name.
func (r root) programs() error {
	if _, err := os.Stat("/usr/bin/git"); err != nil {
		return nil // ADD of a repository is refused
	}
	for _, dir := range gitTrees {
		info, err := os.Lstat(dir)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return err
		case info.Mode()&fs.ModeSymlink != 0:
			to, err := os.Readlink(dir)
			if err == nil {
				err = os.Symlink(to, r.path(dir))
			}
			if err != nil {
				return err
			}
		default:
			if err := r.bind(dir, dir, readOnly); err != nil {
				return err
			}
		}
	}
	// /bin is the root's own, and has the programs that git's scripts name there.
	for name, to := range map[string]string{"sh": "/usr/bin/sh", "false": "/usr/bin/false"} {
		if _, err := os.Stat(to); err != nil {
			to = "/bin/" + name // on a host that has not merged them
			if err := r.bind(to, to, readOnly); err != nil {
				return err
			}
			continue
		}
		if err := os.Symlink(to, r.path("bin/"+name)); err != nil {
			return err
		}
	}
	return errors.Join(os.Symlink("/bin/false", r.path("bin/own/ssh")),
		os.WriteFile(r.path("bin/own/git"), []byte(gitScript), 0o755))
}

// disk mounts the builds' disk. An image is mounted by a loop device, which the kernel frees with
// this mount namespace.
func (r root) disk(c *wire.Config) error {
	if !c.Image {
		return r.bind(c.Disk, dataDir, unix.MS_NOSUID|unix.MS_NODEV)
	}
	to := r.path(dataDir)
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	m := mount.Mount{Type: "ext4", Source: c.Disk, Options: strings.Split(diskOptions, ",")}
	if err := m.Mount(to); err != nil {
		return fmt.Errorf("%w: %w", errNoDisk, err)
	}
	return nil
}

// diskOptions are the mount options of an image. Inode tables are not filled in the background,
// which would write gigabytes of zeros into a sparse file. A failed disk accepts no more writes,
// so that no wrong results are read.
const diskOptions = "loop,nosuid,nodev,noatime,noinit_itable,errors=remount-ro"
