package store

import (
	"flag"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
)

// poolOfTests is the number of connections of each database of a test: enough for transactions to meet.
const poolOfTests = 8

// shared is the PostgreSQL server of all tests of this package. Its database "migrated" has the present schema.
var shared struct {
	once   sync.Once
	server *caytest.Postgres
	err    error
	count  atomic.Int64 // the databases made
}

func sharedPostgres(t testing.TB) *caytest.Postgres {
	t.Helper()
	shared.once.Do(func() {
		if shared.server, shared.err = caytest.NewPostgres(); shared.err != nil {
			return
		}
		var url string
		if url, shared.err = shared.server.Create("migrated", ""); shared.err != nil {
			return
		}
		var db *DB
		if db, shared.err = OpenPostgres(t.Context(), PostgresConfig{URL: url}); shared.err == nil {
			shared.err = db.Close()
		}
	})
	if shared.err != nil {
		caytest.Missing(t, shared.err.Error())
	}
	return shared.server
}

// stopPostgres removes the server of the tests, if one was started.
func stopPostgres() error {
	if shared.server == nil {
		return nil
	}
	return shared.server.Remove()
}

// newDatabase returns the address of a new database, with the present schema if migrated is true.
func newDatabase(t testing.TB, migrated bool) string {
	t.Helper()
	server := sharedPostgres(t)
	template := ""
	if migrated {
		template = "migrated"
	}
	url, err := server.Create(fmt.Sprint("db", shared.count.Add(1)), template)
	if err != nil {
		t.Fatal(err)
	}
	return url
}

func openURL(t testing.TB, url string) *DB {
	t.Helper()
	db, err := OpenPostgres(t.Context(), PostgresConfig{URL: url, MaxConns: poolOfTests})
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

func openPostgres(t testing.TB) *DB {
	t.Helper()
	return openURL(t, newDatabase(t, true))
}

func TestPostgres(t *testing.T) {
	testStores(t, func(t *testing.T) *DB { return openPostgres(t) })
}

// TestSchemasAgree checks that both databases have the same tables with the same columns, except for the table commits
// and the number that orders the events of PostgreSQL before they have a seq.
func TestSchemasAgree(t *testing.T) {
	columns := func(db *DB, query string) []string {
		all, err := texts(t.Context(), db.reader, query)
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(all)
		return all
	}
	sqlite := columns(open(t), `SELECT t.name || '.' || c.name || ' ' ||
		LOWER(REPLACE(c.type, 'INTEGER', 'BIGINT')) || ' ' || c."notnull"
		FROM sqlite_schema t, pragma_table_info(t.name) c
		WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite_%' AND t.name NOT LIKE 'goose_%'`)
	postgres := columns(openPostgres(t), `SELECT table_name || '.' || column_name || ' ' || data_type || ' ' ||
		CASE WHEN is_nullable = 'NO' THEN 1 ELSE 0 END FROM information_schema.columns
		WHERE table_schema = 'public' AND table_name NOT LIKE 'goose_%' AND table_name <> 'commits'`)
	want := append(slices.Clone(sqlite), "events.written bigint 1", "events.seq bigint 0")
	want = slices.DeleteFunc(want, func(c string) bool { return c == "events.seq bigint 1" })
	slices.Sort(want)
	if len(sqlite) < 100 {
		t.Errorf("SQLite has only %d columns", len(sqlite))
	}
	if diff := cmp.Diff(want, postgres); diff != "" {
		t.Errorf("PostgreSQL (-want +got):\n%s", diff)
	}
}

// TestPostgresTextsAreBytes checks that no text has an order of the machine's language.
func TestPostgresTextsAreBytes(t *testing.T) {
	db := openPostgres(t)
	other, err := texts(t.Context(), db.reader, `SELECT table_name || '.' || column_name FROM information_schema.columns
		WHERE table_schema = 'public' AND data_type = 'text' AND collation_name IS DISTINCT FROM 'C'`)
	if err != nil || len(other) > 0 {
		t.Errorf("columns with another order: %q, %v", other, err)
	}
}

// TestPostgresOpenAtOnce opens a database with no schema from many servers at once.
func TestPostgresOpenAtOnce(t *testing.T) {
	url := newDatabase(t, false)
	var wg sync.WaitGroup
	names := make([]string, 6)
	for i := range names {
		wg.Go(func() {
			db, err := OpenPostgres(t.Context(), PostgresConfig{URL: url, MaxConns: 2})
			if err != nil {
				t.Error(err)
				return
			}
			if names[i], err = db.FirstSetting(t.Context(), "instance", fmt.Sprint(i)); err != nil {
				t.Error(err)
			}
			if err := db.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if names = slices.Compact(names); len(names) != 1 || names[0] == "" {
		t.Errorf("servers that start at once read the settings %q", names)
	}
}

func TestPostgresRefusesNewerSchema(t *testing.T) {
	url := newDatabase(t, true)
	db := openURL(t, url)
	if _, err := db.writer.Exec("INSERT INTO goose_db_version (version_id, is_applied) VALUES (99999, true)"); err != nil {
		t.Fatal(err)
	}
	_, err := OpenPostgres(t.Context(), PostgresConfig{URL: url})
	if err == nil || !strings.Contains(err.Error(), "newer cay") {
		t.Errorf("opening a newer database: %v", err)
	}
}

// TestPostgresRefuses checks what OpenPostgres says about databases that it cannot use.
func TestPostgresRefuses(t *testing.T) {
	server := sharedPostgres(t)
	const latin = "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'"
	if err := server.Exec("postgres", latin); err != nil {
		t.Fatal(err)
	}
	url := newDatabase(t, true)
	for name, c := range map[string]struct{ url, want string }{
		"encoding":             {server.URL("latin"), "UTF8"},
		"no such database":     {server.URL("none"), "does not exist"},
		"not durable":          {url + "&synchronous_commit=off", "synchronous_commit"},
		"another scheme":       {"mysql://a/b", "postgres://"},
		"no protection":        {"postgres://cay@db.example.com/cay", "sslmode"},
		"no server":            {"postgres:///cay?host=/nonexistent", "no such file"},
		"a bad parameter":      {"postgres://cay@127.0.0.1/cay?sslmode=always", "sslmode"},
		"nothing":              {"", "postgres://"},
		"several, one unsafe":  {"postgres://cay@127.0.0.1:1,10.0.0.1:2/cay", "sslmode"},
		"a password is hidden": {"postgres://cay:sesame@127.0.0.1:x/cay", ""},
	} {
		db, err := OpenPostgres(t.Context(), PostgresConfig{URL: c.url})
		if err == nil {
			t.Errorf("%s: opened, %v", name, db.Close())
			continue
		}
		if !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "sesame") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestPostgresTexts writes texts that PostgreSQL refuses.
func TestPostgresTexts(t *testing.T) {
	db := openPostgres(t)
	ctx := t.Context()
	s := fullSandbox("org_a", 0)
	s.Error, s.FrontData = "a\x00b\xff\xfec", "\x00"
	s.Metadata = map[string]string{"k\x00": "v\xff", "k": "w", "\xc3": "\x00"}
	s.Env = map[string]string{"A": "\x00\xff"}
	mustInsert(t, db, s)
	got, err := db.Get(ctx, s.ID)
	if err != nil || got.Error != "ab\uFFFDc" || got.FrontData != "" || got.Env["A"] != "\x00\uFFFD" {
		t.Errorf("read back: %q, %q, %q, %v", got.Error, got.FrontData, got.Env["A"], err)
	}
	ids := listIDs(t, db, sandbox.Filter{OrgID: "org_a\x00", Metadata: map[string]string{"\xc3": "\x00"}, Limit: 5})
	if len(ids) != 1 {
		t.Errorf("found %v", ids)
	}
	note := sandbox.Event{SandboxID: s.ID, At: start, Reason: "forked", Detail: "\x00\xff"}
	if err := db.Note(ctx, []sandbox.Event{note}); err != nil {
		t.Error(err)
	}
	if _, err := db.GetTemplate(ctx, "org_a", "\x00\xff"); !fault.Is(err, fault.NotFound) {
		t.Errorf("looking for a template: %v", err)
	}
}

// quotaRounds sets how often TestPostgresQuota makes its creates. 1000 rounds take a minute.
var quotaRounds = flag.Int("quota.rounds", 25, "how often to make 40 creates at a quota of 10")

// TestPostgresQuota makes 40 creates at once at a quota of 10, many times: with and without a key of their own, cold
// and from the warm pool.
func TestPostgresQuota(t *testing.T) {
	db := openPostgres(t)
	for round := range *quotaRounds {
		org := fmt.Sprint("org_", round)
		var made, refused atomic.Int64
		var wg sync.WaitGroup
		for i := range 40 {
			s := small(org, i)
			create := db.Insert
			if i%4 == 1 {
				if err := db.AddPooled(t.Context(), sandbox.Pooled{ID: s.ID, Run: s.Run, CreatedAt: start}); err != nil {
					t.Fatal(err)
				}
				create, s.State, s.StartedAt = db.Claim, sandbox.Running, start
			}
			wg.Go(func() {
				once := sandbox.Once{}
				if i%2 == 0 {
					once = sandbox.Once{Key: fmt.Sprint(i), Hash: "h"}
				}
				switch _, _, err := create(t.Context(), s, sandbox.Quota{Sandboxes: 10}, once); {
				case err == nil:
					made.Add(1)
				case fault.Is(err, fault.Exhausted):
					refused.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if made.Load() != 10 || refused.Load() != 30 {
			t.Fatalf("round %d: %d made, %d refused", round, made.Load(), refused.Load())
		}
	}
}

// TestPostgresCounts checks the other limits that are counted, and the keys, with many callers at once.
func TestPostgresCounts(t *testing.T) {
	db := openPostgres(t)
	mustPutOrg(t, db, "a", 0)
	s := mustInsert(t, db, small("org_a", 0))
	for name, c := range map[string]struct {
		want int64
		kind fault.Kind
		call func(i int) error
	}{
		"keys": {4, fault.Exhausted, func(i int) error { return db.PutKey(t.Context(), aKey("a", 1+i), 5) }},
		"templates": {5, fault.Exhausted, func(i int) error {
			return db.InsertTemplate(t.Context(), aTemplate("org_a", fmt.Sprint(i), i), nil, 5)
		}},
		"one name": {1, fault.Conflict, func(i int) error {
			tpl := aTemplate("org_b", "same", i)
			tpl.ID = fmt.Sprint("tpl_same", i)
			return db.InsertTemplate(t.Context(), tpl, nil, 0)
		}},
		"snapshots": {5, fault.Exhausted, func(i int) error {
			return db.AddSnapshot(t.Context(), fullSnapshot("org_a", fmt.Sprint(i), i), 5)
		}},
		"webhooks": {5, fault.Exhausted, func(i int) error { return db.AddWebhook(t.Context(), aWebhook(i), 5) }},
		"ports": {sandbox.MaxPublicPorts, fault.Conflict, func(i int) error {
			return db.SetPublicPort(t.Context(), s.ID, 1+i, true)
		}},
		"pooled": {1, fault.Internal, func(int) error {
			m := fullPooled(0)
			m.ID = "sbx_same"
			return db.AddPooled(t.Context(), m)
		}},
		"one key": {1, fault.Conflict, func(i int) error {
			_, found, err := db.Insert(t.Context(), small("org_a", i), sandbox.Quota{}, sandbox.Once{Key: "k", Hash: "h"})
			if err == nil && found {
				err = fault.New(fault.Conflict, "found", "there is one already")
			}
			return err
		}},
	} {
		var done atomic.Int64
		var wg sync.WaitGroup
		for i := range sandbox.MaxPublicPorts + 20 {
			wg.Go(func() {
				switch err := c.call(i); {
				case err == nil:
					done.Add(1)
				case fault.KindOf(err) != c.kind:
					t.Errorf("%s: %v", name, err)
				}
			})
		}
		wg.Wait()
		if done.Load() != c.want {
			t.Errorf("%s: %d calls succeeded, want %d", name, done.Load(), c.want)
		}
	}
}

// TestPostgresOnceOnDatabaseTime repeats creates with machines whose clocks are wrong by two days.
func TestPostgresOnceOnDatabaseTime(t *testing.T) {
	db := openPostgres(t)
	ctx := t.Context()
	once := sandbox.Once{Key: "k", Hash: "h"}
	for i, wrong := range []time.Duration{0, 48 * time.Hour, -48 * time.Hour} {
		s := small("org_a", 0)
		s.CreatedAt = time.Now().Add(wrong)
		if _, err := db.Purge(ctx, start, s.CreatedAt, 0); err != nil {
			t.Fatal(err)
		}
		if _, found, err := db.Insert(ctx, s, sandbox.Quota{}, once); err != nil || found != (i > 0) {
			t.Errorf("a clock that is wrong by %s: found %v, %v", wrong, found, err)
		}
	}
}
