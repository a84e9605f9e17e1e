package store

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/sandbox"
)

func joinSession(t *testing.T, db *DB) Session {
	t.Helper()
	s, err := db.JoinSession(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// dump returns the rows of all tables as texts, by table, except for the rows of transactions.
func dump(t *testing.T, db *DB) map[string][]string {
	t.Helper()
	list := "SELECT name FROM sqlite_schema WHERE type = 'table'"
	if _, ok := db.dialect.(*postgresDialect); ok {
		settle(t, db)
		list = "SELECT table_name::text FROM information_schema.tables WHERE table_schema = 'public'"
	}
	tables, err := texts(t.Context(), db.reader, list)
	if err != nil || len(tables) < 20 {
		t.Fatalf("the tables are %q, %v", tables, err)
	}
	all := map[string][]string{}
	for _, table := range tables {
		if table == "commits" || strings.HasPrefix(table, "goose_") {
			continue
		}
		rows, err := db.reader.QueryContext(t.Context(), "SELECT * FROM "+table)
		if err != nil {
			t.Fatal(err)
		}
		columns, err := rows.Columns()
		for err == nil && rows.Next() {
			values, into := make([]any, len(columns)), make([]any, len(columns))
			for i := range values {
				into[i] = &values[i]
			}
			err = rows.Scan(into...)
			all[table] = append(all[table], fmt.Sprint(values...))
		}
		if err != nil || rows.Err() != nil {
			t.Fatal(err, rows.Err())
		}
		slices.Sort(all[table])
	}
	return all
}

// replicaCalls returns a call of each method of sandbox.Store with the rows of a node.
func replicaCalls(t *testing.T, st sandbox.Store, r rowsOf) map[string]func() error {
	ctx := t.Context()
	id, cold, warm, none := r.running.ID, small("org_a", 8), small("org_a", 9), sandbox.Once{}
	warm.ID, warm.State = r.pooled.ID, sandbox.Running
	snap, pooled := fullSnapshot("org_a", "other", 2), fullPooled(3)
	snap.ID, pooled.ID = sandbox.NewSnapshotID(), sandbox.NewID()
	note := sandbox.Event{SandboxID: id, At: start, Reason: "forked"}
	return map[string]func() error{
		"Insert":    func() error { _, _, err := st.Insert(ctx, cold, sandbox.Quota{}, none); return err },
		"Forget":    func() error { return st.Forget(ctx, id) },
		"Get":       func() error { _, err := st.Get(ctx, id); return err },
		"List":      func() error { _, _, err := st.List(ctx, sandbox.Filter{OrgID: "org_a", Limit: 5}); return err },
		"SetExpiry": func() error { _, err := st.SetExpiry(ctx, id, start, 1, false); return err },
		"Living":    func() error { _, err := st.Living(ctx); return err },
		"EndLost": func() error { // its node is not lost
			_, _, err := st.EndLost(ctx, id, sandbox.Lost, start)
			return err
		},
		"LostSandboxes": func() error { _, err := st.LostSandboxes(ctx, "aaaaaa"); return err },
		"Unfinished":    func() error { _, err := st.Unfinished(ctx); return err },
		"Purge":         func() error { _, err := st.Purge(ctx, start.Add(-time.Hour), start, 0); return err },
		"Images":        func() error { _, err := st.Images(ctx); return err },
		"Transition": func() error {
			_, err := st.Transition(ctx, sandbox.Change{ID: id, From: []sandbox.State{sandbox.Running}, To: sandbox.Destroyed,
				At: start})
			return err
		},
		"SetActivity": func() error {
			return st.SetActivity(ctx, map[sandbox.ID]time.Time{id: start.Add(time.Hour)})
		},
		"SetEgress": func() error {
			_, err := st.SetEgress(ctx, id, sandbox.Egress{Mode: sandbox.DenyAll}, note)
			return err
		},
		"SetFrontData":  func() error { _, err := st.SetFrontData(ctx, id, "x"); return err },
		"Events":        func() error { _, _, err := st.Events(ctx, id, 5, ""); return err },
		"Note":          func() error { return st.Note(ctx, []sandbox.Event{note}) },
		"SetPublicPort": func() error { return st.SetPublicPort(ctx, id, 8081, true) },
		"PublicPorts":   func() error { _, err := st.PublicPorts(ctx, id); return err },
		"AddSnapshot":   func() error { return st.AddSnapshot(ctx, snap, 0) },
		"ReadySnapshot": func() error { _, err := st.ReadySnapshot(ctx, r.making.ID, start, 1, note); return err },
		"EndSnapshot":   func() error { return st.EndSnapshot(ctx, r.ready.ID) },
		"DropSnapshot":  func() error { return st.DropSnapshot(ctx, r.ready.ID) },
		"GetSnapshot":   func() error { _, err := st.GetSnapshot(ctx, r.ready.ID); return err },
		"FindSnapshot":  func() error { _, err := st.FindSnapshot(ctx, "org_a", "named"); return err },
		"ListSnapshots": func() error {
			_, _, err := st.ListSnapshots(ctx, sandbox.SnapshotFilter{OrgID: "org_a", Limit: 5})
			return err
		},
		"UnreadySnapshots": func() error { _, err := st.UnreadySnapshots(ctx); return err },
		"AddPooled":        func() error { return st.AddPooled(ctx, pooled) },
		"DropPooled":       func() error { return st.DropPooled(ctx, r.pooled.ID) },
		"ListPooled":       func() error { _, err := st.ListPooled(ctx); return err },
		"Admit":            func() error { _, _, err := st.Admit(ctx, cold, sandbox.Quota{}, none); return err },
		"Claim":            func() error { _, _, err := st.Claim(ctx, warm, sandbox.Quota{}, none); return err },
	}
}

// TestReplicaWritesNoRowsOfNodes calls each method of sandbox.Store, and what writes copies of checkpoints, through the
// session of a replica, with the rows of a node.
func TestReplicaWritesNoRowsOfNodes(t *testing.T) {
	refused := []string{"Insert", "Transition", "SetExpiry", "SetEgress", "SetFrontData", "AddSnapshot", "ReadySnapshot",
		"EndSnapshot", "AddPooled", "Claim", "BeginCheckpoint", "EndCheckpoint"}
	// The tables that a method may change, since their rows belong to no node.
	written := map[string][]string{"SetPublicPort": {"public_ports", "events"}}
	for name, open := range twice {
		t.Run(name, func(t *testing.T) {
			a, b := open(t)
			sa, sb := startSession(t, a, "aaaaaa"), joinSession(t, b)
			if sb.Holder != (sandbox.Holder{}) || sb.Cluster != sa.Cluster || sb.Generation != 1 {
				t.Errorf("the session of the replica is %+v, that of the node %+v", sb, sa)
			}
			r := putRows(t, a)
			keyed := small("org_a", 5)
			keyed.Metadata = map[string]string{"a": "b"}
			if _, _, err := a.Insert(t.Context(), keyed, sandbox.Quota{}, sandbox.Once{Key: "k", Hash: "h"}); err != nil {
				t.Fatal(err)
			}
			c := checkpointOf(string(r.running.ID), start)
			c.Node = "aaaaaa"
			c, err := a.BeginCheckpoint(t.Context(), c)
			if err != nil {
				t.Fatal(err)
			}
			calls := replicaCalls(t, b, r)
			contract := reflect.TypeFor[sandbox.Store]()
			for method := range contract.Methods() {
				if calls[method.Name] == nil {
					t.Errorf("the test does not call %s", method.Name)
				}
			}
			calls["BeginCheckpoint"] = func() error { _, err := b.BeginCheckpoint(t.Context(), c); return err }
			calls["EndCheckpoint"] = func() error { return b.EndCheckpoint(t.Context(), c) }
			before := dump(t, a)
			for _, method := range slices.Sorted(maps.Keys(calls)) {
				err := calls[method]()
				if slices.Contains(refused, method) != (err != nil) && !fault.Is(err, fault.NotFound) {
					t.Errorf("%s: %v", method, err)
				}
				after := dump(t, a)
				for _, table := range written[method] {
					if cmp.Equal(before[table], after[table]) {
						t.Errorf("%s left the table %s as it was", method, table)
					}
					before[table] = after[table]
				}
				if d := cmp.Diff(before, after); d != "" {
					t.Errorf("%s changed rows (-before +after):\n%s", method, d)
					before = after
				}
			}
			checkUnheld(t, b)
		})
	}
}

// checkUnheld checks that a replica lists no rows as its own, and can write what belongs to no node.
func checkUnheld(t *testing.T, db *DB) {
	t.Helper()
	ctx := t.Context()
	own, err := db.Unfinished(ctx)
	pooled, err2 := db.ListPooled(ctx)
	unready, err3 := db.UnreadySnapshots(ctx)
	if len(own)+len(pooled)+len(unready) != 0 || err != nil || err2 != nil || err3 != nil {
		t.Errorf("the replica has %v, %v and %v; %v, %v, %v", own, pooled, unready, err, err2, err3)
	}
	mustPutOrg(t, db, "b", 0)
	if err := db.SetSetting(ctx, "a", "b"); err != nil {
		t.Error(err)
	}
	if err := db.Ping(ctx); err != nil {
		t.Error(err)
	}
}

// TestPostgresReplicasBesideANode checks that replicas keep neither each other nor a node out.
func TestPostgresReplicasBesideANode(t *testing.T) {
	url := newDatabase(t, true)
	first, second, node := openURL(t, url), openURL(t, url), openURL(t, url)
	joinSession(t, first) // no server was there before
	joinSession(t, second)
	startSession(t, node, "aaaaaa")
	for i, db := range []*DB{first, second, node} {
		mustPutOrg(t, db, fmt.Sprint("org", i), i)
	}
}

// TestPostgresReplicaIsFenced restores a database under a replica, and then accepts the restore elsewhere.
func TestPostgresReplicaIsFenced(t *testing.T) {
	server := sharedPostgres(t)
	if _, err := server.Create("joined", "migrated"); err != nil {
		t.Fatal(err)
	}
	url := server.URL("joined")
	replica := openURL(t, url)
	if s, err := replica.JoinSession(t.Context(), true); err != nil || s.Generation != 2 {
		t.Fatalf("the session is %+v, %v", s, err)
	}
	other := openURL(t, url)
	if s, err := other.StartSession(t.Context(), "aaaaaa", true); err != nil || s.Generation != 3 {
		t.Fatalf("the session is %+v, %v", s, err)
	}
	refuses := func(db *DB, want string) {
		t.Helper()
		for call, f := range map[string]func() error{
			"a setting":     func() error { return db.SetSetting(t.Context(), "a", "b") },
			"no setting":    func() error { return db.DropSetting(t.Context(), "a") },
			"first setting": func() error { _, err := db.FirstSetting(t.Context(), "new", "b"); return err },
			"a key's use":   func() error { return db.TouchKey(t.Context(), "key_a", start) },
			"a consumer":    func() error { return db.SetConsumed(t.Context(), "c", 1) },
			"its end":       func() error { return db.EndConsumer(t.Context(), "c") },
			"a port":        func() error { return db.SetPublicPort(t.Context(), "sbx_none", 1, false) },
		} {
			if err := f(); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", call, err, want)
			}
		}
	}
	refuses(replica, "restored to an older state")

	// A process without a session could not notice a restore.
	refuses(openURL(t, url), "has not begun a session")
}

// TestRemovedNodeCannotWrite removes a node while its server runs.
func TestRemovedNodeCannotWrite(t *testing.T) {
	for name, open := range twice {
		t.Run(name, func(t *testing.T) {
			a, b := open(t)
			ctx := t.Context()
			startSession(t, a, "aaaaaa")
			startSession(t, b, "bbbbbb")
			s := mustInsert(t, a, small("org_a", 0))
			wantFault(t, b.RemoveNode(ctx, "aaaaaa"), fault.Conflict, "node_in_use")
			mustMove(t, a, s.ID, sandbox.Creating, sandbox.Destroyed, start)
			if err := b.RemoveNode(ctx, "aaaaaa"); err != nil {
				t.Fatal(err)
			}
			before := dump(t, b)
			wantRemoved := func(call string, err error) {
				t.Helper()
				if !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "was removed") {
					t.Errorf("%s of a removed node: %v", call, err)
				}
			}
			if name == "postgres" { // in SQLite only one server has the file, and it cannot remove itself
				_, _, err := a.Insert(ctx, small("org_a", 1), sandbox.Quota{}, sandbox.Once{})
				wantRemoved("an insert", err)
				wantRemoved("a pooled sandbox", a.AddPooled(ctx, fullPooled(0)))
				wantRemoved("a setting", a.SetSetting(ctx, "a", "b"))
				_, err = a.RegisterNode(ctx, fleet.Node{ID: "aaaaaa", Name: "again"})
				wantRemoved("registering", err)
			}
			release(a)
			_, err := a.StartSession(ctx, "aaaaaa", false)
			wantRemoved("another start", err)
			if d := cmp.Diff(before, dump(t, b)); d != "" {
				t.Errorf("the removed node changed (-before +after):\n%s", d)
			}
			mustInsert(t, b, small("org_a", 2))
		})
	}
}

// TestPostgresFreeWrites checks that records can be written without a session, as tests do, until a session has begun.
func TestPostgresFreeWrites(t *testing.T) {
	url := newDatabase(t, true)
	free, server := openURL(t, url), openURL(t, url)
	mustInsert(t, free, small("org_a", 0))
	startSession(t, server, "aaaaaa")
	_, _, err := free.Insert(t.Context(), small("org_a", 1), sandbox.Quota{}, sandbox.Once{})
	if err == nil || !strings.Contains(err.Error(), "has not begun a session") {
		t.Errorf("inserting without a session: %v", err)
	}
}
