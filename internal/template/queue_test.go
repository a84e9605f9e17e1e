package template

import "testing"

// TestQueueTellsBuildsApart checks that the end of a build takes no other build's place in the queue.
func TestQueueTellsBuildsApart(t *testing.T) {
	q := queue{served: map[string]int{}}
	q.add(order{template: "a", build: "1", key: "1"})
	q.add(order{template: "a", build: "2", key: "2"}) // the first was cancelled and is withdrawn later
	q.remove("a", "1")
	got := q.next(func(string) bool { return true })
	if len(got) != 1 || got[0].build != "2" {
		t.Errorf("next is %+v", got)
	}
}
