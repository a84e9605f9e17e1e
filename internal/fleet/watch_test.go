package fleet_test

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fleet"
)

// leases is a store of nodes whose leases a test sets.
type leases struct {
	fleet.Store

	mu    sync.Mutex
	away  bool // the records cannot be read
	nodes []fleet.Node
	lost  map[fleet.ID]time.Time
	ends  map[fleet.ID]int // how often the sandboxes of each lost node were ended
}

func (l *leases) ListNodes(context.Context) ([]fleet.Node, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.away {
		return nil, errors.New("the records are away")
	}
	return slices.Clone(l.nodes), nil
}

func (l *leases) LoseNode(_ context.Context, id fleet.ID, _ string) (bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.nodes {
		if n := &l.nodes[i]; n.ID == id {
			n.LostAt = time.Now()
			l.lost[id] = n.LostAt
		}
	}
	return true, nil
}

// end is Config.Lose.
func (l *leases) end(_ context.Context, node fleet.ID) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ends[node]++
	return nil
}

// beat gives nodes a lease from now.
func (l *leases) beat(nodes ...int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, i := range nodes {
		l.nodes[i].LeaseUntil = time.Now().Add(fleet.LeaseTime)
	}
}

// leave ends the session of a node.
func (l *leases) leave(i int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.nodes[i].LeaseUntil = time.Time{}
}

func (l *leases) setAway(away bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.away = away
}

// watching runs Watch of the node "self" beside a and b in a bubble, while run lets time pass.
func watching(t *testing.T, run func(l *leases)) *leases {
	l := &leases{lost: map[fleet.ID]time.Time{}, ends: map[fleet.ID]int{}}
	synctest.Test(t, func(t *testing.T) {
		joined := time.Now().Add(-time.Hour)
		for _, id := range []fleet.ID{"self", "a", "b"} {
			l.nodes = append(l.nodes, fleet.Node{ID: id, JoinedAt: joined, Session: "s" + id, Active: 1,
				About: fleet.About{Address: id + ":1"}, LeaseUntil: time.Now().Add(fleet.LeaseTime)})
		}
		s := fleet.New(fleet.Config{Self: "self", Now: time.Now, Log: slog.New(slog.DiscardHandler),
			Lose: l.end}, l)
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		go s.Watch(ctx)
		run(l)
		stop()
		synctest.Wait()
	})
	return l
}

// TestSilentNodeIsLost has one of three nodes extend its lease no more.
func TestSilentNodeIsLost(t *testing.T) {
	var began time.Time
	l := watching(t, func(l *leases) {
		began = time.Now()
		for range 15 {
			time.Sleep(5 * time.Second)
			l.beat(0, 1)
		}
	})
	after := l.lost["b"].Sub(began)
	if len(l.lost) != 1 || after < fleet.LeaseTime+15*time.Second || after > 60*time.Second {
		t.Errorf("lost are %v, b after %s", l.lost, after)
	}
	if len(l.ends) != 1 || l.ends["b"] < 2 { // also those that it finds later
		t.Errorf("the sandboxes of lost nodes were ended %v times", l.ends)
	}
}

// TestAwayRecordsLoseNoNode has the records be away for longer than a lease. The nodes extend theirs when the records
// are back, within the time of a beat.
func TestAwayRecordsLoseNoNode(t *testing.T) {
	l := watching(t, func(l *leases) {
		time.Sleep(10 * time.Second)
		l.setAway(true)
		time.Sleep(5 * time.Minute)
		l.setAway(false)
		time.Sleep(fleet.LeaseTime / 6)
		for range 12 {
			l.beat(0, 1, 2)
			time.Sleep(5 * time.Second)
		}
	})
	if len(l.lost) != 0 || len(l.ends) != 0 {
		t.Errorf("lost are %v, %v", l.lost, l.ends)
	}
}

// TestHeldWritesLoseNoNode has the records be read and not written for longer than a lease.
func TestHeldWritesLoseNoNode(t *testing.T) {
	l := watching(t, func(l *leases) {
		time.Sleep(5 * time.Minute) // no node extends its lease
		for range 12 {
			time.Sleep(fleet.LeaseTime / 6)
			l.beat(0) // the first to write is the one that watches
			time.Sleep(fleet.LeaseTime/6 - time.Second)
			l.beat(1, 2)
		}
	})
	if len(l.lost) != 0 || len(l.ends) != 0 {
		t.Errorf("lost are %v, %v", l.lost, l.ends)
	}
}

// TestLeftNodeIsNotLost has a node end its session, as a server does that an operator stops.
func TestLeftNodeIsNotLost(t *testing.T) {
	l := watching(t, func(l *leases) {
		l.leave(2)
		for range 24 {
			time.Sleep(5 * time.Second)
			l.beat(0, 1)
		}
	})
	if len(l.lost) != 0 {
		t.Errorf("lost are %v", l.lost)
	}
}
