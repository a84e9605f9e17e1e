package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/network"
	"github.com/cayhq/cay/internal/sandbox"
)

// policyOf returns a policy in the form of the packet filter. A policy without a mode, which no row
// has, is closed.
func policyOf(e sandbox.Egress) network.Policy {
	if e.Mode == sandbox.AllowAll {
		return network.Policy{Open: true}
	}
	return network.Policy{Allow: e.AllowCIDRs, Deny: e.DenyCIDRs, Ports: e.AllowPorts, Names: len(e.AllowDomains) > 0}
}

// applyPolicy puts the recorded policy in force. Before the first call nothing leaves the slot, and
// Guest knows no sandbox at its address.
func (b *instance) applyPolicy(ctx context.Context) error {
	n := b.node
	if err := n.net.SetPolicy(ctx, b.slot, policyOf(b.record.Shape.Egress)); err != nil {
		return fmt.Errorf("installing the policy of %s: %w", b.record.ID, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	b.policed = true
	n.guests[b.slot] = b
	return nil
}

// SetEgress implements sandbox.Node. It records the policy before it applies it: if the server dies
// in between, the next one applies what is recorded.
func (n *Node) SetEgress(ctx context.Context, id sandbox.ID, e sandbox.Egress) error {
	b := n.instance(id)
	if b == nil || b.slot == nil || b.dead() {
		return fault.New(fault.Conflict, fault.CodeSandboxNotRunning, "sandbox %s does not run on this machine", id)
	}
	before := b.record.Shape.Egress
	b.want(e)
	err := b.writeRecord()
	if err == nil {
		err = b.applyPolicy(ctx)
	}
	if err != nil {
		b.want(before)
		err = errors.Join(err, b.writeRecord())
	}
	n.policyChanged(b.slot)
	return err
}

func (n *Node) policyChanged(s *network.Slot) {
	if n.cfg.PolicyChanged != nil {
		n.cfg.PolicyChanged(s.Addr)
	}
}

// want records the policy as wanted. It holds node.mu, since other goroutines may read the policy.
func (b *instance) want(e sandbox.Egress) {
	b.node.mu.Lock()
	defer b.node.mu.Unlock()
	b.record.Shape.Egress = e
}

// policy returns the policy that Inspect reports: the recorded one, or the zero policy while that
// is not in force.
func (b *instance) policy() sandbox.Egress {
	b.node.mu.Lock()
	defer b.node.mu.Unlock()
	if !b.policed {
		return sandbox.Egress{}
	}
	return b.record.Shape.Egress
}

// Traffic implements sandbox.Node.
func (n *Node) Traffic(_ context.Context, id sandbox.ID) (sandbox.Traffic, error) {
	b := n.instance(id)
	if b == nil || b.slot == nil || b.dead() {
		return sandbox.Traffic{}, fault.New(fault.Conflict, fault.CodeSandboxNotRunning,
			"sandbox %s does not run on this machine", id)
	}
	c, err := n.net.Counters(b.slot)
	if err != nil {
		return sandbox.Traffic{}, err
	}
	return sandbox.Traffic{PacketsAllowed: c.AllowedPackets, BytesAllowed: c.AllowedBytes,
		PacketsDenied: c.DeniedPackets, BytesDenied: c.DeniedBytes}, nil
}

// Denied implements sandbox.Node.
func (n *Node) Denied() <-chan sandbox.Denial { return n.denials }

// denialsHeld is the number of denials that wait for their reader; more are dropped. The rules
// report a few each second.
const denialsHeld = 256

// Deny reports traffic that something other than the rules kept from leaving a sandbox. It never
// blocks, since a sandbox can cause any number of denials.
func (n *Node) Deny(d sandbox.Denial) {
	select {
	case n.denials <- d:
	default:
	}
}

// reportDenials forwards the denials that the rules report.
func (n *Node) reportDenials() {
	for {
		select {
		case <-n.ctx.Done():
			return
		case d := <-n.net.Denials():
			n.mu.Lock()
			b := n.guests[d.Slot]
			n.mu.Unlock()
			if b != nil {
				n.Deny(sandbox.Denial{ID: b.record.ID, Protocol: d.Protocol, Destination: d.Destination,
					Count: d.Count, Excess: d.Excess})
			}
		}
	}
}

// Guest describes the sandbox that has a slot, for decisions that the rules do not make.
type Guest struct {
	ID     sandbox.ID
	Org    string // "" if it is not known
	Slot   *network.Slot
	Egress sandbox.Egress
}

// Guest returns the sandbox whose packets come from an address, and false if there is none. The
// policy that it returns may be in force only a moment later.
func (n *Node) Guest(from netip.Addr) (Guest, bool) {
	slot, ok := n.net.SlotOf(from)
	if !ok {
		return Guest{}, false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	b := n.guests[slot]
	if b == nil {
		return Guest{}, false
	}
	return Guest{b.record.ID, b.record.Org, slot, b.record.Shape.Egress}, true
}
