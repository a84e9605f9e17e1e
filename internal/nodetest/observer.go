package nodetest

import (
	"context"

	"github.com/cayhq/cay/internal/sandbox"
)

// Inspect implements sandbox.Node.
func (n *Fake) Inspect(ctx context.Context, id sandbox.ID) (*sandbox.Observed, error) {
	if n.OnInspect != nil {
		if err := n.OnInspect(ctx, id); err != nil {
			return nil, err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if h, there := n.sandboxes[id]; there {
		return &h.Observed, nil
	}
	return nil, nil
}

// List implements sandbox.Node.
func (n *Fake) List(context.Context) ([]sandbox.Observed, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var found []sandbox.Observed
	for _, h := range n.sandboxes {
		found = append(found, h.Observed)
	}
	return found, nil
}

// Lost implements sandbox.Node.
func (n *Fake) Lost() <-chan sandbox.Observed { return n.lost }
