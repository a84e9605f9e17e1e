package store

import (
	"bytes"
	"context"
	"database/sql"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/webhook"
)

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
	testStores(t, func(t *testing.T) *DB { return open(t) })
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

const aSecret = "a-secret-that-nobody-else-would-write"

// TestSecretsAreForgotten checks that the files of the database do not contain the secrets of ended
// sandboxes, deleted snapshots and webhooks, and dropped pooled sandboxes.
func TestSecretsAreForgotten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cay.db")
	db := openAt(t, path)
	ctx := t.Context()
	for i, to := range []sandbox.State{sandbox.Destroyed, sandbox.Failed} {
		for size := range 3 { // the value is in the page of the row, or in pages of its own
			s := small("org_a", i)
			s.Env = map[string]string{"KEY": strings.Repeat(aSecret, 1+size*2000)}
			s.Token, s.FrontData = aSecret, aSecret
			mustInsert(t, db, s)
			mustMove(t, db, s.ID, sandbox.Creating, to, start)
			got, err := db.Get(ctx, s.ID)
			if err != nil || len(got.Env) != 0 || got.Token != "" || got.FrontData != "" {
				t.Errorf("%s: the row has %d variables, %q, %q, %v", to, len(got.Env), got.Token, got.FrontData, err)
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
	hook := aWebhook(1)
	hook.Secret = webhook.Secret(aSecret)
	if err := db.AddWebhook(ctx, hook, 0); err != nil {
		t.Fatal(err)
	}
	if err := db.DeleteWebhook(ctx, hook.OrgID, hook.ID, start); err != nil {
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
