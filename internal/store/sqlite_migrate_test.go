package store

import (
	"database/sql"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pressly/goose/v3"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/sandbox"
)

// TestOpenMigrates opens a database with the first schema, and checks that its rows can be read and
// changed.
func TestOpenMigrates(t *testing.T) {
	path, old := openOld(t, 1)
	s := small("org_a", 0)
	for _, write := range []struct {
		query string
		args  []any
	}{
		{insertBeforeShapes, []any{s.ID, s.OrgID, at(s.CreatedAt)}},
		{insertBeforeShapes, []any{"sbx_over", s.OrgID, at(s.CreatedAt)}},
		// Earlier versions kept the secrets of sandboxes that are over.
		{`UPDATE sandboxes SET state = 'destroyed', destroy_reason = 'requested', ended_at = 1000000, metadata = '{"a":"b"}',
			env = '{"KEY":"` + aSecret + `"}', token = '` + aSecret + `' WHERE id = 'sbx_over'`, nil},
		{`INSERT INTO templates (id, org_id, name, description, status, progress, build_error, version, image, image_size,
			source, inputs, env, workdir, run_as, start_command, size, disk_mb, egress, created_at) VALUES ('tpl_1', '',
			'python', '', 'failed', '', 'exit code 100', 2, 'abc', 5, 's', 'i', '{"A":"b"}', '', 'root', '', '', 0,
			'{"mode":"allow_all"}', 1000000)`, nil},
		{"INSERT INTO template_logs (template_id, seq, at, line) VALUES ('tpl_1', 1, 1000000, 'old')", nil},
		{`INSERT INTO sandbox_events (sandbox_id, seq, at, from_state, to_state, reason)
			SELECT id, 1, created_at, '', 'creating', '' FROM sandboxes`, nil},
	} {
		if _, err := old.Exec(write.query, write.args...); err != nil {
			t.Fatal(err)
		}
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	db := openAt(t, path)
	if _, err := db.Transition(t.Context(), sandbox.Change{ID: s.ID,
		From: []sandbox.State{sandbox.Creating}, To: sandbox.Suspended, At: start, Detail: "new"}); err != nil {
		t.Fatal(err)
	}
	if old, err := db.Get(t.Context(), s.ID); err != nil || old.AtEnd != sandbox.EndDestroys || old.FrontData != "" {
		t.Errorf("a migrated sandbox has AtEnd %q, FrontData %q, %v", old.AtEnd, old.FrontData, err)
	}
	events, _, err := db.Events(t.Context(), s.ID, 10, "")
	if err != nil || len(events) != 2 || events[0].Detail != "new" || events[1].Detail != "" {
		t.Errorf("events are %+v, %v", events, err)
	}
	tpl, err := db.GetTemplate(t.Context(), "org_a", "python")
	if err != nil || tpl.BuildError != nil || tpl.Queued() || tpl.Version != 2 || tpl.Image != "abc" ||
		tpl.Env["A"] != "b" || !tpl.Start.None() {
		t.Errorf("template is %+v, %v", tpl, err)
	}
	over, err := db.Get(t.Context(), "sbx_over")
	if err != nil || len(over.Env) != 0 || over.Token != "" || over.Metadata["a"] != "b" ||
		over.DestroyReason != sandbox.Requested {
		t.Errorf("a migrated sandbox that is over is %+v, %v", over, err)
	}
	if lines, err := db.TemplateLog(t.Context(), "tpl_1", 0, 10); err != nil || len(lines) != 1 || lines[0].Text != "old" {
		t.Errorf("the log of the template is %v, %v", lines, err)
	}
}

// openOld returns a new database with an older schema, which the caller closes, and its path.
func openOld(t *testing.T, version int64) (path string, db *sql.DB) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "cay.db")
	db, err := sql.Open("sqlite", dsn(path, url.Values{}))
	if err != nil {
		t.Fatal(err)
	}
	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		t.Fatal(err)
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, db, dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.UpTo(t.Context(), version); err != nil {
		t.Fatal(err)
	}
	return path, db
}

// insertBeforeShapes writes a sandbox with an id, an organization and a time as a version before the
// migration to shapes did.
const insertBeforeShapes = `INSERT INTO sandboxes (id, org_id, mode, state, run, template, template_id,
	template_version, image, size, vcpus, memory_mb, dedicated, disk_mb, env, metadata, egress, run_as, workdir,
	timeout, idle_timeout, recovery_interval, created_at, destroy_reason, error, source, token)
	VALUES ($1, $2, 'ephemeral', 'creating', 'run1', 'python', 'tpl_python', 3, 'abcdef', 'performance-2x', 2, 4096,
	TRUE, 2048, '{"A":"ü\"\\"}', '{}', '{"mode":"deny_all","allow_cidrs":["10.0.0.0/8"],"allow_ports":[80]}', 'o"k\',
	'/srv', 0, 0, 0, $3, '', '', 'cold', 'secret')`

// TestMigrateShapes migrates sandboxes, snapshots and pooled sandboxes from version 9 of the schema.
func TestMigrateShapes(t *testing.T) {
	path, old := openOld(t, 9)
	id, snap := sandbox.NewID(), sandbox.NewSnapshotID()
	exec := func(query string, args ...any) {
		t.Helper()
		if _, err := old.Exec(query, args...); err != nil {
			t.Fatal(err)
		}
	}
	exec(insertBeforeShapes, id, "org_a", at(start))
	exec(`INSERT INTO snapshots (id, org_id, name, state, sandbox_id, template, template_id, template_version, image,
		size, vcpus, memory_mb, dedicated, disk_mb, env, egress, run_as, workdir, bytes, created_at)
		SELECT $1, org_id, 'mine', 'ready', id, template, template_id, template_version, image, size, vcpus, memory_mb,
		dedicated, disk_mb, env, egress, run_as, workdir, 7, created_at FROM sandboxes`, snap)
	for _, started := range []string{"", "0123"} {
		exec(`INSERT INTO pool (id, run, token, org_id, template, template_id, template_version, image, size, vcpus,
			memory_mb, dedicated, disk_mb, started, created_at) VALUES ($1, 'run2', 'secret', 'org_a', 'python', 'tpl_python',
			3, 'abcdef', 'performance-2x', 2, 4096, FALSE, 2048, $2, $3)`, "sbx_pooled"+started, started, at(start))
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}

	db := openAt(t, path)
	plain := sandbox.Shape{Image: "abcdef", DiskMB: 2048,
		Size: sandbox.Size{Name: "performance-2x", VCPUs: 2, MemoryMB: 4096}}
	full := plain
	full.Size.Dedicated, full.Env, full.User, full.Workdir = true, map[string]string{"A": `ü"\`}, `o"k\`, "/srv"
	full.Egress = sandbox.Egress{Mode: sandbox.DenyAll, AllowCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
		AllowPorts: []uint16{80}}
	if got, err := db.Get(t.Context(), id); err != nil || cmp.Diff(full, got.Shape, prefixes) != "" {
		t.Errorf("the sandbox (-want +got), %v:\n%s", err, cmp.Diff(full, got.Shape, prefixes))
	}
	if got, err := db.GetSnapshot(t.Context(), snap); err != nil || cmp.Diff(full, got.Shape, prefixes) != "" {
		t.Errorf("the snapshot (-want +got), %v:\n%s", err, cmp.Diff(full, got.Shape, prefixes))
	}
	// The row of a pooled sandbox with a start command does not say with which it began.
	if got, err := db.ListPooled(t.Context()); err != nil || len(got) != 1 || got[0].ID != "sbx_pooled" ||
		cmp.Diff(plain, got[0].Shape, prefixes) != "" {
		t.Errorf("the pooled sandboxes are %+v, %v", got, err)
	}
}

// TestMigrateEvents migrates events from version 8 of the schema. It checks that the ids and cursors
// that clients hold stay valid, and that the feed has the events.
func TestMigrateEvents(t *testing.T) {
	path, old := openOld(t, 8)
	a, b := small("org_a", 0), small("org_b", 0)
	a.ID, b.ID = "sbx_aaaaaaaaaaaaaaaaaaaa", "sbx_bbbbbbbbbbbbbbbbbbbb"
	snap := "snap_cccccccccccccccccccc"
	for _, s := range []sandbox.Sandbox{a, b} {
		if _, err := old.Exec(insertBeforeShapes, s.ID, s.OrgID, at(s.CreatedAt)); err != nil {
			t.Fatal(err)
		}
	}
	for _, row := range []struct {
		id       sandbox.ID
		seq, at  int64
		from, to string
		reason   string
		detail   string
	}{
		{a.ID, 3, 100, "creating", "running", "", ""}, // its events 1 and 2 were dropped
		{a.ID, 4, 400, "running", "running", "egress_denied", "tcp"},
		{a.ID, 5, 200, "running", "running", "snapshot_made", snap + " mine"}, // the clock was set back
		{a.ID, 6, 500, "running", "running", "snapshot_made", snap},
		{a.ID, 7, 600, "running", "running", "forked", "2 asked for"},
		{b.ID, 1, 50, "", "creating", "fork", string(a.ID)},
		{b.ID, 2, 450, "creating", "failed", "boot_failed", ""},
	} {
		_, err := old.Exec(`INSERT INTO sandbox_events (sandbox_id, seq, at, from_state, to_state, reason, detail)
			VALUES ($1, $2, $3, $4, $5, $6, $7)`,
			row.id, row.seq, row.at, row.from, row.to, row.reason, row.detail)
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}

	db := openAt(t, path)
	// The cursor of a page that ended with number 5, as the version before the migration made it.
	page, next, err := db.Events(t.Context(), a.ID, 1, "AWUAAAAAAAAABXNieF9hYWFhYWFhYWFhYWFhYWFhYWFhYQ")
	if err != nil || len(page) != 1 || page[0].ID != "evt_0000000004" || page[0].Detail != "tcp" ||
		page[0].At.UnixMicro() != 400 || next == "" {
		t.Errorf("the page after an old cursor is %+v, %q, %v", page, next, err)
	}
	mustMove(t, db, a.ID, sandbox.Creating, sandbox.Running, start)
	var ids []string
	listed, _, err := db.Events(t.Context(), a.ID, 10, "")
	for _, e := range listed {
		ids = append(ids, e.ID)
	}
	if want := []string{"evt_0000000008", "evt_0000000007", "evt_0000000006", "evt_0000000005", "evt_0000000004",
		"evt_0000000003"}; err != nil || !slices.Equal(ids, want) {
		t.Errorf("the listing has %q, want %q, %v", ids, want, err)
	}
	all, err := db.ReadAllEvents(t.Context(), event.Oldest, 100)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range all {
		got = append(got, fmt.Sprintf("%s %s %s %s", e.OrgID, e.Type, e.SnapshotID, e.Name))
	}
	want := []string{"org_b sandbox.creating  ", "org_a sandbox.running  ", "org_a sandbox.egress_denied  ",
		"org_a snapshot.created " + snap + " mine",
		"org_b sandbox.failed  ", "org_a snapshot.created " + snap + " ", "org_a sandbox.forked  ", "org_a sandbox.running  "}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the feed (-want +got):\n%s", diff)
	}
	for _, e := range all {
		if !e.Type.Known() {
			t.Errorf("type %s", e.Type)
		}
	}
}

// TestMigrateReadyBuilds migrates templates and tags from version 11 of the schema: the build of a version is
// known if it is the newest one.
func TestMigrateReadyBuilds(t *testing.T) {
	path, old := openOld(t, 11)
	for _, status := range []string{"ready", "failed"} {
		if _, err := old.Exec(`INSERT INTO templates (id, org_id, name, description, status, progress, build_error, version,
			image, image_size, source, inputs, env, workdir, run_as, size, disk_mb, egress, created_at, build_id)
			VALUES ('tpl_' || $1, 'org_a', $1, '', $1, '', 'null', 2, 'abc', 5, 's', 'i', '{}', '', 'root', '', 0,
			'{"mode":"allow_all"}', 1000000, 'bld_' || $1)`, status); err != nil {
			t.Fatal(err)
		}
	}
	for _, query := range []string{
		"INSERT INTO template_tags (template_id, tag, build_id, image, version, created_at) VALUES ('tpl_ready', 'v1', 'bld_1', 'abc', '{}', 5)",
		"INSERT INTO template_builds (template_id, definition, context, refresh, private) VALUES ('tpl_ready', '{}', 'c', TRUE, FALSE)",
	} {
		if _, err := old.Exec(query); err != nil {
			t.Fatal(err)
		}
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	db := openAt(t, path)
	for name, want := range map[string]string{"ready": "bld_ready", "failed": ""} {
		if tpl, err := db.GetTemplate(t.Context(), "org_a", name); err != nil || tpl.ReadyBuild != want || tpl.Version != 2 {
			t.Errorf("the template that is %s: %+v, %v", name, tpl, err)
		}
	}
	if tags, err := db.Tags(t.Context(), "tpl_ready"); err != nil || len(tags) != 1 || tags[0].Gone ||
		tags[0].BuildID != "bld_1" {
		t.Errorf("the tags are %+v, %v", tags, err)
	}
	if b, err := db.GetBuild(t.Context(), "tpl_ready", "bld_ready"); err != nil || b.Context != "c" || b.Repairs != "" {
		t.Errorf("the build is %+v, %v", b, err)
	}
}
