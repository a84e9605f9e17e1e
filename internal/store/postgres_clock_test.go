package store

import (
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"
)

// TestPostgresClock works with a database whose clock is two days ahead of this machine's.
func TestPostgresClock(t *testing.T) {
	const ahead = 48 * time.Hour
	address := newDatabase(t, true)
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	statement := fmt.Sprintf(`CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE SQL AS
		$$ SELECT pg_catalog.clock_timestamp() + interval '%d hours' $$`, int(ahead.Hours()))
	if err := sharedPostgres(t).Exec(strings.TrimPrefix(u.Path, "/"), statement); err != nil {
		t.Fatal(err)
	}
	db := openURL(t, address+"&search_path=public,pg_catalog")
	near := func(what string, got time.Time) {
		t.Helper()
		if off := time.Until(got) - ahead; off.Abs() > time.Hour {
			t.Errorf("%s is %s from the time of the database", what, off)
		}
	}
	near("the present time", db.Now())
	if _, err := CheckPostgres(t.Context(), PostgresConfig{URL: address + "&search_path=public,pg_catalog"}); err == nil ||
		!strings.Contains(err.Error(), "its clock and this machine's differ by 48h") {
		t.Errorf("the check of the doctor: %v", err)
	}
	mustInsert(t, db, small("org_a", 0))
	d := db.dialect.(*postgresDialect)
	if err := d.dropCommits(t.Context()); err != nil {
		t.Fatal(err)
	}
	var at time.Time
	if err := db.reader.QueryRowContext(t.Context(), "SELECT at FROM commits ORDER BY at DESC LIMIT 1").
		Scan(timeColumn{&at}); err != nil {
		t.Fatalf("the row of a transaction was dropped at once: %v", err)
	}
	near("the row of a transaction", at)

	// An old reading is replaced while a server works.
	before := d.clock.last.Load()
	d.clock.last.Store(&reading{before.database, before.machine.Add(-2 * oldReading)})
	if _, err := db.StartSession(t.Context(), "node", false); err != nil { // its connection reads the time
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); time.Since(d.clock.last.Load().machine) > oldReading; {
		if time.Now().After(deadline) {
			t.Fatal("the server does not read the time of the database while it works")
		}
		time.Sleep(10 * time.Millisecond)
	}
}
