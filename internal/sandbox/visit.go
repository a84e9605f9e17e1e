package sandbox

import (
	"context"
	"slices"
)

// MaxPublicPorts is how many ports of a sandbox may be public: more than anybody serves,
// and few enough to be read at once.
const MaxPublicPorts = 100

// SetPublicPort says whether anybody may reach a port of a sandbox, or only who has a key
// or a signature. It is no activity and wakes nobody. A sandbox that is destroyed is Conflict,
// code "sandbox_not_running"; so are more than [MaxPublicPorts], code "too_many_public_ports".
func (s *Service) SetPublicPort(ctx context.Context, orgID string, id ID, port int, public bool) error {
	box, err := s.Get(ctx, orgID, id)
	if err != nil {
		return err
	}
	if box.State == Destroying || box.State.Over() {
		return notRunning(box)
	}
	return s.store.SetPublicPort(ctx, id, port, public)
}

// PublicPorts lists the public ports of a sandbox, lowest first.
func (s *Service) PublicPorts(ctx context.Context, orgID string, id ID) ([]int, error) {
	if _, err := s.Get(ctx, orgID, id); err != nil {
		return nil, err
	}
	return s.store.PublicPorts(ctx, id)
}

// Visit is for who comes to a port without a key: it says whose the sandbox is and whether
// the port is public. What that allows, the caller decides. NotFound if there is no such sandbox.
func (s *Service) Visit(ctx context.Context, id ID, port int) (orgID string, public bool, err error) {
	if !id.Valid() {
		return "", false, notFound(id)
	}
	box, err := s.store.Get(ctx, id)
	if err != nil {
		return "", false, err
	}
	ports, err := s.store.PublicPorts(ctx, id)
	return box.OrgID, slices.Contains(ports, port), err
}
