package gctune_test

import (
	"runtime"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/gctune"
)

var sink []byte

// TestRest works, rests, and looks at what the collector did. It changes the process
// for good, so it is the only test of its package.
func TestRest(t *testing.T) {
	gctune.Rest(0)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i := range 1 << 14 {
		sink = make([]byte, 16<<10) // 256 MiB, of which nothing stays
		if i%64 == 0 {
			time.Sleep(100 * time.Microsecond) // the collector has its turn on a busy machine too
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.NumGC - before.NumGC; n < 10 || n > 500 {
		t.Errorf("garbage of 256 MiB was collected %d times", n)
	}
	if grown := int64(after.Sys-after.HeapReleased) - int64(before.Sys-before.HeapReleased); grown > 128<<20 {
		t.Errorf("the process grew by %d MiB", grown>>20)
	}
	// It gives back once and then leaves it.
	freed := func() bool { runtime.ReadMemStats(&after); return after.HeapIdle-after.HeapReleased < 1<<20 }
	for deadline := time.Now().Add(20 * time.Second); !freed(); time.Sleep(50 * time.Millisecond) { // a poll with a deadline
		if time.Now().After(deadline) {
			t.Fatalf("after 20 s it holds %d KiB that are free", (after.HeapIdle-after.HeapReleased)>>10)
		}
	}
	time.Sleep(3 * time.Second) // what is due within the 2 s that it waits is over then
	runtime.ReadMemStats(&after)
	n := after.NumGC
	time.Sleep(5 * time.Second) // more than twice the time after which it would go on
	if runtime.ReadMemStats(&after); after.NumGC != n {
		t.Errorf("at rest it collected %d times", after.NumGC-n)
	}
}
