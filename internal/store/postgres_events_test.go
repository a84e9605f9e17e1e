package store

import (
	"context"
	"slices"
	"sync"
	"testing"
)

// TestPostgresUnannounced has a transaction that numbers events fail although it is committed. The followers are woken
// with the next one, and the mark has its events.
func TestPostgresUnannounced(t *testing.T) {
	url := newDatabase(t, true)
	db := openURL(t, url)
	d := db.dialect.(*postgresDialect)
	// Events wait for the call of this test.
	d.stop()
	<-d.stopped
	var mu sync.Mutex
	var woken []string
	db.OnEvents(func(orgs []string) {
		mu.Lock()
		defer mu.Unlock()
		woken = append(woken, orgs...)
	})
	putOrg(t, db, "org_x")
	gone, leave := context.WithCancel(t.Context())
	leave()
	if err := d.number(gone); err == nil {
		t.Fatal("numbered events for a caller who has left")
	}
	settle(t, openURL(t, url)) // it commits what the failed transaction may have committed
	if d.waiting(t.Context()) || !d.owes() {
		t.Fatal("the events are not numbered, or nothing is owed")
	}
	if err := d.number(t.Context()); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if !slices.Contains(woken, "org_x") || d.mark.value().last == 0 || d.owes() {
		t.Errorf("woken %v, seen %+v, owes %v", woken, d.mark.value(), d.owes())
	}
}
