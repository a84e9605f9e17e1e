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
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// checkInterval is how often the rules are compared with what they should be,
	// besides after every deletion the kernel tells of. It bounds how long a
	// change that no notice came of goes unseen.
	checkInterval = 10 * time.Second

	forwardingFile = "ipv4/ip_forward"
)

// shape describes chains and sets of the table by their names, as the kernel
// lists them. Every rule has a handle that is never used twice, so a rule that
// was replaced shows.
type shape map[string]string

// installLocked installs the table for all slots that are to be in it, and
// remembers how the kernel lists it.
//
// +checklocks:n.rulesMu
func (n *Network) installLocked() error {
	n.recountLocked()
	entries := slices.SortedFunc(maps.Values(n.ruled), func(a, b *entry) int { return a.slot.Index - b.slot.Index })
	if err := n.rules.install(entries, n.counted); err != nil {
		return err
	}
	generation, err := n.rules.sockets.generation()
	if err != nil {
		return err
	}
	if n.shape, err = n.rules.shape(); err != nil {
		return err
	}
	for _, e := range n.ruled {
		e.shape = shape{}
		for _, name := range e.owns(n.rules) {
			e.shape[name] = n.shape[name]
			delete(n.shape, name)
		}
	}
	n.generation = generation
	return nil
}

// commitLocked makes one change of the rules, after which e, if there is one, is
// as it should be. A table that somebody removed is installed anew, with what is
// in n.ruled by now.
//
// +checklocks:n.rulesMu
func (n *Network) commitLocked(change func() error, e *entry) error {
	sent := n.rules.sockets.transactions()
	before, err := n.rules.sockets.generation()
	if err != nil {
		return err
	}
	if err := change(); isGone(err) {
		n.repairs++
		n.log.Warn("the nftables table was gone; installing it anew", "table", n.rules.table.Name)
		return n.installLocked()
	} else if err != nil {
		return err
	}
	after, err := n.rules.sockets.generation()
	if err != nil {
		return err
	}
	if n.generation == before && after-before == n.rules.sockets.transactions()-sent {
		n.generation = after // these were our changes, and nobody else's
	}
	if e == nil {
		return nil
	}
	e.shape, err = n.rules.shapeOf(e)
	return err
}

// admit puts a slot into the table, closed.
func (n *Network) admit(s *Slot) error {
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	e := &entry{slot: s, fresh: true}
	n.ruled[s.Index] = e
	delete(n.counted.slots, string(slotKey(s)))
	err := n.commitLocked(func() error { return n.rules.addSlot(e) }, nil)
	if err != nil {
		delete(n.ruled, s.Index)
	}
	return err
}

// expel takes a slot out of the table. One that is not in it is no error.
func (n *Network) expel(s *Slot) error {
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	e := n.ruled[s.Index]
	if e == nil {
		return nil
	}
	delete(n.ruled, s.Index)
	delete(n.counted.slots, string(slotKey(s)))
	err := n.commitLocked(func() error { return n.rules.removeSlot(e) }, nil)
	if err != nil {
		n.ruled[s.Index] = e
	}
	return err
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
	now, err := n.rules.sockets.generation()
	if err != nil {
		return false, err
	}
	found := ""
	if now != n.generation { // else nobody changed any rule of this host
		if found, err = n.differenceLocked(); err != nil {
			return false, err
		}
	}
	if found != "" {
		n.repairs++
		n.log.Warn("the rules were changed by somebody else; installing them anew", "table", n.rules.table.Name, "found", found)
		if err := n.installLocked(); err != nil {
			return false, err
		}
	} else {
		n.generation = now
	}
	return found != "", enableForwarding()
}

// differenceLocked says what is not as it should be, "" if all is.
//
// +checklocks:n.rulesMu
func (n *Network) differenceLocked() (string, error) {
	have, err := n.rules.shape()
	if isGone(err) {
		return "the table is gone", nil
	}
	if err != nil {
		return "", err
	}
	want := maps.Clone(n.shape)
	keys := map[*nftables.Set][][]byte{}
	for _, e := range n.ruled {
		maps.Copy(want, e.shape)
		for _, set := range e.memberOf(n.rules) {
			keys[set] = append(keys[set], slotKey(e.slot))
		}
		for _, f := range e.elements(n.rules) {
			for _, element := range f.elements {
				keys[f.set] = append(keys[f.set], element.Key)
			}
		}
	}
	if !maps.Equal(have, want) {
		return "chains, rules or sets differ", nil
	}
	for _, set := range n.rules.bySlot() {
		keys[set] = append(keys[set], nil...) // to be empty is to be looked at, too
	}
	for set, want := range keys {
		slices.SortFunc(want, bytes.Compare)
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

// bySlot are the sets with an element for each slot, or some.
func (t *table) bySlot() []*nftables.Set {
	return []*nftables.Set{t.slots, t.allowed, t.denied, t.policies, t.named}
}

// memberOf are those of bySlot that the entry's slot is in.
func (e *entry) memberOf(t *table) []*nftables.Set {
	out := []*nftables.Set{t.slots, t.allowed, t.denied}
	if e.ruling != nil {
		out = append(out, t.policies)
	}
	if t.decidesNames(e) {
		out = append(out, t.named)
	}
	return out
}

// owns names the chains and sets that are the entry's alone, as shape does.
func (e *entry) owns(t *table) []string {
	var out []string
	for _, name := range e.chains(t) {
		out = append(out, chainName(name))
	}
	for _, f := range e.elements(t) {
		out = append(out, setName(f.set.Name))
	}
	if t.decidesNames(e) && t.services.Proxy != 0 {
		out = append(out, setName(t.resolved(e.slot).Name))
	}
	return out
}

func chainName(name string) string { return "chain " + name }
func setName(name string) string   { return "set " + name }

// shape describes the whole table.
func (t *table) shape() (out shape, err error) {
	err = t.sockets.use(func(c *nftables.Conn) error {
		out, err = t.shapeBy(c)
		return err
	})
	return out, err
}

func (t *table) shapeBy(c *nftables.Conn) (shape, error) {
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
	never, err := t.keysBy(c, t.never)
	if err != nil {
		return nil, err
	}
	out[setName(t.never.Name)] = fmt.Sprintf("%x", never)
	return out, nil
}

// shapeOf describes what the entry owns.
func (t *table) shapeOf(e *entry) (shape, error) {
	out := shape{}
	for _, name := range e.owns(t) {
		out[name] = ""
	}
	err := t.sockets.use(func(c *nftables.Conn) (err error) {
		for _, name := range e.chains(t) {
			if out[chainName(name)], err = t.rulesOf(c, name, nftables.ChainType("")); err != nil {
				return err
			}
		}
		return nil
	})
	return out, err
}

// rulesOf adds the handles of a chain's rules to what is known of it.
func (t *table) rulesOf(c *nftables.Conn, name string, line ...any) (string, error) {
	rules, err := c.GetRules(t.table, t.regular(name))
	if err != nil {
		return "", fmt.Errorf("listing nftables rules of %s: %w", name, err)
	}
	for _, r := range rules {
		line = append(line, r.Handle)
	}
	return fmt.Sprintln(line...), nil
}

// generation numbers the state of all rules of the network namespace the host is:
// every transaction of anybody counts it up.
func (s *sockets) generation() (uint32, error) {
	answers, err := s.execute(netlink.Message{
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
	return 0, errors.New("reading the generation of the rules: the kernel does not say")
}

// keys lists the keys of a set in order. An end of an interval is a key too.
func (t *table) keys(set *nftables.Set) (out [][]byte, err error) {
	err = t.sockets.use(func(c *nftables.Conn) error {
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
			n.rulesMu.Lock()
			n.recountLocked()
			n.rulesMu.Unlock()
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
