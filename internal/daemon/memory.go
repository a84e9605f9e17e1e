package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/cayhq/cay/internal/budget"
	"github.com/cayhq/cay/internal/cgroup"
	"github.com/cayhq/cay/internal/node"
)

// boundMemory makes the budget of calls, makes Go collect garbage before the heap exceeds its limit, and confines the
// server to a control group.
func (s *server) boundMemory(ctx context.Context) {
	m := s.cfg.Memory
	s.budget = budget.New(int64(m.CallsMB)<<20, int64(m.OrgCallsMB)<<20)
	s.observeMemory()
	debug.SetMemoryLimit(int64(m.HeapMB) << 20)
	if err := cgroup.ShortenSlices(os.Getpid()); err != nil {
		s.log.LogAttrs(ctx, slog.LevelWarn,
			"the kernel refuses a short time slice; calls wait longer while the CPUs are busy",
			slog.String("error", err.Error()))
	}
	if err := s.confine(int64(m.LimitMB) << 20); err != nil {
		s.log.LogAttrs(ctx, slog.LevelWarn, "the kernel does not bound the server's memory or does not run the server "+
			"before sandboxes; memory.calls_mb and memory.heap_mb alone bound the memory", slog.String("error", err.Error()))
	}
}

// serverWeight is the CPU weight of the server's processes while the CPUs are busy. All sandboxes together have 1024.
// It is the highest weight that cgroup v2 has. The server needs little and every call waits for it. Beside 50 hostile
// tenants on 2 CPUs with Linux 6.18, a thread of the server that woke waited up to 500 ms with 4 times the weight of
// the sandboxes and up to 70 ms with 100 times.
const serverWeight = 100 * 1024

// confine moves the server into a control group of its own, which limits its memory unless the server is already in a
// group with at most that limit, and gives it a CPU weight unless the server is already in a group for its CPU. A limit
// of 0 is none. When the server closes it leaves the group and removes it.
func (s *server) confine(limit int64) error {
	groups, err := cgroup.Detect()
	if err != nil {
		return err
	}
	g := groups.Group(node.ServerGroup(s.instance))
	s.onClose(func(context.Context) error {
		// Programs that the server started may still be in the group. The next server uses it, and --purge removes it.
		_ = g.Remove()
		return nil
	})
	enter := func(controller string, seat func(own cgroup.Group) error) error {
		own, err := groups.Own(controller)
		if err != nil {
			return err
		}
		if own.Path() == g.Path() {
			own = groups.Group("/") // another server started this one, or v2 moved it for the other controller
		}
		s.onClose(func(context.Context) error {
			_ = own.Join(controller, os.Getpid()) // after an error the next server, or --purge, removes the group
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
