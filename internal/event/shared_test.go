package event_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/store"
)

// twoFeeds opens two feeds on one PostgreSQL, as two servers do. The first one writes the events of org_a.
func twoFeeds(t *testing.T) (writer *store.DB, reader *event.Feed) {
	t.Helper()
	url, err := caytest.StartPostgres(t).Create("records", "")
	if err != nil {
		t.Fatal(err)
	}
	open := func() (*store.DB, *event.Feed) {
		db, err := store.OpenPostgres(t.Context(), store.PostgresConfig{URL: url, MaxConns: 8})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := db.Close(); err != nil {
				t.Error(err)
			}
		})
		f := event.New(event.Config{Keep: time.Hour, MaxFollowers: 2, Shared: db.Shared()}, db, slog.New(slog.DiscardHandler))
		db.OnEvents(f.Wake)
		return db, f
	}
	writer, _ = open()
	_, reader = open()
	putOrg(t, writer, "org_a")
	return writer, reader
}

func putOrg(t *testing.T, db *store.DB, org string) {
	t.Helper()
	if err := db.PutOrg(t.Context(), auth.Org{ID: org, Name: org, CreatedAt: time.Now()},
		auth.Key{ID: "key_" + org, OrgID: org, Name: org, Hash: []byte(org), CreatedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
}

// rounds is the number of events that a reader is told of, one after the other.
const rounds = 20

// oneByOne returns a function that makes the fact with a number, once.
func oneByOne(ctx context.Context, db *store.DB) func(n int) error {
	made := 0
	return func(n int) error {
		if n < made {
			return nil
		}
		made = n + 1
		return putKey(ctx, db, "org_a", fmt.Sprint(n))
	}
}

// counts adds to seen the events that oneByOne has written, in their order. It reports whether these were all.
func counts(all []event.Event, seen *int) bool {
	for _, e := range all {
		if e.Name == fmt.Sprint(*seen) { // the others are of the organization
			*seen++
		}
	}
	return *seen == rounds
}

// TestFollowAnotherServer follows events that another server writes, each after the one before it was seen.
func TestFollowAnotherServer(t *testing.T) {
	writer, reader := twoFeeds(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	seen, next := 0, oneByOne(ctx, writer)
	q := event.Query{OrgID: "org_a", After: event.Oldest, Limit: 5}
	err := reader.Follow(ctx, q, time.Hour, func(p event.Page) error {
		if counts(p.Events, &seen) {
			return errEnough
		}
		return next(seen)
	})
	if !errors.Is(err, errEnough) {
		t.Errorf("after %d of %d events: %v", seen, rounds, err)
	}
}

// TestConsumeAnotherServer consumes events in a server that writes none.
func TestConsumeAnotherServer(t *testing.T) {
	writer, reader := twoFeeds(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	seen, next := 0, oneByOne(ctx, writer)
	err := reader.Consume(ctx, "test", func(all []event.Event) error {
		if counts(all, &seen) {
			return errEnough
		}
		return next(seen)
	})
	if !errors.Is(err, errEnough) {
		t.Errorf("after %d of %d events: %v", seen, rounds, err)
	}
}

// counted counts the looks for events of other processes.
type counted struct {
	*store.DB
	looks atomic.Int64
}

func (c *counted) NewEvents(ctx context.Context, after event.Seq) ([]string, event.Seq, error) {
	c.looks.Add(1)
	return c.DB.NewEvents(ctx, after)
}

// TestWhoPolls checks that a feed looks for events of other processes only if there may be some, and only while it has
// a follower or a consumer. Without other processes, a follower and a consumer who wait ask the store for nothing.
func TestWhoPolls(t *testing.T) {
	for _, shared := range []bool{false, true} {
		t.Run(fmt.Sprint("shared ", shared), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				db, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "cay.db"))
				if err != nil {
					t.Fatal(err)
				}
				defer db.Close()
				st := &counted{DB: db}
				f := event.New(event.Config{MaxFollowers: 2, Shared: shared}, st, slog.New(slog.DiscardHandler))
				db.OnEvents(f.Wake)
				putOrg(t, db, "org_a")
				// looks returns how often the feed looks in ten minutes.
				looks := func() int64 {
					time.Sleep(time.Second) // on the bubble's clock: those who begin have read
					synctest.Wait()
					before := st.looks.Load()
					var calls atomic.Int64
					db.OnCall(func(string, time.Duration) { calls.Add(1) })
					time.Sleep(10 * time.Minute)
					synctest.Wait()
					n := st.looks.Load() - before
					if calls.Load() != n {
						t.Errorf("%d calls of the store, of which %d look for new events", calls.Load(), n)
					}
					return n
				}
				reading := map[string]func(context.Context) error{
					"a follower": func(ctx context.Context) error {
						return f.Follow(ctx, event.Query{OrgID: "org_a", Limit: 9}, 24*time.Hour, func(event.Page) error { return nil })
					},
					"a consumer": func(ctx context.Context) error {
						return f.Consume(ctx, "test", func([]event.Event) error { return nil })
					},
				}
				for name, read := range reading {
					if n := looks(); n != 0 {
						t.Errorf("a feed without readers looks %d times", n)
					}
					ctx, cancel := context.WithCancel(t.Context())
					ended := make(chan error)
					for range 2 {
						go func() { ended <- read(ctx) }()
					}
					if n := looks(); shared != (n > 1000) || !shared && n != 0 {
						t.Errorf("with %s it looks %d times", name, n)
					}
					cancel()
					for range 2 {
						if err := <-ended; !errors.Is(err, context.Canceled) {
							t.Error(err)
						}
					}
				}
				if n := looks(); n != 0 {
					t.Errorf("when its readers have left it looks %d times", n)
				}
			})
		})
	}
}

// late is a store whose last event is asked for only after another one was written.
type late struct {
	*store.DB
	written chan struct{}
}

func (l late) NewEvents(ctx context.Context, after event.Seq) ([]string, event.Seq, error) {
	<-l.written
	return l.DB.NewEvents(ctx, after)
}

// TestEventBeforeTheFirstLook has another process write an event after a follower has read, and before the feed looks
// for new events for the first time.
func TestEventBeforeTheFirstLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		db, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "cay.db"))
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		putOrg(t, db, "org_a")
		st := late{db, make(chan struct{})}
		f := event.New(event.Config{MaxFollowers: 1, Shared: true}, st, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		first := true
		err = f.Follow(ctx, event.Query{OrgID: "org_a", Limit: 9}, time.Hour, func(p event.Page) error {
			if first {
				first = false
				defer close(st.written)
				return putKey(ctx, db, "org_a", "late")
			}
			if len(p.Events) != 1 || p.Events[0].Name != "late" {
				t.Errorf("the next page is %+v", p)
			}
			return errEnough
		})
		if !errors.Is(err, errEnough) {
			t.Errorf("the event was not seen: %v", err)
		}
	})
}

// TestTrimByOneClock checks that events are old by the clock that the feed is given.
func TestTrimByOneClock(t *testing.T) {
	db, f := openFeed(t, filepath.Join(t.TempDir(), "cay.db"))
	defer db.Close()
	putOrg(t, db, "org_a")
	putOrg(t, db, "org_b") // has the last event, which stays
	q := event.Query{OrgID: "org_a", After: event.Oldest, Limit: 9}
	f.Trim(t.Context())
	if p, err := f.Read(t.Context(), q); err != nil || len(p.Events) != 2 {
		t.Errorf("%d events are left, %v", len(p.Events), err)
	}
	ahead := func() time.Time { return time.Now().Add(2 * time.Hour) }
	event.New(event.Config{Keep: time.Hour, Now: ahead}, db, slog.New(slog.DiscardHandler)).Trim(t.Context())
	if p, err := f.Read(t.Context(), q); err != nil || len(p.Events) != 0 {
		t.Errorf("by a clock that is ahead %d events are left, %v", len(p.Events), err)
	}
}
