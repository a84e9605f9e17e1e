package caytest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// s3Module and s3Version name the S3 server of the tests. A directory of it is a bucket, and a file an object.
const (
	s3Module  = "github.com/versity/versitygw/cmd/versitygw"
	s3Version = "v1.8.0"
)

// S3 is an S3 server on a port of the loopback, with one empty bucket.
type S3 struct {
	Bucket, AccessKey, SecretKey string
	// Dir has the objects of the bucket as files.
	Dir string

	program, root, addr string
	server              *exec.Cmd
}

// StartS3 starts a server, which ends with the test. The first call on a machine builds the server, which takes a
// minute or two, and keeps it in the user's cache directory.
func StartS3(t testing.TB) *S3 {
	t.Helper()
	s := &S3{Bucket: "cay-test", AccessKey: "tester", SecretKey: "secret-of-the-tester", root: t.TempDir()}
	s.Dir = filepath.Join(s.root, s.Bucket)
	if err := os.Mkdir(s.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.program, err = buildS3(t); err != nil {
		t.Fatal(err)
	}
	if s.addr, err = freePort(); err != nil {
		t.Fatal(err)
	}
	s.Start(t)
	t.Cleanup(s.Stop)
	return s
}

// URL returns the location of the bucket, with a prefix in it.
func (s *S3) URL(prefix string) string {
	return fmt.Sprintf("s3://%s/%s?endpoint=%s&path_style=true", s.Bucket, prefix, s.Endpoint())
}

// Endpoint returns the URL of the server.
func (s *S3) Endpoint() string { return "http://" + s.addr }

// Start starts the server again, on the port and with the objects that it had.
func (s *S3) Start(t testing.TB) {
	t.Helper()
	log, err := os.Create(filepath.Join(s.root, "server.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	s.server = exec.Command(s.program, "--quiet", "--access", s.AccessKey, "--secret", s.SecretKey, "--port", s.addr,
		"posix", s.root)
	s.server.Stdout, s.server.Stderr = log, log
	s.server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.server.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("tcp", s.addr)
		if err == nil {
			c.Close() // it carried nothing
			return
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(log.Name())
			s.Stop()
			t.Fatalf("the S3 server does not answer: %v: %s", err, text)
		}
	}
}

// Stop ends the server. Its port refuses connections until Start.
func (s *S3) Stop() {
	if s.server == nil {
		return
	}
	_ = s.server.Process.Kill() // it may have ended
	_ = s.server.Wait()         // it was killed
	s.server = nil
}

// Busy returns the CPU time that the server has taken since it was started.
func (s *S3) Busy(t testing.TB) time.Duration {
	t.Helper()
	var busy unix.Timespec
	clock := int32(^s.server.Process.Pid<<3 | 2) // of the process, see clock_getcpuclockid(3)
	if err := unix.ClockGettime(clock, &busy); err != nil {
		t.Fatal(err)
	}
	return time.Duration(busy.Nano())
}

// freePort returns an address of the loopback that nothing listens on.
func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// buildS3 returns the path of the server, which one process at a time builds.
func buildS3(t testing.TB) (string, error) {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("finding the cache directory: %w", err)
	}
	dir := filepath.Join(cache, "cay", "versitygw-"+s3Version)
	program := filepath.Join(dir, "versitygw")
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	lock, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		return "", err
	}
	defer lock.Close() // which unlocks it
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("locking %s: %w", dir, err)
	}
	if _, err := os.Stat(program); err == nil {
		return program, nil
	}
	const most = 10 * time.Minute // for downloading and building it; a build that hangs would hang the test
	ctx, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	tmp := filepath.Join(dir, "bin")
	cmd := exec.CommandContext(ctx, RequireProgram(t, "go"), "install", "-trimpath", "-ldflags=-s -w",
		s3Module+"@"+s3Version)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOBIN="+tmp, "GOFLAGS=")
	if text, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building %s: %w: %s", s3Module, err, text)
	}
	return program, errors.Join(os.Rename(filepath.Join(tmp, "versitygw"), program), os.RemoveAll(tmp))
}
