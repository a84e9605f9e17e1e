package cgroup

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"testing"

	"github.com/cayhq/cay/internal/caytest"
)

// TestMake makes a group below one that does not exist, puts a process into it that takes more memory
// than its limit, and reads the events.
func TestMake(t *testing.T) {
	caytest.RequireRoot(t)
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	parent := "/cay-test-" + caytest.Instance()
	g := h.Group(parent + "/child")
	t.Cleanup(func() {
		if err := errors.Join(g.Kill(context.Background()), h.Group(parent).Remove()); err != nil {
			t.Error(err)
		}
		if h.Group(parent).Exists() {
			t.Errorf("%s is left", parent)
		}
	})
	if err := g.Make(Limits{MemoryBytes: 64 << 20, CPUQuota: CPUPeriod / 2, PIDs: 100}); err != nil {
		t.Fatal(err)
	}
	if err := g.Make(Limits{MemoryBytes: 32 << 20}); err != nil { // again, with less
		t.Fatal(err)
	}
	if events, err := g.Events(); err != nil || events != (Events{}) {
		t.Errorf("at the start: %+v, %v", events, err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childMode+"=allocate")
	start, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := g.Add(cmd.Process.Pid); err != nil {
		t.Error(err)
	}
	if pids, err := g.Procs(); err != nil || len(pids) != 1 || pids[0] != cmd.Process.Pid {
		t.Errorf("in the group are %v, %v", pids, err)
	}
	if err := start.Close(); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the process ended by itself")
	}
	if events, err := g.Events(); err != nil || events.OutOfMemory < 1 || events.NoMorePIDs != 0 {
		t.Errorf("at the end: %+v, %v", events, err)
	}
}
