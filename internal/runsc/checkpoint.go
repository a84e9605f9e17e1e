package runsc

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// PagesFile is the part of a checkpoint that holds the memory of the sandbox and what was
// written to its file system: nearly all of it. A restored sandbox still reads it in
// the background for a while.
const PagesFile = "pages.img"

// Lines that cay-runsc prints after a save.
const (
	saved    = "saved\n"
	tooLarge = "too large\n" // see [ErrTooLarge]
)

// ErrTooLarge is returned by a save of files only if the names and attributes of a file, or of all files,
// are too large to be saved without the memory.
var ErrTooLarge = errors.New("the names and attributes of the files are too large")

// Hold keeps a sandbox paused after it was saved.
type Hold struct {
	client *exec.Cmd
	stdin  io.Closer
}

// Release lets the sandbox go on, if it still exists, and returns when it does.
func (h *Hold) Release() error {
	if err := errors.Join(h.stdin.Close(), h.client.Wait()); err != nil {
		return fmt.Errorf("resuming a paused sandbox: %w", err)
	}
	return nil
}

// savePatience limits the wait for the end of a save whose context has ended, since a sentry cannot
// be interrupted in the middle of one. After it the client is killed, so that a destroy does not
// wait for a disk that hangs.
const savePatience = 5 * time.Second

// Save pauses the sandbox, writes it into dir, which must be empty, with its spec, and
// keeps it paused until the hold is released: a caller that ends the sandbox before knows
// that nothing has happened in it since the save. With filesOnly it writes the writable layer of the root
// alone, for [Runtime.Reboot]. If this process ends first, the sandbox
// continues by itself. After an error the sandbox continues, if its sentry still can.
func (r *Runtime) Save(ctx context.Context, c Container, dir string, filesOnly bool) (*Hold, error) {
	if err := copySpec(c.Bundle, dir); err != nil {
		return nil, err
	}
	verb := []string{"save", "--hold", "--image-path=" + dir}
	if filesOnly { // older programs do not know the flag
		verb = append(verb, "--files")
	}
	cmd := command(ctx, r.Program, r.args(c, append(verb, c.ID)...)...)
	// After SIGTERM, and at the end of its input, it resumes the sandbox before it exits.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = savePatience
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("making a pipe: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("making a pipe: %w", err), stdin.Close())
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting to save %s: %w", c.ID, err)
	}
	hold := &Hold{client: cmd, stdin: stdin}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != saved {
		if line == tooLarge {
			err = ErrTooLarge
		}
		err = errors.Join(err, hold.Release())
		return nil, fmt.Errorf("saving sandbox %s: %w: %s", c.ID, err, lastMessages(c.Bundle))
	}
	return hold, nil
}

// SaveLive writes the sandbox into dir, which must be empty, with its spec. The sandbox
// is paused meanwhile and then continues; its connections stay open.
func (r *Runtime) SaveLive(ctx context.Context, c Container, dir string) error {
	if err := copySpec(c.Bundle, dir); err != nil {
		return err
	}
	if err := command(ctx, r.Program, r.args(c, "save", "--image-path="+dir, c.ID)...).Run(); err != nil {
		return fmt.Errorf("saving sandbox %s: %w: %s", c.ID, err, lastMessages(c.Bundle))
	}
	return nil
}

func copySpec(bundle, dir string) error {
	data, err := os.ReadFile(filepath.Join(bundle, specFile))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, specFile), data, 0o600)
	}
	if err != nil {
		return fmt.Errorf("copying the spec of a sandbox: %w", err)
	}
	return nil
}

// Place holds the parts of a restored sandbox's spec that differ from the saved one: those of the
// machine.
type Place struct {
	Image     string // path of the root's EROFS file, the same content as before
	Binds     []Bind // the same, maybe from elsewhere
	Namespace string // path of the network namespace
	Cgroups   string // as in [Limits]
	HostUID   uint32 // as in [SandboxSpec]
	CPUShares uint64 // as in [Limits]; 0 leaves what was saved
	Hostname  string // as in [SandboxSpec]; only for a reboot
}

// Restore starts the sandbox that was saved into dir, with the spec it was saved with, in
// another place. c.Spec is not used. It returns as [Runtime.Run] does, with every process
// inside where it was; most of its memory is read afterwards, in the background or when
// it is touched. Root.Overlay of the spec becomes c.Bundle.
func (r *Runtime) Restore(ctx context.Context, c Container, dir string, p Place) (pid int, err error) {
	if err := c.takeSpec(dir, p); err != nil {
		return 0, err
	}
	// gVisor would compare the specs and refuse a sandbox in another directory than the saved
	// one. The comparison is of no use: this spec is the saved one with the changes of apply.
	unasked := *r
	unasked.Flags = append(slices.Clone(r.Flags), "--restore-spec-validation=ignore")
	return unasked.start(ctx, c, "restore", "--background", "--image-path="+dir)
}

// Reboot boots a sandbox with the files that were saved into dir by a [Runtime.Save] of files only, in another place.
// Otherwise it is like Restore, and returns as [Runtime.Run] does. The first process finds the variable
// [Rebooted] in its environment.
func (r *Runtime) Reboot(ctx context.Context, c Container, dir string, p Place) (pid int, err error) {
	if err := c.takeSpec(dir, p); err != nil {
		return 0, err
	}
	c.Spec.Hostname = p.Hostname
	if env := c.Spec.Process.Env; !slices.Contains(env, Rebooted) {
		c.Spec.Process.Env = append(env, Rebooted)
	}
	if err := writeSpec(c); err != nil {
		return 0, err
	}
	return r.start(ctx, c, "run", "--fs-restore-image-path="+dir)
}

// Rebooted is the variable of the first process's environment that says that the files are those of an
// earlier boot.
const Rebooted = "CAY_REBOOTED=1"

// takeSpec gives the container the spec that was saved into dir, changed for the place, and writes
// it into the bundle.
func (c *Container) takeSpec(dir string, p Place) error {
	data, err := os.ReadFile(filepath.Join(dir, specFile))
	if err != nil {
		return fmt.Errorf("reading the spec of a checkpoint: %w", err)
	}
	c.Spec = &specs.Spec{}
	if err := json.Unmarshal(data, c.Spec); err != nil {
		return fmt.Errorf("reading the spec of a checkpoint: %w", err)
	}
	if err := p.apply(c.Spec, c.Bundle); err != nil {
		return err
	}
	return writeSpec(*c)
}

// apply changes a spec of [NewSpec] to one for the place.
func (p Place) apply(s *specs.Spec, overlay string) error {
	if s.Root == nil || s.Process == nil || s.Linux == nil || s.Annotations == nil {
		return errors.New("the spec of a checkpoint is not one of ours")
	}
	s.Root.Path = overlay
	s.Annotations[rootSource] = p.Image
	s.Annotations[rootOverlay] = "dir=" + overlay
	s.Linux.CgroupsPath = p.Cgroups
	if p.CPUShares > 0 {
		s.Linux.Resources.CPU.Shares = &p.CPUShares
	}
	runAs(s, p.HostUID) // also what was saved before sandboxes had ids of their own
	for i := range s.Linux.Namespaces {
		if n := &s.Linux.Namespaces[i]; n.Type == specs.NetworkNamespace {
			n.Path = p.Namespace
		}
	}
	for i := range s.Mounts {
		for _, b := range p.Binds {
			if m := &s.Mounts[i]; m.Type == "bind" && strings.TrimRight(m.Destination, "/") == b.To {
				m.Source = b.From
			}
		}
	}
	return nil
}
