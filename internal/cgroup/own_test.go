package cgroup

import (
	"os"
	"os/exec"
	"testing"

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
