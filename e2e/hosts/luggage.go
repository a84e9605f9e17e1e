package main

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// luggage is a disk that every machine gets, so that nothing is downloaded or built inside.
type luggage struct {
	image   string     // path of the disk image
	key     ssh.Signer // opens the machines of this run, and no others
	keyFile string     // the same key, for people
}

// here is the repository in which the program runs.
const here = "."

// testPrograms are the programs that tests build if there is Go.
var testPrograms = []string{"cmd/cay-agent", "internal/agent/testdata/probe", "internal/node/testdata/*"}

// pack makes the disk below dir, with the programs of a built repository and the tests of some packages. Its files lie
// where the repository has them, because tests look for them there. A machine of another architecture gets the programs
// alone, since nothing here can make its templates.
func pack(ctx context.Context, dir, built string, packages []string) (*luggage, error) {
	start := time.Now()
	tree := filepath.Join(dir, "luggage")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	l := &luggage{image: filepath.Join(dir, "luggage.img")}
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	if l.key, err = ssh.NewSignerFromKey(private); err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		return nil, err
	}
	l.keyFile = filepath.Join(dir, "key")
	if err := os.WriteFile(l.keyFile, pem.EncodeToMemory(block), 0o600); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(tree, "programs"), 0o755); err != nil {
		return nil, err
	}
	public := ssh.MarshalAuthorizedKey(l.key.PublicKey())
	if err := os.WriteFile(filepath.Join(tree, "authorized_keys"), public, 0o600); err != nil {
		return nil, err
	}
	for _, from := range []string{"bin", "deploy"} {
		files, err := filepath.Glob(filepath.Join(built, from, "*"))
		if err != nil {
			return nil, err
		}
		for _, f := range files {
			if info, err := os.Stat(f); err != nil || info.IsDir() {
				continue // sources of the build of gVisor
			}
			if err := command(ctx, "install", "-D", "-p", f, filepath.Join(tree, from, filepath.Base(f))); err != nil {
				return nil, err
			}
		}
	}
	if built == here {
		if err := packTests(ctx, tree, packages); err != nil {
			return nil, err
		}
		if err := packTemplates(ctx, dir, filepath.Join(tree, "images")); err != nil {
			return nil, err
		}
	}
	// root owns the files, whatever umask made them: sshd checks the owners of the directories above
	// authorized_keys.
	err = command(ctx, "mke2fs", "-q", "-t", "ext4", "-L", "lab", "-E", "root_owner=0:0", "-d", tree, l.image, "4G")
	if err != nil {
		return nil, err
	}
	fmt.Printf("packed what machines need in %s\n", time.Since(start).Round(time.Second))
	return l, os.RemoveAll(tree)
}

// packTests builds the tests and the programs that they build.
func packTests(ctx context.Context, tree string, packages []string) error {
	if len(packages) == 0 {
		return nil
	}
	for _, p := range packages {
		out := filepath.Join(tree, p)
		if err := os.MkdirAll(out, 0o755); err != nil {
			return err
		}
		binary := filepath.Join(out, filepath.Base(p)+".test")
		if err := command(ctx, "go", "test", "-c", "-o", binary, "./"+p); err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(p, "testdata")); err == nil {
			if err := command(ctx, "cp", "-a", filepath.Join(p, "testdata"), out); err != nil {
				return err
			}
		}
	}
	for _, pattern := range testPrograms {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, p := range paths {
			if files, err := filepath.Glob(filepath.Join(p, "*.go")); err != nil || len(files) == 0 {
				continue // data
			}
			binary := filepath.Join(tree, "programs", filepath.Base(p))
			if err := command(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, "./"+p); err != nil {
				return err
			}
		}
	}
	return nil
}

// packTemplates copies the images of the templates that tests use from a server that has them. The
// server makes images that the user's cache does not have.
func packTemplates(ctx context.Context, dir, to string) (err error) {
	data := filepath.Join(dir, "templates")
	address, err := freeAddress()
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(dir, "templates.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	server := exec.CommandContext(ctx, "bin/cay", "server", "--data-dir", data, "--listen", address)
	server.Env = append(os.Environ(), "CAY_POOL_ENABLED=false", "CAY_TEMPLATES_PREPARE=python,base",
		"CAY_LOG_LEVEL=warn") // its requests are of no interest
	server.Stdout, server.Stderr = log, log
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	server.Cancel = func() error { return server.Process.Signal(syscall.SIGTERM) }
	if err := server.Start(); err != nil {
		return err
	}
	defer func() {
		_ = server.Process.Signal(syscall.SIGTERM) // it may have ended by itself
		_ = server.Wait()                          // its status does not matter: it is purged
		out, purge := exec.Command("bin/cay", "server", "--data-dir", data, "--purge").CombinedOutput()
		if purge != nil {
			err = errors.Join(err, fmt.Errorf("purging the server that made the templates: %w: %s", purge, out))
		}
	}()
	for _, name := range []string{"python", "base"} {
		if err := waitTemplate(ctx, address, data, name); err != nil {
			end, _ := os.ReadFile(log.Name()) // the error is reported in any case
			return fmt.Errorf("waiting for the template %s: %w\n%s", name, err, lastLines(string(end), 10))
		}
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return err
	}
	images, err := filepath.Glob(filepath.Join(data, "images", "*.erofs"))
	if err != nil {
		return err
	}
	return command(ctx, "cp", append([]string{"-a", "-t", to, filepath.Join(data, "images", "inputs")}, images...)...)
}

// waitTemplate waits until a server has a template. That takes minutes if the server has to make
// it.
func waitTemplate(ctx context.Context, address, data, name string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Minute)
	defer cancel()
	for {
		var answer struct{ Status, Error string }
		last := func() error {
			key, err := os.ReadFile(filepath.Join(data, "api-key"))
			if err != nil {
				return err
			}
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/v1/templates/"+name, nil)
			if err != nil {
				return err
			}
			req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(key)))
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			return json.NewDecoder(resp.Body).Decode(&answer)
		}()
		switch answer.Status {
		case "ready":
			return nil
		case "failed":
			return errors.New(answer.Error)
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), last)
		case <-time.After(200 * time.Millisecond): // a poll with a deadline
		}
	}
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// command runs a program and reports its output only if it fails.
func command(ctx context.Context, name string, args ...string) error {
	c := exec.CommandContext(ctx, name, args...)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if out, err := c.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", c, err, lastLines(string(out), 20))
	}
	return nil
}

// lastLines returns the last n lines of a text.
func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
