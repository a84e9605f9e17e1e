package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// Action names the work that makes a row and the host agree again.
type Action string

// The actions. Those that clean the host keep the recovery point, except Remove, Abandon, Lose and
// Finish.
const (
	Leave   Action = "leave"   // row and host agree
	Adopt   Action = "adopt"   // it runs: make it usable and set its timers
	Remove  Action = "remove"  // no living row owns what the host has
	Abandon Action = "abandon" // a crash interrupted the start: clean up, failed
	Lose    Action = "lose"    // processes gone, no recovery point: clean up, destroyed as lost
	Fall    Action = "fall"    // processes gone: clean the host, suspended at its recovery point
	Finish  Action = "finish"  // a crash interrupted the destroy: repeat it
	Rest    Action = "rest"    // a crash interrupted a suspend or a wake: clean the host, suspended
	Clear   Action = "clear"   // suspended, with leftovers of an instance: clean the host
	Resume  Action = "resume"  // a failed suspend: running
	Keep    Action = "keep"    // a pooled sandbox that can be claimed
	Discard Action = "discard" // another pooled sandbox: clean the host, drop its row
)

// Decide returns the action that settles a sandbox after a crash, or after a failed suspend or
// wake. It is a pure function of the sandbox's row, of the pool's row (each nil if missing) and of
// what the host has (nil if nothing). No operation on the sandbox may be under way. A sandbox's row
// takes precedence over a pool's row, because the claim that wrote it removed the other.
func Decide(row *Sandbox, pooledRow *Pooled, observed *Observed) Action {
	switch {
	case row != nil:
	case pooledRow != nil:
		if observed != nil && observed.Alive && observed.Warm && observed.Run == pooledRow.Run {
			return Keep
		}
		return Discard // dead, prepared by another version of cay, or claimed for a sandbox that no caller knows
	case observed == nil:
		return Leave
	default:
		return Remove
	}
	alive := observed != nil && observed.Alive && observed.Run == row.Run && !observed.Warm
	checkpoint := observed != nil && observed.Checkpoint != nil
	switch row.State {
	case Creating:
		return Abandon
	case Running:
		switch {
		case alive:
			return Adopt
		case checkpoint:
			return Fall
		}
		return Lose
	case Suspending:
		switch {
		case alive:
			return Resume
		case checkpoint:
			return Rest
		}
		return Lose
	case Suspended:
		if observed != nil && observed.Remains {
			return Clear
		}
		return Leave // even without a checkpoint: a wake reports that, and the user may destroy it
	case Waking:
		return Rest // the woken instance has not been used
	case Destroying:
		return Finish
	default: // destroyed and failed sandboxes own nothing
		if observed != nil {
			return Remove
		}
		return Leave
	}
}

// Reconcile makes the rows of this node and the host agree. It leaves what the host has of another node's sandbox,
// since that may be all that is left of the sandbox. Reconcile skips sandboxes with an operation under way. It
// continues after errors and joins them.
func (s *Service) Reconcile(ctx context.Context) error {
	found, err := s.node.List(ctx)
	if err != nil {
		return fmt.Errorf("listing the machine's sandboxes: %w", err)
	}
	rows, err := s.store.Unfinished(ctx)
	if err != nil {
		return fmt.Errorf("listing unfinished sandboxes: %w", err)
	}
	pooled, err := s.store.ListPooled(ctx)
	if err != nil {
		return fmt.Errorf("listing the pool: %w", err)
	}
	byID := make(map[ID]*Observed, len(found))
	for i := range found {
		byID[found[i].ID] = &found[i]
	}
	var errs []error
	for i := range rows {
		row := &rows[i]
		observed := byID[row.ID]
		a := Decide(row, nil, observed)
		delete(byID, row.ID)
		if a == Leave || a == Adopt && s.live.tracked(*row) && observed.Egress.Equal(row.Egress) {
			continue
		}
		errs = append(errs, s.lookAfter(row.ID))
	}
	for i := range pooled {
		m := &pooled[i]
		a := Decide(nil, m, byID[m.ID])
		delete(byID, m.ID)
		if a != Keep || !s.pool.has(m.ID) {
			errs = append(errs, s.lookAfter(m.ID))
		}
	}
	for id := range byID {
		errs = append(errs, s.lookAfter(id))
	}
	errs = append(errs, s.snapshots.reconcile(ctx))
	return errors.Join(errs...)
}

// lookAfter settles a sandbox, unless an operation on it is under way.
func (s *Service) lookAfter(id ID) error {
	op, mine := s.ops.begin(id, opSettle)
	if !mine {
		return nil
	}
	err := s.settle(op.ctx, id, note{reason: reasonInterrupted})
	s.ops.finish(id, op, nil, err)
	return err
}

// note holds the texts that [Service.settle] writes with its result.
type note struct {
	reason, detail string  // of the event
	hinders        *string // the row's Error, if the sandbox itself caused a wake to fail
}

// settle makes one sandbox's row and the host agree. The caller holds the operation, so that
// neither changes meanwhile.
func (s *Service) settle(ctx context.Context, id ID, why note) error {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	var row *Sandbox
	sbx, err := s.store.Get(ctx, id)
	switch {
	case err == nil:
		row = &sbx
		if sbx.Holder.Node != s.cfg.Node {
			s.log.WarnContext(ctx, "leaving a sandbox that is another node's as it is", "sandbox", id, "node", sbx.Holder.Node)
			return nil
		}
	case !fault.Is(err, fault.NotFound):
		return err
	}
	var pooledRow *Pooled
	if row == nil {
		if pooledRow, err = s.pool.row(ctx, id); err != nil {
			return err
		}
	}
	observed, err := s.node.Inspect(ctx, id)
	if err != nil {
		return fmt.Errorf("inspecting %s on the machine: %w", id, err)
	}
	a := Decide(row, pooledRow, observed)
	if a != Leave && a != Adopt && a != Keep {
		s.log.WarnContext(ctx, "reconciling", "sandbox", id, "action", a)
	}
	switch a {
	case Leave:
		return nil
	case Adopt:
		return s.adopt(ctx, *row, observed)
	case Resume:
		return s.resume(ctx, *row, observed, why)
	case Fall, Rest, Clear:
		return s.rest(ctx, *row, observed, a, why)
	case Lose:
		return s.takeApart(ctx, id, row.Run, Lost, func() {})
	case Finish:
		return s.takeApart(ctx, id, row.Run, row.DestroyReason, func() {})
	case Keep:
		return s.pool.keep(ctx, *pooledRow)
	case Discard:
		return s.pool.discard(ctx, id)
	}
	if err := s.node.Destroy(ctx, id); err != nil {
		return fmt.Errorf("removing the remains of %s: %w", id, err)
	}
	if a == Abandon {
		return s.fail(ctx, *row, BootFailed, "the server stopped while the sandbox was being created")
	}
	return nil // Remove
}

// adopt makes a sandbox usable that was running before this server. It applies the policy of the
// row, since a change of it may have been interrupted.
func (s *Service) adopt(ctx context.Context, row Sandbox, observed *Observed) error {
	if !observed.Egress.Equal(row.Egress) {
		s.log.WarnContext(ctx, "policy of a sandbox differs from its row", "sandbox", row.ID)
		if err := s.node.SetEgress(ctx, row.ID, row.Egress); err != nil {
			return fmt.Errorf("giving %s the policy of its row: %w", row.ID, err)
		}
	}
	if s.live.tracked(row) {
		return nil
	}
	l := newInstance(row)
	if observed.Checkpoint != nil {
		l.looked = observed.Checkpoint.At
	}
	s.live.track(l)
	return nil
}

// resume takes a sandbox back to running after a failed suspend. The sandbox's timer does not
// suspend it again before the time retryAfter has passed.
func (s *Service) resume(ctx context.Context, row Sandbox, observed *Observed, why note) error {
	now := time.Now().UTC()
	running, err := s.transition(ctx, Change{ID: row.ID, From: []State{Suspending}, Run: row.Run, To: Running, At: now,
		Reason: why.reason, Detail: why.detail})
	if err != nil {
		return err
	}
	l := newInstance(running)
	l.after = now.Add(retryAfter)
	if observed.Checkpoint != nil {
		l.looked = observed.Checkpoint.At
	}
	s.live.track(l)
	return nil
}

// rest removes everything of a sandbox from the host except its recovery point, and makes its row
// suspended. If that removal fails, rest leaves the row unchanged.
func (s *Service) rest(ctx context.Context, row Sandbox, observed *Observed, a Action, why note) error {
	last := s.live.untrack(row.ID)
	if err := s.node.Rest(ctx, row.ID); err != nil {
		return fmt.Errorf("removing the remains of %s: %w", row.ID, err)
	}
	if a == Clear {
		return nil
	}
	c := Change{ID: row.ID, From: []State{row.State}, Run: row.Run, To: Suspended, At: time.Now().UTC(),
		Reason: why.reason, Detail: why.detail, Error: why.hinders, ExpiresAt: new(time.Time)}
	if row.State == Waking && observed != nil && observed.Checkpoint != nil { // dropMemory may have made a new one
		c.SuspendedAt, c.Kept = &observed.Checkpoint.At, &observed.Checkpoint.Kept
	}
	if row.State != Waking { // its instance was in use
		c.SuspendedAt, c.Kept, c.LastActivityAt = &observed.Checkpoint.At, &observed.Checkpoint.Kept, last
		at := observed.Checkpoint.At.UTC().Format(time.RFC3339)
		c.Detail = "is at its recovery point of " + at
		if a == Fall || observed.Checkpoint.At.Before(row.LastActivityAt) {
			c.Detail = "fell back to the recovery point of " + at
		}
		if a == Fall {
			c.Reason = string(Lost)
		}
	}
	_, err := s.transition(ctx, c)
	return err
}

// present returns the row to the holder of the operation. It first settles a claim without an
// operation, and a running sandbox that was not adopted.
func (s *Service) present(ctx context.Context, id ID) (Sandbox, error) {
	sbx, err := s.store.Get(ctx, id)
	if err == nil {
		err = s.held(sbx) // settle would leave it as it is, and callers would ask again and again
	}
	if err != nil || !sbx.State.Claim() && (sbx.State != Running || s.live.tracked(sbx)) {
		return sbx, err
	}
	if err := s.settle(ctx, id, note{reason: reasonInterrupted}); err != nil {
		return Sandbox{}, err
	}
	return s.store.Get(ctx, id)
}
