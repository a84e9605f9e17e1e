package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// docker drives a Docker engine with its command line, as users do.
type docker struct {
	version string
	name    string   // image name, also the label of the containers
	network []string // flags of docker run
}

// findDocker returns the engine that the environment names, nil if none answers.
func findDocker(ctx context.Context) *docker {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	d := &docker{name: "cay-bench-" + strings.ToLower(rand.Text()[:8])}
	version, err := d.do(ctx, "version", "--format", "{{.Server.Version}}")
	if err != nil {
		return nil
	}
	driver, err := d.do(ctx, "info", "--format", "{{.DefaultRuntime}}, {{.Driver}}, cgroup v{{.CgroupVersion}}")
	if err != nil {
		return nil
	}
	d.version = version + " (" + driver + ")"
	if _, err := d.do(ctx, "network", "inspect", "bridge"); err != nil {
		d.network = []string{"--network", "none"}
	}
	return d
}

func (d *docker) networkName() string {
	if d.network != nil {
		return "none: the engine has no bridge, so its containers start faster than usual"
	}
	return "bridge"
}

// do runs docker and returns its trimmed output.
func (d *docker) do(ctx context.Context, args ...string) (string, error) {
	out, err := d.command(ctx, args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
		}
		return "", fmt.Errorf("docker %s: %w", args[0], err)
	}
	return strings.TrimSpace(string(out)), nil
}

func (d *docker) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that ^C reaches only the bench
	return cmd
}

// run starts a container that keeps running, and returns its id.
func (d *docker) run(ctx context.Context) (string, error) {
	args := append([]string{"run", "-d", "--label", d.name}, d.network...)
	return d.do(ctx, append(args, d.name, "sleep", "1000")...)
}

// takeImage makes an image of the template's root file system: a sandbox packs its own, and the API
// carries it to the engine.
func (d *docker) takeImage(ctx context.Context, s *server) error {
	id, err := s.create(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = s.api.DestroySandbox(context.WithoutCancel(ctx), id) }() // purged at the end in any case
	const packed = "/var/tmp/root.tar"
	// /proc, /sys, /dev and the agent are file systems of their own and are left out.
	_, err = s.execute(ctx, id, cay.ExecuteRequest{
		Args:    []string{"tar", "--one-file-system", "--numeric-owner", "--exclude=./var/tmp/*", "-C", "/", "-cf", packed, "."},
		User:    new("root"),
		Timeout: new("5m"),
	})
	if err != nil {
		return fmt.Errorf("packing the root file system: %w", err)
	}
	file, err := s.api.ReadFile(ctx, id, packed, cay.ReadFileOptions{})
	if err != nil {
		return fmt.Errorf("reading the packed root file system: %w", err)
	}
	defer file.Close()
	cmd := d.command(ctx, "import", "-", d.name)
	cmd.Stdin = file
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("docker import: %w: %s", err, out)
	}
	return nil
}

// close removes the containers and the image.
func (d *docker) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	ids, err := d.do(ctx, "ps", "--all", "--quiet", "--filter", "label="+d.name)
	if err != nil {
		return err
	}
	if ids != "" {
		if _, err := d.do(ctx, append([]string{"rm", "--force"}, strings.Fields(ids)...)...); err != nil {
			return err
		}
	}
	images, err := d.do(ctx, "images", "--quiet", d.name)
	if err == nil && images != "" {
		_, err = d.do(ctx, "rmi", "--force", d.name)
	}
	return err
}
