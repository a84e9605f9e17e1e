package caytest

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
)

// oldestNode is the major version of Node.js that all packages of the tests support.
const oldestNode = 22

// NPM returns a directory with the packages that package.json and the lock file in dir name. The
// directory is kept outside the clone, under a hash of the two files, and installed once.
func NPM(ctx context.Context, dir string) (string, error) {
	files := map[string][]byte{}
	sum := sha256.New()
	for _, name := range []string{"package.json", "package-lock.json"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return "", fmt.Errorf("reading the names of packages: %w", err)
		}
		files[name] = data
		sum.Write(data)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("looking for the cache of packages: %w", err)
	}
	installed := filepath.Join(cache, "cay", "npm", hex.EncodeToString(sum.Sum(nil)[:8]))
	if _, err := os.Stat(filepath.Join(installed, "node_modules")); err == nil {
		return installed, nil
	}
	if err := os.MkdirAll(filepath.Dir(installed), 0o700); err != nil {
		return "", fmt.Errorf("making the cache of packages: %w", err)
	}
	// The directory gets its name when it is complete.
	draft, err := os.MkdirTemp(filepath.Dir(installed), "draft-")
	if err != nil {
		return "", fmt.Errorf("making a directory for packages: %w", err)
	}
	defer os.RemoveAll(draft) // it has another name if all went well
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(draft, name), data, 0o600); err != nil {
			return "", fmt.Errorf("writing the names of packages: %w", err)
		}
	}
	cmd := exec.CommandContext(ctx, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	cmd.Dir = draft
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("installing the packages of %s: %w: %s", dir, err, out)
	}
	if err := os.Rename(draft, installed); err != nil && !os.IsExist(err) {
		return "", fmt.Errorf("keeping the packages: %w", err)
	}
	return installed, nil
}

// Node returns the path of a Node.js that the packages of the tests support: the host's if it is
// new enough, else the one that the packages of dir contain.
func Node(ctx context.Context, dir string) (string, error) {
	if node, err := exec.LookPath("node"); err == nil {
		out, err := exec.CommandContext(ctx, node, "--version").Output()
		if err != nil {
			return "", fmt.Errorf("asking node for its version: %w", err)
		}
		major, _, _ := strings.Cut(strings.TrimPrefix(string(out), "v"), ".")
		if n, err := strconv.Atoi(major); err == nil && n >= oldestNode {
			return node, nil
		}
	}
	installed, err := NPM(ctx, dir)
	if err != nil {
		return "", err
	}
	arch := cmp.Or(map[string]string{"amd64": "x64"}[runtime.GOARCH], runtime.GOARCH)
	return filepath.Join(installed, "node_modules", "node-linux-"+arch, "bin", "node"), nil
}
