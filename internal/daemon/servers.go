package daemon

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

	"github.com/cayhq/cay/internal/hostfile"
)

// RunDir is the directory for everything that cay needs while the machine is up: the state of runsc, and a record of
// each server. A reboot empties it.
const RunDir = "/run/cay"

// ServerRecord describes a server in a file below RunDir. The file stays after the server ends, since its sandboxes
// keep running, and [Clean] removes it with them.
type ServerRecord struct {
	Instance string `json:"instance"`
	URL      string `json:"url"`
	KeyFile  string `json:"key_file"`
	DataDir  string `json:"data_dir"`
	PID      int    `json:"pid"`
}

// newInstance returns six random characters, which are part of all names on the machine that belong to a server.
func newInstance() string { return strings.ToLower(rand.Text()[:6]) }

// recordPath returns the path of the record of a server instance.
func recordPath(runDir, instance string) string {
	return filepath.Join(runDir, "servers", instance+".json")
}

// stateDir returns the directory in which the runsc of a server instance keeps its state and its sockets, whose paths
// must be short.
func stateDir(runDir, instance string) string { return filepath.Join(runDir, instance) }

// write writes the record, which appears whole or not at all.
func (r ServerRecord) write(runDir string) error {
	path := recordPath(runDir, r.Instance)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("making the directory of server records: %w", err)
	}
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encoding the server's record: %w", err)
	}
	if err := hostfile.Replace(path, data, 0o644); err != nil {
		return fmt.Errorf("writing the server's record: %w", err)
	}
	return nil
}

// Servers returns the records in a RunDir, also those of servers that do not run any more.
func Servers(runDir string) ([]ServerRecord, error) {
	paths, err := filepath.Glob(recordPath(runDir, "*"))
	if err != nil {
		return nil, err
	}
	var records []ServerRecord
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("reading a server's record: %w", err)
		}
		var r ServerRecord
		if err := json.Unmarshal(data, &r); err != nil || recordPath(runDir, r.Instance) != path {
			return nil, fmt.Errorf("%s is not a server's record: %w", path, errors.Join(err))
		}
		records = append(records, r)
	}
	return records, nil
}

// errInUse reports that a server runs on a data directory.
var errInUse = errors.New("another cay server uses it")

// lockPatience is the time for which a starting server waits for the lock of its data directory. After a server is
// killed, a program that it was just starting holds the lock for a moment longer. With less, the start after a kill may
// fail; with more, the refusal of a second server on the directory comes later.
const lockPatience = 3 * time.Second

// lockDir locks a data directory for this process until the file is closed. It returns errInUse if another process
// holds the lock for longer than patience.
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
