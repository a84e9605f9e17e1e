package store

import (
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/sandbox"
)

// testNodeStore tests the contract of fleet.Store, which every implementation must keep. db has a session of the node
// of holderOfTests.
func testNodeStore(t *testing.T, db *DB) {
	var st fleet.Store = db
	ctx := t.Context()
	me := holderOfTests.Node
	get := func(idOrName string) fleet.Node {
		t.Helper()
		n, err := st.GetNode(ctx, idOrName)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	fresh := get(me)
	if fresh.Name != "" || len(fresh.Labels) != 0 || fresh.StartedAt.IsZero() || !fresh.CordonedAt.IsZero() {
		t.Errorf("a node that has said nothing is %+v", fresh)
	}
	_, err := st.GetNode(ctx, "") // no node is found by a name that it does not have
	wantFault(t, err, fault.NotFound, "node_not_found")

	var full fleet.Node
	caytest.Fill(&full, 7)
	full.ID, full.Name = me, "host"
	got, err := st.RegisterNode(ctx, full)
	if err != nil {
		t.Fatal(err)
	}
	// These are not the server's to say.
	full.StartedAt, full.CordonedAt, full.DrainBy = fresh.StartedAt, time.Time{}, time.Time{}
	full.JoinedAt, full.LostAt, full.Session = time.Time{}, time.Time{}, ""
	full.SeenAt, full.LeaseUntil = time.Time{}, time.Time{}
	full.Load, full.Sandboxes, full.Active, full.Status = fleet.Load{}, 0, 0, ""
	if d := cmp.Diff(full, got); d != "" {
		t.Errorf("registered (-want +got):\n%s", d)
	}
	for _, f := range reflect.VisibleFields(reflect.TypeFor[fleet.About]()) {
		if reflect.ValueOf(got.About).FieldByIndex(f.Index).IsZero() {
			t.Errorf("the test leaves field %s of About empty", f.Name)
		}
	}
	if d := cmp.Diff(full, get("host")); d != "" {
		t.Errorf("by name (-want +got):\n%s", d)
	}
	if all, err := st.ListNodes(ctx); err != nil || len(all) != 1 || cmp.Diff(full, all[0]) != "" {
		t.Errorf("the nodes are %+v, %v", all, err)
	}
	nodeCounts(t, db)
	nodeCordons(t, st)
	nodeNames(t, db)
}

// nodeCounts checks the counts of a node's sandboxes.
func nodeCounts(t *testing.T, db *DB) {
	t.Helper()
	ctx := t.Context()
	for i, to := range []sandbox.State{sandbox.Creating, sandbox.Running, sandbox.Suspended, sandbox.Suspended,
		sandbox.Destroyed, sandbox.Failed} {
		s := mustInsert(t, db, small("org_a", i))
		if to != sandbox.Creating {
			mustMove(t, db, s.ID, sandbox.Creating, to, start)
		}
	}
	if n, err := db.GetNode(ctx, "host"); err != nil || n.Sandboxes != 4 || n.Active != 2 {
		t.Errorf("the node has %d sandboxes, %d active, %v", n.Sandboxes, n.Active, err)
	}
}

// nodeCordons cordons, drains and uncordons a node.
func nodeCordons(t *testing.T, st fleet.Store) {
	t.Helper()
	ctx := t.Context()
	set := func(name string, on bool, drain time.Duration) fleet.Node {
		t.Helper()
		n, err := st.SetCordon(ctx, name, on, drain)
		if err != nil {
			t.Fatal(err)
		}
		read, err := st.GetNode(ctx, n.ID)
		if d := cmp.Diff(n, read); err != nil || d != "" {
			t.Errorf("returned and read, %v:\n%s", err, d)
		}
		return n
	}
	first := set("host", true, 0)
	if first.CordonedAt.Before(first.StartedAt) || !first.DrainBy.IsZero() || first.Name != "host" ||
		first.Sandboxes != 4 {
		t.Errorf("cordoned: %+v", first)
	}
	drained := set(holderOfTests.Node, true, time.Hour)
	if !drained.CordonedAt.Equal(first.CordonedAt) || drained.DrainBy.Before(first.CordonedAt.Add(time.Hour)) {
		t.Errorf("drained: %+v, cordoned before at %s", drained, first.CordonedAt)
	}
	if again := set("host", true, 0); !again.DrainBy.Equal(drained.DrainBy) || !again.CordonedAt.Equal(first.CordonedAt) {
		t.Errorf("cordoned again: %+v, want %+v", again, drained)
	}
	if other := set("host", true, time.Minute); !other.DrainBy.Before(drained.DrainBy) {
		t.Errorf("drained again until %s, before until %s", other.DrainBy, drained.DrainBy)
	}
	if n := set("host", false, time.Hour); !n.CordonedAt.IsZero() || !n.DrainBy.IsZero() {
		t.Errorf("uncordoned: %+v", n)
	}
	_, err := st.SetCordon(ctx, "none", true, 0)
	wantFault(t, err, fault.NotFound, "node_not_found")
	_, err = st.RegisterNode(ctx, fleet.Node{ID: "zzzzzz", Name: "z"})
	wantFault(t, err, fault.NotFound, "node_not_found")
}

// nodeNames has two nodes with names that could be confused.
func nodeNames(t *testing.T, db *DB) {
	t.Helper()
	ctx := t.Context()
	if _, err := db.writer.ExecContext(ctx, "INSERT INTO nodes (id, fence, started_at) VALUES ('bbbbbb', 1, 5), "+
		"('cccccc', 1, 5)"); err != nil {
		t.Fatal(err)
	}
	_, err := db.RegisterNode(ctx, fleet.Node{ID: "bbbbbb", Name: "host"})
	wantFault(t, err, fault.Conflict, "node_exists")
	// A node may be called as another one's id, which then is found by that.
	if _, err := db.RegisterNode(ctx, fleet.Node{ID: "bbbbbb", Name: "cccccc"}); err != nil {
		t.Fatal(err)
	}
	if n, err := db.SetCordon(ctx, "cccccc", true, 0); err != nil || n.ID != "cccccc" {
		t.Errorf("cordoned %+v, %v", n, err)
	}
	all, err := db.ListNodes(ctx)
	var ids []string
	for _, n := range all {
		ids = append(ids, n.ID)
		if n.CordonedAt.IsZero() != (n.ID != "cccccc") {
			t.Errorf("node %s is cordoned since %s", n.ID, n.CordonedAt)
		}
	}
	if want := []string{"cccccc", "bbbbbb", holderOfTests.Node}; err != nil || !slices.Equal(ids, want) {
		t.Errorf("the nodes are %q, want %q, %v", ids, want, err)
	}
}

// TestMigrateNodeNames migrates a node from version 17 of the schema.
func TestMigrateNodeNames(t *testing.T) {
	path, old := openOld(t, 17)
	if _, err := old.Exec("INSERT INTO nodes (id, fence, started_at) VALUES ('abcdef', 4, 1000000)"); err != nil {
		t.Fatal(err)
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	db := openAt(t, path)
	if n, err := db.GetNode(t.Context(), "abcdef"); err != nil || n.Name != "" || !n.CordonedAt.IsZero() ||
		!n.StartedAt.Equal(time.Unix(1, 0)) {
		t.Errorf("the migrated node is %+v, %v", n, err)
	}
	if s := startSession(t, db, "abcdef"); s.Holder.Fence != 5 {
		t.Errorf("its next session is %+v", s)
	}
}
