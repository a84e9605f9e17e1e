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
		_, err := s.store.EndLost(ctx, id, Lost, time.Now().UTC())
		if errs = append(errs, err); ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

// destroyElsewhere destroys a sandbox of another node if that node is lost. Otherwise the node has to.
func (s *Service) destroyElsewhere(ctx context.Context, sbx Sandbox) error {
	ended, err := s.store.EndLost(ctx, sbx.ID, Requested, time.Now().UTC())
	if err == nil && !ended {
		err = s.held(sbx)
	}
	return err
}
