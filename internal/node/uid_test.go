package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// intruderEnv names the environment variable that makes the test binary an intruder.
const intruderEnv = "CAY_TEST_INTRUDER"

func TestMain(m *testing.M) {
	if os.Getenv(intruderEnv) != "" {
		intrude()
		return
	}
	os.Exit(m.Run())
}

// quarry names one thing that a process of another sandbox must not reach.
type quarry struct {
	Kind string // a key of intrusions
	PID  int
	Addr uintptr // of readable memory in the process
	Path string
}

// intrusions holds the ways to reach a quarry, all of which work for the host's root.
var intrusions = map[string]func(quarry) error{
	"signal": func(t quarry) error { return unix.Kill(t.PID, 0) },
	"ptrace": func(t quarry) error {
		const seize = 0x4206 // PTRACE_SEIZE of Linux's ptrace.h: it does not stop the process
		if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, seize, uintptr(t.PID), 0, 0, 0, 0); errno != 0 {
			return errno
		}
		return nil
	},
	"read memory": func(t quarry) error {
		var b [1]byte
		_, err := unix.ProcessVMReadv(t.PID,
			[]unix.Iovec{{Base: &b[0], Len: 1}}, []unix.RemoteIovec{{Base: t.Addr, Len: 1}}, 0)
		return err
	},
	"open memory": func(t quarry) error { return open(fmt.Sprintf("/proc/%d/mem", t.PID), os.O_RDWR) },
	"take descriptors": func(t quarry) error {
		pidfd, err := unix.PidfdOpen(t.PID, 0)
		if err != nil {
			return err
		}
		_, err = unix.PidfdGetfd(pidfd, 0, 0)
		return err
	},
	"read":  func(t quarry) error { return open(t.Path, os.O_RDONLY) },
	"write": func(t quarry) error { return open(t.Path, os.O_WRONLY) },
	"list": func(t quarry) error {
		_, err := os.ReadDir(t.Path)
		return err
	},
	"connect": func(t quarry) error {
		c, err := net.Dial("unix", t.Path)
		if err == nil {
			c.Close()
		}
		return err
	},
}

func open(path string, flag int) error {
	f, err := os.OpenFile(path, flag, 0)
	if err == nil {
		f.Close()
	}
	return err
}

// intrude tries the targets that it reads from standard input and writes those that it reached.
func intrude() {
	var targets, got []quarry
	err := json.NewDecoder(os.Stdin).Decode(&targets)
	for _, t := range targets {
		if intrusions[t.Kind](t) == nil {
			got = append(got, t)
		}
	}
	if err := errors.Join(err, json.NewEncoder(os.Stdout).Encode(got)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// intruders returns the targets that a process reaches which has the user and group id and every
// capability in a user namespace of its own, and which no other namespace and no filter confines. A
// sentry has less.
func (m *machine) intruders(uid int, targets []quarry) (got []quarry) {
	m.t.Helper()
	var out, errs bytes.Buffer
	stdin, err := json.Marshal(targets)
	if err != nil {
		m.t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = []string{intruderEnv + "=1"}, bytes.NewReader(stdin), &out, &errs
	only := []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: only, GidMappings: only,
		Credential: &syscall.Credential{}}
	if uid == 0 { // the host's root, to check that every way works
		cmd.SysProcAttr = nil
	}
	if err := errors.Join(cmd.Run(), json.Unmarshal(out.Bytes(), &got)); err != nil {
		m.t.Fatalf("the intruder: %v: %s", err, errs.Bytes())
	}
	return got
}

// processTargets returns every way to reach a process.
func (m *machine) processTargets(pid int) (all []quarry) {
	m.t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		m.t.Fatal(err)
	}
	var from, to uintptr
	if _, err := fmt.Sscanf(string(maps), "%x-%x r", &from, &to); err != nil {
		m.t.Fatalf("%v: %s", err, maps)
	}
	for _, kind := range []string{"signal", "ptrace", "read memory", "open memory", "take descriptors"} {
		all = append(all, quarry{Kind: kind, PID: pid, Addr: from})
	}
	return all
}

// fileTargets returns every way to reach the files below a directory of the host.
func (m *machine) fileTargets(dir string) (all []quarry) {
	m.t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
		case d.IsDir():
			all = append(all, quarry{Kind: "list", Path: path})
		case d.Type() == fs.ModeSocket:
			all = append(all, quarry{Kind: "connect", Path: path})
		case d.Type().IsRegular():
			all = append(all, quarry{Kind: "read", Path: path})
			if path != m.programs.Runsc { // it runs, so that root cannot write it either
				all = append(all, quarry{Kind: "write", Path: path})
			}
		}
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
	return all
}

// processes returns the processes of a sandbox by name: sentry, gofer, and stubs.
func (m *machine) processes(id sandbox.ID) map[string][]int {
	m.t.Helper()
	pids, err := m.node.groups.Group(m.node.groupPath(id)).Procs()
	if err != nil {
		m.t.Fatal(err)
	}
	named := map[string][]int{}
	for _, pid := range pids {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			continue // it has ended
		}
		name, _, _ := strings.Cut(string(cmdline), "\x00")
		if name != "runsc-sandbox" && name != "runsc-gofer" {
			name = "stub"
		}
		named[name] = append(named[name], pid)
	}
	for _, name := range []string{"runsc-sandbox", "runsc-gofer", "stub"} {
		if len(named[name]) == 0 {
			m.t.Fatalf("sandbox %s has no %s: %v", id, name, named)
		}
	}
	return named
}

// status returns a line of a process's status, with its fields joined by spaces.
func (m *machine) status(pid int, name string) string {
	m.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		m.t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "\n"+name+":")
	if !ok {
		m.t.Fatalf("process %d has no %s", pid, name)
	}
	line, _, _ := strings.Cut(rest, "\n")
	return strings.Join(strings.Fields(line), " ")
}

// wantOwnUID checks that all processes of the sandbox have one user and group id, which is in the
// server's range, no other group, and no capability except in a user namespace that has only this
// id. It returns the id.
func (m *machine) wantOwnUID(id sandbox.ID) int {
	m.t.Helper()
	uid := int(m.node.instance(id).record.UID)
	if uid < DefaultFirstUID || uid >= DefaultFirstUID+UIDs {
		m.t.Errorf("the user id of %s is %d", id, uid)
	}
	ours, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		m.t.Fatal(err)
	}
	for name, pids := range m.processes(id) {
		for _, pid := range pids {
			four := strings.TrimSpace(strings.Repeat(fmt.Sprintf("%d ", uid), 4))
			for line, want := range map[string]string{"Uid": four, "Gid": four, "Groups": "", "NoNewPrivs": "1"} {
				if got := m.status(pid, line); got != want {
					m.t.Errorf("%s of a %s is %q, want %q", line, name, got, want)
				}
			}
			if space, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", pid)); err != nil || space == ours {
				m.t.Errorf("a %s is in the user namespace %s, %v: that of the host", name, space, err)
			}
			for _, file := range []string{"uid_map", "gid_map"} {
				text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
				if got, want := strings.Join(strings.Fields(string(text)), " "), fmt.Sprintf("0 %d 1", uid); err != nil ||
					got != want {
					m.t.Errorf("the %s of a %s is %q, %v, want %q", file, name, got, err, want)
				}
			}
			var limit unix.Rlimit
			if err := unix.Prlimit(pid, unix.RLIMIT_NPROC, nil, &limit); err != nil || limit.Cur < limit.Max {
				m.t.Errorf("the user of a %s may have %d processes and could have %d, %v", name, limit.Cur, limit.Max, err)
			}
		}
	}
	return uid
}

// TestOwnUID checks the processes of sandboxes that were booted, restored and adopted. Then a
// process with the user id of one sandbox, without the rest of gVisor's confinement, tries to reach
// the others, the server and its files.
func TestOwnUID(t *testing.T) {
	// The server may be started with root's groups.
	groups, err := syscall.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setgroups([]int{0, 42}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Setgroups(groups); err != nil {
			t.Error(err)
		}
	})
	var limit unix.Rlimit
	err = unix.Getrlimit(unix.RLIMIT_NPROC, &limit)
	if err := errors.Join(err, unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: 1000, Max: limit.Max})); err != nil {
		t.Fatal(err)
	}
	m := newMachine(t)
	// The directory of the server has this mode too: sandboxes open nothing below it by a path.
	if err := os.Chmod(m.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	a, b := m.spec(), m.spec()
	for _, spec := range []sandbox.Spec{a, b} {
		if err := m.node.Create(m.ctx(), spec); err != nil {
			t.Fatal(err)
		}
		m.works(spec)
		m.sh(spec, "echo secret >/root/file")
		if _, err := m.node.Checkpoint(m.ctx(), spec.ID); err != nil {
			t.Fatal(err)
		}
	}
	if m.wantOwnUID(a.ID) == m.wantOwnUID(b.ID) {
		t.Error("two sandboxes have one user id")
	}
	child := m.restored(a, m.snapshot(a))
	if _, err := m.node.Suspend(m.ctx(), b.ID, sandbox.KeepAll); err != nil {
		t.Fatal(err)
	}
	b = m.wake(b)
	m.close()
	m.open() // adopts them
	seen := map[int]bool{}
	for _, spec := range []sandbox.Spec{a, b, child} {
		m.works(spec)
		seen[m.wantOwnUID(spec.ID)] = true
	}
	if len(seen) != 3 {
		t.Errorf("three sandboxes have the user ids %v", seen)
	}

	targets := slices.Concat(m.fileTargets(m.dir), m.fileTargets(m.runDir()), m.processTargets(os.Getpid()))
	others := m.processes(b.ID)
	for _, name := range []string{"runsc-sandbox", "runsc-gofer"} {
		targets = append(targets, m.processTargets(others[name][0])...)
		fds := fmt.Sprintf("/proc/%d/fd", others[name][0])
		targets = append(targets, quarry{Kind: "list", Path: fds})
	}
	stub := m.processTargets(others["stub"][0])
	// Without ptrace, since the stub is traced already.
	targets = append(targets, slices.DeleteFunc(stub, func(t quarry) bool { return t.Kind == "ptrace" })...)
	// As a control, root reaches every target, so that each way works in this test.
	if diff := cmp.Diff(targets, m.intruders(0, targets)); diff != "" {
		t.Errorf("root does not reach all targets, so that the test proves nothing (-all +done):\n%s", diff)
	}
	uid := m.wantOwnUID(a.ID)
	own := quarry{Kind: "signal", PID: m.node.instance(a.ID).pid}
	if diff := cmp.Diff([]quarry{own}, m.intruders(uid, append(slices.Clone(targets), own))); diff != "" {
		t.Errorf("the user id of a sandbox reaches these targets outside of that sandbox (-want +got):\n%s", diff)
	}
	for _, spec := range []sandbox.Spec{a, b, child} {
		m.works(spec)
		if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
			t.Error(err)
		}
	}
	m.wantNothing()
}

// TestUIDOfOlderSandboxes adopts a sandbox that was started before sandboxes had user ids. It gets
// one when it is restored.
func TestUIDOfOlderSandboxes(t *testing.T) {
	m := newMachine(t)
	spec := m.spec()
	b := m.node.newInstance(spec)
	steps := m.node.steps(b, spec, func(ctx context.Context, image string) (int, error) {
		c := m.node.container(b, spec, image)
		linux := c.Spec.Linux
		linux.UIDMappings, linux.GIDMappings = nil, nil
		linux.Namespaces = slices.DeleteFunc(linux.Namespaces, func(n specs.LinuxNamespace) bool {
			return n.Type == specs.UserNamespace
		})
		b.record.UID = 0
		return b.runtime().Run(ctx, c)
	}, func(ctx context.Context) error { return errors.Join(b.writeRecord(), m.node.initAgent(ctx, b, spec)) })
	if err := m.node.take(m.ctx(), b, steps, m.node.Destroy); err != nil {
		t.Fatal(err)
	}
	m.close()
	m.open()
	m.works(spec)
	if got := m.status(m.node.instance(spec.ID).pid, "Uid"); got != "0 0 0 0" {
		t.Fatalf("a sandbox that was to be started without user ids has %s", got)
	}
	m.sh(spec, "echo kept >/root/file")
	m.suspend(spec)
	spec = m.wake(spec)
	m.wantOwnUID(spec.ID)
	if got := m.sh(spec, "cat /root/file"); got != "kept" {
		t.Errorf("the woken sandbox has %q", got)
	}
	if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
		t.Error(err)
	}
	m.wantNothing()
}

// TestUIDsDiffer checks that neighbours, and the ends of all ranges for private use, have different
// user ids.
func TestUIDsDiffer(t *testing.T) {
	n := &Node{cfg: Config{FirstUID: DefaultFirstUID}}
	seen := map[uint32]string{}
	for _, text := range []string{"10.0.0.1", "10.0.0.3", "10.255.255.255", "100.64.0.1", "100.127.255.255",
		"172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255", "198.18.0.1", "198.19.255.255"} {
		uid := n.uidOf(netip.MustParseAddr(text))
		if other, ok := seen[uid]; ok || uid < DefaultFirstUID || uid >= DefaultFirstUID+UIDs {
			t.Errorf("%s has the user id %d; %s has it too", text, uid, other)
		}
		seen[uid] = text
	}
}

// TestUIDIsNotTakenTwice tries to give a slot the user id of a sandbox that was started with
// another setting, before and after that sandbox has gone.
func TestUIDIsNotTakenTwice(t *testing.T) {
	m := newMachine(t)
	spec := m.spec()
	if err := m.node.Create(m.ctx(), spec); err != nil {
		t.Fatal(err)
	}
	uid := m.node.instance(spec.ID).record.UID
	m.close()
	m.open()
	slot, err := m.slots.Acquire(m.ctx())
	if err != nil {
		t.Fatal(err)
	}
	m.node.cfg.FirstUID += uid - m.node.uidOf(slot.Addr)
	other := &instance{node: m.node, slot: slot, record: record{ID: sandbox.NewID()}}
	if err := m.node.takeUID(other); !fault.Is(err, fault.Unavailable) {
		t.Errorf("with the user id of a sandbox that runs: %v", err)
	}
	m.node.giveUID(other) // as the undo of a create does
	if err := m.node.takeUID(other); !fault.Is(err, fault.Unavailable) {
		t.Errorf("with the user id of a sandbox that runs, after a create was undone: %v", err)
	}
	if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
		t.Error(err)
	}
	if err := m.node.takeUID(other); err != nil {
		t.Error(err)
	}
	if err := m.slots.Release(m.ctx(), slot); err != nil {
		t.Error(err)
	}
}
