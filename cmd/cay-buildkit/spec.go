package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/moby/buildkit/executor"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// capabilities are docker's default set, for which Dockerfiles are written. The sandbox's own
// kernel implements them; they give no rights on the host.
var capabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD",
	"CAP_SETGID", "CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE",
	"CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

// spec returns the OCI spec of a step's sandbox, without its network and its limits.
func (s *steps) spec(ctx context.Context, b *runningStep, root string, mounts []executor.Mount,
	m executor.Meta) (*specs.Spec, error) {
	u, err := userOf(root, m.User)
	if err != nil {
		return nil, err
	}
	if err := workingDir(root, m.Cwd, u.UID, u.GID); err != nil {
		return nil, err
	}
	hostname := m.Hostname
	if hostname == "" {
		hostname = "build"
	}
	spec := &specs.Spec{
		Version:  "1.1.0",
		Hostname: hostname,
		Root:     &specs.Root{Path: root},
		Process: &specs.Process{
			Args: m.Args, Env: m.Env, Cwd: m.Cwd, User: u,
			Capabilities: &specs.LinuxCapabilities{Bounding: capabilities, Effective: capabilities, Permitted: capabilities},
			Rlimits:      rlimits(m),
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "dev", Options: []string{"nosuid", "strictatime", "mode=755"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=64m"}},
		},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
		}},
	}
	names, err := s.nameFiles(b, hostname, m)
	if err != nil {
		return nil, err
	}
	spec.Mounts = append(spec.Mounts, names...)
	for i, from := range mounts {
		to := specs.Mount{Destination: filepath.Join("/", from.Dest), Type: "bind",
			Options: []string{"rbind", "nosuid", "nodev"}}
		path, err := b.mount(ctx, from, filepath.Join(b.dir, fmt.Sprintf("mount-%d", i)), func(m mount.Mount) bool {
			if m.Type != "tmpfs" {
				return false
			}
			to.Type, to.Source, to.Options = m.Type, m.Source, m.Options
			return true
		})
		if err != nil {
			return nil, fmt.Errorf("mounting %s: %w", from.Dest, err)
		}
		if path != "" {
			to.Source = path
			if from.Readonly {
				to.Options = append(to.Options, "ro")
			}
		}
		// A later mount at the same place replaces an earlier one, such as that of /dev/shm.
		spec.Mounts = slices.DeleteFunc(spec.Mounts, func(m specs.Mount) bool { return m.Destination == to.Destination })
		spec.Mounts = append(spec.Mounts, to)
	}
	return spec, nil
}

// nameFiles writes the step's files of host names and name servers.
func (s *steps) nameFiles(b *runningStep, hostname string, m executor.Meta) ([]specs.Mount, error) {
	hosts := "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\t" + hostname + "\n"
	for _, h := range m.ExtraHosts {
		hosts += h.IP.String() + "\t" + h.Host + "\n"
	}
	var mounts []specs.Mount
	for name, text := range map[string]string{"hosts": hosts, "resolv.conf": resolvConf(s.config.Nameservers)} {
		path := filepath.Join(b.dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return nil, fmt.Errorf("writing a step's names: %w", err)
		}
		mounts = append(mounts, specs.Mount{Destination: "/etc/" + name, Type: "bind", Source: path,
			Options: []string{"ro", "rbind", "nosuid", "nodev", "noexec"}})
	}
	return mounts, nil
}

func resolvConf(nameservers []string) string {
	var text strings.Builder
	for _, n := range nameservers {
		text.WriteString("nameserver " + n + "\n")
	}
	return text.String()
}

func rlimits(m executor.Meta) []specs.POSIXRlimit {
	limits := []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1 << 16, Hard: 1 << 20}}
	for _, u := range m.Ulimit {
		limits = append(limits, specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: uint64(u.Soft),
			Hard: uint64(u.Hard)})
	}
	return limits
}
