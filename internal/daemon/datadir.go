package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// checkDataDir checks the file system that the data directory is on, or will be on once a server makes it.
func checkDataDir(dir string) Finding {
	f := Finding{Check: "data directory"}
	at := dir
	for {
		_, err := os.Stat(at)
		if parent := filepath.Dir(at); errors.Is(err, fs.ErrNotExist) && parent != at {
			at = parent
			continue
		}
		if err != nil {
			f.Detail, f.Fix = err.Error(), "set data_dir to a directory that can be read"
			return f
		}
		break
	}
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil {
		f.Detail = fmt.Sprintf("looking at the file system of %s: %v", at, err)
		f.Fix = "set data_dir to a directory on a disk"
		return f
	}
	free := int64(st.Bavail) * st.Bsize
	switch {
	case st.Flags&unix.ST_NOEXEC != 0:
		f.Detail = dir + " is on a file system that is mounted with noexec, but cay starts programs from there"
		f.Fix = "mount it without noexec, or set data_dir to a directory on another file system"
	case st.Flags&unix.ST_RDONLY != 0:
		f.Detail, f.Fix = dir+" is on a file system that is mounted read-only", "mount it read-write, or set data_dir"
	case st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC:
		f.Detail = dir + " is in memory (tmpfs): images, checkpoints and files of sandboxes take the memory that " +
			"sandboxes need, and are lost when the machine restarts"
		f.Fix = "set data_dir to a directory on a disk"
	default:
		f.OK, f.Detail = true, fmt.Sprintf("%s, with %.1f GiB free", dir, float64(free)/(1<<30))
	}
	return f
}

// checkSELinux reports whether SELinux is enforcing: cay has no policy for it. root is the directory below which the
// kernel's files are read; only tests pass another one than "/".
func checkSELinux(root string) Finding {
	f := Finding{Check: "SELinux", OK: true, Detail: "off"}
	mode, err := os.ReadFile(filepath.Join(root, "sys/fs/selinux/enforce"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		f.OK, f.Detail = false, err.Error()
	case strings.TrimSpace(string(mode)) == "0":
		f.Detail = "permissive: it logs violations and refuses nothing"
	default:
		f.OK, f.Detail = false, "enforcing: cay has no policy for it and was never run with it"
		f.Fix = "setenforce 0, and SELINUX=permissive in /etc/selinux/config for the next starts"
	}
	return f
}
