package cgroup

import (
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// TestShortenSlices checks that the threads of a process, those that it starts later, and its children have a short
// time slice.
func TestShortenSlices(t *testing.T) {
	slice := func(tid int) uint64 {
		t.Helper()
		attr, err := unix.SchedGetAttr(tid, 0)
		if err != nil {
			t.Fatal(err)
		}
		return attr.Runtime
	}
	if slice(0) == 0 {
		t.Skip("this kernel has no time slices for threads: Linux has them since 6.12")
	}
	if err := ShortenSlices(os.Getpid()); err != nil {
		t.Fatal(err)
	}
	later := make(chan uint64)
	for range 2 * runtime.NumCPU() {
		go func() {
			runtime.LockOSThread() // the thread ends with the goroutine
			later <- slice(unix.Gettid())
		}()
	}
	for range 2 * runtime.NumCPU() {
		if got := <-later; got != uint64(shortSlice) {
			t.Errorf("a thread of this process has a slice of %d ns, want %d", got, shortSlice)
		}
	}
	child := exec.CommandContext(t.Context(), "sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	if got := slice(child.Process.Pid); got != uint64(shortSlice) {
		t.Errorf("a child has a slice of %d ns, want %d", got, shortSlice)
	}
	_ = child.Process.Kill()
	_ = child.Wait() // it was killed
}
