// Package embedded carries the programs that cay brings with it and unpacks them:
// cay-agent, which is the first process of every sandbox, cay-runsc, which is
// gVisor, and cay-buildkit, which builds Dockerfiles.
//
// Programs are unpacked under their content hash, so several versions stand side by side: a
// sandbox keeps the programs it was started with, and a checkpoint is restored only by the gVisor
// that made it. [Collect] removes the versions that nothing needs any more. Unpacking is atomic,
// and several processes may unpack at once; an error leaves at most a temporary file with a
// recognisable name.
package embedded

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// The directory holds a README, so that the package compiles before the programs are built.
//
//go:embed programs
var programs embed.FS

// Version names one build of the two programs of a sandbox: each a prefix of its content hash.
type Version struct {
	Agent string `json:"agent"`
	Runsc string `json:"runsc"`
}

// Programs are the unpacked programs of a version.
type Programs struct {
	Version
	AgentDir string // directory that holds cay-agent and nothing else: mounted into sandboxes
	Agent    string // path of cay-agent
	Runsc    string // path of cay-runsc
}

const (
	agentName    = "cay-agent"
	runscName    = "cay-runsc"
	buildkitName = "cay-buildkit"
	// unpacking is the prefix of the name of a file that is still being written.
	unpacking = ".unpacking-"
	// dirMode is the mode of a program's directory, whatever the umask. Processes of sandboxes,
	// which have no user of the host, read the agent there; with a stricter mode no sandbox
	// starts.
	dirMode = 0o755
)

// At returns the paths that the programs of a version have below dir, whether or not they exist.
func At(dir string, v Version) Programs {
	agentDir := filepath.Join(dir, v.Agent)
	return Programs{Version: v, AgentDir: agentDir, Agent: filepath.Join(agentDir, agentName),
		Runsc: filepath.Join(dir, v.Runsc, runscName)}
}

// Unpack unpacks the programs of this build below dir, unless they are there already, and returns
// their paths. It makes dir if it does not exist. The first time takes about 100 MB of disk. It fails
// if the file system of dir does not let programs start.
func Unpack(dir string) (Programs, error) {
	if err := checkExec(dir); err != nil {
		return Programs{}, err
	}
	agent, err := unpack(dir, agentName)
	if err != nil {
		return Programs{}, err
	}
	runsc, err := unpack(dir, runscName)
	if err != nil {
		return Programs{}, err
	}
	return At(dir, Version{Agent: agent, Runsc: runsc}), nil
}

// checkExec makes dir and returns an error if its file system is mounted with noexec. Without it a server would start
// there and then fail each create.
func checkExec(dir string) error {
	if err := os.MkdirAll(dir, dirMode); err != nil {
		return fmt.Errorf("making a directory for programs: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("looking at the file system of %s: %w", dir, err)
	}
	if st.Flags&unix.ST_NOEXEC != 0 {
		return fmt.Errorf("the file system of %s is mounted with noexec, and cay starts programs there: "+
			"mount it without, or set data_dir to a directory of another one", dir)
	}
	return nil
}

// UnpackBuildkit unpacks this build's cay-buildkit below dir, unless it is there already, and
// returns its path. The first time takes about 35 MB of disk.
func UnpackBuildkit(dir string) (path string, err error) {
	hash, err := unpack(dir, buildkitName)
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, hash, buildkitName), nil
}

// buildkitHash returns the directory name of this build's cay-buildkit, or "" if the build has
// none. Collect needs it because no sandbox and no checkpoint names cay-buildkit.
var buildkitHash = sync.OnceValue(func() string {
	hash, _, err := packed(buildkitName)
	if err != nil {
		return ""
	}
	return hash
})

// Find returns the programs of a version that this build of cay or another one unpacked before.
func Find(dir string, v Version) (Programs, error) {
	p := At(dir, v)
	for _, path := range []string{p.Agent, p.Runsc} {
		if _, err := os.Stat(path); err != nil {
			return Programs{}, fmt.Errorf("looking for an earlier version's program: %w", err)
		}
	}
	if err := os.Chmod(p.AgentDir, dirMode); err != nil {
		return Programs{}, fmt.Errorf("making an earlier version's agent readable for sandboxes: %w", err)
	}
	return p, nil
}

// Collect removes the programs below dir, and what an interrupted unpacking left there. It keeps
// the versions in keep and this build's cay-buildkit. Nothing may unpack meanwhile. It returns
// the names that it removed; after an error it goes on, and returns all errors joined.
func Collect(dir string, keep []Version) (removed []string, err error) {
	removed, err = Unneeded(dir, keep)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, name := range removed {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, name)))
	}
	return removed, errors.Join(errs...)
}

// Unneeded returns the names of what Collect would remove.
func Unneeded(dir string, keep []Version) (names []string, err error) {
	named := map[string]bool{buildkitHash(): true}
	for _, v := range keep {
		named[v.Agent], named[v.Runsc] = true, true
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("listing programs: %w", err)
	}
	for _, e := range entries {
		if name := e.Name(); !named[name] && (e.IsDir() || strings.HasPrefix(name, unpacking)) {
			names = append(names, name)
		}
	}
	return names, nil
}

// packed returns a compressed program and the prefix of its hash that names it.
func packed(name string) (hash string, data []byte, err error) {
	data, err = programs.ReadFile("programs/" + name + ".gz")
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil, fmt.Errorf("this binary was built without %s: build it with make", name)
	}
	if err != nil {
		return "", nil, fmt.Errorf("reading the packed %s: %w", name, err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8]), data, nil
}

// unpack unpacks a program below dir and returns the name of the directory that holds it.
func unpack(dir, name string) (string, error) {
	hash, packed, err := packed(name)
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, hash, name)
	err = os.MkdirAll(filepath.Dir(path), dirMode)
	if err == nil {
		err = os.Chmod(filepath.Dir(path), dirMode)
	}
	if err != nil {
		return "", fmt.Errorf("making a directory for %s: %w", name, err)
	}
	if _, err := os.Stat(path); err == nil {
		return hash, nil // the rename makes it appear whole
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return "", fmt.Errorf("unpacking %s: %w", name, err)
	}
	tmp, err := os.CreateTemp(dir, unpacking+"*")
	if err != nil {
		return "", fmt.Errorf("unpacking %s: %w", name, err)
	}
	defer os.Remove(tmp.Name()) // after the rename there is nothing to remove
	_, err = io.Copy(tmp, r)
	err = errors.Join(err, tmp.Chmod(0o555), tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return "", fmt.Errorf("unpacking %s: %w", name, err)
	}
	return hash, nil
}
