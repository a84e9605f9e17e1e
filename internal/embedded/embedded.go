// Package embedded carries the programs that cay brings with it and unpacks them:
// cay-agent, which is the first process of every sandbox, cay-runsc, which is
// gVisor, and cay-buildkit, which builds Dockerfiles.
//
// They are unpacked under their content hash, so several versions stand side by side:
// a sandbox goes on with the programs it was started with, and a checkpoint is only
// restored by the gVisor that made it. [Collect] removes those that nobody names any
// more. Unpacking is atomic and may be done by several processes at once; after an
// error nothing but a temporary file with a recognisable name can be left.
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
)

// A README is always there, so that the package compiles before the programs are built.
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
	// unpacking begins the name of a file that is not whole yet.
	unpacking = ".unpacking-"
	// dirMode is the mode of a program's directory whatever the umask is, also that of an older cay: processes of
	// sandboxes, whose user is none of the host's, read the agent there.
	dirMode = 0o755
)

// At says where the programs of a version are below dir, if they are there.
func At(dir string, v Version) Programs {
	agentDir := filepath.Join(dir, v.Agent)
	return Programs{Version: v, AgentDir: agentDir, Agent: filepath.Join(agentDir, agentName), Runsc: filepath.Join(dir, v.Runsc, runscName)}
}

// Unpack makes sure that the programs of this build are below dir and returns
// where. dir is made if it does not exist. It needs about 100 MB the first time.
func Unpack(dir string) (Programs, error) {
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

// UnpackBuildkit makes sure that this build's cay-buildkit is below dir and returns its
// path. It needs about 35 MB the first time.
func UnpackBuildkit(dir string) (path string, err error) {
	hash, err := unpack(dir, buildkitName)
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, hash, buildkitName), nil
}

// buildkitHash names the directory of this build's cay-buildkit, "" if it has none. No sandbox
// and no checkpoint names it.
var buildkitHash = sync.OnceValue(func() string {
	hash, _, err := packed(buildkitName)
	if err != nil {
		return ""
	}
	return hash
})

// Find returns the programs of a version that was unpacked before, by this build of
// cay or by another.
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

// Collect removes the programs below dir that none of the versions names and that are not
// this build's cay-buildkit, and what interrupted unpacking left; nobody may be unpacking meanwhile. It says what it
// removed, goes on after errors and joins them.
func Collect(dir string, keep []Version) (removed []string, err error) {
	named := map[string]bool{buildkitHash(): true}
	for _, v := range keep {
		named[v.Agent], named[v.Runsc] = true, true
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("listing programs: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if name := e.Name(); !named[name] && (e.IsDir() || strings.HasPrefix(name, unpacking)) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, name)))
			removed = append(removed, name)
		}
	}
	return removed, errors.Join(errs...)
}

// packed returns a program as it is carried, and the prefix of its hash that names it.
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

// unpack returns the name of the directory that holds the program.
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
		return hash, nil // renamed there whole, or not at all
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return "", fmt.Errorf("unpacking %s: %w", name, err)
	}
	tmp, err := os.CreateTemp(dir, unpacking+"*")
	if err != nil {
		return "", fmt.Errorf("unpacking %s: %w", name, err)
	}
	defer os.Remove(tmp.Name()) // gone already after the rename
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
