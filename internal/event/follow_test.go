package event_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/auth"
	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/store"
)

// openFeed opens a feed on a database, as each start of a server does.
func openFeed(t *testing.T, path string) (*store.DB, *event.Feed) {
	t.Helper()
	db, err := store.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	f := event.New(event.Config{Keep: time.Hour, MaxFollowers: 2}, db, slog.New(slog.DiscardHandler))
	db.OnEvents(f.Wake)
	return db, f
}

// putKey makes one fact.
func putKey(ctx context.Context, db *store.DB, org, name string) error {
	return db.PutKey(ctx, auth.Key{ID: "key_" + org + name, OrgID: org, Name: name, Hash: []byte(org + name),
		CreatedAt: time.Now()}, 0)
}

var errEnough = errors.New("enough")

// TestFollow has writers, and a follower that is sent away again and again, also by the end of the
// server, and goes on where it was: it sees every fact once, in its order.
func TestFollow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cay.db")
	const writers, each, lives = 3, 20, 3
	var last event.Seq
	seen := 0
	next := make([]int, writers) // the number that comes next, by writer
	for life := range lives {
		db, f := openFeed(t, path)
		if life == 0 {
			for _, org := range []string{"org_a", "org_b"} {
				if err := db.PutOrg(t.Context(), auth.Org{ID: org, Name: org, CreatedAt: time.Now()},
					auth.Key{ID: "key_" + org, OrgID: org, Hash: []byte(org), CreatedAt: time.Now()}); err != nil {
					t.Fatal(err)
				}
			}
			var err error
			if last, err = f.Last(t.Context(), "org_a"); err != nil {
				t.Fatal(err)
			}
		}
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for i := range each {
					if err := errors.Join(putKey(t.Context(), db, "org_a", fmt.Sprint(w, "-", life*each+i)),
						putKey(t.Context(), db, "org_b", fmt.Sprint(w, "x", life*each+i))); err != nil {
						t.Error(err)
					}
				}
			})
		}
		want := (life + 1) * writers * each
		if life < lives-1 {
			want -= 7 // the rest is for the next life
		}
		for seen < want {
			err := f.Follow(t.Context(), event.Query{OrgID: "org_a", After: last, Limit: 4}, time.Minute,
				func(p event.Page) error {
					for _, e := range p.Events {
						var w, i int
						if _, err := fmt.Sscanf(e.Name, "%d-%d", &w, &i); err != nil || i != next[w] || e.Seq <= last {
							t.Fatalf("after %d comes %+v, want number %d: %v", last, e, next[w], err)
						}
						next[w]++
						seen++
						last = e.Seq
					}
					if len(p.Events) > 0 {
						return errEnough // as if the connection broke
					}
					return nil
				})
			if !errors.Is(err, errEnough) {
				t.Fatal(err)
			}
		}
		wg.Wait()
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
		if life == lives-1 {
			for w, n := range next {
				if n != lives*each {
					t.Errorf("of writer %d %d facts were seen, want %d", w, n, lives*each)
				}
			}
		}
	}
}

func TestFollowersAreBounded(t *testing.T) {
	db, f := openFeed(t, filepath.Join(t.TempDir(), "cay.db"))
	defer db.Close()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	begun := make(chan struct{})
	follow := func(ctx context.Context, org string) error {
		return f.Follow(ctx, event.Query{OrgID: org, Limit: 1}, time.Minute,
			func(event.Page) error { begun <- struct{}{}; return nil })
	}
	for _, org := range []string{"org_a", "org_a", "org_b"} {
		wg.Go(func() {
			if err := follow(ctx, org); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
		<-begun
	}
	err := follow(ctx, "org_a")
	if fe := fault.As(err); fe == nil || fe.Kind != fault.Exhausted || fe.Code != "too_many_followers" {
		t.Errorf("a third follower: %v", err)
	}
	cancel()
	wg.Wait()
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	wg.Go(func() { _ = follow(ctx, "org_a") }) // ends with ctx
	<-begun
	cancel()
	wg.Wait()
}

// TestConsume has a consumer whose handling fails, and whose server ends: it is handed every event of
// all organizations in order, again only what it had not handled, and nothing of that is dropped.
func TestConsume(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cay.db")
	var handled []string
	errHandling := errors.New("handling failed")
	for life, names := range [][]string{{"1", "2"}, {"3", "last"}} {
		db, f := openFeed(t, path)
		if life == 0 {
			for _, org := range []string{"org_a", "org_b"} {
				if err := db.PutOrg(t.Context(), auth.Org{ID: org, Name: org, CreatedAt: time.Now()},
					auth.Key{ID: "key_" + org, OrgID: org, Name: org, Hash: []byte(org), CreatedAt: time.Now()}); err != nil {
					t.Fatal(err)
				}
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() {
			ended <- f.Consume(ctx, "test", func(events []event.Event) error {
				for _, e := range events {
					if life == 0 && e.Name == "1" {
						return errHandling
					}
				}
				for _, e := range events {
					if e.Type == event.KeyCreated {
						handled = append(handled, e.Name)
					}
					if e.Name == "last" {
						cancel()
					}
				}
				return nil
			})
		}()
		for i, name := range names {
			if err := putKey(t.Context(), db, []string{"org_a", "org_b"}[i], name); err != nil {
				t.Fatal(err)
			}
		}
		want := errHandling
		if life > 0 {
			want = context.Canceled
		}
		if err := <-ended; !errors.Is(err, want) {
			t.Fatalf("the consumer ended with %v, want %v", err, want)
		}
		cancel()
		if _, err := db.TrimEvents(t.Context(), time.Now().Add(time.Hour), 1); err != nil {
			t.Fatal(err)
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if want := []string{"org_a", "org_b", "1", "2", "3", "last"}; !slices.Equal(handled, want) {
		t.Errorf("it handled %q, want %q", handled, want)
	}
}
