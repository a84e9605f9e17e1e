// Package hostfile writes small files of the host whole and as durably as their owner needs, syncs
// directories, and finds runs of zeros that a sparse file leaves out.
//
// It knows only paths and bytes. All functions may be called concurrently, but a path has one writer at a time: a
// replacement is first written beside the file, under its name with the suffix ".new". After an error of Replace the
// path has its old content and no ".new" file is left; ReplaceSynced may also leave the new content, and CreateSynced a
// part of it.
//
// The libraries for this (google/renameio, natefinch/atomic) sync each file, which a sandbox's
// record must not wait for, do not sync its directory, which others need, and leave one more file
// behind each time that the process is killed.
package hostfile

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Replace makes data the content of the file at path. Other processes see the old content or the
// new one. It does not wait for the disk: after a loss of power the file may have its old content,
// be empty or be missing.
func Replace(path string, data []byte, perm fs.FileMode) error {
	return replace(path, data, perm, func(*os.File) error { return nil })
}

// ReplaceSynced does what Replace does, and returns once the content and the file's name are on the disk. After a loss
// of power, or an error, the file has its old content or the new one.
func ReplaceSynced(path string, data []byte, perm fs.FileMode) error {
	if err := replace(path, data, perm, (*os.File).Sync); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

func replace(path string, data []byte, perm fs.FileMode, sync func(*os.File) error) error {
	draft := path + ".new"
	// A process that was killed may have left a draft.
	f, err := os.OpenFile(draft, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, perm)
	if err != nil {
		return fmt.Errorf("replacing file: %w", err)
	}
	if err = fill(f, data, sync); err == nil {
		err = os.Rename(draft, path)
	}
	if err != nil {
		return fmt.Errorf("replacing file: %w", errors.Join(err, os.Remove(draft)))
	}
	return nil
}

// CreateSynced makes a file, which must not exist, and returns once its content is on the disk. Call SyncDir on its
// directory to make its name durable. After an error a part of the file may be left.
func CreateSynced(path string, data []byte, perm fs.FileMode) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err == nil {
		err = fill(f, data, (*os.File).Sync)
	}
	if err != nil {
		return fmt.Errorf("making file: %w", err)
	}
	return nil
}

// fill writes data to a new file, syncs it and closes it.
func fill(f *os.File, data []byte, sync func(*os.File) error) error {
	_, err := f.Write(data)
	if err == nil {
		err = sync(f)
	}
	return errors.Join(err, f.Close())
}

// SyncDir returns when the names of the files in a directory are on the disk.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err == nil {
		err = errors.Join(d.Sync(), d.Close())
	}
	if err != nil {
		return fmt.Errorf("syncing directory: %w", err)
	}
	return nil
}

// IsZero reports whether all bytes are 0.
func IsZero(p []byte) bool {
	// Each byte equals its neighbour, so all equal the first one.
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}
