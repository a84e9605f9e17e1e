// Package gctune keeps Go's collector from costing a process that rests: one of hundreds on
// a machine, which does nothing for hours.
//
// By itself Go collects every two minutes, whatever happened. In a sandbox that rests
// three processes do that: 20 ms of CPU each time, which is more than half of what such
// a sandbox takes at all, and its bookkeeping makes the three larger by a megabyte. And what a
// burst of work has left is only given back slowly.
package gctune

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
	"time"
)

const (
	// growth is how many bytes of garbage a process may make at the least until it
	// collects; at the most it is as many as it uses. Go's own measure is 4 MiB, and the
	// limit that is set here counts a MiB more than the heap.
	growth = 5 << 20
	// quiet is how long after a collection what is free is given back to the host. A
	// process that goes on working collects again in less, and keeps it.
	quiet = 2 * time.Second
)

// Rest makes this process collect when it has grown, and never by the clock, from now
// on. It is called once. Until its memory has grown by start bytes nothing is collected at
// all; 0 is the usual.
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
	settling atomic.Bool // the collection under way gives back
}

// watch is called again after each collection.
func (r *rest) watch() {
	runtime.AddCleanup(new(*int), func(*rest) {
		debug.SetMemoryLimit(limit(growth))
		if !r.settling.Swap(false) {
			r.settle.Reset(quiet)
		}
		r.watch()
	}, r)
}

// limit is what the process may have of the host: what it uses, and garbage of as much
// or of the least that is given.
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
