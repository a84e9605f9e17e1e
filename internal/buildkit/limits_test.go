package buildkit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestBombs runs steps that take too much. They fail with the reason, and leave nothing.
func TestBombs(t *testing.T) {
	r := newFixture(t, func(c *Config) { c.BuildBytes = 50 << 20 })
	find := testBases(t)
	for name, c := range map[string]struct {
		step string
		want []error
	}{
		"memory":    {"dd if=/dev/zero of=/dev/null bs=1G count=3", []error{ErrMemory}},
		"files":     {"dd if=/dev/zero of=/dev/shm/a bs=1M count=60; dd if=/dev/zero of=/dev/a bs=1M count=900", []error{ErrMemory}},
		"disk":      {"dd if=/dev/zero of=/a bs=1M count=100; sleep 1000", []error{ErrDisk}},
		"caches":    {"--mount=type=cache,target=/c dd if=/dev/zero of=/c/a bs=1M count=100; sleep 1000", []error{ErrDisk}},
		"processes": {"while true; do sleep 1000 & done", []error{ErrMemory, ErrProcesses}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := r.Build(t.Context(), Request{Dockerfile: "FROM base\nRUN " + c.step + "\n", Base: find,
				MemoryBytes: 192 << 20, CPUs: 1}, nil)
			failed, ok := errors.AsType[*StepError](err)
			if !ok {
				t.Fatalf("got %v", err)
			}
			matched := false
			for _, want := range c.want {
				matched = matched || errors.Is(err, want)
			}
			if !matched || failed.Step != "RUN "+c.step || failed.ExitCode != -1 {
				t.Errorf("got %+v", failed)
			}
			r.nothingLeft(t)
		})
	}
}

// TestLimits checks the limits that a step sees.
func TestLimits(t *testing.T) {
	r := newFixture(t)
	_, files := opened(t, r.build(t, Request{Base: testBases(t), MemoryBytes: 300 << 20, CPUs: 1,
		Dockerfile: "FROM base\nRUN head -1 /proc/meminfo >/memory; cat /etc/resolv.conf >/names; cat /etc/hosts /proc/self/mountinfo >/all\n"}))
	if got := files["memory"]; !strings.Contains(got, fmt.Sprint(300<<10, " kB")) {
		t.Errorf("memory: %s", got)
	}
	if got := files["names"]; !strings.HasSuffix(got, "nameserver "+outsideAddr) {
		t.Errorf("name servers: %s", got)
	}
	if got := files["all"]; strings.Contains(got, r.cfg.Dir) {
		t.Errorf("a step sees paths of the host: %s", got)
	}
}

// TestStepGroup checks the control group of a step while it runs.
func TestStepGroup(t *testing.T) {
	r := newFixture(t)
	ctx, cancel := context.WithCancel(t.Context())
	got := map[string]string{}
	_, err := r.Build(ctx, Request{Dockerfile: sleeping, Base: testBases(t), MemoryBytes: 300 << 20, CPUs: 1.5},
		whenAsleep(func() {
			defer cancel()
			paths, err := filepath.Glob("/sys/fs/cgroup/*" + r.cfg.CgroupParent + "/*/step-*/*") // v1
			if more, _ := filepath.Glob("/sys/fs/cgroup" + r.cfg.CgroupParent + "/*/step-*/*"); err == nil {
				paths = append(paths, more...) // v2
			}
			for _, path := range paths {
				if data, err := os.ReadFile(path); err == nil {
					got[filepath.Base(path)] += strings.TrimSpace(string(data))
				}
			}
		}))
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	want := map[string]string{"memory.limit_in_bytes": "314572800", "cpu.cfs_quota_us": "150000", "pids.max": "8192"}
	if _, unified := got["memory.max"]; unified {
		want = map[string]string{"memory.max": "314572800", "cpu.max": "150000 100000", "pids.max": "8192"}
	}
	for name, value := range want {
		if got[name] != value {
			t.Errorf("%s is %q, want %s", name, got[name], value)
		}
	}
}

// TestIsolation checks that neither a step nor an ADD reaches the host, and that no step sees the
// host's files.
func TestIsolation(t *testing.T) {
	r := newFixture(t)
	find := testBases(t)
	var reached atomic.Int64
	ports := []string{}
	for _, addr := range []string{"127.0.0.1:0", hostAddr + ":0", "0.0.0.0:0"} {
		l, err := net.Listen("tcp4", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		_, port, _ := net.SplitHostPort(l.Addr().String())
		ports = append(ports, port)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				reached.Add(1)
				io.WriteString(c, "HTTP/1.0 200 OK\r\n\r\nsecret")
				c.Close()
			}
		}()
	}
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("s"), 0o644); err != nil {
		t.Fatal(err)
	}
	dockerfile := "FROM base\nRUN test ! -e " + secret +
		" && test ! -e /work && test ! -S /run/dbus && ! mount -t tmpfs none /tmp 2>/dev/null\n"
	for _, port := range ports {
		for _, addr := range []string{"127.0.0.1", hostAddr, "10.64.0.0", "169.254.169.254"} {
			dockerfile += fmt.Sprintf("RUN ! wget -q -T 1 -O- http://%s:%s/\n", addr, port)
		}
	}
	// This must work, so that the refusals above mean something.
	dockerfile += "RUN wget -q -O- http://" + outsideAddr + "/\n"
	r.build(t, Request{Dockerfile: dockerfile, Base: find})
	for i, port := range ports {
		for _, addr := range []string{"127.0.0.1", hostAddr} {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			_, err := r.Build(ctx, Request{Dockerfile: fmt.Sprintf("FROM scratch\nADD http://%s:%s/%d /x\n", addr, port, i),
				Base: find}, nil)
			cancel()
			if err == nil {
				t.Errorf("ADD has reached %s:%s", addr, port)
			}
		}
	}
	if n := reached.Load(); n > 0 {
		t.Errorf("the host was reached %d times", n)
	}
}
