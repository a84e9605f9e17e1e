package node

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/sandbox"
)

const (
	// weightPerCPU is the CPU weight of a sandbox for each of its CPUs: the kernel's default of a group.
	weightPerCPU = 1024
	// hurried is how many times its weight a sandbox has while it boots or works on a call and the CPUs are busy. With
	// the same weight as 50 sandboxes that compute, a command of 10 ms takes a second on 2 CPUs.
	hurried = 16
	// hurryMost is how long one call hurries a sandbox: ten times what a short command takes. A longer command takes its
	// share like everything else.
	hurryMost = 100 * time.Millisecond
	// hurryPart is the part of the time in which a sandbox may be hurried, as a divisor, and hurryBurst what it may save up
	// of that. More would let sandboxes that are called all the time take the CPUs from the others.
	hurryPart  = 10
	hurryBurst = time.Second
	// contentionAge is how long it is believed that the CPUs are busy, or are not. Looking takes 10 µs.
	contentionAge = 100 * time.Millisecond
)

// hurry raises the weight of a sandbox's group while the sandbox works on calls, so that it answers before sandboxes
// that only compute. The zero hurry does nothing.
type hurry struct {
	weigh func(times int64) error // sets the group's weight, as a multiple of its own

	mu sync.Mutex
	// +checklocks:mu
	calls int // under way
	// +checklocks:mu
	raised bool
	// +checklocks:mu
	since time.Time // when the weight was raised or lowered last
	// +checklocks:mu
	spent time.Duration // of hurryBurst, at since
	// +checklocks:mu
	timer *time.Timer // lowers it
}

// begin raises the weight for a call, unless the sandbox was hurried too much lately.
func (h *hurry) begin() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls++
	now := time.Now()
	passed := now.Sub(h.since)
	if !h.raised {
		h.spent, h.since = max(0, h.spent-passed/hurryPart), now
		if h.spent >= hurryBurst || h.weigh(hurried) != nil {
			return // a group that is gone has nothing to hurry
		}
		h.raised, passed = true, 0
	}
	left := min(hurryMost, hurryBurst-h.spent-passed)
	if h.timer == nil {
		h.timer = time.AfterFunc(left, func() { h.lower(false) })
	} else {
		h.timer.Reset(left)
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
	now := time.Now()
	h.raised, h.spent, h.since = false, h.spent+now.Sub(h.since), now
	_ = h.weigh(1) // fails when the group is gone
}

// settle gives the group its own weight after a boot or an adoption.
func (h *hurry) settle() {
	if h.weigh != nil {
		_ = h.weigh(1) // fails when the group is gone
	}
}

// weigh returns what sets the weight of a sandbox's group to a multiple of its own; nil if its own is not known.
func (n *Node) weigh(id sandbox.ID, own int64) func(times int64) error {
	if own == 0 {
		return nil
	}
	group := n.groups.Group(n.groupPath(id))
	return func(times int64) error { return group.SetCPUWeight(own * times) }
}

func cpuWeight(spec sandbox.Spec) int64 { return int64(spec.Size.VCPUs) * weightPerCPU }

// hurry hurries a sandbox for a call, if the CPUs are busy, until answered is called.
func (n *Node) hurry(id string) (answered func()) {
	b := n.box(sandbox.ID(id))
	if b == nil || b.hurry.weigh == nil || !n.contention.now() {
		return func() {}
	}
	b.hurry.begin()
	return b.hurry.end
}

// contention is whether more threads want CPUs than there are.
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
