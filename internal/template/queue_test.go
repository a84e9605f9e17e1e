package template

import (
	"log/slog"
	"testing"
)

// TestQueueTellsBuildsApart checks that the end of a build takes no other build's place in the queue.
func TestQueueTellsBuildsApart(t *testing.T) {
	q := queue{served: map[string]int{}}
	q.add(order{template: "a", build: "1", key: "1"})
	q.add(order{template: "a", build: "2", key: "2"}) // the first was cancelled and is withdrawn later
	q.remove("a", "1")
	got := q.next(func(order) bool { return true })
	if len(got) != 1 || got[0].build != "2" {
		t.Errorf("next is %+v", got)
	}
}

// TestRunsHaveDifferentInputs checks that an order which comes back to the queue, as one does that waited for
// another template, begins no second run beside an open one with the same inputs: a cancelled build would
// then be looked for in the wrong one.
func TestRunsHaveDifferentInputs(t *testing.T) {
	s := New(Config{Concurrent: 2, PerOrg: 2}, newMemory(), newBuilder(), newShelf(), sandboxes{},
		slog.New(slog.DiscardHandler))
	s.queue.add(order{template: "a", org: "o", build: "1", key: "k"})
	first, _ := s.next()
	s.queue.add(order{template: "b", org: "o", build: "2", key: "k"})
	s.queue.add(order{template: "c", org: "o", build: "3", key: "other"})
	if r, _ := s.next(); r == nil || r.key != "other" || s.runs["k"] != first {
		t.Errorf("beside the first runs %+v", r)
	}
	s.leave(first)
	if r, _ := s.next(); r == nil || r.member("b", "2") == nil {
		t.Errorf("after the first runs %+v", r)
	}
}
