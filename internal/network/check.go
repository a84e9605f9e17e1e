package network

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
)

const (
	// checkInterval is how often the rules are compared with what they should be,
	// besides after every deletion the kernel tells of. It bounds how long a
	// change that no notice came of goes unseen.
	checkInterval = 10 * time.Second

	forwardingFile = "ipv4/ip_forward"
)

// installLocked installs the table for all slots that are to be in it, and
// remembers how the kernel lists it.
func (n *Network) installLocked() error {
	slots := make([]*Slot, 0, len(n.ruled))
	for _, s := range n.ruled {
		slots = append(slots, s)
	}
	if err := n.rules.install(slots); err != nil {
		return err
	}
	shape, err := n.rules.shape()
	if err != nil {
		return err
	}
	n.shape = shape
	return nil
}

// admit puts a slot into the table; a table that somebody removed is installed
// anew.
func (n *Network) admit(s *Slot) error {
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	n.ruled[s.Index] = s
	err := n.rules.addSlot(s)
	if isGone(err) {
		n.repairs++
		n.log.Warn("the nftables table was gone; installing it anew", "table", n.rules.table.Name)
		err = n.installLocked()
	}
	if err != nil {
		delete(n.ruled, s.Index)
	}
	return err
}

// expel takes a slot out of the table.
func (n *Network) expel(s *Slot) error {
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	delete(n.ruled, s.Index)
	return n.rules.removeSlot(s)
}

// Repairs counts how often the rules were found changed and were installed anew.
func (n *Network) Repairs() int {
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	return n.repairs
}

// Check looks whether the rules are as installed and the host still forwards,
// and puts right what is not. It also runs by itself, at once when the kernel
// tells of a deletion and every 10 seconds.
func (n *Network) Check(ctx context.Context) (repaired bool, err error) {
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	if err := ctx.Err(); err != nil {
		return false, fmt.Errorf("checking the rules: %w", err)
	}
	found, err := n.differenceLocked()
	if err != nil {
		return false, err
	}
	if found != "" {
		n.repairs++
		n.log.Warn("the rules were changed by somebody else; installing them anew", "table", n.rules.table.Name, "found", found)
		if err := n.installLocked(); err != nil {
			return false, err
		}
	}
	return found != "", enableForwarding()
}

// differenceLocked says what is not as it should be, "" if all is.
func (n *Network) differenceLocked() (string, error) {
	shape, err := n.rules.shape()
	if isGone(err) {
		return "the table is gone", nil
	}
	if err != nil {
		return "", err
	}
	if !slices.Equal(shape, n.shape) {
		return "chains, rules or sets differ", nil
	}
	var want [][]byte
	for _, s := range n.ruled {
		want = append(want, slotKey(s))
	}
	slices.SortFunc(want, bytes.Compare)
	for _, set := range []*nftables.Set{n.rules.slots, n.rules.policies} {
		have, err := n.rules.keys(set)
		if err != nil {
			return "", err
		}
		if !slices.EqualFunc(have, want, bytes.Equal) {
			return "the elements of " + set.Name + " differ", nil
		}
	}
	return "", nil
}

// shape describes the table as the kernel has it. Every rule has a handle that
// is never used twice, so a rule that was replaced shows.
func (t *table) shape() ([]string, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("opening nftables: %w", err)
	}
	known, err := c.ListTableOfFamily(t.table.Name, t.table.Family)
	if err != nil {
		return nil, fmt.Errorf("listing nftables table %s: %w", t.table.Name, err)
	}
	out := []string{fmt.Sprintf("table flags %d", known.Flags)}
	chains, err := c.ListChainsOfTableFamily(t.table.Family)
	if err != nil {
		return nil, fmt.Errorf("listing nftables chains: %w", err)
	}
	for _, ch := range chains {
		if ch.Table.Name != t.table.Name {
			continue
		}
		line := []any{"chain", ch.Name, ch.Type}
		if ch.Hooknum != nil && ch.Priority != nil && ch.Policy != nil {
			line = append(line, *ch.Hooknum, *ch.Priority, *ch.Policy)
		}
		out = append(out, fmt.Sprintln(line...))
		rules, err := c.GetRules(t.table, ch)
		if err != nil {
			return nil, fmt.Errorf("listing nftables rules of %s: %w", ch.Name, err)
		}
		for _, r := range rules {
			out = append(out, fmt.Sprintf("rule %s %d", ch.Name, r.Handle))
		}
	}
	never, err := t.keys(t.never)
	if err != nil {
		return nil, err
	}
	return append(out, fmt.Sprintf("never %x", never)), nil
}

// keys lists the keys of a set in order. An end of an interval is a key too.
func (t *table) keys(set *nftables.Set) ([][]byte, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("opening nftables: %w", err)
	}
	elements, err := c.GetSetElements(set)
	if err != nil {
		return nil, fmt.Errorf("listing nftables set %s: %w", set.Name, err)
	}
	var out [][]byte
	for _, e := range elements {
		out = append(out, e.Key)
	}
	slices.SortFunc(out, bytes.Compare)
	return out, nil
}

// watch checks the rules until ctx ends.
func (n *Network) watch(ctx context.Context) {
	changed, err := deletions(ctx, n.rules.table.Name)
	if err != nil {
		n.log.Warn("the kernel does not tell of changed rules; looking every "+checkInterval.String(), "error", err)
	}
	tick := time.NewTicker(checkInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-changed:
		}
		if _, err := n.Check(ctx); err != nil && ctx.Err() == nil {
			n.log.Error("checking the rules failed", "error", err)
		}
	}
}

// enableForwarding turns IPv4 forwarding on. It is only written when it is off:
// writing resets other settings of the host.
func enableForwarding() error {
	now, err := os.ReadFile(filepath.Join(sysctlDir, forwardingFile))
	if err != nil {
		return fmt.Errorf("reading %s: %w", forwardingFile, err)
	}
	if strings.TrimSpace(string(now)) == "1" {
		return nil
	}
	return setting(forwardingFile, "1")
}
