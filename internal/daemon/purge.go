package daemon

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
)

// remains returns the places in which a server instance keeps its sandboxes. dataDir is empty if it is not known.
func remains(runDir, instance, dataDir string) node.Remains {
	r := node.Remains{Instance: instance, RunDir: stateDir(runDir, instance)}
	if dataDir != "" {
		r.Dir = filepath.Join(dataDir, "sandboxes")
	}
	return r
}

// Purge removes a server that does not run from the machine: its sandboxes with everything they have there, and the
// server's files in its data directory. left reports that the directory is still there, because it holds other files.
func Purge(ctx context.Context, dataDir string) (left bool, err error) {
	if _, err := os.Stat(dataDir); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	lock, err := lockDir(dataDir, lockPatience)
	if err != nil {
		return false, err
	}
	defer lock.Close()
	if err := purgeInstance(ctx, dataDir); err != nil {
		return false, err
	}
	// Only the server's own files go, since a data directory may be a user's home by mistake.
	var errs []error
	for _, name := range dataFiles {
		errs = append(errs, os.RemoveAll(filepath.Join(dataDir, name)))
	}
	err = os.Remove(dataDir)
	left = err != nil && !errors.Is(err, fs.ErrNotExist)
	return left, errors.Join(errs...)
}

// purgeInstance removes the sandboxes of the server instance of a data directory from the machine.
func purgeInstance(ctx context.Context, dataDir string) error {
	instance, err := instanceOf(ctx, dataDir)
	if err != nil || instance == "" {
		return err // no server was ever started there
	}
	return Clean(ctx, RunDir, instance, dataDir)
}

// Clean removes the sandboxes and builds of a server instance and its record from the machine. dataDir is empty if it
// is not known.
func Clean(ctx context.Context, runDir, instance, dataDir string) error {
	if err := buildkit.Purge(buildRemains(runDir, instance, dataDir)); err != nil {
		return err // builds that still run use the slots that node.Purge removes
	}
	if err := node.Purge(ctx, remains(runDir, instance, dataDir)); err != nil {
		return err
	}
	record := recordPath(runDir, instance)
	if err := os.Remove(record); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the server's record: %w", err)
	}
	// The last server takes the directories with it.
	for _, dir := range []string{filepath.Dir(record), filepath.Join(runDir, "network"), runDir} {
		_ = os.Remove(dir) // one that is not empty belongs to another server too
	}
	return nil
}

// Dead returns the server instances that left something on this machine and whose server does not run, with their data
// directories, which are empty where they are not known.
func Dead(runDir string) (map[string]string, error) {
	records, err := Servers(runDir)
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
		default: // the directory does not exist any more
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
