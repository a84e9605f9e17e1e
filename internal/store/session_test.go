package store

import (
	"context"
	"database/sql"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// holderOfTests is the holder of the rows that a first session of a test writes.
var holderOfTests = sandbox.Holder{Node: "abcdef", Fence: 1}

// twice opens one database twice, as two servers do.
var twice = map[string]func(t *testing.T) (a, b *DB){
	"sqlite": func(t *testing.T) (a, b *DB) {
		path := filepath.Join(t.TempDir(), "cay.db")
		return openAt(t, path), openAt(t, path)
	},
	"postgres": func(t *testing.T) (a, b *DB) {
		url := newDatabase(t, true)
		return openURL(t, url), openURL(t, url)
	},
}

func startSession(t *testing.T, db *DB, node string) Session {
	t.Helper()
	s, err := db.StartSession(t.Context(), node, false)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// rowsOf are the rows of one node.
type rowsOf struct {
	running, creating sandbox.Sandbox
	pooled            sandbox.Pooled
	making, ready     sandbox.Snapshot
}

// putRows writes rows of the node of db.
func putRows(t *testing.T, db *DB) (r rowsOf) {
	t.Helper()
	r.running, r.creating = mustInsert(t, db, small("org_a", 0)), mustInsert(t, db, small("org_a", 1))
	mustMove(t, db, r.running.ID, sandbox.Creating, sandbox.Running, start)
	r.pooled = fullPooled(0)
	r.pooled.ID = sandbox.NewID()
	mustAdd(t, db, r.pooled)
	r.making, r.ready = fullSnapshot("org_a", "", 0), fullSnapshot("org_a", "", 1)
	r.making.ID, r.ready.ID = sandbox.NewSnapshotID(), sandbox.NewSnapshotID()
	r.making.State, r.ready.State = sandbox.SnapshotCreating, sandbox.SnapshotCreating
	for _, s := range []sandbox.Snapshot{r.making, r.ready} {
		if err := db.AddSnapshot(t.Context(), s, 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := db.ReadySnapshot(t.Context(), r.ready.ID, start, 1, sandbox.Event{At: start}); err != nil {
		t.Fatal(err)
	}
	return r
}

// checkRefused checks that db can write none of the rows, and that its calls do not report that there is no row.
func checkRefused(t *testing.T, db *DB, r rowsOf) {
	t.Helper()
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"transition": func() error {
			_, err := db.Transition(ctx, sandbox.Change{ID: r.running.ID, From: []sandbox.State{sandbox.Running},
				To: sandbox.Destroyed, At: start})
			return err
		},
		"expiry": func() error { _, err := db.SetExpiry(ctx, r.running.ID, start, 1, false); return err },
		"later":  func() error { _, err := db.SetExpiry(ctx, r.running.ID, start, 1, true); return err },
		"egress": func() error {
			_, err := db.SetEgress(ctx, r.running.ID, sandbox.Egress{Mode: sandbox.DenyAll}, sandbox.Event{At: start})
			return err
		},
		"front data":   func() error { _, err := db.SetFrontData(ctx, r.running.ID, "x"); return err },
		"end snapshot": func() error { return db.EndSnapshot(ctx, r.ready.ID) },
	} {
		if err := call(); !fault.Is(err, fault.Unavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// These skip rows that are not there, and so those of others. In PostgreSQL they fail if the server has a newer one.
	for name, err := range map[string]error{
		"activity":      db.SetActivity(ctx, map[sandbox.ID]time.Time{r.running.ID: start.Add(time.Hour)}),
		"note":          db.Note(ctx, []sandbox.Event{{SandboxID: r.running.ID, At: start, Reason: "forked"}}),
		"forget":        db.Forget(ctx, r.running.ID),
		"drop pooled":   db.DropPooled(ctx, r.pooled.ID),
		"drop snapshot": db.DropSnapshot(ctx, r.ready.ID),
	} {
		if err != nil && !fault.Is(err, fault.Unavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
	claimed := small("org_a", 2)
	claimed.ID, claimed.State = r.pooled.ID, sandbox.Running
	if _, _, err := db.Claim(ctx, claimed, sandbox.Quota{}, sandbox.Once{}); err == nil {
		t.Error("claimed a pooled sandbox of another server")
	}
	if _, err := db.ReadySnapshot(ctx, r.making.ID, start, 1, sandbox.Event{At: start}); err == nil {
		t.Error("made a snapshot of another server ready")
	}
}

// checkUntouched checks that the rows are as putRows left them, and that other lists them.
func checkUntouched(t *testing.T, other *DB, r rowsOf) {
	t.Helper()
	ctx := t.Context()
	s, err := other.Get(ctx, r.running.ID)
	if err != nil || s.State != sandbox.Running || s.FrontData != r.running.FrontData || !s.LastActivityAt.Equal(
		r.running.LastActivityAt) || !s.Egress.Equal(r.running.Egress) || !s.ExpiresAt.Equal(r.running.ExpiresAt) {
		t.Errorf("the sandbox is %+v, %v", s, err)
	}
	events, _, err := other.Events(ctx, r.running.ID, 10, "")
	if err != nil || len(events) != 2 {
		t.Errorf("%d events, %v", len(events), err)
	}
	all, err := other.Unfinished(ctx)
	if err != nil || len(all) != 2 || all[0].ID != r.running.ID && all[1].ID != r.running.ID {
		t.Errorf("unfinished are %d, %v", len(all), err)
	}
	pooled, err := other.ListPooled(ctx)
	if err != nil || len(pooled) != 1 || pooled[0].ID != r.pooled.ID {
		t.Errorf("pooled are %d, %v", len(pooled), err)
	}
	unready, err := other.UnreadySnapshots(ctx)
	if err != nil || len(unready) != 1 || unready[0].ID != r.making.ID {
		t.Errorf("unready snapshots are %d, %v", len(unready), err)
	}
	if s, err := other.GetSnapshot(ctx, r.ready.ID); err != nil || s.State != sandbox.SnapshotReady {
		t.Errorf("the snapshot is %s, %v", s.State, err)
	}
}

// TestSessionsOfTwoNodes checks that a node lists and writes its own rows alone.
func TestSessionsOfTwoNodes(t *testing.T) {
	for name, open := range twice {
		t.Run(name, func(t *testing.T) {
			a, b := open(t)
			sa, sb := startSession(t, a, "aaaaaa"), startSession(t, b, "bbbbbb")
			if sa.Cluster != sb.Cluster || sa.Cluster == "" || sa.Generation != 1 || sb.Generation != 1 {
				t.Errorf("the sessions are %+v and %+v", sa, sb)
			}
			ra, rb := putRows(t, a), putRows(t, b)
			checkRefused(t, a, rb)
			checkRefused(t, b, ra)
			checkUntouched(t, a, ra)
			checkUntouched(t, b, rb)
		})
	}
}

// TestSessionIsFenced checks that a server whose node has a newer one can write nothing of the node any more, and that
// the newer one can.
func TestSessionIsFenced(t *testing.T) {
	for name, open := range twice {
		t.Run(name, func(t *testing.T) {
			a, b := open(t)
			startSession(t, a, "aaaaaa")
			r := putRows(t, a)
			release(a)
			if s := startSession(t, b, "aaaaaa"); s.Holder.Fence != 2 {
				t.Errorf("the second session is %+v", s)
			}
			checkRefused(t, a, r)
			checkUntouched(t, b, r)
			mustMove(t, b, r.running.ID, sandbox.Running, sandbox.Destroyed, start)
			if err := b.DropPooled(t.Context(), r.pooled.ID); err != nil {
				t.Error(err)
			}
			if left, err := b.ListPooled(t.Context()); err != nil || len(left) != 0 {
				t.Errorf("%d pooled sandboxes are left, %v", len(left), err)
			}
			if name == "sqlite" {
				return // a lock on the data directory keeps a second process out
			}
			if _, _, err := a.Insert(t.Context(), small("org_a", 9), sandbox.Quota{}, sandbox.Once{}); !fault.Is(err,
				fault.Unavailable) || !strings.Contains(err.Error(), "another server") {
				t.Errorf("inserting with an old fence: %v", err)
			}
		})
	}
}

// release gives back what keeps a second server of the node out, and lets db go on all the same, as a server does that
// does not know it yet.
func release(db *DB) {
	if d, ok := db.dialect.(*postgresDialect); ok {
		d.keeper.end()
	}
}

// TestPostgresFenceMeetsOpenTransactions takes rows over while a transaction of the server before is open.
func TestPostgresFenceMeetsOpenTransactions(t *testing.T) {
	url := newDatabase(t, true)
	a, b := openURL(t, url), openURL(t, url)
	startSession(t, a, "aaaaaa")
	s := mustInsert(t, a, small("org_a", 0))
	stray := small("org_a", 1)
	err := a.record(t.Context(), func(tx *sql.Tx, out *outbox) error {
		release(a)
		startSession(t, b, "aaaaaa")
		if _, err := a.setLiving(t.Context(), tx, s.ID, "surface", "old"); !fault.Is(err, fault.Unavailable) {
			t.Errorf("writing a row that was taken over: %v", err)
		}
		return insertSandbox(t.Context(), tx, out, stray, sandbox.Once{})
	})
	if err != nil {
		t.Fatal(err)
	}
	// The newer server finds what the older one inserted meanwhile, and can settle it.
	all, err := b.Unfinished(t.Context())
	if err != nil || len(all) != 2 {
		t.Fatalf("%d unfinished, %v", len(all), err)
	}
	mustMove(t, b, stray.ID, sandbox.Creating, sandbox.Failed, start)
}

// TestPostgresGeneration restores a database to a state before a restore was accepted, without an event in between.
func TestPostgresGeneration(t *testing.T) {
	server := sharedPostgres(t)
	if _, err := server.Create("gen", "migrated"); err != nil {
		t.Fatal(err)
	}
	cfg := PostgresConfig{URL: server.URL("gen"), MaxConns: 2, MarkFile: filepath.Join(t.TempDir(), "mark")}
	run := func(accept bool, f func(db *DB)) (s Session, err error) {
		t.Helper()
		c := cfg
		c.AcceptRestore = accept
		db, err := OpenPostgres(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if s, err = db.StartSession(context.Background(), "aaaaaa", accept); err == nil {
			f(db)
		}
		if err := db.Close(); err != nil {
			t.Error(err)
		}
		return s, err
	}
	exec := func(statement string) {
		t.Helper()
		if err := server.Exec("postgres", statement); err != nil {
			t.Fatal(err)
		}
	}
	none := func(*DB) {}
	if s, err := run(false, none); err != nil || s.Generation != 1 {
		t.Fatalf("first: %+v, %v", s, err)
	}
	exec("CREATE DATABASE gen_backup TEMPLATE gen")
	restore := func() {
		exec("DROP DATABASE gen WITH (FORCE)")
		exec("CREATE DATABASE gen TEMPLATE gen_backup")
	}
	if s, err := run(true, none); err != nil || s.Generation != 2 {
		t.Fatalf("accepted: %+v, %v", s, err)
	}
	restore()
	if s, err := run(false, none); !fault.Is(err, fault.Unavailable) ||
		!strings.Contains(err.Error(), "--accept-restore") {
		t.Errorf("restored to an older generation: %+v, %v", s, err)
	}
	s, err := run(true, func(db *DB) {
		restore()
		var err error
		for range 3 { // each connection meets its end once
			_, _, err = db.Insert(t.Context(), small("org_a", 0), sandbox.Quota{}, sandbox.Once{})
		}
		if !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "--accept-restore") {
			t.Errorf("a write to an older generation: %v", err)
		}
	})
	if err != nil || s.Generation != 2 {
		t.Errorf("accepted again: %+v, %v", s, err)
	}

	// A server that does not know of the restore yet has the same fence as the one that accepted it.
	restore()
	old := openURL(t, cfg.URL)
	was := startSession(t, old, "aaaaaa")
	release(old)
	restore()
	s, err = run(true, func(*DB) {
		for range 2 * poolOfTests {
			_, _, err = old.Insert(t.Context(), small("org_a", 0), sandbox.Quota{}, sandbox.Once{})
		}
		for call, err := range map[string]error{
			"insert":        err,
			"forget":        old.Forget(t.Context(), "sbx_none"),
			"drop pooled":   old.DropPooled(t.Context(), "sbx_none"),
			"drop snapshot": old.DropSnapshot(t.Context(), "snap_none"),
		} {
			if !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "another server") {
				t.Errorf("%s of a server of an older generation: %v", call, err)
			}
		}
	})
	if err != nil || s.Holder != was.Holder || s.Generation != was.Generation+1 {
		t.Errorf("the sessions are %+v and %+v, %v", was, s, err)
	}
}

// TestMigrateNodes checks that rows of before belong to the node that there was, and that the name of the bucket's
// owner stays.
func TestMigrateNodes(t *testing.T) {
	path, old := openOld(t, 13)
	for _, statement := range []string{
		"INSERT INTO settings (name, value) VALUES ('instance', 'abcdef'), ('files_owner', 'OWNER')",
		`INSERT INTO sandboxes (id, org_id, mode, state, run, template, template_id, template_version, image, vcpus,
			memory_mb, metadata, timeout, idle_timeout, recovery_interval, created_at, destroy_reason, error, source, token)
			VALUES ('sbx_old', 'org_a', 'ephemeral', 'running', 'run1', '', '', 1, '', 1, 1, '{}', 0, 0, 0, 5, '', '', '', '')`,
	} {
		if _, err := old.Exec(statement); err != nil {
			t.Fatal(err)
		}
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	db := openAt(t, path)
	s := startSession(t, db, "abcdef")
	if s.Cluster != "OWNER" || s.Generation != 1 || s.Holder.Fence != 1 {
		t.Errorf("the session is %+v", s)
	}
	if all, err := db.Unfinished(t.Context()); err != nil || len(all) != 1 || all[0].Holder != s.Holder {
		t.Errorf("unfinished are %+v, %v", all, err)
	}
	mustMove(t, db, "sbx_old", sandbox.Running, sandbox.Destroyed, start)
}
