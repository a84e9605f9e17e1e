package node

import (
	"context"
	"errors"
	"slices"
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
		// Who is stuck does not keep the others.
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
		n.turns.take("") // nobody's, and for ever
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
		(&box{}).turnOver() // one that never had a turn
	})
}

// TestTurnsAreFair lets one organization ask for many starts at once: another's single one does not
// wait for all of them, and those that give up are no one's loss.
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
		if got := order[:4]; !slices.Equal(got, []string{"busy", "modest", "other", "busy"}) {
			t.Errorf("they start as %v", order)
		}
		next.turnOver()
		if len(n.turns.ring)+len(n.turns.waiting) > 0 || n.turns.free != 1 {
			t.Errorf("in the end there are %+v", n.turns)
		}
	})
}
