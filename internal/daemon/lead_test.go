package daemon

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/store"
	"github.com/cayhq/cay/internal/webhook"
)

// leader is a server of a test that does only the work of the cluster.
type leader struct {
	*server
	events, deliveries atomic.Int32 // trims of them
}

func newLeader(t *testing.T, url, instance string) *leader {
	t.Helper()
	db, err := store.OpenPostgres(t.Context(), store.PostgresConfig{URL: url, MaxConns: 8})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	log := slog.New(slog.DiscardHandler)
	s := &leader{server: &server{db: db, instance: instance, log: log,
		events: event.New(event.Config{Keep: time.Hour, Shared: db.Shared()}, db, log)}}
	s.webhooks = webhook.New(webhook.Config{Concurrency: 4, Shared: db.Shared(), Log: log}, db, s.server.events, nil, nil)
	db.OnEvents(s.server.events.Wake)
	db.OnCall(func(call string, _ time.Duration) {
		switch call {
		case "trim_events":
			s.events.Add(1)
		case "trim_deliveries":
			s.deliveries.Add(1)
		}
	})
	return s
}

func (l *leader) trims() (n int32) { return l.events.Load() + l.deliveries.Load() }

// TestOneServerTrims has two servers with the same records. One of them drops old rows, and the other one when the
// first has stopped.
func TestOneServerTrims(t *testing.T) {
	pg := caytest.StartPostgres(t)
	url, err := pg.Create("records", "")
	if err != nil {
		t.Fatal(err)
	}
	one, other := newLeader(t, url, "one"), newLeader(t, url, "other")
	lead := func(l *leader) (stop func()) {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { l.lead(ctx) })
		stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
		t.Cleanup(stop)
		return stop
	}
	await := func(l *leader) {
		t.Helper()
		for deadline := time.Now().Add(2 * time.Minute); l.events.Load() == 0 || l.deliveries.Load() == 0; {
			if time.Now().After(deadline) { // a poll with a deadline
				t.Fatalf("events were trimmed %d times, deliveries %d times", l.events.Load(), l.deliveries.Load())
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	stop := lead(one)
	await(one)
	lead(other)
	// The lead is tried for every two seconds.
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if n := other.trims(); n > 0 {
			t.Fatalf("the second server has trimmed %d times while the first one leads", n)
		}
	}
	stop()
	await(other)
	if one.events.Load() != 1 || one.deliveries.Load() != 1 {
		t.Errorf("the first server has trimmed %d and %d times", one.events.Load(), one.deliveries.Load())
	}
}
