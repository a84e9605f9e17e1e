package cgroup

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
)

// TestConfine checks that the kernel ends a confined process that takes more than its limit, and nothing else.
func TestConfine(t *testing.T) {
	caytest.RequireRoot(t)
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	own, err := h.Own("memory")
	if err != nil {
		t.Fatal(err)
	}
	g := h.Group("/cay-test-" + caytest.Instance() + "-server")
	t.Cleanup(func() {
		if err := g.Remove(); err != nil || g.Exists() {
			t.Errorf("removing the group: %v", err)
		}
	})
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childMode+"=allocate")
	start, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	const limit = 64 << 20
	if err := g.Confine(cmd.Process.Pid, limit); err != nil {
		t.Error(err)
	}
	if got, err := g.MemoryLimit(); err != nil || got != limit {
		t.Errorf("the limit is %d, %v", got, err)
	}
	if err := start.Close(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the process ended by itself")
	}
	file := "memory.oom_control"
	if h.unified {
		file = "memory.events"
	}
	if events, err := g.stat("memory", file); err != nil || events["oom_kill"] < 1 {
		t.Errorf("the kernel killed %d, %v", events["oom_kill"], err)
	}
	if now, err := h.Own("memory"); err != nil || now.Path() != own.Path() {
		t.Errorf("the test itself was moved to %s, %v", now.Path(), err)
	}
}

// TestCPUTime checks that the CPU time of a group counts what its processes compute and not how long they wait.
func TestCPUTime(t *testing.T) {
	g := newGroup(t)
	cmd := exec.Command("/bin/sh", "-c", `read -r start; i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; read -r end`)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	err = g.Add(cmd.Process.Pid)
	if !g.h.unified { // runsc adds a sandbox to cpuacct too
		err = errors.Join(err, g.set("cpuacct", "cgroup.procs", strconv.Itoa(cmd.Process.Pid)))
	}
	if err != nil {
		t.Error(err)
	}
	used := func() time.Duration {
		t.Helper()
		used, err := g.CPUTime()
		if err != nil {
			t.Fatal(err)
		}
		return used
	}
	before := used()
	if _, err := io.WriteString(in, "\n"); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); used() < before+50*time.Millisecond; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a process that computes uses no CPU time")
		}
	}
	if err := in.Close(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait() // the last read finds the end of its input
	ended := used()
	if total := cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(); ended > before+2*total+50*time.Millisecond {
		t.Errorf("the group used %s, its process %s", ended-before, total)
	}
	time.Sleep(100 * time.Millisecond)
	if now := used(); now != ended {
		t.Errorf("the group used %s after its process had ended", now-ended)
	}
}

// TestSpecShares checks that runsc makes a group with the weight that is set later, and with one that the kernel takes.
func TestSpecShares(t *testing.T) {
	v1, v2 := &Hierarchy{}, &Hierarchy{unified: true}
	if v1.SpecShares(0) != 0 || v2.SpecShares(0) != 0 {
		t.Error("no weight has become one")
	}
	for _, weight := range []int64{2, 1024, 2048, 3 * 1024, 8 * 1024, 64 * 1024, 4 * 64 * 1024, 16 * 64 * 1024} {
		if got, want := v1.SpecShares(weight), uint64(min(weight, 262_144)); got != want {
			t.Errorf("v1: %d shares for %d", got, weight)
		}
		_, want := v2.Group("").cpuWeight(weight)
		// This is gVisor's convertCPUSharesToCgroupV2Value.
		shares := v2.SpecShares(weight)
		if got := 1 + (shares-2)*9999/262142; got != uint64(want) || shares < 2 || shares > 262_144 {
			t.Errorf("v2: %d shares for %d, which are a weight of %d, not %d", shares, weight, got, want)
		}
	}
}
