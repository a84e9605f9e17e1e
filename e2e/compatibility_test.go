package e2e

import (
	"strings"
	"testing"
)

// lacks tries every feature that docs/compatibility.md lists as missing in gVisor, and prints how
// each fails.
const lacks = `
import ctypes, errno, os, socket, subprocess

libc = ctypes.CDLL(None, use_errno=True)

def call(number, *args):
    if libc.syscall(number, *args) < 0:
        raise OSError(ctypes.get_errno(), "")

def hole(whence):
    with open("/tmp/hole", "wb+") as f:
        f.truncate(1 << 20)
        os.lseek(f.fileno(), 0, whence)

def exchange():
    for name in "ab":
        open("/tmp/" + name, "w").close()
    if libc.renameat2(-100, b"/tmp/a", -100, b"/tmp/b", 2) < 0:
        raise OSError(ctypes.get_errno(), "")

def mount():
    if libc.mount(b"none", b"/mnt", b"tmpfs", 0, None) < 0:
        raise OSError(ctypes.get_errno(), "")

def core():
    subprocess.run(["sh", "-c", "cd /tmp; ulimit -c unlimited; exec sh -c 'kill -SEGV $$'"], stderr=subprocess.DEVNULL)
    os.stat("/tmp/core")

x86 = os.uname().machine == "x86_64"
tried = {
    "::1": lambda: socket.socket(socket.AF_INET6).bind(("::1", 0)),
    "bound to ::": lambda: socket.create_server(("::", 0), family=socket.AF_INET6),
    "exchange": exchange,
    "data": lambda: hole(os.SEEK_DATA),
    "hole": lambda: hole(os.SEEK_HOLE),
    "tmpfile": lambda: os.open("/tmp", os.O_TMPFILE | os.O_RDWR),
    "io_uring": lambda: call(425, 8, ctypes.create_string_buffer(120)),
    "userfaultfd": lambda: call(323 if x86 else 282, 0),
    "fanotify": lambda: call(300 if x86 else 262, 0, 0),
    "copy_file_range": lambda: call(326 if x86 else 285, 0, None, 0, None, 0, 0),
    "openat2": lambda: call(437, -100, b"/tmp", ctypes.create_string_buffer(24), 24),
    "landlock": lambda: call(444, None, 0, 1),
    "mount": mount,
    "core": core,
}
for path in ["/dev/fuse", "/dev/net/tun", "/dev/kvm", "/dev/loop-control", "/sys/class/net", "/proc/pressure", "/proc/self/pagemap"]:
    tried[path] = lambda path=path: os.stat(path)
for name, attempt in tried.items():
    try:
        attempt()
        print(name, "works")
    except OSError as e:
        print(name, errno.errorcode[e.errno])
`

// TestCompatibility checks docs/compatibility.md against gVisor. Remove a line there when the
// feature works.
func TestCompatibility(t *testing.T) {
	s := shared(t)
	id := s.create(nil)
	defer s.destroy(id)
	want := map[string]string{
		"::1": "EADDRNOTAVAIL", "bound to ::": "works", "exchange": "EINVAL", "data": "EINVAL", "hole": "EINVAL", "tmpfile": "EISDIR",
		"io_uring": "ENOSYS", "userfaultfd": "ENOSYS", "fanotify": "ENOSYS", "copy_file_range": "ENOSYS", "openat2": "ENOSYS", "landlock": "ENOSYS",
		"mount": "EPERM", "core": "ENOENT", "/dev/fuse": "ENOENT", "/dev/net/tun": "ENOENT", "/dev/kvm": "ENOENT", "/dev/loop-control": "ENOENT",
		"/sys/class/net": "ENOENT", "/proc/pressure": "ENOENT", "/proc/self/pagemap": "ENOENT",
	}
	got := s.want(id, "python3 - <<'end'"+lacks+"end")
	for line := range strings.SplitSeq(got, "\n") {
		at := strings.LastIndexByte(line, ' ')
		if at < 0 || want[line[:at]] != line[at+1:] {
			t.Errorf("%q, want %q", line, want[line[:max(at, 0)]])
		}
	}
	if n := strings.Count(got, "\n") + 1; n != len(want) {
		t.Errorf("%d features were tried, want %d:\n%s", n, len(want), got)
	}
}
