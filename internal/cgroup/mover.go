package cgroup

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
)

// refresh is how often [Mover] renews its hold. A grace period is 8 ms or more on the
// machines it was measured on; longer and moves wait again, shorter only costs CPU.
const refresh = 4 * time.Millisecond

// Mover makes moves of processes into groups quick while somebody wants that.
//
// The kernel keeps forks and moves apart with a lock whose first taker waits for an RCU
// grace period, 8 to 24 ms; while the last use is not older than one, others do not wait. runsc
// moves itself into its group and out again on every start. A Mover moves this process to
// where it is, which changes nothing, over and over for as long as a start needs it: one
// loop however many starts there are. On 2 CPUs it took 20 ms from a cold create of 200.
//
// The zero value is not ready; see [Hierarchy.NewMover]. Safe for concurrent use.
type Mover struct {
	own Group // where this process is

	mu sync.Mutex
	// +checklocks:mu
	wanted int // starts under way
	// +checklocks:mu
	kept bool // the loop runs
}

// NewMover finds the group this process is in.
func (h *Hierarchy) NewMover() (*Mover, error) {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("finding our own control group: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		// 8:pids:/user.slice, and 0::/user.slice on v2
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) == 3 && (h.unified && fields[1] == "" || !h.unified && fields[1] == "pids") {
			return &Mover{own: h.Group(fields[2])}, nil
		}
	}
	return nil, errors.New("finding our own control group: /proc/self/cgroup does not name it")
}

// Hurry keeps moves quick until release is called, exactly once.
func (m *Mover) Hurry() (release func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wanted++
	if !m.kept {
		m.kept = true
		go m.keep()
	}
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.wanted--
	}
}

func (m *Mover) keep() {
	for {
		// An error costs the time that this is to save, and nothing else.
		err := m.own.set("pids", "cgroup.procs", "0")
		m.mu.Lock()
		if m.wanted == 0 || err != nil {
			m.kept = false
		}
		kept := m.kept
		m.mu.Unlock()
		if !kept {
			return
		}
		time.Sleep(refresh)
	}
}
