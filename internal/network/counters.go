package network

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// Counters count a slot's traffic that left and that was refused. They count neither incoming
// answers nor requests to the metadata service.
type Counters struct {
	AllowedPackets, AllowedBytes uint64
	DeniedPackets, DeniedBytes   uint64
}

// The names of the counters of all slots, past ones included.
const (
	totalAllowed = "allowed_total"
	totalDenied  = "denied_total"
)

// counts holds all counters of the table; the keys of slots are slotKeys.
type counts struct {
	slots  map[string]Counters
	total  Counters
	excess uint64 // packets beyond the limits of Flows
}

// tally is one counter. A slot's counter in the kernel always begins at 0, so the comment of a
// new element says what was counted before it.
type tally struct{ packets, bytes uint64 }

const tallyForm = "before: %d packets %d bytes"

func (t tally) comment() string {
	if t == (tally{}) {
		return ""
	}
	return fmt.Sprintf(tallyForm, t.packets, t.bytes)
}

func tallyOf(e nftables.SetElement) tally {
	var out tally
	// Without a comment, or with another program's, nothing was counted before.
	if _, err := fmt.Sscanf(e.Comment, tallyForm, &out.packets, &out.bytes); err != nil {
		out = tally{}
	}
	if e.Counter != nil {
		out.packets += e.Counter.Packets
		out.bytes += e.Counter.Bytes
	}
	return out
}

func (t *table) addTotals(c *nftables.Conn, was counts) {
	add := func(name string, packets, bytes uint64) {
		c.AddObj(&nftables.NamedObj{Table: t.table, Name: name, Type: nftables.ObjTypeCounter,
			Obj: &expr.Counter{Packets: packets, Bytes: bytes}})
	}
	add(totalAllowed, was.total.AllowedPackets, was.total.AllowedBytes)
	add(totalDenied, was.total.DeniedPackets, was.total.DeniedBytes)
	add(totalExcess, was.excess, 0)
}

// count reads all counters.
func (t *table) count() (out counts, err error) {
	err = t.sockets.list(func(c *nftables.Conn) error {
		out, err = t.countBy(c)
		return err
	})
	return out, err
}

func (t *table) countBy(c *nftables.Conn) (_ counts, err error) {
	out := counts{slots: map[string]Counters{}}
	if out.total, out.excess, err = t.totals(c); err != nil {
		return counts{}, err
	}
	for _, set := range []*nftables.Set{t.allowed, t.denied} {
		elements, err := c.GetSetElements(set)
		if err != nil {
			return counts{}, fmt.Errorf("listing nftables set %s: %w", set.Name, err)
		}
		for _, e := range elements {
			now, sum := out.slots[string(e.Key)], tallyOf(e)
			if set == t.allowed {
				now.AllowedPackets, now.AllowedBytes = sum.packets, sum.bytes
			} else {
				now.DeniedPackets, now.DeniedBytes = sum.packets, sum.bytes
			}
			out.slots[string(e.Key)] = now
		}
	}
	return out, nil
}

func (t *table) totals(c *nftables.Conn) (_ Counters, excess uint64, err error) {
	var sums [3]expr.Counter
	for i, name := range []string{totalAllowed, totalDenied, totalExcess} {
		o, err := c.GetObject(&nftables.NamedObj{Table: t.table, Name: name, Type: nftables.ObjTypeCounter})
		if err != nil {
			return Counters{}, 0, fmt.Errorf("reading nftables counter %s: %w", name, err)
		}
		if o, ok := o.(*nftables.NamedObj); ok {
			if counter, ok := o.Obj.(*expr.Counter); ok {
				sums[i] = *counter
			}
		}
	}
	return Counters{sums[0].Packets, sums[0].Bytes, sums[1].Packets, sums[1].Bytes}, sums[2].Packets, nil
}

// recount records the counters, so that a new table continues from them. Counters that cannot be
// read stay as they were.
func (n *Network) recount() {
	now, err := n.rules.count()
	if err != nil {
		return
	}
	n.rulesMu.Lock()
	defer n.rulesMu.Unlock()
	n.counted = now
}

// Counters returns a slot's counters. They live as long as the slot, also across restarts. If
// another program removes the rules, the counts of the last seconds are lost.
func (n *Network) Counters(s *Slot) (Counters, error) {
	if _, err := n.rulesOf(s); err != nil {
		return Counters{}, err
	}
	allowed, _, err := n.rules.element(n.rules.allowed, s)
	if err != nil {
		return Counters{}, err
	}
	denied, _, err := n.rules.element(n.rules.denied, s)
	if err != nil {
		return Counters{}, err
	}
	a, d := tallyOf(allowed), tallyOf(denied)
	return Counters{a.packets, a.bytes, d.packets, d.bytes}, nil
}

// Totals returns the sums over all slots, past ones included. Excess counts the denied packets
// that were over the limits of [Flows].
func (n *Network) Totals() (total Counters, excess uint64, err error) {
	err = n.rules.sockets.list(func(c *nftables.Conn) error {
		total, excess, err = n.rules.totals(c)
		return err
	})
	return total, excess, err
}
