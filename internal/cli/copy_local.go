package cli

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// packFolder writes the files, folders and links in a local folder as a tar.
func packFolder(w io.Writer, dir string) error {
	out := tar.NewWriter(w)
	root, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	err = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		return packEntry(out, p, filepath.ToSlash(rel), d)
	})
	return errors.Join(err, out.Close())
}

// packEntry writes a file, a folder or a link to the tar, and leaves out everything else.
func packEntry(out *tar.Writer, p, name string, d fs.DirEntry) error {
	info, err := d.Info()
	if err != nil {
		return err
	}
	target := ""
	var file *os.File
	switch {
	case info.IsDir():
		name += "/"
	case info.Mode()&fs.ModeSymlink != 0:
		if target, err = os.Readlink(p); err != nil {
			return err
		}
	case info.Mode().IsRegular():
		if file, err = os.Open(p); err != nil {
			return err
		}
		defer file.Close()
		if info, err = file.Stat(); err != nil {
			return err
		}
	default:
		return nil
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return err
	}
	h.Name, h.Format = name, tar.FormatPAX
	h.ModTime, h.AccessTime, h.ChangeTime = info.ModTime().Truncate(time.Second), time.Time{}, time.Time{}
	if err := out.WriteHeader(h); err != nil {
		return err
	}
	if file == nil {
		return nil
	}
	n, err := io.CopyN(out, file, h.Size)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%s became shorter while it was read: %d bytes of %d", p, n, h.Size)
	}
	return err
}

// unpackFolder writes an archive of a sandbox, which may be hostile, below a local folder and nowhere else. It replaces
// files, which appear whole or not at all.
func unpackFolder(dir string, r io.Reader) error {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return fmt.Errorf("DESTINATION: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("DESTINATION: %w", err)
	}
	defer root.Close()
	in := tar.NewReader(r)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			_, err := io.Copy(io.Discard, r) // the padding; an error says that the archive is not whole
			return err
		}
		if err != nil {
			return fmt.Errorf("reading the archive: %w", err)
		}
		if err := unpackEntry(root, h, in); err != nil {
			return fmt.Errorf("writing %q: %w", h.Name, err)
		}
	}
}

// unpackEntry writes an entry of the archive below root.
func unpackEntry(root *os.Root, h *tar.Header, body io.Reader) error {
	name := path.Clean(h.Name)
	if name == "." || h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if !filepath.IsLocal(filepath.FromSlash(name)) {
		return errors.New("the name leads out of the folder")
	}
	if parent := path.Dir(name); parent != "." {
		if err := root.MkdirAll(parent, 0o777); err != nil {
			return err
		}
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return unpackDir(root, name, h)
	case tar.TypeSymlink:
		// A link may point anywhere, since root writes through no link that points out of it.
		if st, err := root.Lstat(name); err == nil && !st.IsDir() {
			if err := root.Remove(name); err != nil {
				return err
			}
		}
		return root.Symlink(h.Linkname, name)
	case tar.TypeReg:
		return unpackFile(root, name, h, body)
	}
	return errors.New("it is neither a file nor a folder nor a link")
}

// unpackDir makes a folder below root unless it exists.
func unpackDir(root *os.Root, name string, h *tar.Header) error {
	err := root.Mkdir(name, 0o700)
	if errors.Is(err, fs.ErrExist) {
		if st, err := root.Stat(name); err != nil || !st.IsDir() {
			return errors.Join(errors.New("something else is in its place"), err)
		}
		return nil
	}
	if err != nil {
		return err
	}
	// The user of cay must be able to write into the folder.
	return root.Chmod(name, h.FileInfo().Mode().Perm()&^umask()|0o700)
}

// unpackFile writes a file below root under a temporary name, and then renames it.
func unpackFile(root *os.Root, name string, h *tar.Header, body io.Reader) (err error) {
	temp := path.Join(path.Dir(name), fmt.Sprintf(".cay-%d-%d", os.Getpid(), time.Now().UnixNano()))
	f, err := root.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), root.Remove(temp))
		}
	}()
	if _, err := io.Copy(f, body); err != nil {
		return err
	}
	if err := f.Chmod(h.FileInfo().Mode().Perm() &^ umask()); err != nil {
		return err
	}
	if err := root.Chtimes(temp, h.ModTime, h.ModTime); err != nil {
		return err
	}
	if err := root.Rename(temp, name); err != nil {
		return err
	}
	return f.Close()
}

// printJSONLine prints an object as one line of a stream.
func (a *app) printJSONLine(v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding JSON: %w", err)
	}
	_, err = fmt.Fprintln(a.out, strings.TrimSpace(string(b)))
	return err
}
