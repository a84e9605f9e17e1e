package image

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cayhq/cay/internal/hostfile"
)

// layoutsDir is the directory of the pulled OCI images, one layout each. The time of such a
// directory is the time of its last use.
const layoutsDir = "layouts"

func (s *Store) layoutPath(id string) string { return filepath.Join(s.cfg.Dir, layoutsDir, id) }

// Hold keeps a layout that [Store.Pull] returned from being removed until release is called. It
// has no effect on other layouts.
func (s *Store) Hold(l Layout) (release func()) {
	id := filepath.Base(l.Dir)
	if l.Dir != s.layoutPath(id) {
		return func() {}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[id]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.held[id]--; s.held[id] <= 0 {
			delete(s.held, id)
		}
		s.useLayoutLocked(id)
	}
}

// useLayoutLocked records that a layout is used now, and reports whether it exists.
//
// +checklocks:s.mu
func (s *Store) useLayoutLocked(id string) bool {
	now := s.cfg.Now()
	return os.Chtimes(s.layoutPath(id), now, now) == nil
}

// placeLayout renames a finished layout to its name.
func (s *Store) placeLayout(from, to string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.useLayoutLocked(filepath.Base(to)) {
		return nil // another pull, begun when this one was given up, came first
	}
	if err := os.Rename(from, to); err != nil {
		return fmt.Errorf("naming layout: %w", err)
	}
	s.useLayoutLocked(filepath.Base(to))
	return hostfile.SyncDir(filepath.Dir(to))
}

// trimLayouts removes pulled layouts, the longest unused first, until they fit the budget. One
// that cannot be removed takes space and is tried again.
func (s *Store) trimLayouts() {
	entries, err := os.ReadDir(filepath.Join(s.cfg.Dir, layoutsDir))
	if err != nil {
		s.log.Warn("cannot list pulled images", "error", err)
		return
	}
	var all []stored
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			continue // removed meanwhile
		}
		all = append(all, stored{e.Name(), treeSize(s.layoutPath(e.Name())), info.ModTime()})
	}
	trim(all, s.cfg.Budget, func(id string) bool {
		gone, err := s.removeLayout(id)
		if err != nil {
			s.log.Warn("cannot remove pulled image", "layout", id, "error", err)
		}
		return gone
	})
}

// stored is a file or directory that takes space.
type stored struct {
	name string
	size int64 // bytes
	used time.Time
}

// trim calls remove, which reports whether it removed a name, for the longest unused first, until the rest fits the
// budget in bytes.
func trim(all []stored, budget int64, remove func(name string) bool) {
	var total int64
	for _, f := range all {
		total += f.size
	}
	slices.SortFunc(all, func(a, b stored) int { return a.used.Compare(b.used) })
	for _, f := range all {
		if total <= budget {
			return
		}
		if remove(f.name) {
			total -= f.size
		}
	}
}

// dropLayout removes a damaged layout, so that it is pulled again.
func (s *Store) dropLayout(id string) {
	aside, err := os.MkdirTemp(s.tmpDir(), "gone-")
	if err == nil {
		defer os.RemoveAll(aside) // the next Open removes what is left
		err = os.Rename(s.layoutPath(id), filepath.Join(aside, id))
	}
	s.log.Error("pulled image is damaged", "layout", id, "removing", err)
}

// removeLayout removes a layout that is not held and was not used recently.
func (s *Store) removeLayout(id string) (bool, error) {
	aside, err := os.MkdirTemp(s.tmpDir(), "gone-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(aside) // the next Open removes what is left
	s.mu.Lock()
	defer s.mu.Unlock() // held, so that Pull cannot return it meanwhile
	info, err := os.Stat(s.layoutPath(id))
	if err != nil {
		return false, err
	}
	if s.held[id] > 0 || s.cfg.Now().Sub(info.ModTime()) < collectGrace {
		return false, nil
	}
	return true, os.Rename(s.layoutPath(id), filepath.Join(aside, id))
}

// treeSize returns the size of the files below a directory, in bytes.
func treeSize(dir string) (total int64) {
	// Unreadable files count as nothing, since the sum only chooses what to remove.
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if info, err := d.Info(); err == nil {
				total += info.Size()
			}
		}
		return nil
	})
	return total
}
