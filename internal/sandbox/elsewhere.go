package sandbox

import (
	"context"

	"github.com/cayhq/cay/internal/fault"
)

// elsewhere returns the error for a call about something that another node holds, which alone can do it.
func elsewhere(what string, h Holder) error {
	return fault.New(fault.Unavailable, fault.CodeElsewhere, "%s is on another machine than this server", what).On(h.Node)
}

// held returns elsewhere's error if another node holds the sandbox. No node has anything of one that is over.
func (s *Service) held(sbx Sandbox) error {
	if sbx.Holder.Node != s.cfg.Node && !sbx.State.Over() {
		return elsewhere("sandbox "+string(sbx.ID), sbx.Holder)
	}
	return nil
}

// getHeld returns a sandbox of the organization that this node holds. Other errors than those of Get are Unavailable,
// code "elsewhere", with the node that holds it.
func (s *Service) getHeld(ctx context.Context, orgID string, id ID) (Sandbox, error) {
	sbx, err := s.Get(ctx, orgID, id)
	if err == nil {
		err = s.held(sbx)
	}
	return sbx, err
}
