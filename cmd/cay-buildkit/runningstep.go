package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/continuity/fs"
	"github.com/moby/buildkit/executor"
	"github.com/moby/buildkit/executor/oci"
	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cayhq/cay/internal/buildkit/wire"
)

// runningStep is one step while it runs.
type runningStep struct {
	id, dir string
	undos   []func() error
}

func (b *runningStep) undo(f func() error) { b.undos = append(b.undos, f) }

// takeApart undoes what was done for the step, in reverse order, and goes on after errors. After
// an error the directory stays, since a mount may still be in it; the server removes it when the
// program has ended.
func (b *runningStep) takeApart() error {
	var errs []error
	for _, f := range slices.Backward(b.undos) {
		errs = append(errs, f())
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.RemoveAll(b.dir)
}

// mount mounts what BuildKit provides at a directory of the step, named by where. A selector
// chooses a directory or file of it. Links in the selector cannot lead out, since they are
// resolved below the mount.
func (b *runningStep) mount(ctx context.Context, m executor.Mount, where string,
	special func(mount.Mount) bool) (string, error) {
	ref, err := m.Src.Mount(ctx, m.Readonly)
	if err != nil {
		return "", err
	}
	mounts, release, err := ref.Mount()
	if err != nil {
		return "", err
	}
	if release != nil {
		b.undo(release)
	}
	if special != nil && len(mounts) == 1 && special(mounts[0]) {
		return "", nil
	}
	if len(mounts) == 1 && isFile(mounts[0]) {
		return mounts[0].Source, nil // such as a secret, which is mounted over nothing
	}
	if err := os.MkdirAll(where, 0o700); err != nil {
		return "", err
	}
	if err := mount.All(mounts, where); err != nil {
		return "", err
	}
	b.undo(func() error { return unmount(where) })
	if m.Selector == "" || filepath.Clean("/"+m.Selector) == "/" {
		return where, nil
	}
	return b.selected(where, m.Selector)
}

// unmount unmounts a directory and waits for it: the caller removes the directory next, and must
// not remove the content of the mount.
func unmount(where string) error {
	if mount.UnmountAll(where, 0) == nil {
		return nil
	}
	return mount.UnmountAll(where, syscall.MNT_DETACH)
}

func isFile(m mount.Mount) bool {
	if m.Type != "bind" && m.Type != "rbind" {
		return false
	}
	info, err := os.Stat(m.Source)
	return err == nil && !info.IsDir()
}

// selected resolves a path below a mount, and pins the result with a mount of its own, since
// other steps may change what the path leads to. It compares the opened path with the resolved
// one.
func (b *runningStep) selected(where, selector string) (string, error) {
	path, err := fs.RootPath(where, selector)
	if err != nil {
		return "", &stepError{kind: wire.Step, code: -1, text: fmt.Sprintf("mount of %s: %v", selector, underlying(err))}
	}
	f, err := os.OpenFile(path, syscall.O_CLOEXEC|0o10000000 /* O_PATH */, 0)
	if err != nil {
		return "", &stepError{kind: wire.Step, code: -1, text: fmt.Sprintf("mount of %s: %v", selector, underlying(err))}
	}
	defer f.Close()
	opened := "/proc/self/fd/" + strconv.Itoa(int(f.Fd()))
	if now, err := os.Readlink(opened); err != nil || now != path {
		return "", fmt.Errorf("%s was changed while it was mounted", selector)
	}
	info, err := f.Stat()
	if err != nil {
		return "", fmt.Errorf("looking at %s: %w", selector, err)
	}
	pin := where + ".selected"
	if info.IsDir() {
		err = os.Mkdir(pin, 0o700)
	} else {
		err = os.WriteFile(pin, nil, 0o600)
	}
	if err != nil {
		return "", err
	}
	if err := syscall.Mount(opened, pin, "", syscall.MS_BIND|syscall.MS_REC, ""); err != nil {
		return "", fmt.Errorf("mounting %s: %w", selector, err)
	}
	b.undo(func() error { return unmount(pin) })
	return pin, nil
}

// underlying returns an error without the path of the program that it names.
func underlying(err error) error {
	if p, ok := errors.AsType[*os.PathError](err); ok {
		return p.Err
	}
	return err
}

// tmpMarker is a file in a step's /tmp if that is empty. gVisor mounts a file system of its own
// over an empty /tmp, and files that the step leaves there would be lost. Mounting /tmp over
// itself would help too, but then nothing could be moved out of it.
const tmpMarker = "/tmp/.cay-step"

func keepTmp(rootPath string) error {
	root, err := os.OpenRoot(rootPath)
	if err != nil {
		return err
	}
	defer root.Close()
	info, err := root.Lstat("tmp")
	if err != nil || !info.IsDir() {
		return nil // it has no files that could be lost
	}
	dir, err := root.Open("tmp")
	if err != nil {
		return err
	}
	_, err = dir.ReadDir(1)
	dir.Close()
	if !errors.Is(err, io.EOF) {
		return err
	}
	if err := root.WriteFile(tmpMarker[1:], nil, 0o600); err != nil {
		return err
	}
	return root.Chtimes("tmp", info.ModTime(), info.ModTime())
}

// workingDir makes the step's working directory if it does not exist. It belongs to the step's
// user.
func workingDir(root, dir string, uid, gid uint32) error {
	path, err := fs.RootPath(root, dir)
	if err != nil {
		return &stepError{kind: wire.Step, code: -1, text: fmt.Sprintf("working directory %s: %v", dir, underlying(err))}
	}
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := user.MkdirAllAndChown(path, 0o755, int(uid), int(gid)); err != nil {
		return &stepError{kind: wire.Step, code: -1, text: fmt.Sprintf("working directory %s: %v", dir, underlying(err))}
	}
	return nil
}

// userOf returns the user that a step runs as, from the accounts of its root.
func userOf(root, name string) (specs.User, error) {
	uid, gid, groups, err := oci.GetUser(root, name)
	if err != nil {
		return specs.User{}, &stepError{kind: wire.Step, code: -1, text: fmt.Sprintf("user %s: %v", name, underlying(err))}
	}
	return specs.User{UID: uid, GID: gid, AdditionalGids: groups}, nil
}
