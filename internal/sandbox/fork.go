package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"sync"
	"time"
)

// MaxFork limits the children of one fork. It is part of the contract.
const MaxFork = 100

// forkAtOnce limits how many children of one fork are made at a time. Each restore keeps more than
// one CPU busy for a third of a second. A higher value makes each child later and delays other
// callers; a lower one leaves CPUs idle.
const forkAtOnce = 4

// ForkRequest asks for children of a running sandbox. Fields that are not given take the values of
// the sandbox: its mode and times, metadata, policy, and environment, to which Env is added.
// Template, Snapshot, Size and DiskSizeMB are ignored.
type ForkRequest struct {
	Count int // 0 means 1
	Request
}

// Child holds one child of a fork: a running sandbox, or the error that prevented it.
type Child struct {
	Sandbox Sandbox
	Err     error
}

// Fork makes children of a running sandbox of either mode. The children are sandboxes of their own,
// which continue from its present state, with its processes, memory, files and listening sockets.
// The sandbox itself keeps running after one pause, and may be used meanwhile. Fork returns a Child
// for each child that was asked for. Errors of a child are those of Create and do not affect the
// others. If Fork itself returns an error, no child was begun: the request is wrong, the sandbox
// does not run (Conflict, code "sandbox_not_running"), there is no room or quota for even one
// child, or the sandbox could not be saved, with the errors of SaveSnapshot. The creation of
// children continues when ctx ends.
func (s *Service) Fork(ctx context.Context, c Caller, id ID, r ForkRequest) ([]Child, error) {
	if r.Count == 0 {
		r.Count = 1
	}
	if r.Count < 1 || r.Count > MaxFork {
		return nil, invalid("count", "must be between 1 and %d", MaxFork)
	}
	f := &fork{caller: c, request: r, done: make(chan struct{})}
	_, err := operate(ctx, s, c.OrgID, id, opFork, nil, func(ctx context.Context, sbx Sandbox) (*fork, error) {
		if err := s.saveFork(ctx, sbx, f); err != nil {
			return nil, err
		}
		s.ops.wg.Go(func() { s.makeChildren(f) }) // wg is not zero: the present operation is counted
		return f, nil
	})
	if err != nil {
		return nil, err
	}
	select {
	case <-f.done:
		return f.children, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// fork holds the state of a fork under way.
type fork struct {
	caller    Caller
	request   ForkRequest
	from      Snapshot // has no row
	release   func()   // releases from
	sandboxes []Sandbox
	children  []Child
	done      chan struct{} // closed when children is complete
}

// saveFork saves the sandbox to fork; the caller holds the operation. The saved state has no row: a
// server that dies leaves a snapshot without an owner.
func (s *Service) saveFork(ctx context.Context, sbx Sandbox, f *fork) error {
	f.from = snapshotOf(sbx, "")
	for range f.request.Count {
		child, err := f.request.child(s.cfg, sbx, f.from)
		if err != nil {
			return err
		}
		f.sandboxes = append(f.sandboxes, child)
	}
	// A pause is not worthwhile if not even one child is possible. Each child is admitted again when
	// it is made.
	if _, _, err := s.store.Admit(ctx, f.sandboxes[0], f.caller.Quota, Once{}); err != nil {
		return err
	}
	room, err := s.pool.reserve(ctx, f.sandboxes[0])
	if err != nil {
		return err
	}
	room.settle() // the children are made long after this
	defer room.release()
	f.release = s.snapshots.hold(f.from.ID)
	_, err = s.snapshots.write(ctx, sbx, f.from.ID)
	forked := Event{SandboxID: sbx.ID, At: time.Now().UTC(), Reason: reasonForked,
		Detail: fmt.Sprintf("%d asked for", f.request.Count)}
	if err == nil {
		err = s.store.Note(ctx, []Event{forked})
	}
	if err != nil {
		s.snapshots.abandon(ctx, f.from.ID, false)
		f.release()
		return s.snapshotFailed(ctx, sbx, err)
	}
	s.logNote(ctx, forked)
	return nil
}

// child returns a child of the parent with the settings of the request.
func (r ForkRequest) child(cfg Config, parent Sandbox, from Snapshot) (Sandbox, error) {
	q := r.Request
	q.Template, q.Snapshot, q.Size, q.DiskSizeMB = "", string(from.ID), "", nil
	if q.Mode == "" {
		q.Mode = string(parent.Mode)
	}
	if q.Mode == string(parent.Mode) && parent.Mode == Ephemeral {
		if q.Timeout == nil {
			q.Timeout = &parent.Timeout
		}
		q.AtEnd = cmp.Or(q.AtEnd, parent.AtEnd)
	}
	if q.Mode == string(parent.Mode) && parent.Mode == Persistent {
		if q.IdleTimeout == nil {
			q.IdleTimeout = &parent.IdleTimeout
		}
		if q.RecoveryInterval == nil {
			q.RecoveryInterval = &parent.RecoveryInterval
		}
	}
	if q.Metadata == nil {
		q.Metadata = maps.Clone(parent.Metadata)
	}
	if err := q.check(cfg); err != nil {
		return Sandbox{}, err
	}
	child, err := q.restore(cfg, from, time.Now())
	child.Source, child.Origin = Forked, string(parent.ID)
	return child, err
}

// makeChildren makes the children, and then removes the snapshot that they were made from.
func (s *Service) makeChildren(f *fork) {
	defer close(f.done)
	f.children = make([]Child, len(f.sandboxes))
	slots := make(chan struct{}, forkAtOnce)
	var wg sync.WaitGroup
	for i, sbx := range f.sandboxes {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			sbx.CreatedAt = time.Now().UTC()
			f.children[i].Sandbox, f.children[i].Err = s.restoreNew(context.Background(), f.caller, sbx, f.from,
				making{wait: true, release: func() {}})
		})
	}
	wg.Wait()
	s.snapshots.abandon(context.Background(), f.from.ID, false)
	f.release()
}

// createFrom makes a sandbox from a snapshot.
func (s *Service) createFrom(ctx context.Context, c Caller, r Request, once Once, wait bool) (Sandbox, error) {
	snap, release, err := s.snapshots.use(ctx, c.OrgID, r.Snapshot)
	if err != nil {
		return Sandbox{}, err
	}
	sbx, err := r.restore(s.cfg, snap, time.Now())
	if err != nil {
		release()
		return Sandbox{}, err
	}
	sbx.Source, sbx.Origin = Restored, string(snap.ID)
	return s.restoreNew(ctx, c, sbx, snap, making{once: once, wait: wait, release: release})
}

// restore returns the sandbox that a request for one from a snapshot asks for.
func (r Request) restore(cfg Config, snap Snapshot, now time.Time) (Sandbox, error) {
	if r.Size != "" && r.Size != snap.Size.Name {
		return Sandbox{}, invalid("size", "is the snapshot's, %s: leave it out", snap.Size.Name)
	}
	if d := r.DiskSizeMB; d != nil && *d != snap.DiskMB {
		return Sandbox{}, invalid("disk_size_mb", "is the snapshot's, %d: leave it out", snap.DiskMB)
	}
	r.Size, r.DiskSizeMB = "", nil
	sbx, err := r.resolve(cfg, snap.OrgID, TemplateVersion{ID: snap.TemplateID, Name: snap.Template,
		Version: snap.TemplateVersion, Shape: snap.Shape}, now)
	if err != nil {
		return Sandbox{}, err
	}
	sbx.Size = snap.Size // even if the operator has removed this size
	return sbx, CheckEnv(sbx.Env)
}

// restoreNew makes a sandbox from a snapshot, which the caller holds until m.release. It sets the spec and the
// patience of m.
func (s *Service) restoreNew(ctx context.Context, c Caller, sbx Sandbox, from Snapshot, m making) (Sandbox, error) {
	m.spec, m.patience = sbx.restored(from.Kept), checkpointTimeout
	m.spec.From = from.ID
	return s.makeNew(ctx, c, sbx, m)
}
