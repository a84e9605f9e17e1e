package main

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

//go:embed root.sh
var rootScript string

// makeRoot returns the directory of a release's root, with root.img, vmlinuz and initrd. It makes
// the root unless the cache has one that was made with the same settings.
func makeRoot(ctx context.Context, cache string, r release) (dir string, err error) {
	arguments := append([]string{r.kernel}, r.packages...)
	sum := sha256.Sum256([]byte(rootScript + r.arch + strings.Join(arguments, "\n")))
	dir = filepath.Join(cache, r.name()+"-"+hex.EncodeToString(sum[:6]))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	fmt.Printf("making the root of %s, which takes some minutes\n", r.name())
	draft, err := os.MkdirTemp(cache, "root-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(draft) // it has another name if it became the root
	script := exec.CommandContext(ctx, "bash", append([]string{"-s", "--", r.suite, r.arch, draft}, arguments...)...)
	script.Stdin = strings.NewReader(rootScript)
	if out, err := script.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, lastLines(string(out), 20))
	}
	old, err := filepath.Glob(filepath.Join(cache, r.name()+"-*"))
	if err != nil {
		return "", err
	}
	for _, o := range old {
		if err := os.RemoveAll(o); err != nil { // made with other settings
			return "", err
		}
	}
	return dir, os.Rename(draft, dir)
}
