package node

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cayhq/cay/internal/sandbox"
)

// TestOpenSaved saves a sandbox as a snapshot and as a recovery point, learns of both, and reads the files of the
// snapshot after it was dropped.
func TestOpenSaved(t *testing.T) {
	m := newMachine(t)
	var saved []string
	m.node.cfg.Saved = func(name string, bytes int64) {
		if bytes == 0 {
			t.Errorf("the checkpoint of %s has no size", name)
		}
		saved = append(saved, name)
	}
	spec, _ := m.working()
	snap := m.snapshot(spec)
	if _, err := m.node.Checkpoint(m.ctx(), spec.ID); err != nil {
		t.Fatal(err)
	}
	want := []string{string(snap), string(spec.ID)}
	if !slices.Equal(saved, want) {
		t.Errorf("told of the checkpoints of %q, want %q", saved, want)
	}
	for _, name := range want {
		c, err := m.node.OpenSaved(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, program := range []string{c.Programs.Agent, c.Programs.Runsc} {
			if _, err := os.Stat(program); err != nil {
				t.Error(err)
			}
		}
		if c.CPUClass == "" || c.MadeAt.IsZero() {
			t.Errorf("the checkpoint of %s is %+v", name, c)
		}
		if name == string(snap) {
			if err := m.node.DropSnapshot(m.ctx(), snap); err != nil {
				t.Fatal(err)
			}
		}
		var names []string
		for _, f := range c.Files {
			names = append(names, filepath.Base(f.Name()))
			if _, err := io.Copy(io.Discard, f); err != nil {
				t.Error(err)
			}
			f.Close()
		}
		for _, file := range []string{"pages.img", "manifest.json"} {
			if !slices.Contains(names, file) {
				t.Errorf("the checkpoint of %s has the files %q", name, names)
			}
		}
	}
	for _, name := range []string{string(snap), string(sandbox.NewID())} {
		if _, err := m.node.OpenSaved(name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("opening the checkpoint of %s, which has none: %v", name, err)
		}
	}
}
