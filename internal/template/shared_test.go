package template

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

// lead has a server build until end is called.
func lead(t *testing.T, s *Service) (end func()) {
	t.Helper()
	if err := s.Register(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// wantNoLead checks that a server leaves builds to others.
func wantNoLead(t *testing.T, s *Service) {
	t.Helper()
	_, err := s.Create(t.Context(), me, of("mine", "x:1"), nil)
	if f := fault.As(err); f == nil || f.Code != fault.CodeNotReady || f.RetryAfter == 0 {
		t.Errorf("a create at a server that does not build: %v", err)
	}
}

// TestOneServerBuilds has two servers with the same templates, of which one builds at a time.
func TestOneServerBuilds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newMemory()
		member := func() (*Service, *builder) {
			b := newBuilder()
			return New(Config{Builtins: []Definition{definition("python")}, Shared: true, Sizes: []string{"small"},
				MaxDiskMB: 1000}, store, b, newShelf(), sandboxes{}, slog.New(slog.NewTextHandler(t.Output(), nil))), b
		}
		first, firstBuilder := member()
		second, secondBuilder := member()
		wantNoLead(t, first)
		end := lead(t, first)
		wantNoLead(t, second)
		if _, err := first.Create(t.Context(), me, of("mine", "x:1"), nil); err != nil {
			t.Errorf("a create at the server that builds: %v", err)
		}

		// What the second server is asked for is built by the first.
		if _, err := second.Ready(t.Context(), "org", "python"); !fault.Is(err, fault.Conflict) {
			t.Errorf("a template that is not built: %v", err)
		}
		time.Sleep(2 * askedEvery)
		synctest.Wait()
		if v, err := second.Ready(t.Context(), "org", "python"); err != nil || v.Version != 1 {
			t.Errorf("after its build: %+v, %v", v, err)
		}
		if got := len(secondBuilder.take()); got != 0 {
			t.Errorf("the server that does not build has built %d templates", got)
		}

		// A build that the second server has queued as it lost the lead is built too.
		second.follows.Store(false)
		if _, err := second.Create(t.Context(), me, of("stray", "x:3"), nil); err != nil {
			t.Fatal(err)
		}
		second.follows.Store(true)
		time.Sleep(2 * strayTime)
		synctest.Wait()
		if got, err := second.Get(t.Context(), "org", "stray"); err != nil || got.Status != Ready {
			t.Errorf("the stray build: %+v, %v", got, err)
		}

		// Who follows a build is told that another server builds.
		firstBuilder.block = make(chan struct{})
		if _, err := first.Create(t.Context(), me, of("slow", "x:4"), nil); err != nil {
			t.Fatal(err)
		}
		followed := make(chan error, 1)
		go func() {
			_, err := first.Follow(t.Context(), "org", "slow", "", 0, func(string, []LogLine) error { return nil })
			followed <- err
		}()
		time.Sleep(time.Second)
		end()
		if f := fault.As(<-followed); f == nil || f.Code != fault.CodeNotReady {
			t.Errorf("following a build of a server that does not build any more: %v", f)
		}
		wantNoLead(t, first)
		firstBuilder.take()
		defer lead(t, second)()
		if _, err := second.Create(t.Context(), me, of("later", "x:2"), nil); err != nil {
			t.Errorf("a create at the next server: %v", err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := secondBuilder.take(); len(got) != 2 || len(firstBuilder.take()) != 0 {
			t.Errorf("the next server has built %q", got)
		}
	})
}
