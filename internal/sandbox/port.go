package sandbox

import (
	"context"
	"slices"
)

// MaxPublicPorts limits the public ports of a sandbox. It exceeds what a user serves and is low
// enough to read all ports at once. A higher value makes that read larger.
const MaxPublicPorts = 100

// SetPublicPort makes a port of a sandbox public, so that it can be reached without a key or a
// signature, or takes that back. It counts as no activity and wakes no sandbox. It returns a
// Conflict with code "sandbox_not_running" for a destroyed sandbox, and with code
// "too_many_public_ports" above [MaxPublicPorts].
func (s *Service) SetPublicPort(ctx context.Context, orgID string, id ID, port int, public bool) error {
	sbx, err := s.Get(ctx, orgID, id)
	if err != nil {
		return err
	}
	if sbx.State.Status() == StatusDestroyed {
		return notRunning(sbx)
	}
	return s.store.SetPublicPort(ctx, id, port, public)
}

// PublicPorts returns the public ports of a sandbox, lowest first.
func (s *Service) PublicPorts(ctx context.Context, orgID string, id ID) ([]int, error) {
	if _, err := s.Get(ctx, orgID, id); err != nil {
		return nil, err
	}
	return s.store.PublicPorts(ctx, id)
}

// GetPort returns the owner of a sandbox and reports whether the port is public, for a request
// without a key. The caller decides what that allows. GetPort returns NotFound if there is no such
// sandbox.
func (s *Service) GetPort(ctx context.Context, id ID, port int) (orgID string, public bool, err error) {
	if !id.Valid() {
		return "", false, notFound(id)
	}
	sbx, err := s.store.Get(ctx, id)
	if err != nil {
		return "", false, err
	}
	ports, err := s.store.PublicPorts(ctx, id)
	return sbx.OrgID, slices.Contains(ports, port), err
}
