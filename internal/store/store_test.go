package store

import (
	"fmt"
	"os"
	"reflect"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/fleet"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/template"
	"github.com/cayhq/cay/internal/webhook"
)

// start is the time from which the tests count. It has microseconds, the finest unit that the store keeps.
var start = time.Date(2026, 3, 1, 12, 30, 15, 123456000, time.UTC)

func TestMain(m *testing.M) {
	if path := os.Getenv("CAY_STORE_TEST_CRASH"); path != "" {
		commitForever(path)
	}
	code := m.Run()
	if err := stopPostgres(); err != nil {
		fmt.Println("removing PostgreSQL:", err)
		code = 1
	}
	os.Exit(code)
}

// testStores tests the contracts of all Store interfaces with the databases that open makes. A second
// kind of database has to pass it like the first.
func testStores(t *testing.T, openOne func(t *testing.T) *DB) {
	open := func(t *testing.T) *DB {
		db := openOne(t)
		if s := startSession(t, db, holderOfTests.Node); s.Holder != holderOfTests {
			t.Errorf("the session is %+v", s)
		}
		return db
	}
	t.Run("sandbox", func(t *testing.T) { testSandboxStore(t, func(t *testing.T) sandbox.Store { return open(t) }) })
	t.Run("template", func(t *testing.T) { testTemplateStore(t, func(t *testing.T) template.Store { return open(t) }) })
	t.Run("auth", func(t *testing.T) { testAuthStore(t, func(t *testing.T) auth.Store { return open(t) }) })
	t.Run("event", func(t *testing.T) { testEventStore(t, open) })
	t.Run("webhook", func(t *testing.T) { testWebhookStore(t, open) })
	t.Run("node", func(t *testing.T) { testNodeStore(t, open(t)) })
	t.Run("join", func(t *testing.T) { testJoinStore(t, open) })
	t.Run("checkpoints", func(t *testing.T) { testCheckpointStore(t, open(t)) })
	t.Run("template in use", func(t *testing.T) { templateInUse(t, open(t)) })
}

// TestContractsCallEveryMethod fails for a method of a Store that its suite does not test.
func TestContractsCallEveryMethod(t *testing.T) {
	for _, c := range []struct {
		contract reflect.Type
		receiver string
		files    []string
	}{
		{reflect.TypeFor[sandbox.Store](), "st",
			[]string{"sandbox_test.go", "pool_test.go", "ports_test.go", "snapshot_test.go", "lost_test.go"}},
		{reflect.TypeFor[sandbox.CheckpointStore](), "st", []string{"checkpoint_test.go"}},
		{reflect.TypeFor[fleet.Store](), "st", []string{"node_test.go", "join_test.go", "lost_test.go"}},
		{reflect.TypeFor[template.Store](), "st", []string{"template_test.go"}},
		{reflect.TypeFor[auth.Store](), "st", []string{"auth_test.go"}},
		{reflect.TypeFor[event.Store](), "db", []string{"feed_test.go"}},
		{reflect.TypeFor[webhook.Store](), "st", []string{"webhook_test.go", "delivery_test.go"}},
	} {
		if missing := caytest.Uncalled(t, c.contract, c.receiver, c.files...); missing != nil {
			t.Errorf("no test of %s calls %q", c.contract, missing)
		}
	}
}

// templateInUse checks that a template with living sandboxes can be deleted only with force.
func templateInUse(t *testing.T, db *DB) {
	tpl := aTemplate("org_a", "a", 0)
	put(t, db, tpl)
	sbx := small("org_a", 1)
	sbx.TemplateID = tpl.ID
	mustInsert(t, db, sbx)
	wantFault(t, db.DeleteTemplate(t.Context(), tpl.ID, false), fault.Conflict, "template_in_use")
	if _, err := db.GetTemplate(t.Context(), "org_a", "a"); err != nil {
		t.Error(err)
	}
	if err := db.DeleteTemplate(t.Context(), tpl.ID, true); err != nil {
		t.Error(err)
	}
	if _, err := db.Get(t.Context(), sbx.ID); err != nil {
		t.Errorf("reading the sandbox of a deleted template: %v", err)
	}
	put(t, db, tpl)
	mustMove(t, db, sbx.ID, sandbox.Creating, sandbox.Destroyed, start)
	if err := db.DeleteTemplate(t.Context(), tpl.ID, false); err != nil {
		t.Errorf("deleting a template with a destroyed sandbox: %v", err)
	}
}

// onBoth runs a benchmark on both databases.
func onBoth(b *testing.B, run func(b *testing.B, db *DB)) {
	b.Run("sqlite", func(b *testing.B) { run(b, open(b)) })
	b.Run("postgres", func(b *testing.B) { run(b, openPostgres(b)) })
}

func BenchmarkInsertTransition(b *testing.B) { onBoth(b, benchmarkInsertTransition) }

func benchmarkInsertTransition(b *testing.B, db *DB) {
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

func BenchmarkGet(b *testing.B) { onBoth(b, benchmarkGet) }

func benchmarkGet(b *testing.B, db *DB) {
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

func BenchmarkKeyByHash(b *testing.B) { onBoth(b, benchmarkKeyByHash) }

func benchmarkKeyByHash(b *testing.B, db *DB) {
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
