package cgroup

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
)

// childMode names the environment variable that makes the test binary a child: a process that
// waits for its standard input to close and then takes memory without end, or sleeps.
const (
	childMode = "CAY_TEST_CHILD"
	childDir  = "CAY_TEST_DIR" // where it writes
)

func TestMain(m *testing.M) {
	switch os.Getenv(childMode) {
	case "allocate", "creep":
		_, _ = os.Stdin.Read(make([]byte, 1)) // until the parent has put us into the group
		for {
			b, err := unix.Mmap(-1, 0, 8<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
			if err != nil {
				os.Exit(3)
			}
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			if os.Getenv(childMode) == "creep" { // 160 MiB/s, which no machine is too slow for
				time.Sleep(50 * time.Millisecond)
			}
		}
	case "cache":
		_, _ = os.Stdin.Read(make([]byte, 1)) // until the parent has put us into the group
		f, err := os.CreateTemp(os.Getenv(childDir), "cache")
		if err != nil {
			os.Exit(4)
		}
		if _, err := io.CopyN(f, zeros{}, 256<<20); err != nil {
			os.Exit(5)
		}
		os.Exit(0)
	case "hold":
		b := make([]byte, 256<<20) // whose return takes the kernel longer than it takes to look
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		_, _ = os.Stdout.WriteString("held") // the parent sees its end
		_, _ = os.Stdin.Read(b[:1])
		return
	case "trickle":
		_, _ = os.Stdin.Read(make([]byte, 1)) // until the parent has put us into the group
		trickle()
		return
	case "sleep":
		time.Sleep(time.Hour)
		return
	}
	os.Exit(m.Run())
}

// trickle takes 144 MiB, and returns them at 40 MiB/s when it is told to.
func trickle() {
	told := make(chan os.Signal, 1)
	signal.Notify(told, unix.SIGUSR1)
	b, err := unix.Mmap(-1, 0, 144<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		os.Exit(3)
	}
	for i := 0; i < len(b); i += 4096 {
		b[i] = 1
	}
	<-told
	for piece := range slices.Chunk(b, 2<<20) {
		if err := unix.Madvise(piece, unix.MADV_DONTNEED); err != nil {
			os.Exit(3)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// TestSharedTrees checks that controllers are found where systemd mounts v1: several in one tree,
// whose name is not that of a controller.
func TestSharedTrees(t *testing.T) {
	const info = `25 30 0:22 / /sys rw,nosuid - sysfs sysfs rw
31 25 0:26 / /sys/fs/cgroup ro,nosuid shared:8 - tmpfs tmpfs ro,mode=755
32 31 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
33 31 0:28 / /sys/fs/cgroup/systemd rw,nosuid shared:10 - cgroup cgroup rw,xattr,name=systemd
37 31 0:32 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:15 - cgroup cgroup rw,cpu,cpuacct
38 31 0:33 / /sys/fs/cgroup/memory rw,nosuid shared:16 - cgroup cgroup rw,memory
39 31 0:34 / /sys/fs/cgroup/pids rw,nosuid shared:17 - cgroup cgroup rw,pids
`
	group := (&Hierarchy{mounts: mountsOf(strings.NewReader(info))}).Group("/g")
	for controller, want := range map[string]string{
		"cpu": "/sys/fs/cgroup/cpu,cpuacct/g", "cpuacct": "/sys/fs/cgroup/cpu,cpuacct/g",
		"memory": "/sys/fs/cgroup/memory/g", "pids": "/sys/fs/cgroup/pids/g",
	} {
		if got := group.dir(controller); got != want {
			t.Errorf("%s is in %s, want %s", controller, got, want)
		}
	}
	if dirs := group.dirs(); len(dirs) != 4 {
		t.Errorf("the group's directories are %q", dirs)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// newGroup makes a group with the test's own name in every controller's tree.
func newGroup(t *testing.T) Group {
	t.Helper()
	caytest.RequireRoot(t)
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	g := h.Group("/cay-test-" + caytest.Instance())
	for _, dir := range g.dirs() {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := errors.Join(g.Kill(context.Background()), g.Remove()); err != nil {
			t.Error(err)
		}
		for _, dir := range g.dirs() {
			if _, err := os.Stat(dir); err == nil {
				t.Errorf("%s is left", dir)
			}
		}
	})
	return g
}

// child starts a process in the group. Closing go_ lets it begin.
func child(t *testing.T, g Group, mode string) (cmd *exec.Cmd, begin func()) {
	t.Helper()
	cmd = exec.Command("/proc/self/exe")
	cmd.Env = []string{childMode + "=" + mode, childDir + "=" + t.TempDir()}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range g.dirs() {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
			// A cpuset without CPUs takes no process; it is not needed here.
			if filepath.Base(filepath.Dir(dir)) != "cpuset" {
				t.Fatal(err)
			}
		}
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // ended by most tests
		_ = cmd.Wait()
	})
	return cmd, func() {
		if err := stdin.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestKillAndRemove checks that Kill ends every process of a group, also those that wait at the limit.
func TestKillAndRemove(t *testing.T) {
	g := newGroup(t)
	guard := &Guard{Group: g, Limit: 64 << 20, Reserve: 8 << 20}
	if err := guard.Arm(); err != nil {
		t.Fatal(err)
	}
	a, begin := child(t, g, "allocate")
	child(t, g, "sleep")
	begin()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) { // a poll with a deadline
		held, err := g.MemoryHeld()
		if err != nil {
			t.Fatal(err)
		}
		if held > 60<<20 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the allocator does not allocate")
		}
	}
	reaped := make(chan struct{})
	go func() { _ = a.Wait(); close(reaped) }()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if pids, err := g.Procs(); err != nil || len(pids) != 2 {
		t.Errorf("processes are %v, %v", pids, err)
	}
	if err := g.Kill(ctx); err != nil {
		t.Error(err)
	}
	<-reaped
	if err := g.Remove(); err != nil {
		t.Error(err)
	}
	// Both succeed for a group that does not exist.
	if err := errors.Join(g.Kill(ctx), g.Remove()); err != nil {
		t.Error(err)
	}
}

// TestKillWaitsForTheEnd checks with cgroup v2 that a group can be removed when Kill has returned. The kernel does not
// list processes that are about to end, and this one has much memory to return.
func TestKillWaitsForTheEnd(t *testing.T) {
	caytest.RequireRoot(t)
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	path := "/cay-test-" + caytest.Instance()
	if !h.unified {
		path = "/unified" + path // v2 without controllers, beside v1
		if _, err := os.Stat(mountRoot + "/unified/cgroup.procs"); err != nil {
			caytest.Missing(t, "there is no cgroup v2")
		}
	}
	g := (&Hierarchy{unified: true}).Group(path)
	if err := os.Mkdir(g.dir(""), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{childMode + "=hold"}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := g.Join("", cmd.Process.Pid); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(stdout, make([]byte, len("held"))); err != nil {
		t.Error(err)
	}
	killed := g.Kill(t.Context())
	if err := errors.Join(killed, unix.Rmdir(g.dir(""))); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait() // killed, as meant
	if err := g.Remove(); err != nil {
		t.Error(err)
	}
}

// TestQuickMoves checks that the hierarchy exists while it is open, and not after.
func TestQuickMoves(t *testing.T) {
	caytest.RequireRoot(t)
	name := "cay-test-" + caytest.Instance()
	held := func() bool {
		t.Helper()
		text, err := os.ReadFile("/proc/self/cgroup")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(text), ":name="+name+":/\n")
	}
	if kernelBefore(t, 6) {
		if moves, err := QuickMoves(name); err == nil || moves != nil || held() {
			t.Errorf("a kernel that has no such option answers %v", err)
		}
		return
	}
	for range 2 {
		moves, err := QuickMoves(name)
		if err != nil {
			t.Fatal(err)
		}
		if !held() {
			t.Error("there is no such hierarchy")
		}
		if err := moves.Close(); err != nil {
			t.Error(err)
		}
		for range 1000 { // it goes in the background
			if !held() {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if held() {
			t.Error("the hierarchy is still there")
		}
	}
}

// kernelBefore reports whether the kernel's version is smaller than major.0.
func kernelBefore(t *testing.T, major int) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	first, _, _ := strings.Cut(string(text), ".")
	n, err := strconv.Atoi(first)
	if err != nil {
		t.Fatal(err)
	}
	return n < major
}

// TestUnified reads and sets the files of cgroup v2 in a directory that stands for one, since
// a machine has its controllers in one version only.
func TestUnified(t *testing.T) {
	g := newGroup(t)
	if g.h.unified {
		t.Skip("the other tests run on v2 here")
	}
	dir := t.TempDir()
	rel, err := filepath.Rel(mountRoot, dir)
	if err != nil {
		t.Fatal(err)
	}
	v2 := Group{h: &Hierarchy{unified: true}, path: rel}
	for name, text := range map[string]string{
		"memory.stat": "anon 10\nfile 1000\nshmem 5\nkernel_stack 3\npagetables 2\n" +
			"slab_unreclaimable 1\nslab_reclaimable 100\nswapcached 4\n",
		"memory.swap.current": "34\n", "memory.swap.max": "max\n",
		"memory.max": "max\n", "memory.high": "max\n", "cgroup.procs": "",
		"memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if held, err := v2.MemoryHeld(); err != nil || held != 51 {
		t.Errorf("held %d, %v, want 51", held, err)
	}
	relieved := make(chan int64, 1)
	guard := &Guard{Group: v2, Limit: 1000, Reserve: 100, Log: slog.New(slog.DiscardHandler),
		Relieve: func(_ context.Context, over int64) (int64, error) {
			relieved <- over
			return over, os.WriteFile(filepath.Join(dir, "memory.stat"), []byte("anon 10\n"), 0o600)
		}}
	if err := guard.Arm(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"memory.max": "1100", "memory.high": "1000", "memory.swap.max": "1000"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got[:4]) != want {
			t.Errorf("%s is %q, %v, want %s", name, got, err, want)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan error, 1)
	go func() { done <- guard.Run(ctx) }()
	// The kernel reports so that usage is high.
	if err := os.WriteFile(filepath.Join(dir, "memory.stat"), []byte("anon 1500\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	deadline := time.After(30 * time.Second)
	for told := false; !told; {
		if err := os.WriteFile(filepath.Join(dir, "memory.events"), []byte("high 1\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		select {
		case over := <-relieved:
			told = true
			if over < 500 {
				t.Errorf("relief of %d asked for", over)
			}
		case <-time.After(10 * time.Millisecond):
		case <-deadline:
			t.Fatal("nobody was relieved")
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
