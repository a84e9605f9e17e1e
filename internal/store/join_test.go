package store

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
)

// joining joins machines with the store of a test.
type joining struct {
	*testing.T
	st fleet.Store
	n  int
}

// token adds a token and returns its hash.
func (j *joining) token(t fleet.Token, valid time.Duration) string {
	j.Helper()
	j.n++
	t.Hash, t.CreatedBy = fmt.Sprint("hash", j.n), "key_a"
	if _, err := j.st.AddToken(j.Context(), t, valid); err != nil {
		j.Fatal(err)
	}
	return t.Hash
}

// join joins a new machine with a token of its own.
func (j *joining) join(name, key string) fleet.Node {
	j.Helper()
	n, err := j.st.Join(j.Context(), j.token(fleet.Token{}, time.Hour), fleet.Node{ID: "id" + name, Name: name}, key)
	if err != nil {
		j.Fatal(err)
	}
	return n
}

// session checks that a node with a key has a session.
func (j *joining) session(id, key, want string) {
	j.Helper()
	if got, err := j.st.CheckNode(j.Context(), id, key); err != nil || got != want {
		j.Errorf("the session of %s is %q, %v, want %q", id, got, err, want)
	}
}

// refused checks that a node does not have a key.
func (j *joining) refused(id, key string) {
	j.Helper()
	got, err := j.st.CheckNode(j.Context(), id, key)
	if wantFault(j.T, err, fault.Denied, "node_refused"); got != "" {
		j.Errorf("the refused node %s has the session %q", id, got)
	}
}

// testJoinStore tests the contract of fleet.JoinStore, which every implementation must keep. db has a session of the
// node of holderOfTests.
func testJoinStore(t *testing.T, open func(t *testing.T) *DB) {
	for name, f := range map[string]func(*joining, *DB){
		"joining": joinsOnce, "joining again": joinsAgain, "leases": leasesHold, "removing": nodesAreRemoved,
		"enrolling": nodesAreEnrolled,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := open(t)
			f(&joining{T: t, st: db}, db)
		})
	}
}

func joinsOnce(j *joining, db *DB) {
	ctx, st := j.Context(), j.st
	before := db.Now()
	expires, err := st.AddToken(ctx, fleet.Token{Hash: "h", CreatedBy: "key_a",
		Settings: fleet.TokenSettings{Name: "given", Labels: map[string]string{"zone": "a"}}}, time.Hour)
	if err != nil || expires.Sub(before) < 59*time.Minute || expires.Sub(before) > 61*time.Minute {
		j.Errorf("the token expires at %s, %v", expires, err)
	}
	about := fleet.About{Version: "v1", VCPUs: 2, MemoryMB: 3, MaxSandboxes: 4}
	n, err := st.Join(ctx, "h", fleet.Node{ID: "aaaaaa", Name: "host", About: about}, "key1")
	if err != nil || n.ID != "aaaaaa" || n.Name != "given" || n.Labels["zone"] != "a" || n.About != about ||
		n.JoinedAt.IsZero() {
		j.Errorf("joined %+v, %v", n, err)
	}
	again, err := st.Join(ctx, "h", fleet.Node{ID: "bbbbbb", Name: "host"}, "key1")
	if d := cmp.Diff(n, again); err != nil || d != "" {
		j.Errorf("joined again with the same key, %v:\n%s", err, d)
	}
	_, err = st.Join(ctx, "h", fleet.Node{ID: "bbbbbb", Name: "other"}, "key2")
	wantFault(j.T, err, fault.Conflict, "token_used")
	_, err = st.Join(ctx, "none", fleet.Node{ID: "bbbbbb", Name: "other"}, "key2")
	wantFault(j.T, err, fault.Unauthenticated, "unauthenticated")
	short := j.token(fleet.Token{}, time.Millisecond)
	time.Sleep(100 * time.Millisecond)
	_, err = st.Join(ctx, short, fleet.Node{ID: "bbbbbb", Name: "other"}, "key2")
	wantFault(j.T, err, fault.Unauthenticated, "token_expired")

	// A name that is taken leaves the token as it was.
	free := j.token(fleet.Token{}, time.Hour)
	_, err = st.Join(ctx, free, fleet.Node{ID: "bbbbbb", Name: "given"}, "key2")
	wantFault(j.T, err, fault.Conflict, "node_exists")
	if n, err = st.Join(ctx, free, fleet.Node{ID: "bbbbbb", Name: "other"}, "key3"); err != nil || n.Name != "other" {
		j.Errorf("joined %+v, %v", n, err)
	}
	if s := startSession(j.T, db, "bbbbbb"); s.Holder.Fence != 1 {
		j.Errorf("the first session of a node that has joined is %+v", s)
	}
}

func joinsAgain(j *joining, db *DB) {
	ctx, st := j.Context(), j.st
	n := j.join("a", "key1")
	if _, err := st.BeginLease(ctx, n.ID, "key1", "session1", time.Hour); err != nil {
		j.Fatal(err)
	}
	token := j.token(fleet.Token{Rejoin: n.ID}, time.Hour)
	again, err := st.Join(ctx, token, fleet.Node{ID: "zzzzzz", Name: "z", About: fleet.About{Version: "v2"}}, "key2")
	if err != nil || again.ID != n.ID || again.Name != "a" || again.Version != "v2" || !again.JoinedAt.After(n.JoinedAt) ||
		!again.LeaseUntil.IsZero() {
		j.Errorf("joined again: %+v, %v", again, err)
	}
	j.refused(n.ID, "key1")
	j.session(n.ID, "key2", "")
	_, err = st.ExtendLease(ctx, n.ID, "key1", "session1", time.Hour, fleet.Load{})
	wantFault(j.T, err, fault.Denied, "node_refused")
	if _, err = st.BeginLease(ctx, n.ID, "key2", "session2", time.Hour); err != nil {
		j.Errorf("the first session with the new key: %v", err)
	}
	j.session(n.ID, "key2", "session2")
	if repeated, err := st.Join(ctx, token, fleet.Node{ID: "yyyyyy"}, "key2"); err != nil || repeated.ID != n.ID {
		j.Errorf("joined again twice: %+v, %v", repeated, err)
	}
	_, err = st.AddToken(ctx, fleet.Token{Hash: "x", Rejoin: "none"}, time.Hour)
	wantFault(j.T, err, fault.NotFound, "node_not_found")
}

func leasesHold(j *joining, _ *DB) {
	ctx, st := j.Context(), j.st
	n := j.join("a", "key1")
	j.refused("none", "key1")
	j.refused(holderOfTests.Node, "") // never joined
	j.session(n.ID, "key1", "")
	_, err := st.ExtendLease(ctx, n.ID, "key1", "session1", time.Hour, fleet.Load{})
	wantFault(j.T, err, fault.Denied, "node_refused")
	_, err = st.BeginLease(ctx, n.ID, "key2", "session1", time.Hour)
	wantFault(j.T, err, fault.Denied, "node_refused")
	begun, err := st.BeginLease(ctx, n.ID, "key1", "session1", time.Hour)
	if err != nil || begun.LeaseUntil.Sub(begun.SeenAt) != time.Hour || begun.SeenAt.Before(n.JoinedAt) {
		j.Errorf("begun: %+v, %v", begun, err)
	}
	_, err = st.BeginLease(ctx, n.ID, "key1", "session2", time.Hour)
	wantFault(j.T, err, fault.Conflict, "node_in_use")
	if _, err = st.BeginLease(ctx, n.ID, "key1", "session1", time.Hour); err != nil { // its answer was lost
		j.Errorf("begun again: %v", err)
	}
	_, err = st.ExtendLease(ctx, n.ID, "key1", "session2", time.Hour, fleet.Load{})
	wantFault(j.T, err, fault.Denied, "node_refused")
	load := fleet.Load{MemoryFreeMB: 1, Sandboxes: 2, Starting: 3}
	if extended, err := st.ExtendLease(ctx, n.ID, "key1", "session1", time.Millisecond, load); err != nil ||
		extended.SeenAt.Before(begun.SeenAt) || extended.Load != load {
		j.Errorf("extended: %+v, %v", extended, err)
	}
	time.Sleep(100 * time.Millisecond) // the lease is over
	j.session(n.ID, "key1", "session1")
	next, err := st.BeginLease(ctx, n.ID, "key1", "session2", time.Hour)
	if err != nil || next.Load != (fleet.Load{}) { // it has said nothing
		j.Errorf("the next session: %+v, %v", next, err)
	}
	j.session(n.ID, "key1", "session2")
	_, err = st.ExtendLease(ctx, n.ID, "key1", "session1", time.Hour, fleet.Load{})
	wantFault(j.T, err, fault.Denied, "node_refused")
	wantFault(j.T, st.EndLease(ctx, n.ID, "key1", "session1"), fault.Denied, "node_refused")
	if err := st.EndLease(ctx, n.ID, "key1", "session2"); err != nil {
		j.Error(err)
	}
	j.session(n.ID, "key1", "")
	if _, err = st.BeginLease(ctx, n.ID, "key1", "session3", time.Hour); err != nil {
		j.Errorf("a session after the end of another: %v", err)
	}
}

func nodesAreEnrolled(j *joining, db *DB) {
	ctx, st := j.Context(), j.st
	self := holderOfTests.Node
	for _, key := range []string{"key1", "key2"} {
		if err := st.EnrollNode(ctx, self, key); err != nil {
			j.Fatal(err)
		}
		j.session(self, key, "")
		n, err := st.BeginLease(ctx, self, key, "sessionof"+key, time.Hour)
		if err != nil || n.Session != "sessionof"+key || n.JoinedAt.IsZero() {
			j.Errorf("the session with %s: %+v, %v", key, n, err)
		}
	}
	j.refused(self, "key1")
	_, err := st.ExtendLease(ctx, self, "key2", "sessionofkey1", time.Hour, fleet.Load{})
	wantFault(j.T, err, fault.Denied, "node_refused")
	wantFault(j.T, st.EnrollNode(ctx, "absent", "key1"), fault.Denied, "node_refused")
	n := j.join("gone", "key3")
	if err := st.RemoveNode(ctx, n.ID); err != nil {
		j.Fatal(err)
	}
	wantFault(j.T, st.EnrollNode(ctx, n.ID, "key3"), fault.Denied, "node_refused")
}

func nodesAreRemoved(j *joining, db *DB) {
	ctx, st := j.Context(), j.st
	n := j.join("a", "key1")
	if _, err := st.BeginLease(ctx, n.ID, "key1", "session1", time.Hour); err != nil {
		j.Fatal(err)
	}
	s := mustInsert(j.T, db, small("org_a", 0)) // of the node of the session
	wantFault(j.T, st.RemoveNode(ctx, holderOfTests.Node), fault.Conflict, "node_in_use")
	mustMove(j.T, db, s.ID, "creating", "destroyed", start)
	snap := fullSnapshot("org_a", "", 0)
	if err := db.AddSnapshot(ctx, snap, 0); err != nil {
		j.Fatal(err)
	}
	wantFault(j.T, st.RemoveNode(ctx, holderOfTests.Node), fault.Conflict, "node_in_use")
	rejoin := j.token(fleet.Token{Rejoin: n.ID}, time.Hour)

	if err := st.RemoveNode(ctx, "a"); err != nil {
		j.Fatal(err)
	}
	j.refused(n.ID, "key1")
	_, err := st.ExtendLease(ctx, n.ID, "key1", "session1", time.Hour, fleet.Load{})
	wantFault(j.T, err, fault.Denied, "node_refused")
	_, err = st.GetNode(ctx, n.ID)
	wantFault(j.T, err, fault.NotFound, "node_not_found")
	wantFault(j.T, st.RemoveNode(ctx, "a"), fault.NotFound, "node_not_found")
	_, err = st.Join(ctx, rejoin, fleet.Node{ID: "zzzzzz"}, "key2")
	wantFault(j.T, err, fault.Denied, "node_refused")
	if all, err := st.ListNodes(ctx); err != nil || len(all) != 1 {
		j.Errorf("the nodes are %+v, %v", all, err)
	}
	_, err = st.Join(ctx, j.token(fleet.Token{}, time.Hour), fleet.Node{ID: "fresh0", Name: holderOfTests.Node}, "key3")
	wantFault(j.T, err, fault.Conflict, "node_exists") // an id is not a name
	// The name is free, and the id is not.
	next := fleet.Node{ID: n.ID, Name: "a"}
	_, err = st.Join(ctx, j.token(fleet.Token{}, time.Hour), next, "key3")
	wantFault(j.T, err, fault.Conflict, "node_exists")
	next.ID = "fresh1"
	if _, err = st.Join(ctx, j.token(fleet.Token{}, time.Hour), next, "key3"); err != nil {
		j.Error(err)
	}
}

// TestTokensAreUsedOnce has 16 machines join at once with one token, many times, on both databases.
func TestTokensAreUsedOnce(t *testing.T) {
	for name, open := range twice {
		t.Run(name, func(t *testing.T) {
			a, b := open(t)
			for round := range 20 {
				hash := fmt.Sprint("hash", round)
				if _, err := a.AddToken(t.Context(), fleet.Token{Hash: hash}, time.Hour); err != nil {
					t.Fatal(err)
				}
				var joined atomic.Int64
				var wg sync.WaitGroup
				for i := range 16 {
					db := a
					if i%2 == 1 {
						db = b
					}
					wg.Go(func() {
						name := fmt.Sprintf("n%d-%d", round, i)
						_, err := db.Join(t.Context(), hash, fleet.Node{ID: name, Name: name}, "key"+name)
						if err == nil {
							joined.Add(1)
						} else if e := fault.As(err); e == nil || e.Code != fault.CodeTokenUsed {
							t.Errorf("round %d: %v", round, err)
						}
					})
				}
				wg.Wait()
				all, err := a.ListNodes(t.Context())
				if joined.Load() != 1 || err != nil || len(all) != round+1 {
					t.Fatalf("round %d: %d joined, there are %d nodes, %v", round, joined.Load(), len(all), err)
				}
			}
		})
	}
}

// TestFirstAuthority has servers that start at once make the authority of a cluster.
func TestFirstAuthority(t *testing.T) {
	for name, open := range twice {
		t.Run(name, func(t *testing.T) {
			a, b := open(t)
			startSession(t, a, "aaaaaa")
			joinSession(t, b)
			if all, err := a.Authorities(t.Context()); err != nil || len(all) != 0 {
				t.Errorf("a new cluster has the authorities %+v, %v", all, err)
			}
			got := make([]Authority, 8)
			errs := make([]error, len(got))
			var wg sync.WaitGroup
			for i := range got {
				db := a
				if i%2 == 1 {
					db = b
				}
				wg.Go(func() {
					mine := Authority{ID: fmt.Sprint("a", i), Certificate: "c", Sealed: fmt.Sprint("s", i)}
					got[i], errs[i] = db.FirstAuthority(t.Context(), mine)
				})
			}
			wg.Wait()
			all, err := b.Authorities(t.Context())
			if err = errors.Join(append(errs, err)...); err != nil || len(all) != 1 {
				t.Fatalf("the authorities are %+v, %v", all, err)
			}
			for _, one := range got {
				if one != all[0] || one.Sealed == "" {
					t.Errorf("one call returned %+v, the records have %+v", one, all[0])
				}
			}
		})
	}
}
