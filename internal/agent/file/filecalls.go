package file

import (
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent/account"
	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/fault"
)

// stat answers GET /files/stat with the entry at a path. It does not follow a link.
func (f *Files) stat(w http.ResponseWriter, r *http.Request) {
	_, p, err := f.target(r)
	if err == nil {
		err = f.answerEntry(w, p)
	}
	if err != nil {
		answer.Error(w, err)
	}
}

func (f *Files) answerEntry(w http.ResponseWriter, p string) error {
	e, err := entry(p, f.users.Owners())
	if errors.Is(err, syscall.ENOTDIR) {
		err = syscall.ENOENT // a path below a file does not exist
	}
	if err != nil {
		return answer.OfFile(err, p)
	}
	answer.JSON(w, http.StatusOK, e)
	return nil
}

// mkdir answers POST /files/mkdir. An existing directory stays as it is.
func (f *Files) mkdir(w http.ResponseWriter, r *http.Request) {
	u, p, err := f.target(r)
	var mode *fs.FileMode
	if err == nil {
		mode, err = parseMode(r.URL.Query().Get("mode"))
	}
	if err == nil {
		err = makeDirectory(p, u, mode)
	}
	if err == nil {
		err = f.answerEntry(w, p)
	}
	if err != nil {
		answer.Error(w, err)
	}
}

func makeDirectory(p string, u *account.User, mode *fs.FileMode) error {
	st, err := os.Stat(p)
	switch {
	case err == nil && st.IsDir():
		return nil
	case err == nil:
		return answer.New(fault.CodePathNotDirectory, "path %q exists and is not a directory", p)
	}
	if err := makeDirs(p, u); err != nil {
		return answer.OfFile(err, p)
	}
	if mode == nil {
		return nil
	}
	return answer.OfFile(os.Chmod(p, *mode), p)
}

// rename answers POST /files/rename. It replaces an existing destination only if the call
// asks for that.
func (f *Files) rename(w http.ResponseWriter, r *http.Request) {
	u, from, err := f.target(r)
	if err != nil {
		answer.Error(w, err)
		return
	}
	q := r.URL.Query()
	to, err := account.ResolvePath(q.Get("to"), u.Home)
	if err == nil {
		err = move(from, to, u, q.Get("overwrite") == "true")
	}
	if err == nil {
		err = f.answerEntry(w, to)
	}
	if err != nil {
		answer.Error(w, err)
	}
}

func move(from, to string, u *account.User, overwrite bool) error {
	if from == "/" || to == "/" {
		return answer.New(fault.CodeInvalidPath, "the root directory cannot be renamed")
	}
	switch _, err := os.Lstat(from); {
	case errors.Is(err, syscall.ENOTDIR):
		return answer.OfFile(syscall.ENOENT, from)
	case err != nil:
		return answer.OfFile(err, from)
	}
	if err := makeParents(to, u); err != nil {
		return inTo(answer.OfFile(err, path.Dir(to)))
	}
	flags := uint(unix.RENAME_NOREPLACE)
	if overwrite {
		flags = 0
	}
	switch err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, flags); err {
	case nil:
		return nil
	case unix.EEXIST:
		if !overwrite {
			return answer.New(fault.CodePathExists, "path %q exists already", to)
		}
		return inTo(answer.New(fault.CodeDirectoryNotEmpty, "directory %q is not empty", to))
	case unix.EXDEV:
		return inTo(answer.New(fault.CodeInvalidPath, "path %q is on another file system", to))
	case unix.EINVAL:
		return inTo(answer.New(fault.CodeInvalidPath, "path %q is below %q", to, from))
	default:
		return inTo(answer.OfFile(err, to))
	}
}

// inTo marks a problem as one of the destination.
func inTo(err error) error {
	var p *answer.Problem
	if !errors.As(err, &p) {
		return err
	}
	named := *p
	named.Field = "to"
	return &named
}
