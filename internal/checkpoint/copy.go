package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cayhq/cay/internal/hostfile"
)

// Copy makes the latest checkpoint of a name also the latest of another, durably and independent
// of the first. The files of a checkpoint never change, so both share them through hard links,
// which takes no space and no time. If there is nothing to copy it returns nil. After an error
// [Store.Remove] removes what is left of the other name.
func (s *Store) Copy(from, to string) (*Checkpoint, error) {
	c, err := s.Latest(from)
	if err != nil || c == nil {
		return nil, err
	}
	home := filepath.Join(s.dir, to)
	draft := filepath.Join(home, draftDir)
	if err := os.MkdirAll(draft, 0o700); err != nil {
		return nil, fmt.Errorf("making a directory for a checkpoint: %w", err)
	}
	names := []string{manifestFile}
	for _, f := range c.Files {
		names = append(names, f.Name)
	}
	for _, name := range names {
		if err := os.Link(filepath.Join(c.Dir, name), filepath.Join(draft, name)); err != nil {
			return nil, fmt.Errorf("copying a checkpoint: %w", err)
		}
	}
	if c.Suspect() {
		if err := (&Checkpoint{Dir: draft}).Distrust(); err != nil {
			return nil, err
		}
	}
	dir := filepath.Join(home, "1")
	if err := errors.Join(hostfile.SyncDir(draft), os.Rename(draft, dir), hostfile.SyncDir(home),
		hostfile.SyncDir(s.dir)); err != nil {
		return nil, fmt.Errorf("putting a checkpoint in place: %w", err)
	}
	return read(dir)
}

// Open opens the files of the checkpoint that pick chooses, for [Opened.Verify], which can read
// them to their end even if the checkpoint is removed meanwhile. A missing file gives Internal,
// code "checkpoint_damaged".
func (c *Checkpoint) Open(pick func(name string) bool) (*Opened, error) {
	o := &Opened{}
	for _, want := range c.Files {
		if !pick(want.Name) {
			continue
		}
		f, err := os.Open(filepath.Join(c.Dir, want.Name))
		if err != nil {
			return nil, errors.Join(damaged("%s cannot be read", want.Name).Because(err), o.Close())
		}
		o.files, o.want = append(o.files, f), append(o.want, want)
	}
	return o, nil
}

// Opened holds some of a checkpoint's files open.
type Opened struct {
	files []*os.File
	want  []file
}

// OpenAll opens all files of the checkpoint and its manifest. They can be read to their end even if the checkpoint is
// removed meanwhile. A missing file gives Internal, code "checkpoint_damaged".
func (c *Checkpoint) OpenAll() ([]*os.File, error) {
	o, err := c.Open(func(string) bool { return true })
	if err != nil {
		return nil, err
	}
	f, err := os.Open(filepath.Join(c.Dir, manifestFile))
	if err != nil {
		return nil, errors.Join(damaged("%s cannot be read", manifestFile).Because(err), o.Close())
	}
	return append(o.files, f), nil
}

// Verify compares the files with their sums, as [Checkpoint.Verify] does. Call it once.
func (o *Opened) Verify(ctx context.Context) error {
	for i, f := range o.files {
		if err := verifyFile(ctx, o.want[i], f, true); err != nil {
			return err
		}
	}
	return nil
}

// Close closes the files.
func (o *Opened) Close() error {
	var errs []error
	for _, f := range o.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
