package gctune_test

import (
	"runtime"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/gctune"
)

var sink []byte

// TestRest checks what the collector does under load and at rest. It changes the process for
// good, so it is the only test of its package.
func TestRest(t *testing.T) {
	gctune.Rest(0)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i := range 1 << 14 {
		sink = make([]byte, 16<<10) // 256 MiB in all, none of it kept
		if i%64 == 0 {
			time.Sleep(100 * time.Microsecond) // gives the collector a turn on a busy machine too
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.NumGC - before.NumGC; n < 10 || n > 500 {
		t.Errorf("garbage of 256 MiB was collected %d times", n)
	}
	if grown := int64(after.Sys-after.HeapReleased) - int64(before.Sys-before.HeapReleased); grown > 128<<20 {
		t.Errorf("the process grew by %d MiB", grown>>20)
	}
	// It gives memory back once and then stays idle.
	freed := func() bool { runtime.ReadMemStats(&after); return after.HeapIdle-after.HeapReleased < 1<<20 }
	// a poll with a deadline
	for deadline := time.Now().Add(20 * time.Second); !freed(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after 20 s it holds %d KiB that are free", (after.HeapIdle-after.HeapReleased)>>10)
		}
	}
	time.Sleep(3 * time.Second) // the collections due within 2 s are over by then
	runtime.ReadMemStats(&after)
	n := after.NumGC
	time.Sleep(5 * time.Second) // more than twice the interval of a process that does not come to rest
	if runtime.ReadMemStats(&after); after.NumGC != n {
		t.Errorf("at rest it collected %d times", after.NumGC-n)
	}
}
