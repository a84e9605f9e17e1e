package webhook

import (
	"fmt"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/event"
)

// TestDelays checks the waits after failed attempts, which are part of the contract, and that a receiver can make them
// longer up to a bound.
func TestDelays(t *testing.T) {
	for i, want := range []time.Duration{5 * time.Second, 30 * time.Second, 2 * time.Minute, 10 * time.Minute,
		30 * time.Minute, time.Hour, 2 * time.Hour, 4 * time.Hour, 6 * time.Hour, 6 * time.Hour, 6 * time.Hour} {
		least, most := want, time.Duration(0)
		for range 200 {
			d := delayAfter(i+1, Answer{Status: 500, RetryAfter: 5 * time.Hour})
			least, most = min(least, d), max(most, d)
		}
		low, high := want*8/10, min(want*12/10, maxDelay)
		if least < low || most > high || least > want*9/10 || most < min(want*11/10, maxDelay) {
			t.Errorf("the waits after %d attempts are from %s to %s, want about %s", i+1, least, most, want)
		}
	}
	for _, c := range []struct {
		status      int
		asked, want time.Duration
	}{{429, time.Hour, time.Hour}, {503, 2 * time.Hour, 2 * time.Hour}, {503, 100 * time.Hour, maxDelay}} {
		if got := delayAfter(1, Answer{Status: c.status, RetryAfter: c.asked}); got != c.want {
			t.Errorf("after %d with Retry-After %s the wait is %s", c.status, c.asked, got)
		}
	}
}

// TestJudge checks what follows from attempts: the last one is made three days after the first that failed, and then
// the webhook is disabled. The time for which a delivery waited before does not count.
func TestJudge(t *testing.T) {
	s := &Service{}
	queued := time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)
	w := Webhook{ID: "w"}
	d := Delivery{Seq: 3, QueuedAt: queued.Add(-30 * 24 * time.Hour), Attempts: 20, FailedAt: queued}
	failed := func(at time.Time, status int) Result {
		return s.judge(w, d, Attempt{At: at, Status: status, Error: "no"}, Answer{Status: status})
	}
	if r := s.judge(w, d, Attempt{At: queued, Status: 204}, Answer{}); !r.Made || r.Disable != "" {
		t.Errorf("a success is %+v", r)
	}
	if r := failed(queued, 500); r.Made || r.Disable != "" || r.NextAt.Sub(queued) < 4*time.Hour {
		t.Errorf("a failure is %+v", r)
	}
	if r := failed(queued, 410); r.Disable != Gone {
		t.Errorf("410 is %+v", r)
	}
	end := queued.Add(3 * 24 * time.Hour)
	if r := failed(end.Add(-time.Hour), 500); r.Disable != "" || !r.NextAt.Equal(end) {
		t.Errorf("a failure an hour before the end is %+v", r)
	}
	if r := failed(end, 0); r.Disable != Failing {
		t.Errorf("a failure at the end is %+v", r)
	}
	d.FailedAt = time.Time{}
	if r := failed(end, 0); r.Disable != "" {
		t.Errorf("the first failure is %+v", r)
	}
}

// TestDeliveryIDs checks that ids stay the same, and differ by webhook and event.
func TestDeliveryIDs(t *testing.T) {
	seen := map[string]string{}
	for _, w := range []string{"whk_a", "whk_b"} {
		for s := range event.Seq(50) {
			id := DeliveryID(w, s)
			if was := seen[id]; was != "" || len(id) != 30 || DeliveryID(w, s) != id {
				t.Fatalf("%s and %s %d have the id %q", was, w, s, id)
			}
			seen[id] = fmt.Sprint(w, " ", s)
		}
	}
}

// taken picks webhooks until none may have an attempt, and returns their claims by organization.
func taken(q *queues, now time.Time) map[string][]claim {
	all := map[string][]claim{}
	for {
		c, ok, _ := q.pick(now)
		if !ok {
			return all
		}
		q.hold(c, fmt.Sprint("lane", len(all[c.org])), now)
		all[c.org] = append(all[c.org], c)
	}
}

// TestQueuesAreFair lets an organization with many webhooks that do not answer use as much as it may, and checks what
// is left for others.
func TestQueuesAreFair(t *testing.T) {
	now := time.Now()
	q := newQueues(64)
	for i := range 100 {
		q.due(fmt.Sprint("dead", i), "org_dead", now)
	}
	dead := taken(q, now)["org_dead"]
	if len(dead) != 16 {
		t.Fatalf("one organization has %d attempts of 64", len(dead))
	}
	q.due("live", "org_live", now)
	live := taken(q, now)["org_live"]
	if len(live) != 1 {
		t.Fatalf("a webhook without a success has %d attempts", len(live))
	}
	q.done(live[0], "lane0", true, false, now)
	if live = taken(q, now)["org_live"]; len(live) != perWebhook {
		t.Fatalf("a webhook with a success has %d attempts", len(live))
	}
	for i, c := range dead {
		q.done(c, fmt.Sprint("lane", i), false, true, now)
	}
	// Failing webhooks of many organizations have half of all attempts.
	for i := range 320 {
		id := fmt.Sprint("failing", i)
		q.due(id, fmt.Sprint("org_failing", i%20), now)
		q.all[id].failing = true
	}
	restrained := 0
	for c, ok, _ := q.pick(now); ok; c, ok, _ = q.pick(now) {
		q.hold(c, "x", now)
		if c.restrained {
			restrained++
		}
	}
	if restrained != 32 {
		t.Errorf("failing webhooks have %d of 64 attempts", restrained)
	}
	for i := range 3 {
		q.due(fmt.Sprint("fresh", i), fmt.Sprint("org_fresh", i), now)
	}
	if fresh := taken(q, now); len(fresh) != 3 {
		t.Errorf("of 3 organizations with fresh webhooks %d have an attempt", len(fresh))
	}
}

// TestQueuesKeepSlow checks that one quick answer does not hide a slow receiver, and that its queue goes in the end.
func TestQueuesKeepSlow(t *testing.T) {
	now := time.Now()
	q := newQueues(8)
	q.due("a", "org", now)
	for _, slow := range []bool{true, false} {
		c, ok, _ := q.pick(now)
		if !ok {
			t.Fatal("the webhook is not picked")
		}
		q.hold(c, "lane", now)
		q.done(c, "lane", true, slow, now)
	}
	c, ok, _ := q.pick(now)
	if !ok || !c.restrained {
		t.Errorf("after a quick answer the next claim is %+v, %v", c, ok)
	}
	q.none(c, now.Add(slowTime), false)
	if c, ok, _ = q.pick(now.Add(slowTime)); !ok || c.restrained {
		t.Errorf("after %s the next claim is %+v, %v", slowTime, c, ok)
	}
	q.none(c, time.Time{}, false)
	if q.pick(now.Add(slowTime)); len(q.all) != 0 {
		t.Errorf("%d queues are left", len(q.all))
	}
}

// TestQueuesRemember checks that a webhook whose delivery has failed is restrained after a start, too.
func TestQueuesRemember(t *testing.T) {
	now := time.Now()
	q := newQueues(8)
	q.due("a", "org", now)
	c, _, _ := q.pick(now)
	if !q.suspect(c, now) {
		t.Fatal("a webhook of which nothing is known is not suspected")
	}
	if c, ok, _ := q.pick(now); !ok || !c.restrained || q.suspect(c, now) {
		t.Errorf("the next claim is %+v, %v", c, ok)
	}
}

// TestQueuesTakeTurns checks that the organization with the fewest attempts is next.
func TestQueuesTakeTurns(t *testing.T) {
	now := time.Now()
	q := newQueues(8)
	for i := range 5 {
		q.due(fmt.Sprint("a", i), "org_a", now)
	}
	c, _, _ := q.pick(now)
	q.hold(c, "lane0", now)
	q.due("b", "org_b", now)
	b, ok, _ := q.pick(now)
	if !ok || b.org != "org_b" {
		t.Fatalf("after an attempt of one organization the next is %+v, %v", b, ok)
	}
	q.hold(b, "lane0", now)
	first := taken(q, now)
	first["org_a"], first["org_b"] = append(first["org_a"], c), append(first["org_b"], b)
	if len(first["org_a"]) != 2 || len(first["org_b"]) != 1 {
		t.Fatalf("the first attempts are %d and %d", len(first["org_a"]), len(first["org_b"]))
	}
	seen := map[string]bool{}
	for range 5 { // each webhook of the organization gets its turn
		for _, c := range first["org_a"] {
			seen[c.id] = true
			q.done(c, q.all[c.id].busy[0], false, false, now)
		}
		first = taken(q, now)
	}
	if len(seen) != 5 {
		t.Errorf("%d of 5 webhooks had a turn", len(seen))
	}
}

// TestQueuesWait checks when the dispatcher is told to look again.
func TestQueuesWait(t *testing.T) {
	now := time.Now()
	q := newQueues(8)
	if _, ok, next := q.pick(now); ok || !next.IsZero() {
		t.Errorf("without webhooks: %v, %s", ok, next)
	}
	q.due("a", "org", now.Add(time.Hour))
	q.due("a", "org", now.Add(2*time.Hour)) // later than what is known
	if _, ok, next := q.pick(now); ok || !next.Equal(now.Add(time.Hour)) {
		t.Errorf("before it is due: %v, %s", ok, next)
	}
	c, ok, _ := q.pick(now.Add(time.Hour))
	if !ok {
		t.Fatal("it is not picked when it is due")
	}
	q.due("a", "org", now) // while the store is asked
	q.none(c, now.Add(3*time.Hour), false)
	if c, ok, _ = q.pick(now); !ok {
		t.Error("what became due meanwhile is lost")
	}
	q.keepBack("a", now.Add(time.Minute))
	q.none(c, now, false)
	if _, ok, next := q.pick(now); ok || !next.Equal(now.Add(time.Minute)) {
		t.Errorf("after trouble with the store: %v, %s", ok, next)
	}
	c, ok, _ = q.pick(now.Add(time.Minute))
	if q.none(c, time.Time{}, true); !ok || len(q.all) != 0 || len(q.orgs) != 0 || q.running != 0 {
		t.Errorf("after the webhook is gone there are %d queues, %d organizations, %d running", len(q.all), len(q.orgs),
			q.running)
	}
}

// TestWakeWithoutRun checks that a service that makes no deliveries remembers no webhook that it has changed: another
// process delivers.
func TestWakeWithoutRun(t *testing.T) {
	s := New(Config{Concurrency: 4}, nil, nil, nil, nil)
	s.wake(Webhook{ID: "whk_a", OrgID: "org_a"})
	if len(s.queues.all) != 0 {
		t.Errorf("it remembers %d", len(s.queues.all))
	}
	s.runs.Store(true)
	if s.wake(Webhook{ID: "whk_a", OrgID: "org_a"}); len(s.queues.all) != 1 {
		t.Error("one that delivers forgets it")
	}
}
