package daemon

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/config"
	"github.com/cayhq/cay/internal/store"
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

// recordsOf opens the records of a server in PostgreSQL, which is in a fleet if fleet is true.
func recordsOf(t *testing.T, dir, url string, fleet bool) (*store.DB, store.Session, error) {
	t.Helper()
	cfg := config.Config{DataDir: dir, Store: config.Store{URL: config.Secret(url), MaxConns: 4}}
	if fleet {
		cfg.Fleet.Listen = "127.0.0.1:0"
	}
	return openRecords(t.Context(), cfg, false)
}

// newRecords returns the address of a new database in a PostgreSQL server.
func newRecords(t *testing.T, pg *caytest.Postgres, name string) string {
	t.Helper()
	url, err := pg.Create(name, "")
	if err != nil {
		t.Fatal(err)
	}
	return url
}

// openOnce opens records and closes them, and checks the error. It returns the node.
func openOnce(t *testing.T, dir, url string, fleet bool, want string) (node string) {
	t.Helper()
	db, session, err := recordsOf(t, dir, url, fleet)
	if err == nil {
		err = db.Close()
	}
	if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
		t.Errorf("opening: %v, want %q", err, want)
	}
	return session.Holder.Node
}

// TestRecordsOfAFleet opens the records of single servers and of fleets with servers of both kinds, and servers of a
// fleet at the same time.
func TestRecordsOfAFleet(t *testing.T) {
	pg := caytest.StartPostgres(t)
	const single, fleet = false, true
	a, b, c := t.TempDir(), t.TempDir(), t.TempDir()
	url := newRecords(t, pg, "one")
	own := openOnce(t, a, url, single, "")
	openOnce(t, b, url, single, "belong to the server instance "+own)
	openOnce(t, b, url, fleet, "belong to the server instance "+own+" alone")
	openOnce(t, a, url, single, "") // and a refusal changes nothing
	if node := openOnce(t, a, url, fleet, ""); node != own {
		t.Errorf("in the fleet the server has the node %q, and before %q", node, own)
	}
	if node := openOnce(t, b, url, fleet, ""); node == own || node == "" {
		t.Errorf("two servers have the node %q", node)
	}
	openOnce(t, a, url, single, "belong to a fleet")
	openOnce(t, c, url, single, "belong to a fleet")
	if node := openOnce(t, a, url, fleet, ""); node != own {
		t.Errorf("after others the server has the node %q, and before %q", node, own)
	}

	// New records become a fleet's with the first server, also if several start at once.
	url = newRecords(t, pg, "two")
	var wg sync.WaitGroup
	nodes := make([]string, 3)
	for i := range nodes {
		dir := t.TempDir()
		wg.Go(func() { nodes[i] = openOnce(t, dir, url, fleet, "") })
	}
	wg.Wait()
	if slices.Sort(nodes); len(slices.Compact(nodes)) != 3 || nodes[0] == "" {
		t.Errorf("the nodes are %q", nodes)
	}
	openOnce(t, t.TempDir(), url, single, "belong to a fleet")
}

// TestCopyMakesNoFleet starts a copy of a data directory as a server of a fleet while the single server runs. The
// records stay the single server's.
func TestCopyMakesNoFleet(t *testing.T) {
	url := newRecords(t, caytest.StartPostgres(t), "copied")
	dir, copied := t.TempDir(), t.TempDir()
	db, _, err := recordsOf(t, dir, url, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(t.Context(), 3*time.Second) // instead of the patience with the lock
	defer cancel()
	_, _, err = openRecords(short, config.Config{DataDir: copied, Fleet: config.Fleet{Listen: "127.0.0.1:0"},
		Store: config.Store{URL: config.Secret(url), MaxConns: 4}}, false)
	if err == nil || !strings.Contains(err.Error(), "another server works with the records") {
		t.Errorf("a copy of the data directory beside the server: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Error(err)
	}
	openOnce(t, dir, url, false, "")
}

// TestRangesOfServers gives two servers with the same records ranges of their own. The first has started with an
// earlier version, which kept the range in the records.
func TestRangesOfServers(t *testing.T) {
	url := newRecords(t, caytest.StartPostgres(t), "ranges")
	a, b := t.TempDir(), t.TempDir()
	old := netip.MustParsePrefix("10.201.0.0/20")
	open := func(dir, url string, fleet bool, want netip.Prefix) *store.DB {
		t.Helper()
		db, _, err := recordsOf(t, dir, url, fleet)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := lastRange(dir); err != nil || got != want {
			t.Errorf("the last range is %s, want %s, %v", got, want, err)
		}
		if value, found, err := db.Setting(t.Context(), settingRange); err != nil || found {
			t.Errorf("the records have the range %q, %v", value, err)
		}
		return db
	}
	finish := func(db *store.DB, err error) {
		t.Helper()
		if err := errors.Join(err, db.Close()); err != nil {
			t.Fatal(err)
		}
	}
	db := open(a, url, false, netip.Prefix{})
	finish(db, db.SetSetting(t.Context(), settingRange, old.String()))
	finish(open(a, url, true, old), nil)
	finish(open(b, url, true, netip.Prefix{}), nil)
	other := netip.MustParsePrefix("10.202.0.0/20")
	finish(open(b, url, true, netip.Prefix{}), writeID(filepath.Join(b, rangeFile), other.String()))
	finish(open(a, url, true, old), nil)
	finish(open(b, url, true, other), nil)

	// SQLite, and a damaged file.
	c := t.TempDir()
	db = open(c, "", false, netip.Prefix{})
	finish(db, db.SetSetting(t.Context(), settingRange, old.String()))
	finish(open(c, "", false, old), nil)
	if err := os.WriteFile(filepath.Join(c, rangeFile), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := lastRange(c); err == nil {
		t.Errorf("a damaged file gives %s", got)
	}
}
