package node

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/cayhq/cay/internal/runsc"
	"github.com/cayhq/cay/internal/sandbox"
)

// adopt takes over the sandboxes that a former process of this server left: those that run, and the
// remains of the others. Then it removes the slots that no directory records.
func (n *Node) adopt() error {
	dirs, err := os.ReadDir(n.cfg.Dir)
	if err != nil {
		return fmt.Errorf("listing the sandboxes' directories: %w", err)
	}
	keep := map[int]bool{}
	for _, d := range dirs {
		id := sandbox.ID(d.Name())
		if !id.Valid() {
			continue
		}
		l, err := readRecord(n.dir(id))
		if err != nil || l.ID != id {
			continue // it never ran; List reports its directory
		}
		b := n.instanceOf(l)
		b.agentKey = l.Token
		n.mu.Lock()
		n.instances[id] = b
		if l.UID != 0 {
			n.uids[l.UID] = b
		}
		n.mu.Unlock()
		if b.slot, err = n.net.Adopt(l.Slot); err != nil {
			n.log.Warn("a sandbox has no network any more", "sandbox", id, "slot", l.Slot, "error", err)
			continue
		}
		keep[l.Slot] = true
		if l.Warm != "" && l.Shape.Egress.Mode == "" {
			// A pooled sandbox without a policy: its slot stays closed.
		} else if err := b.applyPolicy(n.ctx); err != nil {
			// The slot keeps its old rules; the sandbox room sets the policy again.
			n.log.Error("adopting a sandbox's policy", "sandbox", id, "error", err)
		}
		if b.pid, err = runsc.PID(n.dir(id)); err == nil {
			err = b.watch()
		}
		if err != nil {
			n.log.Warn("a sandbox does not run any more", "sandbox", id, "error", err)
			continue
		}
		b.hurry.settle() // the server may have ended during a call
		n.verifyAdopted(b)
		n.warnOlder(b)
		n.log.Info("adopted a sandbox", "sandbox", id, "pid", b.pid)
	}
	return n.net.Sweep(keep)
}

// verifyAdopted verifies the memory of a sandbox that another process of the server restored. That
// process may have ended before it had verified all of it.
func (n *Node) verifyAdopted(b *instance) {
	c, was, err := n.latest(string(b.record.ID))
	if err == nil && c == nil && b.record.From != "" {
		c, was, err = n.latest(b.record.From)
	}
	if err != nil || c == nil || was.Run == b.record.Run {
		return
	}
	if err := n.verify(b, c); err != nil {
		n.log.Error("verifying the memory of an adopted sandbox", "sandbox", b.record.ID, "error", err)
	}
}

// availableMemory returns how many bytes of memory the machine can give without swapping.
func availableMemory() (int64, error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("reading the machine's memory: %w", err)
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), "MemAvailable:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("reading the machine's memory: %w", err)
			}
			return kib << 10, nil
		}
	}
	return 0, errors.New("reading the machine's memory: /proc/meminfo has no MemAvailable")
}
