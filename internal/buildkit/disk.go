package buildkit

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// errNoDisk reports that an image could not be mounted.
var errNoDisk = errors.New("the builds' disk cannot be mounted")

const (
	// diskMargin is the size in bytes by which a disk's image exceeds what the cache and builds
	// may take: for its own tables, some 2 % of the largest image, and for what a build that is
	// being removed is lent.
	diskMargin = 256 << 20
	// imageSuffix distinguishes an image from a directory.
	imageSuffix = ".ext4"
)

// Probe returns the reason why a scope's disk cannot be a file system of its own on this machine,
// "" if it can.
func Probe() string {
	if _, err := exec.LookPath("mkfs.ext4"); err != nil {
		return "mkfs.ext4 is not installed"
	}
	f, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return "no loop devices: " + err.Error()
	}
	defer f.Close()
	n, err := unix.IoctlRetInt(int(f.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return "no loop devices: " + err.Error()
	}
	device := fmt.Sprintf("/dev/loop%d", n)
	d, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return "no loop devices: " + err.Error()
	}
	d.Close()
	return ""
}

// withoutImages records why disks are directories from now on.
func (b *Builder) withoutImages(why string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.noImage == "" {
		b.log.Warn("builds write to the data directory's own file system: their limits are checked from time to time "+
			"and not enforced by the kernel", "reason", why)
	}
	b.noImage = why
}

// openDisk makes a scope's disk if needed, and returns its path and whether it is an image.
func (b *Builder) openDisk(ctx context.Context, scope string) (path string, image bool, err error) {
	b.mu.Lock()
	why := b.noImage
	b.mu.Unlock()
	if why == "" {
		if why = Probe(); why != "" {
			b.withoutImages(why)
		}
	}
	dir, file := b.disk(scope), b.disk(scope)+imageSuffix
	if why != "" {
		// An image would be of use only to another run of the server.
		if err := errors.Join(removed(os.Remove(file)), os.MkdirAll(dir, 0o700)); err != nil {
			return "", false, fmt.Errorf("making a builds' disk: %w", err)
		}
		return dir, false, nil
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", false, fmt.Errorf("making a builds' disk: %w", err)
	}
	size := b.cfg.CacheBytes + int64(b.cfg.Builds)*b.cfg.BuildBytes + diskMargin
	size += size / 50
	size -= size % (1 << 20)
	if usable(file, size) {
		return file, true, nil
	}
	if err := makeImage(ctx, file, size); err != nil {
		return "", false, fmt.Errorf("making a builds' disk: %w", err)
	}
	return file, true, nil
}

func removed(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// Offsets in the superblock, in bytes from the image's beginning, and values of its state.
const (
	superblock     = 1024
	magicOffset    = 0x38
	stateOffset    = 0x3a
	extMagic       = 0xef53
	stateHasErrors = 2
)

// usable reports whether an image has the size and is not known to be damaged. An unusable image
// is made anew, since it holds only a cache.
func usable(file string, size int64) bool {
	f, err := os.Open(file)
	if err != nil {
		return false
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Size() != size {
		return false
	}
	var fields [4]byte
	if _, err := f.ReadAt(fields[:], superblock+magicOffset); err != nil {
		return false
	}
	magic, state := binary.LittleEndian.Uint16(fields[:]), binary.LittleEndian.Uint16(fields[stateOffset-magicOffset:])
	return magic == extMagic && state&stateHasErrors == 0
}

// makeImage makes an empty file system in a sparse file, which appears when it is complete.
func makeImage(ctx context.Context, file string, size int64) error {
	draft := file + ".draft"
	defer os.Remove(draft) // after the rename there is nothing to remove
	if err := removed(os.Remove(draft)); err != nil {
		return err
	}
	f, err := os.OpenFile(draft, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return err
	}
	// Builds may use all of it, and tables are written only when needed.
	cmd := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=64", "-E",
		"lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0", draft)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return os.Rename(draft, file)
}

// diskAge is the time for which a scope's cache is kept after its last use. With a shorter time
// rare builds begin without a cache; with a longer one removed organizations keep space on the
// disk.
const diskAge = 30 * 24 * time.Hour

// forget removes disks that were not written to for diskAge. No program may run.
func (b *Builder) forget() error {
	entries, err := os.ReadDir(b.disks())
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && time.Since(info.ModTime()) > diskAge {
			err = os.RemoveAll(filepath.Join(b.disks(), e.Name()))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// diskFile returns the path of the scope's disk at present.
func (b *Builder) diskFile(scope string) string {
	if _, err := os.Stat(b.disk(scope) + imageSuffix); err == nil {
		return b.disk(scope) + imageSuffix
	}
	return filepath.Clean(b.disk(scope))
}
