package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"

	"github.com/cayhq/cay/internal/caytest"
)

// TestReplay applies to a disk the flushed writes of a log, and the others with several chances.
func TestReplay(t *testing.T) {
	const sector = 512
	type write struct {
		sector uint64
		fill   byte
		flags  uint64
	}
	logOf := func(entries uint64, writes ...write) string {
		var b bytes.Buffer
		put := func(values ...any) {
			start := b.Len()
			for _, v := range values {
				if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
					t.Fatal(err)
				}
			}
			b.Write(make([]byte, sector-(b.Len()-start)))
		}
		put(uint64(logMagic), uint64(1), entries, uint32(sector))
		for _, w := range writes {
			if w.fill == 0 {
				put(w.sector, uint64(0), w.flags, uint64(0))
				continue
			}
			put(w.sector, uint64(1), w.flags, uint64(0))
			b.Write(bytes.Repeat([]byte{w.fill}, sector))
		}
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	flush := write{flags: logFlush}
	log := logOf(3, write{1, 'a', 0}, write{2, 'b', 0}, flush, write{1, 'c', 0}, write{3, 'd', 0})
	for _, tt := range []struct {
		chance float64
		want   string
	}{{0, "ab."}, {1, "cbd"}} {
		image := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(image, bytes.Repeat([]byte{'.'}, 4*sector), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := replay(image, log, rand.New(rand.NewPCG(1, 1)), tt.chance); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(image)
		if err != nil {
			t.Fatal(err)
		}
		if got := string([]byte{data[sector], data[2*sector], data[3*sector]}); got != tt.want || len(data) != 4*sector {
			t.Errorf("with chance %g the disk has %q, want %q", tt.chance, got, tt.want)
		}
	}
	if err := replay(os.DevNull, os.DevNull, nil, 0); err == nil {
		t.Error("an empty log was replayed")
	}
}

// TestDoc replaces the rows of a table that were run again, and no others.
func TestDoc(t *testing.T) {
	path := filepath.Join(t.TempDir(), "hosts.md")
	first, second := machines[0], machines[1]
	old := []row{
		{machine: first.name, check: "unit", result: "FAILED", took: 3 * time.Minute, day: "2026-01-02", note: "no"},
		{machine: second.name, check: "unit", result: passed, took: time.Second, day: "2026-01-02", note: ""},
	}
	if err := os.WriteFile(path, []byte("before\n"+begins+table(old)+ends+"after\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	note := oneLine("a | b\nc")
	now := []row{
		{machine: first.name, check: "unit", result: passed, took: time.Minute, day: "2026-01-03", note: note},
		{machine: first.name, check: "boot", result: passed, took: time.Second, day: "2026-01-03", note: "6.1"},
	}
	if err := updateDoc(path, now); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := "before\n" + begins + table([]row{now[1], now[0], old[1]}) + ends + "after\n"
	if diff := cmp.Diff(want, string(text)); diff != "" {
		t.Errorf("the file is wrong (-want +got):\n%s", diff)
	}
	if strings.Contains(note, "|") {
		t.Errorf("a cell has %q", note)
	}
}

// TestParts has parts for TestGoTests to choose from.
func TestParts(t *testing.T) {
	t.Run("a part", func(*testing.T) {})
	t.Run("another", func(*testing.T) {})
}

// TestGoTests runs tests as a machine does. The note names the parts that a pattern chose, and a pattern that chooses
// none has passed nothing.
func TestGoTests(t *testing.T) {
	common, err := scripts.ReadFile("checks/lib.sh")
	if err != nil {
		t.Fatal(err)
	}
	lab := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(lab, "hosts"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(lab, "hosts", "hosts.test")); err != nil {
		t.Fatal(err)
	}
	for pattern, want := range map[string]string{
		"^TestParts$":                    "note: 1 passed\n",
		"^TestParts$/^another$":          "note: 1 passed: another\n",
		"^TestParts$/^(a_part|another)$": "note: 1 passed: a_part another\n",
		"^TestParts$/^(missing)$":        "note: 0 passed\n",
		"^TestNothing$":                  "note: 0 passed\n",
	} {
		script := string(common) + fmt.Sprintf("lab=%s\nTMPDIR=%s go_tests hosts %q 1m\n", lab, lab, pattern)
		out, err := exec.Command("bash", "-c", script).CombinedOutput()
		if !strings.Contains(string(out), want) || (err == nil) != !strings.Contains(want, "0 passed") {
			t.Errorf("%s: %v, and the output is\n%s", pattern, err, out)
		}
	}
}

// TestDialEnds connects to a port that accepts connections and never answers, as QEMU's does before the machine has a
// network.
func TestDialEnds(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{port: port, how: &ssh.ClientConfig{Timeout: 50 * time.Millisecond,
		HostKeyCallback: ssh.InsecureIgnoreHostKey()}} // there is no host
	done := make(chan error, 1)
	go func() { done <- g.dial() }()
	select {
	case err := <-done:
		if err == nil {
			t.Error("a connection was opened")
		}
	case <-time.After(time.Minute):
		t.Error("the dial does not end")
	}
}

// TestInterruptedRoot interrupts the making of a root, which has mounted something and started a process. Neither is
// left, nor is a file.
func TestInterruptedRoot(t *testing.T) {
	caytest.RequireRoot(t)
	cache := t.TempDir()
	whole := rootScript
	t.Cleanup(func() { rootScript = whole })
	rootScript = `out=$3; mkdir "$out/root"; mount -t tmpfs lab "$out/root"; touch "$out/root/file"
(trap "" TERM; exec sleep 3600) & touch "$out/begun"; wait`
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer cancel()
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			if begun, _ := filepath.Glob(filepath.Join(cache, "root-*", "begun")); len(begun) == 1 {
				return
			}
		}
		t.Error("the script does not begin")
	}()
	if dir, err := makeRoot(ctx, cache, release{suite: "interrupted", arch: "amd64"}); err == nil {
		t.Errorf("an interrupted root is in %s", dir)
	}
	left, err := filepath.Glob(filepath.Join(cache, "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("%v are left (%v)", left, err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || bytes.Contains(mounts, []byte(cache)) {
		t.Errorf("a mount is left (%v):\n%s", err, mounts)
	}
}

// TestMachines checks that every check of a machine is a script or a list of tests.
func TestMachines(t *testing.T) {
	for _, m := range machines {
		for _, c := range m.checks {
			if _, is := goTests[c]; is {
				continue
			}
			file := map[string]string{"cuts": "after-cut"}[c]
			if file == "" {
				file = c
			}
			if _, err := scripts.ReadFile("checks/" + file + ".sh"); err != nil {
				t.Errorf("%s: %v", m.name, err)
			}
		}
	}
}
