package node

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cayhq/cay/internal/fault"
)

func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &Node{turns: newTurns(2)}
		first, second := &box{}, &box{}
		for _, b := range []*box{first, second} {
			if err := n.turn(t.Context(), b, ""); err != nil {
				t.Fatal(err)
			}
		}
		var came []int
		waiting := make([]*box, 3)
		for i := range waiting {
			waiting[i] = &box{}
			go func() {
				if err := n.turn(context.Background(), waiting[i], ""); err == nil {
					came = append(came, i)
				}
			}()
			synctest.Wait() // so that they ask in this order
		}
		first.turnOver()
		first.turnOver() // a failed step ends it too
		synctest.Wait()
		if len(came) != 1 || came[0] != 0 {
			t.Errorf("after one turn is over, %v start", came)
		}
		waiting[0].turnOver()
		synctest.Wait()
		if len(came) != 2 || came[1] != 1 {
			t.Errorf("the order is %v", came)
		}
		// A start that is stuck does not delay the others.
		time.Sleep(turnMost + time.Second)
		synctest.Wait()
		if len(came) != 3 {
			t.Errorf("beside two that are stuck %v start", came)
		}
	})
}

func TestTurnThatDoesNotCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &Node{turns: newTurns(1)}
		n.turns.take("") // a turn without a start, which never ends
		began := time.Now()
		err := n.turn(t.Context(), &box{}, "")
		if f := fault.As(err); f == nil || f.Kind != fault.Unavailable || f.Code != codeNoCapacity || f.RetryAfter <= 0 {
			t.Errorf("late, it is %v", err)
		}
		if took := time.Since(began); took != turnPatience {
			t.Errorf("it was told after %s", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := n.turn(ctx, &box{}, ""); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("its time being over, it is %v", err)
		}
		(&box{}).turnOver() // a sandbox that never had a turn
	})
}

// TestTurnsAreFair lets one organization ask for many starts at once: the single start of another
// does not wait for all of them, and starts that give up cost no turn.
func TestTurnsAreFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &Node{turns: newTurns(1)}
		holder := &box{}
		if err := n.turn(t.Context(), holder, "busy"); err != nil {
			t.Fatal(err)
		}
		type start struct {
			org string
			box *box
		}
		came := make(chan start, 100)
		ask := func(ctx context.Context, org string) {
			b := &box{}
			go func() {
				if n.turn(ctx, b, org) == nil {
					came <- start{org, b}
				}
			}()
			synctest.Wait() // so that they ask in this order
		}
		leaving, leave := context.WithCancel(t.Context())
		ask(leaving, "gone")
		for range 20 {
			ask(t.Context(), "busy")
		}
		ask(leaving, "busy")
		ask(t.Context(), "modest")
		ask(t.Context(), "other")
		leave()
		synctest.Wait()
		var order []string
		next := holder
		for range 22 {
			next.turnOver()
			synctest.Wait()
			s := <-came
			order, next = append(order, s.org), s.box
		}
		// The busy organization has had a turn.
		if got := order[:4]; !slices.Equal(got, []string{"modest", "other", "busy", "busy"}) {
			t.Errorf("they start as %v", order)
		}
		next.turnOver()
		if len(n.turns.waiting) > 0 || n.turns.free != 1 {
			t.Errorf("in the end there are %+v", n.turns)
		}
	})
}

// TestSeldomStartsComeFirst lets three organizations ask for starts all the time: one that asks now
// and then is next each time, and the three get equally many turns.
func TestSeldomStartsComeFirst(t *testing.T) {
	turns := newTurns(1)
	given := map[string][]chan struct{}{}
	ask := func(org string) { given[org] = append(given[org], turns.take(org)) }
	had := func(org string) (n int) {
		for _, turn := range given[org] {
			select {
			case <-turn:
				n++
			default:
			}
		}
		return n
	}
	for range 20 {
		ask("a")
		ask("b")
		ask("c")
	}
	for i := range 40 {
		turns.over()
		if i%5 != 4 {
			continue
		}
		before := had("seldom")
		ask("seldom")
		turns.over()
		if had("seldom") != before+1 {
			t.Fatalf("after %d turns the seldom start is not next: %+v", i, turns)
		}
	}
	if a, b, c := had("a"), had("b"), had("c"); max(a, b, c)-min(a, b, c) > 1 || a == 0 {
		t.Errorf("the others had %d, %d and %d turns", a, b, c)
	}
	for i := range 2 * remembered {
		turns.take(strconv.Itoa(i))
		turns.over()
	}
	for range 60 {
		turns.over()
	}
	if turns.mu.Lock(); len(turns.last) > remembered+1 || len(turns.waiting) > 0 {
		t.Errorf("%d organizations are remembered, %d wait", len(turns.last), len(turns.waiting))
	}
	turns.mu.Unlock()
}
