package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// Action is what has to be done so that a row and the host agree again.
type Action string

// The actions. Those that clean the host leave the recovery point where it is, except
// Remove, Abandon, Lose and Finish.
const (
	Leave   Action = "leave"   // they agree
	Adopt   Action = "adopt"   // it runs: make it usable, set its timers
	Remove  Action = "remove"  // the host has what no living row owns
	Abandon Action = "abandon" // a start that a crash interrupted: clean up, failed
	Lose    Action = "lose"    // its processes are gone and there is no recovery point: clean up, destroyed with reason lost
	Fall    Action = "fall"    // its processes are gone: clean the host, suspended at its recovery point
	Finish  Action = "finish"  // a destroy that a crash interrupted: do it again
	Rest    Action = "rest"    // a suspend or a wake that a crash interrupted: clean the host, suspended
	Clear   Action = "clear"   // suspended already, with something of a life left: clean the host
	Resume  Action = "resume"  // a suspend that did not take: running
	Keep    Action = "keep"    // a member of the pool that can be claimed
	Discard Action = "discard" // a member of the pool that cannot: clean the host, drop its row
)

// Decide is the whole of what cay makes of a crash, and of a suspend or a wake that
// failed: a pure function of a row, of a row of the pool (each nil if there is none) and
// of what the host has (nil if nothing). Nobody else may be at work on the sandbox. A
// sandbox's row goes before one of the pool: the claim that wrote it took that.
func Decide(row *Sandbox, member *Member, fact *Fact) Action {
	switch {
	case row != nil:
	case member != nil:
		if fact != nil && fact.Alive && fact.Warm && fact.Run == member.Run {
			return Keep
		}
		return Discard // dead, made by another cay, or claimed for a sandbox that was never told to anybody
	case fact == nil:
		return Leave
	default:
		return Remove
	}
	alive := fact != nil && fact.Alive && fact.Run == row.Run && !fact.Warm
	point := fact != nil && fact.Point != nil
	switch row.State {
	case Creating:
		return Abandon
	case Running:
		switch {
		case alive:
			return Adopt
		case point:
			return Fall
		}
		return Lose
	case Suspending:
		switch {
		case alive:
			return Resume
		case point:
			return Rest
		}
		return Lose
	case Suspended:
		if fact != nil && fact.Remains {
			return Clear
		}
		return Leave // also without a point: to wake it says why not, to destroy it is up to the user
	case Waking:
		return Rest // what was woken has not been used by anybody
	case Destroying:
		return Finish
	default: // destroyed, failed: they own nothing
		if fact != nil {
			return Remove
		}
		return Leave
	}
}

// Reconcile makes rows and host agree. It skips sandboxes that somebody works on.
// It goes on after errors and joins them.
func (s *Service) Reconcile(ctx context.Context) error {
	facts, err := s.node.List(ctx)
	if err != nil {
		return fmt.Errorf("listing what the machine has: %w", err)
	}
	rows, err := s.store.Unfinished(ctx)
	if err != nil {
		return fmt.Errorf("listing unfinished sandboxes: %w", err)
	}
	members, err := s.store.Members(ctx)
	if err != nil {
		return fmt.Errorf("listing the pool: %w", err)
	}
	byID := make(map[ID]*Fact, len(facts))
	for i := range facts {
		byID[facts[i].ID] = &facts[i]
	}
	var errs []error
	for i := range rows {
		row := &rows[i]
		fact := byID[row.ID]
		a := Decide(row, nil, fact)
		delete(byID, row.ID)
		if a == Leave || a == Adopt && s.tracked(*row) && fact.Egress.Equal(row.Egress) {
			continue
		}
		errs = append(errs, s.lookAfter(row.ID))
	}
	for i := range members {
		m := &members[i]
		a := Decide(nil, m, byID[m.ID])
		delete(byID, m.ID)
		if a != Keep || !s.pool.has(m.ID) {
			errs = append(errs, s.lookAfter(m.ID))
		}
	}
	for id := range byID {
		errs = append(errs, s.lookAfter(id))
	}
	errs = append(errs, s.reconcileSnapshots(ctx))
	return errors.Join(errs...)
}

// lookAfter settles a sandbox, unless somebody works on it.
func (s *Service) lookAfter(id ID) error {
	op, mine := s.begin(id, opSettle)
	if !mine {
		return nil
	}
	err := s.settle(op.ctx, id, note{reason: reasonInterrupted})
	s.finish(id, op, Sandbox{}, err)
	return err
}

// note is what is written down with what [Service.settle] does.
type note struct {
	reason, detail string  // of the event
	hinders        *string // the row's Error, if a wake failed by the sandbox's own fault
}

// settle makes one sandbox's row and the host agree; the caller holds the operation,
// so that neither changes meanwhile.
func (s *Service) settle(ctx context.Context, id ID, why note) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	var row *Sandbox
	box, err := s.store.Get(ctx, id)
	switch {
	case err == nil:
		row = &box
	case !fault.Is(err, fault.NotFound):
		return err
	}
	var member *Member
	if row == nil {
		if member, err = s.member(ctx, id); err != nil {
			return err
		}
	}
	fact, err := s.node.Inspect(ctx, id)
	if err != nil {
		return fmt.Errorf("looking at what the machine has of %s: %w", id, err)
	}
	a := Decide(row, member, fact)
	if a != Leave && a != Adopt && a != Keep {
		s.log.WarnContext(ctx, "reconciling", "sandbox", id, "action", a)
	}
	switch a {
	case Leave:
		return nil
	case Adopt:
		return s.adopt(ctx, *row, fact)
	case Resume:
		return s.resume(ctx, *row, fact, why)
	case Fall, Rest, Clear:
		return s.rest(ctx, *row, fact, a, why)
	case Lose:
		return s.takeApart(ctx, id, row.Run, Lost, func() {})
	case Finish:
		return s.takeApart(ctx, id, row.Run, row.DestroyReason, func() {})
	case Keep:
		return s.keep(ctx, *member)
	case Discard:
		return s.discard(ctx, id)
	}
	if err := s.node.Destroy(ctx, id); err != nil {
		return fmt.Errorf("clearing what is left of %s: %w", id, err)
	}
	if a == Abandon {
		return s.fail(ctx, *row, BootFailed, "the server stopped while the sandbox was being created")
	}
	return nil // Remove
}

// adopt makes a sandbox usable that was running before this server, under the policy
// of its row: a change of it may have been interrupted.
func (s *Service) adopt(ctx context.Context, row Sandbox, fact *Fact) error {
	if !fact.Egress.Equal(row.Egress) {
		s.log.WarnContext(ctx, "a sandbox has another policy than it should", "sandbox", row.ID)
		if err := s.node.SetEgress(ctx, row.ID, row.Egress); err != nil {
			return fmt.Errorf("giving %s the policy of its row: %w", row.ID, err)
		}
	}
	if s.tracked(row) {
		return nil
	}
	l := newLife(row)
	if fact.Point != nil {
		l.looked = fact.Point.At
	}
	s.track(l)
	return nil
}

// resume takes a sandbox whose suspend did not take back to running, where its timer
// leaves it alone for a while.
func (s *Service) resume(ctx context.Context, row Sandbox, fact *Fact, why note) error {
	now := time.Now().UTC()
	running, err := s.transition(ctx, Change{ID: row.ID, From: []State{Suspending}, Run: row.Run, To: Running, At: now,
		Reason: why.reason, Detail: why.detail})
	if err != nil {
		return err
	}
	l := newLife(running)
	l.after = now.Add(retryAfter)
	if fact.Point != nil {
		l.looked = fact.Point.At
	}
	s.track(l)
	return nil
}

// rest clears the host of a sandbox but for its recovery point, and makes its row
// suspended. When the host cannot be cleared the row stays as it is.
func (s *Service) rest(ctx context.Context, row Sandbox, fact *Fact, a Action, why note) error {
	last := s.untrack(row.ID)
	if err := s.node.Rest(ctx, row.ID); err != nil {
		return fmt.Errorf("clearing what is left of %s: %w", row.ID, err)
	}
	if a == Clear {
		return nil
	}
	c := Change{ID: row.ID, From: []State{row.State}, Run: row.Run, To: Suspended, At: time.Now().UTC(),
		Reason: why.reason, Detail: why.detail, Error: why.hinders, ExpiresAt: new(time.Time)}
	if row.State != Waking { // it comes from a life that was used
		c.SuspendedAt, c.LastActivityAt = &fact.Point.At, last
		at := fact.Point.At.UTC().Format(time.RFC3339)
		c.Detail = "is at its recovery point of " + at
		if a == Fall || fact.Point.At.Before(row.LastActivityAt) {
			c.Detail = "fell back to the recovery point of " + at
		}
		if a == Fall {
			c.Reason = string(Lost)
		}
	}
	_, err := s.transition(ctx, c)
	return err
}

// present reads the row for whoever holds the operation. A claim that nobody works on,
// and a running sandbox that nobody has adopted, are settled first.
func (s *Service) present(ctx context.Context, id ID) (Sandbox, error) {
	box, err := s.store.Get(ctx, id)
	if err != nil || !box.State.Claim() && (box.State != Running || s.tracked(box)) {
		return box, err
	}
	if err := s.settle(ctx, id, note{reason: reasonInterrupted}); err != nil {
		return Sandbox{}, err
	}
	return s.store.Get(ctx, id)
}
