package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/cgroup"
	"github.com/cayhq/cay/internal/node"
)

// memoryConfig limits the memory of the server itself.
type memoryConfig struct {
	CallsMB    int `toml:"calls_mb"`
	OrgCallsMB int `toml:"org_calls_mb"`
	HeapMB     int `toml:"heap_mb"`
	LimitMB    int `toml:"limit_mb"`
}

// leastCallsMB has room for one command with all the output that it may have, and others beside.
const leastCallsMB = 32

func (m memoryConfig) check() error {
	switch {
	case m.CallsMB < leastCallsMB:
		return fmt.Errorf("memory.calls_mb: must be at least %d, not %d", leastCallsMB, m.CallsMB)
	case m.OrgCallsMB < leastCallsMB/2 || m.OrgCallsMB > m.CallsMB:
		return fmt.Errorf("memory.org_calls_mb: must be from %d to memory.calls_mb, not %d", leastCallsMB/2, m.OrgCallsMB)
	case m.HeapMB < m.CallsMB+leastCallsMB:
		return fmt.Errorf("memory.heap_mb: must be at least %d more than memory.calls_mb, not %d", leastCallsMB, m.HeapMB)
	case m.LimitMB != 0 && m.LimitMB < m.HeapMB:
		return fmt.Errorf("memory.limit_mb: must be at least memory.heap_mb, or 0 for no limit, not %d", m.LimitMB)
	}
	return nil
}

// boundMemory makes the budget of calls, has Go collect garbage before the heap is larger than it should be,
// and confines the server.
func (s *server) boundMemory(ctx context.Context) {
	m := s.cfg.Memory
	s.budget = budget.New(int64(m.CallsMB)<<20, int64(m.OrgCallsMB)<<20)
	s.registry.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cay_calls_memory_bytes", Help: "Memory that calls hold now, as it is counted."},
			func() float64 { return float64(s.budget.Used()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "cay_calls_memory_limit_bytes", Help: "Memory that calls may hold together."},
			func() float64 { return float64(s.budget.Limit()) }))
	debug.SetMemoryLimit(int64(m.HeapMB) << 20)
	if err := s.confine(int64(m.LimitMB) << 20); err != nil {
		s.log.LogAttrs(ctx, slog.LevelWarn, "the kernel does not bound the server's memory or does not run the server before sandboxes; "+
			"memory.calls_mb and memory.heap_mb alone bound the memory", slog.String("error", err.Error()))
	}
}

// serverWeight is the weight of the server's processes against all sandboxes together, which have 1024, when the CPUs
// are busy. It is the highest that v2 has. The server takes little and each call waits for it. Beside 50 hostile
// tenants on 2 CPUs with Linux 6.18, a thread of the server that woke waited up to 500 ms with 4 times the weight of
// the sandboxes and up to 70 ms with 100 times.
const serverWeight = 100 * 1024

// confine moves the server into a control group of its own with a limit on memory, unless it is in one with as low a
// limit, and with a weight against the sandboxes, unless it is in one for its CPU. A limit of 0 is none. The group is
// left and removed when the server closes.
func (s *server) confine(limit int64) error {
	groups, err := cgroup.Detect()
	if err != nil {
		return err
	}
	g := groups.Group(node.ServerGroup(s.instance))
	s.onClose(func(context.Context) error {
		_ = g.Remove() // what the server started may be in it still; the next one has the same, and --purge removes it
		return nil
	})
	enter := func(controller string, seat func(own cgroup.Group) error) error {
		own, err := groups.Own(controller)
		if err != nil {
			return err
		}
		if own.Path() == g.Path() {
			own = groups.Group("/") // another server started this one, or v2 moved it for the controller before
		}
		s.onClose(func(context.Context) error {
			_ = own.Join(controller, os.Getpid()) // the group goes with the next server, or with --purge
			return nil
		})
		return seat(own)
	}
	memory := enter("memory", func(own cgroup.Group) error {
		if has, err := own.MemoryLimit(); limit == 0 || err == nil && has > 0 && has <= limit {
			return nil
		}
		if own.OfService() {
			return errors.New("systemd has the server's control group: set MemoryMax= in its unit")
		}
		return g.Confine(os.Getpid(), limit)
	})
	cpu := enter("cpu", func(own cgroup.Group) error {
		if own.Path() != "/" {
			return nil
		}
		return g.Weigh(os.Getpid(), serverWeight)
	})
	return errors.Join(memory, cpu)
}
