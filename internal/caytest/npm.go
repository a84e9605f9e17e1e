package caytest

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// installing is held while packages are looked for and installed, so that tests that run at once do
// not install the same ones.
var installing sync.Mutex

// oldestNode is the major version of Node.js that all packages of the tests support.
const oldestNode = 22

// NPM returns a directory with the packages that package.json and the lock file in dir name. The
// directory is kept outside the clone, under a hash of the two files, and installed once.
func NPM(ctx context.Context, dir string) (string, error) {
	files := map[string][]byte{}
	sum := sha256.New()
	for _, name := range []string{"package.json", lockFile} {
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
	installing.Lock()
	defer installing.Unlock()
	installed := filepath.Join(cache, "cay", "npm", hex.EncodeToString(sum.Sum(nil)[:8]))
	if _, err := os.Stat(installed); err == nil {
		missing, err := missingPackages(installed)
		if err == nil && len(missing) == 0 {
			return installed, nil
		}
		// An older cay kept what a failed download had left out.
		if err := os.RemoveAll(installed); err != nil {
			return "", fmt.Errorf("removing incomplete packages: %w", err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(installed), 0o700); err != nil {
		return "", fmt.Errorf("making the cache of packages: %w", err)
	}
	// npm leaves out an optional package whose download fails, and reports success.
	err = install(ctx, files, installed)
	if err != nil && ctx.Err() == nil {
		err = install(ctx, files, installed)
	}
	if err != nil {
		return "", fmt.Errorf("installing the packages of %s: %w", dir, err)
	}
	return installed, nil
}

// lockFile is the name of the file with the version of every package.
const lockFile = "package-lock.json"

// install installs packages in a directory, which gets its name when it is complete.
func install(ctx context.Context, files map[string][]byte, installed string) error {
	draft, err := os.MkdirTemp(filepath.Dir(installed), "draft-")
	if err != nil {
		return fmt.Errorf("making a directory for packages: %w", err)
	}
	defer os.RemoveAll(draft) // it has another name if all went well
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(draft, name), data, 0o600); err != nil {
			return fmt.Errorf("writing the names of packages: %w", err)
		}
	}
	cmd := exec.CommandContext(ctx, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	cmd.Dir = draft
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("npm ci: %w: %s", err, out)
	}
	missing, err := missingPackages(draft)
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		return fmt.Errorf("npm ci left out %s: %s", strings.Join(missing, ", "), out)
	}
	if err := os.Rename(draft, installed); err != nil && !os.IsExist(err) {
		return fmt.Errorf("keeping the packages: %w", err)
	}
	return nil
}

// lockedPackage is a package in a lock file. npm writes os and cpu as a list or as a word.
type lockedPackage struct {
	Optional bool              `json:"optional"`
	OS       any               `json:"os"`
	CPU      any               `json:"cpu"`
	Engines  any               `json:"engines"`
	Bin      map[string]string `json:"bin"`
}

// wanted reports whether npm installs the package on this machine. It leaves out optional packages
// that support another system or, perhaps, another version of Node.js.
func (p lockedPackage) wanted() bool {
	return !p.Optional || p.Engines == nil && supports(p.OS, runtime.GOOS) && supports(p.CPU, nodeArch())
}

// supports reports whether a list of systems has the name of one. An absent list has all.
func supports(list any, name string) bool {
	switch list := list.(type) {
	case nil:
		return true
	case string:
		return list == name
	case []any:
		return slices.Contains(list, any(name))
	}
	return false
}

// nodeArch returns Node.js's name of this machine's processor.
func nodeArch() string {
	return cmp.Or(map[string]string{"amd64": "x64", "386": "ia32"}[runtime.GOARCH], runtime.GOARCH)
}

// missingPackages returns the packages and their programs that the lock file in dir names and that dir
// does not have.
func missingPackages(dir string) ([]string, error) {
	data, err := os.ReadFile(filepath.Join(dir, lockFile))
	if err != nil {
		return nil, fmt.Errorf("reading the names of packages: %w", err)
	}
	var lock struct {
		Packages map[string]lockedPackage `json:"packages"`
	}
	if err := json.Unmarshal(data, &lock); err != nil {
		return nil, fmt.Errorf("reading %s: %w", lockFile, err)
	}
	var missing []string
	for at, p := range lock.Packages {
		if at == "" || !p.wanted() {
			continue
		}
		for _, file := range slices.Concat([]string{"package.json"}, slices.Collect(maps.Values(p.Bin))) {
			if _, err := os.Stat(filepath.Join(dir, at, file)); err != nil {
				missing = append(missing, filepath.Join(at, file))
			}
		}
	}
	slices.Sort(missing)
	return missing, nil
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
	return filepath.Join(installed, "node_modules", "node-linux-"+nodeArch(), "bin", "node"), nil
}
