// Package file implements the agent's calls for files: reading and writing single files and whole
// trees, listing, moving and watching, over plain HTTP and as the service filesystem.Filesystem.
//
// Its calls act as root. The user of a call decides about home and ownership, not about access. A
// file that is written appears whole or not at all; an error leaves no part of it.
package file

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"mime"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent/account"
	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/agentapi/filesystem"
	"github.com/cayhq/cay/internal/fault"
)

// Files reads and writes files over plain HTTP. It acts as root: the user that a call
// names decides about home and ownership, not about access, since a caller may also
// name root.
type Files struct {
	settings *account.Settings
	users    *account.Users
	watchers *watchers
	// maxEntries limits the entries of a listing: agentapi.MaxEntries, beyond which the host fails within
	// the answer.
	maxEntries int
}

// New returns the files of this sandbox.
func New(settings *account.Settings, accounts *account.Users) *Files {
	return &Files{settings: settings, users: accounts, watchers: &watchers{}, maxEntries: agentapi.MaxEntries}
}

// Routes adds the calls for files.
func (f *Files) Routes(mux *http.ServeMux, opts []connect.HandlerOption) {
	mux.HandleFunc("GET /files", f.get)
	mux.HandleFunc("HEAD /files", f.get)
	mux.HandleFunc("POST /files", f.post)
	mux.HandleFunc("PUT /files", f.put)
	mux.HandleFunc("DELETE /files", f.remove)
	mux.HandleFunc("GET /files/list", f.list)
	mux.HandleFunc("GET /files/stat", f.stat)
	mux.HandleFunc("POST /files/mkdir", f.mkdir)
	mux.HandleFunc("POST /files/rename", f.rename)
	mux.HandleFunc("GET /files/tar", f.getTar)
	mux.HandleFunc("PUT /files/tar", f.putTar)
	mux.HandleFunc("POST /files/compose", f.compose)
	mux.Handle(filesystem.NewFilesystemHandler(&filesystemService{files: f, watchers: f.watchers}, opts...))
}

// target returns the user and the absolute path of a request's query.
func (f *Files) target(r *http.Request) (*account.User, string, error) {
	u, err := f.named(r.URL.Query().Get("username"))
	if err != nil {
		return nil, "", err
	}
	p, err := account.ResolvePath(r.URL.Query().Get("path"), u.Home)
	return u, p, err
}

// named returns a user by name; "" names the sandbox's default.
func (f *Files) named(name string) (*account.User, error) {
	return account.Known(f.users, cmp.Or(name, f.settings.DefaultUser(), "root"))
}

// openRegular opens a regular file for reading or writing and fails without blocking
// on anything else. The flag need not have O_NONBLOCK.
func openRegular(p string, flag int, perm fs.FileMode) (*os.File, fs.FileInfo, error) {
	file, err := os.OpenFile(p, flag|unix.O_NONBLOCK, perm)
	if errors.Is(err, unix.ENXIO) {
		return nil, nil, answer.New(fault.CodeInvalidPath, "path %q is no regular file", p)
	}
	if err != nil {
		return nil, nil, answer.OfFile(err, p)
	}
	st, err := file.Stat()
	switch {
	case err != nil:
	case st.IsDir():
		err = answer.New(fault.CodePathIsDirectory, "path %q is a directory", p)
	case !st.Mode().IsRegular():
		err = answer.New(fault.CodeInvalidPath, "path %q is no regular file", p)
	}
	if err != nil {
		_ = file.Close()
		return nil, nil, err
	}
	return file, st, nil
}

// get answers GET and HEAD /files with the file's bytes or ranges of them.
func (f *Files) get(w http.ResponseWriter, r *http.Request) {
	_, p, err := f.target(r)
	if err != nil {
		answer.Error(w, err)
		return
	}
	file, st, err := openRegular(p, os.O_RDONLY, 0)
	var known *answer.Problem
	if errors.As(err, &known) && known.Code == fault.CodePathNotDirectory {
		err = answer.New(fault.CodeFileNotFound, "path %q does not exist", p)
	}
	if err != nil {
		answer.Error(w, err)
		return
	}
	defer file.Close()
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("Content-Disposition", mime.FormatMediaType("inline", map[string]string{"filename": path.Base(p)}))
	h.Set("Vary", "Accept-Encoding")
	if unit, _, _ := strings.Cut(r.Header.Get("Range"), "="); unit != "bytes" {
		r.Header.Del("Range") // a range of an unknown unit is ignored
	}
	if st.Size() > 0 {
		http.ServeContent(w, r, "", st.ModTime(), file)
		return
	}
	if err := serveUnsized(w, r, file, st.ModTime()); err != nil {
		answer.Error(w, answer.OfFile(err, p))
	}
}

// maxUnsized limits how much of a file without a size is read to find its length, in bytes. It suffices
// for nearly all files of /proc and /sys. A longer file is sent without its length, and ranges of it are
// not possible.
const maxUnsized = 256 << 10

// serveUnsized sends a file whose size is 0: an empty one, or one that the kernel makes when it is read,
// which has no size and no end to seek to. If it returns an error it has sent nothing.
func serveUnsized(w http.ResponseWriter, r *http.Request, file *os.File, modified time.Time) error {
	head, err := io.ReadAll(io.LimitReader(file, maxUnsized))
	if err != nil {
		return err
	}
	if len(head) < maxUnsized {
		http.ServeContent(w, r, "", modified, bytes.NewReader(head))
		return nil
	}
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	// The head is sent; only a broken connection tells of an error.
	if _, err := io.Copy(w, io.MultiReader(bytes.NewReader(head), file)); err != nil {
		panic(http.ErrAbortHandler)
	}
	return nil
}

// makeParents makes the missing directories above p, owned by the user.
func makeParents(p string, u *account.User) error {
	return makeDirs(path.Dir(p), u)
}

func makeDirs(dir string, u *account.User) error {
	switch st, err := os.Stat(dir); {
	case err == nil && st.IsDir():
		return nil
	case err == nil:
		return syscall.ENOTDIR
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	if err := makeDirs(path.Dir(dir), u); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); errors.Is(err, os.ErrExist) {
		// Another process has made it just now, or it is a dangling link.
		return makeDirsRaced(dir)
	} else if err != nil {
		return err
	}
	return os.Chown(dir, int(u.UID), int(u.GID))
}

func makeDirsRaced(dir string) error {
	st, err := os.Stat(dir)
	if err != nil {
		return syscall.ENOTDIR
	}
	if !st.IsDir() {
		return syscall.ENOTDIR
	}
	return nil
}

// put answers PUT /files, a call of cay and not of E2B. The file appears whole under its
// path, with its owner and mode, or not at all.
func (f *Files) put(w http.ResponseWriter, r *http.Request) {
	err := f.replace(r)
	if err != nil {
		// Read the rest of the body, so that a client that is still sending comes
		// to read the answer.
		const maxRest = 128 << 20 // bytes; more than an upload may have
		_, _ = io.CopyN(io.Discard, r.Body, maxRest)
		answer.Error(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (f *Files) replace(r *http.Request) error {
	u, p, err := f.target(r)
	if err != nil {
		return err
	}
	if p == "/" {
		return answer.New(fault.CodePathIsDirectory, "path %q is a directory", p)
	}
	owner := u
	if spec := r.URL.Query().Get("owner"); spec != "" {
		if owner, err = f.users.Lookup(spec); errors.Is(err, answer.ErrUnknownUser) {
			return answer.New(fault.CodeUnknownOwner, "%s", err)
		} else if err != nil {
			return err
		}
	}
	mode, err := parseMode(r.URL.Query().Get("mode"))
	if err != nil {
		return err
	}
	if p, err = writeTarget(p); err != nil {
		return err
	}
	if err := makeParents(p, u); err != nil {
		return answer.OfFile(err, p)
	}
	if st, err := os.Lstat(p); err == nil && mode == nil {
		perm := st.Mode().Perm()
		mode = &perm
	}
	return answer.OfFile(writeWhole(p, owner, mode, r.Body), p)
}

// realPath follows the links in p, the last element's included.
func realPath(p string) (string, error) {
	st, err := os.Lstat(p)
	if err != nil || st.Mode()&fs.ModeSymlink == 0 {
		return p, err
	}
	return filepath.EvalSymlinks(p)
}

// writeTarget follows p's links and returns the path of the file that a write to p replaces, which need not
// exist. It refuses a path at which there is anything but a regular file: a reader of a replaced FIFO would
// keep one that no process writes to any more.
func writeTarget(p string) (string, error) {
	const maxLinks = 40 // as in Linux
	asked := p
	for range maxLinks {
		st, err := os.Lstat(p)
		switch {
		case err != nil: // the file does not exist yet, or making it gives the error
			return p, nil
		case st.IsDir():
			return "", answer.New(fault.CodePathIsDirectory, "path %q is a directory", asked)
		case st.Mode().IsRegular():
			return p, nil
		case st.Mode()&fs.ModeSymlink == 0:
			return "", answer.New(fault.CodeInvalidPath, "path %q is no regular file", asked)
		}
		to, err := os.Readlink(p)
		if err != nil {
			return "", answer.OfFile(err, asked)
		}
		if !path.IsAbs(to) {
			to = path.Dir(p) + "/" + to
		}
		p = path.Clean(to)
		dir, name := path.Split(to)
		// A .. after a link means the parent of the link's target.
		if real, err := filepath.EvalSymlinks(dir); err == nil {
			p = path.Join(real, name)
		}
	}
	return "", answer.New(fault.CodeInvalidPath, "path %q: %s", asked, syscall.ELOOP)
}

// parseMode parses octal permission bits. It returns nil for "".
func parseMode(s string) (*fs.FileMode, error) {
	if s == "" {
		return nil, nil
	}
	n, err := strconv.ParseUint(s, 8, 32)
	if err != nil || n > 0o777 {
		return nil, answer.New(fault.CodeInvalidMode, "mode %q is not an octal number up to 0777", s)
	}
	mode := fs.FileMode(n)
	return &mode, nil
}

// writeWhole writes body to a temporary file beside p and renames it to p. It removes
// the temporary file after an error.
func writeWhole(p string, owner *account.User, mode *fs.FileMode, body io.Reader) (err error) {
	file, err := os.CreateTemp(path.Dir(p), ".cay-upload-*")
	if err != nil {
		return err
	}
	temp := file.Name()
	defer func() {
		if err != nil {
			_ = file.Close()
			err = errors.Join(err, os.Remove(temp))
		}
	}()
	if err := copyInto(file, body); err != nil {
		return err
	}
	perm := fs.FileMode(0o644)
	if mode != nil {
		perm = *mode
	}
	// Set the owner first: a change of the owner may clear bits of the mode.
	if err := file.Chown(int(owner.UID), int(owner.GID)); err != nil {
		return err
	}
	if err := file.Chmod(perm); err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	return os.Rename(temp, p)
}

// CopyBuffer is the size of one read of an upload, in bytes. A system call costs
// tens of microseconds in gVisor: with a smaller buffer system calls take more time
// than copying.
const CopyBuffer = 256 << 10

// CopyBuffers holds buffers of CopyBuffer bytes.
var CopyBuffers = sync.Pool{New: func() any { return new([CopyBuffer]byte) }}

func copyInto(file *os.File, body io.Reader) error {
	buf := CopyBuffers.Get().(*[CopyBuffer]byte)
	defer CopyBuffers.Put(buf)
	// Hide the methods with which io would bypass the buffer.
	_, err := io.CopyBuffer(struct{ io.Writer }{file}, struct{ io.Reader }{body}, buf[:])
	return err
}

// remove answers DELETE /files.
func (f *Files) remove(w http.ResponseWriter, r *http.Request) {
	_, p, err := f.target(r)
	if err == nil {
		err = removePath(p, r.URL.Query().Get("recursive") == "true")
	}
	if err != nil {
		answer.Error(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func removePath(p string, recursive bool) error {
	if p == "/" {
		return answer.New(fault.CodeInvalidPath, "the root directory cannot be removed")
	}
	st, err := os.Lstat(p)
	switch {
	case errors.Is(err, syscall.ENOTDIR):
		err = syscall.ENOENT // a path below a file does not exist
	case err != nil:
	case !st.IsDir():
		err = unix.Unlink(p)
	case recursive:
		err = os.RemoveAll(p)
	default:
		err = unix.Rmdir(p)
	}
	if err != nil {
		return answer.OfFile(err, p)
	}
	return nil
}

// maxDepth limits the levels of a listing. A larger depth is refused, or reduced in E2B's call.
const maxDepth = 64

// list answers GET /files/list with one JSON object per line.
func (f *Files) list(w http.ResponseWriter, r *http.Request) {
	_, p, err := f.target(r)
	if err != nil {
		answer.Error(w, err)
		return
	}
	depth := 1
	if s := r.URL.Query().Get("depth"); s != "" {
		if depth, err = strconv.Atoi(s); err != nil || depth < 1 || depth > maxDepth {
			answer.Error(w, answer.Bad("depth %q is not a number from 1 to %d", s, maxDepth))
			return
		}
	}
	dir, names, err := openDir(p)
	if err != nil {
		answer.Error(w, answer.OfFile(err, p))
		return
	}
	defer dir.Close()
	if len(names) > f.maxEntries ||
		depth > 1 && countEntries(p, depth, f.maxEntries, time.Now().Add(countTime)) > f.maxEntries {
		answer.Error(w, answer.New(fault.CodeListingTooLarge, "more than %d entries", f.maxEntries))
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := bufio.NewWriterSize(w, 32<<10)
	enc := json.NewEncoder(out)
	// An error is one of writing and means that the client has gone.
	if listInto(enc, f.users.Owners(), dir, names, depth) == nil {
		_ = out.Flush()
	}
}

// countTime limits the count of a listing's entries before it is sent. The host waits for it, at most six
// times as long. With less, the listing of a busy sandbox could break in the middle instead of being
// refused; with more, the host could take the agent for silent.
const countTime = 5 * time.Second

// countEntries counts the entries of a listing, of which it only reads the names. It stops beyond limit, and
// at the time until.
func countEntries(dir string, depth, limit int, until time.Time) int {
	d, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0 // a directory that cannot be listed is still an entry
	}
	count := 0
	var below []string
	for more := true; more && count <= limit && time.Now().Before(until); {
		entries, err := d.ReadDir(1024)
		more = err == nil
		count += len(entries)
		for _, e := range entries {
			if depth > 1 && e.IsDir() {
				below = append(below, e.Name())
			}
		}
	}
	_ = d.Close() // it was only read
	for _, name := range below {
		if count > limit {
			break
		}
		count += countEntries(path.Join(dir, name), depth-1, limit-count, until)
	}
	return count
}

// readNames lists a directory in lexical order.
func readNames(dir string) ([]string, error) {
	d, names, err := openDir(dir)
	if err != nil {
		return nil, err
	}
	return names, d.Close()
}

// openDir opens a directory and lists it in lexical order.
func openDir(dir string) (*os.File, []string, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return nil, nil, err
	}
	if !st.IsDir() {
		return nil, nil, answer.New(fault.CodePathNotDirectory, "path %q is not a directory", dir)
	}
	d, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, nil, errors.Join(err, d.Close())
	}
	slices.Sort(names)
	return d, names, nil
}

// listInto writes the entries of a directory. It stats each name relative to the open directory: by
// absolute paths it would take half as long again.
func listInto(enc *json.Encoder, o account.Owners, dir *os.File, names []string, depth int) error {
	for _, name := range names {
		p := path.Join(dir.Name(), name)
		e, err := entryAt(int(dir.Fd()), name, p, o)
		if err != nil {
			continue // removed meanwhile
		}
		if err := enc.Encode(e); err != nil {
			return err
		}
		if e.Type != agentapi.TypeDirectory || depth <= 1 {
			continue
		}
		// A directory that cannot be listed is still an entry.
		if below, names, err := openDir(p); err == nil {
			if err := errors.Join(listInto(enc, o, below, names, depth-1), below.Close()); err != nil {
				return err
			}
		}
	}
	return nil
}

// entry describes the entry at p for the v1 API. It describes a link itself.
func entry(p string, o account.Owners) (agentapi.Entry, error) {
	return entryAt(unix.AT_FDCWD, p, p, o)
}

// entryAt describes the entry at p, which has the path at relative to the directory dir.
func entryAt(dir int, at, p string, o account.Owners) (agentapi.Entry, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, at, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return agentapi.Entry{}, &fs.PathError{Op: "lstat", Path: p, Err: err}
	}
	e := agentapi.Entry{
		Name:       path.Base(p),
		Path:       p,
		Size:       st.Size,
		Mode:       st.Mode & 0o7777,
		Owner:      o.User(st.Uid),
		Group:      o.Group(st.Gid),
		ModifiedAt: time.Unix(st.Mtim.Unix()).UTC(),
	}
	if !utf8.ValidString(p) {
		e.RawPath = []byte(p)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Type = agentapi.TypeFile
	case unix.S_IFDIR:
		e.Type = agentapi.TypeDirectory
	case unix.S_IFLNK:
		e.Type = agentapi.TypeSymlink
		// An error means that the link was removed meanwhile.
		e.SymlinkTarget, _ = os.Readlink(p)
	default:
		e.Type = agentapi.TypeOther
	}
	return e, nil
}
