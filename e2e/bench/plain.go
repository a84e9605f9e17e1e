package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/cayhq/cay/internal/runsc"
)

// Names of the measurements of gVisor without cay: runsc of the same module, on the same root file
// system, without a network and without control groups.
const (
	plainRun  = "runsc run -detach … sleep"
	plainExec = "runsc exec … true"
)

// plain runs an unchanged runsc.
type plain struct {
	program string
	dir     string // state and bundles, removed at the end
	image   string // the template's root file system
	made    int
}

// newPlain builds runsc from the module that cay-runsc is built from.
func newPlain(ctx context.Context, s *server) (*plain, error) {
	images, err := filepath.Glob(filepath.Join(s.dataDir(), "images", "*.erofs"))
	if err != nil || len(images) != 1 {
		return nil, fmt.Errorf("looking for the template's root file system: found %q, %v", images, err)
	}
	p := &plain{image: images[0]}
	if p.dir, err = os.MkdirTemp("", "cay-bench-runsc-"); err != nil {
		return nil, err
	}
	p.program = filepath.Join(p.dir, "runsc")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", p.program,
		"gvisor.dev/gvisor/runsc")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, errors.Join(fmt.Errorf("building runsc: %w: %s", err, out), p.close())
	}
	return p, nil
}

func (p *plain) close() error { return os.RemoveAll(p.dir) }

func (p *plain) do(ctx context.Context, bundle string, verb ...string) error {
	args := append([]string{"--root=" + filepath.Join(p.dir, "state"), "--network=none", "--ignore-cgroups",
		"--overlay2=root:dir=" + bundle}, verb...)
	cmd := exec.CommandContext(ctx, p.program, args...)
	// A file and no pipe: the sandbox would inherit the pipe and hold it open.
	said, err := os.Create(filepath.Join(bundle, "said"))
	if err != nil {
		return err
	}
	defer said.Close()
	cmd.Stdout, cmd.Stderr = said, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that ^C reaches only the bench
	if err := cmd.Run(); err != nil {
		text, _ := os.ReadFile(said.Name()) // if it fails there is nothing else to say
		return fmt.Errorf("runsc %s: %w: %s", verb[0], err, bytes.TrimSpace(text))
	}
	return nil
}

// once starts a sandbox, runs a command in it and removes it.
func (p *plain) once(ctx context.Context, r *results) (err error) {
	p.made++
	id := fmt.Sprintf("plain-%d-%d", os.Getpid(), p.made)
	bundle := filepath.Join(p.dir, id)
	if err := os.Mkdir(bundle, 0o700); err != nil {
		return err
	}
	spec := runsc.NewSpec(runsc.SandboxSpec{
		Hostname: "plain", Root: runsc.Root{Image: p.image, Overlay: bundle, MaxBytes: 2 << 30},
		Binds: []runsc.Bind{{From: bundle, To: "/mnt"}}, // it also makes runsc start a gofer, as cay has one
		Args:  []string{"sleep", "1000"}, Env: []string{"PATH=/usr/bin:/bin"}, ShmBytes: 64 << 20,
	})
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o600); err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanTimeout)
		defer cancel()
		err = errors.Join(err, p.do(ctx, bundle, "delete", "-force", id), os.RemoveAll(bundle))
	}()
	began := time.Now()
	if err := p.do(ctx, bundle, "run", "-detach", "-bundle="+bundle, id); err != nil {
		return err
	}
	r.took(plainRun, began)
	began = time.Now()
	if err := p.do(ctx, bundle, "exec", id, "true"); err != nil {
		return err
	}
	r.took(plainExec, began)
	return nil
}
