package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Action is what has to be done so that a row and the host agree again.
type Action string

// The actions.
const (
	Leave   Action = "leave"   // they agree
	Adopt   Action = "adopt"   // it runs: set its timers
	Remove  Action = "remove"  // the host has what no living row owns
	Abandon Action = "abandon" // a start that a crash interrupted: clean up, failed
	Lose    Action = "lose"    // its processes are gone: clean up, destroyed with reason lost
	Finish  Action = "finish"  // a destroy that a crash interrupted: do it again
	Rest    Action = "rest"    // clean the host, suspended with the checkpoint it has
	Resume  Action = "resume"  // a suspend that a crash interrupted before it took: running
)

// Decide is the whole of what cay makes of a crash: a pure function of a row (nil if
// there is none) and of what the host has (nil if nothing). Nobody may be at work
// on the sandbox.
func Decide(row *Sandbox, fact *Fact) Action {
	if row == nil {
		if fact == nil {
			return Leave
		}
		return Remove
	}
	alive := fact != nil && fact.Alive && fact.Run == row.Run
	switch row.State {
	case Creating:
		return Abandon
	case Running:
		if alive {
			return Adopt
		}
		return Lose
	case Suspending:
		if alive {
			return Resume
		}
		return Lose
	case Waking:
		return Rest
	case Destroying:
		return Finish
	default: // suspended, destroyed, failed: they own nothing that runs
		if fact != nil {
			return Remove
		}
		return Leave
	}
}

// Reconcile makes rows and host agree. It skips sandboxes that somebody works on.
// It goes on after errors and joins them.
func (s *Service) Reconcile(ctx context.Context) error {
	// Facts first: a sandbox that is made in between has a row by the time the rows
	// are read, one that goes in between has none.
	facts, err := s.node.List(ctx)
	if err != nil {
		return fmt.Errorf("listing what the machine has: %w", err)
	}
	rows, err := s.store.Unfinished(ctx)
	if err != nil {
		return fmt.Errorf("listing unfinished sandboxes: %w", err)
	}
	byID := make(map[ID]*Fact, len(facts))
	for i := range facts {
		byID[facts[i].ID] = &facts[i]
	}
	var errs []error
	for i := range rows {
		row := &rows[i]
		fact := byID[row.ID]
		delete(byID, row.ID)
		errs = append(errs, s.apply(ctx, row.ID, row, fact, Decide(row, fact)))
	}
	for id, fact := range byID {
		errs = append(errs, s.apply(ctx, id, nil, fact, Decide(nil, fact)))
	}
	return errors.Join(errs...)
}

func (s *Service) apply(ctx context.Context, id ID, row *Sandbox, fact *Fact, a Action) error {
	if s.busy(id) || a == Leave {
		return nil
	}
	if a != Adopt {
		s.log.WarnContext(ctx, "reconciling", "sandbox", id, "action", a)
	}
	switch a {
	case Adopt:
		s.mu.Lock()
		armed := s.timers[id] != nil
		s.mu.Unlock()
		if !armed {
			s.arm(*row)
		}
		return nil
	case Lose:
		return s.destroy(ctx, id, row.Run, Lost)
	case Finish:
		return s.destroy(ctx, id, row.Run, row.DestroyReason)
	}
	op := s.begin(id, opDestroy)
	if op == nil {
		return nil
	}
	err := s.settle(ctx, id, row, a)
	s.finish(id, op, Sandbox{}, err)
	return err
}

// settle carries out the actions that are neither a destroy nor an adoption.
func (s *Service) settle(ctx context.Context, id ID, row *Sandbox, a Action) error {
	if row != nil {
		// Somebody may have finished with it since it was read.
		now, err := s.store.Get(ctx, id)
		if err != nil {
			return err
		}
		if now.State != row.State || now.Run != row.Run {
			return nil
		}
	}
	if a == Resume {
		_, err := s.transition(ctx, Change{ID: id, From: []State{Suspending}, To: Running, At: time.Now().UTC(), Reason: "interrupted"})
		return err
	}
	if err := s.node.Destroy(ctx, id); err != nil {
		return fmt.Errorf("clearing what is left of %s: %w", id, err)
	}
	switch a {
	case Abandon:
		return s.fail(ctx, *row, BootFailed, "the server stopped while the sandbox was being created")
	case Rest:
		_, err := s.transition(ctx, Change{ID: id, From: []State{Waking}, To: Suspended, At: time.Now().UTC(), Reason: "interrupted"})
		return err
	default: // Remove
		return nil
	}
}
