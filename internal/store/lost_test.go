package store

import (
	"slices"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/sandbox"
)

// lostRows are sandboxes of a node, by what is to become of them when the node is lost.
type lostRows struct {
	ends map[sandbox.ID]sandbox.State // the state in which one ends
	stay []sandbox.ID
}

// putLostRows writes one sandbox of each kind.
func putLostRows(t *testing.T, db *DB) lostRows {
	t.Helper()
	rows := lostRows{ends: map[sandbox.ID]sandbox.State{}}
	n := 0
	put := func(mode sandbox.Mode, states ...sandbox.State) sandbox.ID {
		t.Helper()
		n++
		s := small("org_a", n)
		s.Mode = mode
		mustInsert(t, db, s)
		from := sandbox.Creating
		for _, to := range states {
			mustMove(t, db, s.ID, from, to, start)
			from = to
		}
		return s.ID
	}
	for _, mode := range []sandbox.Mode{sandbox.Ephemeral, sandbox.Persistent} {
		rows.ends[put(mode)] = sandbox.Failed
		rows.ends[put(mode, sandbox.Running, sandbox.Destroying)] = sandbox.Destroyed
		rows.stay = append(rows.stay, put(mode, sandbox.Running, sandbox.Suspending, sandbox.Suspended),
			put(mode, sandbox.Running, sandbox.Suspending, sandbox.Suspended, sandbox.Waking))
	}
	rows.ends[put(sandbox.Ephemeral, sandbox.Running)] = sandbox.Destroyed
	rows.ends[put(sandbox.Ephemeral, sandbox.Running, sandbox.Suspending)] = sandbox.Destroyed
	rows.stay = append(rows.stay, put(sandbox.Persistent, sandbox.Running),
		put(sandbox.Persistent, sandbox.Running, sandbox.Suspending))
	return rows
}

// TestLostNode declares a node lost, ends what ends with it, and starts a server of it again.
func TestLostNode(t *testing.T) {
	for name, open := range twice {
		t.Run(name, func(t *testing.T) {
			a, b := open(t)
			startSession(t, a, "aaaaaa")
			startSession(t, b, "bbbbbb")
			rows := putLostRows(t, a)
			other := mustInsert(t, b, small("org_a", 50))
			loseNode(t, a, b)
			_, err := a.Transition(t.Context(), sandbox.Change{ID: rows.stay[4], From: []sandbox.State{sandbox.Running},
				To: sandbox.Suspending, At: start})
			wantFault(t, err, fault.Unavailable, "not_ready")
			endLost(t, b, rows)
			if row, err := b.Get(t.Context(), other.ID); err != nil || row.State != sandbox.Creating {
				t.Errorf("a sandbox of another node is %s, %v", row.State, err)
			}
			release(a)
			release(b)
			if s := startSession(t, b, "aaaaaa"); s.Holder.Fence != 3 {
				t.Errorf("the session after the loss is %+v", s)
			}
			returned(t, b, rows)
		})
	}
}

// loseNode declares the node of a lost, once its lease is over.
func loseNode(t *testing.T, a, b *DB) {
	t.Helper()
	var st fleet.Store = b
	ctx := t.Context()
	lose := func(session string, want bool) {
		t.Helper()
		if got, err := st.LoseNode(ctx, "aaaaaa", session); err != nil || got != want {
			t.Errorf("lost: %t, %v, want %t", got, err, want)
		}
	}
	lose("", false) // it has no lease
	if err := a.EnrollNode(ctx, "aaaaaa", "key"); err != nil {
		t.Fatal(err)
	}
	if _, err := a.BeginLease(ctx, "aaaaaa", "key", "session1", time.Hour); err != nil {
		t.Fatal(err)
	}
	lose("session1", false)
	if ids, err := b.LostSandboxes(ctx, "aaaaaa"); err != nil || len(ids) != 0 {
		t.Errorf("%d sandboxes are lost before their node is, %v", len(ids), err)
	}
	if _, err := a.ExtendLease(ctx, "aaaaaa", "key", "session1", -time.Second, fleet.Load{}); err != nil {
		t.Fatal(err)
	}
	lose("session0", false)
	lose("session1", true)
	lose("session1", false) // it is lost already
	if n, err := b.GetNode(ctx, "aaaaaa"); err != nil || n.LostAt.IsZero() {
		t.Errorf("the lost node is %+v, %v", n, err)
	}
	_, err := st.LoseNode(ctx, "zzzzzz", "session1")
	wantFault(t, err, fault.NotFound, "node_not_found")
}

// endLost ends the sandboxes of the lost node as another server does.
func endLost(t *testing.T, db *DB, rows lostRows) {
	t.Helper()
	var st sandbox.Store = db
	ctx := t.Context()
	ids, err := st.LostSandboxes(ctx, "aaaaaa")
	if err != nil || len(ids) != len(rows.ends) {
		t.Errorf("%d sandboxes end, %v, want %d", len(ids), err, len(rows.ends))
	}
	for _, id := range slices.Concat(ids, ids) { // a second time changes nothing
		if _, lost, err := st.EndLost(ctx, id, sandbox.Lost, start); err != nil || !lost {
			t.Errorf("ending a sandbox: %t, %v", lost, err)
		}
	}
	for id, want := range rows.ends {
		row, err := db.Get(ctx, id)
		if err != nil || row.State != want || row.Token != "" || row.DestroyedAt.IsZero() {
			t.Errorf("a sandbox that ends is %+v, %v, want %s", row, err, want)
		}
	}
	for _, id := range rows.stay {
		if row, err := db.Get(ctx, id); err != nil || row.State.Over() {
			t.Errorf("a sandbox that stays is %s, %v", row.State, err)
		}
	}
	if ids, err := st.LostSandboxes(ctx, "aaaaaa"); err != nil || len(ids) != 0 {
		t.Errorf("%d sandboxes are left, %v", len(ids), err)
	}
	// Its owner does not want the first one any more.
	before, lost, err := st.EndLost(ctx, rows.stay[0], sandbox.Requested, start)
	if err != nil || !lost || before.State != sandbox.Suspended {
		t.Errorf("destroying a sandbox that stays: %s, %t, %v", before.State, lost, err)
	}
	row, err := db.Get(ctx, rows.stay[0])
	if err != nil || row.State != sandbox.Destroyed || row.DestroyReason != sandbox.Requested {
		t.Errorf("it is %s, %s, %v", row.State, row.DestroyReason, err)
	}
	events, _, err := db.Events(ctx, rows.stay[0], 2, "")
	if err != nil || len(events) != 2 || events[0].To != sandbox.Destroyed || events[1].To != sandbox.Destroying {
		t.Errorf("its last events are %+v, %v", events, err)
	}
	_, _, err = st.EndLost(ctx, sandbox.NewID(), sandbox.Lost, start)
	wantFault(t, err, fault.NotFound, "sandbox_not_found")
}

// returned checks what a node finds that was lost.
func returned(t *testing.T, db *DB, rows lostRows) {
	t.Helper()
	n, err := db.GetNode(t.Context(), "aaaaaa")
	if left := n.LeaseUntil.Sub(n.SeenAt).Round(time.Second); err != nil || !n.LostAt.IsZero() || n.Session != "" ||
		left != startTime {
		t.Errorf("the node is %+v, %v", n, err)
	}
	all, err := db.Unfinished(t.Context())
	if err != nil || len(all) != len(rows.stay)-1 {
		t.Errorf("%d sandboxes are unfinished, %v, want %d", len(all), err, len(rows.stay)-1)
	}
	for _, row := range all {
		if _, lost, err := db.EndLost(t.Context(), row.ID, sandbox.Lost, start); err != nil || lost {
			t.Errorf("ending a sandbox of a node that is back: %t, %v", lost, err)
		}
		if !slices.Contains(rows.stay, row.ID) {
			t.Errorf("the unfinished sandbox %s was to end", row.ID)
		}
	}
}
