package sandbox

import (
	"context"
	"time"
)

// About describes a sandbox to the programs in it. It holds no secret.
type About struct {
	ID        ID
	Template  string // name
	Mode      Mode
	Metadata  map[string]string // must not be changed
	ExpiresAt time.Time         // ephemeral only; zero while it is suspended
}

func (b Sandbox) about() About { return About{b.ID, b.Template, b.Mode, b.Metadata, b.ExpiresAt} }

// About returns the description of a sandbox of any organization. It has every change that was
// answered before the call. While the sandbox may be used the description comes from memory, so that
// it does not depend on the store. About counts as no activity. It returns NotFound if there is no
// such sandbox.
func (s *Service) About(ctx context.Context, id ID) (About, error) {
	about, seen, known := s.live.about(id)
	if known {
		return about, nil
	}
	sbx, err := s.store.Get(ctx, id)
	if err != nil {
		return About{}, err
	}
	s.live.learn(sbx, seen)
	return sbx.about(), nil
}
