package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/buildkit/wire"
)

const (
	// diskLook is the time between two checks of the disk. With an image it decides how long a
	// step runs on a full disk; without one, how much is written beyond the limit: a fast disk
	// takes some 500 MB in that time.
	diskLook = 250 * time.Millisecond
	// diskReserve is the number of bytes that builds leave free on the host's disk, whatever they
	// may write. An image for whose blocks the host has no space breaks.
	diskReserve = 1 << 30
	// diskSlack is the number of bytes that are free when no build runs, and that a build that
	// has filled the disk is lent to remove what it made. The cache's records grow by much less.
	diskSlack = 64 << 20
	// diskFull is the number of free bytes below which the disk counts as full. Writers of small
	// files leave less than a block for each of the kernel's CPUs unused.
	diskFull = 1 << 20
)

// disk bounds what builds write. If the disk is a file system of its own, a file in it, the
// ballast, takes the space that running builds may not use, and the kernel enforces the limit. If
// it is a directory of the host, its content is counted whenever the host's disk has lost as much
// as builds may write, so a fast writer exceeds the limit before it is stopped.
type disk struct {
	dir     string
	limit   int64    // bytes, of one build
	ballast *os.File // nil if the disk is a directory of the host

	mu sync.Mutex
	// +checklocks:mu
	running map[*diskUse]bool
}

// diskUse is a build or a step that writes.
type diskUse struct {
	stop  context.CancelCauseFunc // nil for a build that the kernel stops with ENOSPC
	lent  bool                    // whether it has been lent diskSlack
	alone bool                    // whether it was lent and no other build ran then
	build bool
}

func openDisk(dir string, c *wire.Config) (*disk, error) {
	d := &disk{dir: dir, limit: c.BuildBytes, running: map[*diskUse]bool{}}
	if !c.Image {
		return d, nil
	}
	var err error
	if d.ballast, err = os.OpenFile(filepath.Join(dir, "ballast"), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("opening the disk: %w", err)
	}
	return d, d.leave(diskSlack)
}

// statfs returns the number of free bytes of dir's file system, and whether it can be written to.
func statfs(dir string) (free int64, writable bool) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, false // a disk that cannot be used
	}
	return int64(st.Bavail) * st.Bsize, st.Flags&unix.ST_RDONLY == 0
}

// leave gives the ballast the size that leaves want bytes free, as nearly as possible.
func (d *disk) leave(want int64) error {
	if d.ballast == nil {
		return nil
	}
	info, err := d.ballast.Stat()
	if err != nil {
		return fmt.Errorf("bounding the disk: %w", err)
	}
	free, _ := statfs(d.dir)
	size := max(info.Size()+free-want, 0)
	if size <= info.Size() {
		err = d.ballast.Truncate(size)
	} else {
		err = unix.Fallocate(int(d.ballast.Fd()), 0, 0, size)
		if errors.Is(err, unix.ENOSPC) {
			err = nil // the blocks that map the ballast did not fit; this is as near as possible
		}
	}
	if err != nil {
		return fmt.Errorf("bounding the disk: %w", err)
	}
	return nil
}

// begin gives a build its space, and calls stop with the reason when it is full, unless the
// build's own writes fail then. The caller must call end.
func (d *disk) begin(stop context.CancelCauseFunc) (*diskUse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	use := &diskUse{build: true}
	if d.ballast == nil {
		use.stop = stop
	}
	free, _ := statfs(d.dir)
	if d.builds() == 0 {
		free = 0 // the slack is not counted twice
	}
	if err := d.leave(free + d.limit); err != nil {
		return nil, err
	}
	d.running[use] = true
	return use, nil
}

// step registers a step, whose stop is called when the builds have filled their space. The caller
// must call end.
func (d *disk) step(stop context.CancelCauseFunc) *diskUse {
	d.mu.Lock()
	defer d.mu.Unlock()
	use := &diskUse{stop: stop}
	d.running[use] = true
	return use
}

// end takes the space of a build back.
func (d *disk) end(use *diskUse) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.running, use)
	if !use.build {
		return nil
	}
	return d.settle()
}

// settle leaves free what running builds have left, or the slack if none runs. It gives a running
// build nothing: one that is at its limit would write on.
//
// +checklocks:d.mu
func (d *disk) settle() error {
	builds := int64(d.builds())
	if builds == 0 {
		return d.leave(diskSlack)
	}
	free, _ := statfs(d.dir)
	return d.leave(min(free, builds*d.limit))
}

// builds returns the number of builds that run.
//
// +checklocks:d.mu
func (d *disk) builds() (n int) {
	for use := range d.running {
		if use.build {
			n++
		}
	}
	return n
}

// lend gives a build that has filled the disk the space to remove what it made, once for each
// build.
func (d *disk) lend() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for use := range d.running {
		if use.build && !use.lent {
			use.lent, use.alone = true, d.builds() == 1
			_ = d.leave(diskSlack) // otherwise it is tidied up later
		}
	}
}

// overran reports whether a build wrote more than it may and got as far as it did only with what it
// was lent. If several builds shared the disk, it is unknown which one filled it.
func (d *disk) overran(use *diskUse) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return use.alone
}

// fitrim is Linux's FITRIM, _IOWR('X', 121, struct fstrim_range).
const fitrim = 0xc0185879

// trim gives the host the unused blocks of an image, including those of the ballast if no build
// runs.
func (d *disk) trim() error {
	if d.ballast == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.builds() == 0 {
		if err := d.ballast.Truncate(0); err != nil {
			return fmt.Errorf("giving blocks of the disk back: %w", err)
		}
	}
	r := struct{ start, length, least uint64 }{length: ^uint64(0)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, d.ballast.Fd(), fitrim, uintptr(unsafe.Pointer(&r)))
	err := d.settle()
	if errno != 0 && errno != unix.EOPNOTSUPP {
		err = errors.Join(err, fmt.Errorf("giving blocks of the disk back: %w", errno))
	}
	return err
}

// taken returns the number of bytes of an image that the cache and builds take.
func (d *disk) taken() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(d.dir, &st); err != nil {
		return 0, fmt.Errorf("looking at the disk: %w", err)
	}
	info, err := d.ballast.Stat()
	if err != nil {
		return 0, fmt.Errorf("looking at the disk: %w", err)
	}
	return int64(st.Blocks-st.Bfree)*st.Bsize - info.Size(), nil
}

// full reports whether the running builds have filled the disk.
func (d *disk) full() bool {
	free, _ := statfs(d.dir)
	return d.ballast != nil && free < diskFull
}

// overdrawn reports whether the cache takes more than it may while no build runs.
func (d *disk) overdrawn(cacheBytes int64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ballast == nil || d.builds() > 0 {
		return false
	}
	taken, err := d.taken()
	return err == nil && taken > cacheBytes+diskSlack
}

// exceeded returns the error of a build that wrote more than it may.
func (d *disk) exceeded() error {
	return &stepError{kind: wire.Disk, code: -1,
		text: fmt.Sprintf("the build wrote more than the %d MiB that it may (build.disk_mb)", d.limit>>20)}
}

// isFull reports whether an error, of this program or in the words of another, is that of a full
// disk.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || strings.Contains(strings.ToLower(err.Error()), "no space left on device")
}

// watch checks the disk until the program ends. It ends the program if the disk has failed.
func (d *disk) watch() {
	look := &look{}
	for range time.Tick(diskLook) {
		d.look(look)
	}
}

// look holds the result of the last check of the disk.
type look struct {
	builds     int   // builds that ran then
	used, free int64 // bytes: by builds when the first began, and free on the host's disk
}

func (d *disk) look(last *look) {
	d.mu.Lock()
	builds := d.builds()
	d.mu.Unlock()
	if builds == 0 {
		last.builds = 0
		return
	}
	_, writable := statfs(d.dir)
	free, _ := statfs(contextsDir)
	switch {
	case d.ballast != nil && !writable:
		fmt.Fprintln(os.Stderr, "cay-buildkit: the disk has failed")
		os.Exit(1) // the server makes a new disk
	case free < diskReserve:
		d.stop(&stepError{kind: wire.Disk, code: -1, text: "the machine's disk is full"}, true)
	case d.full():
		d.lend()
		d.stop(d.exceeded(), false)
	case d.ballast == nil:
		d.count(last, builds, free)
	}
}

// count counts what is in the disk's directory if the host's disk has lost as much as builds may
// write.
func (d *disk) count(last *look, builds int, free int64) {
	if last.builds == 0 {
		last.used, last.free = used(d.dir), free
	}
	last.builds = builds
	limit := d.limit * int64(builds)
	if last.free-free <= limit {
		return
	}
	if used(d.dir)-last.used > limit {
		d.stop(d.exceeded(), true)
		return
	}
	last.free = free + limit/2 // other programs took it: check when as much again is gone
}

// stop stops steps, and also whole builds if builds is true.
func (d *disk) stop(why error, builds bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for use := range d.running {
		if use.stop != nil && (builds || !use.build) {
			use.stop(why)
		}
	}
}

// used returns the space that the files below dir take on the disk, in bytes. It does not count
// deleted files that are still open; the reserve bounds those.
func used(dir string) (total int64) {
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil // removed meanwhile
		}
		if info, err := e.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				total += st.Blocks * 512 / int64(max(st.Nlink, 1))
			}
		}
		return nil
	})
	return total
}
