package node

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// rest suspends the sandbox without its memory, which must succeed.
func (m *machine) rest(spec sandbox.Spec) {
	m.t.Helper()
	if _, err := m.node.Suspend(m.ctx(), spec.ID, sandbox.KeepFiles); err != nil {
		m.t.Fatalf("suspending: %v", err)
	}
	m.wantAsleep(spec.ID)
}

// keptFiles makes one of each kind of file. Its output must be the same after each boot.
const keptFiles = `cd /root; mkdir -p dir/deep; echo text >dir/deep/file; ln dir/deep/file hard; ln -s dir/deep/file soft
chmod 4750 hard; mkfifo -m 600 pipe; mknod null c 1 3; touch -d '2001-02-03 04:05:06' old; chown 7:8 old
rm -rf /etc/passwd; head -c 300000 /dev/urandom >big; truncate -s 50M sparse; echo end >>sparse; ln -s nowhere dangling
mkdir -m 1777 sticky; mv dir/deep 'a name
with a line'; ln -s loop loop
mkdir team; chown 5:42 team; chmod 2775 team; mkdir team/inherits team/own; chgrp 7 team/own; chmod g-s team/own
echo >team/file; chown 5:6 team/file; ln -s nowhere team/link; chown -h 5:8 team/link; mkfifo team/pipe; chown 5:9 team/pipe`

const lookAtFiles = `cd /root; stat -c '%N %A %u %g %h %s %y %t %T' * 'a name
with a line'/* team/*; md5sum big sparse soft; test ! -e /etc/passwd; readlink soft dangling loop; stat -c %i hard 'a name
with a line'/file | sort -u | wc -l`

// TestFilesAlone boots a sandbox with its files again and again, and children with the files of a snapshot.
func TestFilesAlone(t *testing.T) {
	m := newMachine(t)
	spec := m.created()
	m.sh(spec, keptFiles)
	m.sh(spec, "echo '192.0.2.7 mine' >>/etc/hosts; sleep 1000 >/dev/null 2>&1 & echo gone >/dev/shm/memory")
	bootID := func(s sandbox.Spec) string { return m.sh(s, "cat /proc/sys/kernel/random/boot_id") }
	files, boots := m.sh(spec, lookAtFiles), map[string]bool{bootID(spec): true}
	check := func(s sandbox.Spec) {
		t.Helper()
		if got := m.sh(s, lookAtFiles); got != files {
			t.Errorf("the files of %s were\n%s\nand are\n%s", s.ID, files, got)
		}
		m.sh(s, "test ! -e /dev/shm/memory && ! pidof sleep")
		m.sh(s, fmt.Sprintf(`grep -q '^192.0.2.7 mine$' /etc/hosts && test "$(hostname)" = %s &&
grep -q "$(hostname)" /etc/hosts`, hostname(s.ID)))
		if id := bootID(s); boots[id] {
			t.Errorf("%s has the boot id of another boot", s.ID)
		} else {
			boots[id] = true
		}
	}
	for range 3 {
		m.rest(spec)
		spec = m.wake(spec)
		check(spec)
	}
	m.rest(spec)
	from := sandbox.NewSnapshotID()
	if _, err := m.node.SnapshotCheckpoint(m.ctx(), spec.ID, from); err != nil {
		t.Fatal(err)
	}
	one := m.restored(spec, from)
	check(one)
	// The name of a child is its own after each boot, whatever its files and its checkpoints were made with.
	m.rest(one)
	one.From = ""
	one = m.wake(one)
	check(one)
	m.suspend(one)
	one = m.wake(one)
	m.rest(one)
	check(m.wake(one))
	for _, id := range []sandbox.ID{spec.ID, one.ID} {
		if err := m.node.Destroy(m.ctx(), id); err != nil {
			t.Error(err)
		}
	}
	if err := m.node.DropSnapshot(m.ctx(), from); err != nil {
		t.Error(err)
	}
	m.wantNothing()
}

// TestFilesAloneFailsAtEveryStep makes suspends without memory, and wakes from them, fail after each of
// their steps.
func TestFilesAloneFailsAtEveryStep(t *testing.T) {
	m := newMachine(t)
	spec, n := m.working()
	broken := errors.New("broken on purpose")
	fail := func(step string, call func() error) {
		t.Helper()
		m.node.after = func(name string) error {
			if name == step {
				return broken
			}
			return nil
		}
		if err := call(); !errors.Is(err, broken) {
			t.Fatalf("%s: got %v", step, err)
		}
		m.node.after = nil
	}
	for _, step := range []string{"save", "commit"} {
		fail(step, func() error {
			_, err := m.node.Suspend(m.ctx(), spec.ID, sandbox.KeepFiles)
			return err
		})
		n = m.counts(spec, n) // it continues with its memory
	}
	// The programs of an older version cannot do it.
	m.node.instance(spec.ID).record.Reboots = false
	if _, err := m.node.Suspend(m.ctx(), spec.ID, sandbox.KeepFiles); fault.As(err) == nil ||
		fault.As(err).Code != fault.CodeSandboxTooOld {
		t.Errorf("without the programs: %v", err)
	}
	m.node.instance(spec.ID).record.Reboots = true
	m.rest(spec)
	for _, step := range []string{"start", "watch", "agent", "init"} {
		fail(step, func() error { return m.node.Wake(m.ctx(), next(spec)) })
		m.wantAsleep(spec.ID)
	}
	// A damaged checkpoint is not booted.
	tree, err := filepath.Glob(filepath.Join(m.dir, "checkpoints", string(spec.ID), "*", "multitar.img"))
	if err != nil || len(tree) != 1 {
		t.Fatalf("the trees are %v, %v", tree, err)
	}
	whole, err := os.ReadFile(tree[0])
	if err != nil {
		t.Fatal(err)
	}
	damaged := append([]byte(nil), whole...)
	damaged[len(damaged)/2]++
	for _, content := range [][]byte{damaged, whole} {
		if err := os.WriteFile(tree[0], content, 0o600); err != nil {
			t.Fatal(err)
		}
		err := m.node.Wake(m.ctx(), next(spec))
		if (err == nil) != (string(content) == string(whole)) {
			t.Errorf("the wake from a checkpoint gave %v", err)
		}
	}
	spec = next(spec)
	if got := m.count(spec); got < n {
		t.Errorf("the log has %d lines, and had %d", got, n)
	}
}

// TestFilesAloneOfRemovedFiles suspends a sandbox again and again while a program has a file open that was
// removed. What is kept of such files does not grow beyond the sandbox's disk.
func TestFilesAloneOfRemovedFiles(t *testing.T) {
	m := newMachine(t)
	spec := m.spec()
	spec.DiskMB = 64
	if err := m.node.Create(m.ctx(), spec); err != nil {
		t.Fatal(err)
	}
	for cycle := 0; ; cycle++ {
		m.sh(spec, `(exec 3>/root/removed; rm /root/removed; head -c 30000000 /dev/urandom >&3; echo >/root/ready; sleep 1000) >/dev/null 2>&1 &
until [ -e /root/ready ]; do sleep 0.01; done; rm /root/ready`)
		_, err := m.node.Suspend(m.ctx(), spec.ID, sandbox.KeepFiles)
		if err == nil && cycle < 3 {
			spec = m.wake(spec)
			continue
		}
		if !fault.Is(err, fault.NoSpace) {
			t.Fatalf("cycle %d: %v", cycle, err)
		}
		break
	}
	m.sh(spec, "pidof sleep") // it continues
	m.suspend(spec)
}

// grower is a program that makes files in the present directory: "files FROM TO" makes empty ones, "deep FROM TO"
// makes them below directories whose path has 60 KB, and "attributes 0 TO" makes one with attributes of 64 KiB.
const grower = `package main

import (
	"os"
	"strconv"
	"strings"
	"syscall"
)

func must(err error) {
	if err != nil && err != syscall.EEXIST {
		panic(err)
	}
}

func main() {
	from, err := strconv.Atoi(os.Args[2])
	must(err)
	to, err := strconv.Atoi(os.Args[3])
	must(err)
	for i := 0; i < 300 && os.Args[1] == "deep"; i++ {
		name := strings.Repeat("d", 200)
		must(syscall.Mkdir(name, 0o755))
		must(syscall.Chdir(name))
	}
	for i := from; i < to; i++ {
		name := strconv.Itoa(i)
		if os.Args[1] == "attributes" {
			name = "0"
		}
		fd, err := syscall.Open(name, syscall.O_CREAT|syscall.O_WRONLY, 0o644)
		must(err)
		if os.Args[1] == "attributes" {
			must(syscall.Setxattr(name, "user."+strconv.Itoa(i), make([]byte, 1<<16), 0))
		}
		must(syscall.Close(fd))
	}
}
`

// built returns the path of a program that it builds from a source.
func built(t *testing.T, name, source string) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(program+".go", []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, program+".go")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return program
}

// TestFilesAloneTooLarge suspends sandboxes whose tree of files takes nearly as much as it may, which boot, and
// some whose tree takes more, which continue and can be suspended with their memory.
func TestFilesAloneTooLarge(t *testing.T) {
	program := built(t, "grow", grower)
	for _, test := range []struct{ kind, fits, grows string }{
		{"files", "0 7500", "7500 9000"},
		{"deep", "0 80", "80 200"},
		{"attributes", "0 7", "7 8"}, // archive/tar limits those of one file
	} {
		t.Run(test.kind, func(t *testing.T) {
			m := newMachine(t)
			spec := m.spec()
			spec.Size.MemoryMB = 128 // the smallest that a configuration allows
			if err := m.node.Create(m.ctx(), spec); err != nil {
				t.Fatal(err)
			}
			m.upload(spec, program)
			grow := "cd /root && /bin/grow " + test.kind + " "
			m.sh(spec, grow+test.fits)
			m.rest(spec)
			spec = m.wake(spec)
			m.sh(spec, grow+test.grows+" && (sleep 1000 >/dev/null 2>&1 &)")
			_, err := m.node.Suspend(m.ctx(), spec.ID, sandbox.KeepFiles)
			if f := fault.As(err); f == nil || f.Code != fault.CodeDiskFull || !strings.Contains(f.Detail, "keep its memory") {
				t.Errorf("the suspend gave %v", err)
			}
			m.sh(spec, "pidof sleep") // it continues
			m.suspend(spec)
			spec = m.wake(spec)
			m.sh(spec, "pidof sleep")
		})
	}
}
