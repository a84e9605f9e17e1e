package daemon

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
)

// openNodes opens the room of nodes and registers this machine, which obeys the orders that it was given before. The
// sandboxes must be open.
func (s *server) openNodes(ctx context.Context) error {
	if err := s.openFleet(ctx); err != nil {
		return err
	}
	cfg := fleet.Config{Self: s.instance, Now: s.db.Now, Log: s.log,
		Obey: func(o fleet.Orders) { s.sandboxes.SetCordon(o.Cordoned, o.Drain) }, Lose: s.sandboxes.EndLost}
	if s.fleet != nil {
		cfg.CA = s.fleet.ca
	}
	s.nodes = fleet.New(cfg, s.db)
	host, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("reading the host's name: %w", err)
	}
	labels, err := fleet.ParseLabels(s.cfg.Node.Labels)
	if err != nil {
		return fmt.Errorf("node.labels: %w", err)
	}
	about := fleet.About{Version: s.version, VCPUs: runtime.NumCPU(), MaxSandboxes: s.cfg.Capacity.MaxSandboxes}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return fmt.Errorf("reading the machine's memory: %w", err)
	}
	if inFleet(s.cfg) {
		about.Address = s.fleet.address
	}
	about.MemoryMB = int(info.Totalram * uint64(info.Unit) >> 20)
	name := cmp.Or(s.cfg.Node.Name, fleet.NameOf(host))
	err = s.nodes.Register(ctx, name, labels, about)
	if fault.Is(err, fault.Conflict) && s.cfg.Node.Name == "" {
		// Another machine has this host name. A host must not stop for a name that nobody chose.
		err = s.nodes.Register(ctx, fleet.NameOf(s.instance+"-"+host), labels, about)
	}
	if err != nil || s.fleet == nil {
		return err
	}
	s.openHub()
	if !inFleet(s.cfg) {
		return nil
	}
	if err := s.enroll(ctx); err != nil {
		return err
	}
	s.keepLease() // what follows may take long
	return nil
}
