package caytest

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Leftovers lists everything that an instance still has on this host: processes,
// control groups, mounts, namespaces, links, packet filter tables and files. It
// looks with the system's own tools where there are any, and does not use the code that
// is being tested.
func Leftovers(t testing.TB, instance, dataDir string) []string {
	t.Helper()
	var left []string
	add := func(kind, what string) { left = append(left, kind+" "+what) }

	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range processes {
		cmdline, err := os.ReadFile(path)
		if err == nil && bytes.Contains(cmdline, []byte(dataDir)) {
			add("process", strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
	}
	group := "cay-" + instance
	err = filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && (d.Name() == group || d.Name() == group+"-server") {
			add("control group", path)
		}
		return nil // groups come and go while we look
	})
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dataDir) || strings.Contains(line, group) {
			add("mount", strings.TrimSpace(line))
		}
	}
	for kind, args := range map[string][]string{
		"link":               {"ip", "-brief", "link"},
		"namespace":          {"ip", "netns", "list"},
		"packet filter rule": {"nft", "list", "tables"},
	} {
		out, err := exec.Command(RequireProgram(t, args[0]), args[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("looking for a %s: %v: %s", kind, err, out)
		}
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, instance) {
				add(kind, strings.TrimSpace(line))
			}
		}
	}
	for _, pattern := range []string{dataDir, "/run/cay/" + instance, "/run/cay/servers/" + instance + "*",
		"/run/netns/*" + instance + "*", "/run/cay/network/*" + instance + "*"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(fmt.Errorf("looking for %s: %w", pattern, err))
		}
		for _, f := range files {
			add("file", f)
		}
	}
	return left
}
