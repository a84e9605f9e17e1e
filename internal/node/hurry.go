package node

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/cgroup"
	"github.com/cayhq/cay/internal/sandbox"
)

const (
	// weightPerCPU is the CPU weight of a sandbox for each of its CPUs: the kernel's default for a
	// group.
	weightPerCPU = 1024
	// hurried multiplies the weight of a sandbox while it boots or works on a call and the CPUs are
	// busy. With the same weight as 50 sandboxes that compute, a command of 10 ms takes a second on 2
	// CPUs. On v2 the most is 100 times the default weight.
	hurried = 64
	// hurryMost limits the time for which one call hurries a sandbox: ten times the time of a short
	// command. A longer command then gets its normal share.
	hurryMost = 100 * time.Millisecond
	// hurryPart limits the CPU time that a hurried sandbox uses to a part of one CPU, as a divisor,
	// and hurryBurst limits how much of that time a sandbox may save up. More would let sandboxes that
	// are called all the time take the CPUs from the others. Time in which the sandbox waits does not
	// count, so that a tenant of short commands is always hurried.
	hurryPart  = 10
	hurryBurst = time.Second
	// contentionAge is the time for which one look at the load of the CPUs counts. A look takes 10 µs.
	contentionAge = 100 * time.Millisecond
)

// hurry raises the weight of a sandbox's group while the sandbox works on calls, so that it answers before sandboxes
// that only compute. It does nothing before settle is called: the weight of a boot is higher already.
type hurry struct {
	weigh func(times int64) error // sets the group's weight, as a multiple of its own
	used  func() time.Duration    // returns the CPU time that the group has used

	mu sync.Mutex
	// +checklocks:mu
	settled bool
	// +checklocks:mu
	calls int // number under way
	// +checklocks:mu
	raised bool
	// +checklocks:mu
	since time.Time // when spent was last counted
	// +checklocks:mu
	spent time.Duration // used part of hurryBurst, at since
	// +checklocks:mu
	before time.Duration // CPU time that the group had used when the weight was last raised
	// +checklocks:mu
	timer *time.Timer // lowers the weight
}

// begin raises the weight for a call, unless the sandbox was hurried too much lately.
func (h *hurry) begin() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls++
	if !h.settled {
		return
	}
	h.countLocked()
	if h.spent >= hurryBurst {
		return // a raised weight is lowered by its timer
	}
	if !h.raised {
		h.before = h.used()
		if h.weigh(hurried) != nil {
			return // the group is gone
		}
		h.raised = true
	}
	if h.timer == nil {
		h.timer = time.AfterFunc(hurryMost, func() { h.lower(false) })
	} else {
		h.timer.Reset(hurryMost)
	}
}

// countLocked brings spent up to date.
//
// +checklocks:h.mu
func (h *hurry) countLocked() {
	now := time.Now()
	h.spent, h.since = max(0, h.spent-now.Sub(h.since)/hurryPart), now
	if h.raised {
		used := h.used()
		h.spent, h.before = h.spent+used-h.before, used
	}
}

// end lowers the weight when no other call is under way.
func (h *hurry) end() { h.lower(true) }

func (h *hurry) lower(answered bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if answered {
		if h.calls--; h.calls > 0 {
			return
		}
	}
	if !h.raised {
		return
	}
	h.timer.Stop()
	h.countLocked()
	h.raised = false
	_ = h.weigh(1) // fails when the group is gone
}

// settle sets the group to its own weight after a boot, a restore or an adoption.
func (h *hurry) settle() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.weigh != nil && !h.settled {
		h.settled = true
		_ = h.weigh(1) // fails when the group is gone
	}
}

// attach gives hurry the sandbox's group, unless the group's own weight is unknown.
func (h *hurry) attach(group cgroup.Group, own int64) {
	if own == 0 {
		return
	}
	h.weigh = func(times int64) error { return group.SetCPUWeight(own * times) }
	attached := time.Now()
	h.used = func() time.Duration {
		used, err := group.CPUTime()
		if err != nil { // a v1 host without cpuacct, or the group is gone: all time counts
			return time.Since(attached)
		}
		return used
	}
}

// bootShares returns the CPU shares with which the sandbox's group is made. They count until settle.
func (b *instance) bootShares() uint64 {
	return b.node.groups.SpecShares(hurried * cpuWeight(b.record.Shape))
}

// cpuWeight returns the weight of a sandbox's group while it is not called; 0 if a version that did not
// record it started the sandbox.
func cpuWeight(s sandbox.Shape) int64 { return int64(s.Size.VCPUs) * weightPerCPU }

// hurry raises the weight of a sandbox for a call, if the CPUs are busy, until answered is called.
func (n *Node) hurry(id string) (answered func()) {
	b := n.instance(sandbox.ID(id))
	if b == nil || b.hurry.weigh == nil || !n.contention.now() {
		return func() {}
	}
	b.hurry.begin()
	return b.hurry.end
}

// contention remembers whether more threads want CPUs than there are.
type contention struct {
	mu sync.Mutex
	// +checklocks:mu
	looked time.Time
	// +checklocks:mu
	busy bool
}

func (c *contention) now() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.looked) < contentionAge {
		return c.busy
	}
	c.looked, c.busy = time.Now(), false
	data, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return false
	}
	var ignored float64
	var runnable int // this thread included
	// 9.46 20.56 17.91 5/160 334
	if _, err := fmt.Sscanf(string(data), "%f %f %f %d/", &ignored, &ignored, &ignored, &runnable); err == nil {
		c.busy = runnable > runtime.NumCPU()
	}
	return c.busy
}
