package fleet

import (
	"testing"
	"time"
)

func TestStatus(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	before, after := now.Add(-time.Minute), now.Add(time.Minute)
	for name, c := range map[string]struct {
		n      Node
		status Status
		orders Orders
	}{
		"a new one":             {Node{}, Ready, Orders{}},
		"with sandboxes":        {Node{Sandboxes: 3, Active: 2}, Ready, Orders{}},
		"joined":                {Node{JoinedAt: before}, Unreachable, Orders{}},
		"with a lease":          {Node{JoinedAt: before, LeaseUntil: after}, Ready, Orders{}},
		"whose lease is over":   {Node{JoinedAt: before, LeaseUntil: now}, Unreachable, Orders{}},
		"cordoned":              {Node{CordonedAt: before, Active: 2}, Cordoned, Orders{Cordoned: true}},
		"cordoned and empty":    {Node{CordonedAt: before}, Cordoned, Orders{Cordoned: true}},
		"draining":              {Node{CordonedAt: before, DrainBy: after, Active: 1}, Draining, Orders{true, time.Minute}},
		"drained":               {Node{CordonedAt: before, DrainBy: after, Sandboxes: 4}, Drained, Orders{true, time.Minute}},
		"at the deadline":       {Node{CordonedAt: before, DrainBy: now, Active: 1}, Cordoned, Orders{Cordoned: true}},
		"after the deadline":    {Node{CordonedAt: before, DrainBy: before, Active: 1}, Cordoned, Orders{Cordoned: true}},
		"empty after it":        {Node{CordonedAt: before, DrainBy: before}, Drained, Orders{Cordoned: true}},
		"a deadline by mistake": {Node{DrainBy: after, Active: 1}, Ready, Orders{}},
	} {
		if got := c.n.statusAt(now); got != c.status {
			t.Errorf("%s: %s, want %s", name, got, c.status)
		}
		if got := c.n.ordersAt(now); got != c.orders {
			t.Errorf("%s: orders %+v, want %+v", name, got, c.orders)
		}
	}
}
