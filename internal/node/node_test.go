package node

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/sandbox"
)

// oneImage implements Images with one root file system, which has a static shell and nothing else.
type oneImage struct{ path string }

func (i oneImage) Path(_ context.Context, digest string) (string, error) {
	if digest != "busybox" {
		return "", errors.New("no such image")
	}
	return i.path, nil
}

func (i oneImage) Find(ctx context.Context, digest string) error {
	_, err := i.Path(ctx, digest)
	return err
}

// makeImage builds the root file system of a oneImage.
func makeImage(t *testing.T) oneImage {
	t.Helper()
	busybox := caytest.RequireProgram(t, "/bin/busybox")
	mkfs := caytest.RequireProgram(t, "mkfs.erofs")
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	program, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"bin", "etc", "tmp", "root"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	err = errors.Join(
		os.WriteFile(filepath.Join(root, "bin/busybox"), program, 0o755),
		os.Symlink("busybox", filepath.Join(root, "bin/sh")),
		os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("root:x:0:0:root:/root:/bin/sh\n"), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "image.erofs")
	if out, err := exec.Command(mkfs, "-E", "noinline_data", image, root).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return oneImage{image}
}

// machine holds a Node on this host and everything that it needs, for one test.
type machine struct {
	t        *testing.T
	instance string
	dir      string
	images   oneImage
	programs embedded.Programs
	slots    *network.Network
	node     *Node
	minDisk  int64
	log      *slog.Logger
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	caytest.RequireRoot(t)
	m := &machine{t: t, instance: caytest.Instance(), dir: t.TempDir(), images: makeImage(t),
		log: slog.New(slog.NewTextHandler(logWriter{t}, nil))}
	var err error
	if m.programs, err = embedded.Unpack(filepath.Join(m.dir, "programs")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.close()
		err := Purge(context.Background(), Remains{
			Instance: m.instance, Dir: filepath.Join(m.dir, "sandboxes"), RunDir: m.runDir()})
		if err != nil {
			t.Error(err)
		}
		for _, left := range caytest.Leftovers(t, m.instance, filepath.Join(m.dir, "sandboxes")) {
			t.Errorf("left on the host: %s", left)
		}
	})
	m.open()
	return m
}

// logWriter writes the server's log to that of the test.
type logWriter struct{ t *testing.T }

func (w logWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

func (m *machine) runDir() string { return "/run/cay/" + m.instance }

// open opens the network and the node, as the start of the server does.
func (m *machine) open() {
	m.t.Helper()
	var err error
	m.slots, err = network.Open(m.t.Context(), network.Config{Instance: m.instance, Ready: 1, AgentPort: AgentPort}, m.log)
	if err != nil {
		m.t.Fatal(err)
	}
	m.node, err = Open(Config{Instance: m.instance, Dir: filepath.Join(m.dir, "sandboxes"), RunDir: m.runDir(),
		Platform: "systrap", Programs: m.programs, ProgramsDir: filepath.Join(m.dir, "programs"),
		Checkpoints: filepath.Join(m.dir, "checkpoints"), Nameservers: []string{"192.0.2.53"},
		MaxSandboxes: 10, MaxPIDs: 64, FirstUID: DefaultFirstUID, MinDisk: m.minDisk}, m.slots, m.images, m.log)
	if err != nil {
		m.t.Fatal(err)
	}
}

// close closes the network and the node. Sandboxes continue to run.
func (m *machine) close() {
	if m.node != nil {
		m.node.Close()
		if err := m.slots.Close(); err != nil {
			m.t.Error(err)
		}
		m.node = nil
	}
}

func (m *machine) spec() sandbox.Spec {
	return sandbox.Spec{ID: sandbox.NewID(), Run: "run1", Token: "secret", Shape: sandbox.Shape{Image: "busybox",
		DiskMB: 64,
		Size:   sandbox.Size{Name: "small", VCPUs: 1, MemoryMB: 256}, Env: map[string]string{"PATH": "/bin"}}}
}

func (m *machine) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	m.t.Cleanup(cancel)
	return ctx
}

// works checks that a command runs in the sandbox.
func (m *machine) works(spec sandbox.Spec) {
	m.t.Helper()
	r, err := m.node.Agents().Execute(m.ctx(), agentapi.Target{SandboxID: string(spec.ID), Run: spec.Run},
		agentapi.ExecuteRequest{Command: "echo $((6*7))", Timeout: 30 * time.Second, MaxOutput: 1000})
	if err != nil || string(r.Stdout) != "42\n" {
		m.t.Errorf("the sandbox answers %q %q, %v", r.Stdout, r.Stderr, err)
	}
}

func (m *machine) wantNothing() {
	m.t.Helper()
	found, err := m.node.List(m.ctx())
	if err != nil || len(found) > 0 {
		m.t.Errorf("the machine has %+v, %v", found, err)
	}
	if slots := m.slots.Slots(); len(slots) > 0 {
		m.t.Errorf("slots are still handed out: %d", len(slots))
	}
	left, err := os.ReadDir(filepath.Join(m.dir, "sandboxes"))
	if err != nil || len(left) > 0 {
		m.t.Errorf("directories are left: %v, %v", left, err)
	}
}

// TestCreateFailsAtEveryStep makes a create fail after each of its steps: nothing is left, and the
// next try succeeds.
func TestCreateFailsAtEveryStep(t *testing.T) {
	m := newMachine(t)
	broken := errors.New("broken on purpose")
	for _, step := range []string{"image", "directory", "network", "record", "policy", "start",
		"watch", "agent", "favour", "init", "command"} {
		t.Run(step, func(t *testing.T) {
			reached := false
			m.node.after = func(name string) error {
				if name == step {
					reached = true
					return broken
				}
				return nil
			}
			spec := m.spec()
			spec.Start = sandbox.Start{Command: "while :; do sleep 1; done"}
			if err := m.node.Create(m.ctx(), spec); !errors.Is(err, broken) || !reached {
				t.Fatalf("got %v, reached: %v", err, reached)
			}
			m.wantNothing()
			m.node.after = nil
			if err := m.node.Create(m.ctx(), spec); err != nil {
				t.Fatalf("the retry failed: %v", err)
			}
			m.works(spec)
			if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
				t.Fatal(err)
			}
			m.wantNothing()
		})
	}
}

// TestCreateGivesUpWithItsContext cancels a create in the middle of the start.
func TestCreateGivesUpWithItsContext(t *testing.T) {
	m := newMachine(t)
	for _, after := range []time.Duration{time.Millisecond, 30 * time.Millisecond, 120 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(context.Background(), after)
		spec := m.spec()
		err := m.node.Create(ctx, spec)
		cancel()
		if err == nil { // the machine was quick
			err = m.node.Destroy(m.ctx(), spec.ID)
		} else if errors.Is(err, context.DeadlineExceeded) {
			err = nil
		}
		if err != nil && !strings.Contains(err.Error(), "killed") {
			t.Errorf("after %s: %v", after, err)
		}
		m.wantNothing()
	}
}

// TestFiltersAreCompiled checks that sentry and gofer find the seccomp programs of the build. The
// name of a program contains everything that it depends on.
func TestFiltersAreCompiled(t *testing.T) {
	m := newMachine(t)
	spec, logs := m.spec(), t.TempDir()
	b := m.node.newInstance(spec)
	b.record.Flags = append(b.record.Flags, "--debug", "--debug-log="+logs+"/")
	if err := m.node.take(m.ctx(), b, m.node.bootSteps(b, spec), m.node.Destroy); err != nil {
		t.Fatal(err)
	}
	m.works(spec)
	for _, process := range []string{"boot", "gofer"} {
		files, err := filepath.Glob(filepath.Join(logs, "*."+process+"*"))
		if err != nil || len(files) != 1 {
			t.Fatalf("logs of %s: %v, %v", process, files, err)
		}
		log, err := os.ReadFile(files[0])
		if err != nil || !strings.Contains(string(log), "Loaded precompiled seccomp instructions") {
			t.Errorf("%s says nothing of a program that it has loaded, %v", process, err)
		}
	}
	if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
		t.Error(err)
	}
}

// TestAdoption opens another Node: sandboxes that run continue, one that died meanwhile is reported
// as dead, and both can be destroyed.
func TestAdoption(t *testing.T) {
	m := newMachine(t)
	lives, dies := m.spec(), m.spec()
	for _, spec := range []sandbox.Spec{lives, dies} {
		if err := m.node.Create(m.ctx(), spec); err != nil {
			t.Fatal(err)
		}
	}
	sentry := m.node.instance(dies.ID).pid
	m.close()
	if err := unix.Kill(sentry, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	m.awaitExit(sentry)
	m.open()
	found, err := m.node.List(m.ctx())
	if err != nil || len(found) != 2 {
		t.Fatalf("facts are %+v, %v", found, err)
	}
	for _, observed := range found {
		if want := observed.ID == lives.ID; observed.Alive != want || observed.Run != "run1" {
			t.Errorf("got %+v, want alive %v", observed, want)
		}
	}
	m.works(lives)
	if !m.node.UsesImage(lives.Image) || m.node.UsesImage("another") {
		t.Error("the node does not know the image that its sandboxes use")
	}
	for _, spec := range []sandbox.Spec{lives, dies} {
		if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
			t.Error(err)
		}
	}
	if m.node.UsesImage(lives.Image) {
		t.Error("the image is taken for used by sandboxes that are gone")
	}
	m.wantNothing()
}

func (m *machine) awaitExit(pid int) {
	m.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) { // a poll with a deadline
		state, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
		if err != nil || strings.Contains(string(state), ") Z ") {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatal("the killed sentry does not end")
		}
	}
}

// TestManyAtOnce makes and destroys sandboxes concurrently.
func TestManyAtOnce(t *testing.T) {
	m := newMachine(t)
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			spec := m.spec()
			if err := m.node.Create(m.ctx(), spec); err != nil {
				t.Error(err)
				return
			}
			m.works(spec)
			if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	m.wantNothing()
}

func TestRoom(t *testing.T) {
	m := newMachine(t)
	size := sandbox.Size{Name: "small", VCPUs: 1, MemoryMB: 256}
	for name, set := range map[string]func(*Config){
		"memory": func(c *Config) { c.MinHostMemory = 1 << 60 },
		"disk":   func(c *Config) { c.MinDisk = 1 << 60 },
	} {
		before := m.node.cfg
		set(&m.node.cfg)
		_, err := m.node.Reserve(m.ctx(), sandbox.NewID(), size)
		if e := fault.As(err); e == nil || e.Kind != fault.Unavailable || e.RetryAfter <= 0 {
			t.Errorf("%s: got %v", name, err)
		}
		m.node.cfg = before
	}
}

// TestMemoryIsGivenOnce makes more sandboxes at once than the machine has memory for: each of them counts
// those that are being made, and one that has a reservation only.
func TestMemoryIsGivenOnce(t *testing.T) {
	m := newMachine(t)
	const fits, all = 3, 8
	m.node.freeMemory = func() (int64, error) {
		return m.node.cfg.MinHostMemory + bootMemory + fits*madeMemory, nil
	}
	small := sandbox.Size{Name: "small"}
	reserved, err := m.node.Reserve(m.ctx(), sandbox.NewID(), small)
	if err != nil {
		t.Fatal(err)
	}
	release, ends := make(chan struct{}), make(chan error, all)
	var made []sandbox.ID
	for range all {
		b := m.node.newInstance(m.spec())
		made = append(made, b.record.ID)
		go func() {
			ends <- m.node.take(m.ctx(), b, []step{{"wait", func(context.Context) error { <-release; return nil }}},
				m.node.Destroy)
		}()
	}
	end := func() error {
		t.Helper()
		select {
		case err := <-ends:
			return err
		case <-time.After(10 * time.Second):
			close(release)
			t.Fatal("more sandboxes are made than there is memory for")
			return nil
		}
	}
	for range all - fits {
		if e := fault.As(end()); e == nil || e.Code != fault.CodeNoCapacity || e.RetryAfter <= 0 {
			t.Errorf("one too many gets %v", e)
		}
	}
	if _, err := m.node.Reserve(m.ctx(), sandbox.NewID(), small); !fault.Is(err, fault.Unavailable) {
		t.Errorf("there is room beside them: %v", err)
	}
	close(release)
	reserved()
	for range fits {
		if err := end(); err != nil {
			t.Error(err)
		}
	}
	if reserved, err = m.node.Reserve(m.ctx(), sandbox.NewID(), small); err != nil {
		t.Fatalf("when they are made: %v", err)
	}
	reserved()
	for _, id := range made {
		if err := m.node.Destroy(m.ctx(), id); err != nil {
			t.Error(err)
		}
	}
	m.wantNothing()
}

// TestNoSandboxStandsForAll checks that an ID which is none removes nothing.
func TestNoSandboxStandsForAll(t *testing.T) {
	m := newMachine(t)
	spec := m.created()
	for _, id := range []sandbox.ID{"", ".", "..", "../" + spec.ID, spec.ID + "/x"} {
		if err := m.node.Rest(m.ctx(), id); err == nil {
			t.Errorf("Rest(%q) succeeded", id)
		}
		if err := m.node.Destroy(m.ctx(), id); err == nil {
			t.Errorf("Destroy(%q) succeeded", id)
		}
		if err := m.node.DropSnapshot(m.ctx(), sandbox.SnapshotID(id)); err == nil {
			t.Errorf("DropSnapshot(%q) succeeded", id)
		}
	}
	if err := m.node.Check(m.ctx(), spec.ID); err != nil {
		t.Errorf("the sandbox beside: %v", err)
	}
}
