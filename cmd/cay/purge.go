package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/cayhq/cay/internal/buildkit"
	"github.com/cayhq/cay/internal/node"
	"github.com/cayhq/cay/internal/store"
)

// remains names the places in which the instance of a data directory keeps things.
func remains(instance, dataDir string) node.Remains {
	r := node.Remains{Instance: instance, RunDir: stateDir(instance)}
	if dataDir != "" {
		r.Dir = filepath.Join(dataDir, "sandboxes")
	}
	return r
}

// purge removes a server from the machine: its sandboxes with all they have on
// the host, and everything in its data directory.
func purge(ctx context.Context, dataDir string) error {
	if _, err := os.Stat(dataDir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	lock, err := lockDir(dataDir, lockPatience)
	if err != nil {
		return err
	}
	defer lock.Close()
	if _, err := os.Stat(filepath.Join(dataDir, databaseFile)); err == nil {
		db, err := store.Open(ctx, filepath.Join(dataDir, databaseFile))
		if err != nil {
			return err
		}
		instance, found, err := db.Setting(ctx, settingInstance)
		if err = errors.Join(err, db.Close()); err != nil {
			return err
		}
		if found {
			if err := clean(ctx, instance, dataDir); err != nil {
				return err
			}
		}
	}
	// Only what a server puts there: a data directory that is really somebody's
	// home must not be emptied.
	var errs []error
	for _, name := range dataFiles {
		errs = append(errs, os.RemoveAll(filepath.Join(dataDir, name)))
	}
	if err := os.Remove(dataDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(os.Stderr, "%s is left in place: it holds files that are not cay's\n", dataDir)
	}
	return errors.Join(errs...)
}

// clean removes an instance's sandboxes and its record from the machine.
func clean(ctx context.Context, instance, dataDir string) error {
	if err := buildkit.Purge(buildRemains(instance, dataDir)); err != nil {
		return err // what still runs uses what follows
	}
	if err := node.Purge(ctx, remains(instance, dataDir)); err != nil {
		return err
	}
	if err := os.Remove(recordPath(instance)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the server's record: %w", err)
	}
	// Gone with the last server.
	for _, dir := range []string{filepath.Dir(recordPath(instance)), filepath.Join(runRoot, "network"), runRoot} {
		_ = os.Remove(dir) // not empty: another server is there
	}
	return nil
}

// deadInstances lists the instances on this machine whose server does not run,
// with their data directory where that is known.
func deadInstances() (map[string]string, error) {
	records, err := serverRecords()
	if err != nil {
		return nil, err
	}
	dead := map[string]string{}
	var alive []string
	for _, r := range records {
		lock, err := lockDir(r.DataDir, 0)
		switch {
		case errors.Is(err, errInUse):
			alive = append(alive, r.Instance)
			continue
		case err == nil:
			lock.Close()
			dead[r.Instance] = r.DataDir
		default: // the directory is gone
			dead[r.Instance] = ""
		}
	}
	instances, err := node.Instances()
	if err != nil {
		return nil, err
	}
	for _, instance := range instances {
		if _, known := dead[instance]; !known && !slices.Contains(alive, instance) {
			dead[instance] = ""
		}
	}
	return dead, nil
}
