package nodetest

import (
	"context"

	"github.com/cayhq/cay/internal/sandbox"
)

// SetEgress implements sandbox.Node.
func (n *Fake) SetEgress(ctx context.Context, id sandbox.ID, e sandbox.Egress) error {
	if err := called(ctx, n, "egress", id, id, n.OnSetEgress); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	h, err := n.running(id)
	if err != nil {
		return err
	}
	h.Egress = e
	n.sandboxes[id] = h
	return nil
}

// Traffic implements sandbox.Node. Each run begins with some traffic.
func (n *Fake) Traffic(_ context.Context, id sandbox.ID) (sandbox.Traffic, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	h, err := n.running(id)
	if err != nil {
		return sandbox.Traffic{}, err
	}
	t := h.traffic
	t.PacketsAllowed += 4
	t.BytesAllowed += 4096
	t.PacketsDenied++
	t.BytesDenied += 60
	return t, nil
}

// Denied implements sandbox.Node.
func (n *Fake) Denied() <-chan sandbox.Denial { return n.denied }

// Deny reports a connection that a policy refused, and returns when the report was taken.
func (n *Fake) Deny(d sandbox.Denial) { n.denied <- d }
