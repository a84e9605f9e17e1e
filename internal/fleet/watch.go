package fleet

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	// watchEvery is the time between two looks at the leases. A shorter time reads more rows; a longer one finds lost
	// nodes later.
	watchEvery = 5 * time.Second
	// lossGrace is the time for which a lease must have been over, while its node could have extended it, before the node
	// is lost: three beats. With [LeaseTime] and two looks a node is lost within 55 s. A shorter time loses the sandboxes
	// of nodes that had no network for a moment, or no database while it was replaced.
	lossGrace = 15 * time.Second
)

// watch follows the leases of the nodes.
type watch struct {
	*Service
	over   map[ID]time.Time // the look that first found a node's lease over, since when every look did
	looked time.Time        // the last look
}

// Watch declares nodes lost until ctx ends, and ends sandboxes of lost nodes with Config.Lose. A node is lost when its
// lease has been over for some time in which this process could read the records and has extended the lease of its own
// node: while no server can write, no node can extend its lease. A node whose server has ended its session is not lost.
// One server of a fleet watches.
func (s *Service) Watch(ctx context.Context) {
	w := watch{Service: s, over: map[ID]time.Time{}}
	looks := time.NewTicker(watchEvery)
	defer looks.Stop()
	failing := false
	for {
		err := w.look(ctx, time.Now())
		if err != nil && !failing && ctx.Err() == nil {
			s.cfg.Log.ErrorContext(ctx, "looking for lost nodes", "error", err)
		}
		failing = err != nil
		select {
		case <-looks.C:
		case <-ctx.Done():
			return
		}
	}
}

// look looks at the leases once. now is a time of this process, which may stand still between two looks.
func (w *watch) look(ctx context.Context, now time.Time) error {
	all, err := w.List(ctx)
	if err != nil || now.Sub(w.looked) > 2*watchEvery {
		clear(w.over)
	}
	if err != nil {
		return err
	}
	w.looked = now
	var errs []error
	for _, n := range all {
		switch {
		case n.ID == w.cfg.Self && over(n, w.cfg.Now()):
			clear(w.over) // this server could not write either
			return nil
		case n.ID != w.cfg.Self && n.Address != "":
			errs = append(errs, w.judge(ctx, n, now))
		}
	}
	return errors.Join(errs...)
}

// over reports whether a node's lease is over. A node that has ended its session has none.
func over(n Node, now time.Time) bool { return !n.LeaseUntil.IsZero() && !now.Before(n.LeaseUntil) }

// judge declares a node lost if it is time to, and ends what ends with a lost node.
func (w *watch) judge(ctx context.Context, n Node, now time.Time) error {
	lost := !n.LostAt.IsZero()
	if !lost {
		var err error
		if lost, err = w.declare(ctx, n, now); err != nil {
			return err
		}
	}
	if !lost || n.Active == 0 {
		return nil
	}
	if err := w.cfg.Lose(ctx, n.ID); err != nil {
		return fmt.Errorf("ending the sandboxes of the lost node %s: %w", n.ID, err)
	}
	return nil
}

// declare declares a node lost if its lease has been over for long enough, and reports whether it did.
func (w *watch) declare(ctx context.Context, n Node, now time.Time) (lost bool, err error) {
	if !over(n, w.cfg.Now()) {
		delete(w.over, n.ID)
		return false, nil
	}
	since, seen := w.over[n.ID]
	if !seen {
		since, w.over[n.ID] = now, now
	}
	if now.Sub(since) < lossGrace {
		return false, nil
	}
	delete(w.over, n.ID)
	// A database that is slow to write keeps the nodes from extending their leases too.
	ctx, cancel := context.WithTimeout(ctx, watchEvery)
	defer cancel()
	if lost, err = w.store.LoseNode(ctx, n.ID, n.Session); lost {
		w.cfg.Log.WarnContext(ctx, "a node is lost", "node", n.ID, "name", n.Name, "seen", n.SeenAt, "sandboxes", n.Active)
	}
	return lost, err
}
