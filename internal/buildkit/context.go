package buildkit

import (
	"archive/tar"
	"bufio"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// Limits bounds a build context. 0 in a field takes its default.
type Limits struct {
	Bytes   int64 // of all files, unpacked; default 1 GiB
	Entries int   // files, directories and links; default 200 000
}

const (
	defaultContextBytes   = 1 << 30
	defaultContextEntries = 200_000
	// archiveShare is the number of bytes for each entry by which an archive may be longer than
	// its content: headers, long names, padding.
	archiveShare = 8 << 10
)

// refused returns the error for a context that is not used.
func refused(entry, why string, args ...any) error {
	text := fmt.Sprintf(why, args...)
	if entry != "" {
		text = fmt.Sprintf("entry %q: %s", entry, text)
	}
	return fault.InvalidField("context", "%s", text)
}

func unpackFile(ctx context.Context, file, dir string, l Limits) error {
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("opening the build context: %w", err)
	}
	defer f.Close()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("opening the build context's directory: %w", err)
	}
	defer root.Close()
	return unpack(ctx, f, root, l)
}

// unpack unpacks an untrusted tar archive, plain or gzip. It writes nothing outside root,
// whatever names and links the archive has. It does not keep owners, since builds do not see
// them.
func unpack(ctx context.Context, from io.Reader, root *os.Root, l Limits) error {
	l.Bytes, l.Entries = cmp.Or(l.Bytes, defaultContextBytes), cmp.Or(l.Entries, defaultContextEntries)
	plain, err := decompressed(from)
	if err != nil {
		return err
	}
	u := &unpacker{ctx: ctx, root: root, limits: l, left: l.Bytes}
	// Names and padding count too; an archive of nothing else would never end.
	archive := tar.NewReader(&bounded{ctx: ctx, from: plain, left: l.Bytes + int64(l.Entries)*archiveShare,
		bound: l.Bytes})
	for {
		h, err := archive.Next()
		switch {
		case errors.Is(err, io.EOF):
			return u.finish()
		case err != nil:
			return notArchive(err)
		}
		if err := u.entry(h, archive); err != nil {
			return err
		}
	}
}

// notArchive returns the error for a broken archive, or err itself if reading failed for another
// reason.
func notArchive(err error) error {
	_, onDisk := errors.AsType[*fs.PathError](err)
	if onDisk || fault.As(err) != nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return refused("", "is not a tar archive that can be read: %v", err)
}

func decompressed(from io.Reader) (io.Reader, error) {
	buffered := bufio.NewReaderSize(from, 64<<10)
	magic, err := buffered.Peek(2)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading the build context: %w", err)
	}
	if string(magic) != "\x1f\x8b" {
		return buffered, nil
	}
	r, err := gzip.NewReader(buffered)
	if err != nil {
		return nil, refused("", "is not a gzip file that can be read: %v", err)
	}
	return r, nil
}

// bounded is a reader that fails after a number of bytes, or when its context ends.
type bounded struct {
	ctx   context.Context
	from  io.Reader
	left  int64
	bound int64 // for the error
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.ctx.Err() != nil {
		return 0, context.Cause(b.ctx)
	}
	if b.left <= 0 {
		return 0, refused("", "is longer than the %d bytes that a build context may have", b.bound)
	}
	n, err := b.from.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// unpacker unpacks one archive.
type unpacker struct {
	ctx    context.Context
	root   *os.Root
	limits Limits
	left   int64 // bytes
	count  int
	dirs   []dated // set last, since adding entries changes their dates
}

type dated struct {
	name string
	mode fs.FileMode
	time time.Time
}

// entry unpacks one entry.
func (u *unpacker) entry(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil // a comment of git archive
	}
	if u.count++; u.count > u.limits.Entries {
		return refused(h.Name, "there are more than the %d entries that a build context may have", u.limits.Entries)
	}
	name, err := entryName(h.Name)
	if err != nil {
		return err
	}
	if name == "." {
		if h.Typeflag != tar.TypeDir {
			return refused(h.Name, "the context itself must be a directory")
		}
		return nil
	}
	if err := u.place(h, name); err != nil {
		return u.explain(h, err)
	}
	switch h.Typeflag {
	case tar.TypeDir:
		err = u.directory(h, name)
	case tar.TypeReg, tar.TypeGNUSparse:
		err = u.file(h, name, content)
	case tar.TypeSymlink:
		// A link may lead anywhere, since neither unpacking nor the build follows it out of the
		// context.
		err = u.root.Symlink(h.Linkname, name)
	case tar.TypeLink:
		var target string
		if target, err = entryName(h.Linkname); err == nil {
			err = u.link(target, name)
		}
	case tar.TypeChar, tar.TypeBlock:
		return refused(h.Name, "is a device; a build context has only files, directories and links")
	case tar.TypeFifo:
		return refused(h.Name, "is a named pipe; a build context has only files, directories and links")
	default:
		return refused(h.Name, "is of the unknown type %q", h.Typeflag)
	}
	return u.explain(h, err)
}

// entryName returns the path of an entry below the context's root.
func entryName(name string) (string, error) {
	clean := path.Clean(name)
	switch {
	case name == "" || strings.ContainsRune(name, 0):
		return "", refused(name, "has no usable name")
	case path.IsAbs(name):
		return "", refused(name, "its path is absolute")
	case !filepath.IsLocal(clean):
		return "", refused(name, "its path leads out of the context")
	}
	return clean, nil
}

// place prepares the place of an entry, as tar does: it makes missing directories above it and
// removes an earlier entry.
func (u *unpacker) place(h *tar.Header, name string) error {
	if dir := path.Dir(name); dir != "." {
		if err := u.root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	there, err := u.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if there.IsDir() && h.Typeflag == tar.TypeDir {
		return nil
	}
	return u.root.RemoveAll(name)
}

// unpackMode returns the bits of an entry's mode that are kept.
func unpackMode(h *tar.Header) fs.FileMode {
	return h.FileInfo().Mode() & (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky)
}

func (u *unpacker) directory(h *tar.Header, name string) error {
	err := u.root.Mkdir(name, 0o700)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	u.dirs = append(u.dirs, dated{name, unpackMode(h), h.ModTime})
	return nil
}

func (u *unpacker) file(h *tar.Header, name string, content io.Reader) error {
	// This is the size that the header claims. For a sparse file it is more than the archive
	// holds.
	if h.Size > u.left {
		return refused(h.Name, "with it the context has more than the %d bytes that it may have", u.limits.Bytes)
	}
	u.left -= h.Size
	f, err := u.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	err = errors.Join(err, f.Chmod(unpackMode(h)), f.Close())
	if err == nil {
		err = u.root.Chtimes(name, h.ModTime, h.ModTime)
	}
	return err
}

// link makes a hard link to a file of the archive.
func (u *unpacker) link(target, name string) error {
	info, err := u.root.Lstat(target)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return &fs.PathError{Op: "link", Path: target, Err: errors.New("is a directory")}
	}
	return u.root.Link(target, name)
}

// finish sets the modes and dates of directories, the last entry first, so that nested ones come
// before their parents.
func (u *unpacker) finish() error {
	for i := len(u.dirs) - 1; i >= 0; i-- {
		d := u.dirs[i]
		info, err := u.root.Lstat(d.name)
		if err != nil || !info.IsDir() {
			continue // a later entry has replaced it
		}
		if err := errors.Join(u.root.Chmod(d.name, d.mode), u.root.Chtimes(d.name, d.time, d.time)); err != nil {
			return fmt.Errorf("unpacking the build context: %w", err)
		}
	}
	return nil
}

// explain names the entry in an error that it caused. It leaves other errors, such as a full disk
// or the end of the build, as they are.
func (u *unpacker) explain(h *tar.Header, err error) error {
	switch {
	case err == nil || fault.As(err) != nil || u.ctx.Err() != nil:
		return err
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EIO) || errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("unpacking the build context: %w", err)
	case errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrHeader):
		return refused(h.Name, "the archive ends in it or is broken there: %v", err)
	}
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		err = p.Err
	} else if l, ok := errors.AsType[*os.LinkError](err); ok {
		err = l.Err
	}
	return refused(h.Name, "cannot be unpacked: %v", err)
}
