package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	cay "github.com/cayhq/cay/sdk/go"
)

// hostOOMKills returns how often the kernel has killed a process in the sandbox's control group. It
// must stay 0: the victim would be the sentry.
func hostOOMKills(t *testing.T, s *server, id string) string {
	t.Helper()
	for _, path := range []string{
		"/sys/fs/cgroup/memory/cay-" + s.instance() + "/" + id + "/memory.oom_control",
		"/sys/fs/cgroup/cay-" + s.instance() + "/" + id + "/memory.events",
	} {
		data, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(data)) {
			if n, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok {
				return n
			}
		}
	}
	t.Error("the sandbox has no memory control group")
	return ""
}

// TestMemory lets commands ask for more memory than there is, in every way a process can. The
// process at fault is killed and flagged; the sandbox and its other commands live.
func TestMemory(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	id := s.create(object{"timeout": "1h"}) // a busy machine takes more than the default
	defer s.destroy(id)
	s.want(id, "nohup sh -c 'while true; do date > /tmp/heartbeat; sleep 0.1; done' >/dev/null 2>&1 & echo started")

	for _, tt := range []struct {
		name string
		args []string
	}{
		{"at once", []string{"python3", "-c", "b = bytearray(2 << 30)\nprint(len(b))"}},
		{"in steps", []string{"python3", "-c", "l = []\nwhile True: l.append(bytearray(1 << 20))"}},
		{"small pieces", []string{"python3", "-c", "l = []\nwhile True: l.append(str(len(l)) * 100)"}},
		{"shared mapping", []string{"python3", "-c", "import mmap\nl = []\nwhile True:\n m = mmap.mmap(-1, 8 << 20); m.write(b'x' * (8 << 20)); l.append(m)"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := s.api().Execute(t.Context(), id, cay.ExecuteRequest{Args: tt.args, Timeout: new("5m")})
			if err != nil || !r.OOMKilled || r.ExitCode != 137 {
				t.Fatalf("%s, %v", jsonOf(r), err)
			}
			s.alive(id)
		})
	}

	t.Run("the shell goes on", func(t *testing.T) {
		r := s.exec(id, "python3 -c 'b = bytearray(2 << 30)'; echo the child ended with $?")
		if r.ExitCode != 0 || !strings.Contains(r.Stdout, "ended with 137") || !r.OOMKilled {
			t.Errorf("got %+v", r)
		}
	})
	t.Run("several processes", func(t *testing.T) {
		r := s.exec(id, `for i in 1 2 3 4 5 6 7 8; do python3 -c 'l = []
while True: l.append(bytearray(3 << 20))' & done; wait; echo all gone`, object{"timeout": "5m"})
		if !r.OOMKilled || !strings.Contains(r.Stdout, "all gone") {
			t.Errorf("got %+v", r)
		}
		s.alive(id)
	})
	t.Run("a command of several processes", func(t *testing.T) {
		for range 2 {
			r := s.exec(id, `exec python3 -c 'import os
for _ in range(7):
    if os.fork() == 0: break
l = []
while True: l.append(bytearray(3 << 20))'`, object{"timeout": "5m"})
			if r.ExitCode != 137 || !r.OOMKilled {
				t.Errorf("got %+v", r)
			}
		}
		s.alive(id)
	})
	t.Run("several commands at once", func(t *testing.T) {
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				r := s.exec(id, "exec python3 -c 'l = []\nwhile True: l.append(bytearray(5 << 20))'", object{"timeout": "5m"})
				if !r.OOMKilled || r.ExitCode != 137 {
					t.Errorf("got %+v", r)
				}
			})
		}
		wg.Wait()
		s.alive(id)
	})
	t.Run("tmpfs", func(t *testing.T) {
		r := s.exec(id, "dd if=/dev/zero of=/dev/shm/fill bs=1M count=2000; rm -f /dev/shm/fill")
		if !strings.Contains(r.Stderr, "No space left") && !r.OOMKilled {
			t.Errorf("got %+v", r)
		}
		r = s.exec(id, "dd if=/dev/zero of=/dev/fill bs=1M count=2000; stat -c %s /dev/fill; rm /dev/fill")
		if r.Stdout != "67108864\n" || !strings.Contains(r.Stderr, "No space left") || r.OOMKilled {
			t.Errorf("got %+v", r)
		}
		r = s.exec(id, "mkdir /dev/many && cd /dev/many && seq 6000 | xargs touch; ls | wc -l; cd /; rm -r /dev/many")
		if n, err := strconv.Atoi(strings.TrimSpace(r.Stdout)); err != nil || n < 3500 || n > 4096 ||
			!strings.Contains(r.Stderr, "No space left") {
			t.Errorf("got %+v", r)
		}
		s.alive(id)
	})
	t.Run("tmpfs and a process together", func(t *testing.T) {
		r := s.exec(id, "dd if=/dev/zero of=/dev/shm/half bs=1M count=200 2>/dev/null; python3 -c 'b = bytearray(500 << "+
			"20)'; echo $?; rm /dev/shm/half")
		if !strings.Contains(r.Stdout, "137") || !r.OOMKilled {
			t.Errorf("got %+v", r)
		}
		s.alive(id)
	})
	t.Run("/tmp is on the disk", func(t *testing.T) {
		r := s.exec(id, "dd if=/dev/zero of=/tmp/fill bs=1M count=1200 && stat -c %a /tmp && "+
			"df --output=target /tmp | tail -1; rm -f /tmp/fill", object{"timeout": "5m"})
		if r.ExitCode != 0 || r.OOMKilled || r.Stdout != "1777\n/\n" {
			t.Errorf("got %+v", r)
		}
	})
	t.Run("the disk is not memory", func(t *testing.T) {
		// The command asks for twice the sandbox's memory while most of it is in use.
		r := s.exec(id, `python3 -c '
b = bytearray(300 << 20)
f = open("/var/tmp/big", "wb")
for i in range(1024): f.write(b[:1 << 20])
f.close()
print("written")' && ls -l /var/tmp/big && rm /var/tmp/big`, object{"timeout": "5m"})
		if r.ExitCode != 0 || r.OOMKilled || !strings.Contains(r.Stdout, "written") {
			t.Errorf("got %+v", r)
		}
	})
	s.want(id, "rm -f /tmp/heartbeat; sleep 1; cat /tmp/heartbeat") // the background command lived through all of it
	if n := hostOOMKills(t, s, id); n != "0" {
		t.Errorf("the kernel killed %s times in the sandbox's group", n)
	}
}

func TestForkBomb(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	id, other := s.create(object{"timeout": "1h"}), s.create(object{"timeout": "1h"})
	defer s.destroy(id)
	defer s.destroy(other)
	r := s.exec(id, "b() { b | b & }; b; sleep 60", object{"timeout": "3s"})
	if !r.TimedOut && r.ExitCode == 0 {
		t.Errorf("got %+v", r)
	}
	s.alive(other)
	s.alive(id)
	// Processes that are left of the first command count against the second until they are reaped.
	for deadline := time.Now().Add(patience); len(s.want(id, "ls -d /proc/[0-9]* | wc -l")) > 1; {
		if time.Now().After(deadline) {
			t.Fatal("the fork bomb's processes do not go")
		}
	}
	const fill = `python3 -c '
import subprocess, time
n = 0
try:
    while True:
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        n += 1
except OSError as e:
    print(n, e.strerror, flush=True)
time.sleep(600)'`
	const refused = "Resource temporarily unavailable"
	for _, timeout := range []string{"20s", "2m", "5m"} { // a busy machine takes longer to get to the limit
		if r = s.exec(id, fill, object{"timeout": timeout}); strings.Contains(r.Stdout, refused) {
			break
		}
	}
	if !r.TimedOut || r.ExitCode != 124 || !strings.Contains(r.Stdout, refused) {
		t.Errorf("got %+v", r)
	}
	// All descendants have ended with their command, though they had left its session.
	if n := s.want(id, "ls -d /proc/[0-9]* | wc -l"); len(n) > 1 {
		t.Errorf("%s processes are left", n)
	}
	s.alive(id)
	// A fork bomb in a background process starts when the sandbox has been quiet for a while.
	if _, err := s.api().StartProcess(t.Context(), id,
		cay.StartProcessRequest{Command: new("sleep 8; b() { b | b & b; }; b")}); err != nil {
		t.Fatalf("start: %v", err)
	}
	time.Sleep(10 * time.Second) // until the bomb runs; an earlier call would be noticed inside
	s.settles("the bomb", func() bool {
		r := s.exec(id, "ls -d /proc/[0-9]* 2>/dev/null | wc -l") // on a busy machine it may not end beside the bomb
		return r.ExitCode == 0 && len(strings.TrimSpace(r.Stdout)) == 1
	})
	s.alive(id)
	if n := hostOOMKills(t, s, id); n != "0" {
		t.Errorf("the kernel killed %s times in the sandbox's group", n)
	}
}

func TestOutputFlood(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	r := s.exec(id, "yes | head -c 100000000; yes error | head -c 20000000 >&2; echo end", object{"timeout": "5m"})
	const most = 8 << 20
	if r.ExitCode != 0 || len(r.Stdout) != most || len(r.Stderr) != most || !r.StdoutTruncated || !r.StderrTruncated {
		t.Errorf("exit code %d, %d and %d bytes, truncated %v %v", r.ExitCode, len(r.Stdout), len(r.Stderr),
			r.StdoutTruncated, r.StderrTruncated)
	}
	r = s.exec(id, "exec yes", object{"timeout": "4s"})
	if !r.TimedOut || r.ExitCode != 124 || !r.StdoutTruncated {
		t.Errorf("exit code %d, timed out %v", r.ExitCode, r.TimedOut)
	}
	s.alive(id)
}

func TestFullDisk(t *testing.T) {
	s := shared(t)
	id := s.create(object{"disk_size_mb": 100})
	defer s.destroy(id)
	r := s.exec(id, "dd if=/dev/urandom of=/var/fill bs=1M count=200")
	if r.ExitCode == 0 || !strings.Contains(r.Stderr, "No space left on device") {
		t.Errorf("got %+v", r)
	}
	if err := s.api().WriteFile(t.Context(), id, "/var/more", strings.NewReader(strings.Repeat("x", 10<<20)),
		cay.WriteFileOptions{}); !isRefused(err, 507, "disk_full") {
		t.Errorf("upload to a full disk: %v", err)
	}
	if _, err := s.api().ReadFile(t.Context(), id, "/var/more", cay.ReadFileOptions{}); !isRefused(err, 404,
		"file_not_found") {
		t.Errorf("a part of the upload is there: %v", err)
	}
	s.alive(id)
	s.want(id, "rm /var/fill && dd if=/dev/zero of=/var/again bs=1M count=50")
	if size := s.want(id, "df --output=size -BM / | tail -1"); strings.TrimSpace(size) != "100M" {
		t.Errorf("df says %s", size)
	}
}

func TestZombiesAndKilledChildren(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	id := s.create(object{"timeout": "1h"})
	defer s.destroy(id)
	// Hundreds of orphans that end must be reaped by the first process.
	s.want(id, `for i in $(seq 3); do (for j in $(seq 100); do (true &) ; done) ; done; sleep 0.5`,
		object{"timeout": "5m"})
	if n := s.want(id, `grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l`); n != "0" {
		t.Errorf("%s zombies are left", n)
	}
	for signal, want := range map[int]int{9: 137, 15: 143, 11: 139} {
		if r := s.exec(id, fmt.Sprintf("kill -%d $$", signal)); r.ExitCode != want {
			t.Errorf("killed by %d: got %+v", signal, r)
		}
	}
	// Only root can end the first process, and with it the sandbox: see docs/guarantees.md.
	s.exec(id, "kill -9 1; kill -15 1; kill -9 -1", object{"user": "user"})
	s.alive(id)
	s.exec(id, "kill -15 1; kill -1 1; kill -2 1")
	s.alive(id)
}

func TestTimeoutReachesEveryDescendant(t *testing.T) {
	onOneStore(t)
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	r := s.exec(id, `setsid sh -c 'sleep 301 & sleep 302' & (setsid sleep 303 &) ; nohup sleep 304 & python3 -c '
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.setpgid(0, 0)
        time.sleep(305)
    os._exit(0)
time.sleep(306)'`, object{"timeout": "2s"})
	if !r.TimedOut || r.ExitCode != 124 {
		t.Errorf("got %+v", r)
	}
	if left := s.want(id, "pgrep -a 'sleep|python' || true"); left != "" {
		t.Errorf("still there:\n%s", left)
	}
}

func TestTwentyAtOnce(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			r := s.exec(id, fmt.Sprintf("sleep 0.2; cat; echo %d", i), object{"stdin": fmt.Sprint("in ", i, "\n")})
			if want := fmt.Sprintf("in %d\n%d\n", i, i); r.Stdout != want {
				t.Errorf("got %q, want %q", r.Stdout, want)
			}
		})
	}
	wg.Wait()
}

// TestWhoAndWhere checks users, home directories and sudo, as users of ordinary images expect them.
func TestWhoAndWhere(t *testing.T) {
	s := shared(t)
	id := s.create(object{"env": object{"FROM_CREATE": "yes"}})
	defer s.destroy(id)
	for command, want := range map[string]string{
		"id -u":                            "0",
		"pwd":                              "/root",
		"echo $FROM_CREATE":                "yes",
		"uname -v | cut -c1-2":             "#1",
		"dmesg | grep -o gVisor | head -1": "gVisor",
	} {
		if got := s.want(id, command); got != want {
			t.Errorf("%q says %q, want %q", command, got, want)
		}
	}
	for command, want := range map[string]string{
		"id -un":                         "user",
		"pwd":                            "/home/user",
		"sudo -n id -u":                  "0",
		"sudo -n whoami 2>&1":            "root",
		"touch ~/x && stat -c %U:%G ~/x": "user:user",
	} {
		if got := s.want(id, command, object{"user": "user"}); got != want {
			t.Errorf("as user, %q says %q, want %q", command, got, want)
		}
	}
	for _, forbidden := range []string{
		"mount -t tmpfs none /mnt", "sudo -n mount -t tmpfs none /mnt", "unshare -m true", "mknod /tmp/sda b 8 0 && head -c1 /tmp/sda",
		"echo 1 > /proc/sys/kernel/panic", "ls /sys/fs/cgroup/memory", "cat /proc/1/environ",
	} {
		if r := s.exec(id, forbidden); r.ExitCode == 0 {
			t.Errorf("%q succeeds: %s", forbidden, r.Stdout)
		}
	}
}

// TestDev writes into /dev, to the terminal that shows a password prompt, and to devices. It checks
// that the devices are the same as docker's, and that only root can make files there.
func TestDev(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	for _, who := range []string{"root", "user"} {
		// The command has a terminal, and script prints its output.
		const prompt = `script -qec 'printf "Password: " > /dev/tty; read x < /dev/tty; echo got $x > /dev/tty' /dev/null`
		if got := s.want(id, "echo secret | "+prompt, object{"user": who}); !strings.Contains(got, "Password: ") ||
			!strings.Contains(got, "got secret") {
			t.Errorf("as %s, the terminal shows %q", who, got)
		}
		s.want(id, "for d in null zero full random urandom tty; do test -c /dev/$d && test -w /dev/$d || exit 1; done; "+
			"echo x > /dev/null; head -c 3 /dev/urandom | wc -c; echo > /dev/full && exit 1; true", object{"user": who})
	}
	if got := s.want(id,
		"cd /dev && ls -d fd null zero full random urandom tty ptmx pts shm stdin stdout stderr | wc -l; "+
			"readlink fd stdin stdout stderr ptmx | tr '\n' ' '"); got != "13\n"+
		"/proc/self/fd /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2 pts/ptmx" {
		t.Errorf("in /dev are %q", got)
	}
	// syslog binds a socket in /dev, and other programs look for a device that does not exist.
	s.want(id, `python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("/dev/log")' && ln -s /proc/kcore `+
		`/dev/core && mkdir /dev/net-of-mine && rm -r /dev/log /dev/core /dev/net-of-mine`)
	if r := s.exec(id, "touch /dev/x; ln -s a /dev/b", object{"user": "user"}); r.ExitCode == 0 {
		t.Error("a user who is not root can write into /dev")
	}
}

// TestHostIsInvisible looks from inside for everything of the host.
func TestHostIsInvisible(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	hostname, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	out := s.want(id, "cat /proc/mounts /proc/cpuinfo /proc/version /etc/hostname /proc/self/cgroup; ls -la / /.cay; "+
		"hostname")
	for _, secret := range []string{s.dataDir, filepath.Dir(s.dataDir), "/run/cay", s.key} {
		if strings.Contains(out, secret) {
			t.Errorf("the sandbox sees %q:\n%s", secret, out)
		}
	}
	if s.want(id, "hostname") == hostname {
		t.Error("the sandbox has the host's name")
	}
	// No file system has the size of the host's disks or is a mount of a directory of the host.
	var host unix.Statfs_t
	if err := unix.Statfs(s.dataDir, &host); err != nil {
		t.Fatal(err)
	}
	sizes := s.exec(id, "stat -f -c '%n %b %S' / /.cay /proc/1/exe $(cut -d' ' -f2 /proc/mounts); "+
		"grep -c 9p /proc/mounts").Stdout
	if strings.Contains(sizes, fmt.Sprintf(" %d ", host.Blocks)) || !strings.HasSuffix(sizes, "\n0\n") {
		t.Errorf("the sandbox sees a disk of the host's, of %d blocks:\n%s", host.Blocks, sizes)
	}
}
