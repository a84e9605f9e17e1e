// Package payload carries the programs that cay brings with it and unpacks them:
// cay-agent, which is the first process of every sandbox, and cay-runsc, which is
// gVisor.
//
// They are unpacked under their content hash, so several versions stand side by side
// and a sandbox goes on with the programs it was started with. Unpacking is
// atomic and may be done by several processes at once; after an error nothing but a
// temporary file with a recognisable name can be left.
package payload

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
)

// A README is always there, so that the package compiles before the programs are built.
//
//go:embed programs
var programs embed.FS

// Programs are the unpacked programs.
type Programs struct {
	AgentDir string // directory that holds cay-agent and nothing else: mounted into sandboxes
	Agent    string // path of cay-agent
	Runsc    string // path of cay-runsc
}

// Unpack makes sure that the programs of this build are below dir and returns
// where. dir is made if it does not exist. It needs about 100 MB the first time.
func Unpack(dir string) (Programs, error) {
	agent, err := unpack(dir, "cay-agent")
	if err != nil {
		return Programs{}, err
	}
	runsc, err := unpack(dir, "cay-runsc")
	if err != nil {
		return Programs{}, err
	}
	return Programs{AgentDir: filepath.Dir(agent), Agent: agent, Runsc: runsc}, nil
}

func unpack(dir, name string) (string, error) {
	packed, err := programs.ReadFile("programs/" + name + ".gz")
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("this binary was built without %s: build it with make", name)
	}
	if err != nil {
		return "", fmt.Errorf("reading the packed %s: %w", name, err)
	}
	sum := sha256.Sum256(packed)
	path := filepath.Join(dir, hex.EncodeToString(sum[:8]), name)
	if _, err := os.Stat(path); err == nil {
		return path, nil // renamed there whole, or not at all
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return "", fmt.Errorf("making a directory for %s: %w", name, err)
	}
	r, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return "", fmt.Errorf("unpacking %s: %w", name, err)
	}
	tmp, err := os.CreateTemp(dir, ".unpacking-*")
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
	return path, nil
}
