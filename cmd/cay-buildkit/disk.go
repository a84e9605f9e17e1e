package main

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/buildkit/wire"
)

const (
	// diskLook is how often a step's use of the disk is looked at: a fast disk takes some 2 GB
	// in it.
	diskLook = time.Second
	// diskReserve is what steps leave free on the disk, whatever they may write.
	diskReserve = 1 << 30
)

// disk bounds what a step writes. It is looked at from outside: as long as the disk has
// not lost what the step may take, the step cannot have taken it; else its files are counted.
type disk struct {
	dir   string   // on the file system in question
	dirs  []string // that the step's files go to
	limit int64    // bytes, of what the step adds
}

// writes notes where what is written to a mount goes.
func (d *disk) writes(m mount.Mount) {
	dir := ""
	switch m.Type {
	case "bind", "rbind":
		if !slices.Contains(m.Options, "ro") {
			dir = m.Source
		}
	case "overlay":
		for _, o := range m.Options {
			if upper, ok := strings.CutPrefix(o, "upperdir="); ok {
				dir = upper
			}
		}
	}
	if dir != "" {
		d.dirs = append(d.dirs, dir)
	}
}

// watch calls stop when the step writes more than it may. It returns when ctx ends.
func (d *disk) watch(ctx context.Context, stop context.CancelCauseFunc) {
	before, had := d.used(ctx), d.free()
	tick := time.NewTicker(diskLook)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		free := d.free()
		switch {
		case free < diskReserve:
			stop(&stepError{kind: wire.Disk, code: -1, text: "the machine's disk is full"})
			return
		case had-free <= d.limit:
			continue
		}
		if d.used(ctx)-before > d.limit {
			stop(&stepError{kind: wire.Disk, code: -1, text: fmt.Sprintf("the step wrote more than the %d MiB that it may", d.limit>>20)})
			return
		}
		had = free + d.limit/2 // somebody else's: look again when as much again is gone
	}
}

// free is how much of the disk is free, in bytes.
func (d *disk) free() int64 {
	var st unix.Statfs_t
	if err := unix.Statfs(d.dir, &st); err != nil {
		return 0 // it is no disk to go on with
	}
	return int64(st.Bavail) * st.Bsize
}

// used is what the step's files take on the disk, in bytes. Files that are no longer to be found
// are not counted; the reserve bounds those.
func (d *disk) used(ctx context.Context) (total int64) {
	for _, dir := range d.dirs {
		_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
			if ctx.Err() != nil {
				return fs.SkipAll
			}
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
	}
	return total
}
