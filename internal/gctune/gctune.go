// Package gctune tunes Go's garbage collector for processes that are idle most of the time, of
// which hundreds run on one machine.
//
// By itself Go collects every two minutes, even if nothing happened. Three processes of an idle
// sandbox do that, for 20 ms of CPU each time, which is more than half of what such a sandbox
// uses at all, and the collector's bookkeeping takes a megabyte of their memory. Go is also slow
// to give back memory that a burst of work has left.
package gctune

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
	"time"
)

const (
	// growth is the least number of bytes of garbage that a process may make before it collects;
	// a process that uses more may make as many bytes as it uses. Go's own value is 4 MiB; the
	// limit set here counts a MiB more than the heap does. A lower value costs CPU, a higher one
	// memory in every sandbox.
	growth = 5 << 20
	// quiet is the time from a collection until free memory is given back to the host. A busy
	// process collects again sooner, and keeps its memory. A shorter time makes it fetch memory
	// again and again; a longer one leaves the host without it.
	quiet = 2 * time.Second
)

// Rest makes this process collect when it has grown, and no longer by the clock. Call it once.
// Nothing is collected until the memory has grown by start bytes; with 0 that is the usual
// growth.
func Rest(start int64) {
	r := &rest{}
	r.settle = time.AfterFunc(quiet, func() {
		r.settling.Store(true)
		debug.FreeOSMemory()
	})
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(limit(max(start, growth)))
	r.watch()
}

type rest struct {
	settle   *time.Timer
	settling atomic.Bool // the current collection gives memory back
}

// watch sets the next limit after each collection.
func (r *rest) watch() {
	runtime.AddCleanup(new(*int), func(*rest) {
		debug.SetMemoryLimit(limit(growth))
		if !r.settling.Swap(false) {
			r.settle.Reset(quiet)
		}
		r.watch()
	}, r)
}

// limit returns the memory limit of the process: what it uses now, and as much again for garbage,
// or least bytes if that is more.
func limit(least int64) int64 {
	s := []metrics.Sample{
		{Name: "/gc/heap/live:bytes"},
		{Name: "/memory/classes/total:bytes"},
		{Name: "/memory/classes/heap/released:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"},
	}
	metrics.Read(s)
	value := func(i int) int64 { return int64(s[i].Value.Uint64()) }
	live := value(0)
	if live == 0 { // nothing was collected yet
		live = value(4)
	}
	beside := value(1) - value(2) - value(3) - value(4) // stacks, code of the runtime and the like
	return beside + live + max(live, least)
}
