package archive

import (
	"context"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/cayhq/cay/internal/sandbox"
)

// collect drops the rows of copies that nothing needs any more, and removes the objects that no row names.
func (a *Archive) collect(ctx context.Context) error {
	if err := a.cfg.Records.DropCheckpoints(ctx); err != nil {
		return err
	}
	rows, err := a.copies(ctx)
	if err != nil {
		return err
	}
	homes, programs := map[string]bool{}, map[string]bool{}
	for _, c := range rows {
		homes[strings.TrimSuffix(home(c), "/")] = true
		programs[programPrefix+c.Agent], programs[programPrefix+c.Runsc] = true, true
	}
	if err := a.checkpoints.Run(ctx, func(key string) bool { return homes[path.Dir(key)] }); err != nil {
		return err
	}
	return a.programs.Run(ctx, func(key string) bool { return programs[key] || a.wants(key) })
}

// copies returns the rows, and learns from them which checkpoints are stored.
func (a *Archive) copies(ctx context.Context) ([]sandbox.StoredCheckpoint, error) {
	a.mu.Lock()
	before := slices.Collect(maps.Keys(a.stored))
	a.mu.Unlock()
	rows, err := a.cfg.Records.StoredCheckpoints(ctx)
	if err != nil {
		return nil, err
	}
	stored := map[string]time.Time{}
	for _, c := range rows {
		if !c.UploadedAt.IsZero() {
			stored[c.Name] = c.MadeAt // the rows of a name are in the order of their copies
		}
	}
	a.learn(stored, before)
	return rows, nil
}

// learn takes over which copies are stored. Of the names before, which were taken for stored when the rows were read,
// it drops those that have no row.
func (a *Archive) learn(stored map[string]time.Time, before []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for name, made := range stored {
		if made.After(a.stored[name]) {
			a.stored[name] = made
		}
	}
	for _, name := range before {
		if _, is := stored[name]; !is {
			delete(a.stored, name)
		}
	}
}

// wants reports whether a key is that of a program that this process takes for uploaded. A row that is being written
// may name it.
func (a *Archive) wants(key string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, sum := range a.sums {
		if key == programPrefix+sum.String() {
			return true
		}
	}
	return false
}
