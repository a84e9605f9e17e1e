package main

import "strings"

// release is a release of Debian, of which roots are made.
type release struct {
	suite    string
	arch     string
	kernel   string   // its package
	packages []string // in addition to those that all releases have
}

// machine is one kind of host.
type machine struct {
	name    string
	release release
	append  string // appended to the kernel's command line
	small   bool   // 1 CPU and 1 GiB instead of 2 and 4
	checks  []string
}

var (
	// tools has the programs that tests use, and what cay runs beside.
	tools = []string{"nftables", "python3", "git", "erofs-utils", "mmdebstrap", "ufw", "firewalld", "docker.io"}

	bookworm = release{"bookworm", "amd64", "linux-image-cloud-amd64", append(tools, "systemd-oomd")}
	trixie   = release{"trixie", "amd64", "linux-image-cloud-amd64", append(tools, "systemd-oomd")}
	// bullseye is out of support, and not every mirror has the package that names its newest kernel.
	bullseye = release{"bullseye", "amd64", "linux-image-5.10.0-46-cloud-amd64", tools}
	// The programs of its packages run on other processors through Debian's qemu-user-static and binfmt-support.
	arm64 = release{"bookworm", "arm64", "linux-image-cloud-arm64", nil}
)

// name returns the name of the release's roots in the cache. No name is the beginning of another and a "-".
func (r release) name() string {
	if r.arch == "amd64" {
		return r.suite
	}
	return r.arch + "-" + r.suite
}

// Checks that a machine can have, in their order. Those in use leave the unit installed; those in
// odd undo their changes.
var (
	use   = []string{"unit", "doctor", "restart", "reboot", "allocators", "swap"}
	rooms = []string{"cgroup", "runsc", "network", "agent", "node", "buildkit"}
	story = []string{"story", "limits", "builds", "memory-one", "memory-many", "memory-files", "processes", "disk",
		"sleep", "egress", "crashes"}
	odd = []string{"oomd", "noexec", "full-var", "clock", "loopback6", "ufw", "firewalld", "docker"}
)

var machines = []machine{
	{name: "bookworm", release: bookworm, checks: join(use, rooms, story)},
	// Its /tmp would be memory, and so would be the disks of the sandboxes that tests make there.
	{name: "trixie", release: trixie, append: "systemd.mask=tmp.mount", checks: join(use, odd, rooms, story)},
	// Its kernel counts swap only on request.
	{name: "bullseye", release: bullseye, append: "swapaccount=1", checks: join(use, rooms, story)},
	{name: "bookworm-v1", release: bookworm, append: "systemd.unified_cgroup_hierarchy=0",
		checks: join(use, []string{"cgroup", "node", "memory-one", "memory-many", "memory-files"})},
	{name: "bookworm-power", release: bookworm, checks: []string{"cuts"}},
	{name: "trixie-power", release: trixie, checks: []string{"cuts"}},
	{name: "bookworm-odd", release: bookworm, checks: join([]string{"unit"}, odd)},
	{name: "bookworm-arm64", release: arm64, checks: []string{"arm64"}},
	{name: "bookworm-small", release: bookworm, small: true, checks: use},
}

func join(lists ...[]string) (all []string) {
	for _, l := range lists {
		all = append(all, l...)
	}
	return all
}

// names lists the machines.
func names() string {
	var all []string
	for _, m := range machines {
		all = append(all, m.name)
	}
	return strings.Join(all, " ")
}
