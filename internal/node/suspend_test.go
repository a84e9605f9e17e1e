package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// sh runs a command in the sandbox and returns its output.
func (m *machine) sh(spec sandbox.Spec, command string) string {
	m.t.Helper()
	return m.run(m.t, spec, command)
}

// run runs a command in the sandbox for a test and returns its output.
func (m *machine) run(t *testing.T, spec sandbox.Spec, command string) string {
	t.Helper()
	r, err := m.node.Agents().Execute(m.ctx(), agentapi.Target{SandboxID: string(spec.ID), Run: spec.Run},
		agentapi.ExecuteRequest{Command: command, Timeout: 30 * time.Second, MaxOutput: 1 << 16})
	if err != nil || r.ExitCode != 0 {
		t.Errorf("%s: exit code %d, %v: %s%s", command, r.ExitCode, err, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(string(r.Stdout))
}

// next returns the spec of the sandbox's next instance.
func next(spec sandbox.Spec) sandbox.Spec {
	spec.Run += "+"
	spec.Token += "+"
	return spec
}

// suspend suspends the sandbox, which must succeed.
func (m *machine) suspend(spec sandbox.Spec) sandbox.Checkpoint {
	m.t.Helper()
	saved, err := m.node.Suspend(m.ctx(), spec.ID, sandbox.KeepAll)
	if err != nil {
		m.t.Fatalf("suspending: %v", err)
	}
	m.wantAsleep(spec.ID)
	return saved
}

func (m *machine) wake(spec sandbox.Spec) sandbox.Spec {
	m.t.Helper()
	spec = next(spec)
	if err := m.node.Wake(m.ctx(), spec); err != nil {
		m.t.Fatalf("waking: %v", err)
	}
	return spec
}

// wantAsleep checks that nothing of the sandbox is left but files.
func (m *machine) wantAsleep(id sandbox.ID) {
	m.t.Helper()
	observed, err := m.node.Inspect(m.ctx(), id)
	if err != nil || observed == nil || observed.Remains || observed.Alive || observed.Checkpoint == nil {
		m.t.Fatalf("asleep the machine has %+v, %v", observed, err)
	}
	for _, slot := range m.slots.Slots() {
		m.t.Errorf("slot %s is still handed out", slot.Link)
	}
	saved := filepath.Join(m.dir, "checkpoints", string(id))
	err = filepath.WalkDir(saved, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if want := map[bool]os.FileMode{true: 0o700, false: 0o600}[d.IsDir()]; err == nil && info.Mode().Perm() != want {
			m.t.Errorf("%s has mode %s", path, info.Mode())
		}
		return err
	})
	if err != nil {
		m.t.Error(err)
	}
}

// worker is a command that counts into a file that it holds open, into memory, and to the reader of
// a pipe.
const worker = `mkfifo /tmp/pipe
(i=0; exec 3>>/root/log; while :; do i=$((i+1)); echo $i >&3; echo $i; sleep 0.05; done >/tmp/pipe) &
(while read n; do echo $n >/dev/shm/now; done </tmp/pipe) &
until [ -s /dev/shm/now ]; do sleep 0.01; done`

// working makes a sandbox that runs worker and returns its count.
func (m *machine) working() (sandbox.Spec, int) {
	m.t.Helper()
	spec := m.created()
	m.sh(spec, worker)
	return spec, m.counts(spec, 0)
}

func (m *machine) created() sandbox.Spec {
	m.t.Helper()
	spec := m.spec()
	if err := m.node.Create(m.ctx(), spec); err != nil {
		m.t.Fatal(err)
	}
	return spec
}

// count returns the last number in the log of worker, after checking that no line is missing.
func (m *machine) count(spec sandbox.Spec) int {
	m.t.Helper()
	lines := strings.Fields(m.sh(spec, "cat /root/log"))
	for i, line := range lines {
		if line != strconv.Itoa(i+1) {
			m.t.Fatalf("line %d of the log is %q", i+1, line)
		}
	}
	return len(lines)
}

// counts waits until the count of worker is higher than before, both in its file and behind the
// pipe.
func (m *machine) counts(spec sandbox.Spec, before int) int {
	m.t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
		now := m.count(spec)
		if piped, _ := strconv.Atoi(m.sh(spec, "cat /dev/shm/now")); now > before && piped > before {
			return now
		}
	}
	m.t.Fatalf("the worker does not count beyond %d", before)
	return 0
}

func TestSuspendAndWake(t *testing.T) {
	m := newMachine(t)
	spec, n := m.working()
	for i := range 3 {
		began := time.Now()
		saved := m.suspend(spec)
		slept := time.Now()
		spec = m.wake(spec)
		t.Logf("cycle %d: %d KiB, suspend %s, wake %s", i, saved.Size>>10, slept.Sub(began), time.Since(slept))
		n = m.counts(spec, n)
		inside, err := strconv.ParseInt(m.sh(spec, "date +%s"), 10, 64)
		if now := time.Now().Unix(); err != nil || inside < now-2 || inside > now+2 {
			t.Errorf("the clock inside is %d, outside %d, %v", inside, now, err)
		}
	}
	if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
		t.Fatal(err)
	}
	m.wantNothing()
}

// TestSuspendFailsAtEveryStep makes a suspend fail after each of its steps: the sandbox continues,
// or is suspended with a whole checkpoint, and works either way.
func TestSuspendFailsAtEveryStep(t *testing.T) {
	m := newMachine(t)
	spec, n := m.working()
	broken := errors.New("broken on purpose")
	for _, step := range []string{"save", "commit"} {
		m.node.after = func(name string) error {
			if name == step {
				return broken
			}
			return nil
		}
		if _, err := m.node.Suspend(m.ctx(), spec.ID, sandbox.KeepAll); !errors.Is(err, broken) {
			t.Fatalf("%s: got %v", step, err)
		}
		m.node.after = nil
		observed, err := m.node.Inspect(m.ctx(), spec.ID)
		if err != nil || observed == nil || !observed.Alive || (observed.Checkpoint != nil) != (step == "commit") {
			t.Fatalf("%s: the machine has %+v, %v", step, observed, err)
		}
		n = m.counts(spec, n)
		m.suspend(spec)
		spec = m.wake(spec)
		n = m.counts(spec, n)
		if err := m.node.checkpoints.Remove(string(spec.ID)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSaveIsTriedAgain puts a directory in the place of a file of gVisor, so that the save fails.
// If one try fails, the next succeeds; if all do, the error quotes gVisor, nothing is left, and the
// sandbox continues.
func TestSaveIsTriedAgain(t *testing.T) {
	m := newMachine(t)
	spec, n := m.working()
	snapshot := sandbox.SnapshotID("snap_aaaaaaaaaaaaaaaaaaaa")
	saves := map[string]func() error{
		"checkpoint": func() error { _, err := m.node.Checkpoint(m.ctx(), spec.ID); return err },
		"snapshot":   func() error { _, err := m.node.Snapshot(m.ctx(), spec.ID, snapshot); return err },
		"suspend":    func() error { _, err := m.node.Suspend(m.ctx(), spec.ID, sandbox.KeepAll); return err },
	}
	for _, name := range []string{"checkpoint", "snapshot", "suspend"} {
		for failing, want := range map[int]int{saveAttempts: saveAttempts, 1: 2, 0: 1} {
			tries := 0
			m.node.after = func(step string) error {
				if step != "draft" {
					return nil
				}
				if tries++; tries > failing {
					return nil
				}
				drafts, err := filepath.Glob(filepath.Join(m.dir, "checkpoints", string(spec.ID), "*", "config.json"))
				if err != nil || len(drafts) > 1 {
					t.Errorf("before a save there are %v, %v", drafts, err)
				}
				return os.MkdirAll(filepath.Join(m.draftDir(spec.ID), "checkpoint.img"), 0o700)
			}
			err := saves[name]()
			m.node.after = nil
			if tries != want || (err == nil) != (failing < saveAttempts) {
				t.Fatalf("%s, %d failing: %d tries, %v", name, failing, tries, err)
			}
			if err != nil && !strings.Contains(err.Error(), "checkpoint.img") {
				t.Errorf("%s: the error does not quote gVisor: %v", name, err)
			}
			if _, err := os.Stat(m.draftDir(spec.ID)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s, %d failing: the draft is still there: %v", name, failing, err)
			}
			if name == "suspend" && err == nil {
				spec = m.wake(spec)
			}
			n = m.counts(spec, n)
		}
	}
}

// draftDir returns the directory in which a checkpoint of a sandbox is written before it is
// committed.
func (m *machine) draftDir(id sandbox.ID) string {
	return filepath.Join(m.dir, "checkpoints", string(id), "draft")
}

// TestWakeFailsAtEveryStep makes a wake fail after each of its steps: the sandbox stays suspended
// and the next try succeeds.
func TestWakeFailsAtEveryStep(t *testing.T) {
	m := newMachine(t)
	spec, n := m.working()
	broken := errors.New("broken on purpose")
	for _, step := range []string{"image", "directory", "network", "record", "policy", "start",
		"watch", "agent", "favour", "init"} {
		m.suspend(spec)
		reached := false
		m.node.after = func(name string) error {
			if name == step {
				reached = true
				return broken
			}
			return nil
		}
		if err := m.node.Wake(m.ctx(), next(spec)); !errors.Is(err, broken) || !reached {
			t.Fatalf("%s: got %v, reached: %v", step, err, reached)
		}
		m.node.after = nil
		m.wantAsleep(spec.ID)
		spec = m.wake(spec)
		n = m.counts(spec, n)
	}
}

// TestDiesWhileItWakes kills the sentry after its agent has answered and before init: the wake
// fails at once instead of waiting for an answer.
func TestDiesWhileItWakes(t *testing.T) {
	m := newMachine(t)
	spec, n := m.working()
	m.suspend(spec)
	m.node.after = func(name string) error {
		if name == "favour" {
			return m.node.groups.Group(m.node.groupPath(spec.ID)).Kill(m.ctx())
		}
		return nil
	}
	began := time.Now()
	if err := m.node.Wake(m.ctx(), next(spec)); err == nil {
		t.Fatal("a dead sandbox was woken")
	}
	if took := time.Since(began); took > meetTimeout {
		t.Errorf("it took %s", took)
	}
	m.node.after = nil
	m.wantAsleep(spec.ID)
	m.counts(m.wake(spec), n)
}

// TestCheckpointWhileRunning takes recovery points of a running sandbox, kills its sentry, and
// restores the sandbox to the last of them.
func TestCheckpointWhileRunning(t *testing.T) {
	m := newMachine(t)
	spec := m.created()
	m.sh(spec, worker)
	n := m.counts(spec, 0)
	for i := range 2 {
		if _, err := m.node.Checkpoint(m.ctx(), spec.ID); err != nil {
			t.Fatal(err)
		}
		m.sh(spec, fmt.Sprintf("echo %d >>/root/checkpoints", i+1))
		n = m.counts(spec, n)
	}
	all, err := os.ReadDir(filepath.Join(m.dir, "checkpoints", string(spec.ID)))
	if err != nil || len(all) != 1 {
		t.Errorf("there are %v, %v", all, err)
	}
	if err := m.node.groups.Group(m.node.groupPath(spec.ID)).Kill(m.ctx()); err != nil {
		t.Fatal(err)
	}
	if lost := <-m.node.Lost(); lost.ID != spec.ID {
		t.Errorf("lost %+v", lost)
	}
	if err := m.node.Rest(m.ctx(), spec.ID); err != nil {
		t.Fatal(err)
	}
	m.wantAsleep(spec.ID)
	spec = m.wake(spec)
	if got := m.sh(spec, "cat /root/checkpoints"); strings.TrimSpace(got) != "1" {
		t.Errorf("it woke after checkpoint %q, want the moment of the last one, after the first", got)
	}
	m.counts(spec, 0)
}

// TestDamagedCheckpoint damages a checkpoint in every way: it is kept, the wake reports the damage,
// and the sandbox wakes after it is repaired.
func TestDamagedCheckpoint(t *testing.T) {
	m := newMachine(t)
	spec, n := m.working()
	m.suspend(spec)
	c, err := m.node.checkpoints.Latest(string(spec.ID))
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func([]byte) []byte{
		"cut":     func(b []byte) []byte { return b[:len(b)/2] },
		"flipped": func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"gone":    func([]byte) []byte { return nil },
	} {
		for _, file := range []string{"checkpoint.img", "pages_meta.img", "config.json", "manifest.json"} {
			path := filepath.Join(c.Dir, file)
			good, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if bad := change([]byte(string(good))); bad == nil {
				err = os.Remove(path)
			} else {
				err = os.WriteFile(path, bad, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			err = m.node.Wake(m.ctx(), next(spec))
			if f := fault.As(err); f == nil || f.Code != "wake_failed" || !strings.Contains(f.Detail, file) {
				t.Errorf("%s, %s: %v", file, name, err)
			}
			m.wantAsleep(spec.ID)
			if err := os.WriteFile(path, good, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	spec = m.wake(spec)
	m.counts(spec, n)
}

// TestDamagedMemory damages the pages, which are verified after the wake: the sandbox is ended when
// the damage is found, and cannot be woken until the pages are repaired.
func TestDamagedMemory(t *testing.T) {
	m := newMachine(t)
	spec := m.created()
	m.sh(spec, "head -c 20000000 /dev/urandom >/root/data")
	sum := m.sh(spec, "md5sum /root/data")
	m.suspend(spec)
	c, err := m.node.checkpoints.Latest(string(spec.ID))
	if err != nil {
		t.Fatal(err)
	}
	pages := filepath.Join(c.Dir, "pages.img")
	good, err := os.ReadFile(pages)
	if err != nil {
		t.Fatal(err)
	}
	bad := []byte(string(good))
	bad[len(bad)-5000] ^= 1
	if err := os.WriteFile(pages, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	spec = m.wake(spec)
	// No checkpoint of the damaged sandbox replaces the one that it was restored from.
	for _, write := range []func(context.Context, sandbox.ID) (sandbox.Checkpoint, error){
		m.node.Checkpoint,
		func(ctx context.Context, id sandbox.ID) (sandbox.Checkpoint, error) {
			return m.node.Suspend(ctx, id, sandbox.KeepAll)
		},
		func(ctx context.Context, id sandbox.ID) (sandbox.Checkpoint, error) {
			return m.node.Suspend(ctx, id, sandbox.KeepFiles)
		},
	} {
		if _, err := write(m.ctx(), spec.ID); err == nil {
			t.Error("damaged memory was written down as if it were right")
		}
	}
	select {
	case <-m.node.Lost():
	case <-time.After(20 * time.Second):
		t.Fatal("a sandbox with damaged memory goes on")
	}
	if err := m.node.Rest(m.ctx(), spec.ID); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.node.Wake(m.ctx(), next(spec)); err == nil || !strings.Contains(fmt.Sprint(err), "pages.img") {
			t.Errorf("waking it again: %v", err)
		}
	}
	if err := os.WriteFile(pages, good, 0o600); err != nil {
		t.Fatal(err)
	}
	spec = m.wake(spec)
	if got := m.sh(spec, "md5sum /root/data"); got != sum {
		t.Errorf("the data is %s, was %s", got, sum)
	}
}

// TestDiskFillsUp lets the disk fill while a checkpoint is written, as other writers may do: the
// sandbox continues with its former checkpoint, and can be suspended when there is room.
func TestDiskFillsUp(t *testing.T) {
	m := newMachine(t)
	spec, n := m.working()
	if _, err := m.node.Checkpoint(m.ctx(), spec.ID); err != nil {
		t.Fatal(err)
	}
	m.close()
	dir := filepath.Join(m.dir, "checkpoints")
	small := filepath.Join(m.dir, "small")
	if err := errors.Join(os.Rename(dir, small), os.Mkdir(dir, 0o700),
		unix.Mount("tmpfs", dir, "tmpfs", 0, "size=9m,mode=0700")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := errors.Join(os.CopyFS(dir, os.DirFS(small)),
		os.Chmod(filepath.Join(dir, string(spec.ID)), 0o700)); err != nil {
		t.Fatal(err)
	}
	m.minDisk = -1 << 60 // so that the space always seems to suffice
	m.open()
	m.sh(spec, "head -c 20000000 /dev/urandom >/root/data")
	sum := m.sh(spec, "md5sum /root/data")
	for name, f := range map[string]func() (sandbox.Checkpoint, error){
		"suspend":    func() (sandbox.Checkpoint, error) { return m.node.Suspend(m.ctx(), spec.ID, sandbox.KeepAll) },
		"checkpoint": func() (sandbox.Checkpoint, error) { return m.node.Checkpoint(m.ctx(), spec.ID) },
	} {
		if _, err := f(); err == nil {
			t.Fatalf("%s: 20 MB fit into 9", name)
		} else if !fault.Is(err, fault.NoSpace) {
			t.Errorf("%s: %v", name, err)
		}
		n = m.counts(spec, n)
		if c, err := m.node.checkpoints.Latest(string(spec.ID)); err != nil ||
			c.Verify(t.Context(), func(string) bool { return true }) != nil {
			t.Errorf("%s: the checkpoint it had is %v, %v", name, c, err)
		}
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT, "size=100m"); err != nil {
		t.Fatal(err)
	}
	m.suspend(spec)
	spec = m.wake(spec)
	if got := m.sh(spec, "md5sum /root/data"); got != sum {
		t.Errorf("the data is %s, was %s", got, sum)
	}
	m.counts(spec, n)
}

// TestServerDiesInTheMiddle simulates the death of the server while a sandbox is paused for its
// checkpoint: the sandbox continues by itself, and the next server finds it running.
func TestServerDiesInTheMiddle(t *testing.T) {
	m := newMachine(t)
	spec, n := m.working()
	b, draft, err := m.node.draft(m.ctx(), spec.ID, sandbox.KeepAll)
	if err != nil {
		t.Fatal(err)
	}
	// Release closes the input of the child that saves, as the death of the server does.
	hold, err := b.runtime().Save(m.ctx(), b.container(), draft.Dir(), false)
	if err != nil {
		t.Fatal(err)
	}
	if err := hold.Release(); err != nil {
		t.Fatal(err)
	}
	m.close()
	m.open()
	n = m.counts(spec, n)

	// The server dies before its child has finished: the final answer of the child is never read.
	b, draft, err = m.node.draft(m.ctx(), spec.ID, sandbox.KeepAll)
	if err != nil {
		t.Fatal(err)
	}
	r := b.runtime()
	save := exec.Command(r.Program, append(slices.Clone(r.Flags),
		"--root="+r.Root, "save", "--hold", "--image-path="+draft.Dir(), string(spec.ID))...)
	stdout, err := save.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	save.Stderr = &stderr
	if err := errors.Join(save.Start(), stdout.Close(), save.Wait()); err != nil {
		t.Fatalf("%v: %s", err, &stderr)
	}
	m.close()
	m.open()
	n = m.counts(spec, n)

	// Both are killed: no process is left to let the sandbox continue, so the next server ends it, and
	// it is restored from its latest checkpoint.
	m.suspend(spec)
	spec = m.wake(spec)
	if b, draft, err = m.node.draft(m.ctx(), spec.ID, sandbox.KeepAll); err != nil {
		t.Fatal(err)
	}
	if hold, err = b.runtime().Save(m.ctx(), b.container(), draft.Dir(), false); err != nil {
		t.Fatal(err)
	}
	killSaver(t, spec.ID)
	if err := hold.Release(); err == nil {
		t.Error("the program that keeps the sandbox paused was not killed")
	}
	m.close()
	m.open()
	select {
	case lost := <-m.node.Lost():
		if lost.ID != spec.ID {
			t.Errorf("lost %+v", lost)
		}
	case <-time.After(4 * revivePatience):
		t.Fatal("a sandbox that stands still is adopted as if it ran")
	}
	if err := m.node.Rest(m.ctx(), spec.ID); err != nil {
		t.Fatal(err)
	}
	spec = m.wake(spec)
	m.counts(spec, n)
}

// killSaver kills the program that saves a sandbox and keeps it paused.
func killSaver(t *testing.T, id sandbox.ID) {
	t.Helper()
	savers := processes(t, func(args []string) bool {
		return slices.Contains(args, "save") && slices.Contains(args, string(id))
	})
	if len(savers) == 0 {
		t.Fatal("no process saves the sandbox")
	}
	if err := unix.Kill(savers[0], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// processes returns the ids of the processes on this machine for whose arguments, the program
// included, wanted returns true.
func processes(t *testing.T, wanted func(args []string) bool) (pids []int) {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		cmdline, err := os.ReadFile(path)
		if err != nil || !wanted(strings.Split(strings.TrimSuffix(string(cmdline), "\x00"), "\x00")) {
			continue // it has ended, or is not wanted
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}
