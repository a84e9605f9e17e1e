package main

import (
	"context"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	cay "github.com/cayhq/cay/sdk/go"
)

// Names of the measurements of suspend and wake, for sandboxes with more and more memory in use.
const (
	suspendOf      = "suspend, %s"
	wakeAnswered   = "wake until the first command answered, %s"
	pointOf        = "recovery point while it runs, %s"
	pauseOf        = "  of it: the sandbox stands still, %s"
	sleepSize      = "checkpoint on disk, %s"
	dockerWithWake = "docker run -d, in turn with the wakes"
)

// sleeper is a sandbox that is suspended and woken again and again.
type sleeper struct {
	name    string // name of its row
	size    string // name of its size
	mib     int    // memory that a process in it fills with random bytes
	zero    bool   // fill with zeros instead
	samples func(options) int
}

const smallSleeper = "almost empty"

var sleepers = []sleeper{
	{smallSleeper, "shared-cpu-1x", 0, false, func(o options) int { return o.starts }},
	{"256 MiB", "shared-cpu-1x", 256, false, func(o options) int { return max(3, o.starts/3) }},
	{"1 GiB", "shared-cpu-4x", 1024, false, func(o options) int { return max(3, o.starts/5) }},
	{"1 GiB of zeros", "shared-cpu-4x", 1024, true, func(o options) int { return max(3, o.starts/5) }},
}

// measureSleep suspends and wakes sandboxes, and starts a container in turn with the smallest one.
func measureSleep(ctx context.Context, o options, s *server, d *docker, r *results) error {
	for _, one := range sleepers {
		if err := s.sleep(ctx, one, o, d, r); err != nil {
			return fmt.Errorf("%s: %w", one.name, err)
		}
	}
	return nil
}

func (s *server) sleep(ctx context.Context, one sleeper, o options, d *docker, r *results) error {
	id, err := s.createSleeper(ctx, one)
	if err != nil {
		return err
	}
	if one.mib > 0 {
		fill := fmt.Sprintf("b = os.urandom(%d << 20)", one.mib)
		if one.zero {
			// The program touches the pages, and they are zero in the end.
			fill = fmt.Sprintf("n = 1 << 20; b = bytearray(b'\\x01') * (%d * n)\n"+
				"for i in range(0, len(b), n): b[i:i+n] = bytes(n)\n", one.mib)
		}
		program := "import os, time\n" + fill + "\nopen('/dev/shm/filled', 'w').close(); time.sleep(1e6)"
		if _, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"sh", "-c",
			`python3 -c "$0" >/dev/null 2>&1 & until [ -e /dev/shm/filled ]; do kill -0 $! && sleep 0.1 || exit 1; done`, program},
			Timeout: new(patience.String())}); err != nil {
			return err
		}
	}
	for i := range one.samples(o) + 1 {
		into := r
		if i == 0 { // the first round warms the page cache
			into = &results{}
		}
		if err := s.sleepOnce(ctx, id, one.name, into); err != nil {
			return err
		}
		if d != nil && one.name == smallSleeper {
			if err := d.besideWake(ctx, into); err != nil {
				return err
			}
		}
	}
	return s.api.DestroySandbox(ctx, id)
}

// createSleeper makes a sandbox that is suspended only when it is asked to be.
func (s *server) createSleeper(ctx context.Context, one sleeper) (string, error) {
	sandbox, err := s.api.CreateSandbox(ctx, cay.CreateSandboxRequest{Template: template,
		Mode: new(string(cay.SandboxModePersistent)),
		Size: new(one.size), IdleTimeout: new("0"), RecoveryInterval: new("0")}, cay.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("creating a sandbox: %w", err)
	}
	return sandbox.ID, nil
}

func (s *server) sleepOnce(ctx context.Context, id, name string, r *results) error {
	if err := s.pauseOnce(ctx, id, name, r); err != nil {
		return err
	}
	return s.wakeOnce(ctx, id, name, r)
}

// wakeOnce suspends a sandbox and has the next command wake it.
func (s *server) wakeOnce(ctx context.Context, id, name string, r *results) error {
	began := time.Now()
	if _, err := s.api.Suspend(ctx, id); err != nil {
		return fmt.Errorf("suspending: %w", err)
	}
	r.took(fmt.Sprintf(suspendOf, name), began)
	size, err := diskUse(filepath.Join(s.dataDir(), "checkpoints", id))
	if err != nil {
		return err
	}
	r.add(fmt.Sprintf(sleepSize, name), unitMB, float64(size)/1e6)
	began = time.Now()
	if _, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"true"}}); err != nil {
		return err
	}
	r.took(fmt.Sprintf(wakeAnswered, name), began)
	return nil
}

// diskUse returns the disk space of the files below dir, in bytes.
func diskUse(dir string) (size int64, err error) {
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		size += st.Blocks * 512
		return err
	})
	return size, err
}

// stillness writes to /dev/shm/still the longest time, in ms, for which it did not run.
const stillness = `import os, time
open("/dev/shm/still", "w").write("0"); last, worst = time.time(), 0
while True:
    time.sleep(0.001); now = time.time()
    if now - last > worst:
        worst = now - last; open("/dev/shm/new", "w").write(str(worst * 1000)); os.rename("/dev/shm/new", "/dev/shm/still")
    last = now
`

// pauseOnce takes a recovery point while a program measures how long it stands still.
func (s *server) pauseOnce(ctx context.Context, id, name string, r *results) error {
	if _, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"sh", "-c",
		`python3 -c "$0" >/dev/null 2>&1 & echo $! >/dev/shm/pid; until [ -e /dev/shm/still ]; do sleep 0.02; done`, stillness}}); err != nil {
		return err
	}
	began := time.Now()
	if _, err := s.api.Checkpoint(ctx, id); err != nil {
		return fmt.Errorf("taking a recovery point: %w", err)
	}
	r.took(fmt.Sprintf(pointOf, name), began)
	res, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"sh", "-c",
		"kill $(cat /dev/shm/pid); cat /dev/shm/still; rm /dev/shm/still"}})
	if err != nil {
		return err
	}
	still, err := strconv.ParseFloat(strings.TrimSpace(res.Stdout), 64)
	if err != nil {
		return fmt.Errorf("reading how long the sandbox stood still: %w", err)
	}
	r.add(fmt.Sprintf(pauseOf, name), unitMS, still)
	return nil
}

func (d *docker) besideWake(ctx context.Context, r *results) error {
	began := time.Now()
	id, err := d.run(ctx)
	if err != nil {
		return err
	}
	r.took(dockerWithWake, began)
	_, err = d.do(ctx, "rm", "--force", id)
	return err
}
