package cli

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
)

// buildContext packs a directory into a tar for a build.
type buildContext struct {
	dir    string
	ignore *patternmatcher.PatternMatcher
	keep   string // path in dir that is sent even if it is ignored; "" is none
	extra  string // file from outside of dir that is sent as extraName; "" is none
}

// extraName is the name in the tar of a Dockerfile from outside of the directory.
const extraName = ".cay.Dockerfile"

// openContext returns the context of a directory and a Dockerfile, and the Dockerfile's path in the context. The
// Dockerfile may be outside of the directory. Without a Dockerfile the context is the whole directory.
func openContext(dir, dockerfile string) (*buildContext, string, error) {
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		err = fmt.Errorf("%s is not a directory", dir)
	}
	if err != nil {
		return nil, "", fmt.Errorf("--context: %w", err)
	}
	b := &buildContext{dir: dir}
	if dockerfile == "" {
		b.ignore, err = patternmatcher.New(nil)
		return b, "", err
	}
	if info, err = os.Stat(dockerfile); err == nil && info.IsDir() {
		err = fmt.Errorf("%s is a directory", dockerfile)
	}
	if err != nil {
		return nil, "", fmt.Errorf("--dockerfile: %w", err)
	}
	if b.keep, err = inside(dir, dockerfile); err != nil {
		return nil, "", err
	}
	name := b.keep
	if name == "" {
		b.extra, name = dockerfile, extraName
	}
	b.ignore, err = readIgnore(dockerfile+".dockerignore", filepath.Join(dir, ".dockerignore"))
	return b, name, err
}

// inside returns the path of a file relative to a directory, with slashes, or "" if the file is not in it.
func inside(dir, file string) (string, error) {
	absDir, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("--context: %w", err)
	}
	absFile, err := filepath.Abs(file)
	if err != nil {
		return "", fmt.Errorf("--dockerfile: %w", err)
	}
	rel, err := filepath.Rel(absDir, absFile)
	if err != nil || !filepath.IsLocal(rel) {
		return "", nil
	}
	return filepath.ToSlash(rel), nil
}

// readIgnore reads the patterns of the first file that exists. Without such a file the matcher ignores nothing.
func readIgnore(files ...string) (*patternmatcher.PatternMatcher, error) {
	for _, file := range files {
		f, err := os.Open(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("--context: %w", err)
		}
		defer f.Close()
		patterns, err := ignorefile.ReadAll(f)
		if err != nil {
			return nil, fmt.Errorf("--context: reading %s: %w", file, err)
		}
		m, err := patternmatcher.New(patterns)
		if err != nil {
			return nil, fmt.Errorf("--context: reading %s: %w", file, err)
		}
		return m, nil
	}
	return patternmatcher.New(nil)
}

// stream returns the tar, which is packed while it is read. Close stops the packing, and may be called after the end.
func (b *buildContext) stream() io.ReadCloser {
	r, w := io.Pipe()
	go func() { w.CloseWithError(b.write(w)) }()
	return r
}

// write writes the tar in the order of names and without owners, so that the same files give the same bytes for every
// user.
func (b *buildContext) write(w io.Writer) error {
	out := tar.NewWriter(w)
	err := filepath.WalkDir(b.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(b.dir, path)
		if err != nil || rel == "." {
			return err
		}
		name := filepath.ToSlash(rel)
		ignored, err := b.ignore.MatchesOrParentMatches(rel)
		if err != nil {
			return err
		}
		if ignored && name != b.keep {
			// An exception to the patterns, or the Dockerfile, may be below.
			if d.IsDir() && !b.ignore.Exclusions() && !strings.HasPrefix(b.keep, name+"/") {
				return filepath.SkipDir
			}
			return nil
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil // removed since the directory was read
		}
		if err != nil {
			return err
		}
		return addToTar(out, path, name, info)
	})
	if err == nil && b.extra != "" {
		var info fs.FileInfo
		if info, err = os.Stat(b.extra); err == nil {
			err = addToTar(out, b.extra, extraName, info)
		}
	}
	if err != nil {
		return fmt.Errorf("packing the context: %w", err)
	}
	return out.Close()
}

// addToTar adds a file, a directory or a link. It leaves out everything else, which no image can have.
func addToTar(out *tar.Writer, path, name string, info fs.FileInfo) error {
	var link string
	var err error
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		if link, err = os.Readlink(path); err != nil {
			return err
		}
	case !info.IsDir() && !info.Mode().IsRegular():
		return nil
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	h.Name, h.Uid, h.Gid, h.Uname, h.Gname = name, 0, 0, "", ""
	if info.IsDir() {
		h.Name += "/"
	}
	if !info.Mode().IsRegular() {
		return out.WriteHeader(h)
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := out.WriteHeader(h); err != nil {
		return err
	}
	// A file that grows while it is read is cut off, and one that shrinks is an error.
	if n, err := io.CopyN(out, f, h.Size); err != nil {
		return fmt.Errorf("%s has %d bytes, and had %d: %w", path, n, h.Size, err)
	}
	return nil
}
