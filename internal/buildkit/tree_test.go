package buildkit

import (
	"archive/tar"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFileTree checks, while a step runs, what the program and its processes see: of the host's
// files only those that it is given, read-only, and only the capabilities that they need.
func TestFileTree(t *testing.T) {
	r := newFixture(t)
	// These are in a data directory beside the Builder's.
	database := filepath.Join(filepath.Dir(r.cfg.Dir), "cay.db")
	secret := filepath.Join("/run", "secret-of-the-host")
	for _, path := range []string{database, secret} {
		if err := os.WriteFile(path, []byte("secret"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	seen := 0
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := r.Build(ctx, Request{Dockerfile: sleeping, Base: testBases(t), Scope: "one"}, whenAsleep(func() {
		defer cancel()
		pids, err := processesOf(r.cfg.Program)
		if err != nil || len(pids) != 1 {
			t.Fatalf("the program has the processes %v, %v", pids, err)
		}
		for _, pid := range descendants(t, pids[0]) {
			seen++
			for _, path := range []string{"/etc/shadow", "/home", "/var", "/opt", "/srv", "/mnt", "/usr/local", "/boot",
				"/sys/kernel", "/dev/loop0", "/dev/kmsg", database, secret, r.cfg.Dir, r.disks(), r.cfg.Runsc, repositories} {
				// A sandbox's own image may have these, but none of its processes is checked
				// here.
				if _, err := os.Lstat(filepath.Join("/proc", pid, "root", path)); err == nil {
					t.Errorf("process %s (%s) sees %s", pid, command(pid), path)
				}
			}
			checkFiles(t, pid)
			checkRights(t, pid)
		}
		checkMounts(t, r, pids[0])
	}))
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if seen < 3 {
		t.Errorf("looked at %d processes, want the program, a sandbox and what serves it files", seen)
	}
}

// descendants returns a process and all that it has started, except the processes inside a
// sandbox, which belong to the sandbox's kernel.
func descendants(t *testing.T, pid string) []string {
	t.Helper()
	all := []string{pid}
	links, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	parents := map[string]string{}
	for _, link := range links {
		data, err := os.ReadFile(link)
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(data), ") ")
		if fields := strings.Fields(rest); len(fields) > 1 {
			parents[filepath.Base(filepath.Dir(link))] = fields[1]
		}
	}
	for i := 0; i < len(all); i++ {
		for child, parent := range parents {
			if parent == all[i] && !slices.Contains(all, child) {
				all = append(all, child)
			}
		}
	}
	return slices.DeleteFunc(all, func(pid string) bool {
		return !strings.Contains(command(pid), "cay-") && !strings.Contains(command(pid), "runsc-")
	})
}

func command(pid string) string {
	data, _ := os.ReadFile(filepath.Join("/proc", pid, "cmdline")) // empty if the process has gone
	name, _, _ := strings.Cut(string(data), "\x00")
	return name
}

// device returns the file system that a file is on.
func device(t *testing.T, path string) uint64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Dev
}

// checkFiles checks that a process has no open directory of the host's files.
func checkFiles(t *testing.T, pid string) {
	t.Helper()
	host := []uint64{device(t, "/"), device(t, "/run"), device(t, "/dev")}
	links, err := filepath.Glob(filepath.Join("/proc", pid, "fd/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range append(links, filepath.Join("/proc", pid, "cwd")) {
		info, err := os.Stat(link)
		if err == nil && info.IsDir() && slices.Contains(host, info.Sys().(*syscall.Stat_t).Dev) {
			to, _ := os.Readlink(link) // for the message
			t.Errorf("process %s (%s) has the directory %s open", pid, command(pid), to)
		}
	}
}

// checkRights checks the capabilities that a process has lost. Those of a user namespace do not
// count.
func checkRights(t *testing.T, pid string) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("/proc", pid, "status"))
	if err != nil {
		return // it has ended
	}
	status := map[string]string{}
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(line, ":")
		status[name] = strings.TrimSpace(value)
	}
	if status["NoNewPrivs"] != "1" || status["Seccomp"] != "2" {
		t.Errorf("process %s (%s): NoNewPrivs %s, Seccomp %s", pid, command(pid), status["NoNewPrivs"], status["Seccomp"])
	}
	ours, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		t.Fatal(err)
	}
	if theirs, err := os.Readlink(filepath.Join("/proc", pid, "ns/user")); err != nil || theirs != ours {
		return
	}
	for _, set := range []string{"CapPrm", "CapEff", "CapBnd"} {
		has, err := strconv.ParseUint(status[set], 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]int{"SYS_MODULE": unix.CAP_SYS_MODULE, "SYS_RAWIO": unix.CAP_SYS_RAWIO,
			"SYS_BOOT": unix.CAP_SYS_BOOT, "SYS_TIME": unix.CAP_SYS_TIME, "SYSLOG": unix.CAP_SYSLOG, "BPF": unix.CAP_BPF,
			"PERFMON": unix.CAP_PERFMON, "MAC_ADMIN": unix.CAP_MAC_ADMIN} {
			if has&(1<<c) != 0 {
				t.Errorf("process %s (%s): %s has %s", pid, command(pid), set, name)
			}
		}
	}
}

// checkMounts checks that each of the program's mounts is of an allowed kind, and that those of
// the host's disk are read-only.
func checkMounts(t *testing.T, r *fixture, pid string) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("/proc", pid, "mountinfo"))
	if err != nil {
		t.Fatal(err)
	}
	var st syscall.Stat_t
	if err := syscall.Stat("/", &st); err != nil {
		t.Fatal(err)
	}
	host := strconv.Itoa(int(unix.Major(st.Dev))) + ":" + strconv.Itoa(int(unix.Minor(st.Dev)))
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		number, root, point, options := fields[2], fields[3], fields[4], fields[5]
		if number != host {
			continue
		}
		allowed := []string{r.cfg.Runsc, r.contexts("one"), "/usr/bin", "/usr/lib", "/usr/lib64", "/usr/libexec",
			"/usr/share/git-core", "/bin", "/lib", "/lib64"}
		if !slices.ContainsFunc(allowed, func(path string) bool {
			return root == path || strings.HasSuffix(path, root) &&
				root != "/"
		}) {
			t.Errorf("the program has %s of the host's disk at %s", root, point)
		}
		if !slices.Contains(strings.Split(options, ","), "ro") {
			t.Errorf("the program has %s of the host's disk at %s with %s", root, point, options)
		}
	}
	for _, name := range []string{"sys/kernel/core_pattern", "sysrq-trigger"} {
		f, err := os.OpenFile(filepath.Join("/proc", pid, "root/proc", name), os.O_WRONLY, 0)
		if err == nil {
			f.Close()
			t.Errorf("the program can write to /proc/%s", name)
		}
	}
}

// TestDockerfileReachesNoFile tries to get a file of the host into an image, by every instruction
// that names files.
func TestDockerfileReachesNoFile(t *testing.T) {
	r := newFixture(t)
	find := testBases(t)
	const text = "a secret of the host"
	secret := filepath.Join("/run", "secret-of-the-host")
	if err := os.WriteFile(secret, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	ways := []string{"/proc/1/root" + secret, "/proc/self/root" + secret, "/proc/1/cwd" + secret,
		"../../../../../.." + secret, secret}
	for fd := 3; fd < 12; fd += 2 {
		ways = append(ways, "/proc/1/fd/"+strconv.Itoa(fd)+"/../../../../../.."+secret)
	}
	for i, way := range ways {
		sent := write(t, archive(t, tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: way},
			tar.Header{Name: "above", Typeflag: tar.TypeSymlink, Linkname: filepath.Dir(way)}))
		for j, step := range []string{"COPY link /x", "COPY above/ /x/", "COPY above/secret-of-the-host /x",
			"COPY " + way + " /x", "ADD file://" + way + " /x",
			"COPY --from=base " + way + " /x", "RUN --mount=type=bind,source=above,target=/m cp -r /m /x", "RUN --mount=type=bind,source=link,target=/m cp /m /x"} {
			if i > 0 && (i > 2 && j > 0 || strings.HasPrefix(step, "RUN")) {
				continue // this way does not apply to the instruction
			}
			result, err := r.Build(t.Context(), Request{Dockerfile: "FROM base\n" + step + "\n", Base: find, Context: sent}, nil)
			if err != nil {
				continue // it names a file that does not exist
			}
			_, files := opened(t, result)
			for path, file := range files {
				if strings.Contains(file, text) {
					t.Errorf("%s with a link to %s gave %s: %s", step, way, path, file)
				}
			}
			if err := result.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}
