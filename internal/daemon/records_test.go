package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/config"
)

// TestRecords opens the records of data directories in SQLite and in PostgreSQL, and checks which mixtures are refused.
func TestRecords(t *testing.T) {
	pg := caytest.StartPostgres(t)
	url, err := pg.Create("cay", "")
	if err != nil {
		t.Fatal(err)
	}
	postgres := config.Store{URL: config.Secret(url), MaxConns: 4}
	open := func(dir string, s config.Store, want string) (instance string) {
		t.Helper()
		db, session, err := openRecords(t.Context(), config.Config{DataDir: dir, Store: s}, false)
		if err == nil {
			err = db.Close()
		}
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("opening: %v, want %q", err, want)
		}
		return session.Holder.Node
	}
	a, b, c := t.TempDir(), t.TempDir(), t.TempDir()
	none := postgres
	none.URL = config.Secret(pg.URL("none"))
	open(a, none, "does not exist")
	// The directory can still have its records in SQLite.
	if _, err := os.Stat(filepath.Join(a, instanceFile)); err == nil {
		t.Error("a database that cannot be opened left an instance")
	}
	own := open(a, postgres, "")
	if again := open(a, postgres, ""); again != own || own == "" {
		t.Errorf("the instance is %q, and then %q", own, again)
	}
	open(a, config.Store{}, "set store.url")
	open(b, postgres, "belong to the server instance "+own)
	open(b, config.Store{}, "") // it can still have its records in SQLite
	open(c, config.Store{}, "")
	open(c, postgres, "cay.db")
	if got, err := instanceOf(t.Context(), a); err != nil || got != own {
		t.Errorf("the instance of the directory is %q, %v", got, err)
	}
	if got, err := instanceOf(t.Context(), t.TempDir()); err != nil || got != "" {
		t.Errorf("the instance of an empty directory is %q, %v", got, err)
	}
	id, err := directoryID(a)
	if again, err2 := directoryID(a); err != nil || err2 != nil || id == "" || again != id {
		t.Errorf("the id of the directory is %q, %v, and then %q, %v", id, err, again, err2)
	}
	if other, err := directoryID(b); err != nil || other == id {
		t.Errorf("the id of another directory is %q, %v", other, err)
	}
	if f := CheckRecords(t.Context(), none); f.OK {
		t.Errorf("doctor accepts a database that does not exist: %s", f.Detail)
	}
	if f := CheckRecords(t.Context(), postgres); !f.OK || !strings.Contains(f.Detail, "PostgreSQL 1") {
		t.Errorf("doctor says %+v", f)
	}
}
