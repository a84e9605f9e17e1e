package store

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// fillAll writes rows of every table, and texts that PostgreSQL stores otherwise.
func fillAll(t *testing.T, db *DB) (s sandbox.Sandbox) {
	t.Helper()
	ctx := t.Context()
	startSession(t, db, "abcdef")
	mustPutOrg(t, db, "a", 0)
	s = fullSandbox("org_a", 0)
	s.Error, s.FrontData = "a\x00b\xff", "ü\u2028"
	s.CreatedAt = time.Now().UTC().Truncate(time.Microsecond) // by PostgreSQL's clock its key must be young
	if _, _, err := db.Insert(ctx, s, sandbox.Quota{}, sandbox.Once{Key: "k", Hash: "h"}); err != nil {
		t.Fatal(err)
	}
	over := mustInsert(t, db, small("org_a", 1))
	mustMove(t, db, over.ID, sandbox.Creating, sandbox.Destroyed, start)
	mustAdd(t, db, fullPooled(1))
	saved := mustSave(t, db, fullSnapshot("org_a", "snap", 0))
	if _, err := db.BeginCheckpoint(ctx, checkpointOf(string(saved.ID), start)); err != nil {
		t.Fatal(err)
	}
	tpl := aTemplate("org_a", "t", 0)
	if err := db.InsertTemplate(ctx, tpl, &template.Build{Context: "c", Refresh: true}, 0); err != nil {
		t.Fatal(err)
	}
	update(t, db, tpl.ID, func(tpl *template.Template) {
		tpl.Tagging = []template.Tag{{Name: "v1", BuildID: "b", CreatedAt: start}}
	})
	for _, err := range []error{
		db.ChangeTemplateLog(ctx, tpl.ID, template.LogChange{
			Add: []template.LogLine{{Seq: 1, At: start, Heading: true, Text: "\x00x"}}}),
		db.SetPublicPort(ctx, s.ID, 80, true),
		db.SetConsumed(ctx, "usage", 1<<60),
		db.AddWebhook(ctx, aWebhook(1), 0),
		db.SetSetting(ctx, "instance", "abcdef"),
		fillFleet(t, db),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	mustEnqueue(t, db, "whk_001", start, some("whk_001", 1, "a", "a", "b"))
	mustMake(t, db, "whk_001", 3, start)
	putOrg(t, db, "org_old")
	if _, err := db.TrimEvents(ctx, start.Add(time.Hour), 1); err != nil {
		t.Fatal(err)
	}
	return s
}

// fillFleet writes rows of the tables of nodes.
func fillFleet(t *testing.T, db *DB) error {
	t.Helper()
	ctx := t.Context()
	_, tokenErr := db.AddToken(ctx, fleet.Token{Hash: "h"}, time.Hour)
	_, joinErr := db.Join(ctx, "h", fleet.Node{ID: "joined", Name: "joined"}, "key")
	_, leaseErr := db.BeginLease(ctx, "joined", "key", "session", time.Hour)
	_, authorityErr := db.FirstAuthority(ctx, Authority{ID: "a", Certificate: "c", Sealed: "s"})
	return errors.Join(tokenErr, joinErr, leaseErr, authorityErr)
}

// TestCopyToPostgres copies all records, twice, and checks that a server can work with the copy.
func TestCopyToPostgres(t *testing.T) {
	from, to := open(t), openPostgres(t)
	s := fillAll(t, from)
	ctx := t.Context()
	for round := range 2 {
		copied, err := CopyToPostgres(ctx, from, to)
		if err != nil {
			t.Fatal(err)
		}
		if len(copied) != 24 {
			t.Errorf("%d tables were copied", len(copied))
		}
		for _, c := range copied {
			if c.Rows == 0 {
				t.Errorf("the test has no row of %s", c.Table)
			}
		}
		if round == 0 { // what the second copy replaces
			for _, change := range []string{"UPDATE settings SET value = 'other' WHERE name = 'instance'",
				"DELETE FROM sandboxes"} {
				if _, err := to.writer.ExecContext(ctx, change); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	want := asStored(s)
	want.Holder = startSession(t, to, "abcdef").Holder
	want.Error = "ab\uFFFD"
	if got, err := to.Get(ctx, s.ID); err != nil || cmp.Diff(want, got, prefixes) != "" {
		t.Errorf("the sandbox (-want +got), %v:\n%s", err, cmp.Diff(want, got, prefixes))
	}
	for _, org := range []string{"org_a", "org_old"} {
		q := event.Query{OrgID: org, After: event.Oldest, Limit: 100}
		old, _ := feed(t, from, q)
		if got, _ := feed(t, to, q); cmp.Diff(old, got) != "" {
			t.Errorf("the feed (-SQLite +PostgreSQL):\n%s", cmp.Diff(old, got))
		}
	}
	last, err := from.LastEvent(ctx, "org_old")
	if err != nil {
		t.Fatal(err)
	}
	mustMove(t, to, s.ID, sandbox.Creating, sandbox.Running, start)
	settle(t, to)
	if now, err := to.LastEvent(ctx, "org_a"); err != nil || now <= last {
		t.Errorf("an event after the copy has number %d, the last one before %d, %v", now, last, err)
	}
	prior, found, err := to.Insert(ctx, small("org_a", 1), sandbox.Quota{}, sandbox.Once{Key: "k", Hash: "h"})
	if err != nil || !found || prior.ID != s.ID {
		t.Errorf("a repeated create: %s, %v, %v", prior.ID, found, err)
	}
	if err := to.Serve(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := CopyToPostgres(ctx, from, to); err == nil {
		t.Error("replaced records that a server has worked with")
	}
	if _, err := CopyToPostgres(ctx, to, from); err == nil {
		t.Error("copied from PostgreSQL to SQLite")
	}
}

// TestCopyToPostgresFails checks that a copy that cannot be whole leaves PostgreSQL as it was.
func TestCopyToPostgresFails(t *testing.T) {
	from, to := open(t), openPostgres(t)
	fillAll(t, from)
	ctx := t.Context()
	if err := to.SetSetting(ctx, "kept", "yes"); err != nil {
		t.Fatal(err)
	}
	// Two names that are the same name in PostgreSQL.
	s := small("org_a", 5)
	s.Metadata = map[string]string{"a": "1", "a\x00": "2"}
	mustInsert(t, from, s)
	if _, err := CopyToPostgres(ctx, from, to); err == nil {
		t.Fatal("copied two rows with one key")
	}
	if value, found, err := to.Setting(ctx, "kept"); err != nil || !found || value != "yes" {
		t.Errorf("after the error the setting is %q, %v, %v", value, found, err)
	}
	if all, err := to.Unfinished(ctx); err != nil || len(all) != 0 {
		t.Errorf("after the error there are %d sandboxes, %v", len(all), err)
	}
}
