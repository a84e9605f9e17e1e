package e2e

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cayhq/cay/internal/caytest"
)

// groups lists the directories of the instance's control groups, inner ones first.
func (s *server) groups() []string {
	s.t.Helper()
	roots, err := filepath.Glob("/sys/fs/cgroup/*/cay-" + s.instance())
	if err != nil {
		s.t.Fatal(err)
	}
	var all []string
	for _, root := range append(roots, "/sys/fs/cgroup/cay-"+s.instance()) {
		if real, err := filepath.EvalSymlinks(root); err != nil || real != root {
			continue // no directory, or systemd's second name for a tree of v1: cpu for cpu,cpuacct
		}
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				all = append(all, path)
			}
			return nil // groups come and go during the walk
		})
	}
	slices.Reverse(all)
	return all
}

// groupProcesses lists the processes in the instance's control groups, of one sandbox or, if id is
// "", of all.
func (s *server) groupProcesses(id string) []int {
	s.t.Helper()
	var pids []int
	for _, group := range s.groups() {
		if !strings.Contains(group+"/", "/"+id) {
			continue
		}
		data, err := os.ReadFile(filepath.Join(group, "cgroup.procs"))
		if err != nil {
			continue // it has ended meanwhile
		}
		for _, field := range strings.Fields(string(data)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				s.t.Fatal(err)
			}
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return slices.Compact(pids)
}

// sentry returns the process of the sandbox's kernel, 0 if there is none.
func (s *server) sentry(id string) int {
	s.t.Helper()
	for _, pid := range s.groupProcesses(id) {
		cmdline, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
		if err == nil && strings.HasPrefix(string(cmdline), "runsc-sandbox\x00") {
			return pid
		}
	}
	return 0
}

// killSentry kills the sandbox's kernel, like a bug in it or a lack of memory on the host.
func (s *server) killSentry(id string) {
	s.t.Helper()
	pid := s.sentry(id)
	if pid == 0 {
		s.t.Fatalf("sandbox %s has no kernel: %v", id, s.groupProcesses(id))
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		s.t.Fatal(err)
	}
}

// reboot removes from the host everything that a reboot would. The server must not run.
func (s *server) reboot() {
	s.t.Helper()
	deadline := time.Now().Add(patience)
	for pids := s.groupProcesses(""); len(pids) > 0; pids = s.groupProcesses("") {
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("processes that do not end: %v", pids)
		}
		time.Sleep(10 * time.Millisecond) // a poll with a deadline
	}
	own, err := filepath.Glob("/sys/fs/cgroup/*/cay-" + s.instance() + "-server")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, group := range append(s.groups(), own...) {
		if err := os.Remove(group); err != nil {
			s.t.Fatal(err)
		}
	}
	for _, list := range []struct{ list, remove []string }{
		{[]string{"ip", "netns", "list"}, []string{"ip", "netns", "delete"}},
		{[]string{"ip", "-brief", "link"}, []string{"ip", "link", "delete"}},
		{[]string{"nft", "list", "tables"}, []string{"nft", "delete"}},
	} {
		for _, name := range s.ours(list.list...) {
			remove := exec.Command(list.remove[0], append(list.remove[1:], strings.Fields(name)...)...)
			if out, err := remove.CombinedOutput(); err != nil && len(s.ours(list.list...)) > 0 {
				// The other end of a link is removed with its namespace.
				s.t.Logf("%s: %v: %s", remove, err, out)
			}
		}
	}
	for _, pattern := range []string{"/run/cay/" + s.instance(), "/run/cay/servers/" + s.instance() + "*",
		"/run/cay/network/*" + s.instance() + "*"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			s.t.Fatal(err)
		}
		for _, path := range paths {
			if err := os.RemoveAll(path); err != nil {
				s.t.Fatal(err)
			}
		}
	}
	for _, left := range caytest.Leftovers(s.t, s.instance(), s.dataDir) {
		if left != "file "+s.dataDir {
			s.t.Errorf("the reboot has not taken %s", left)
		}
	}
}

// ours runs a command that lists names, and returns those that belong to the instance.
func (s *server) ours(command ...string) []string {
	s.t.Helper()
	out, err := exec.Command(caytest.RequireProgram(s.t, command[0]), command[1:]...).Output()
	if err != nil {
		s.t.Fatalf("%v: %v", command, err)
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		if !strings.Contains(line, s.instance()) {
			continue
		}
		name := strings.TrimSpace(line)
		if command[0] == "ip" {
			name, _, _ = strings.Cut(strings.Fields(name)[0], "@")
		}
		names = append(names, name)
	}
	return names
}

// checkpoints lists the sandboxes that have a directory of checkpoints.
func (s *server) checkpoints() []string {
	s.t.Helper()
	entries, err := os.ReadDir(filepath.Join(s.dataDir, "checkpoints"))
	if err != nil {
		s.t.Fatal(err)
	}
	var ids []string
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	return ids
}

// gone checks that nothing is left of a sandbox that was destroyed.
func (s *server) gone(id string) {
	s.t.Helper()
	for _, left := range s.onHost(id) {
		s.t.Errorf("the destroyed sandbox has left %s", left)
	}
	if slices.Contains(s.checkpoints(), id) {
		s.t.Errorf("there is a checkpoint of the destroyed sandbox %s", id)
	}
}
