package store

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pressly/goose/v3"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
)

// start is the time from which the tests count. It has microseconds, the finest unit that the store keeps.
var start = time.Date(2026, 3, 1, 12, 30, 15, 123456000, time.UTC)

func TestMain(m *testing.M) {
	if path := os.Getenv("CAY_STORE_TEST_CRASH"); path != "" {
		commitForever(path)
	}
	os.Exit(m.Run())
}

func openAt(t testing.TB, path string) *DB {
	t.Helper()
	db, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
	})
	return db
}

func open(t testing.TB) *DB {
	t.Helper()
	return openAt(t, filepath.Join(t.TempDir(), "cay.db"))
}

func TestSQLite(t *testing.T) {
	t.Run("sandbox", func(t *testing.T) { testSandboxStore(t, func(t *testing.T) sandbox.Store { return open(t) }) })
	t.Run("template", func(t *testing.T) { testTemplateStore(t, func(t *testing.T) template.Store { return open(t) }) })
	t.Run("auth", func(t *testing.T) { testAuthStore(t, func(t *testing.T) auth.Store { return open(t) }) })
}

func TestOpenIsPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "odd name?#%20&.db")
	if err := os.WriteFile(path, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	db := openAt(t, path)
	if err := db.SetSetting(t.Context(), "a", "b"); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Dir(path) + "/*")
	if err != nil || len(files) < 2 {
		t.Fatalf("files %q, %v: want the database and its log", files, err)
	}
	for _, f := range files {
		info, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o, want 600", f, info.Mode().Perm())
		}
		if !strings.HasPrefix(f, path) {
			t.Errorf("unexpected file %s", f)
		}
	}
}

func TestPragmas(t *testing.T) {
	db := open(t)
	for _, c := range []struct {
		db           *sql.DB
		pragma, want string
	}{
		{db.writer, "journal_mode", "wal"},
		{db.writer, "synchronous", "2"},
		{db.writer, "foreign_keys", "1"},
		{db.writer, "busy_timeout", fmt.Sprint(busyMillis)},
		{db.writer, "secure_delete", "1"},
		{db.writer, "query_only", "0"},
		{db.reader, "query_only", "1"},
		{db.reader, "busy_timeout", fmt.Sprint(busyMillis)},
	} {
		var got string
		if err := c.db.QueryRowContext(t.Context(), "PRAGMA "+c.pragma).Scan(&got); err != nil || got != c.want {
			t.Errorf("%s is %q, %v; want %q", c.pragma, got, err, c.want)
		}
	}
}

func TestOpenAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cay.db")
	for i := range 3 {
		db, err := Open(t.Context(), path)
		if err != nil {
			t.Fatalf("opening, time %d: %v", i+1, err)
		}
		value, found, err := db.Setting(t.Context(), "instance")
		if err != nil || found != (i > 0) || found && value != fmt.Sprint(i-1) {
			t.Errorf("time %d: setting %q, %v, %v", i+1, value, found, err)
		}
		if err := db.SetSetting(t.Context(), "instance", fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
		if err := db.Ping(t.Context()); err != nil {
			t.Errorf("ping: %v", err)
		}
		if err := db.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
		if err := db.Ping(context.Background()); err == nil {
			t.Error("a closed database answers")
		}
	}
}

func TestOpenRefusesNewerSchema(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cay.db")
	db, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.writer.Exec("INSERT INTO goose_db_version (version_id, is_applied) VALUES (99999, 1)"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = Open(t.Context(), path)
	if err == nil || !strings.Contains(err.Error(), "newer cay") {
		t.Errorf("opening a newer database: %v", err)
	}
}

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
	if old, err := db.Get(t.Context(), s.ID); err != nil || old.AtEnd != sandbox.EndDestroys || old.Surface != "" {
		t.Errorf("a migrated sandbox has AtEnd %q, Surface %q, %v", old.AtEnd, old.Surface, err)
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

const aSecret = "a-secret-that-nobody-else-would-write"

// TestSecretsAreForgotten checks that the files of the database do not contain the secrets of ended
// sandboxes, deleted snapshots and dropped pooled sandboxes.
func TestSecretsAreForgotten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cay.db")
	db := openAt(t, path)
	ctx := t.Context()
	for i, to := range []sandbox.State{sandbox.Destroyed, sandbox.Failed} {
		for size := range 3 { // the value is in the page of the row, or in pages of its own
			s := small("org_a", i)
			s.Env = map[string]string{"KEY": strings.Repeat(aSecret, 1+size*2000)}
			s.Token, s.Surface = aSecret, aSecret
			mustInsert(t, db, s)
			mustMove(t, db, s.ID, sandbox.Creating, to, start)
			got, err := db.Get(ctx, s.ID)
			if err != nil || len(got.Env) != 0 || got.Token != "" || got.Surface != "" {
				t.Errorf("%s: the row has %d variables, %q, %q, %v", to, len(got.Env), got.Token, got.Surface, err)
			}
		}
	}
	snap := sandbox.Snapshot{ID: "snap_a", OrgID: "org_a", State: sandbox.SnapshotCreating, SandboxID: "sbx_a",
		CreatedAt: start, Shape: sandbox.Shape{Env: map[string]string{"KEY": aSecret}}}
	if err := db.AddSnapshot(ctx, snap, 0); err != nil {
		t.Fatal(err)
	}
	if err := db.EndSnapshot(ctx, snap.ID); err != nil {
		t.Fatal(err)
	}
	if got, err := db.GetSnapshot(ctx, snap.ID); err != nil || len(got.Env) != 0 {
		t.Errorf("a snapshot that is being deleted has %v, %v", got.Env, err)
	}
	if err := db.AddPooled(ctx, sandbox.Pooled{ID: "sbx_m", Token: aSecret, CreatedAt: start}); err != nil {
		t.Fatal(err)
	}
	if err := db.DropPooled(ctx, "sbx_m"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil { // writes the log back into the database file
		t.Fatal(err)
	}
	files, err := filepath.Glob(path + "*")
	if err != nil || len(files) == 0 {
		t.Fatalf("files %q, %v", files, err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err != nil || bytes.Contains(b, []byte(aSecret)) {
			t.Errorf("%s has a secret that should be erased (%v)", filepath.Base(f), err)
		}
	}
}

func TestOpenRefusesWhatIsNoDatabase(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cay.db")
	text := strings.Repeat("this is a letter to a friend\n", 100)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if db, err := Open(t.Context(), path); err == nil {
		t.Error("opened a file that is not a database", db.Close())
	}
	if after, err := os.ReadFile(path); err != nil || string(after) != text {
		t.Errorf("Open changed a file that is not a database (%v)", err)
	}
	if _, err := Open(t.Context(), filepath.Join(t.TempDir(), "no", "such", "folder")); err == nil {
		t.Error("opened a file in a folder that does not exist")
	}
}

// commitForever runs in the process that the crash test kills. It inserts sandboxes and makes a
// transition of each, and prints each change after the store has committed it.
func commitForever(path string) {
	ctx := context.Background()
	db, err := Open(ctx, path)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	for i := 0; ; i++ {
		s := sandbox.Sandbox{ID: sandbox.NewID(), OrgID: "org_crash", State: sandbox.Creating,
			CreatedAt: start.Add(time.Duration(i) * time.Second)}
		_, _, err := db.Insert(ctx, s, sandbox.Quota{}, sandbox.Once{Key: string(s.ID), Hash: "h"})
		if err == nil {
			fmt.Println(sandbox.Creating, s.ID)
			_, err = db.Transition(ctx, sandbox.Change{ID: s.ID, From: []sandbox.State{sandbox.Creating},
				To: sandbox.Running, At: start})
		}
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println(sandbox.Running, s.ID)
	}
}

// TestKilled kills a process while it commits, and checks that every change it printed is stored.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cay.db")
	promised := make(map[sandbox.ID]sandbox.State)
	for round := range 3 {
		killWhileCommitting(t, path, 40+17*round, promised)
		db, err := Open(t.Context(), path)
		if err != nil {
			t.Fatalf("round %d: opening after the kill: %v", round, err)
		}
		checkWhole(t, db, promised)
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	}
}

// killWhileCommitting starts a process that commits and kills it. It adds the changes that the process
// printed before its end to promised.
func killWhileCommitting(t *testing.T, path string, after int, promised map[sandbox.ID]sandbox.State) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "CAY_STORE_TEST_CRASH="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for n := 0; lines.Scan(); n++ {
		state, id, _ := strings.Cut(lines.Text(), " ")
		if state == "error" {
			t.Errorf("the process printed: %s", lines.Text())
		}
		promised[sandbox.ID(id)] = sandbox.State(state)
		if n == after {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.Exited() {
		t.Fatalf("the process was not killed: %v", cmd.ProcessState)
	}
	if len(promised) < after/2 {
		t.Fatalf("the process printed only %d sandboxes", len(promised))
	}
}

// checkFeed checks that the feed has each event of every sandbox exactly once.
func checkFeed(t *testing.T, db *DB, promised map[sandbox.ID]sandbox.State) {
	t.Helper()
	all, _ := feed(t, db, event.Query{OrgID: "org_crash", After: event.Oldest, Limit: 1000})
	told := map[string][]string{}
	for _, e := range all {
		told[e.SandboxID] = append(told[e.SandboxID], e.To)
	}
	for id, to := range told {
		s, err := db.Get(t.Context(), sandbox.ID(id))
		want := []string{"creating", "running"}[:len(to)]
		if err != nil || !slices.Equal(to, want) || to[len(to)-1] != string(s.State) {
			t.Errorf("%s is %s, the feed has %q, %v", id, s.State, to, err)
		}
	}
	for id := range promised {
		if told[string(id)] == nil {
			t.Errorf("the feed has no events of %s", id)
		}
	}
}

// checkWhole checks that every promised sandbox is stored and that no row is incomplete.
func checkWhole(t *testing.T, db *DB, promised map[sandbox.ID]sandbox.State) {
	t.Helper()
	for id, state := range promised {
		s, err := db.Get(t.Context(), id)
		if err != nil {
			t.Errorf("lost %s: %v", id, err)
			continue
		}
		// The kill may have come after the commit and before the process printed it.
		if s.State != state && !(state == sandbox.Creating && s.State == sandbox.Running) {
			t.Errorf("%s is %s, promised %s", id, s.State, state)
		}
		events, _, err := db.Events(t.Context(), id, 10, "")
		if err != nil || len(events) == 0 || events[0].To != s.State {
			t.Errorf("%s is %s but its events are %v (%v)", id, s.State, events, err)
		}
	}
	var verdict string
	if err := db.reader.QueryRowContext(t.Context(), "PRAGMA integrity_check").Scan(&verdict); err != nil ||
		verdict != "ok" {
		t.Errorf("integrity check: %q, %v", verdict, err)
	}
	checkFeed(t, db, promised)
	var sandboxes, once int
	if err := db.reader.QueryRowContext(t.Context(),
		"SELECT (SELECT COUNT(*) FROM sandboxes), (SELECT COUNT(*) FROM idempotency)").Scan(&sandboxes, &once); err != nil {
		t.Fatal(err)
	}
	if sandboxes < len(promised) || sandboxes > len(promised)+3 || sandboxes < once {
		t.Errorf("%d sandboxes, %d idempotency keys, %d promised", sandboxes, once, len(promised))
	}
}

// TestPlans checks that frequent queries use their indexes. Without it, a scan of a table full of
// destroyed sandboxes would be noticed only on a machine that has run for a week.
func TestPlans(t *testing.T) {
	db := open(t)
	live := []sandbox.State{sandbox.Creating, sandbox.Running}
	list := func(f sandbox.Filter) (string, params) {
		f.OrgID, f.Limit = "o", 50
		q, p, err := listQuery(f)
		if err != nil {
			t.Fatal(err)
		}
		return q, p
	}
	snapshots, ps, err := listSnapshotsQuery(sandbox.SnapshotFilter{OrgID: "o", Limit: 50})
	if err != nil {
		t.Fatal(err)
	}
	listing, pl, err := listingQuery("sbx_a", 50, cursor{listEvents, 5, "sbx_a"}.String())
	if err != nil {
		t.Fatal(err)
	}
	page, pp := feedQuery(event.Query{OrgID: "o", After: 5, Limit: 50}, 9)
	filtered, pf := feedQuery(event.Query{OrgID: "o", After: 5, Limit: 50, SandboxID: "sbx_a",
		Types: []event.Type{event.OrgCreated, event.KeyCreated}}, 9)
	q1, p1 := list(sandbox.Filter{States: live})
	q2, p2 := list(sandbox.Filter{States: []sandbox.State{sandbox.Destroyed},
		Cursor: cursor{listSandboxes, 5, "sbx_a"}.String()})
	for _, c := range []struct {
		query string
		args  []any
		index string
	}{
		{q1, p1, "sandboxes_live_page"},
		{q2, p2, "sandboxes_page"},
		{snapshots, ps, "snapshots_page"},
		{findSnapshot, []any{"o", "n", "ready"}, "snapshots_name"},
		{"SELECT id FROM snapshots WHERE state <> 'ready' ORDER BY created_at, id", nil, "snapshots_unready"},
		{keyByHash, []any{"x"}, "sqlite_autoindex_api_keys"},
		{liveKeys, []any{"o", 5}, "api_keys_page"},
		{crowded, []any{5}, "sandboxes_over"},
		{purgeMany, []any{"o", 5, 5}, "sandboxes_over"},
		{"SELECT COUNT(*) FROM sandboxes WHERE org_id = $1 AND ended_at IS NULL", []any{"o"}, "sandboxes_live_page"},
		{"SELECT id FROM sandboxes WHERE ended_at IS NULL ORDER BY created_at, id", nil, "sandboxes_live"},
		{"SELECT id FROM sandboxes WHERE ended_at IS NOT NULL AND ended_at < $1 ORDER BY ended_at LIMIT 5", []any{5}, "sandboxes_ended"},
		{"SELECT COUNT(*) FROM sandboxes WHERE template_id = $1 AND ended_at IS NULL", []any{"t"}, "sandboxes_of_template"},
		{"SELECT id FROM templates WHERE queued_at IS NOT NULL ORDER BY queued_at, id", nil, "templates_queued"},
		{"SELECT port FROM public_ports WHERE sandbox_id = $1 ORDER BY port", []any{"s"}, "sqlite_autoindex_public_ports"},
		{listing, pl, "events_listing"},
		{page, pp, "events_feed"},
		{filtered, pf, "events_feed"},
		{lastEvent, []any{"o"}, "events_feed"},
		{scanEnd, []any{"o", 5, 9, 50}, "events_feed"},
		{surplus, []any{"o", 5, 50}, "events_feed"},
		{oldest, []any{"o", 5, 9, 50}, "events_feed"},
		{trim, []any{"o", 5, 9}, "events_feed"},
		{trimmable, nil, "SCAN events"}, // reads the last row alone
		{insertListed, []any{5, "o", 5, "t", "s", "", "", "", "", ""}, "events_listing"},
		{insertEvent, []any{5, "o", 5, "t", "s", "", "", "", "", ""}, "SCAN events"},
		{"DELETE FROM events WHERE number IS NOT NULL AND sandbox_id IN ($1, $2)" + isBeyond, []any{"a", "b"},
			"events_listing"},
		{"SELECT sandbox_id FROM sandbox_metadata WHERE org_id = $1 AND name = $2 AND value = $3", []any{"o", "n", "v"}, "sandbox_metadata_search"},
	} {
		rows, err := db.reader.QueryContext(t.Context(), "EXPLAIN QUERY PLAN "+c.query, c.args...)
		if err != nil {
			t.Fatal(err)
		}
		var plan []string
		for rows.Next() {
			var a, b, d int
			var step string
			if err := rows.Scan(&a, &b, &d, &step); err != nil {
				t.Fatal(err)
			}
			plan = append(plan, step)
		}
		if err := rows.Close(); err != nil {
			t.Fatal(err)
		}
		text := strings.Join(plan, "; ")
		if !strings.Contains(text, c.index) || strings.Contains(text, "TEMP B-TREE") {
			t.Errorf("%s\n\tplan %q does not use %s alone", c.query, text, c.index)
		}
	}
}

func BenchmarkInsertTransition(b *testing.B) {
	db := open(b)
	for i := 0; b.Loop(); i++ {
		s := fullSandbox("org_bench", i)
		if _, _, err := db.Insert(b.Context(), s, sandbox.Quota{Sandboxes: 1 << 30}, sandbox.Once{}); err != nil {
			b.Fatal(err)
		}
		if _, err := db.Transition(b.Context(), sandbox.Change{ID: s.ID, From: []sandbox.State{sandbox.Creating},
			To: sandbox.Running, At: start}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGet(b *testing.B) {
	db := open(b)
	s := fullSandbox("org_bench", 0)
	if _, _, err := db.Insert(b.Context(), s, sandbox.Quota{}, sandbox.Once{}); err != nil {
		b.Fatal(err)
	}
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, err := db.Get(b.Context(), s.ID); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func BenchmarkKeyByHash(b *testing.B) {
	db := open(b)
	org, key := anOrg("bench", 0)
	if err := db.PutOrg(b.Context(), org, key); err != nil {
		b.Fatal(err)
	}
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if _, _, err := db.KeyByHash(b.Context(), key.Hash); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

func BenchmarkList50Of10000(b *testing.B) {
	db := open(b)
	for i := range 10_000 {
		s := fullSandbox("org_bench", i)
		tx, err := db.writer.BeginTx(b.Context(), nil)
		if err != nil {
			b.Fatal(err)
		}
		if err := insertSandbox(b.Context(), tx, &outbox{db: db, tx: tx}, s, sandbox.Once{}); err != nil {
			b.Fatal(err)
		}
		if i%10 != 0 {
			if _, err := tx.Exec("UPDATE sandboxes SET state = 'destroyed', ended_at = 5 WHERE id = $1", s.ID); err != nil {
				b.Fatal(err)
			}
		}
		if err := tx.Commit(); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		page, _, err := db.List(b.Context(), sandbox.Filter{OrgID: "org_bench",
			States: []sandbox.State{sandbox.Creating, sandbox.Running}, Limit: 50})
		if err != nil || len(page) != 50 {
			b.Fatal(len(page), err)
		}
	}
}
