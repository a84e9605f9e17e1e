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

// memoryConfig is what the server itself may take.
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
	if m.LimitMB == 0 {
		return
	}
	if err := s.confine(int64(m.LimitMB) << 20); err != nil {
		s.log.LogAttrs(ctx, slog.LevelWarn, "the server's own memory has no limit of the kernel's; what bounds it is memory.calls_mb and memory.heap_mb alone",
			slog.String("error", err.Error()))
	}
}

// confine moves the server into a control group of its own with a limit on memory, unless it is in one
// with as low a limit. The group is left and removed when the server closes.
func (s *server) confine(limit int64) error {
	groups, err := cgroup.Detect()
	if err != nil {
		return err
	}
	own, err := groups.Own()
	if err != nil {
		return err
	}
	if has, err := own.MemoryLimit(); err == nil && has > 0 && has <= limit {
		return nil
	}
	if own.OfService() {
		return errors.New("systemd has the server's control group: set MemoryMax= in its unit")
	}
	g := groups.Group(node.ServerGroup(s.instance))
	if own.Path() == g.Path() {
		own = groups.Group("/") // of a server that was started by one
	}
	s.onClose(func(context.Context) error {
		if err := own.Join(os.Getpid()); err != nil {
			return nil // the group goes with the next server, or with --purge
		}
		_ = g.Remove() // what the server started may be in it still; the next one has the same
		return nil
	})
	return g.Confine(os.Getpid(), limit)
}
