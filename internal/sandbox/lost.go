package sandbox

import (
	"context"
	"errors"
	"time"
)

// EndLost ends the sandboxes of a lost node that end with it: those that were being made or removed, and ephemeral ones
// that run, with the reason [Lost]. Persistent and suspended ones stay as they are until the node is back, or until
// their owner destroys them. It continues after errors and joins them, and is safe to repeat.
func (s *Service) EndLost(ctx context.Context, node string) error {
	ids, err := s.store.LostSandboxes(ctx, node)
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range ids {
		_, err := s.endLost(ctx, id, Lost)
		if errs = append(errs, err); ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

// endLost ends a sandbox if its node is lost, and reports whether the node is.
func (s *Service) endLost(ctx context.Context, id ID, why Reason) (lost bool, err error) {
	now := time.Now().UTC()
	before, lost, err := s.store.EndLost(ctx, id, why, now)
	if err != nil || !lost || before.State.Over() {
		return lost, err
	}
	ends := Event{SandboxID: id, At: now, From: before.State, To: Destroyed, Reason: string(why)}
	if before.State == Creating {
		ends.To = Failed
	}
	s.announce(ctx, ends)
	return true, nil
}

// destroyElsewhere destroys a sandbox of another node if that node is lost. Otherwise the node has to.
func (s *Service) destroyElsewhere(ctx context.Context, sbx Sandbox) error {
	lost, err := s.endLost(ctx, sbx.ID, Requested)
	if err == nil && !lost {
		err = s.held(sbx)
	}
	return err
}
