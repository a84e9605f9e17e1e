package sandbox

import "sync"

// snapshotUses counts the users of snapshots' files, makers included.
type snapshotUses struct {
	remove func(SnapshotID) // removes a doomed snapshot after its last use

	mu sync.Mutex
	// +checklocks:mu
	of map[SnapshotID]*snapshotUse
}

// snapshotUse counts the users of one snapshot.
type snapshotUse struct {
	count  int
	doomed bool // deleted meanwhile: its last user removes it
}

// hold prevents the removal of a snapshot until the returned function is called. Check afterwards
// whether the snapshot still exists: a deletion changes the row before it looks for users.
func (s *snapshotUses) hold(id SnapshotID) (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.of[id]
	if u == nil {
		u = &snapshotUse{}
		s.of[id] = u
	}
	u.count++
	return func() { s.release(id) }
}

// holdAlone holds a snapshot like hold if it has no other user, and otherwise returns nil.
func (s *snapshotUses) holdAlone(id SnapshotID) (release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.of[id] != nil {
		return nil
	}
	s.of[id] = &snapshotUse{count: 1}
	return func() { s.release(id) }
}

func (s *snapshotUses) release(id SnapshotID) {
	s.mu.Lock()
	u := s.of[id]
	u.count--
	over := u.count == 0
	if over {
		delete(s.of, id)
	}
	s.mu.Unlock()
	if over && u.doomed {
		s.remove(id)
	}
}

// doom has the last user of a snapshot remove it. It returns false if the snapshot has no user.
func (s *snapshotUses) doom(id SnapshotID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.of[id]
	if u != nil {
		u.doomed = true
	}
	return u != nil
}
