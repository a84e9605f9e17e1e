package network

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// checkInterval is the time between two comparisons of the rules with what they should be; a
	// deletion that the kernel reports triggers one at once. It bounds the time for which a
	// change without a notice stays unseen.
	checkInterval = 10 * time.Second

	forwardingFile = "ipv4/ip_forward"
)

// shape describes chains and sets of the table by their names, as the kernel lists them. The
// kernel gives every rule a handle that it never uses again, so a replaced rule shows.
type shape map[string]string

func sortedRules(ruled map[int]*slotRules) []*slotRules {
	return slices.SortedFunc(maps.Values(ruled), func(a, b *slotRules) int { return a.slot.Index - b.slot.Index })
}

// install installs the table for all slots in n.ruled, and records how the kernel lists it.
//
// +checklocks:n.installing
func (n *Network) install() error {
	n.recount()
	n.rulesMu.Lock()
	all, was := sortedRules(n.ruled), n.counted
	was.slots = maps.Clone(was.slots)
	n.rulesMu.Unlock()
	var entries []*entry
	for _, r := range all {
		entries = append(entries, r.now.Load())
	}
	if err := n.rules.install(entries, was); err != nil {
		return err
	}
	n.installed.Add(1)
	foreign, err := n.rules.sockets.foreign()
	if err != nil {
		return err
	}
	have, err := n.rules.shape(nil)
	if err != nil {
		return err
	}
	for i, r := range all {
		e := *entries[i]
		e.shape = shape{}
		for _, name := range e.owns(n.rules) {
			e.shape[name] = have[name]
			delete(have, name)
		}
		r.now.Store(&e)
	}
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	n.shape, n.foreign = have, foreign
	return nil
}

// Repairs returns the number of times that the rules were found changed and were installed anew.
func (n *Network) Repairs() int {
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	return n.repairs
}

// Check compares the rules with what was installed, checks that the host still forwards, and
// repairs what differs. It also runs by itself, at once when the kernel reports a deletion and
// every 10 seconds. While only this Network changes rules of the host, a check is one request to
// the kernel.
func (n *Network) Check(ctx context.Context) (repaired bool, err error) {
	n.checking.Lock()
	defer n.checking.Unlock()
	if err := ctx.Err(); err != nil {
		return false, fmt.Errorf("checking the rules: %w", err)
	}
	installed := n.installed.Load()
	foreign, err := n.rules.sockets.foreign()
	if err != nil {
		return false, err
	}
	n.rulesMu.Lock()
	known := n.foreign
	n.rulesMu.Unlock()
	if foreign == known {
		return false, enableForwarding()
	}
	found, err := n.difference()
	if err != nil {
		return false, err
	}
	if found != "" {
		if err := n.reinstall(installed, found); err != nil {
			return false, err
		}
	} else if n.installed.Load() == installed {
		n.rulesMu.Lock()
		n.foreign = foreign
		n.rulesMu.Unlock()
	}
	return found != "", enableForwarding()
}

// differenceAttempts is the number of times that the table is compared again because a part of it
// was removed while it was listed.
const differenceAttempts = 3

// difference returns the first difference between the table and what it should be, "" if there is
// none.
func (n *Network) difference() (found string, err error) {
	for range differenceAttempts {
		var all []*slotRules
		all, found, err = n.layoutDiffers()
		if isGone(err) {
			return "the table is gone", nil
		}
		for _, r := range all {
			if found != "" || err != nil {
				break
			}
			found, err = n.slotDiffers(r)
		}
		if err == nil {
			break
		}
	}
	return found, err
}

// layoutDiffers compares everything except the chains and sets of single slots, and returns the
// slots, whose own parts are still to be compared. Changes wait meanwhile, for the time it takes
// to list names.
func (n *Network) layoutDiffers() ([]*slotRules, string, error) {
	n.installing.Lock()
	defer n.installing.Unlock()
	n.rulesMu.Lock()
	all, want := sortedRules(n.ruled), maps.Clone(n.shape)
	n.rulesMu.Unlock()
	named, keys := map[string]bool{}, map[*nftables.Set][][]byte{}
	if aside := n.rules.asideNever.Load(); aside != nil {
		named[setName(aside.set.Name)] = true
	}
	for _, r := range all {
		e := r.now.Load()
		if aside := r.aside.Load(); aside != nil {
			for _, name := range aside.owns(n.rules) {
				named[name] = true
			}
		}
		for _, name := range e.owns(n.rules) {
			named[name], want[name] = true, ""
		}
		for _, set := range e.memberOf(n.rules) {
			keys[set] = append(keys[set], slotKey(e.slot))
		}
	}
	have, err := n.rules.shape(named)
	if err != nil {
		return nil, "", err
	}
	for name, line := range have {
		if is, ok := want[name]; ok && is != line || !ok && !named[name] {
			return nil, name + " differs", nil
		}
		delete(want, name)
	}
	for name := range want {
		return nil, name + " is missing", nil
	}
	for _, set := range n.rules.bySlot() { // also those that should be empty
		found, err := n.rules.keysDiffer(set, keys[set])
		if found != "" || err != nil {
			return nil, found, err
		}
	}
	return all, "", nil
}

// slotDiffers compares the parts of one slot. If they differ while the slot is being changed, it
// compares them again afterwards.
func (n *Network) slotDiffers(r *slotRules) (string, error) {
	if found, err := n.entryDiffers(r); found == "" && err == nil {
		return "", nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if n.current(r) != nil {
		return "", nil //nolint:nilerr // the slot was released
	}
	return n.entryDiffers(r)
}

func (n *Network) entryDiffers(r *slotRules) (string, error) {
	e := r.now.Load()
	have, err := n.rules.shapeOf(e)
	if err == nil && !maps.Equal(have, e.shape) {
		return "rules of slot " + strconv.Itoa(r.slot.Index) + " differ", nil
	}
	sets := map[*nftables.Set][][]byte{}
	for _, f := range e.elements(n.rules) {
		for _, element := range f.elements {
			sets[f.set] = append(sets[f.set], element.Key)
		}
	}
	if n.rules.proxies(e) {
		set := n.rules.resolved(e.slot)
		sets[set] = nil
		for a := range e.resolved {
			sets[set] = append(sets[set], a.AsSlice())
		}
	}
	for set, keys := range sets {
		if err != nil {
			break
		}
		var found string
		if found, err = n.rules.keysDiffer(set, keys); found != "" {
			return found, nil
		}
	}
	return "", err
}

// keysDiffer compares the keys of a set with those it should have.
func (t *table) keysDiffer(set *nftables.Set, want [][]byte) (string, error) {
	slices.SortFunc(want, bytes.Compare)
	have, err := t.keys(set)
	if err == nil && !slices.EqualFunc(have, want, bytes.Equal) {
		return "the elements of " + set.Name + " differ", nil
	}
	return "", err
}

// bySlot returns the sets that have an element for each slot, or for some.
func (t *table) bySlot() []*nftables.Set {
	return []*nftables.Set{t.slots, t.allowed, t.denied, t.policies, t.named}
}

// memberOf returns the sets of bySlot that have an element for the entry's slot.
func (e *entry) memberOf(t *table) []*nftables.Set {
	out := []*nftables.Set{t.slots, t.allowed, t.denied}
	if e.policy != nil {
		out = append(out, t.policies)
	}
	if t.decidesNames(e) {
		out = append(out, t.named)
	}
	return out
}

// owns returns the names, as in shape, of the chains and sets that only the entry has.
func (e *entry) owns(t *table) []string {
	var out []string
	for _, name := range e.chains(t) {
		out = append(out, chainName(name))
	}
	for _, f := range e.elements(t) {
		out = append(out, setName(f.set.Name))
	}
	if t.proxies(e) {
		out = append(out, setName(t.resolved(e.slot).Name))
	}
	return out
}

func chainName(name string) string { return "chain " + name }
func setName(name string) string   { return "set " + name }

// shape describes the whole table. For the names in named it records only that they exist.
func (t *table) shape(named map[string]bool) (out shape, err error) {
	err = t.sockets.list(func(c *nftables.Conn) error {
		out, err = t.shapeBy(c, named)
		return err
	})
	return out, err
}

func (t *table) shapeBy(c *nftables.Conn, named map[string]bool) (shape, error) {
	known, err := c.ListTableOfFamily(t.table.Name, t.table.Family)
	if err != nil {
		return nil, fmt.Errorf("listing nftables table %s: %w", t.table.Name, err)
	}
	out := shape{"table": fmt.Sprint(known.Flags)}
	chains, err := c.ListChainsOfTableFamily(t.table.Family)
	if err != nil {
		return nil, fmt.Errorf("listing nftables chains: %w", err)
	}
	for _, ch := range chains {
		if ch.Table.Name != t.table.Name {
			continue
		}
		if named[chainName(ch.Name)] && ch.Hooknum == nil {
			out[chainName(ch.Name)] = ""
			continue
		}
		line := []any{ch.Type}
		if ch.Hooknum != nil && ch.Priority != nil && ch.Policy != nil {
			line = append(line, *ch.Hooknum, *ch.Priority, *ch.Policy)
		}
		if out[chainName(ch.Name)], err = t.rulesOf(c, ch.Name, line...); err != nil {
			return nil, err
		}
	}
	sets, err := c.GetSets(t.table)
	if err != nil {
		return nil, fmt.Errorf("listing nftables sets: %w", err)
	}
	for _, s := range sets {
		out[setName(s.Name)] = ""
	}
	never := t.never.Load().set
	keys, err := t.keysBy(c, never)
	if err != nil {
		return nil, err
	}
	out[setName(never.Name)] = fmt.Sprintf("%x", keys)
	return out, nil
}

// shapeOf describes the chains and sets that only the entry has.
func (t *table) shapeOf(e *entry) (shape, error) {
	out := shape{}
	for _, name := range e.owns(t) {
		out[name] = ""
	}
	err := t.sockets.list(func(c *nftables.Conn) (err error) {
		for _, name := range e.chains(t) {
			if out[chainName(name)], err = t.rulesOf(c, name, nftables.ChainType("")); err != nil {
				return err
			}
		}
		return nil
	})
	return out, err
}

// rulesOf describes a chain by line and the handles of its rules, separated by spaces.
func (t *table) rulesOf(c *nftables.Conn, name string, line ...any) (string, error) {
	rules, err := c.GetRules(t.table, t.regular(name))
	if err != nil {
		return "", fmt.Errorf("listing nftables rules of %s: %w", name, err)
	}
	for _, r := range rules {
		line = append(line, r.Handle)
	}
	return strings.Join(strings.Fields(fmt.Sprintln(line...)), " "), nil
}

// generation returns the number of the current state of all rules in the host's network
// namespace. Every transaction of any process increments it.
func (s *sockets) generation() (uint32, error) {
	answers, err := s.short.execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   make([]byte, headerLength),
	})
	if err != nil {
		return 0, fmt.Errorf("reading the generation of the rules: %w", err)
	}
	for _, m := range answers {
		if len(m.Data) < headerLength {
			continue
		}
		d, err := netlink.NewAttributeDecoder(m.Data[headerLength:])
		if err != nil {
			return 0, fmt.Errorf("reading the generation of the rules: %w", err)
		}
		d.ByteOrder = binary.BigEndian
		for d.Next() {
			if d.Type() == unix.NFTA_GEN_ID {
				return d.Uint32(), d.Err()
			}
		}
	}
	return 0, errors.New("reading the generation of the rules: it is not in the kernel's answer")
}

// keys returns the keys of a set in order. The end of an interval is a key too.
func (t *table) keys(set *nftables.Set) (out [][]byte, err error) {
	err = t.sockets.list(func(c *nftables.Conn) error {
		out, err = t.keysBy(c, set)
		return err
	})
	return out, err
}

func (t *table) keysBy(c *nftables.Conn, set *nftables.Set) ([][]byte, error) {
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
	var wg sync.WaitGroup
	defer wg.Wait()
	changed, err := deletions(ctx, &wg, n.rules.table.Name)
	if err != nil {
		n.log.Warn("the kernel does not report changed rules; checking every "+checkInterval.String(), "error", err)
	}
	tick := time.NewTicker(checkInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			n.recount()
		case <-changed:
		}
		if _, err := n.Check(ctx); err != nil && ctx.Err() == nil {
			n.log.Error("checking the rules failed", "error", err)
		}
	}
}

// enableForwarding turns IPv4 forwarding on if it is off. Writing the setting resets others of
// the host.
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
