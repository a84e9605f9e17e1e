package nodetest

import (
	"context"
	"errors"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// Prepare implements sandbox.Node.
func (n *Fake) Prepare(ctx context.Context, spec sandbox.Spec) error {
	if err := called(ctx, n, "prepare", spec.ID, spec, n.OnPrepare); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	h, err := n.made(spec, true)
	if err != nil {
		return err
	}
	if !spec.Start.None() {
		h.Egress = spec.Egress
	}
	h.Warm, h.token = true, spec.Token
	n.sandboxes[spec.ID] = h
	return nil
}

// Claim implements sandbox.Node.
func (n *Fake) Claim(ctx context.Context, spec sandbox.Spec) error {
	n.mu.Lock()
	h := n.sandboxes[spec.ID]
	if !h.Warm || h.Run != spec.Run || h.token != "" && h.token != spec.Token {
		n.mu.Unlock()
		return fault.New(fault.Conflict, fault.CodeNoPooled, "there is no pooled sandbox %s", spec.ID)
	}
	h.Warm = false
	n.sandboxes[spec.ID] = h
	n.mu.Unlock()
	err := called(ctx, n, "claim", spec.ID, spec, n.OnClaim)
	n.mu.Lock()
	defer n.mu.Unlock()
	if err == nil && !n.sandboxes[spec.ID].Alive {
		err = errors.New("the pooled sandbox is dead")
	}
	if err != nil {
		if ctx.Err() == nil { // else there was no time to, or nothing is left to do it
			delete(n.sandboxes, spec.ID)
		}
		return err
	}
	h.Egress, h.now.env, h.now.workdir = spec.Egress, spec.Env, spec.Workdir
	n.sandboxes[spec.ID] = h
	return nil
}
