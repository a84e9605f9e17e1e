package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	cay "github.com/cayhq/cay/sdk/go"
)

// allEvents reads the whole feed of a key's organization.
func (s *server) allEvents() []cay.FeedEvent {
	s.t.Helper()
	c, err := cay.New(s.url, s.key)
	if err != nil {
		s.t.Fatal(err)
	}
	var all []cay.FeedEvent
	for e, err := range c.Feed(context.Background(), cay.FeedOptions{ListOptions: cay.ListOptions{Limit: 200}}) {
		if err != nil {
			s.t.Fatal(err)
		}
		all = append(all, e)
	}
	return all
}

// TestEvents causes events of all kinds with real sandboxes, and finds exactly those events, in
// order, in the feed and in the output of a follower.
func TestEvents(t *testing.T) {
	operator := shared(t)
	s := operator.tenant("events", nil)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	follower := s.command(ctx, "events", "--follow", "--json", "--after", s.allEvents()[1].ID)
	out, err := follower.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := follower.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)

	id := s.persistent(nil)
	s.want(id, "true")
	s.suspend(id)
	s.want(id, "true") // this wakes it
	s.setEgress(id, object{"mode": "deny_all"})
	s.connect(id, "203.0.113.7", 443)
	s.awaitDenied(id, "203.0.113.7")
	snap := s.snapshot(id, object{"name": "kept"})
	made := s.from("kept", nil)
	fork := s.fork(id, nil)[0]
	for _, public := range []bool{true, true, false} {
		if _, err := s.api().SetPortPublic(t.Context(), id, 8080, public); err != nil {
			t.Fatalf("port: %v", err)
		}
	}
	if err := s.api().DeleteSnapshot(t.Context(), snap); err != nil {
		t.Fatalf("deleting a snapshot: %v", err)
	}
	key, err := s.api().CreateAPIKey(t.Context(), requestOf[cay.CreateAPIKeyRequest](t,
		object{"name": "short", "scopes": []string{"exec"}}))
	if err != nil {
		t.Fatalf("key: %v", err)
	}
	if err := s.api().RevokeAPIKey(t.Context(), key.ID); err != nil {
		t.Fatalf("revoking a key: %v", err)
	}
	for _, sandbox := range []string{id, made, fork} {
		s.destroy(sandbox)
		s.waitState(sandbox, "destroyed")
	}

	want := []cay.FeedEventType{"org.created", "api_key.created",
		"sandbox.creating", "sandbox.running", "sandbox.suspending", "sandbox.suspended", "sandbox.waking", "sandbox.running",
		"sandbox.egress_changed", "sandbox.egress_denied", "snapshot.created", "sandbox.creating", "sandbox.running",
		"sandbox.forked", "sandbox.creating", "sandbox.running", "sandbox.port_public", "sandbox.port_private",
		"snapshot.deleted", "api_key.created", "api_key.revoked"}
	for range 3 {
		want = append(want, "sandbox.destroying", "sandbox.destroyed")
	}
	all := s.allEvents()
	var got []cay.FeedEventType
	for _, e := range all {
		// A repeated packet causes a repeated event, which may come later.
		if e.Type != "sandbox.egress_denied" || !slices.Contains(got, e.Type) {
			got = append(got, e.Type)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("the feed has\n%q, want\n%q", got, want)
	}
	for _, e := range all[2:] {
		var f cay.FeedEvent
		if !lines.Scan() || json.Unmarshal(lines.Bytes(), &f) != nil || f.ID != e.ID || f.Type != e.Type {
			t.Fatalf("the follower has %s, want %+v", lines.Bytes(), e)
		}
	}
	if err := follower.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if rest, _ := io.ReadAll(out); len(rest) > 0 {
		t.Errorf("the follower has more events: %s", rest)
	}
	_ = follower.Wait() // the follower was killed
	other := operator.tenant("events-beside", nil)
	if theirs := other.allEvents(); len(theirs) != 2 {
		t.Errorf("another organization sees %+v", theirs)
	}
}

// TestFollowerAcrossRestarts ends the server with SIGTERM and SIGKILL while sandboxes change. A
// follower sees one event of every call that was answered, and the same events as the feed.
func TestFollowerAcrossRestarts(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	c, err := cay.New(s.url, s.key)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	working, rest := context.WithCancel(ctx)
	var work, follow sync.WaitGroup
	answered := map[string]bool{}
	work.Go(func() {
		for i := 0; working.Err() == nil; i++ {
			name := fmt.Sprint("key ", i)
			if _, err := c.CreateAPIKey(ctx, cay.CreateAPIKeyRequest{Name: name, Scopes: []string{"exec"}}); err == nil {
				answered[name] = true
			}
			time.Sleep(2 * time.Millisecond) // so that at most one page of events comes each second
		}
	})
	first := s.allEvents()[0].ID
	var mu sync.Mutex
	var seen []string
	broken := 0
	follow.Go(func() {
		last := first
		for ctx.Err() == nil {
			err := c.FollowFeed(ctx, cay.FeedOptions{After: last}, func(id string, e *cay.FeedEvent) error {
				last = id
				if e != nil {
					mu.Lock()
					defer mu.Unlock()
					seen = append(seen, e.ID)
				}
				return nil
			})
			var away *url.Error
			switch {
			case ctx.Err() != nil:
			case errors.Is(err, io.ErrUnexpectedEOF), cay.HasCode(err, "stopping"):
				broken++
			case !errors.As(err, &away): // expected while there is no server
				t.Errorf("following: %v", err)
				return
			}
			time.Sleep(10 * time.Millisecond) // between two attempts, until the test ends
		}
	})
	for _, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL} {
		s.awaitFollowed(&mu, &seen, 30)
		s.stop(signal)
		s.start()
	}
	s.awaitFollowed(&mu, &seen, 30)
	rest()
	work.Wait()
	all := s.allEvents()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) { // a poll with a deadline
		mu.Lock()
		n := len(seen)
		mu.Unlock()
		if n >= len(all)-1 || time.Now().After(deadline) {
			break
		}
	}
	cancel()
	follow.Wait()
	told := map[string]int{}
	var want []string
	for _, e := range all[1:] {
		want = append(want, e.ID)
		if e.Type == "api_key.created" {
			told[*e.Name]++
		}
	}
	if d := cmp.Diff(want, seen); d != "" {
		t.Errorf("the feed after the first event, and what the follower saw (-feed +follower):\n%s", d)
	}
	for name := range answered {
		if told[name] != 1 {
			t.Errorf("%s has %d events", name, told[name])
		}
	}
	if broken != 3 {
		t.Errorf("the stream broke off %d times, want 3", broken)
	}
	t.Logf("%d calls answered, %d events", len(answered), len(all))
}

// awaitFollowed waits until a follower has seen so many more events.
func (s *server) awaitFollowed(mu *sync.Mutex, seen *[]string, more int) {
	s.t.Helper()
	until := -1
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) { // a poll with a deadline
		mu.Lock()
		n := len(*seen)
		mu.Unlock()
		if until < 0 {
			until = n + more
		}
		if n >= until {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the follower has seen %d events, not %d", n, until)
		}
	}
}
