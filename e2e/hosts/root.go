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
	"syscall"
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
	// mmdebstrap leaves its processes and its mounts of /proc and /sys behind if it is interrupted. Its namespaces end
	// with unshare, so the draft is removed without them.
	args := append([]string{"--mount", "--mount-proc", "--pid", "--fork", "--kill-child", "bash", "-s", "--", r.suite,
		r.arch, draft}, arguments...)
	script := exec.CommandContext(ctx, "unshare", args...)
	script.Stdin = strings.NewReader(rootScript)
	script.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
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
