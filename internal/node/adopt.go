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

// adopt takes over the sandboxes that a former process of this server left, those
// that run and what is left of the others, and then removes slots that no directory
// speaks of.
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
		l, err := readLife(n.dir(id))
		if err != nil || l.ID != id {
			continue // it never ran: its directory is all there is, and List shows it
		}
		b := n.boxOf(l)
		b.agentKey = l.Token
		n.boxes[id] = b
		if l.UID != 0 {
			n.uids[l.UID] = b
		}
		if b.slot, err = n.net.Adopt(l.Slot); err != nil {
			n.log.Warn("a sandbox has no network any more", "sandbox", id, "slot", l.Slot, "error", err)
			continue
		}
		keep[l.Slot] = true
		if l.Warm != "" && l.Egress.Mode == "" {
			// A member that has no policy yet: its slot stays closed.
		} else if err := b.applyPolicy(n.ctx); err != nil {
			// It keeps the rules it had; the sandbox room gives it its policy again.
			n.log.Error("adopting a sandbox's policy", "sandbox", id, "error", err)
		}
		if b.pid, err = runsc.PID(n.dir(id)); err == nil {
			err = b.watch()
		}
		if err != nil {
			n.log.Warn("a sandbox does not run any more", "sandbox", id, "error", err)
			continue
		}
		b.hurry.settle() // the server may have ended in a call
		n.verifyAdopted(b)
		n.warnOlder(b)
		n.log.Info("adopted a sandbox", "sandbox", id, "pid", b.pid)
	}
	return n.net.Sweep(keep)
}

// verifyAdopted verifies the memory of a sandbox that was restored by another process of
// the server, which may not have come to the end of it.
func (n *Node) verifyAdopted(b *box) {
	c, was, err := n.latest(string(b.life.ID))
	if err == nil && c == nil && b.life.From != "" {
		c, was, err = n.latest(b.life.From)
	}
	if err != nil || c == nil || was.Run == b.life.Run {
		return
	}
	if err := n.verify(b, c); err != nil {
		n.log.Error("verifying the memory of an adopted sandbox", "sandbox", b.life.ID, "error", err)
	}
}

// availableMemory is what the machine can give without swapping, in bytes.
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
