package file

import (
	"archive/tar"
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent/account"
	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
)

// Limits of an archive to unpack. agentapi.MaxTar limits the size of its files, since a sparse
// file of a KiB can claim to have an exabyte; below it the sandbox's disk is the limit.
const (
	maxTarEntries = 500_000
	maxTarDepth   = 256 // nested directories
)

// getTar answers GET /files/tar with an archive of the entries below a directory, with
// names relative to it. It contains only files, directories and links, since other types
// mean nothing elsewhere. After an error the archive is cut off.
func (f *Files) getTar(w http.ResponseWriter, r *http.Request) {
	_, p, err := f.target(r)
	var names []string
	if err == nil {
		names, err = readNames(p)
	}
	if err != nil {
		answer.Error(w, answer.OfFile(err, p))
		return
	}
	w.Header().Set("Content-Type", "application/x-tar")
	out := tar.NewWriter(w)
	p, err = realPath(p)
	if err == nil {
		err = pack(out, f.users.Owners(), p, "", names)
	}
	if err == nil {
		err = out.Close()
	}
	if err != nil {
		panic(http.ErrAbortHandler) // the head is sent; only a broken connection tells of the error
	}
}

// pack writes the entries of a directory and everything below them.
func pack(out *tar.Writer, o account.Owners, root, rel string, names []string) error {
	for _, name := range names {
		rel := path.Join(rel, name)
		p := path.Join(root, rel)
		isDir, err := packOne(out, o, p, rel)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if !isDir {
			continue
		}
		below, err := readNames(p)
		var known *answer.Problem
		if errors.Is(err, fs.ErrNotExist) || errors.As(err, &known) {
			continue // removed or replaced meanwhile
		}
		if err != nil {
			return err
		}
		if err := pack(out, o, root, rel, below); err != nil {
			return err
		}
	}
	return nil
}

// packOne writes one entry. It returns fs.ErrNotExist if the entry vanished before it was begun.
func packOne(out *tar.Writer, o account.Owners, p, rel string) (isDir bool, err error) {
	st, err := os.Lstat(p)
	if err != nil {
		return false, err
	}
	target := ""
	switch {
	case st.IsDir(), st.Mode().IsRegular():
	case st.Mode()&fs.ModeSymlink != 0:
		if target, err = os.Readlink(p); err != nil {
			return false, err
		}
	default:
		return false, nil
	}
	h, err := tar.FileInfoHeader(st, target)
	if err != nil {
		return false, err
	}
	sys := st.Sys().(*syscall.Stat_t)
	h.Name = rel
	if st.IsDir() {
		h.Name += "/"
	}
	h.Format = tar.FormatPAX // takes any name; times of whole seconds need no extra records
	h.ModTime, h.AccessTime, h.ChangeTime = st.ModTime().Truncate(time.Second), time.Time{}, time.Time{}
	h.Uname, h.Gname = o.User(sys.Uid), o.Group(sys.Gid)
	if !st.Mode().IsRegular() {
		return st.IsDir(), out.WriteHeader(h)
	}
	// Open the file before writing the head, and follow no link: it may have been replaced.
	file, opened, err := openRegular(p, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false, fs.ErrNotExist
	}
	defer file.Close()
	h.Size = opened.Size()
	if err := out.WriteHeader(h); err != nil {
		return false, err
	}
	return false, packContent(out, file, h.Size)
}

// packContent writes exactly size bytes of a file that may change meanwhile. It leaves out
// bytes beyond the size and fills up with zeros.
func packContent(out io.Writer, file io.Reader, size int64) error {
	buf := CopyBuffers.Get().(*[CopyBuffer]byte)
	defer CopyBuffers.Put(buf)
	n, err := io.CopyBuffer(struct{ io.Writer }{out}, struct{ io.Reader }{io.LimitReader(file, size)}, buf[:])
	if err != nil || n == size {
		return err
	}
	clear(buf[:])
	for n < size && err == nil {
		var wrote int
		wrote, err = out.Write(buf[:min(size-n, CopyBuffer)])
		n += int64(wrote)
	}
	return err
}

// putTar answers PUT /files/tar by unpacking an archive into a directory. Each file appears whole or
// not at all. After an error the entries before the failed one remain.
func (f *Files) putTar(w http.ResponseWriter, r *http.Request) {
	u, p, err := f.target(r)
	if err == nil {
		err = f.unpack(p, u, r.Body)
	}
	if err != nil {
		const maxRest = 128 << 20 // bytes; see put
		_, _ = io.CopyN(io.Discard, r.Body, maxRest)
		answer.Error(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (f *Files) unpack(dir string, u *account.User, body io.Reader) error {
	if err := makeDirs(dir, u); err != nil {
		return answer.OfFile(err, dir)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return answer.OfFile(err, dir)
	}
	un := &unpacker{user: u, root: root}
	defer un.close()
	in := tar.NewReader(body)
	for n := 0; ; n++ {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			// Read the archive's padding, so that the connection can be used again.
			_, err := io.Copy(io.Discard, body)
			return tarProblem(err)
		}
		if err != nil {
			return tarProblem(err)
		}
		if n == maxTarEntries {
			return answer.New(fault.CodeInvalidTar, "the archive has more than %d entries", maxTarEntries)
		}
		if err := un.entry(h, in); err != nil {
			return err
		}
	}
}

// tarProblem returns the problem for an error of reading an archive, nil for nil.
func tarProblem(err error) error {
	if err == nil {
		return nil
	}
	return answer.New(fault.CodeInvalidTar, "reading the archive: %s", err)
}

// unpacker writes the entries of an archive below a directory. os.Root keeps it inside the
// directory, whatever names, links and ".." the archive has.
type unpacker struct {
	user    *account.User
	root    *os.Root
	parent  *os.Root // the last entry's directory, which is mostly the next one's too
	in      string   // name of parent
	written int64
}

func (un *unpacker) close() {
	if un.parent != nil {
		_ = un.parent.Close() // nothing is written to a directory that an error could lose
	}
	_ = un.root.Close()
}

func (un *unpacker) entry(h *tar.Header, body io.Reader) error {
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeDir, tar.TypeSymlink, tar.TypeLink:
	default:
		return answer.New(fault.CodeInvalidTar, "entry %q is neither a file nor a directory nor a link", h.Name)
	}
	name, err := entryName(h.Name)
	if err != nil {
		return err
	}
	if h.Size < 0 || h.Size > agentapi.MaxTar-un.written {
		return answer.New(fault.CodeInvalidTar,
			"with entry %q the files have more than %d bytes", h.Name, int64(agentapi.MaxTar))
	}
	if err := un.write(h, name, body); err != nil {
		return un.problem(err, h.Name)
	}
	return nil
}

// entryName returns the cleaned name of an entry. It refuses a name that leads out of the directory.
func entryName(given string) (string, error) {
	if given == "" || strings.HasPrefix(given, "/") || strings.IndexByte(given, 0) >= 0 || len(given) >= unix.PathMax {
		return "", answer.New(fault.CodeInvalidTar,
			"entry %.200q: a name must be relative and have 1 to %d bytes", given, unix.PathMax-1)
	}
	for element := range strings.SplitSeq(given, "/") {
		if element == ".." {
			return "", answer.New(fault.CodeInvalidTar, "entry %.200q contains a .. element", given)
		}
	}
	name := path.Clean(given)
	if strings.Count(name, "/") >= maxTarDepth {
		return "", answer.New(fault.CodeInvalidTar, "entry %.200q is more than %d directories deep", given, maxTarDepth)
	}
	return name, nil
}

// problem returns the problem that an error of writing an entry means.
func (un *unpacker) problem(err error, name string) error {
	var known *answer.Problem
	var errno syscall.Errno
	switch {
	case errors.As(err, &known):
		return err
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return answer.OfFile(err, name)
	case errors.As(err, &errno):
		return answer.New(fault.CodeInvalidTar, "entry %q: %s", name, errno)
	}
	// The error of os.Root for a path that leads out has only a text. All other errors here come
	// from the archive too.
	return answer.New(fault.CodeInvalidTar, "entry %q: %s", name, err)
}

func (un *unpacker) write(h *tar.Header, name string, body io.Reader) error {
	if name == "." {
		return nil // the directory itself stays as it is
	}
	dir, base := path.Split(name)
	in, err := un.dir(path.Clean("./" + dir))
	if err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return un.writeDir(in, base, h)
	case tar.TypeSymlink, tar.TypeLink:
		return un.writeLink(in, name, base, h)
	}
	return un.writeFile(in, base, h, body)
}

// dir opens the directory of an entry and makes missing ones.
func (un *unpacker) dir(name string) (*os.Root, error) {
	if name == "." {
		return un.root, nil
	}
	if un.parent != nil && un.in == name {
		return un.parent, nil
	}
	opened, err := un.root.OpenRoot(name)
	if errors.Is(err, fs.ErrNotExist) {
		above, base := path.Split(name)
		var in *os.Root
		if in, err = un.dir(path.Clean("./" + above)); err != nil {
			return nil, err
		}
		if err = in.Mkdir(base, 0o755); err == nil {
			err = in.Lchown(base, int(un.user.UID), int(un.user.GID))
		}
		if err == nil {
			opened, err = un.root.OpenRoot(name)
		}
	}
	if err != nil {
		return nil, err
	}
	if un.parent != nil {
		_ = un.parent.Close() // as in close
	}
	un.parent, un.in = opened, name
	return opened, nil
}

func (un *unpacker) writeDir(in *os.Root, base string, h *tar.Header) error {
	err := in.Mkdir(base, 0o755)
	if errors.Is(err, fs.ErrExist) {
		st, err := in.Lstat(base)
		switch {
		case err != nil:
			return err
		case st.Mode()&fs.ModeSymlink != 0: // a link to a directory inside stays a link
			if st, err = in.Stat(base); err == nil && st.IsDir() {
				return nil
			}
			return answer.New(fault.CodeInvalidTar, "entry %q: a link is in the place of the directory", h.Name)
		case !st.IsDir():
			return answer.New(fault.CodePathNotDirectory, "entry %q: a file is in the place of the directory", h.Name)
		}
		return in.Chmod(base, h.FileInfo().Mode().Perm())
	}
	if err != nil {
		return err
	}
	if err := in.Lchown(base, int(un.user.UID), int(un.user.GID)); err != nil {
		return err
	}
	return in.Chmod(base, h.FileInfo().Mode().Perm())
}

func (un *unpacker) writeLink(in *os.Root, name, base string, h *tar.Header) error {
	if err := makeWay(in, base, h.Name); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeSymlink {
		if err := in.Symlink(h.Linkname, base); err != nil {
			return err
		}
		return in.Lchown(base, int(un.user.UID), int(un.user.GID))
	}
	target, err := entryName(h.Linkname)
	if err != nil {
		return err
	}
	// A hard link may only name a regular file below the directory.
	if st, err := un.root.Lstat(target); err != nil {
		return err
	} else if !st.Mode().IsRegular() {
		return answer.New(fault.CodeInvalidTar, "entry %q: links to %q, which is not a file", h.Name, h.Linkname)
	}
	return un.root.Link(target, name)
}

// makeWay removes the file or link in an entry's place. A directory there is an error.
func makeWay(in *os.Root, base, name string) error {
	st, err := in.Lstat(base)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case st.IsDir():
		return answer.New(fault.CodePathIsDirectory, "entry %q: a directory is in its place", name)
	}
	return in.Remove(base)
}

// writeFile writes a temporary file beside the entry's place and renames it. It replaces a
// link and does not write through it.
func (un *unpacker) writeFile(in *os.Root, base string, h *tar.Header, body io.Reader) (err error) {
	if st, err := in.Lstat(base); err == nil && st.IsDir() {
		return answer.New(fault.CodePathIsDirectory, "entry %q: a directory is in its place", h.Name)
	}
	temp := tempName()
	file, err := in.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = file.Close()
			err = errors.Join(err, in.Remove(temp))
		}
	}()
	counted := &countedReader{in: body}
	err = copyInto(file, counted)
	un.written += counted.n
	if counted.err != nil {
		return tarProblem(counted.err)
	}
	if err != nil {
		return err
	}
	if err := file.Chown(int(un.user.UID), int(un.user.GID)); err != nil {
		return err
	}
	if err := file.Chmod(h.FileInfo().Mode().Perm()); err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	if !h.ModTime.IsZero() {
		if err := in.Chtimes(temp, h.ModTime, h.ModTime); err != nil {
			return err
		}
	}
	return in.Rename(temp, base)
}

// tempName returns an unused name that shows its origin if the file is ever left behind.
func tempName() string { return ".cay-upload-" + rand.Text() }

// countedReader counts bytes and keeps the error of reading, so that it can be told from one of writing.
type countedReader struct {
	in  io.Reader
	n   int64
	err error
}

func (c *countedReader) Read(b []byte) (int, error) {
	n, err := c.in.Read(b)
	c.n += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		c.err = err
	}
	return n, err
}
