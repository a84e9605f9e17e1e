package cay

import (
	"context"
	"time"
)

// ListNodes returns the machines that have sandboxes, by name. It needs a key of the server's first organization with
// the scope admin, as all calls about nodes do.
func (c *Client) ListNodes(ctx context.Context) ([]Node, error) {
	l, err := decode[nodeList](c.wire.ListNodes(ctx))
	if err != nil {
		return nil, err
	}
	return l.Nodes, nil
}

// GetNode returns a node by its name or id.
func (c *Client) GetNode(ctx context.Context, node string) (*Node, error) {
	return decode[Node](c.wire.GetNode(ctx, node))
}

// CordonNode makes a node take no more sandboxes. Sandboxes that are on it run on. It is safe to repeat.
func (c *Client) CordonNode(ctx context.Context, node string) (*Node, error) {
	return decode[Node](c.wire.CordonNode(ctx, node))
}

// UncordonNode makes a node take sandboxes again, and ends its drain. It is safe to repeat.
func (c *Client) UncordonNode(ctx context.Context, node string) (*Node, error) {
	return decode[Node](c.wire.UncordonNode(ctx, node))
}

// DrainNode cordons a node and has its persistent sandboxes suspended, each when no call uses it. It waits for nothing:
// the node's status becomes [NodeStatusDrained] when every sandbox on it is suspended or has ended. Sandboxes that are
// left after the timeout run on; 0 is the server's default, an hour.
func (c *Client) DrainNode(ctx context.Context, node string, timeout time.Duration) (*Node, error) {
	var r drainNodeRequest
	if timeout != 0 {
		r.Timeout = new(timeout.String())
	}
	return decode[Node](c.wire.DrainNode(ctx, node, r))
}

// CreateNodeToken makes a token with which one machine can join the cluster, once.
func (c *Client) CreateNodeToken(ctx context.Context, r CreateNodeTokenRequest) (*NodeToken, error) {
	return decode[NodeToken](c.wire.CreateNodeToken(ctx, r))
}

// RemoveNode removes a machine from the cluster, which must have no sandboxes and no snapshots.
func (c *Client) RemoveNode(ctx context.Context, node string) error {
	return done(c.wire.RemoveNode(ctx, node))
}
