package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

const (
	// patience limits waits for events that normally take seconds. A template that is not in the cache
	// of images takes minutes.
	patience         = 2 * time.Minute
	templatePatience = 20 * time.Minute
	template         = "python"
	// sandboxTimeout is the timeout of sandboxes. It is longer than any part of the bench; the end of
	// the bench ends them.
	sandboxTimeout = "1h"
)

// server is a cay server with a data directory of its own.
type server struct {
	program string
	dir     string // all files of the server, removed at the end
	api     *cay.Client
	url     string
	key     string
	cmd     *exec.Cmd
	exited  chan struct{} // closed when cmd has ended
	outside *outside      // the host whose name server it uses
}

func (s *server) dataDir() string { return filepath.Join(s.dir, "data") }
func (s *server) logFile() string { return filepath.Join(s.dir, "server.log") }

// startServer starts the program, with env after the settings that every server of the bench has,
// and waits until it is ready. Nothing is left after an error.
func startServer(ctx context.Context, program string, out *outside, env ...string) (s *server, err error) {
	if program, err = filepath.Abs(program); err != nil {
		return nil, err
	}
	if _, err := os.Stat(program); err != nil {
		return nil, fmt.Errorf("%w: make build makes it", err)
	}
	dir, err := os.MkdirTemp("", "cay-bench-")
	if err != nil {
		return nil, err
	}
	s = &server{program: program, dir: dir, outside: out}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	address, err := freeAddress()
	if err != nil {
		return s, err
	}
	s.url = "http://" + address
	if err := s.run(address, env); err != nil {
		return s, err
	}
	if s.api, err = cay.New(s.url, ""); err != nil {
		return s, err
	}
	err = s.poll(ctx, patience, func() (bool, error) {
		_, err := s.api.Ready(ctx)
		return err == nil, nil
	})
	if err != nil {
		return s, fmt.Errorf("waiting for the server: %w", err)
	}
	key, err := os.ReadFile(filepath.Join(s.dataDir(), "api-key"))
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil // another server of its fleet has it
	}
	if err != nil {
		return s, err
	}
	s.key = strings.TrimSpace(string(key))
	s.api, err = cay.New(s.url, s.key)
	return s, err
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// run starts the process with the documented defaults, except where a default would be what is
// measured.
func (s *server) run(address string, env []string) error {
	log, err := os.Create(s.logFile())
	if err != nil {
		return err
	}
	defer log.Close()
	s.cmd = exec.Command(s.program, "server", "--data-dir", s.dataDir(), "--listen", address)
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "CAY_") || strings.HasPrefix(v, "CAY_IMAGES_CACHE_DIR=") {
			s.cmd.Env = append(s.cmd.Env, v)
		}
	}
	s.cmd.Env = append(s.cmd.Env, "CAY_RATE_LIMIT_PER_SECOND=1000000", "CAY_RATE_LIMIT_BURST=1000000",
		"CAY_POOL_ENABLED=false", // the pool would boot sandboxes during a measurement
		"CAY_TEMPLATES_PREPARE="+template, "CAY_NETWORK_NAMESERVERS="+s.outside.address)
	s.cmd.Env = append(s.cmd.Env, env...) // the last setting of a name counts
	s.cmd.Stdout, s.cmd.Stderr = log, log
	// so that ^C reaches only the bench, which ends the server in order
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.cmd.Start(); err != nil {
		return fmt.Errorf("starting the server: %w", err)
	}
	s.exited = make(chan struct{})
	go func() { _ = s.cmd.Wait(); close(s.exited) }() // its log says why it ended
	return nil
}

// poll calls done until it returns true. It gives up when the server ends.
func (s *server) poll(ctx context.Context, within time.Duration, done func() (bool, error)) error {
	deadline := time.After(within)
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.exited:
			log, _ := os.ReadFile(s.logFile()) // if it fails there is nothing else to say
			return fmt.Errorf("the server ended: %s", log[max(0, len(log)-2000):])
		case <-deadline:
			return fmt.Errorf("not done after %s", within)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (s *server) awaitTemplate(ctx context.Context, name string) error {
	return s.poll(ctx, templatePatience, func() (bool, error) {
		t, err := s.api.GetTemplate(ctx, name)
		if err != nil {
			return false, err
		}
		if t.Status == cay.TemplateStatusFailed {
			return false, fmt.Errorf("the template %s cannot be made; see cay templates show %s", name, name)
		}
		return t.Status == cay.TemplateStatusReady, nil
	})
}

func (s *server) version(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, s.program, "version").Output()
	if err != nil {
		return "", fmt.Errorf("asking for the version: %w", err)
	}
	return strings.Join(strings.Fields(string(out)), " "), nil
}

// create makes a sandbox that outlives the measurement.
func (s *server) create(ctx context.Context) (string, error) {
	sandbox, err := s.api.CreateSandbox(ctx, cay.CreateSandboxRequest{Template: template, Timeout: new(sandboxTimeout)},
		cay.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("creating a sandbox: %w", err)
	}
	return sandbox.ID, nil
}

// execute runs a command that must succeed.
func (s *server) execute(ctx context.Context, id string, r cay.ExecuteRequest) (*cay.ExecuteResult, error) {
	res, err := s.api.Execute(ctx, id, r)
	if err != nil {
		return nil, fmt.Errorf("executing: %w", err)
	}
	if res.ExitCode != 0 {
		return nil, fmt.Errorf("a command ended with %d: %s", res.ExitCode, res.Stderr)
	}
	return res, nil
}

// line runs cay's command line.
func (s *server) line(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, s.program, args...)
	cmd.Env = append(os.Environ(), "CAY_API_URL="+s.url, "CAY_API_KEY="+s.key)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cay %s: %w: %s", args[0], err, out)
	}
	return nil
}

// close ends the server and removes everything of it.
func (s *server) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	var errs []error
	if s.exited != nil {
		_ = s.cmd.Process.Signal(syscall.SIGTERM) // the process may have ended
		select {
		case <-s.exited:
		case <-ctx.Done():
			errs = append(errs, errors.New("the server did not end"), s.cmd.Process.Kill())
			<-s.exited
		}
		out, err := exec.CommandContext(ctx, s.program, "server", "--data-dir", s.dataDir(), "--purge").CombinedOutput()
		if err != nil {
			// The directory shows what is left, so it stays.
			return errors.Join(append(errs, fmt.Errorf("purging the server of %s: %w: %s", s.dir, err, out))...)
		}
	}
	return errors.Join(append(errs, os.RemoveAll(s.dir))...)
}
