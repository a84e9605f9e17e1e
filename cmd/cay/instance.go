package main

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// runRoot holds what cay needs while the machine is up: runsc's state, and one
// file for each server that says where it is. A reboot empties it. Only tests of
// the command line change it.
var runRoot = "/run/cay"

// serverRecord is what a server tells about itself in /run/cay/servers. It stays
// after the server ends, since sandboxes go on; doctor removes it with them.
type serverRecord struct {
	Instance string `json:"instance"`
	URL      string `json:"url"`
	KeyFile  string `json:"key_file"`
	DataDir  string `json:"data_dir"`
	PID      int    `json:"pid"`
}

// newInstance makes the six characters that name a server's things on the host.
func newInstance() string { return strings.ToLower(rand.Text()[:6]) }

func recordPath(instance string) string {
	return filepath.Join(runRoot, "servers", instance+".json")
}

// stateDir is where the instance's runsc keeps state and sockets: a short path.
func stateDir(instance string) string { return filepath.Join(runRoot, instance) }

func (r serverRecord) write() error {
	path := recordPath(r.Instance)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("making the directory of server records: %w", err)
	}
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encoding the server's record: %w", err)
	}
	if err := os.WriteFile(path+".new", data, 0o644); err != nil {
		return fmt.Errorf("writing the server's record: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("writing the server's record: %w", err)
	}
	return nil
}

// serverRecords reads the records of all servers of this machine.
func serverRecords() ([]serverRecord, error) {
	paths, err := filepath.Glob(recordPath("*"))
	if err != nil {
		return nil, err
	}
	var records []serverRecord
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("reading a server's record: %w", err)
		}
		var r serverRecord
		if err := json.Unmarshal(data, &r); err != nil || recordPath(r.Instance) != path {
			return nil, fmt.Errorf("%s is not a server's record: %w", path, errors.Join(err))
		}
		records = append(records, r)
	}
	return records, nil
}

var errInUse = errors.New("another cay server uses it")

// lockPatience is how long a starting server waits for the lock of a server that was killed: a
// program that it was just starting has its files for a moment longer.
const lockPatience = 3 * time.Second

// lockDir takes a data directory for this process until the file is closed. A
// directory that another process has for longer than patience is errInUse.
func lockDir(dir string, patience time.Duration) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock of %s: %w", dir, err)
	}
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		f.Close()
		if err == unix.EWOULDBLOCK {
			return nil, fmt.Errorf("locking %s: %w", dir, errInUse)
		}
		return nil, fmt.Errorf("locking %s: %w", dir, err)
	}
	return f, nil
}
