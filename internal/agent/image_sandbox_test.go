package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agentapi"
)

// TestAnyImageBoots starts sandboxes of images that lack usual files or have something else in their
// place. Each sandbox must have a host name, take users by number and run its programs.
func TestAnyImageBoots(t *testing.T) {
	must := func(t testing.TB, errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	// link and file replace an entry of the image by a link and by an empty file.
	link := func(t testing.TB, to, at string) { must(t, os.RemoveAll(at), os.Symlink(to, at)) }
	file := func(t testing.TB, at string) { must(t, os.RemoveAll(at), os.WriteFile(at, nil, 0o644)) }
	for name, change := range map[string]func(t testing.TB, root, busybox string){
		"one static program": func(t testing.TB, root, busybox string) {
			entries, err := os.ReadDir(root)
			must(t, err)
			for _, e := range entries {
				if e.Name() != ".cay" { // belongs to the tests and not to an image
					must(t, os.RemoveAll(filepath.Join(root, e.Name())))
				}
			}
			copyFile(t, busybox, filepath.Join(root, "busybox"), 0o755)
		},
		"etc and tmp are files": func(t testing.TB, root, _ string) {
			file(t, root+"/etc")
			file(t, root+"/tmp")
		},
		"etc and tmp lead nowhere": func(t testing.TB, root, _ string) {
			link(t, "/system/etc", root+"/etc")
			link(t, "var/tmp", root+"/tmp")
		},
		"etc's files lead nowhere, tmp elsewhere": func(t testing.TB, root, _ string) {
			for _, f := range []string{"hosts", "hostname", "resolv.conf"} {
				link(t, "../run/systemd/resolve/"+f, root+"/etc/"+f)
			}
			link(t, "var", root+"/tmp")
		},
		"etc's files are none, tmp leads to itself": func(t testing.TB, root, _ string) {
			must(t, os.Remove(root+"/etc/passwd"), os.Mkdir(root+"/etc/passwd", 0o755), os.Mkdir(root+"/etc/hosts", 0o755),
				unix.Mkfifo(root+"/etc/hostname", 0o644))
			link(t, "resolv.conf", root+"/etc/resolv.conf")
			link(t, "tmp", root+"/tmp")
		},
		"tmp is another mount": func(t testing.TB, root, _ string) { link(t, "dev", root+"/tmp") },
	} {
		t.Run(name, func(t *testing.T) {
			s := startSandbox(t, options{image: change})
			err := s.client.Init(t.Context(), s.target,
				agentapi.InitRequest{Hostname: "given", Nameservers: []string{"10.9.8.7"}})
			if err != nil {
				t.Fatalf("init: %v", err)
			}
			program := []string{"/bin/busybox"}
			if name == "one static program" {
				program[0] = "/busybox"
				r := s.exec(agentapi.ExecuteRequest{Command: "echo x"})
				if r.ExitCode != 127 || !strings.Contains(string(r.Stderr), "/bin/sh: no such file") {
					t.Errorf("without a shell: %+v: %s", r.ExitCode, r.Stderr)
				}
				stat := append(program, "stat", "-c", "%a %F", "/tmp", "/etc", "/proc", "/dev", "/sys")
				r = s.exec(agentapi.ExecuteRequest{Args: stat, Workdir: "/"})
				if string(r.Stdout) != "1777 directory\n755 directory\n555 directory\n755 directory\n755 directory\n" {
					t.Errorf("directories that were missing: %s%s", r.Stdout, r.Stderr)
				}
			}
			for _, who := range []string{"", "1000:1000"} {
				r := s.exec(agentapi.ExecuteRequest{Args: append(program, "hostname"), User: who})
				if r.ExitCode != 0 || string(r.Stdout) != "given\n" {
					t.Errorf("as %q: exit code %d, %q, %q", who, r.ExitCode, r.Stdout, r.Stderr)
				}
			}
			if name == "tmp is another mount" {
				s.sh("test -c /dev/null && test -d /tmp/pts")
			}
			if strings.HasPrefix(name, "etc's files lead nowhere") || name == "one static program" {
				r := s.exec(agentapi.ExecuteRequest{Args: append(program, "cat", "/etc/resolv.conf", "/etc/hostname")})
				if string(r.Stdout) != "nameserver 10.9.8.7\ngiven\n" {
					t.Errorf("resolv.conf and hostname are %q, %q", r.Stdout, r.Stderr)
				}
			}
		})
	}
}
